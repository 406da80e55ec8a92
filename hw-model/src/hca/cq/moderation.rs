//! Moderation: one event for several completions (`ibv_modify_cq`; an option of devices, not of the specification).
//!
//! An event that is held back waits in the device's list until its time is over. The list is looked at by the engines,
//! who are told the time; while it is empty, that costs one load.

use super::ring::Ring;
use crate::hca::time::Time;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Arc, Mutex, Weak};

/// How long events of a completion queue may wait for more completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moderation {
    /// Completions that make an event.
    pub count: u16,
    /// Time in microseconds after which fewer make one too, twice that at most. If this or the count is 0, nothing waits: an
    /// event that could wait for ever would be no use.
    pub period: u16,
}

impl Moderation {
    /// Every completion that is waited for is an event at once.
    pub const OFF: Self = Self { count: 0, period: 0 };

    /// Whether `held_back` completions are an event.
    pub(super) fn is_over(self, held_back: u16) -> bool {
        self.period == 0 || held_back >= self.count
    }
}

/// The events of one device that are held back.
pub(in crate::hca) struct Moderator {
    held: Mutex<Vec<Held>>,
    count: AtomicUsize,
}

struct Held {
    ring: Weak<Ring>,
    arming: u64,
    period: u16,
    /// When it is over. Known once an engine has looked at it.
    until: Option<Time>,
}

impl Moderator {
    pub(in crate::hca) fn new() -> Self {
        Self { held: Mutex::new(Vec::new()), count: AtomicUsize::new(0) }
    }

    pub(super) fn hold(&self, ring: &Arc<Ring>, arming: u64, period: u16) {
        let mut held = self.held.lock();
        held.push(Held { ring: Arc::downgrade(ring), arming, period, until: None });
        self.count.store(held.len(), Ordering::Release);
    }

    /// Lets go what has waited long enough. When the next has.
    #[inline]
    pub(in crate::hca) fn look(&self, now: Time) -> Option<Time> {
        if self.count.load(Ordering::Acquire) == 0 { None } else { self.let_go(now) }
    }

    #[cold]
    fn let_go(&self, now: Time) -> Option<Time> {
        loop {
            let mut held = self.held.lock();
            let mut over = Vec::new();
            held.retain_mut(|held| {
                let until = *held.until.get_or_insert_with(|| now.after(u64::from(held.period) * 1000));
                let keep = until > now;
                if !keep {
                    over.push((Weak::clone(&held.ring), held.arming));
                }
                keep
            });
            self.count.store(held.len(), Ordering::Release);
            if over.is_empty() {
                return held.iter().filter_map(|held| held.until).min();
            }
            // Lock order: completion queue, then this list.
            drop(held);
            for (ring, arming) in over {
                if let Some(ring) = ring.upgrade() {
                    ring.time_is_over(arming);
                }
            }
        }
    }
}
