//! Extended domains: which shared receive queues an extended connection reaches (IBTA volume 1, annex A14).
//!
//! A target queue pair is its host's, not one process's: it has no queue of its own, and each request names the shared receive
//! queue that it is for. The memory that a request reaches is that of the protection domain of this queue, so that one
//! connection serves programs that do not see each other's memory. Who may be reached is who is in the domain.
//!
//! A target has no protection domain and no completion queue; the domain has one of each to stand in their place, in which
//! nothing is ever looked up or completed (as `mlx4_ib_alloc_xrcd` makes them).

use super::cq::{CompletionQueue, CreateCqError};
use super::device::Hca;
use super::pd::{Pd, PdError};
use super::qp::QueuePair;
use crate::sync::{Arc, Mutex, Weak};
use crate::wire::Qpn;
use hashbrown::HashMap;

/// An extended domain (`struct ibv_xrcd`). What is in it keeps it alive.
pub struct ExtendedDomain {
    hca: Arc<Hca>,
    pd: Pd,
    cq: Arc<CompletionQueue>,
    targets: Mutex<HashMap<Qpn, Weak<QueuePair>>>,
}

/// Why an extended domain was not opened: it takes a protection domain and a completion queue of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenDomainError {
    /// There is no protection domain.
    #[error(transparent)]
    Pd(#[from] PdError),
    /// There is no completion queue.
    #[error(transparent)]
    Cq(#[from] CreateCqError),
}

/// There is no such target queue pair in the domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{qpn:?} is no target queue pair of this extended domain")]
pub struct OpenQpError {
    /// What was named.
    pub qpn: Qpn,
}

impl Hca {
    /// A new extended domain (`ib_alloc_xrcd`).
    ///
    /// # Errors
    /// See [`OpenDomainError`].
    pub fn open_domain(self: &Arc<Self>) -> Result<Arc<ExtendedDomain>, OpenDomainError> {
        let pd = self.alloc_pd()?;
        let cq = self.create_cq(1).inspect_err(|_| self.give_back(pd))?;
        Ok(Arc::new(ExtendedDomain { hca: Arc::clone(self), pd, cq, targets: Mutex::default() }))
    }

    fn give_back(&self, pd: Pd) {
        let empty = self.dealloc_pd(pd);
        debug_assert!(empty.is_ok(), "nobody else knows this protection domain: {empty:?}");
    }
}

impl ExtendedDomain {
    /// What stands in the place of a target's protection domain.
    #[must_use]
    pub fn pd(&self) -> Pd {
        self.pd
    }

    /// What stands in the place of a target's completion queues.
    #[must_use]
    pub fn cq(&self) -> &Arc<CompletionQueue> {
        &self.cq
    }

    /// The device it belongs to.
    #[must_use]
    pub fn hca(&self) -> &Arc<Hca> {
        &self.hca
    }

    /// Another handle of a target queue pair that is in the domain (`ibv_open_qp`): it goes with the last one.
    ///
    /// # Errors
    /// [`OpenQpError`].
    pub fn open_qp(&self, qpn: Qpn) -> Result<Arc<QueuePair>, OpenQpError> {
        self.targets.lock().get(&qpn).and_then(Weak::upgrade).ok_or(OpenQpError { qpn })
    }

    pub(super) fn admit(&self, target: &Arc<QueuePair>) {
        self.targets.lock().insert(target.qpn(), Arc::downgrade(target));
    }

    pub(super) fn forget(&self, qpn: Qpn) {
        self.targets.lock().remove(&qpn);
    }
}

impl Drop for ExtendedDomain {
    fn drop(&mut self) {
        self.hca.give_back(self.pd);
    }
}

impl std::fmt::Debug for ExtendedDomain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExtendedDomain").field("pd", &self.pd).finish_non_exhaustive()
    }
}
