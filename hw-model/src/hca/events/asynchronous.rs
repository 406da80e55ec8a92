//! Asynchronous events: what happens to an object without a request that could tell of it (11.6.3).

use super::queue::EventQueue;
use crate::hca::cq::Cqn;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::wire::{Qpn, Srqn};
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// What happened (11.6.3; `enum ibv_event_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AsyncEvent {
    /// A completion queue overran (11.6.3.3, CQ error).
    CqError(Cqn),
    /// A queue pair cannot complete its requests, as its completion queue overran (11.6.3.3, local work queue catastrophic
    /// error).
    QpFatal(Qpn),
    /// A responder refused a request that is none (11.6.3.3, invalid request local work queue error).
    QpRequestError(Qpn),
    /// A responder refused a request that its memory does not allow (11.6.3.3, local access violation work queue error).
    QpAccessError(Qpn),
    /// A packet came for a queue pair that is ready to receive only (11.6.3.2, communication established).
    CommunicationEstablished(Qpn),
    /// A send queue that was asked to drain has drained (11.6.3.2, send queue drained).
    SendQueueDrained(Qpn),
    /// A queue pair in error has taken its last receive from its shared queue (11.6.3.2, last WQE reached).
    LastWqeReached(Qpn),
    /// A shared receive queue holds less than its limit (11.6.3.2, SRQ limit reached).
    SrqLimitReached(Srqn),
    /// A shared receive queue failed (11.6.3.3, SRQ catastrophic error).
    SrqError(Srqn),
    /// The port works (11.6.3.4, port active).
    PortActive(u8),
    /// The port does not (11.6.3.4, port error).
    PortError(u8),
    /// The addresses of the port changed.
    GidChange(u8),
    /// The partition keys of the port changed.
    PKeyChange(u8),
    /// The device does not work any more (11.6.3.4, local catastrophic error).
    DeviceFatal,
}

impl AsyncEvent {
    /// The queue pair that it speaks of.
    #[must_use]
    pub const fn qpn(&self) -> Option<Qpn> {
        match self {
            Self::QpFatal(qpn)
            | Self::QpRequestError(qpn)
            | Self::QpAccessError(qpn)
            | Self::CommunicationEstablished(qpn)
            | Self::SendQueueDrained(qpn)
            | Self::LastWqeReached(qpn) => Some(*qpn),
            _ => None,
        }
    }
}

/// The asynchronous events of one device.
pub struct AsyncEvents {
    queue: EventQueue<AsyncEvent>,
    taken: AtomicU64,
    acknowledged: AtomicU64,
    lost: AtomicU64,
}

/// Events that wait at most. Objects have a few each in a lifetime; who never looks must not be made to pay without end.
const MOST: usize = 1 << 16;

impl AsyncEvents {
    pub(in crate::hca) fn new() -> Self {
        let [taken, acknowledged, lost] = [0; 3].map(AtomicU64::new);
        Self { queue: EventQueue::new(), taken, acknowledged, lost }
    }

    pub(in crate::hca) fn post(&self, event: AsyncEvent) {
        tracing::debug!(?event, "asynchronous event");
        if !self.queue.post(event, MOST) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Takes back what speaks of an object that is gone.
    pub(in crate::hca) fn forget(&self, of: impl Fn(&AsyncEvent) -> bool) {
        self.queue.retain(|event| !of(event));
    }

    /// The descriptor to poll: readable while there is an event. Only to be polled, and to be made non-blocking.
    ///
    /// # Errors
    /// What the operating system says if it gives no descriptor.
    pub fn descriptor(&self) -> io::Result<BorrowedFd<'_>> {
        self.queue.descriptor()
    }

    /// The oldest event, if there is one. To be acknowledged ([`AsyncEvents::acknowledge`]).
    #[must_use]
    pub fn try_next(&self) -> Option<AsyncEvent> {
        self.queue.take(|_| _ = self.taken.fetch_add(1, Ordering::AcqRel))
    }

    /// The oldest event; sleeps until there is one. `None` after `timeout`.
    #[must_use]
    pub fn next_within(&self, timeout: Duration) -> Option<AsyncEvent> {
        if self.queue.wait(timeout) { self.try_next() } else { None }
    }

    /// The oldest event, as `ibv_get_async_event` gives it: sleeps until there is one, unless the descriptor was made
    /// non-blocking.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`].
    pub fn next(&self) -> io::Result<AsyncEvent> {
        loop {
            if let Some(event) = self.try_next() {
                return Ok(event);
            }
            if self.queue.is_nonblocking() {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            self.queue.wait(Duration::from_secs(1));
        }
    }

    /// Counts events as dealt with (`ibv_ack_async_event`).
    pub fn acknowledge(&self, events: u64) {
        self.acknowledged.fetch_add(events, Ordering::AcqRel);
    }

    /// Events that were taken and not acknowledged.
    #[must_use]
    pub fn unacknowledged(&self) -> u64 {
        let acknowledged = self.acknowledged.load(Ordering::Acquire);
        self.taken.load(Ordering::Acquire).saturating_sub(acknowledged)
    }

    /// Events that wait to be taken.
    #[must_use]
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Events that were not kept, as nobody took those before them.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

impl std::fmt::Debug for AsyncEvents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AsyncEvents").field("len", &self.len()).field("lost", &self.lost()).finish()
    }
}
