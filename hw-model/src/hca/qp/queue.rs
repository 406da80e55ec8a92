//! The part of a queue pair that posting threads and the engine share: the queues of posted requests.

use super::list::{Data, SgeList};
use super::receive::{RecvQueue, RecvWqe, Taken};
use super::{QpState, Transport};
use crate::hca::cq::Ring;
use crate::hca::key::Caller;
use crate::hca::pd::Pd;
use crate::hca::request::{
    Attached, Completion, Destination, Operation, PostError, RecvRequest, RequestId, SendRequest, Status,
};
use crate::hca::stats::Counters;
use crate::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use crate::sync::{Arc, Mutex};
use crate::wire::{Qpn, Srqn};
use std::collections::VecDeque;

/// What posting threads and the engine share of one queue pair.
pub(in crate::hca) struct Shared {
    pub(in crate::hca) qpn: Qpn,
    pub(in crate::hca) pd: Pd,
    pub(super) transport: Transport,
    pub(super) limits: SendLimits,
    pub(super) sends: Arc<Ring>,
    pub(super) receives: Receiving,
    queue: Mutex<SendQueue>,
    /// Requests posted so far: changed under the lock of `queue`.
    posted: AtomicU32,
    /// Of those, how many have ended: changed by the holder of the engine. Two counters with one writer each take no locked
    /// instruction.
    ended: AtomicU32,
    /// A doorbell is on its way to the engine; another one would say nothing new.
    rung: AtomicBool,
}

/// How large send requests may be.
#[derive(Clone, Copy, Debug)]
pub(super) struct SendLimits {
    pub(super) requests: u32,
    pub(super) sges: u32,
    pub(super) inline: u32,
    pub(super) message: u32,
    /// Every request leaves a completion, whatever it says (11.2.4.1).
    pub(super) signal_all: bool,
}

/// Where a queue pair's receives come from, and where they complete.
pub(super) struct Receiving {
    /// `None`: it has no receives at all (extended connections).
    pub(super) queue: Option<Arc<RecvQueue>>,
    pub(super) shared: Option<Srqn>,
    pub(super) completions: Arc<Ring>,
}

struct SendQueue {
    state: QpState,
    posted: VecDeque<Wqe>,
}

/// A request as the engine works on it.
#[derive(Debug)]
pub(super) struct Wqe {
    pub(super) id: RequestId,
    pub(super) operation: Operation,
    pub(super) length: u32,
    pub(super) signaled: bool,
    pub(super) fence: bool,
    pub(super) solicited: bool,
    pub(super) destination: Destination,
    pub(super) data: Data,
}

/// The queue pair's completion queue has overrun.
#[derive(Clone, Copy, Debug)]
pub(super) struct Overran;

/// Bytes that an atomic moves (9.4.5).
pub(super) const WORD: u32 = 8;

impl Shared {
    pub(super) fn new(
        (qpn, pd, transport): (Qpn, Pd, Transport),
        limits: SendLimits,
        sends: Arc<Ring>,
        receives: Receiving,
    ) -> Self {
        // Grows to what is under way at a time: most queue pairs of many have little to do.
        let queue = SendQueue { state: QpState::Reset, posted: VecDeque::new() };
        Self {
            qpn,
            pd,
            transport,
            limits,
            sends,
            receives,
            queue: Mutex::new(queue),
            posted: AtomicU32::new(0),
            ended: AtomicU32::new(0),
            rung: AtomicBool::new(false),
        }
    }

    /// As the keys know it.
    pub(in crate::hca) fn caller(&self) -> Caller {
        Caller { pd: self.pd, qpn: self.qpn }
    }

