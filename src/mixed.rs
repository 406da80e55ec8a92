//! One contiguous range of this process's memory, made of pages of many kinds: what the demo, the tests and the benches
//! register.
//!
//! Unsafe island. Invariant: every mapping made here lies inside the one range that [`MixedMemory`] reserved and unmaps
//! on drop, so nothing else's memory is ever replaced; bytes are copied through the safe copy of `odp`, never borrowed.
#![allow(unsafe_code)]

use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange};
use hw_model::sync::Arc;
use odp::space::process::LentRange;
use odp::space::{AddressSpace, UserRange};
use rustix::fd::AsFd;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::ffi::c_void;
use std::fs::File;
use std::io;

/// Bytes of a huge page.
pub const HUGE: u64 = 2 << 20;

/// A kind of memory to lay out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Private anonymous memory that huge pages are kept away from.
    Anonymous,
    /// Private anonymous memory that asks for huge pages.
    TransparentHuge,
    /// A shared mapping of a memfd.
    Shared,
    /// A private mapping of a file on disk.
    File,
    /// Private anonymous memory that nobody has touched.
    Untouched,
    /// Huge pages from the pool, if the machine has any.
    Hugetlb,
    /// Left out: a hole that the caller fills, with a DMABUF for instance.
    Hole,
}

/// A part of the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// What it is made of.
    pub kind: Kind,
    /// Bytes from the start of the range.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// Memory of many kinds in one range.
#[derive(Debug)]
pub struct MixedMemory {
    base: u64,
    reserved: (u64, u64),
    len: u64,
    parts: Vec<Part>,
    lent: Vec<Part>,
}

