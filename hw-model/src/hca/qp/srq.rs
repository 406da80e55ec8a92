//! Shared receive queues: one queue of receives for many queue pairs (IBTA volume 1, 10.2.9).

use super::receive::RecvQueue;
use crate::hca::cq::CompletionQueue;
use crate::hca::device::Hca;
use crate::hca::events::AsyncEvent;
use crate::hca::pd::{Pd, PdError};
use crate::hca::request::{PostError, RecvRequest};
use crate::hca::xrcd::ExtendedDomain;
use crate::sync::Arc;
use crate::wire::Srqn;

/// What a shared receive queue is made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SrqSpec {
    /// Its protection domain.
    pub pd: Pd,
    /// Receives that can be outstanding.
    pub max_requests: u32,
    /// Scatter-gather entries that a receive can have.
    pub max_sges: u32,
}

/// Why a shared receive queue was not created.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CreateSrqError {
    /// No such protection domain.
    #[error(transparent)]
    Pd(#[from] PdError),
    /// The extended domain, or the completion queue, is another device's.
    #[error("the domain or the completion queue of it belongs to another device")]
    OtherDevice,
    /// There are as many as the device has.
    #[error("all {max} shared receive queues are in use")]
    TooMany {
        /// The device's limit.
        max: u32,
    },
    /// Its size is not between one and the limit.
    #[error("a receive queue holds 1 to {max} requests, {requests} were asked for")]
    Requests {
        /// Asked for.
        requests: u32,
        /// The device's limit.
        max: u32,
    },
    /// More scatter-gather entries than the device reads.
    #[error("a request has up to {max} scatter-gather entries, {sges} were asked for")]
    Sges {
        /// Asked for.
        sges: u32,
        /// The device's limit.
        max: u32,
    },
}

/// The limit is more than the queue holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a limit of {limit} receives for a queue of {capacity}")]
pub struct SrqLimitError {
    /// Asked for.
    pub limit: u32,
    /// The queue's size.
    pub capacity: u32,
}

/// A shared receive queue. Queue pairs keep it alive; when the last handle goes, what is posted in it is forgotten.
pub struct SharedReceiveQueue {
    hca: Arc<Hca>,
    pub(in crate::hca) queue: Arc<RecvQueue>,
    pd: Pd,
    number: Srqn,
    /// Of an extended one: what it is in, and where it completes to.
    extended: Option<(Arc<ExtendedDomain>, Arc<CompletionQueue>)>,
}

impl SharedReceiveQueue {
    pub(super) fn new(
        hca: Arc<Hca>,
        queue: Arc<RecvQueue>,
        (pd, number): (Pd, Srqn),
        extended: Option<(Arc<ExtendedDomain>, Arc<CompletionQueue>)>,
    ) -> Arc<Self> {
        Arc::new(Self { hca, queue, pd, number, extended })
    }

    /// The extended domain that it is in, if it is in one.
    #[must_use]
    pub fn domain(&self) -> Option<&Arc<ExtendedDomain>> {
        self.extended.as_ref().map(|(domain, _)| domain)
    }

    /// Where what it receives completes, if that is not for its queue pairs to say.
    #[must_use]
    pub fn cq(&self) -> Option<&Arc<CompletionQueue>> {
        self.extended.as_ref().map(|(_, cq)| cq)
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> Srqn {
        self.number
    }

    /// Its protection domain.
    #[must_use]
    pub fn pd(&self) -> Pd {
        self.pd
    }

    /// The device it belongs to.
    #[must_use]
    pub fn hca(&self) -> &Arc<Hca> {
        &self.hca
    }

    /// Posts a receive.
    ///
    /// # Errors
    /// [`PostError`]; nothing was posted.
    pub fn post(&self, request: &RecvRequest<'_>) -> Result<(), PostError> {
        self.queue.post(request)
    }

    /// Asks for an event when fewer than `limit` receives are posted, once; 0 asks for none (11.2.3.4). It is due at once
    /// if there are fewer.
    ///
    /// # Errors
    /// [`SrqLimitError`].
    pub fn set_limit(&self, limit: u32) -> Result<(), SrqLimitError> {
        let capacity = self.queue.max_requests;
        if limit > capacity {
            return Err(SrqLimitError { limit, capacity });
        }
        if self.queue.arm(limit) {
            self.hca.device.events.post(AsyncEvent::SrqLimitReached(self.number));
        }
        Ok(())
    }

    /// The limit that an event is armed for; 0 if it is not, or has been given.
    #[must_use]
    pub fn limit(&self) -> u32 {
        self.queue.limit()
    }

    /// Receives posted that have not ended.
    #[must_use]
    pub fn outstanding(&self) -> u32 {
        self.queue.outstanding()
    }

    /// Receives that it holds.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.queue.max_requests
    }

    /// Scatter-gather entries that a receive can have.
    #[must_use]
    pub fn max_sges(&self) -> u32 {
        self.queue.max_sges
    }
}

impl Drop for SharedReceiveQueue {
    fn drop(&mut self) {
        self.queue.close();
        self.hca.forget_srq(self.number, self.pd);
    }
}

impl std::fmt::Debug for SharedReceiveQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedReceiveQueue")
            .field("number", &self.number)
            .field("outstanding", &self.outstanding())
            .field("limit", &self.limit())
            .finish_non_exhaustive()
    }
}
