//! Shared receive queues by number, and what an extended connection finds behind one (IBTA volume 1, annex A14).

use super::queue::Receiving;
use super::srq::{CreateSrqError, SharedReceiveQueue, SrqSpec};
use crate::hca::cq::CompletionQueue;
use crate::hca::device::Hca;
use crate::hca::events::AsyncEvent;
use crate::hca::pd::Pd;
use crate::hca::points;
use crate::hca::qp::RecvQueue;
use crate::hca::xrcd::ExtendedDomain;
use crate::sync::{Arc, Mutex};
use crate::wire::Srqn;
use hashbrown::HashMap;

/// What an extended connection reaches by the number of a shared receive queue.
pub(super) struct ExtendedQueue {
    pub(super) number: Srqn,
    /// The protection domain whose memory its requests reach, receives and RDMA alike.
    pub(super) pd: Pd,
    /// The extended domain that it is in, by the protection domain that is the domain's own.
    pub(super) domain: Pd,
    pub(super) receiving: Receiving,
}

/// The numbers of shared receive queues, and which of them are extended ones.
#[derive(Default)]
pub(in crate::hca) struct SrqTable(Mutex<HashMap<Srqn, Option<Arc<ExtendedQueue>>>>);

impl SrqTable {
    fn give(
        &self,
        max: u32,
        queue: impl FnOnce(Srqn) -> Option<Arc<ExtendedQueue>>,
    ) -> Result<Srqn, CreateSrqError> {
        let mut live = self.0.lock();
        if live.len() >= max as usize {
            return Err(CreateSrqError::TooMany { max });
        }
        // Few are in use at a time, so the first free one is near.
        let free = (1..).map(Srqn).find(|number| !live.contains_key(number));
        let number = free.ok_or(CreateSrqError::TooMany { max })?;
        live.insert(number, queue(number));
        Ok(number)
    }

    /// The queue of this number, if it is in that extended domain.
    pub(super) fn find(&self, number: Srqn, domain: Pd) -> Option<Arc<ExtendedQueue>> {
        let known = self.0.lock().get(&number).cloned().flatten();
        known.filter(|queue| queue.domain == domain)
    }

    pub(in crate::hca) fn live(&self) -> u64 {
        self.0.lock().len() as u64
    }
}

impl Hca {
    /// A new shared receive queue.
    ///
    /// # Errors
    /// See [`CreateSrqError`].
    pub fn create_srq(self: &Arc<Self>, spec: &SrqSpec) -> Result<Arc<SharedReceiveQueue>, CreateSrqError> {
        self.make_srq(spec, None)
    }

    /// A new shared receive queue of `domain`: extended connections reach it by its number, and what it receives completes
    /// to `cq`.
    ///
    /// # Errors
    /// See [`CreateSrqError`].
    pub fn create_extended_srq(
        self: &Arc<Self>,
        spec: &SrqSpec,
        domain: &Arc<ExtendedDomain>,
        cq: &Arc<CompletionQueue>,
    ) -> Result<Arc<SharedReceiveQueue>, CreateSrqError> {
        if !Arc::ptr_eq(domain.hca(), self) || !Arc::ptr_eq(cq.hca(), self) {
            return Err(CreateSrqError::OtherDevice);
        }
        self.make_srq(spec, Some((domain, cq)))
    }

    fn make_srq(
        self: &Arc<Self>,
        spec: &SrqSpec,
        extended: Option<(&Arc<ExtendedDomain>, &Arc<CompletionQueue>)>,
    ) -> Result<Arc<SharedReceiveQueue>, CreateSrqError> {
        let limits = &self.device.config.limits;
        let SrqSpec { pd, max_requests: requests, max_sges: sges } = *spec;
        if requests == 0 || requests > limits.recv_requests {
            return Err(CreateSrqError::Requests { requests, max: limits.recv_requests });
        }
        if sges > limits.sges {
            return Err(CreateSrqError::Sges { sges, max: limits.sges });
        }
        self.pds.hold(pd)?;
        let refused = self.device.points.meet(points::CREATE_SRQ).fails();
        let queue = Arc::new(RecvQueue::new(requests, sges, limits.message_bytes));
        let behind = |number| {
            let (domain, cq) = extended?;
            let receiving = Receiving {
                queue: Some(Arc::clone(&queue)),
                shared: Some(number),
                completions: Arc::clone(&cq.ring),
            };
            Some(Arc::new(ExtendedQueue { number, pd, domain: domain.pd(), receiving }))
        };
        let given = self.device.srqs.give(if refused { 0 } else { limits.srqs }, behind);
        let number = given.inspect_err(|_| self.pds.release(pd))?;
        let keeps = extended.map(|(domain, cq)| (Arc::clone(domain), Arc::clone(cq)));
        Ok(SharedReceiveQueue::new(Arc::clone(self), queue, (pd, number), keeps))
    }

    pub(super) fn forget_srq(&self, number: Srqn, pd: Pd) {
        self.device.events.forget(|event| matches!(event, AsyncEvent::SrqLimitReached(of) if *of == number));
        self.device.srqs.0.lock().remove(&number);
        self.pds.release(pd);
    }
}
