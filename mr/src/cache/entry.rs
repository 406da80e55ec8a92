//! A cached region, and the lease of one.
//!
//! The reference count is the count of leases, and one more while the shelf keeps the entry: tables and trackers hold weak
//! references only. So the last lease of an entry that is off the shelf deregisters it, and a hit costs one count up and
//! one down.

use super::tracker::Tracker;
use crate::device::Region;
use hw_model::addr::{RegionAddr, VirtAddr};
use hw_model::hca::Key;
use hw_model::sync::Arc;
use odp::notifier::Interval;
use std::fmt;

/// A region that is, or was, in a cache. Dropped in the order of its fields: deregistered first, then told of nothing.
///
/// Each hit writes the reference count, which lies before this: with its neighbours away from it, threads that use different
/// entries share no cache line, nor the pair of lines that processors fetch together.
#[repr(align(128))]
pub(super) struct Entry {
    pub(super) region: Arc<dyn Region>,
    pub(super) key: Key,
    /// Virtual address of the region's first byte, and what requests call it.
    pub(super) start: VirtAddr,
    pub(super) address: RegionAddr,
    pub(super) tracker: Arc<Tracker>,
    pub(super) _interval: Interval,
}

/// Registered memory from a cache. While it lives the region is not deregistered; dropping it may do that, so not inside a
/// notifier callback.
#[must_use = "the memory stays registered while the lease lives"]
pub struct Lease {
    entry: Arc<Entry>,
    address: RegionAddr,
    len: u64,
}

impl Lease {
    pub(super) fn new(entry: Arc<Entry>, start: VirtAddr, len: u64) -> Self {
        let address = entry.address.offset(start.0 - entry.start.0);
        Self { entry, address, len }
    }

    /// The key of the memory, local and remote.
    #[must_use]
    pub fn key(&self) -> Key {
        self.entry.key
    }
    /// What requests call the first byte that was asked for.
    #[must_use]
    pub fn address(&self) -> RegionAddr {
        self.address
    }
    /// The bytes that were asked for.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }
    /// Whether it holds no byte: never.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// The region, which may hold more than was asked for.
    #[must_use]
    pub fn region(&self) -> &Arc<dyn Region> {
        &self.entry.region
    }
    /// Whether the memory has not changed since it was registered: the next request for it would find the same region,
    /// were it to fit on the shelf.
    #[must_use]
    pub fn is_current(&self) -> bool {
        !self.entry.tracker.is_ended()
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("key", &self.key())
            .field("address", &self.address)
            .field("len", &self.len)
            .field("current", &self.is_current())
            .finish()
    }
}
