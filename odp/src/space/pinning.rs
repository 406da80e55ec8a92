//! What pinned means: how pages of a range are kept in memory beyond being there once.

use super::FaultError;
use hw_model::addr::{VirtAddr, VirtRange};
use std::any::Any;
use std::fmt;

/// What is done for pages that a region pins. A process has no long-term pin of its own as a kernel driver has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PinKind {
    /// Every page is brought in at the start, and again when a device meets one that has gone. Nothing is charged, and the
    /// kernel may swap out or move any of them. What is there already is not populated again: a page that fork(2) left shared
    /// with a child is copied by the first write, as it is for the processor.
    #[default]
    Populated,
    /// And locked (mlock2(2) with `MLOCK_ONFAULT`), within RLIMIT_MEMLOCK: not swapped out, not reclaimed (MADV_PAGEOUT), and
    /// MADV_DONTNEED fails (EINVAL). They may still move, and go when they are unmapped.
    Mlock,
    /// And pinned for long by the kernel (`FOLL_LONGTERM`, as a driver pins them for a device), within RLIMIT_MEMLOCK: neither
    /// moved nor swapped out, and in use even when nothing maps them any more. Refused for what a real region is refused for:
    /// memory that cannot be written, and a shared mapping of a file that keeps track of what is written.
    RealPin,
}

impl fmt::Display for PinKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Populated => "populated",
            Self::Mlock => "locked (mlock)",
            Self::RealPin => "pinned for long",
        })
    }
}

/// What keeps pages in memory. Dropping it lets them go.
#[must_use = "pages are kept while the pin lives"]
pub struct PagePin {
    kind: PinKind,
    _kept_by: Option<Box<dyn Any + Send + Sync>>,
}

impl PagePin {
    /// Nothing keeps the pages.
    pub fn populated() -> Self {
        Self { kind: PinKind::Populated, _kept_by: None }
    }
    /// Pages are kept until `kept_by` is dropped.
    pub fn new(kind: PinKind, kept_by: impl Any + Send + Sync) -> Self {
        Self { kind, _kept_by: Some(Box::new(kept_by)) }
    }
    /// What it means.
    #[must_use]
    pub fn kind(&self) -> PinKind {
        self.kind
    }
}

impl fmt::Debug for PagePin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PagePin").field(&self.kind).finish()
    }
}

/// Why pages are not kept in memory. Nothing is kept then.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PinError {
    /// The address space has no such thing.
    #[error("pages of this address space cannot be {kind}; populated is what it can do")]
    Unsupported {
        /// What was asked for.
        kind: PinKind,
    },
    /// More than this process may have.
    #[error(
        "{needed} bytes are to be {kind} beside {held} that are, and RLIMIT_MEMLOCK is {limit} bytes: raise it with \
         `ulimit -l {}` (KiB), LimitMEMLOCK= of a service or --ulimit memlock= of a container, or give CAP_IPC_LOCK",
        needed.saturating_add(*held).div_ceil(1024)
    )]
    MemlockLimit {
        /// What was asked for.
        kind: PinKind,
        /// Bytes asked for.
        needed: u64,
        /// Bytes of this process that are kept so already. Long-term pins count for all processes of a user together, of
        /// which these are a part.
        held: u64,
        /// RLIMIT_MEMLOCK.
        limit: u64,
    },
    /// Long-term pins are had through io_uring, which this process is refused: by the sysctl `kernel.io_uring_disabled`, by
    /// the seccomp filter of a container, or by a kernel without it.
    #[error(
        "io_uring, through which pages are pinned for long, is refused ({reason}): see kernel.io_uring_disabled and the \
         seccomp profile, or ask for locked pages (mlock)"
    )]
    NoIoUring {
        /// What the kernel said.
        reason: String,
    },
    /// Pages are pinned for long to be written.
    #[error(
        "the mapping at {at} is not writable, and pages are pinned for long to be written; lock them (mlock)"
    )]
    NotWritable {
        /// The first such address.
        at: VirtAddr,
    },
    /// The kernel would not learn of what a device writes to a page of a file that it pins for long (mm/gup.c,
    /// `writable_file_mapping_allowed`).
    #[error("the mapping at {at} is of a file that keeps track of what is written; register it on demand")]
    DirtyTracking {
        /// The first such address.
        at: VirtAddr,
    },
    /// The pages could not be had.
    #[error("the pages cannot be had to be pinned")]
    Pages(#[from] FaultError),
    /// The kernel said no for another reason.
    #[error("{range} cannot be {kind}: {reason}")]
    Refused {
        /// What was asked for.
        kind: PinKind,
        /// The range.
        range: VirtRange,
        /// What the kernel said.
        reason: String,
    },
}
