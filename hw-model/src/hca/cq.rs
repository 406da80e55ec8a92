//! Completion queues (IBTA volume 1, 10.8.5 and 11.4.2).

use super::device::Hca;
use super::request::{Completion, RequestId};
use crate::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use crate::sync::{Arc, Condvar, Mutex};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// A completion queue. Dropping the last handle destroys it; queue pairs keep their queues alive.
pub struct CompletionQueue {
    hca: Arc<Hca>,
    pub(super) ring: Arc<Ring>,
}

/// The part that engines fill.
pub(super) struct Ring {
    queue: Mutex<VecDeque<Completion>>,
    ready: AtomicUsize,
    capacity: usize,
    overrun: AtomicBool,
    waiters: AtomicU32,
    arrived: Condvar,
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
}

/// More completions arrived than the queue holds: at least one is lost and the queue takes no more (11.6.3, CQ error).
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

impl Ring {
    pub(super) fn new(capacity: u32) -> Self {
        let capacity = capacity as usize;
        Self {
            // Small queues never grow again; a large one costs what it holds.
            queue: Mutex::new(VecDeque::with_capacity(capacity.min(4096))),
            ready: AtomicUsize::new(0),
            capacity,
            overrun: AtomicBool::new(false),
            waiters: AtomicU32::new(0),
            arrived: Condvar::new(),
        }
    }

    /// Adds a completion.
    pub(super) fn push(&self, completion: Completion) -> Result<(), Overrun> {
        let mut queue = self.queue.lock();
        let lost = Overrun { capacity: self.capacity, lost: Some(completion.id) };
        if self.overrun.load(Ordering::Relaxed) || queue.len() == self.capacity {
            self.overrun.store(true, Ordering::Release);
            drop(queue);
            self.wake();
            return Err(lost);
        }
        queue.push_back(completion);
        self.ready.store(queue.len(), Ordering::Release);
        drop(queue);
        self.wake();
        Ok(())
    }

    fn wake(&self) {
        if self.waiters.load(Ordering::SeqCst) > 0 {
            // Taking the lock puts this after a waiter's look at the queue or before it, never between look and sleep.
            drop(self.queue.lock());
            self.arrived.notify_all();
        }
    }

    fn has_news(&self) -> bool {
        self.ready.load(Ordering::Acquire) > 0 || self.overrun.load(Ordering::Acquire)
    }
}

impl CompletionQueue {
    pub(super) fn new(hca: Arc<Hca>, ring: Arc<Ring>) -> Arc<Self> {
        Arc::new(Self { hca, ring })
    }

    /// Moves up to `max` completions to the end of `out`, oldest first, and says how many. With none there, the calling
    /// thread runs the engines a little (unless the configuration says that callers do not) and looks again.
    ///
    /// # Errors
    /// [`Overrun`] once the queue has overrun and all that it held was taken.
    pub fn poll(&self, out: &mut Vec<Completion>, max: usize) -> Result<usize, Overrun> {
        if !self.ring.has_news() {
            self.hca.progress();
        }
        if !self.ring.has_news() {
            return Ok(0);
        }
        let mut queue = self.ring.queue.lock();
        let count = queue.len().min(max);
        out.extend(queue.drain(..count));
        self.ring.ready.store(queue.len(), Ordering::Release);
        if count == 0 && queue.is_empty() && self.ring.overrun.load(Ordering::Relaxed) {
            return Err(Overrun { capacity: self.ring.capacity, lost: None });
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
            let mut queue = self.ring.queue.lock();
            self.ring.waiters.fetch_add(1, Ordering::SeqCst);
            let left = end.saturating_duration_since(Instant::now());
            if !self.ring.has_news() && !left.is_zero() {
                let nap = if self.hca.has_threads() { left } else { left.min(Duration::from_micros(100)) };
                self.ring.arrived.wait_for(&mut queue, nap);
            }
            self.ring.waiters.fetch_sub(1, Ordering::SeqCst);
            drop(queue);
            if self.ring.has_news() {
                return true;
            }
            if Instant::now() >= end {
                return false;
            }
        }
    }

    /// Completions that can be polled at once.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ring.ready.load(Ordering::Acquire)
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Completions that it can hold.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.ring.capacity
    }

    /// The device it belongs to.
    #[must_use]
    pub fn hca(&self) -> &Arc<Hca> {
        &self.hca
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        self.hca.forget_cq();
    }
}

impl std::fmt::Debug for CompletionQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let overrun = self.ring.overrun.load(Ordering::Relaxed);
        f.debug_struct("CompletionQueue")
            .field("len", &self.len())
            .field("capacity", &self.ring.capacity)
            .field("overrun", &overrun)
            .finish_non_exhaustive()
    }
}