    /// Puts requests into the queue, in order, until one is refused. The engine must be told if any was taken.
    pub(super) fn post(&self, requests: &[SendRequest<'_>]) -> (usize, Option<PostError>) {
        let mut queue = self.queue.lock();
        for (taken, request) in requests.iter().enumerate() {
            if let Err(error) = self.post_one(&mut queue, request) {
                return (taken, Some(error));
            }
        }
        (requests.len(), None)
    }

    /// True if the engine is to be told by mail, and has not been.
    pub(in crate::hca) fn ring(&self) -> bool {
        !self.rung.swap(true, Ordering::SeqCst)
    }

    fn post_one(&self, queue: &mut SendQueue, request: &SendRequest<'_>) -> Result<(), PostError> {
        let length = self.check(request)?;
        let data = match request.inline {
            [] => Data::List(SgeList::new(request.local)),
            taken => Data::Taken(taken.into()),
        };
        let SendRequest { id, operation, destination, fence, solicited, .. } = *request;
        let signaled = request.signaled || self.limits.signal_all;
        let wqe = Wqe { id, operation, length, signaled, fence, solicited, destination, data };
        if !queue.state.takes_requests() {
            return Err(PostError::State { qpn: self.qpn, state: queue.state });
        }
        if self.outstanding() >= self.limits.requests {
            return Err(PostError::QueueFull { capacity: self.limits.requests });
        }
        count_one(&self.posted);
        queue.posted.push_back(wqe);
        Ok(())
    }

    /// Checks what can be told from the request alone (11.4.1.1, immediate errors). Gives the bytes of its message.
    fn check(&self, request: &SendRequest<'_>) -> Result<u32, PostError> {
        let operation = request.operation;
        let code = operation.code();
        if !self.transport.has(&operation) {
            return Err(PostError::NotOfTransport { operation: code, transport: self.transport });
        }
        let destination = request.destination;
        if !operation.is_local() && !self.transport.reaches(&destination) {
            return Err(PostError::NoSuchDestination { transport: self.transport, destination });
        }
        let entries = request.local.len();
        let max = if operation.has_data() { self.limits.sges } else { 0 };
        if entries > max as usize {
            return Err(PostError::TooManySges { entries, max });
        }
        let taken = request.inline.len();
        let max = if operation.sends_data() { self.limits.inline } else { 0 };
        if taken > max as usize {
            return Err(PostError::InlineTooLong { bytes: taken, max });
        }
        if taken > 0 && entries > 0 {
            return Err(PostError::InlineAndList);
        }
        let listed: u64 = request.local.iter().map(|sge| u64::from(sge.length)).sum();
        let bytes = listed + taken as u64;
        if operation.is_word() && bytes != u64::from(WORD) {
            return Err(PostError::NotAWord { operation: code, bytes });
        }
        let length = u32::try_from(bytes).ok().filter(|length| *length <= self.limits.message);
        length.ok_or(PostError::TooLong { bytes, max: self.limits.message })
    }

    /// Puts a receive into the queue pair's own queue. True if the engine must be told: it is to be flushed.
    pub(super) fn post_receive(&self, request: &RecvRequest<'_>) -> Result<bool, PostError> {
        let none = PostError::NoReceiveQueue { qpn: self.qpn };
        let queue = self.receives.own().ok_or(none)?;
        // Held until it is in: a queue pair that fails meanwhile flushes it.
        let state = self.queue.lock();
        if !state.state.takes_receives() {
            return Err(PostError::State { qpn: self.qpn, state: state.state });
        }
        queue.post(request)?;
        Ok(state.state == QpState::Error)
    }

    /// The oldest posted request that the engine has not taken yet.
    pub(super) fn take(&self) -> Option<Wqe> {
        take_oldest(&mut self.queue.lock().posted)
    }

    /// The engine has heard the doorbell: the next post rings again.
    pub(in crate::hca) fn heard(&self) {
        self.rung.store(false, Ordering::SeqCst);
    }

    pub(super) fn state(&self) -> QpState {
        self.queue.lock().state
    }

    pub(super) fn set_state(&self, state: QpState) {
        self.queue.lock().state = state;
    }

    pub(super) fn outstanding(&self) -> u32 {
        let ended = self.ended.load(Ordering::Acquire);
        self.posted.load(Ordering::Relaxed).wrapping_sub(ended)
    }

    /// Ends `wqe`: the one place where a send request ends.
    pub(super) fn complete(&self, wqe: &Wqe, status: Status, counters: &Counters) -> Result<(), Overran> {
        count_one(&self.ended);
        counters.completed(status);
        if !wqe.signaled && status == Status::Success {
            return Ok(());
        }
        let completion = Completion::new(wqe.id, status, wqe.operation.code(), self.qpn, wqe.length);
        push(&self.sends, completion, counters)
    }
}

/// One more, of what has one writer at a time.
fn count_one(counter: &AtomicU32) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(1), Ordering::Release);
}

/// The oldest of a queue. An empty one begins at the start of its memory again: a queue with few in it stays in the cache.
#[inline]
pub(super) fn take_oldest<T>(queue: &mut VecDeque<T>) -> Option<T> {
    let oldest = queue.pop_front();
    if queue.is_empty() {
        queue.clear();
    }
    oldest
}

fn push(ring: &Arc<Ring>, completion: Completion, counters: &Counters) -> Result<(), Overran> {
    ring.push(completion).map_err(|_| {
        counters.cq_overruns.add(1);
        Overran
    })
}

impl Receiving {
    /// The oldest posted receive.
    pub(super) fn take(&self) -> Taken {
        self.queue.as_ref().map_or(Taken::Nothing, |queue| queue.take())
    }

    /// Ends a receive: the one place where one ends.
    pub(super) fn complete(
        &self,
        wqe: &RecvWqe,
        completion: Completion,
        counters: &Counters,
    ) -> Result<(), Overran> {
        if let Some(queue) = &self.queue {
            queue.ended();
        }
        counters.completed(completion.status);
        debug_assert_eq!(wqe.id, completion.id);
        push(&self.completions, completion, counters)
    }

    /// The queue, if it is not shared with others.
    pub(super) fn own(&self) -> Option<&RecvQueue> {
        self.queue.as_deref().filter(|_| self.shared.is_none())
    }
}

/// What came with a message, as its header says.
pub(super) fn attached(header: &crate::wire::Header) -> Attached {
    match (header.immediate(), header.invalidates()) {
        (Some(immediate), _) => Attached::Immediate(immediate),
        (None, Some(key)) => Attached::Invalidated(key),
        (None, None) => Attached::Nothing,
    }
}
