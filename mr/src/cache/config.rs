//! What a cache is told, what it says, and what it refuses.

use crate::device::RegisterError;
use crate::region::Mode;
use hw_model::addr::{PAGE_SIZE, VirtRange};
use hw_model::fault_plan::Points;

/// When entries become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Merging {
    /// Never: each request that no entry covers gets a region of its own.
    Never,
    /// When a new region would overlap them.
    Overlapping,
    /// Also when it would only touch them. A stream of neighbouring requests then registers its whole past with each: for
    /// on-demand regions that is cheap, for pinned ones it grows with the square.
    Touching,
}

/// How a [`Cache`](super::Cache) works.
#[derive(Clone, Debug)]
pub struct CacheConfig {
    /// How regions are registered.
    pub mode: Mode,
    /// Most entries that are kept.
    pub max_entries: usize,
    /// Most bytes that are kept registered, the sum over entries.
    pub max_bytes: u64,
    /// When entries become one. Only entries with equal rights do.
    pub merging: Merging,
    /// Most bytes of a region that merging makes.
    pub max_merged: u64,
    /// Requests are widened to multiples of this many bytes, as far as the memory that they are part of goes.
    pub granule: u64,
    /// Fault points.
    pub points: Points,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            mode: Mode::OnDemand,
            max_entries: 4096,
            max_bytes: 1 << 40,
            merging: Merging::Overlapping,
            max_merged: 1 << 30,
            granule: PAGE_SIZE,
            points: Points::OFF,
        }
    }
}

/// Why no lease was given. Nothing is left behind.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CacheError {
    /// A request for no byte.
    #[error("a request for 0 bytes; the smallest is 1")]
    Empty,
    /// The part is not in the memory.
    #[error("{len} bytes at offset {offset} pass the end of {memory}")]
    OutOfRange {
        /// Offset asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// The memory that they were to be part of.
        memory: VirtRange,
    },
    /// The memory is in another address space than the cache's.
    #[error("{memory} is in another address space; a cache serves the one that it was made for")]
    ForeignSpace {
        /// The memory.
        memory: VirtRange,
    },
    /// It could not be registered, not even with every entry evicted that nobody uses.
    #[error(transparent)]
    Register(#[from] RegisterError),
}

/// What a cache has done and what it holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Requests that an entry answered.
    pub hits: u64,
    /// Requests that registered, or tried to.
    pub misses: u64,
    /// Entries at the moment, those included that changes ended and nobody has cleared away yet.
    pub entries: u64,
    /// Bytes of these entries.
    pub bytes: u64,
    /// Entries that became part of a larger one.
    pub merged: u64,
    /// Entries that made room for others.
    pub evicted: u64,
    /// Entries and unkept regions that a change of their memory ended, or [`Cache::forget`](super::Cache::forget).
    pub ended: u64,
    /// Regions that were given out and not kept: their memory changed meanwhile, or there was no room.
    pub unkept: u64,
}
