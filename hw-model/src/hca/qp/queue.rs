//! The part of a queue pair that posting threads and the engine share: the queue of posted requests.

use super::{QpState, Transport};
use crate::addr::RegionAddr;
use crate::hca::cq::Ring;
use crate::hca::key::{Access, Caller};
use crate::hca::pd::Pd;
use crate::hca::request::{Completion, Operation, PostError, RequestId, SendRequest, Sge, Status};
use crate::hca::stats::Counters;
use crate::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use crate::sync::{Arc, Mutex};
use crate::wire::{Key, Qpn};
use std::collections::VecDeque;

/// What posting threads and the engine share of one queue pair.
pub(in crate::hca) struct Shared {
    pub(in crate::hca) qpn: Qpn,
    pub(in crate::hca) pd: Pd,
    pub(super) access: Access,
    pub(super) max_requests: u32,
    pub(super) max_sges: u32,
    pub(super) max_message: u32,
    pub(super) completions: Arc<Ring>,
    queue: Mutex<SendQueue>,
    /// Requests posted and not ended.
    outstanding: AtomicU32,
    /// A doorbell is on its way to the engine; another one would say nothing new.
    rung: AtomicBool,
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
    sges: SgeList,
}

/// Few entries lie in the request itself: posting them allocates nothing.
const INLINE_SGES: usize = 2;

#[derive(Debug)]
enum SgeList {
    Inline([Sge; INLINE_SGES], u8),
    Heap(Box<[Sge]>),
}

impl Wqe {
    fn new(request: &SendRequest<'_>, length: u32) -> Self {
        let sges = if request.local.len() <= INLINE_SGES {
            let mut inline = [Sge { key: Key(0), address: RegionAddr(0), length: 0 }; INLINE_SGES];
            inline[..request.local.len()].copy_from_slice(request.local);
            SgeList::Inline(inline, request.local.len() as u8)
        } else {
            SgeList::Heap(request.local.into())
        };
        let SendRequest { id, operation, signaled, fence, .. } = *request;
        Self { id, operation, length, signaled, fence, sges }
    }

    pub(super) fn sges(&self) -> &[Sge] {
        match &self.sges {
            SgeList::Inline(list, len) => &list[..usize::from(*len)],
            SgeList::Heap(list) => list,
        }
    }
}

/// The queue pair's completion queue has overrun.
#[derive(Clone, Copy, Debug)]
pub(super) struct Overran;

impl Shared {
    pub(super) fn new(
        qpn: Qpn,
        (pd, access): (Pd, Access),
        (max_requests, max_sges, max_message): (u32, u32, u32),
        completions: Arc<Ring>,
    ) -> Self {
        let queue = SendQueue {
            state: QpState::Reset,
            posted: VecDeque::with_capacity(max_requests.min(256) as usize),
        };
        Self {
            qpn,
            pd,
            access,
            max_requests,
            max_sges,
            max_message,
            completions,
            queue: Mutex::new(queue),
            outstanding: AtomicU32::new(0),
            rung: AtomicBool::new(false),
        }
    }

    /// As the keys know it.
    pub(in crate::hca) fn caller(&self) -> Caller {
        Caller { pd: self.pd, qpn: self.qpn }
    }

    /// Puts requests into the queue, in order, until one is refused. True if the engine must be told.
    pub(super) fn post(&self, requests: &[SendRequest<'_>]) -> (usize, Option<PostError>, bool) {
        let mut taken = 0;
        let mut refused = None;
        for request in requests {
            if let Err(error) = self.post_one(request) {
                refused = Some(error);
                break;
            }
            taken += 1;
        }
        (taken, refused, taken > 0 && !self.rung.swap(true, Ordering::SeqCst))
    }

    fn post_one(&self, request: &SendRequest<'_>) -> Result<(), PostError> {
        let operation = request.operation;
        use Operation::{Bind, Invalidate, Read, Register, Write};
        if !matches!(operation, Write(_) | Read(_) | Register { .. } | Bind(_) | Invalidate { .. }) {
            let transport = Transport::ReliableConnection;
            return Err(PostError::NotOfTransport { operation: operation.code(), transport });
        }
        let entries = request.local.len();
        let max = if request.operation.is_local() { 0 } else { self.max_sges };
        if entries > max as usize {
            return Err(PostError::TooManySges { entries, max });
        }
        let bytes: u64 = request.local.iter().map(|sge| u64::from(sge.length)).sum();
        let length = u32::try_from(bytes).ok().filter(|length| *length <= self.max_message);
        let length = length.ok_or(PostError::TooLong { bytes, max: self.max_message })?;
        let wqe = Wqe::new(request, length);
        let mut queue = self.queue.lock();
        if !queue.state.takes_requests() {
            return Err(PostError::State { qpn: self.qpn, state: queue.state });
        }
        if self.outstanding.load(Ordering::Relaxed) >= self.max_requests {
            return Err(PostError::QueueFull { capacity: self.max_requests });
        }
        self.outstanding.fetch_add(1, Ordering::Relaxed);
        queue.posted.push_back(wqe);
        Ok(())
    }

    /// The oldest posted request that the engine has not taken yet.
    pub(super) fn take(&self) -> Option<Wqe> {
        self.queue.lock().posted.pop_front()
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
        self.outstanding.load(Ordering::Relaxed)
    }

    /// Ends `wqe`: the one place where a request ends.
    pub(super) fn complete(&self, wqe: &Wqe, status: Status, counters: &Counters) -> Result<(), Overran> {
        self.outstanding.fetch_sub(1, Ordering::Relaxed);
        counters.completed(status);
        if !wqe.signaled && status == Status::Success {
            return Ok(());
        }
        let completion = Completion::new(wqe.id, status, wqe.operation.code(), self.qpn, wqe.length);
        self.completions.push(completion).map_err(|_| {
            counters.cq_overruns.add(1);
            Overran
        })
    }
}
