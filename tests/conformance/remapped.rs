//! Memory whose pages are dropped, replaced and protected while devices use them.
//!
//! Unsafe island. Invariant: every call replaces or changes pages inside the one range that [`Remapped`] reserved, which
//! always stays reserved until it is dropped; nothing borrows from it.
#![allow(unsafe_code)]

use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange};
use hw_model::sync::Arc;
use odp::space::{AddressSpace, UserRange};
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};
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
                MapFlags::PRIVATE,
            )
        };
        let memory = Self { base: base.expect("address space") as u64, len };
        let (at, len) = memory.place(0, pages);
        // SAFETY: our own new mapping. Without huge pages, what is dropped is exactly what was asked.
        unsafe { rustix::mm::madvise(at, len, Advice::LinuxNoHugepage) }.expect("our own mapping");
        Arc::new(memory)
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
    pub fn replace(&self, page: u64, pages: u64) {
        let (at, len) = self.place(page, pages);
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the place lies in our own reservation, and nothing borrows from it.
        unsafe { rustix::mm::mmap_anonymous(at, len, prot, MapFlags::PRIVATE | MapFlags::FIXED) }
            .expect("our own reservation");
    }

    /// Changes what the program may do with pages.
    pub fn protect(&self, page: u64, pages: u64, flags: MprotectFlags) {
        let (at, len) = self.place(page, pages);
        // SAFETY: the place lies in our own reservation, and nothing borrows from it.
        unsafe { rustix::mm::mprotect(at, len, flags) }.expect("our own reservation");
    }

    /// Drops pages: they read as zeroes afterwards.
    pub fn discard(&self, page: u64, pages: u64) {
        let (at, len) = self.place(page, pages);
        // SAFETY: the place lies in our own reservation; nothing borrows from it, so its bytes may change at any time.
        unsafe { rustix::mm::madvise(at, len, Advice::LinuxDontNeed) }.expect("our own reservation");
    }
}

impl Drop for Remapped {
    fn drop(&mut self) {
        // SAFETY: our own reservation, which nothing borrows from; what registered it holds it by contract.
        let _ = unsafe { rustix::mm::munmap(self.base as *mut c_void, self.len as usize) };
    }
}
