//! Address spaces: where the pages of a range are, and how they come and go.
//!
//! One trait, several spaces: `process` is the real memory of this process, `sim` is one made of frames and page tables
//! in plain Rust. Both give the physical addresses of their own [`HostMemory`]. An attachment of a DMABUF is one too:
//! `dmabuf`.

mod anchored;
pub mod dmabuf;
mod pinning;
pub mod points;
#[cfg(all(target_os = "linux", not(any(loom, shuttle))))]
pub mod process;
mod user_range;

pub use pinning::{PagePin, PinError, PinKind};
pub use user_range::UserRange;

pub mod sim;

use crate::notifier::Notifiers;
use crate::page::PageRun;
use hw_model::addr::{PAGE_SHIFT, PAGE_SIZE, VirtAddr, VirtRange};
use hw_model::bus::HostMemory;
use hw_model::sync::Arc;
use std::fmt;

/// Memory that a device can be given pages of.
///
/// The protocol of a fault (mm/hmm.c, `hmm_range_fault`, with mmu_interval_read_begin and _retry around it):
/// `seq = notifier.begin()`, [`AddressSpace::fault`], take the lock that the notifier's callbacks take, `retry(seq)`,
/// and only then use what was reported.
pub trait AddressSpace: Send + Sync {
    /// The memory that the reported physical addresses belong to.
    fn memory(&self) -> Arc<dyn HostMemory>;

    /// Who is told when pages go away.
    fn notifiers(&self) -> &Arc<Notifiers>;

    /// Starts to report changes of `range` (whole pages). What the space cannot watch it says here, not later. Ranges
    /// may overlap; the space counts. Dropping the guard ends it.
    ///
    /// # Errors
    /// See [`WatchError`].
    fn watch(&self, range: VirtRange) -> Result<Watch, WatchError>;

    /// The same for a range of which parts may not be mapped, or not yet: what is mapped there later is watched from the
    /// first walk that reports a page of it.
    ///
    /// # Errors
    /// See [`WatchError`]; never [`WatchError::NotMapped`], unless the space cannot have holes.
    fn watch_sparse(&self, range: VirtRange) -> Result<Watch, WatchError> {
        self.watch(range)
    }

    /// Keeps the pages of `range` (whole pages, watched) in memory for as long as what it gives lives. It need not bring them
    /// in: who asks does that next.
    ///
    /// # Errors
    /// See [`PinError`]. Nothing is kept then.
    fn pin_pages(&self, _range: VirtRange, kind: PinKind) -> Result<PagePin, PinError> {
        match kind {
            PinKind::Populated => Ok(PagePin::populated()),
            PinKind::Mlock | PinKind::RealPin => Err(PinError::Unsupported { kind }),
        }
    }

    /// The part of `within` that is mapped as the two ends of `range` are (both whole pages, `range` in `within`): beyond it
    /// is memory that was mapped for another purpose, or none. All of `within` where a space knows no mappings.
    fn mapped_alike(&self, _range: VirtRange, within: VirtRange) -> VirtRange {
        within
    }

    /// The addresses that pages can be at, in whole pages.
    fn addresses(&self) -> VirtRange {
        // Half of the addresses of x86-64, up to the guard page.
        VirtRange::new(VirtAddr(0), (1 << 47) - PAGE_SIZE).expect("half an address space")
    }

    /// log2 of the bytes of the smallest pages that `range` (whole pages) can have while what is mapped there stays: 12, unless
    /// all of it is hugetlb (`vma_kernel_pagesize`, mm/hugetlb.c).
    fn page_shift(&self, _range: VirtRange) -> u32 {
        PAGE_SHIFT
    }

    /// Appends the present pages of `range` (whole pages) in ascending order, without faulting any in. Pages that are
    /// mapped but not present are left out.
    ///
    /// # Errors
    /// [`FaultError::NoMapping`] if part of the range is not mapped at all; the part before it has been reported.
    fn snapshot(&self, range: VirtRange, out: &mut Vec<PageRun>) -> Result<(), FaultError>;

    /// Faults in every page of `range` (whole pages) for `access` and appends them all, in ascending order.
    ///
    /// # Errors
    /// See [`FaultError`]; the pages before the one that failed have been appended.
    fn fault(&self, range: VirtRange, access: Access, out: &mut Vec<PageRun>) -> Result<(), FaultError>;

    /// Whether its addresses are those of this process, so that what the kernel does with them for this process is right.
    fn is_this_process(&self) -> bool {
        false
    }

