//! Interval notifiers: who is told before pages go away, and how a fault learns that it lost a race.
//!
//! Modelled on mm/mmu_notifier.c (`mmu_interval_notifier`). One [`Interval`] is one range of one region. An
//! [`Invalidation`] of an address range goes through the stages **clear, drain, unlink, release**:
//!
//! 1. clear: every overlapping interval's owner takes its own lock, raises the sequence with the [`Raise`] it is handed,
//!    and hides the entries from its device;
//! 2. drain: one wait for DMA in flight, for all of them together;
//! 3. unlink: every owner takes the translations down;
//! 4. release: the address space lets the pages go; then faults may begin again.
//!
//! Owners never wait inside a callback, so an invalidation can be stepped by one thread from one seed, and can run inside
//! another. Nothing here allocates or frees while an invalidation runs.
//!
//! # Locks
//!
//! There is one, the registry lock, a leaf: nothing is called, allocated, freed or waited for under it, save that a wait
//! gives it up. Callbacks run with no lock of this crate held. Whoever drops an [`Interval`] waits for callbacks that
//! run on it, so it must not hold the lock that they take, nor be a callback itself.

mod interval;
mod invalidation;
mod registry;
mod seq;

#[cfg(all(test, shuttle))]
mod schedules;
#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;

pub use invalidation::{Cannot, Invalidation};
pub use registry::{Interval, MAX_INVALIDATIONS, NotifierStats, Notifiers};
pub use seq::{Seq, Sequence};

use hw_model::addr::VirtRange;

/// What an invalidation is about (`enum mmu_notifier_event`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Event {
    /// The mapping goes, or another takes its place: what is there afterwards is other memory.
    Unmap,
    /// Pages go, move, or allow something else, within the mapping that they are of.
    #[default]
    Clear,
}

/// The owner of an interval.
pub trait Notify: Send + Sync {
    /// Take the owner's lock; under it call [`Raise::raise`] and hide what overlaps `range` from the device. Must not
    /// wait for the device, allocate, free, or call into odp otherwise.
    fn clear(&self, range: VirtRange, raise: Raise<'_>);

    /// The same for a change that may not wait (`mmu_notifier_range_blockable` says no): `false` if the lock is taken, and
    /// nothing is hidden then. An owner that does not say how to do without waiting cannot.
    #[must_use]
    fn try_clear(&self, range: VirtRange, raise: Raise<'_>) -> bool {
        let _ = (range, raise);
        false
    }

    /// DMA that was under way at `clear` has ended: take down what overlaps `range` and is hidden. May be called for
    /// entries that are down already. Must not allocate or free.
    fn unlink(&self, range: VirtRange);

    /// The same for a change that may not wait: `false` if it would have to, and what is hidden stays linked then.
    #[must_use]
    fn try_unlink(&self, range: VirtRange) -> bool {
        let _ = range;
        false
    }
}

/// The one permission of a clear callback to raise its interval's sequence. Dropped unused it raises all the same, so
/// that begin and end stay balanced; but then outside the owner's lock, where a fault may slip past.
#[derive(Debug)]
#[must_use = "raise under the owner's lock"]
pub struct Raise<'a> {
    sequence: Option<&'a Sequence>,
    event: Event,
}

impl<'a> Raise<'a> {
    fn new(sequence: &'a Sequence, event: Event) -> Self {
        Self { sequence: Some(sequence), event }
    }

    /// What the invalidation is about.
    #[must_use]
    pub fn event(&self) -> Event {
        self.event
    }

    /// An invalidation begins on the interval: what faults have seen up to now is worthless. Under the owner's lock.
    pub fn raise(mut self) {
        if let Some(sequence) = self.sequence.take() {
            sequence.raise();
        }
    }
}

impl Drop for Raise<'_> {
    fn drop(&mut self) {
        if let Some(sequence) = self.sequence.take() {
            sequence.raise();
        }
    }
}
