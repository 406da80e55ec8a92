//! What an invalidation does to an entry: set a flag, and seal the region if nobody uses it.
//!
//! # Whether anybody uses it
//!
//! A request counts itself and then reads the flag. An invalidation sets the flag, has the drain's process-wide barrier
//! behind it when `unlink` is called, and then reads the count. So either the request sees the flag and lets go again, or
//! the invalidation sees the request and does not seal.

use super::entry::Entry;
use crate::device::Seal;
use hw_model::addr::VirtRange;
use hw_model::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use hw_model::sync::{Arc, OnceLock, Weak};
use odp::notifier::{Notify, Raise};
use std::any::Any;

/// The owner of an entry's interval.
pub(super) struct Tracker {
    /// Its memory changed, or it was told to be forgotten. Never taken back.
    ended: AtomicBool,
    /// One of the references to the entry is the shelf's.
    kept: AtomicBool,
    /// It was found since the evicting hand passed.
    used: AtomicBool,
    /// Entries of the cache that have ended.
    count: Arc<AtomicU64>,
    armed: OnceLock<Armed>,
}

/// What is known once the region is there.
struct Armed {
    entry: Weak<Entry>,
    sealer: Option<Arc<dyn Seal>>,
    /// What the memory goes with, where the region does not keep it.
    owner: Option<Weak<dyn Any + Send + Sync>>,
}

impl Tracker {
    pub(super) fn new(count: &Arc<AtomicU64>) -> Arc<Self> {
        Arc::new(Self {
            ended: AtomicBool::new(false),
            kept: AtomicBool::new(true),
            used: AtomicBool::new(false),
            count: Arc::clone(count),
            armed: OnceLock::new(),
        })
    }

    /// The region is there. The caller holds the reference that the shelf is going to have besides its own.
    pub(super) fn arm(&self, entry: &Arc<Entry>, owner: Option<Weak<dyn Any + Send + Sync>>) {
        let sealer = entry.region.sealer();
        let armed = Armed { entry: Arc::downgrade(entry), sealer, owner };
        assert!(self.armed.set(armed).is_ok(), "an entry is armed once");
    }

    #[inline]
    pub(super) fn is_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Nobody finds the entry from here on.
    pub(super) fn end(&self) {
        if !self.ended.swap(true, Ordering::AcqRel) {
            self.count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The shelf is about to let go of its reference.
    pub(super) fn unkeep(&self) {
        self.kept.store(false, Ordering::Release);
    }

    #[inline]
    pub(super) fn mark_used(&self) {
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
    }

    /// Whether it was found since this was last asked.
    pub(super) fn take_used(&self) -> bool {
        self.used.swap(false, Ordering::Relaxed)
    }
}

impl Notify for Tracker {
    fn clear(&self, _range: VirtRange, raise: Raise<'_>) {
        // The flag is all that there is to hide, so it stands for the owner's lock too.
        self.end();
        raise.raise();
    }

    fn try_clear(&self, range: VirtRange, raise: Raise<'_>) -> bool {
        self.clear(range, raise);
        true
    }

    fn unlink(&self, _range: VirtRange) {
        if let Some(sealer) = self.to_seal() {
            sealer.seal();
        }
    }

    fn try_unlink(&self, _range: VirtRange) -> bool {
        self.to_seal().is_none_or(|sealer| sealer.try_seal())
    }
}

impl Tracker {
    /// What must be sealed before the pages go: the region, if nobody uses it or its memory's owner is gone.
    fn to_seal(&self) -> Option<&dyn Seal> {
        // Not armed: whoever is registering it finds the flag, and keeps it from the shelf.
        let armed = self.armed.get()?;
        let references = armed.entry.strong_count();
        // The count first: the shelf says that it lets go before it does.
        fence(Ordering::Acquire);
        let leases = references - usize::from(self.kept.load(Ordering::Acquire)).min(references);
        let orphaned = armed.owner.as_ref().is_some_and(|owner| owner.strong_count() == 0);
        let unused = leases == 0 || orphaned;
        armed.sealer.as_deref().filter(|_| unused)
    }
}
