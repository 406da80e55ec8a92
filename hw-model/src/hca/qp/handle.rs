//! Software's handle of a queue pair.

use super::core::Core;
use super::queue::Shared;
use super::{IllegalTransition, QpState, Transition};
use crate::hca::config::HcaConfig;
use crate::hca::cq::CompletionQueue;
use crate::hca::device::Hca;
use crate::hca::key::Access;
use crate::hca::pd::{Pd, PdError};
use crate::hca::request::{PostError, SendRequest};
use crate::sync::Arc;
use crate::wire::{Gid, Psn, Qpn};

/// What a peer must know to connect to a queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QpAddress {
    /// The port.
    pub gid: Gid,
    /// The queue pair.
    pub qpn: Qpn,
    /// The first sequence number that it sends.
    pub psn: Psn,
}

/// What a queue pair is made with.
#[derive(Clone, Debug)]
pub struct QpSpec {
    /// Its protection domain.
    pub pd: Pd,
    /// Where its send requests complete.
    pub send_cq: Arc<CompletionQueue>,
    /// What its peer may do.
    pub access: Access,
    /// Requests that can be outstanding.
    pub max_send_requests: u32,
    /// Scatter-gather entries that a request can have.
    pub max_sges: u32,
}

impl QpSpec {
    /// 256 requests of 4 entries, and a peer that may write and read.
    #[must_use]
    pub fn new(pd: Pd, send_cq: &Arc<CompletionQueue>) -> Self {
        Self {
            pd,
            send_cq: Arc::clone(send_cq),
            access: Access::REMOTE_WRITE | Access::REMOTE_READ,
            max_send_requests: 256,
            max_sges: 4,
        }
    }
}

/// Why a queue pair was not created.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CreateQpError {
    /// No such protection domain.
    #[error(transparent)]
    Pd(#[from] PdError),
    /// The completion queue is another device's.
    #[error("the completion queue belongs to another device")]
    OtherDevice,
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
    /// More scatter-gather entries than the device reads.
    #[error("a request has up to {max} scatter-gather entries, {sges} were asked for")]
    Sges {
        /// Asked for.
        sges: u32,
        /// The device's limit.
        max: u32,
    },
}

/// A reliable-connection queue pair. Dropping it destroys it: what was posted ends with a flush error first.
pub struct QueuePair {
    hca: Arc<Hca>,
    shared: Arc<Shared>,
    send_cq: Arc<CompletionQueue>,
    address: QpAddress,
}

impl QueuePair {
    /// The handle and the protocol state of a new queue pair.
    pub(in crate::hca) fn new(
        hca: Arc<Hca>,
        address: QpAddress,
        spec: &QpSpec,
        config: &HcaConfig,
    ) -> (Arc<Self>, Core) {
        let sizes = (spec.max_send_requests, spec.max_sges, config.limits.message_bytes);
        let ring = Arc::clone(&spec.send_cq.ring);
        let shared = Arc::new(Shared::new(address.qpn, (spec.pd, spec.access), sizes, ring));
        let core = Core::new(Arc::clone(&shared), address.psn, config);
        (Arc::new(Self { hca, shared, send_cq: Arc::clone(&spec.send_cq), address }), core)
    }

    /// Its number.
    #[must_use]
    pub fn qpn(&self) -> Qpn {
        self.address.qpn
    }

    /// What the peer must know to connect to it.
    #[must_use]
    pub fn address(&self) -> QpAddress {
        self.address
    }

    /// Its protection domain.
    #[must_use]
    pub fn pd(&self) -> Pd {
        self.shared.pd
    }

    /// Where its send requests complete.
    #[must_use]
    pub fn send_cq(&self) -> &Arc<CompletionQueue> {
        &self.send_cq
    }

    /// The device it belongs to.
    #[must_use]
    pub fn hca(&self) -> &Arc<Hca> {
        &self.hca
    }

    /// Its state at the moment.
    #[must_use]
    pub fn state(&self) -> QpState {
        self.shared.state()
    }

    /// Requests posted that have not ended.
    #[must_use]
    pub fn outstanding(&self) -> u32 {
        self.shared.outstanding()
    }

    /// Changes the state.
    ///
    /// # Errors
    /// [`IllegalTransition`]; the state is as before.
    pub fn modify(&self, transition: Transition) -> Result<(), IllegalTransition> {
        self.hca.modify_qp(self.shared.qpn, &transition)
    }

    /// From reset to ready to send, connected to `peer`. Both ends do this before either sends.
    ///
    /// # Errors
    /// [`IllegalTransition`] if it is not in the reset state.
    pub fn connect(&self, peer: QpAddress) -> Result<(), IllegalTransition> {
        self.modify(Transition::Init)?;
        self.modify(Transition::ReadyToReceive { peer })?;
        self.modify(Transition::ReadyToSend)
    }

    /// Posts one request and (unless the configuration says that callers do not) runs the engine a little.
    ///
    /// # Errors
    /// [`PostError`]; nothing was posted.
    pub fn post_send(&self, request: &SendRequest<'_>) -> Result<(), PostError> {
        self.post_send_list(std::slice::from_ref(request)).map_err(|(_, error)| error)
    }

    /// Posts requests in order, with one doorbell.
    ///
    /// # Errors
    /// The number that were posted before one was refused, and why it was.
    pub fn post_send_list(&self, requests: &[SendRequest<'_>]) -> Result<(), (usize, PostError)> {
        let (taken, refused, ring) = self.shared.post(requests);
        if taken > 0 {
            self.hca.doorbell(self.shared.qpn, ring);
        }
        refused.map_or(Ok(()), |error| Err((taken, error)))
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        self.hca.forget_qp(self.shared.qpn, self.shared.pd);
    }
}

impl std::fmt::Debug for QueuePair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QueuePair")
            .field("address", &self.address)
            .field("state", &self.state())
            .field("outstanding", &self.outstanding())
            .finish_non_exhaustive()
    }
}
