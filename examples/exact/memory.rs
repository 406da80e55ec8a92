//! Memory of the C allocator, and what comes in its place.
//!
//! Unsafe island. Invariant: a [`Block`] is memory of malloc's that nobody has a reference to, until it is freed; an
//! [`Other`] is a mapping of its own.
#![allow(unsafe_code)]

use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange};
use hw_model::sync::Arc;
use odp::space::UserRange;
use odp::space::process::ProcessSpace;
use rustix::mm::{MapFlags, ProtFlags};
use std::ffi::c_void;

/// Has malloc map what is large apart, and free unmap it, whatever was freed before.
pub fn map_large_allocations_apart() {
    // SAFETY: takes integers, and touches no memory that anybody was given.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10) };
}

/// An allocation.
pub struct Block {
    at: *mut c_void,
    pages: VirtRange,
}

impl Block {
    /// Of `bytes` bytes, in a mapping of its own.
    pub fn allocate(bytes: u64) -> Option<Self> {
        // SAFETY: any size may be asked for.
        let at = unsafe { libc::malloc(bytes as usize) };
        let start = (at.expose_provenance() as u64).next_multiple_of(PAGE_SIZE);
        let end = (at.addr() as u64 + bytes) & !(PAGE_SIZE - 1);
        // A mapping of its own begins with a header of 16 bytes.
        let apart = at.addr() as u64 % PAGE_SIZE == 16;
        let pages = VirtRange::new(VirtAddr(start), end.checked_sub(start)?)?;
        (!at.is_null() && apart).then_some(Self { at, pages })
    }

    /// The whole pages in it.
    pub fn pages(&self) -> VirtRange {
        self.pages
    }

    /// For registration.
    pub fn user_range(&self, space: &Arc<ProcessSpace>) -> UserRange {
        // SAFETY: nobody has a reference to it. It is freed while it is registered, which is what this program is about: it
        // is a mapping of its own then, and the allocator keeps nothing in it.
        unsafe { UserRange::from_raw(Arc::clone(space) as _, self.pages) }
    }

    /// Gives it back.
    pub fn free(self) {
        // SAFETY: allocated by malloc, and not freed before.
        unsafe { libc::free(self.at) };
    }
}

/// Memory that was mapped in the place of other memory, filled with one byte.
pub struct Other {
    range: VirtRange,
    byte: u8,
}

impl Other {
    /// At exactly `range`; `None` if there is something else by now.
    pub fn map(range: VirtRange, byte: u8) -> Option<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
        let at = std::ptr::with_exposed_provenance_mut(range.start().0 as usize);
        // SAFETY: a new mapping, in the place of none.
        let at = unsafe {
            rustix::mm::mmap_anonymous(at, range.len() as usize, ProtFlags::READ | ProtFlags::WRITE, flags)
        };
        let at = at.ok()?.cast::<u8>();
        for offset in 0..range.len() as usize {
            // SAFETY: within the mapping made just now.
            unsafe { at.wrapping_add(offset).write_volatile(byte) };
        }
        Some(Self { range, byte })
    }

    /// Bytes that are not as they were filled.
    pub fn changed_bytes(&self) -> u64 {
        let at = std::ptr::with_exposed_provenance::<u8>(self.range.start().0 as usize);
        let changed = (0..self.range.len() as usize).filter(|offset| {
            // SAFETY: within the mapping, which is there until this is dropped.
            let byte = unsafe { at.wrapping_add(*offset).read_volatile() };
            byte != self.byte
        });
        changed.count() as u64
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let at = std::ptr::with_exposed_provenance_mut(self.range.start().0 as usize);
        // SAFETY: mapped here, and nobody has a reference to it.
        let _ = unsafe { rustix::mm::munmap(at, self.range.len() as usize) };
    }
}