impl MixedMemory {
    /// Lays out `parts` (kind and bytes) one behind the other. The range starts on a 2 MiB boundary.
    ///
    /// # Errors
    /// What the kernel said to a mapping.
    pub fn new(parts: &[(Kind, u64)]) -> io::Result<Self> {
        let len: u64 = parts.iter().map(|(_, len)| len).sum();
        let reserve = usize::try_from(len + HUGE).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: a new private mapping at an address that the kernel chooses replaces nothing.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                reserve,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )?
        } as u64;
        let mut memory = Self {
            base: start.next_multiple_of(HUGE),
            reserved: (start, reserve as u64),
            len,
            parts: Vec::new(),
            lent: Vec::new(),
        };
        let mut offset = 0;
        for &(kind, len) in parts {
            memory.lay(Part { kind, offset, len })?;
            offset += len;
        }
        Ok(memory)
    }

    fn lay(&mut self, part: Part) -> io::Result<()> {
        let anonymous = MapFlags::PRIVATE | MapFlags::FIXED;
        match part.kind {
            Kind::Anonymous => {
                self.map_anonymous(part, anonymous)?;
                self.advise(part, Advice::LinuxNoHugepage)?;
            }
            Kind::TransparentHuge => {
                self.map_anonymous(part, anonymous)?;
                self.advise(part, Advice::LinuxHugepage)?;
            }
            Kind::Untouched => {
                // As much address space as anybody wants: nobody has promised to touch it.
                self.map_anonymous(part, anonymous | MapFlags::NORESERVE)?;
                self.advise(part, Advice::LinuxNoHugepage)?;
            }
            Kind::Hugetlb => self.map_anonymous(part, anonymous | MapFlags::HUGETLB)?,
            Kind::Shared => {
                let fd = rustix::fs::memfd_create("anypage-mixed", rustix::fs::MemfdFlags::CLOEXEC)?;
                rustix::fs::ftruncate(&fd, part.len)?;
                self.map_file(part, &fd, MapFlags::SHARED | MapFlags::FIXED)?;
            }
            Kind::File => {
                let file = temporary_file(part.len)?;
                self.map_file(part, &file, MapFlags::PRIVATE | MapFlags::FIXED)?;
            }
            Kind::Hole => {}
        }
        self.parts.push(part);
        Ok(())
    }

    fn place(&self, part: Part) -> (*mut c_void, usize) {
        assert!(part.offset + part.len <= self.len, "parts lie in the range");
        ((self.base + part.offset) as *mut c_void, usize::try_from(part.len).expect("part of a mapping"))
    }

    fn map_anonymous(&self, part: Part, flags: MapFlags) -> io::Result<()> {
        let (at, len) = self.place(part);
        // SAFETY: the place lies in our own reservation, and nothing borrows from it.
        unsafe { rustix::mm::mmap_anonymous(at, len, ProtFlags::READ | ProtFlags::WRITE, flags)? };
        Ok(())
    }

    fn map_file(&self, part: Part, fd: impl AsFd, flags: MapFlags) -> io::Result<()> {
        let (at, len) = self.place(part);
        // SAFETY: the place lies in our own reservation, and nothing borrows from it.
        unsafe { rustix::mm::mmap(at, len, ProtFlags::READ | ProtFlags::WRITE, flags, fd, 0)? };
        Ok(())
    }

    fn advise(&self, part: Part, advice: Advice) -> io::Result<()> {
        let (at, len) = self.place(part);
        // SAFETY: the place lies in our own reservation; nothing borrows from it, so its bytes may change at any time.
        unsafe { rustix::mm::madvise(at, len, advice)? };
        Ok(())
    }

    /// The whole range.
    ///
    /// # Panics
    /// Never: the kernel maps nothing beyond the address space.
    #[must_use]
    pub fn range(&self) -> VirtRange {
        VirtRange::new(VirtAddr(self.base), self.len).expect("a mapping lies in the address space")
    }

    /// The range as memory that regions of `space` may be made of, for as long as it is held.
    #[must_use]
    pub fn user_range(self: &Arc<Self>, space: Arc<dyn AddressSpace>) -> UserRange {
        // SAFETY: this type owns the memory, makes no reference to it, and gives none out.
        let range = unsafe { UserRange::from_raw(space, self.range()) };
        range.keeping(Arc::clone(self) as _)
    }

    /// Lends the first part of `kind` to whoever puts other memory in its place; `None` if there is no such part. A part
    /// is lent once.
    #[must_use]
    pub fn lend(&mut self, kind: Kind) -> Option<LentRange> {
        let index = self.parts.iter().position(|part| part.kind == kind && !self.lent.contains(part))?;
        let part = self.parts[index];
        self.lent.push(part);
        let range = VirtRange::new(VirtAddr(self.base + part.offset), part.len)?;
        // SAFETY: the part lies in our own reservation, nothing refers to it, and it is lent this once; we unmap nothing
        // before we are dropped, and whoever borrowed it keeps no longer than that.
        Some(unsafe { LentRange::new(range) })
    }

    /// The parts, in order.
    #[must_use]
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Takes pages out of the page table. What they hold stays where the kind keeps it elsewhere, as a shared mapping does.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn forget(&self, page: u64, pages: u64) -> io::Result<()> {
        let part = Part { kind: Kind::Hole, offset: page * PAGE_SIZE, len: pages * PAGE_SIZE };
        self.advise(part, Advice::LinuxDontNeed)
    }

    /// Drops `pages` pages from `page` on, as an application does to give memory back: MADV_REMOVE in shared memory,
    /// MADV_DONTNEED elsewhere. In a huge page this splits it.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn discard(&self, page: u64, pages: u64) -> io::Result<()> {
        let part = Part { kind: Kind::Hole, offset: page * PAGE_SIZE, len: pages * PAGE_SIZE };
        let kind = self.kind_at(page);
        self.advise(part, if kind == Kind::Shared { Advice::LinuxRemove } else { Advice::LinuxDontNeed })
    }

    /// The kind that page `page` was laid out as.
    ///
    /// # Panics
    /// If `page` is not in the range.
    #[must_use]
    pub fn kind_at(&self, page: u64) -> Kind {
        self.part_at(page).kind
    }

    /// Whether page `page` lies in the second half of its part.
    ///
    /// # Panics
    /// If `page` is not in the range.
    #[must_use]
    pub fn is_in_second_half(&self, page: u64) -> bool {
        let part = self.part_at(page);
        page * PAGE_SIZE - part.offset >= part.len / 2
    }

    fn part_at(&self, page: u64) -> &Part {
        let offset = page * PAGE_SIZE;
        let part = self.parts.iter().find(|part| (part.offset..part.offset + part.len).contains(&offset));
        part.expect("a page of the range")
    }
}

impl Drop for MixedMemory {
    fn drop(&mut self) {
        let (start, len) = self.reserved;
        // SAFETY: our own reservation, which nothing borrows from; what registered it holds it by contract.
        let _ =
            unsafe { rustix::mm::munmap(start as *mut c_void, usize::try_from(len).expect("was mapped")) };
    }
}

/// A file on disk with no name and `len` bytes of [`file_byte`].
fn temporary_file(len: u64) -> io::Result<File> {
    use std::io::Write;
    let file = tempfile::tempfile()?;
    let mut writer = io::BufWriter::with_capacity(1 << 20, &file);
    let mut block = vec![0_u8; 4096];
    for page in 0..len.div_ceil(PAGE_SIZE) {
        for (word, bytes) in block.chunks_exact_mut(8).enumerate() {
            bytes.copy_from_slice(&file_word(page * 512 + word as u64).to_le_bytes());
        }
        writer.write_all(&block)?;
    }
    writer.flush()?;
    drop(writer);
    Ok(file)
}

/// What the 64-bit word `word` of a file part holds on disk.
#[must_use]
pub fn file_word(word: u64) -> u64 {
    word.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}
