//! Why a call on a mapping was refused.

use crate::dma::bounce::BounceError;
use hw_model::addr::{Iova, PhysAddr};
use hw_model::iommu::{MapError, UnmapError};

/// A range that is no part of the mapping that can be mapped: it passes the end, or begins or ends inside an IO page where
/// the mapping does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{len:#x} bytes at offset {offset:#x} are not whole IO pages of {granule:#x} bytes of a mapping of {reserved:#x} bytes"
)]
pub struct RangeError {
    /// Offset asked for.
    pub offset: u64,
    /// Bytes asked for.
    pub len: u64,
    /// Bytes of the mapping.
    pub reserved: u64,
    /// Bytes of an IO page.
    pub granule: u64,
}

/// Why a link or sync failed. Nothing of that call stays; earlier links do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// Out of bounds or not in whole IO pages.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// The memory does not lie in its IO page as its place in the mapping does. A mapping takes over the offset of the
    /// address that it was reserved like; that is the only start inside an IO page there is.
    #[error("memory at {phys} and {iova} do not lie alike in their IO pages of {granule:#x} bytes")]
    Unaligned {
        /// First byte of the memory.
        phys: PhysAddr,
        /// Where it was to be linked.
        iova: Iova,
        /// Bytes of an IO page.
        granule: u64,
    },
    /// Pages were to be linked one by one that are smaller than an IO page.
    #[error("pages of {page:#x} bytes cannot be linked apart in IO pages of {granule:#x} bytes")]
    Granule {
        /// Bytes of a page.
        page: u64,
        /// Bytes of an IO page.
        granule: u64,
    },
    /// The IOMMU refused, over a live link for instance.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The memory has to bounce and could not.
    #[error(transparent)]
    Bounce(#[from] BounceError),
    /// The flush that makes links usable failed; the caller unlinks what it linked.
    #[error("the IOTLB flush for {iova} failed")]
    Sync {
        /// First IOVA of the batch.
        iova: Iova,
    },
    /// The IOVA was given back.
    #[error("the mapping at {iova} was freed")]
    Freed {
        /// Its first IOVA.
        iova: Iova,
    },
}

/// Why an unlink was refused: always a mistake of the caller. Nothing was unlinked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnlinkError {
    /// Out of bounds or not in whole IO pages.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// A hole, or part of a unit.
    #[error(transparent)]
    Unmap(#[from] UnmapError),
    /// The IOVA was given back: what is there now is somebody else's.
    #[error("the mapping at {iova} was freed")]
    Freed {
        /// Its first IOVA.
        iova: Iova,
    },
}

/// The IOVA was not given back, because this many bytes are still linked in it (invariant 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{linked:#x} bytes are still linked at {iova}")]
pub struct StillLinked {
    /// First IOVA.
    pub iova: Iova,
    /// Bytes linked, in whole IO pages.
    pub linked: u64,
}

/// Why a mapping was not destroyed. It is as before, or empty where only the second step was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DestroyError {
    /// Its prefix could not be unlinked.
    #[error(transparent)]
    Unlink(#[from] UnlinkError),
    /// More was linked than that prefix: a sparse mapping is unlinked piece by piece and freed.
    #[error(transparent)]
    StillLinked(#[from] StillLinked),
}
