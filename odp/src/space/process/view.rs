//! Mappings of our own over files of our own.
//!
//! Unsafe island. Invariant: an address range in a [`View`] was mapped by it and is unmapped or replaced only by it, and
//! no Rust reference to its bytes is ever made: they are copied in and out by address, like all memory that devices reach.
#![allow(unsafe_code)]

use hw_model::addr::{VirtAddr, VirtRange};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::mm::{MapFlags, MremapFlags, ProtFlags};
use std::ffi::c_void;

/// A range of address space that is ours until dropped.
#[derive(Debug)]
pub(super) struct View {
    range: VirtRange,
    /// What a drop leaves: nothing, or, in a range lent by somebody, memory that cannot be accessed.
    lent: bool,
}

/// What is put into a view.
pub(super) enum Part<'a> {
    /// Zeroed private memory, in huge pages of the pool or not.
    Anonymous { huge: bool },
    /// A file from `offset` on, shared or for this mapping alone.
    File { file: BorrowedFd<'a>, offset: u64, private: bool },
}

/// A range of the program's address space, lent to have other memory put in its place.
#[derive(Debug)]
pub struct LentRange(VirtRange);

impl LentRange {
    /// Lends `range`.
    ///
    /// # Safety
    /// The range is the caller's to give: nothing is mapped there that anybody refers to, and until whatever takes the
    /// range has been dropped nobody else maps, unmaps or protects any of it. Then it is left mapped without access.
    #[must_use]
    pub unsafe fn new(range: VirtRange) -> Self {
        Self(range)
    }

    /// The range lent.
    #[must_use]
    pub fn range(&self) -> VirtRange {
        self.0
    }
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
        Ok(Self::at(at, bytes, false))
    }

    /// Address space for `bytes`, aligned to `align` (a power of two), without access.
    pub(super) fn reserve(bytes: u64, align: u64) -> Result<Self, Errno> {
        let whole = bytes.checked_add(align).ok_or(Errno::NOMEM)?;
        // SAFETY: as in of_file.
        let at = unsafe {
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), len(whole)?, ProtFlags::empty(), flags)
        }?;
        let whole = Self::at(at, whole, false);
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
        Ok(Self { range, lent: false })
    }

    /// Takes over a range, whatever is mapped there now.
    pub(super) fn lent(range: LentRange) -> Self {
        Self { range: range.0, lent: true }
    }

    fn at(pointer: *mut c_void, bytes: u64, lent: bool) -> Self {
        let range = VirtRange::new(VirtAddr(pointer.expose_provenance() as u64), bytes);
        Self { range: range.expect("the kernel maps within the address space"), lent }
    }

    pub(super) fn range(&self) -> VirtRange {
        self.range
    }

    /// Puts `bytes` of `file` at `offset` in place of what is mapped `inside` bytes into the view. In one step: an access
    /// meets the old pages or the new ones. With `resident` the pages are faulted in.
    pub(super) fn place(
        &self,
        inside: u64,
        bytes: u64,
        (file, offset): (impl AsFd, u64),
        resident: bool,
    ) -> Result<(), Errno> {
        let at = self.part(inside, bytes);
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let populate = if resident { MapFlags::POPULATE } else { MapFlags::empty() };
        let flags = MapFlags::SHARED | MapFlags::FIXED | populate;
        // SAFETY: the part lies in this view, so only pages of the view are replaced, and no reference to them exists.
        unsafe { rustix::mm::mmap(pointer(at), len(bytes)?, protection, flags, file, offset) }.map(drop)
    }

    /// Puts `bytes` bytes of `what` in place of what is mapped `inside` bytes into the view, in one step.
    pub(super) fn put(&self, inside: u64, bytes: u64, what: Part<'_>) -> Result<(), Errno> {
        let (at, bytes) = (pointer(self.part(inside, bytes)), len(bytes)?);
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let private = MapFlags::PRIVATE | MapFlags::FIXED;
        match what {
            Part::Anonymous { huge } => {
                let flags = if huge { private | MapFlags::HUGETLB } else { private };
                // SAFETY: as in place.
                unsafe { rustix::mm::mmap_anonymous(at, bytes, protection, flags) }
            }
            Part::File { file, offset, private: own } => {
                let flags = if own { private } else { MapFlags::SHARED | MapFlags::FIXED };
                // SAFETY: as in place.
                unsafe { rustix::mm::mmap(at, bytes, protection, flags, file, offset) }
            }
        }
        .map(drop)
    }

    /// Moves the pages at `from` to `inside` bytes into the view, in place of what is mapped there.
    ///
    /// # Safety
    /// `from` is the caller's to unmap, and nobody refers to it.
    pub(super) unsafe fn take(&self, inside: u64, from: VirtRange) -> Result<(), Errno> {
        let (to, bytes) = (pointer(self.part(inside, from.len())), len(from.len())?);
        let flags = MremapFlags::MAYMOVE;
        // SAFETY: the caller gives `from` away; the part lies in this view, and no reference to it exists.
        unsafe { rustix::mm::mremap_fixed(pointer(from.start()), bytes, bytes, flags, to) }.map(drop)
    }

    /// The address of `bytes` bytes `inside` the view.
    pub(super) fn part(&self, inside: u64, bytes: u64) -> VirtAddr {
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
        if self.lent {
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
            // SAFETY: the range was lent to this view until now.
            let left = unsafe { rustix::mm::mmap_anonymous(at, bytes, ProtFlags::empty(), flags) };
            debug_assert!(left.is_ok(), "one mapping in place of several cannot run out of mappings");
        } else {
            // SAFETY: mapped by this view; nothing refers to it any more.
            let left = unsafe { rustix::mm::munmap(at, bytes) };
            debug_assert!(left.is_ok(), "{left:?}");
        }
    }
}

/// A memory file of `bytes`, in huge pages if wanted.
pub(super) fn memory_file(name: &str, bytes: u64, huge: bool) -> Result<OwnedFd, Errno> {
    let kind = if huge { MemfdFlags::HUGETLB } else { MemfdFlags::empty() };
    let file = rustix::fs::memfd_create(name, kind | MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&file, bytes)?;
    Ok(file)
}
