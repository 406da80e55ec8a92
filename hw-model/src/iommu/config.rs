//! What a domain is made with, what it counts, and what a caller holds between unmapping and flushing.

use super::iotlb::{IotlbConfig, IotlbStats};
use super::leaf::{MAX_GRANULE_SHIFT, MAX_WIDTH, MIN_GRANULE_SHIFT};
use super::queue::{DEFAULT_LENGTH, FLUSH_DESCRIPTORS, QueueStats};
use crate::addr::{Iova, PAGE_SHIFT};

/// When translations that were unmapped are invalidated (the kernel's `iommu.strict`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FlushMode {
    /// At once, with every unmapping.
    Strict,
    /// When an IOVA range is freed it waits in a [`FlushQueue`](super::FlushQueue); one global invalidation serves many.
    /// Until then a device can still reach what was unmapped. `unlink` without freeing is always strict.
    Lazy,
}

/// What a domain is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainConfig {
    /// Bits of an IOVA: 32 to 48.
    pub width: u32,
    /// log2 of the IO page: 11 to 16. One that differs from the host's 12 shows who mixes up the two.
    pub granule_shift: u32,
    /// The IOTLB; `None` walks the table for every DMA.
    pub iotlb: Option<IotlbConfig>,
    /// When software is expected to flush. The hardware does not care; software asks for it here.
    pub mode: FlushMode,
    /// Compare every hit of the IOTLB with the table, and count those that a device should no longer have had. The device
    /// still gets the stale translation, as from hardware. Costs a walk a DMA.
    pub audit: bool,
    /// Faults that the log keeps.
    pub fault_log: usize,
    /// Descriptors that the invalidation queue holds, at least 2.
    pub queue: usize,
}

impl Default for DomainConfig {
    fn default() -> Self {
        Self {
            width: MAX_WIDTH,
            granule_shift: PAGE_SHIFT,
            iotlb: Some(IotlbConfig::default()),
            mode: FlushMode::Strict,
            audit: false,
            fault_log: 256,
            queue: DEFAULT_LENGTH,
        }
    }
}

impl DomainConfig {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let DomainConfig { width, granule_shift, .. } = *self;
        if !(32..=MAX_WIDTH).contains(&width) {
            return Err(ConfigError::Width { width });
        }
        if !(MIN_GRANULE_SHIFT..=MAX_GRANULE_SHIFT).contains(&granule_shift) {
            return Err(ConfigError::Granule { granule_shift });
        }
        if let Some(IotlbConfig { sets, ways, .. }) = self.iotlb
            && (!sets.is_power_of_two() || ways == 0)
        {
            return Err(ConfigError::Iotlb { sets, ways });
        }
        if self.queue < FLUSH_DESCRIPTORS {
            return Err(ConfigError::Queue { length: self.queue });
        }
        Ok(())
    }
}

/// A domain that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The width is out of range.
    #[error("a domain of {width} bits; 32 to {MAX_WIDTH} are possible")]
    Width {
        /// Width asked for.
        width: u32,
    },
    /// The IO page is out of range.
    #[error(
        "an IO page of 2^{granule_shift} bytes; 2^{MIN_GRANULE_SHIFT} to 2^{MAX_GRANULE_SHIFT} are possible"
    )]
    Granule {
        /// log2 asked for.
        granule_shift: u32,
    },
    /// The shape of the IOTLB is impossible.
    #[error("an IOTLB of {sets} sets of {ways} ways; sets are a power of two, ways at least 1")]
    Iotlb {
        /// Sets asked for.
        sets: usize,
        /// Ways asked for.
        ways: usize,
    },
    /// The invalidation queue cannot hold an invalidation and its wait.
    #[error("an invalidation queue of {length} descriptors; one flush needs {FLUSH_DESCRIPTORS}")]
    Queue {
        /// Descriptors asked for.
        length: usize,
    },
}

/// Counters of a domain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DomainStats {
    /// The IOTLB's own; zero without one.
    pub iotlb: IotlbStats,
    /// Entries written by mapping, by leaf size in the order of [`LeafSize::ALL`](super::LeafSize::ALL)(super::LeafSize::ALL).
    pub leaves_mapped: [u64; 3],
    /// Entries taken down by unmapping, likewise.
    pub leaves_unmapped: [u64; 3],
    /// Calls that broke the contract and were refused: double mapping, hole, part of a leaf, misaligned, too wide.
    pub violations: u64,
    /// The invalidation queue's own.
    pub queue: QueueStats,
    /// DMAs that were stopped.
    pub faults: u64,
    /// DMAs that went through a translation the table no longer had. Counted with [`DomainConfig::audit`] only.
    pub stale_hits: u64,
    /// Bytes mapped at the moment.
    pub mapped_bytes: u64,
    /// Tables of 512 entries that exist, touched or not.
    pub tables: u64,
}

/// IOVA that was unmapped and must be flushed (`struct iommu_iotlb_gather`): the hull of all that was merged into it.
#[must_use = "what was unmapped can still be reached until it is flushed"]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gather {
    pub(super) start: u64,
    pub(super) len: u64,
}

impl Gather {
    /// Nothing to flush.
    pub const EMPTY: Self = Self { start: 0, len: 0 };

    /// The hull of both.
    pub fn merge(self, other: Self) -> Self {
        if self.len == 0 {
            return other;
        }
        if other.len == 0 {
            return self;
        }
        let start = self.start.min(other.start);
        let end = (self.start + self.len).max(other.start + other.len);
        Self { start, len: end - start }
    }

    /// Whether there is nothing to flush.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// First IOVA and bytes of the hull.
    #[must_use]
    pub fn hull(&self) -> (Iova, u64) {
        (Iova(self.start), self.len)
    }
}
