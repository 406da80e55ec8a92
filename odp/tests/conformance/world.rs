//! What a behaviour needs of an address space: a program that runs in it, and memory of each kind.

use crate::device::Device;
use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange};
use hw_model::sync::Arc;
use odp::space::AddressSpace;

/// A machine that cannot show a behaviour, and why.
#[derive(Debug)]
pub struct Skip(pub String);

/// Shown, or not to be shown here. A behaviour that is wrong panics.
pub type Verdict = Result<(), Skip>;

/// Kinds of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Private anonymous memory, in small pages.
    Anonymous,
    /// The same, aligned for huge pages, which it may get.
    Huge,
    /// hugetlbfs, shared.
    Hugetlb,
    /// Shared memory without a name.
    Shared,
    /// A file, mapped shared.
    File,
    /// A file, mapped private.
    PrivateFile,
}

/// What a mapping allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allow {
    Nothing,
    Read,
    ReadWrite,
}

/// Memory that a behaviour mapped.
#[derive(Clone, Copy, Debug)]
pub struct Area {
    pub range: VirtRange,
    /// Which of the world's files or objects it maps, if it maps one.
    pub object: usize,
}

impl Area {
    pub fn page(&self, page: u64) -> VirtAddr {
        self.range.start().offset(page * PAGE_SIZE)
    }
    pub fn part(&self, page: u64, pages: u64) -> VirtRange {
        VirtRange::new(self.page(page), pages * PAGE_SIZE).expect("part of the area")
    }
    pub fn pages(&self) -> u64 {
        self.range.page_count()
    }
}

/// A program's loads and stores. In a forked process they neither allocate nor panic.
pub trait Cpu: Sync {
    fn get(&self, at: VirtAddr) -> u64;
    fn put(&self, at: VirtAddr, word: u64);
}

/// Who changes a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    ThisProcess,
    AnotherProcess,
}

pub trait World: Cpu {
    fn space(&self) -> Arc<dyn AddressSpace>;
    /// Maps `pages` pages, readable and writable.
    fn map(&self, kind: Kind, pages: u64) -> Result<Area, Skip>;
    fn protect(&self, range: VirtRange, to: Allow);
    fn unmap(&self, range: VirtRange);
    /// MADV_DONTNEED.
    fn discard(&self, range: VirtRange);
    /// mmap(MAP_FIXED) of fresh anonymous memory.
    fn replace(&self, range: VirtRange);
    /// mremap onto `to`.
    fn remap(&self, from: VirtRange, to: VirtAddr);
    /// Forks; in this process `meanwhile` runs, and after it in the other one `child`, whose answer this gives.
    fn fork(&self, child: &dyn Fn(&dyn Cpu) -> bool, meanwhile: &mut dyn FnMut()) -> bool;
    /// ftruncate, to whole pages.
    fn truncate(&self, area: &Area, pages: u64, by: By);
    /// msync, or what else writes a file's dirty pages back.
    fn write_back(&self, area: &Area);
    /// The first word of a page of the file, as read(2) has it.
    fn in_file(&self, area: &Area, page: u64) -> u64;

    /// A device that reaches all of these ranges.
    fn device(&self, ranges: &[VirtRange]) -> Device {
        Device::open(self.space(), ranges)
    }
}

/// Where in a page words are put: at its start, and at its end.
const ENDS: [u64; 2] = [0, PAGE_SIZE - 8];

fn word(page: u64, end: u64, salt: u64) -> u64 {
    (page << 20 | end) ^ salt.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Every word that a pattern consists of, by address.
pub fn pattern(range: VirtRange, salt: u64) -> impl Iterator<Item = (VirtAddr, u64)> {
    let pages = (0..range.page_count()).flat_map(|page| ENDS.map(|end| (page, end)));
    pages.map(move |(page, end)| (range.start().offset(page * PAGE_SIZE + end), word(page, end, salt)))
}

/// The program writes a pattern.
pub fn fill(cpu: &(impl Cpu + ?Sized), range: VirtRange, salt: u64) {
    pattern(range, salt).for_each(|(at, word)| cpu.put(at, word));
}

/// Whether the program sees the pattern.
pub fn holds(cpu: &(impl Cpu + ?Sized), range: VirtRange, salt: u64) -> bool {
    pattern(range, salt).all(|(at, word)| cpu.get(at) == word)
}

/// Whether the program sees zeroes.
pub fn is_zero(cpu: &(impl Cpu + ?Sized), range: VirtRange) -> bool {
    pattern(range, 0).all(|(at, _)| cpu.get(at) == 0)
}
