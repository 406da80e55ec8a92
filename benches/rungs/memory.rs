//! The calls that are measured, on memory of their own.
//!
//! Unsafe island. Invariant: a [`Memory`] is a mapping of its own, to whose bytes no reference exists.
#![allow(unsafe_code)]

use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange};
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};
use std::ffi::c_void;

/// Calls that are timed together: few, so that some are not interrupted on a busy machine.
pub const BATCH: usize = 16;
/// Pages of a mapping, each of which is called for once.
const PAGES: usize = 256;
const PAGE: usize = PAGE_SIZE as usize;

/// A mapping of [`PAGES`] pages.
pub struct Memory {
    at: *mut c_void,
}

impl Memory {
    pub fn map() -> Self {
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new mapping where the kernel finds room.
        let at = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), PAGES * PAGE, protection, flags) };
        let at = at.expect("a megabyte of memory");
        // SAFETY: mapped just now; so that a first touch is of one page and not of a huge one.
        let _ = unsafe { rustix::mm::madvise(at, PAGES * PAGE, Advice::LinuxNoHugepage) };
        Self { at }
    }

    pub fn range(&self) -> VirtRange {
        let start = VirtAddr(self.at.expose_provenance() as u64);
        VirtRange::new(start, PAGES as u64 * PAGE_SIZE).expect("user memory")
    }

    fn page(&self, page: usize) -> *mut c_void {
        self.at.wrapping_byte_add(page * PAGE)
    }

    fn touch(&self) {
        (0..PAGES).for_each(|page| self.touch_page(page));
    }

    fn touch_page(&self, page: usize) {
        // SAFETY: within the mapping.
        unsafe { self.page(page).cast::<u8>().write_volatile(1) };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped here; what is unmapped already stays so.
        let _ = unsafe { rustix::mm::munmap(self.at, PAGES * PAGE) };
    }
}

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// A call that is about no memory: getppid.
    Other,
    /// First touch of a page.
    Touch,
    /// madvise(MADV_DONTNEED) of a page.
    Drop,
    /// mprotect of a page.
    Protect,
    /// mmap(MAP_FIXED) over a page.
    Replace,
    /// munmap of a page.
    Unmap,
}

impl Subject {
    pub const ALL: [Self; 6] =
        [Self::Other, Self::Touch, Self::Drop, Self::Protect, Self::Replace, Self::Unmap];

    pub fn name(self) -> &'static str {
        match self {
            Self::Other => "getppid",
            Self::Touch => "first touch",
            Self::Drop => "MADV_DONTNEED",
            Self::Protect => "mprotect",
            Self::Replace => "MAP_FIXED",
            Self::Unmap => "munmap",
        }
    }

    /// What comes before a batch.
    pub fn prepare(self, memory: &Memory) {
        if !matches!(self, Self::Touch | Self::Other) {
            memory.touch();
        }
    }

    /// The batches of a mapping, one after the other: every other page first, since neighbours unmapped or protected one after
    /// the other would be joined and split.
    pub fn batches() -> impl Iterator<Item = [usize; BATCH]> {
        let pages: Vec<usize> = (0..PAGES).step_by(2).chain((1..PAGES).step_by(2)).collect();
        (0..PAGES / BATCH).map(move |batch| std::array::from_fn(|n| pages[batch * BATCH + n]))
    }

    /// A batch.
    pub fn run(self, memory: &Memory, batch: [usize; BATCH]) {
        for page in batch {
            let at = memory.page(page);
            match self {
                Self::Touch => memory.touch_page(page),
                Self::Other => drop(std::hint::black_box(rustix::process::getppid())),
                Self::Drop => {
                    // SAFETY: within the mapping, to which nobody has references.
                    unsafe { rustix::mm::madvise(at, PAGE, Advice::LinuxDontNeed) }.expect("MADV_DONTNEED");
                }
                Self::Protect => {
                    // SAFETY: as above.
                    unsafe { rustix::mm::mprotect(at, PAGE, MprotectFlags::READ) }.expect("mprotect");
                }
                Self::Replace => {
                    let (protection, flags) = (ProtFlags::READ, MapFlags::PRIVATE | MapFlags::FIXED);
                    // SAFETY: as above.
                    unsafe { rustix::mm::mmap_anonymous(at, PAGE, protection, flags) }.expect("mmap");
                }
                Self::Unmap => {
                    // SAFETY: as above.
                    unsafe { rustix::mm::munmap(at, PAGE) }.expect("munmap");
                }
            }
        }
    }
}
