//! Interval notifiers: who is told before pages go away, and how a fault learns that it lost a race.
//!
//! Modelled on mm/mmu_notifier.c (`mmu_interval_notifier`). One interval is one range of one region. An invalidation of
//! an address range goes through the stages **clear, drain, unlink, release**:
//!
//! 1. clear: every overlapping interval's owner takes its own lock, raises the sequence with the [`Raise`] it is handed,
//!    and hides the entries from its device;
//! 2. drain: one wait for DMA in flight, for all of them together;
//! 3. unlink: every owner takes the translations down;
//! 4. release: the address space lets the pages go; then faults may begin again.
//!
//! Owners never wait inside a callback, so an invalidation can be stepped by one thread from one seed, and can run inside
//! another. Nothing here allocates or frees while an invalidation runs.

use hw_model::addr::VirtRange;

/// The owner of an interval.
pub trait Notify: Send + Sync {
    /// Take the owner's lock; under it call [`Raise::raise`] and hide what overlaps `range` from the device. Must not
    /// wait for the device, allocate, free, or call into odp otherwise.
    fn clear(&self, range: VirtRange, raise: Raise<'_>);

    /// DMA that was under way at `clear` has ended: take down what overlaps `range` and is hidden. May be called for
    /// entries that are down already. Must not allocate or free.
    fn unlink(&self, range: VirtRange);
}

/// To be replaced: the set of intervals of one address space.
#[derive(Debug, Default)]
pub struct Notifiers;

/// The one permission of a clear callback to raise its interval's sequence.
#[derive(Debug)]
pub struct Raise<'a>(std::marker::PhantomData<&'a ()>);
