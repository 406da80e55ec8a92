//! Memory that we allocated: every change of it goes through us.

use super::ProcessSpace;
use super::segments::{Frames, Segment};
use super::view::{self, View};
use crate::notifier::Event;
use crate::page::Backing;
use crate::space::dmabuf::SystemPages;
use crate::space::{AddressSpace, UserRange};
use hw_model::addr::{PAGE_SIZE, PhysAddr, VirtAddr, VirtRange, page_bytes};
use hw_model::sync::Arc;
use rustix::fd::OwnedFd;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

const HUGE_PAGE: u64 = 2 << 20;

/// Memory of its own file, mapped twice: once for the program, once for devices. Its pages have physical addresses of
/// their own, so that a stale translation really reads and writes the wrong bytes, as on hardware.
///
/// Starts zeroed. Given back on drop, after whoever was registered on it has been told.
#[derive(Debug)]
pub struct OwnedMemory {
    space: Arc<ProcessSpace>,
    file: OwnedFd,
    /// The program's mapping; `None` only while dropping.
    front: Option<View>,
    /// The devices' mapping.
    back: Arc<View>,
    range: VirtRange,
    base: PhysAddr,
    /// Bytes in a page.
    page: u64,
}

/// Why owned memory could not be had or used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OwnedError {
    /// No memory of no bytes.
    #[error("owned memory holds at least one byte")]
    Empty,
    /// The host has no memory, address space or huge pages for it.
    #[error("no {bytes} bytes of memory to be had: {reason}")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: u64,
        /// What the kernel said.
        reason: Errno,
    },
    /// Past the end.
    #[error("{len} bytes at {offset} are not in owned memory of {size} bytes")]
    OutOfRange {
        /// Where, from the start.
        offset: u64,
        /// How many.
        len: u64,
        /// Bytes there are.
        size: u64,
    },
    /// A page could not be had when it was touched.
    #[error("the host has no page to put at offset {offset}")]
    NoPage {
        /// First byte not reached, from the start.
        offset: u64,
    },
    /// Only whole pages can be discarded.
    #[error("{len} bytes at {offset} are not whole pages of {page} bytes")]
    NotWholePages {
        /// Where, from the start.
        offset: u64,
        /// How many.
        len: u64,
        /// Bytes in a page.
        page: u64,
    },
}

struct OwnedSegment {
    range: VirtRange,
    base: PhysAddr,
    backing: Backing,
}

impl Segment for OwnedSegment {
    fn range(&self) -> VirtRange {
        self.range
    }

    fn frames(&self, at: VirtAddr) -> Frames {
        let inside = at.0 - self.range.start().0;
        Frames {
            phys: self.base.offset(inside),
            pages: (self.range.len() - inside) / PAGE_SIZE,
            backing: self.backing,
            provider: None,
        }
    }
}

impl OwnedMemory {
    /// At least `bytes` bytes, in whole pages.
    ///
    /// # Errors
    /// See [`OwnedError`].
    pub fn new(space: &Arc<ProcessSpace>, bytes: u64) -> Result<Self, OwnedError> {
        Self::with_pages(space, bytes, PAGE_SIZE)
    }

    /// The same in hugetlb pages of 2 MiB.
    ///
    /// # Errors
    /// [`OwnedError::OutOfMemory`] also if the host has no such pages to spare.
    pub fn huge(space: &Arc<ProcessSpace>, bytes: u64) -> Result<Self, OwnedError> {
        Self::with_pages(space, bytes, HUGE_PAGE)
    }

    fn with_pages(space: &Arc<ProcessSpace>, bytes: u64, page: u64) -> Result<Self, OwnedError> {
        if bytes == 0 {
            return Err(OwnedError::Empty);
        }
        let refused = |reason| OwnedError::OutOfMemory { bytes, reason };
        let size = bytes.checked_next_multiple_of(page).ok_or(refused(Errno::NOMEM))?;
        let huge = page > PAGE_SIZE;
        let file = view::memory_file("anypage-owned", size, huge).map_err(refused)?;
        let align = if size >= HUGE_PAGE { HUGE_PAGE } else { PAGE_SIZE };
        let front = View::reserve(size, align).map_err(refused)?;
        front.place(0, size, (&file, 0), false).map_err(refused)?;
        let back = Arc::new(View::of_file(&file, size).map_err(refused)?);
        let range = front.range();
        let base = space.memory.add_window(Arc::clone(&back));
        let backing = if huge { Backing::Hugetlb } else { Backing::Shared };
        let segment = Arc::new(OwnedSegment { range, base, backing });
        space.segments.add(segment).expect("a fresh mapping is nobody's segment");
        Ok(Self { space: Arc::clone(space), file, front: Some(front), back, range, base, page })
    }

