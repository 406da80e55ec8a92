//! The invalidation queue: how software tells the IOMMU to forget (Intel VT-d specification 6.5.2, queued invalidation).
//!
//! Software writes descriptors, the IOMMU executes them in order. After each invalidation comes a wait descriptor; only
//! when that is done, all before it is, and what was invalidated may be released. A caller that waits submits and runs
//! the queue on its own thread, as `qi_submit_sync` in drivers/iommu/intel/dmar.c spins until the hardware is done. In a
//! simulated world the two are steps apart, so that releasing a page too early can be seen.

use crate::addr::Iova;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU64, Ordering};
use std::collections::VecDeque;

/// Descriptors that a queue holds at most (`QI_LENGTH`).
pub(super) const DEFAULT_LENGTH: usize = 256;
/// Descriptors of one flush: the invalidation, and the wait behind it.
pub(super) const FLUSH_DESCRIPTORS: usize = 2;

#[derive(Clone, Copy, Debug)]
enum Descriptor {
    Invalidate { iova: Iova, len: u64 },
    Wait(u64),
}

/// A flush that was submitted. It is done when [`Domain::is_flushed`](super::Domain::is_flushed) says so.
#[must_use = "nothing may be released before the flush is done"]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FlushTicket(u64);

/// The queue has no room for another flush. Let the IOMMU run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the invalidation queue holds {pending} of its {length} descriptors")]
pub struct QueueFull {
    /// Descriptors that wait.
    pub pending: usize,
    /// Descriptors that fit.
    pub length: usize,
}

/// What an invalidation queue has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// Descriptors executed, waits included.
    pub descriptors: u64,
    /// Wait descriptors executed.
    pub waits: u64,
    /// Descriptors that wait to be executed.
    pub pending: u64,
}

/// Lock order: `ring`, then a set of the IOTLB.
pub(super) struct InvalidationQueue {
    ring: Mutex<Ring>,
    length: usize,
    /// Number of the last wait that was executed.
    completed: AtomicU64,
    descriptors: AtomicU64,
}

struct Ring {
    waiting: VecDeque<Descriptor>,
    last_wait: u64,
}

impl Ring {
    fn push(&mut self, iova: Iova, len: u64) -> FlushTicket {
        if len > 0 {
            self.waiting.push_back(Descriptor::Invalidate { iova, len });
        }
        self.last_wait += 1;
        self.waiting.push_back(Descriptor::Wait(self.last_wait));
        FlushTicket(self.last_wait)
    }
}

impl InvalidationQueue {
    pub(super) fn new(length: usize) -> Self {
        Self {
            ring: Mutex::new(Ring { waiting: VecDeque::with_capacity(length), last_wait: 0 }),
            length,
            completed: AtomicU64::new(0),
            descriptors: AtomicU64::new(0),
        }
    }

    /// Queues the invalidation of a range and a wait; of an empty range, the wait alone.
    pub(super) fn submit(&self, iova: Iova, len: u64) -> Result<FlushTicket, QueueFull> {
        let mut ring = self.ring.lock();
        let pending = ring.waiting.len();
        if pending + FLUSH_DESCRIPTORS > self.length {
            return Err(QueueFull { pending, length: self.length });
        }
        Ok(ring.push(iova, len))
    }

    /// Queues the invalidation of a range and executes the queue until it is done.
    pub(super) fn submit_and_wait(&self, iova: Iova, len: u64, mut execute: impl FnMut(Iova, u64)) {
        let mut ring = self.ring.lock();
        if ring.waiting.len() + FLUSH_DESCRIPTORS > self.length {
            self.run_locked(&mut ring, usize::MAX, &mut execute);
        }
        // Whoever comes later waits for the lock, so this is the last wait and running all of it is running up to it.
        let _ticket = ring.push(iova, len);
        self.run_locked(&mut ring, usize::MAX, &mut execute);
    }

    /// Executes up to `limit` descriptors. Gives how many.
    pub(super) fn run(&self, limit: usize, mut execute: impl FnMut(Iova, u64)) -> usize {
        self.run_locked(&mut self.ring.lock(), limit, &mut execute)
    }

    fn run_locked(&self, ring: &mut Ring, limit: usize, execute: &mut impl FnMut(Iova, u64)) -> usize {
        let mut done = 0;
        while done < limit
            && let Some(descriptor) = ring.waiting.pop_front()
        {
            match descriptor {
                Descriptor::Invalidate { iova, len } => execute(iova, len),
                Descriptor::Wait(number) => self.completed.store(number, Ordering::Release),
            }
            done += 1;
        }
        self.descriptors.fetch_add(done as u64, Ordering::Relaxed);
        done
    }

    pub(super) fn is_done(&self, FlushTicket(number): FlushTicket) -> bool {
        self.completed.load(Ordering::Acquire) >= number
    }

    pub(super) fn stats(&self) -> QueueStats {
        let ring = self.ring.lock();
        QueueStats {
            descriptors: self.descriptors.load(Ordering::Relaxed),
            waits: self.completed.load(Ordering::Acquire),
            pending: ring.waiting.len() as u64,
        }
    }
}
