//! Memory whose pages are mapped, made inaccessible and mapped again while devices use them.
//!
//! Unsafe island. Invariant: every call replaces or changes pages inside the one range that [`Remapped`] reserved, which
//! always stays reserved until it is dropped; nothing borrows from it.
#![allow(unsafe_code)]

use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange};
use hw_model::sync::Arc;
use hw_model::sync::atomic::{AtomicU64, Ordering};
use odp::space::{AddressSpace, UserRange};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};
use std::ffi::c_void;

/// Private anonymous memory.
pub struct Remapped {
    base: u64,
    len: u64,
}

impl Remapped {
    pub fn new(pages: u64) -> Arc<Self> {
        let len = pages * PAGE_SIZE;
        // SAFETY: a new private mapping at an address that the kernel chooses replaces nothing.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len as usize,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        };
        Arc::new(Self { base: base.expect("address space") as u64, len })
    }

    pub fn range(&self) -> VirtRange {
        VirtRange::new(VirtAddr(self.base), self.len).expect("a mapping lies in the address space")
    }

    pub fn user_range(self: &Arc<Self>, space: Arc<dyn AddressSpace>) -> UserRange {
        // SAFETY: this type owns the memory, makes no reference to it, and gives none out.
        let range = unsafe { UserRange::from_raw(space, self.range()) };
        range.keeping(Arc::clone(self) as _)
    }

    fn place(&self, page: u64, pages: u64) -> (*mut c_void, usize) {
        assert!((page + pages) * PAGE_SIZE <= self.len, "inside the reservation");
        ((self.base + page * PAGE_SIZE) as *mut c_void, (pages * PAGE_SIZE) as usize)
    }

    /// Unmaps pages and puts others in their place, in one call: nobody else gets the addresses.
    pub fn replace(&self, page: u64, pages: u64, accessible: bool) {
        let prot = if accessible { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::empty() };
        let (at, len) = self.place(page, pages);
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: the place lies in our own reservation, and nothing borrows from it.
        unsafe { rustix::mm::mmap_anonymous(at, len, prot, flags) }.expect("our own reservation");
    }

    /// The same with hugetlb pages in whole huge pages; `false` if the machine has none to spare.
    pub fn replace_hugetlb(&self, page: u64, pages: u64) -> bool {
        let (at, len) = self.place(page, pages);
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::HUGETLB);
        // Elsewhere first: where they are not to be had, the kernel leaves a hole in which other threads' memory may land.
        // SAFETY: a new private mapping at an address that the kernel chooses replaces nothing.
        let Ok(fresh) = (unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, prot, flags) })
        else {
            return false;
        };
        let how = rustix::mm::MremapFlags::MAYMOVE;
        // SAFETY: it comes from the mapping just made to a place in our own reservation, and nothing borrows from either.
        unsafe { rustix::mm::mremap_fixed(fresh, len, len, how, at) }.expect("our own reservation");
        true
    }

    /// Adds to the word at `offset` as a program does: with one locked instruction.
    pub fn add(&self, offset: u64, count: u64) {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.len, "a word inside the reservation");
        let word = (self.base + offset) as *mut u64;
        // SAFETY: aligned, and mapped for as long as `self` lives; devices change it with atomic instructions only.
        unsafe { AtomicU64::from_ptr(word) }.fetch_add(count, Ordering::SeqCst);
    }

    /// No huge pages from now on.
    pub fn use_small_pages(&self) {
        let (at, len) = self.place(0, self.len / PAGE_SIZE);
        // SAFETY: the place lies in our own reservation, and this advice changes no byte.
        unsafe { rustix::mm::madvise(at, len, rustix::mm::Advice::LinuxNoHugepage) }
            .expect("our own reservation");
    }

    /// The word at `offset`.
    pub fn word(&self, offset: u64) -> u64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.len, "a word inside the reservation");
        let word = (self.base + offset) as *mut u64;
        // SAFETY: aligned, and mapped for as long as `self` lives; devices change it with atomic instructions or copies.
        unsafe { AtomicU64::from_ptr(word) }.load(Ordering::SeqCst)
    }

    /// Takes write permission away from pages, or gives it.
    pub fn protect(&self, page: u64, pages: u64, writable: bool) {
        let flags = if writable { MprotectFlags::READ | MprotectFlags::WRITE } else { MprotectFlags::READ };
        let (at, len) = self.place(page, pages);
        // SAFETY: the place lies in our own reservation, and nothing borrows from it.
        unsafe { rustix::mm::mprotect(at, len, flags) }.expect("our own reservation");
    }

    /// Drops pages: they read as zeroes afterwards.
    pub fn discard(&self, page: u64, pages: u64) {
        let (at, len) = self.place(page, pages);
        // SAFETY: the place lies in our own reservation; nothing borrows from it, so its bytes may change at any time.
        unsafe { rustix::mm::madvise(at, len, rustix::mm::Advice::LinuxDontNeed) }
            .expect("our own reservation");
    }
}

