//! Completion queues (IBTA volume 1, 10.8.5, 11.2.8 and 11.4.2).

mod moderation;
mod ring;

pub use moderation::Moderation;
pub(super) use moderation::Moderator;
pub(super) use ring::Ring;

use super::device::Hca;
use super::events::{AsyncEvent, CompletionChannel};
use super::points;
use super::request::{Completion, RequestId};
use crate::sync::Arc;
use crate::sync::atomic::Ordering;
use crate::wire::Qpn;
use std::time::{Duration, Instant};

/// The number of a completion queue, unique while it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cqn(pub u32);

/// Which completion is the next event of a completion queue (11.4.2.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Notify {
    /// The next that its sender wanted to be one, or that failed.
    Solicited,
    /// The next.
    Any,
}

/// A completion queue. Dropping the last handle destroys it; queue pairs keep their queues alive.
pub struct CompletionQueue {
    hca: Arc<Hca>,
    pub(super) ring: Arc<Ring>,
    channel: Option<Arc<CompletionChannel>>,
}

/// What a completion queue is made with.
#[derive(Clone, Debug)]
pub struct CqSpec {
    /// Entries.
    pub entries: u32,
    /// Where its events go.
    pub channel: Option<Arc<CompletionChannel>>,
    /// What software calls it; its events carry that.
    pub cookie: u64,
}

/// Why a completion queue was not created.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CreateCqError {
    /// There are as many as the device has.
    #[error("all {max} completion queues are in use")]
    TooMany {
        /// The device's limit.
        max: u32,
    },
    /// Not between one entry and the limit.
    #[error("a completion queue has 1 to {max} entries, {entries} were asked for")]
    Size {
        /// Asked for.
        entries: u32,
        /// The device's limit.
        max: u32,
    },
    /// The completion channel is another device's.
    #[error("the completion channel belongs to another device")]
    OtherDevice,
}

/// Why a completion queue was not resized. It is as before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResizeCqError {
    /// Not between one entry and the limit.
    #[error("a completion queue has 1 to {max} entries, {entries} were asked for")]
    Size {
        /// Asked for.
        entries: u32,
        /// The device's limit.
        max: u32,
    },
    /// More completions wait in it (11.2.6.3).
    #[error("{there} completions wait in the queue, which is more than {entries}")]
    Occupied {
        /// Asked for.
        entries: u32,
        /// Completions there are.
        there: usize,
    },
    /// The device has no memory for it.
    #[error("no memory for a completion queue of {entries} entries")]
    NoMemory {
        /// Asked for.
        entries: u32,
    },
}

/// More completions arrived than the queue holds: at least one is lost and the queue takes no more (11.6.3.3, CQ error).
/// The queue pairs that completed into it are in the error state. What had been queued before can still be polled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the completion queue of {capacity} entries overran; request {lost:?} and later ones left no completion"
)]
pub struct Overrun {
    /// Entries of the queue.
    pub capacity: usize,
    /// The first request whose completion is lost, if the one who asks is the one who lost it.
    pub lost: Option<RequestId>,
}

impl Hca {
    /// A new completion queue of `entries` entries, without events.
    ///
    /// # Errors
    /// See [`CreateCqError`].
    pub fn create_cq(self: &Arc<Self>, entries: u32) -> Result<Arc<CompletionQueue>, CreateCqError> {
        self.create_cq_with(&CqSpec { entries, channel: None, cookie: 0 })
    }

    /// A new completion queue (11.2.6.1).
    ///
    /// # Errors
    /// See [`CreateCqError`].
    pub fn create_cq_with(self: &Arc<Self>, spec: &CqSpec) -> Result<Arc<CompletionQueue>, CreateCqError> {
        let CqSpec { entries, channel, cookie } = spec.clone();
        let limits = &self.device.config.limits;
        if entries == 0 || entries > limits.cq_entries {
            return Err(CreateCqError::Size { entries, max: limits.cq_entries });
        }
        if channel.as_ref().is_some_and(|channel| !Arc::ptr_eq(channel.hca(), self)) {
            return Err(CreateCqError::OtherDevice);
        }
        let refused = self.device.points.meet(points::CREATE_CQ).fails();
        if self.cqs.fetch_add(1, Ordering::Relaxed) >= limits.cqs || refused {
            self.forget_cq();
            return Err(CreateCqError::TooMany { max: limits.cqs });
        }
        // Numbers come again after four billion queues; one that lives so long would share its number.
        let cqn = Cqn(self.last_cqn.fetch_add(1, Ordering::Relaxed).wrapping_add(1));
        let told = channel.as_ref().map(|channel| (Arc::clone(&channel.channel), cookie));
        let shared = (Arc::clone(&self.device.moderator), Arc::clone(&self.device.events));
        let ring = Arc::new(Ring::new(cqn, entries, told, shared));
        Ok(Arc::new(CompletionQueue { hca: Arc::clone(self), ring, channel }))
    }

