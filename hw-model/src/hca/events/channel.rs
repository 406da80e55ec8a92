//! Completion channels: where completion queues say that they have something (11.4.2.3; `ibv_create_comp_channel`).

use super::queue::EventQueue;
use crate::hca::cq::{CompletionQueue, Cqn};
use crate::hca::device::Hca;
use crate::hca::points;
use crate::sync::Arc;
use crate::sync::atomic::{AtomicU32, Ordering};
use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

/// A completion queue has something, and was armed to say so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompletionEvent {
    /// The completion queue.
    pub cq: Cqn,
    /// What software called it.
    pub cookie: u64,
}

/// A completion channel. Completion queues that were made with it hold it.
pub struct CompletionChannel {
    hca: Arc<Hca>,
    pub(in crate::hca) channel: Arc<Channel>,
}

/// The part that completion queues post to.
pub(in crate::hca) struct Channel {
    events: EventQueue<(CompletionEvent, Arc<Unacknowledged>)>,
}

/// Events of one completion queue that were taken and not acknowledged.
#[derive(Default)]
pub(in crate::hca) struct Unacknowledged(AtomicU32);

impl Unacknowledged {
    pub(in crate::hca) fn count(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }

    /// Of more than there are, as many as there are.
    pub(in crate::hca) fn acknowledge(&self, events: u32) {
        let less = |count: u32| Some(count.saturating_sub(events));
        let _ = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, less);
    }
}

/// Why a completion channel was not made.
#[derive(Debug, thiserror::Error)]
pub enum CreateChannelError {
    /// The operating system gave no descriptor.
    #[error("no descriptor for a completion channel")]
    Descriptor(#[from] io::Error),
    /// There are as many as the device has.
    #[error("all {max} completion channels are in use")]
    TooMany {
        /// The device's limit.
        max: u32,
    },
}

impl Channel {
    pub(in crate::hca) fn new() -> Self {
        Self { events: EventQueue::new() }
    }

    pub(in crate::hca) fn post(&self, event: CompletionEvent, unacknowledged: &Arc<Unacknowledged>) {
        // A queue is armed for one event at a time, so there is no need for a bound.
        self.events.post((event, Arc::clone(unacknowledged)), usize::MAX);
    }

    pub(in crate::hca) fn take(&self) -> Option<CompletionEvent> {
        let taken = |(_, unacknowledged): &(_, Arc<Unacknowledged>)| {
            unacknowledged.0.fetch_add(1, Ordering::AcqRel);
        };
        self.events.take(taken).map(|(event, _)| event)
    }

    /// Takes back what was posted by a queue that is gone.
    pub(in crate::hca) fn forget(&self, cq: Cqn) {
        self.events.retain(|(event, _)| event.cq != cq);
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
impl Channel {
    pub(in crate::hca) fn wait(&self, timeout: Duration) -> bool {
        self.events.wait(timeout)
    }
    pub(in crate::hca) fn is_readable(&self) -> bool {
        let descriptor = self.events.descriptor().expect("a descriptor");
        super::queue::readable(descriptor, Duration::ZERO)
    }
}

impl Hca {
    /// A new completion channel.
    ///
    /// # Errors
    /// See [`CreateChannelError`].
    pub fn create_channel(self: &Arc<Self>) -> Result<Arc<CompletionChannel>, CreateChannelError> {
        let max = self.config().limits.cqs;
        if self.device.points.meet(points::CREATE_CHANNEL).fails() {
            return Err(CreateChannelError::TooMany { max });
        }
        let channel = Arc::new(Channel::new());
        channel.events.descriptor()?;
        if self.channels.fetch_add(1, Ordering::Relaxed) >= max {
            self.channels.fetch_sub(1, Ordering::Relaxed);
            return Err(CreateChannelError::TooMany { max });
        }
        Ok(Arc::new(CompletionChannel { hca: Arc::clone(self), channel }))
    }
}

impl CompletionChannel {
    /// The descriptor to poll: readable while there is an event. Only to be polled, and to be made non-blocking.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.channel.events.descriptor().expect("made with the channel")
    }

    /// The oldest event, if there is one. To be acknowledged ([`CompletionQueue::acknowledge_events`]).
    #[must_use]
    pub fn try_next(&self) -> Option<CompletionEvent> {
        self.channel.take()
    }

    /// The oldest event; sleeps until there is one. `None` after `timeout`. Without engine threads the caller runs the
    /// engines meanwhile, and naps for a moment between tries.
    #[must_use]
    pub fn next_within(&self, timeout: Duration) -> Option<CompletionEvent> {
        let end = Instant::now() + timeout;
        loop {
            if let Some(event) = self.try_next() {
                return Some(event);
            }
            self.hca.progress();
            self.hca.rest();
            let left = end.saturating_duration_since(Instant::now());
            let nap = if self.hca.has_threads() { left } else { left.min(Duration::from_micros(100)) };
            if !self.channel.events.wait(nap) && Instant::now() >= end {
                return self.try_next();
            }
        }
    }

    /// The oldest event, as `ibv_get_cq_event` gives it: sleeps until there is one, unless the descriptor was made
    /// non-blocking.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`].
    pub fn next(&self) -> io::Result<CompletionEvent> {
        loop {
            if let Some(event) = self.try_next() {
                return Ok(event);
            }
            self.hca.progress();
            if self.channel.events.len() == 0 && self.channel.events.is_nonblocking() {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            if let Some(event) = self.next_within(Duration::from_millis(100)) {
                return Ok(event);
            }
        }
    }

    /// Events that wait to be taken.
    #[must_use]
    pub fn len(&self) -> usize {
        self.channel.events.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The device it belongs to.
    #[must_use]
    pub fn hca(&self) -> &Arc<Hca> {
        &self.hca
    }
}

impl Drop for CompletionChannel {
    fn drop(&mut self) {
        self.hca.channels.fetch_sub(1, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for CompletionChannel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CompletionChannel").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl CompletionQueue {
    /// Counts events of this queue as dealt with (`ibv_ack_cq_events`).
    pub fn acknowledge_events(&self, events: u32) {
        self.ring.unacknowledged().acknowledge(events);
    }

    /// Events of this queue that were taken from its channel and not acknowledged. A program that destroys queues while
    /// other threads hold their events waits for none (`ibv_destroy_cq` does).
    #[must_use]
    pub fn unacknowledged_events(&self) -> u32 {
        self.ring.unacknowledged().count()
    }
}