    /// Where it lies in the program's address space: whole pages.
    #[must_use]
    pub fn range(&self) -> VirtRange {
        self.range
    }

    /// The first byte, for programs. What devices write there changes under any reference made from it.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.range.start().0 as usize)
    }

    /// Bytes it holds: what was asked for, rounded up to whole pages.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.range.len()
    }

    /// All of it, to make regions of. The memory stays while that lives.
    #[must_use]
    pub fn user_range(self: &Arc<Self>) -> UserRange {
        let space = Arc::clone(&self.space) as Arc<dyn AddressSpace>;
        let owner = Arc::clone(self) as Arc<dyn std::any::Any + Send + Sync>;
        UserRange::owned(space, self.range, owner)
    }

    /// The physical address of the first byte. The rest follows.
    #[must_use]
    pub fn physical_base(&self) -> PhysAddr {
        self.base
    }

    /// Its pages of 4 KiB, as those of a driver that exports them; what [`OwnedMemory::discard`] takes away comes back zeroed
    /// in the same frame.
    #[must_use]
    pub fn system_pages(self: &Arc<Self>) -> SystemPages {
        let pages = (0..self.range.page_count()).map(|page| self.base.offset(page_bytes(page))).collect();
        SystemPages::new(self.space.memory(), pages, Arc::clone(self) as _)
    }

    /// The space it belongs to.
    #[must_use]
    pub fn space(&self) -> &Arc<ProcessSpace> {
        &self.space
    }

    /// Copies out of it.
    ///
    /// # Errors
    /// See [`OwnedError`].
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), OwnedError> {
        let at = self.place(offset, out.len() as u64)?;
        let copied = self.space.memory.copier().read(at, out);
        copied.map_err(|short| OwnedError::NoPage { offset: offset + short.copied })
    }

    /// Copies into it.
    ///
    /// # Errors
    /// See [`OwnedError`].
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), OwnedError> {
        let at = self.place(offset, data.len() as u64)?;
        let copied = self.space.memory.copier().write(at, data);
        copied.map_err(|short| OwnedError::NoPage { offset: offset + short.copied })
    }

    /// Gives pages back to the host; they read as zeroes afterwards. Whoever registered is told before they go. Waits for
    /// DMA under way: not to be called while holding a lock that notifier callbacks take.
    ///
    /// # Errors
    /// See [`OwnedError`].
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), OwnedError> {
        let start = self.place(offset, len)?;
        let page = self.page;
        if !offset.is_multiple_of(page) || !len.is_multiple_of(page) {
            return Err(OwnedError::NotWholePages { offset, len, page });
        }
        if len == 0 {
            return Ok(());
        }
        let inside = start.0 - self.back.range().start().0;
        let range = VirtRange::new(self.range.start().offset(inside), len).expect("part of the range");
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let punched = self
            .space
            .notifiers()
            .invalidate(range, || rustix::fs::fallocate(&self.file, punch, offset, len));
        punched.map_err(|reason| OwnedError::OutOfMemory { bytes: len, reason })
    }

    /// The file that it is.
    pub(super) fn file(&self) -> &OwnedFd {
        &self.file
    }

    fn place(&self, offset: u64, len: u64) -> Result<VirtAddr, OwnedError> {
        let size = self.size();
        let fits = offset.checked_add(len).is_some_and(|end| end <= size);
        if !fits {
            return Err(OwnedError::OutOfRange { offset, len, size });
        }
        Ok(self.back.range().start().offset(offset))
    }
}

impl Drop for OwnedMemory {
    fn drop(&mut self) {
        let front = self.front.take();
        // The program's mapping goes inside: from then on a fault finds nothing to report.
        // No longer than its mapping is the range ours: other memory may be at its addresses a moment after.
        self.space.notifiers().invalidate_event(self.range, Event::Unmap, || {
            self.space.segments.remove(self.range);
            drop(front);
        });
        self.space.memory.remove_window(self.base);
    }
}
