//! What happened to a region, counted as mlx5 counts it (Documentation/networking/device_drivers/ethernet/mellanox and
//! drivers/infiniband/hw/mlx5/odp.c), and a little more.

use hw_model::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Live counters of one region.
        #[derive(Debug, Default)]
        pub(crate) struct Counters { $(pub(crate) $name: AtomicU64),* }

        /// The counters of a region at one moment.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct CounterValues { $($(#[$doc])* pub $name: u64),* }

        impl Counters {
            pub(crate) fn values(&self) -> CounterValues {
                CounterValues { $($name: self.$name.load(Ordering::Relaxed)),* }
            }
        }

        impl std::ops::Sub for CounterValues {
            type Output = Self;
            fn sub(self, before: Self) -> Self {
                Self { $($name: self.$name - before.$name),* }
            }
        }
    };
}

counters! {
    /// Page-fault events that named this region.
    page_faults,
    /// Page-fault events that ended with the pages present.
    page_faults_handled,
    /// Page-fault events of which the pages were there already, brought in for another event that was posted before.
    faults_coalesced,
    /// Attempts that lost a race with an invalidation and began again.
    fault_retries,
    /// Invalidations that overlapped the region.
    page_invalidations,
    /// Pages that invalidations hid from the device.
    pages_invalidated,
    /// Pages faulted in by advice rather than by a fault.
    page_prefetch,
    /// Pages faulted in ahead of a stream, beyond what its faults asked for.
    pages_ahead,
    /// Page-list entries written because a page became present or got more permission.
    entries_published,
    /// Of those: entries of pages that had been present before.
    entries_relinked,
    /// Of those: entries whose page came back as another kind or by another path.
    entries_changed_kind,
    /// Calls of link.
    links,
    /// Calls of sync: one a batch.
    syncs,
    /// Calls of unlink: one a run of neighbouring linked pages, one IOTLB flush each.
    unlinks,
}

/// Adds `n` to a counter.
#[inline]
pub(crate) fn add(counter: &AtomicU64, n: u64) {
    // Most of what a fault adds is nothing.
    if n > 0 {
        counter.fetch_add(n, Ordering::Relaxed);
    }
}
