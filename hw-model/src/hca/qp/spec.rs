//! What a queue pair is made with (IBTA volume 1, 11.2.4.1).

use super::{SharedReceiveQueue, Transport};
use crate::hca::config::Limits;
use crate::hca::cq::CompletionQueue;
use crate::hca::device::Hca;
use crate::hca::key::Access;
use crate::hca::pd::{Pd, PdError};
use crate::hca::xrcd::ExtendedDomain;
use crate::sync::Arc;

/// What a queue pair is made with.
#[derive(Clone, Debug)]
pub struct QpSpec {
    /// Its service.
    pub transport: Transport,
    /// Its protection domain.
    pub pd: Pd,
    /// Where its send requests complete.
    pub send_cq: Arc<CompletionQueue>,
    /// Where its receives complete.
    pub recv_cq: Arc<CompletionQueue>,
    /// Where its receives come from, if not from a queue of its own.
    pub srq: Option<Arc<SharedReceiveQueue>>,
    /// Of an extended target, and of no other: whose queues its peer reaches.
    pub domain: Option<Arc<ExtendedDomain>>,
    /// What its peer may do, until it is told otherwise.
    pub access: Access,
    /// Send requests that can be outstanding.
    pub max_send_requests: u32,
    /// Scatter-gather entries that a send request can have.
    pub max_sges: u32,
    /// Bytes that a send request can carry inline.
    pub max_inline: u32,
    /// Receives that can be outstanding. Not looked at with a shared queue.
    pub max_recv_requests: u32,
    /// Scatter-gather entries that a receive can have. Not looked at with a shared queue.
    pub max_recv_sges: u32,
    /// Every send request leaves a completion, whatever it says.
    pub signal_all: bool,
}

impl QpSpec {
    /// A reliable connection with 256 requests of 4 entries either way, and a peer that may do everything.
    #[must_use]
    pub fn new(pd: Pd, cq: &Arc<CompletionQueue>) -> Self {
        Self {
            transport: Transport::ReliableConnection,
            pd,
            send_cq: Arc::clone(cq),
            recv_cq: Arc::clone(cq),
            srq: None,
            domain: None,
            access: Access::all() - Access::LOCAL_WRITE - Access::WINDOW_BIND - Access::ZERO_BASED,
            max_send_requests: 256,
            max_sges: 4,
            max_inline: 256,
            max_recv_requests: 256,
            max_recv_sges: 4,
            signal_all: false,
        }
    }

    /// A target of extended connections in `domain`. Nothing can be posted to it.
    #[must_use]
    pub fn target(domain: &Arc<ExtendedDomain>) -> Self {
        let new = Self::new(domain.pd(), domain.cq()).with_transport(Transport::ExtendedTarget);
        Self { domain: Some(Arc::clone(domain)), ..new }
    }

    /// The same with another service.
    #[must_use]
    pub fn with_transport(self, transport: Transport) -> Self {
        Self { transport, ..self }
    }

    /// Checks it against what a device has.
    pub(in crate::hca) fn check(&self, hca: &Arc<Hca>) -> Result<(), CreateQpError> {
        if hca.has_failed() {
            return Err(CreateQpError::Failed);
        }
        let limits: &Limits = &hca.config().limits;
        let foreign = |cq: &Arc<CompletionQueue>| !Arc::ptr_eq(cq.hca(), hca);
        let foreign_srq = self.srq.as_ref().is_some_and(|srq| !Arc::ptr_eq(srq.hca(), hca));
        let foreign_domain = self.domain.as_ref().is_some_and(|domain| !Arc::ptr_eq(domain.hca(), hca));
        if foreign(&self.send_cq) || foreign(&self.recv_cq) || foreign_srq || foreign_domain {
            return Err(CreateQpError::OtherDevice);
        }
        let transport = self.transport;
        let own = self.domain.as_ref().is_none_or(|domain| domain.pd() == self.pd);
        if self.domain.is_some() != (transport == Transport::ExtendedTarget) || !own {
            return Err(CreateQpError::Domain { transport });
        }
        if self.srq.as_ref().is_some_and(|srq| !transport.receives() || srq.domain().is_some()) {
            return Err(CreateQpError::SharedQueue { transport });
        }
        if self.max_send_requests == 0 || self.max_send_requests > limits.send_requests {
            let requests = self.max_send_requests;
            return Err(CreateQpError::SendRequests { requests, max: limits.send_requests });
        }
        if self.srq.is_none() && self.max_recv_requests > limits.recv_requests {
            let requests = self.max_recv_requests;
            return Err(CreateQpError::RecvRequests { requests, max: limits.recv_requests });
        }
        let sges = self.max_sges.max(if self.srq.is_none() { self.max_recv_sges } else { 0 });
        if sges > limits.sges {
            return Err(CreateQpError::Sges { sges, max: limits.sges });
        }
        if self.max_inline > limits.inline_bytes {
            return Err(CreateQpError::Inline { bytes: self.max_inline, max: limits.inline_bytes });
        }
        Ok(())
    }
}

/// Why a queue pair was not created.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CreateQpError {
    /// No such protection domain.
    #[error(transparent)]
    Pd(#[from] PdError),
    /// A completion queue, or the shared receive queue, is another device's.
    #[error("a queue of it belongs to another device")]
    OtherDevice,
    /// An extended target without its domain, or with another protection domain than the domain's, or a domain where there
    /// can be none.
    #[error("an extended target is made in an extended domain, and a queue pair of {transport:?} as it says")]
    Domain {
        /// Asked for.
        transport: Transport,
    },
    /// Extended queue pairs have no receive queue; and a queue that they reach is no other's.
    #[error("a queue pair of {transport:?} does not receive from such a shared queue")]
    SharedQueue {
        /// Asked for.
        transport: Transport,
    },
    /// The device has failed; nothing is made of it any more.
    #[error("the device has failed")]
    Failed,
    /// There are as many as the device has.
    #[error("all {max} queue pairs are in use")]
    TooMany {
        /// The device's limit.
        max: u32,
    },
    /// The send queue's size is not between one and the limit.
    #[error("a send queue holds 1 to {max} requests, {requests} were asked for")]
    SendRequests {
        /// Asked for.
        requests: u32,
        /// The device's limit.
        max: u32,
    },
    /// The receive queue's size is beyond the limit.
    #[error("a receive queue holds up to {max} requests, {requests} were asked for")]
    RecvRequests {
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
    /// More inline data than the device takes.
    #[error("a request carries up to {max} bytes inline, {bytes} were asked for")]
    Inline {
        /// Asked for.
        bytes: u32,
        /// The device's limit.
        max: u32,
    },
}