    /// What this space promises about changes of `range`: the weakest rung of any part of it.
    fn rung(&self, range: VirtRange) -> Rung;
}

/// What a fault wants to do with the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Read only.
    Read,
    /// Read and write.
    Write,
}

/// A hold on the reporting of changes of a range. See [`AddressSpace::watch`].
#[must_use = "changes are reported while the watch lives"]
pub struct Watch {
    range: VirtRange,
    release: Option<Box<dyn FnOnce() + Send + Sync>>,
}

impl Watch {
    /// A watch of `range` that calls `release` when it ends.
    pub fn new(range: VirtRange, release: impl FnOnce() + Send + Sync + 'static) -> Self {
        Self { range, release: Some(Box::new(release)) }
    }
    /// The watched range.
    #[must_use]
    pub fn range(&self) -> VirtRange {
        self.range
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(release) = self.release.take() {
            release();
        }
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Watch").field(&self.range).finish()
    }
}

/// How an address space learns of changes, strongest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rung {
    /// Every change is bracketed: told before, finished after. As a kernel notifier.
    Exact,
    /// Memory that we allocated and whose changes go through us: exact for that memory.
    Owned,
    /// userfaultfd events: removals before the page goes; unmaps and moves after; mprotect, truncation, hole punching,
    /// shmdt and guard pages not at all.
    Events,
    /// No notification. Mappings are validated before use; a change in between is not seen.
    Poll,
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Exact => "exact",
            Self::Owned => "owned",
            Self::Events => "events",
            Self::Poll => "poll",
        })
    }
}

/// Why pages could not be had (the errors of `hmm_range_fault`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FaultError {
    /// The range changed meanwhile; begin again.
    #[error("the mapping at {at} changed during the walk")]
    Busy {
        /// Where.
        at: VirtAddr,
    },
    /// Nothing is mapped there, or what is mapped cannot be read (poisoned, or past the end of its file).
    #[error("nothing usable is mapped at {at}")]
    NoMapping {
        /// First address that is not mapped.
        at: VirtAddr,
    },
    /// The mapping does not allow the access.
    #[error("the mapping at {at} does not allow {access:?}")]
    Permission {
        /// First address that refused.
        at: VirtAddr,
        /// What was wanted.
        access: Access,
    },
    /// The host has no page to give.
    #[error("out of memory at {at}")]
    OutOfMemory {
        /// Where.
        at: VirtAddr,
    },
    /// Special memory without pages (VM_PFNMAP, VM_IO).
    #[error("the mapping at {at} has no pages that a device could use")]
    Special {
        /// Where.
        at: VirtAddr,
    },
    /// The memory is a DMABUF that its exporter does not give any more.
    #[error("nothing is to be had at {at}: {why}")]
    Withdrawn {
        /// Where.
        at: VirtAddr,
        /// What became of the buffer.
        why: Withdrawn,
    },
}

/// Why a DMABUF is not to be had any more. For good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Withdrawn {
    /// The exporter took it back.
    #[error("the exporter has revoked the buffer")]
    Revoked,
    /// The exporter's device is gone, and its memory with it.
    #[error("the exporter is gone")]
    Removed,
}

/// Why a range cannot be watched.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WatchError {
    /// Part of the range is not mapped.
    #[error("{range} is not mapped at {at}; map it before registering")]
    NotMapped {
        /// The range asked for.
        range: VirtRange,
        /// First address that is not mapped.
        at: VirtAddr,
    },
    /// The range does not consist of whole pages of the address space.
    #[error("{range} is not a range of whole user pages")]
    BadRange {
        /// The range asked for.
        range: VirtRange,
    },
    /// The kernel refused to watch it: one of ours is too many mappings, another process's or library's userfaultfd, a
    /// limit.
    #[error("the kernel refused to watch {range}: {reason}")]
    Refused {
        /// The range asked for.
        range: VirtRange,
        /// What the kernel said, in words.
        reason: String,
    },
    /// The memory is a DMABUF that its exporter does not give any more.
    #[error("{range} cannot be watched: {why}")]
    Withdrawn {
        /// The range asked for.
        range: VirtRange,
        /// What became of the buffer.
        why: Withdrawn,
    },
    /// Pages of a DMABUF that were to be pinned are being moved; they can be had when that has ended.
    #[error("{range} cannot be pinned while pages of it are being moved")]
    Moving {
        /// The range asked for.
        range: VirtRange,
    },
}
