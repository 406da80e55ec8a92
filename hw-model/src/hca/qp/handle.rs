//! Software's handle of a queue pair.

use super::core::Core;
use super::near::Near;
use super::queue::{Receiving, SendLimits, Shared};
use super::{ModifyQpError, QpAttributes, QpChange, QpSpec, QpState, RecvQueue};
use crate::hca::config::HcaConfig;
use crate::hca::cq::CompletionQueue;
use crate::hca::device::Hca;
use crate::hca::loan::Lender;
use crate::hca::pd::Pd;
use crate::hca::request::{PostError, RecvRequest, SendRequest};
use crate::sync::Arc;
use crate::wire::{Gid, Key, Psn, QKey, Qpn};

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

/// A queue pair. Dropping it destroys it: what was posted ends with a flush error first.
pub struct QueuePair {
    hca: Arc<Hca>,
    shared: Arc<Shared>,
    near: Near,
    /// What it was made with: it keeps its queues alive.
    spec: QpSpec,
    address: QpAddress,
}

impl QueuePair {
    /// The handle and the protocol state of a new queue pair.
    pub(in crate::hca) fn new(
        hca: Arc<Hca>,
        address: QpAddress,
        spec: &QpSpec,
        config: &HcaConfig,
    ) -> (Arc<Self>, Box<Core>) {
        let message = config.limits.message_bytes;
        let limits = SendLimits {
            requests: spec.max_send_requests,
            sges: spec.max_sges,
            inline: spec.max_inline,
            message,
            signal_all: spec.signal_all,
        };
        let own = || Arc::new(RecvQueue::new(spec.max_recv_requests, spec.max_recv_sges, message));
        let receives = Receiving {
            queue: (spec.transport.receives())
                .then(|| spec.srq.as_ref().map_or_else(own, |srq| Arc::clone(&srq.queue))),
            shared: spec.srq.as_ref().map(|srq| srq.number()),
            completions: Arc::clone(&spec.recv_cq.ring),
        };
        let identity = (address.qpn, spec.pd, spec.transport);
        let shared = Arc::new(Shared::new(identity, limits, Arc::clone(&spec.send_cq.ring), receives));
        let lender = Lender::new(Arc::clone(&hca.device), address.qpn);
        let core = Box::new(Core::new(Arc::clone(&shared), lender, spec.access, config));
        let near = Near::new(&core);
        (Arc::new(Self { hca, shared, near, spec: spec.clone(), address }), core)
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

    /// What it was made with.
    #[must_use]
    pub fn spec(&self) -> &QpSpec {
        &self.spec
    }

    /// Where its send requests complete.
    #[must_use]
    pub fn send_cq(&self) -> &Arc<CompletionQueue> {
        &self.spec.send_cq
    }

    /// Where its receives complete.
    #[must_use]
    pub fn recv_cq(&self) -> &Arc<CompletionQueue> {
        &self.spec.recv_cq
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

    /// Send requests posted that have not ended.
    #[must_use]
    pub fn outstanding(&self) -> u32 {
        self.shared.outstanding()
    }

    /// Changes the state, and what goes with it (11.2.5.2).
    ///
    /// # Errors
    /// [`ModifyQpError`]; everything is as before.
    pub fn modify(&self, change: &QpChange) -> Result<(), ModifyQpError> {
        self.hca.modify_qp(self.shared.qpn, change)?;
        if let (Some(path), Some(qpn)) = (change.path, change.dest_qpn) {
            let peer = self.hca.device.link.neighbour(path.gid);
            self.near.meet(peer.and_then(|peer| peer.whereabouts(qpn)).unwrap_or_default());
        }
        Ok(())
    }

    /// What it is set to (11.2.5.3).
    ///
    /// # Errors
    /// [`ModifyQpError::Destroyed`]: never, as this handle keeps it alive.
    pub fn query(&self) -> Result<QpAttributes, ModifyQpError> {
        self.hca.query_qp(self.shared.qpn)
    }

    /// From reset to ready to send, connected to `peer`, as the device's configuration says. Both ends do this before
    /// either sends. A queue pair of datagrams has no peer: see [`QueuePair::open`].
    ///
    /// # Errors
    /// [`ModifyQpError`] if it is not in the reset state.
    pub fn connect(&self, peer: QpAddress) -> Result<(), ModifyQpError> {
        self.bring_up(peer, QKey::default())
    }

    /// From reset to ready to send, for datagrams that name `qkey`.
    ///
    /// # Errors
    /// [`ModifyQpError`] if it is not in the reset state, or is to be connected.
    pub fn open(&self, qkey: QKey) -> Result<(), ModifyQpError> {
        self.bring_up(self.address, qkey)
    }

    fn bring_up(&self, peer: QpAddress, qkey: QKey) -> Result<(), ModifyQpError> {
        let (transport, config) = (self.spec.transport, self.hca.config());
        self.modify(&QpChange::init(transport, self.spec.access, qkey))?;
        self.modify(&QpChange::ready_to_receive(transport, peer, config))?;
        self.modify(&QpChange::ready_to_send(transport, self.address.psn, config))
    }

    /// Posts a receive. Receives are taken in the order in which they were posted.
    ///
    /// # Errors
    /// [`PostError`]; nothing was posted.
    pub fn post_recv(&self, request: &RecvRequest<'_>) -> Result<(), PostError> {
        if self.shared.post_receive(request)? {
            self.hca.doorbell(&self.shared);
        }
        Ok(())
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
        self.near.expect(&self.shared);
        let keys = &self.hca.device.keys;
        expect_each(requests, |key| keys.expect(key));
        let (taken, refused) = self.shared.post(requests);
        if taken > 0 {
            expect_each(requests, |key| keys.expect_slot(key));
            if taken > 1 {
                expect_each(requests, |key| keys.expect_pages(key));
            }
            self.hca.doorbell(&self.shared);
        }
        refused.map_or(Ok(()), |error| Err((taken, error)))
    }
}

/// Requests of a list whose keys are asked for ahead: as many misses of the cache as are under way at a time.
const AHEAD: usize = 16;

/// Does one of the three steps of looking ahead for the local keys of `requests`.
#[inline]
fn expect_each(requests: &[SendRequest<'_>], expect: impl Fn(Key)) {
    let mut before = None;
    for sge in requests.iter().take(AHEAD).flat_map(|request| request.local) {
        if before.replace(sge.key) != Some(sge.key) {
            expect(sge.key);
        }
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        if let Some(domain) = &self.spec.domain {
            domain.forget(self.shared.qpn);
        }
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
