//! Memory of many kinds laid out in one contiguous range of addresses, to be registered once: what a device needs that has one
//! page list a region and no way to join several.
//!
//! Unsafe island. Invariant: everything is mapped in the one range that the [`View`] reserved; memory that is taken in from
//! elsewhere is given by whoever says that nobody refers to it. Bytes are copied in and out, never lent.
#![allow(unsafe_code)]

use super::ProcessSpace;
use super::view::{Part, View};
use crate::notifier::Event;
use crate::space::{AddressSpace, UserRange};
use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange};
use hw_model::sync::Arc;
use rustix::fd::BorrowedFd;
use rustix::io::Errno;

const HUGE_PAGE: u64 = 2 << 20;

/// A piece of memory to lay out: whole pages of it.
#[derive(Clone, Copy, Debug)]
pub enum Piece<'a> {
    /// Zeroed private memory.
    Anonymous(u64),
    /// The same in huge pages of the pool, of 2 MiB.
    Hugetlb(u64),
    /// A part of what a descriptor stands for, shared with others who map it: a memfd, a file, a DMABUF.
    Shared {
        /// The descriptor. Open for reading and writing; may be closed afterwards.
        file: BorrowedFd<'a>,
        /// Where the part begins.
        offset: u64,
        /// Its bytes.
        len: u64,
    },
    /// A part of a file, of which only this memory sees what is written to it.
    Private {
        /// The descriptor. Open for reading; may be closed afterwards.
        file: BorrowedFd<'a>,
        /// Where the part begins.
        offset: u64,
        /// Its bytes.
        len: u64,
    },
}

impl Piece<'_> {
    /// Its bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        match *self {
            Self::Anonymous(len) | Self::Hugetlb(len) => len,
            Self::Shared { len, .. } | Self::Private { len, .. } => len,
        }
    }

    /// Whether it has none, which is refused.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn page(&self) -> u64 {
        if matches!(self, Self::Hugetlb(_)) { HUGE_PAGE } else { PAGE_SIZE }
    }
}

/// Why memory was not laid out. What was there is as it was, unless a piece among several was refused by the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Nothing to lay out.
    #[error("there is nothing to lay out: a layout has at least one piece, and a piece at least one page")]
    Empty,
    /// A piece is not whole pages, or does not begin with one.
    #[error("{len:#x} bytes at {offset:#x} are not whole pages of {page:#x} bytes, which that memory has")]
    NotWholePages {
        /// Where, from the start of the range.
        offset: u64,
        /// How many.
        len: u64,
        /// Bytes of a page of that kind.
        page: u64,
    },
    /// Past the end.
    #[error("{len:#x} bytes at {offset:#x} are not in a layout of {size:#x} bytes")]
    OutOfRange {
        /// Where, from the start of the range.
        offset: u64,
        /// How many.
        len: u64,
        /// Bytes there are.
        size: u64,
    },
    /// The process would have more mappings than it may.
    #[error(
        "vm.max_map_count is {limit}, {used} mappings are there already and up to {needed} more are needed: raise it to at \
         least {} (sysctl -w vm.max_map_count=...), or lay out fewer and larger pieces", used + needed
    )]
    TooManyMappings {
        /// Mappings that this takes.
        needed: u64,
        /// Mappings that the process has.
        used: u64,
        /// Its limit.
        limit: u64,
    },
    /// The kernel refused a mapping.
    #[error("{len:#x} bytes at {offset:#x} could not be mapped: {reason}")]
    Refused {
        /// Where, from the start of the range.
        offset: u64,
        /// How many.
        len: u64,
        /// What it said.
        reason: Errno,
    },
}

/// How many mappings the process has, and may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mappings {
    /// Those that it has.
    pub used: u64,
    /// vm.max_map_count; `None` if it cannot be read.
    pub limit: Option<u64>,
}

impl Mappings {
    /// As it is now.
    #[must_use]
    pub fn now() -> Self {
        let maps = std::fs::read("/proc/self/maps").unwrap_or_default();
        let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count");
        let used = maps.iter().filter(|byte| **byte == b'\n').count() as u64;
        Self { used, limit: limit.ok().and_then(|text| text.trim().parse().ok()) }
    }

    /// Whether there may be `needed` more.
    ///
    /// # Errors
    /// [`LayoutError::TooManyMappings`].
    pub fn allow(self, needed: u64) -> Result<(), LayoutError> {
        let Self { used, limit } = self;
        match limit {
            Some(limit) if used.saturating_add(needed) > limit => {
                Err(LayoutError::TooManyMappings { needed, used, limit })
            }
            _ => Ok(()),
        }
    }
}

/// Memory of many kinds in one range. Given back on drop, after whoever was registered on it has been told.
#[derive(Debug)]
pub struct ContiguousMemory {
    space: Arc<ProcessSpace>,
    /// `None` only while dropping.
    view: Option<View>,
    range: VirtRange,
}