    fn forget_cq(&self) {
        self.cqs.fetch_sub(1, Ordering::Relaxed);
    }
}

impl CompletionQueue {
    /// Moves up to `max` completions to the end of `out`, oldest first, and says how many. With none there, the calling
    /// thread runs the engines a little (unless the configuration says that callers do not) and looks again.
    ///
    /// # Errors
    /// [`Overrun`] once the queue has overrun and all that it held was taken.
    pub fn poll(&self, out: &mut Vec<Completion>, max: usize) -> Result<usize, Overrun> {
        if !self.ring.has_news() {
            self.hca.poll();
        }
        if !self.ring.has_news() {
            return Ok(0);
        }
        let mut entries = self.ring.lock();
        let count = entries.queue.len().min(max);
        out.extend(entries.queue.drain(..count));
        self.ring.taken(&entries);
        if count == 0 && entries.queue.is_empty() && self.ring.has_overrun() {
            return Err(Overrun { capacity: entries.capacity, lost: None });
        }
        Ok(count)
    }

    /// Sleeps until there is something to poll (a completion, or an overrun to hear of). False after `timeout`.
    ///
    /// Without engine threads the caller runs the engines meanwhile, and naps for a moment between tries.
    pub fn wait(&self, timeout: Duration) -> bool {
        let end = Instant::now() + timeout;
        loop {
            if !self.ring.has_news() {
                self.hca.progress();
            }
            self.hca.rest();
            let left = end.saturating_duration_since(Instant::now());
            let nap = if self.hca.has_threads() { left } else { left.min(Duration::from_micros(100)) };
            self.ring.sleep(nap);
            if self.ring.has_news() {
                return true;
            }
            if Instant::now() >= end {
                return false;
            }
        }
    }

    /// Arms the queue: the next completion that `notify` speaks of is an event of its channel, and then the queue is not
    /// armed any more (11.4.2.3, `ibv_req_notify_cq`). A queue that is armed for any completion stays so. Without a channel
    /// nobody hears of it.
    ///
    /// What is there already is no event. So one who means to sleep arms, polls once more, and sleeps if that gave nothing;
    /// this says whether there is something to poll.
    pub fn arm(&self, notify: Notify) -> bool {
        self.hca.rest();
        self.ring.arm(notify)
    }

    /// Has fewer events for more completions, or as many ([`Moderation::OFF`]).
    pub fn moderate(&self, moderation: Moderation) {
        self.ring.moderate(moderation);
    }

    /// Changes how many completions it can hold, and keeps those that it holds (11.2.6.3).
    ///
    /// # Errors
    /// See [`ResizeCqError`].
    pub fn resize(&self, entries: u32) -> Result<(), ResizeCqError> {
        let max = self.hca.config().limits.cq_entries;
        if entries == 0 || entries > max {
            return Err(ResizeCqError::Size { entries, max });
        }
        if self.hca.device.points.meet(points::RESIZE_CQ).fails() {
            return Err(ResizeCqError::NoMemory { entries });
        }
        self.ring.resize(entries).map_err(|there| ResizeCqError::Occupied { entries, there })
    }

    /// Takes back what a queue pair has left in it that nobody has polled.
    pub fn forget(&self, of: Qpn) {
        let mut entries = self.ring.lock();
        entries.queue.retain(|completion| completion.qpn != of);
        self.ring.taken(&entries);
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> Cqn {
        self.ring.cqn()
    }

    /// Where its events go.
    #[must_use]
    pub fn channel(&self) -> Option<&Arc<CompletionChannel>> {
        self.channel.as_ref()
    }

    /// Completions that can be polled at once.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ring.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Completions that it can hold.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.ring.lock().capacity
    }

    /// The device it belongs to.
    #[must_use]
    pub fn hca(&self) -> &Arc<Hca> {
        &self.hca
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        self.ring.forget_channel();
        let own = self.number();
        self.hca.device.events.forget(|event| *event == AsyncEvent::CqError(own));
        self.hca.forget_cq();
    }
}

impl std::fmt::Debug for CompletionQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CompletionQueue")
            .field("number", &self.number())
            .field("len", &self.len())
            .field("capacity", &self.capacity())
            .field("overrun", &self.ring.has_overrun())
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
