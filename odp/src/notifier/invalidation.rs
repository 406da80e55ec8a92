//! One invalidation, as a value that can be stepped: clear, drain, unlink, (release), end.

use super::interval::Key;
use super::registry::{Notifiers, Place};
use super::{Event, Raise};
use hw_model::addr::VirtRange;
use hw_model::bus::Drain;
use hw_model::sync::atomic::Ordering;
use hw_model::sync::{Arc, thread};
use std::fmt;
use std::time::Duration;

/// An invalidation under way. [`Invalidation::poll`] it until it is ready, let the pages go, and [`Invalidation::end`]
/// it. Nothing in it allocates or frees.
///
/// Dropped before it is ready it ends too: entries that it hid stay hidden until they are faulted in again, and the pages
/// must then not be let go. Dropped after that it has simply ended.
#[must_use = "pages may go only when the invalidation is ready; dropping it ends it"]
pub struct Invalidation {
    notifiers: Arc<Notifiers>,
    range: VirtRange,
    event: Event,
    /// `None` for an empty range and after the end.
    place: Option<Place>,
    /// The bursts still to wait for. `None` once ready.
    drain: Option<Drain>,
    /// The last interval that was cleared.
    reached: Option<Key>,
    visited: u64,
}

/// A non-blockable invalidation would have had to wait. Nothing is running any more; the pages stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot invalidate {range} without waiting")]
pub struct Cannot {
    /// The range asked for.
    pub range: VirtRange,
}

impl Notifiers {
    /// Begins an invalidation of `range`: every overlapping interval is cleared, and if there was one, a drain started.
    /// Waits only if [`MAX_INVALIDATIONS`](super::MAX_INVALIDATIONS) are running.
    pub fn begin_invalidation(self: &Arc<Self>, range: VirtRange) -> Invalidation {
        self.begin_event(range, Event::Clear)
    }

    /// The same, with what it is about.
    pub fn begin_event(self: &Arc<Self>, range: VirtRange, event: Event) -> Invalidation {
        self.begin(range, event, true).expect("waited for room in the table")
    }

    /// An invalidation that never waits (`mmu_notifier_range_blockable` in the kernel). What it gives is ready.
    ///
    /// # Errors
    /// [`Cannot`] if a burst is under way on the memory, an owner's lock is taken, or too many invalidations are running.
    /// Entries that were hidden stay hidden until they are faulted in again.
    pub fn try_begin(self: &Arc<Self>, range: VirtRange) -> Result<Invalidation, Cannot> {
        self.try_begin_event(range, Event::Clear)
    }

    /// The same, with what it is about.
    ///
    /// # Errors
    /// As [`Notifiers::try_begin`].
    pub fn try_begin_event(self: &Arc<Self>, range: VirtRange, event: Event) -> Result<Invalidation, Cannot> {
        let ready = self.begin(range, event, false).and_then(|mut begun| begun.step(false).then_some(begun));
        ready.ok_or_else(|| {
            self.counters.refused.fetch_add(1, Ordering::Relaxed);
            Cannot { range }
        })
    }

    /// A whole invalidation: clears, waits for DMA, unlinks, calls `release` to let the pages go, and ends.
    pub fn invalidate<R>(self: &Arc<Self>, range: VirtRange, release: impl FnOnce() -> R) -> R {
        self.invalidate_event(range, Event::Clear, release)
    }

    /// The same, with what it is about.
    pub fn invalidate_event<R>(
        self: &Arc<Self>,
        range: VirtRange,
        event: Event,
        release: impl FnOnce() -> R,
    ) -> R {
        let mut invalidation = self.begin_event(range, event);
        invalidation.wait();
        let released = release();
        invalidation.end();
        released
    }

    fn begin(self: &Arc<Self>, range: VirtRange, event: Event, may_wait: bool) -> Option<Invalidation> {
        let place = if range.is_empty() { None } else { Some(self.enter(range, may_wait)?) };
        let counters = &self.counters;
        counters.invalidations.fetch_add(1, Ordering::Relaxed);
        counters.bytes.fetch_add(range.len(), Ordering::Relaxed);
        let mut invalidation = Invalidation {
            notifiers: Arc::clone(self),
            range,
            event,
            place,
            drain: None,
            reached: None,
            visited: 0,
        };
        let cleared = invalidation.clear(may_wait);
        counters.visits.fetch_add(invalidation.visited, Ordering::Relaxed);
        if !cleared {
            return None;
        }
        if invalidation.visited > 0 {
            counters.drains.fetch_add(1, Ordering::Relaxed);
            invalidation.drain = Some(self.epoch().drain());
        }
        Some(invalidation)
    }
}

impl Invalidation {
    /// Whether every owner has; one that would have to wait, and may not, ends it.
    fn clear(&mut self, may_wait: bool) -> bool {
        let Some(place) = self.place else { return true };
        let mut walk = self.notifiers.walk(self.range, place.began);
        while let Some((owner, sequence, key)) = walk.next() {
            // Noted first: should the callback panic, its `Raise` has been used or dropped, and counts.
            self.reached = Some(key);
            self.visited += 1;
            if may_wait {
                owner.clear(self.range, Raise::new(sequence, self.event));
            } else if !owner.try_clear(self.range, Raise::new(sequence, self.event)) {
                return false;
            }
        }
        true
    }

    /// Whether the pages may go: DMA that was under way has ended and every owner has unlinked. Never blocks.
    pub fn poll(&mut self) -> bool {
        self.step(true)
    }

    /// As [`Invalidation::poll`]; an owner's lock is waited for only if that may be.
    fn step(&mut self, may_wait: bool) -> bool {
        let Some(drain) = &mut self.drain else { return true };
        if !drain.poll(self.notifiers.epoch()) {
            return false;
        }
        if let Some(place) = self.place {
            let mut walk = self.notifiers.walk(self.range, place.began);
            while let Some((owner, ..)) = walk.next() {
                if may_wait {
                    owner.unlink(self.range);
                } else if !owner.try_unlink(self.range) {
                    return false;
                }
            }
        }
        self.drain = None;
        true
    }

    /// Polls until ready: briefly in place, then giving the processor away, then sleeping between looks. A burst is
    /// bounded, so this is too.
    pub fn wait(&mut self) {
        const SPINS: u32 = 128;
        const YIELDS: u32 = 64;
        const NAP: Duration = Duration::from_micros(20);
        let mut looks = 0;
        while !self.poll() {
            looks += 1;
            if cfg!(any(loom, shuttle)) || (SPINS..SPINS + YIELDS).contains(&looks) {
                thread::yield_now();
            } else if looks < SPINS {
                std::hint::spin_loop();
            } else {
                thread::sleep(NAP);
            }
        }
    }

    /// The range that is being invalidated.
    #[must_use]
    pub fn range(&self) -> VirtRange {
        self.range
    }

    /// Intervals that were cleared.
    #[must_use]
    pub fn visited(&self) -> u64 {
        self.visited
    }

    /// Ends it: the pages are gone, faults may begin again.
    ///
    /// # Panics
    /// If it is not ready: pages were let go under a device.
    pub fn end(self) {
        assert!(self.drain.is_none(), "invalidation of {} ended before it was ready", self.range);
    }
}

impl Drop for Invalidation {
    fn drop(&mut self) {
        if let Some(place) = self.place.take() {
            self.notifiers.leave(self.range, place, self.reached);
        }
    }
}

impl fmt::Debug for Invalidation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Invalidation")
            .field("range", &self.range)
            .field("visited", &self.visited)
            .field("ready", &self.drain.is_none())
            .finish()
    }
}