impl ContiguousMemory {
    /// Lays `pieces` out one behind the other. The range begins on a boundary of 2 MiB.
    ///
    /// # Errors
    /// See [`LayoutError`]. Nothing is left behind.
    pub fn new(space: &Arc<ProcessSpace>, pieces: &[Piece<'_>]) -> Result<Arc<Self>, LayoutError> {
        let mut size = 0_u64;
        for piece in pieces {
            check(size, piece.len(), piece.page())?;
            let refused = LayoutError::Refused { offset: size, len: piece.len(), reason: Errno::NOMEM };
            size = size.checked_add(piece.len()).ok_or(refused)?;
        }
        // The last: whoever lays out nothing is told so too.
        check(0, size, PAGE_SIZE)?;
        // Neighbours of anonymous memory are one mapping.
        let joins = |pair: &&[Piece<'_>]| matches!(pair, [Piece::Anonymous(_), Piece::Anonymous(_)]);
        let joined = pieces.windows(2).filter(joins).count();
        Mappings::now().allow((pieces.len() - joined) as u64)?;
        let refused = |reason| LayoutError::Refused { offset: 0, len: size, reason };
        let view = View::reserve(size, HUGE_PAGE).map_err(refused)?;
        let range = view.range();
        let memory = Self { space: Arc::clone(space), view: Some(view), range };
        let mut offset = 0;
        for piece in pieces {
            memory.lay(offset, *piece)?;
            offset += piece.len();
        }
        Ok(Arc::new(memory))
    }

    /// Where it lies.
    #[must_use]
    pub fn range(&self) -> VirtRange {
        self.range
    }

    /// All of it, to make regions of. The memory stays while that lives.
    #[must_use]
    pub fn user_range(self: &Arc<Self>) -> UserRange {
        let space = Arc::clone(&self.space) as Arc<dyn AddressSpace>;
        UserRange::owned(space, self.range, Arc::clone(self) as _)
    }

    /// Puts `piece` in the place of what is at `offset`: its pages are of another kind then. In one step: an access meets the
    /// old pages or the new ones. Whoever registered is told before the old ones go.
    ///
    /// # Errors
    /// See [`LayoutError`].
    pub fn replace(&self, offset: u64, piece: Piece<'_>) -> Result<(), LayoutError> {
        self.part(offset, piece.len(), piece.page())?;
        // It may split what it lies in.
        Mappings::now().allow(2)?;
        self.lay(offset, piece)
    }

    /// Moves the pages at `from` to `offset`, in the place of what is there (mremap(2)): they keep what they hold, and `from`
    /// is unmapped afterwards. All of `from` is one mapping.
    ///
    /// # Errors
    /// See [`LayoutError`].
    ///
    /// # Safety
    /// The memory at `from` is the caller's to give away: nobody refers to it, nor will by those addresses, no allocator
    /// has it, and it is no part of a layout, which would be left with a hole that others may map into.
    pub unsafe fn take(&self, offset: u64, from: VirtRange) -> Result<(), LayoutError> {
        let len = from.len();
        let part = self.part(offset, len, PAGE_SIZE)?;
        check(from.start().0, len, PAGE_SIZE)?;
        Mappings::now().allow(2)?;
        let notifiers = self.space.notifiers();
        let moved = notifiers.invalidate_event(from, Event::Unmap, || {
            // SAFETY: the caller gives the memory away.
            notifiers.invalidate_event(part, Event::Unmap, || unsafe { self.view().take(offset, from) })
        });
        moved.map_err(|reason| LayoutError::Refused { offset, len, reason })
    }

    /// Copies out of it.
    ///
    /// # Errors
    /// [`LayoutError::OutOfRange`]; [`LayoutError::Refused`] for a page that could not be had.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), LayoutError> {
        let len = out.len() as u64;
        let at = self.at(offset, len)?;
        let copied = self.space.memory.copier().read(at, out);
        copied.map_err(|_| LayoutError::Refused { offset, len, reason: Errno::FAULT })
    }

    /// Copies into it.
    ///
    /// # Errors
    /// Those of [`ContiguousMemory::read_at`].
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), LayoutError> {
        let len = data.len() as u64;
        let at = self.at(offset, len)?;
        let copied = self.space.memory.copier().write(at, data);
        copied.map_err(|_| LayoutError::Refused { offset, len, reason: Errno::FAULT })
    }

    fn lay(&self, offset: u64, piece: Piece<'_>) -> Result<(), LayoutError> {
        let len = piece.len();
        let part = self.part(offset, len, piece.page())?;
        let what = match piece {
            Piece::Anonymous(_) => Part::Anonymous { huge: false },
            Piece::Hugetlb(_) => Part::Anonymous { huge: true },
            Piece::Shared { file, offset, .. } => Part::File { file, offset, private: false },
            Piece::Private { file, offset, .. } => Part::File { file, offset, private: true },
        };
        let placed = self
            .space
            .notifiers()
            .invalidate_event(part, Event::Unmap, || self.view().put(offset, len, what));
        placed.map_err(|reason| LayoutError::Refused { offset, len, reason })
    }

    fn part(&self, offset: u64, len: u64, page: u64) -> Result<VirtRange, LayoutError> {
        check(offset, len, page)?;
        let start = self.at(offset, len)?;
        VirtRange::new(start, len).ok_or(LayoutError::Empty)
    }

    fn at(&self, offset: u64, len: u64) -> Result<VirtAddr, LayoutError> {
        let size = self.range.len();
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(self.range.start().offset(offset)),
            _ => Err(LayoutError::OutOfRange { offset, len, size }),
        }
    }

    fn view(&self) -> &View {
        self.view.as_ref().expect("there until it is dropped")
    }
}

/// That `len` bytes at `offset` are whole pages, and some.
fn check(offset: u64, len: u64, page: u64) -> Result<(), LayoutError> {
    match len {
        0 => Err(LayoutError::Empty),
        _ if offset.is_multiple_of(page) && len.is_multiple_of(page) => Ok(()),
        _ => Err(LayoutError::NotWholePages { offset, len, page }),
    }
}

impl Drop for ContiguousMemory {
    fn drop(&mut self) {
        let view = self.view.take();
        self.space.notifiers().invalidate_event(self.range, Event::Unmap, || drop(view));
    }
}

#[cfg(test)]
mod tests;
