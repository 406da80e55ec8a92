//! Receive queues: of one queue pair, or shared by many (IBTA volume 1, 10.2.9 and 10.8.2).

use super::list::SgeList;
use super::queue::take_oldest;
use crate::hca::request::{PostError, RecvRequest, RequestId};
use crate::sync::Mutex;
use std::collections::VecDeque;

/// A receive as the engine works on it.
#[derive(Debug)]
pub(super) struct RecvWqe {
    pub(super) id: RequestId,
    pub(super) length: u32,
    pub(super) sges: SgeList,
}

/// A receive queue.
pub(in crate::hca) struct RecvQueue {
    pub(in crate::hca) max_requests: u32,
    pub(in crate::hca) max_sges: u32,
    max_message: u32,
    receives: Mutex<Receives>,
}

struct Receives {
    posted: VecDeque<RecvWqe>,
    /// Posted and not ended.
    outstanding: u32,
    /// An event is due when fewer than so many are posted; 0 is never.
    limit: u32,
    /// A shared queue that is gone takes nothing and gives nothing.
    closed: bool,
}

/// What taking a receive came to.
pub(super) enum Taken {
    Receive(RecvWqe),
    /// The same, and the queue has fallen below its limit.
    Last(RecvWqe),
    Nothing,
}

impl RecvQueue {
    pub(in crate::hca) fn new(max_requests: u32, max_sges: u32, max_message: u32) -> Self {
        let receives = Receives { posted: VecDeque::new(), outstanding: 0, limit: 0, closed: false };
        Self { max_requests, max_sges, max_message, receives: Mutex::new(receives) }
    }

    pub(in crate::hca) fn post(&self, request: &RecvRequest<'_>) -> Result<(), PostError> {
        let entries = request.local.len();
        if entries > self.max_sges as usize {
            return Err(PostError::TooManySges { entries, max: self.max_sges });
        }
        let bytes: u64 = request.local.iter().map(|sge| u64::from(sge.length)).sum();
        // A receive may be longer than any message; what lies beyond is never filled.
        let length = u32::try_from(bytes).unwrap_or(u32::MAX).min(self.max_message.saturating_add(GRH_BYTES));
        let wqe = RecvWqe { id: request.id, length, sges: SgeList::new(request.local) };
        let mut receives = self.receives.lock();
        if receives.outstanding >= self.max_requests || receives.closed {
            return Err(PostError::QueueFull { capacity: self.max_requests });
        }
        receives.outstanding += 1;
        receives.posted.push_back(wqe);
        Ok(())
    }

    pub(super) fn take(&self) -> Taken {
        let mut receives = self.receives.lock();
        let Some(wqe) = take_oldest(&mut receives.posted) else { return Taken::Nothing };
        if (receives.posted.len() as u64) < u64::from(receives.limit) {
            // The event is due once; software arms it anew (11.3.3.1).
            receives.limit = 0;
            return Taken::Last(wqe);
        }
        Taken::Receive(wqe)
    }

    /// One that was taken has ended.
    pub(super) fn ended(&self) {
        self.receives.lock().outstanding -= 1;
    }

    /// Arms the event; true if it is due at once.
    pub(in crate::hca) fn arm(&self, limit: u32) -> bool {
        let mut receives = self.receives.lock();
        let due = (receives.posted.len() as u64) < u64::from(limit);
        receives.limit = if due { 0 } else { limit };
        due
    }

    pub(in crate::hca) fn limit(&self) -> u32 {
        self.receives.lock().limit
    }

    pub(in crate::hca) fn outstanding(&self) -> u32 {
        self.receives.lock().outstanding
    }

    /// Forgets what was posted: a shared queue is destroyed with what is in it (10.2.9.3).
    pub(in crate::hca) fn close(&self) {
        let mut receives = self.receives.lock();
        receives.closed = true;
        receives.posted.clear();
    }
}

/// Bytes before a datagram: its global route header, or what holds the place of one (11.4.1.2).
pub(in crate::hca) const GRH_BYTES: u32 = 40;
