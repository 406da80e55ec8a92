//! Mappings of our own over files of our own.
//!
//! Unsafe island. Invariant: an address range in a [`View`] was mapped by it and is unmapped or replaced only by it, and
//! no Rust reference to its bytes is ever made: they are copied in and out by address, like all memory that devices reach.
#![allow(unsafe_code)]

use hw_model::addr::{VirtAddr, VirtRange};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use std::ffi::c_void;

/// A range of address space that is ours until dropped.
#[derive(Debug)]
pub(super) struct View {
    range: VirtRange,
}

fn pointer(at: VirtAddr) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(at.0 as usize)
}

fn len(bytes: u64) -> Result<usize, Errno> {
    usize::try_from(bytes).map_err(|_| Errno::NOMEM)
}

impl View {
    /// Maps the first `bytes` of `file`, shared.
    pub(super) fn of_file(file: impl AsFd, bytes: u64) -> Result<Self, Errno> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel finds room replaces nothing.
        let at = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len(bytes)?, protection, MapFlags::SHARED, file, 0)
        }?;
        Ok(Self::at(at, bytes))
    }

    /// Address space for `bytes`, aligned to `align` (a power of two), without access.
    pub(super) fn reserve(bytes: u64, align: u64) -> Result<Self, Errno> {
        let whole = bytes.checked_add(align).ok_or(Errno::NOMEM)?;
        // SAFETY: as in of_file.
        let at = unsafe {
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), len(whole)?, ProtFlags::empty(), flags)
        }?;
        let whole = Self::at(at, whole);
        let start = VirtAddr(whole.range.start().0.next_multiple_of(align));
        let before = start.0 - whole.range.start().0;
        let after = align - before;
        let range = VirtRange::new(start, bytes).ok_or(Errno::NOMEM)?;
        for (at, bytes) in [(whole.range.start(), before), (range.end(), after)] {
            if bytes > 0 {
                // SAFETY: ours since the call above, and nobody knows of it.
                unsafe { rustix::mm::munmap(pointer(at), len(bytes)?) }?;
            }
        }
        std::mem::forget(whole);
        Ok(Self { range })
    }

    fn at(pointer: *mut c_void, bytes: u64) -> Self {
        let range = VirtRange::new(VirtAddr(pointer.expose_provenance() as u64), bytes);
        Self { range: range.expect("the kernel maps within the address space") }
    }

    pub(super) fn range(&self) -> VirtRange {
        self.range
    }

    /// Puts `bytes` of `file` at `offset` in place of what is mapped `inside` bytes into the view. In one step: an access
    /// meets the old pages or the new ones.
    pub(super) fn place(&self, inside: u64, bytes: u64, file: impl AsFd, offset: u64) -> Result<(), Errno> {
        let at = self.part(inside, bytes);
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: the part lies in this view, so only pages of the view are replaced, and no reference to them exists.
        unsafe { rustix::mm::mmap(pointer(at), len(bytes)?, protection, flags, file, offset) }.map(drop)
    }

    /// The address of `bytes` bytes `inside` the view.
    fn part(&self, inside: u64, bytes: u64) -> VirtAddr {
        assert!(
            inside.checked_add(bytes).is_some_and(|end| end <= self.range.len()),
            "{bytes:#x} bytes at {inside:#x} are not in a view of {:#x}",
            self.range.len()
        );
        self.range.start().offset(inside)
    }
}

impl Drop for View {
    fn drop(&mut self) {
        let Ok(bytes) = len(self.range.len()) else { return };
        let at = pointer(self.range.start());
        // SAFETY: mapped by this view; nothing refers to it any more.
        let left = unsafe { rustix::mm::munmap(at, bytes) };
        debug_assert!(left.is_ok(), "{left:?}");
    }
}

/// A memory file of `bytes`, in huge pages if wanted.
pub(super) fn memory_file(name: &str, bytes: u64, huge: bool) -> Result<OwnedFd, Errno> {
    let kind = if huge { MemfdFlags::HUGETLB } else { MemfdFlags::empty() };
    let file = rustix::fs::memfd_create(name, kind | MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&file, bytes)?;
    Ok(file)
}