impl Drop for Remapped {
    fn drop(&mut self) {
        // SAFETY: our own reservation, which nothing borrows from; what registered it holds it by contract.
        let _ = unsafe { rustix::mm::munmap(self.base as *mut c_void, self.len as usize) };
    }
}

/// Pages of a file of a disk's file system, mapped shared.
pub struct SharedFile {
    file: std::fs::File,
    base: u64,
    len: u64,
}

impl SharedFile {
    pub fn new(pages: u64) -> Arc<Self> {
        let len = pages * PAGE_SIZE;
        // Beside the test's binary, which is on a disk; temporary folders may be memory.
        let beside =
            std::env::current_exe().expect("this test").parent().expect("it is somewhere").to_owned();
        let file = tempfile::tempfile_in(beside).expect("a file");
        file.set_len(len).expect("room on the disk");
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses replaces nothing.
        let base =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), len as usize, prot, MapFlags::SHARED, &file, 0) };
        Arc::new(Self { file, base: base.expect("address space") as u64, len })
    }

    pub fn user_range(self: &Arc<Self>, space: Arc<dyn AddressSpace>) -> UserRange {
        let range =
            VirtRange::new(VirtAddr(self.base), self.len).expect("a mapping lies in the address space");
        // SAFETY: this type owns the memory, makes no reference to it, and gives none out.
        let range = unsafe { UserRange::from_raw(space, range) };
        range.keeping(Arc::clone(self) as _)
    }

    /// The file from its start, to be read by another process.
    pub fn reopened(&self) -> std::fs::File {
        use std::os::fd::AsRawFd;
        std::fs::File::open(format!("/proc/self/fd/{}", self.file.as_raw_fd())).expect("our own file")
    }

    /// What is in memory goes to the disk.
    pub fn write_back(&self) {
        let flags = rustix::mm::MsyncFlags::SYNC;
        // SAFETY: our own mapping, which nothing borrows from.
        unsafe { rustix::mm::msync(self.base as *mut c_void, self.len as usize, flags) }.expect("mapped");
    }

    /// KiB of its pages that must go to the disk before they may go from memory, as the kernel counts them.
    pub fn dirty_kib(&self) -> u64 {
        let smaps = std::fs::read_to_string("/proc/self/smaps").expect("a process has one");
        let head = format!("{:x}-", self.base);
        let mapping = smaps.lines().skip_while(|line| !line.starts_with(&head)).skip(1);
        let fields =
            mapping.take_while(|line| line.split(' ').next().is_some_and(|word| word.ends_with(':')));
        let dirty =
            fields.filter(|line| line.starts_with("Shared_Dirty") || line.starts_with("Private_Dirty"));
        dirty.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum()
    }
}

impl Drop for SharedFile {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nothing borrows from; what registered it holds it by contract.
        let _ = unsafe { rustix::mm::munmap(self.base as *mut c_void, self.len as usize) };
    }
}

/// `len` bytes from the second page of the address space on, where nothing can be mapped (vm.mmap_min_addr). Never read or
/// written: only refused.
pub fn low_address(space: &Arc<dyn AddressSpace>, len: u64) -> UserRange {
    let start = if len > u64::MAX - PAGE_SIZE { 0 } else { PAGE_SIZE };
    anywhere(space, VirtRange::new(VirtAddr(start), len).expect("does not pass the top"))
}

/// A range at which nothing of ours is.
pub fn anywhere(space: &Arc<dyn AddressSpace>, range: VirtRange) -> UserRange {
    // SAFETY: no Rust object lies where nothing is mapped; the tests that use this expect to be refused.
    unsafe { UserRange::from_raw(Arc::clone(space), range) }
}
