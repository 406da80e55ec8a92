//! Protection domains, completion queues and queue pairs of the modelled HCA.

use super::{ImplicitRegion, ModelDevice, ModelRegion, advise};
use crate::device::{
    AdviseError, CompletionQueue, Flush, ProtectionDomain, QpError, QueuePair, Region, RegisterError,
    RegisterOptions,
};
use crate::region::Mode;
use hw_model::hca::{
    self, Completion, CreateCqError, ModifyQpError, Overrun, Pd, PdError, PostError, QpAddress, QpSpec,
    SendRequest, Sge,
};
use hw_model::sync::Arc;
use odp::fault::Want;
use odp::space::UserRange;
use std::any::Any;
use std::time::Duration;

/// A protection domain. Given back when the last object in it is gone.
pub struct ModelPd {
    device: Arc<ModelDevice>,
    handle: Pd,
}

impl ModelPd {
    pub(super) fn new(device: Arc<ModelDevice>) -> Result<Arc<Self>, PdError> {
        let handle = device.hca().alloc_pd()?;
        Ok(Arc::new(Self { device, handle }))
    }
    /// Its device.
    #[must_use]
    pub fn device(&self) -> &Arc<ModelDevice> {
        &self.device
    }
    /// Its handle at the HCA, for objects made there.
    #[must_use]
    pub fn handle(&self) -> Pd {
        self.handle
    }

    /// As [`ProtectionDomain::register`], with the model's own type: it can be deregistered step by step.
    ///
    /// # Errors
    /// See [`RegisterError`].
    pub fn register_model(
        self: &Arc<Self>,
        memory: &UserRange,
        options: RegisterOptions,
    ) -> Result<Arc<ModelRegion>, RegisterError> {
        ModelRegion::register(self, memory, options)
    }

    /// The same for an implicit region.
    ///
    /// # Errors
    /// See [`RegisterError`].
    pub fn register_implicit(
        self: &Arc<Self>,
        memory: &UserRange,
        options: RegisterOptions,
    ) -> Result<Arc<ImplicitRegion>, RegisterError> {
        ImplicitRegion::register(self, memory, options)
    }
}

impl ProtectionDomain for ModelPd {
    fn register(
        self: Arc<Self>,
        memory: &UserRange,
        options: RegisterOptions,
    ) -> Result<Arc<dyn Region>, RegisterError> {
        match options.mode {
            Mode::Implicit => Ok(self.register_implicit(memory, options)?),
            Mode::Pinned | Mode::OnDemand => Ok(self.register_model(memory, options)?),
        }
    }

    fn advise(&self, want: Want, flush: Flush, pieces: &[Sge]) -> Result<(), AdviseError> {
        advise::advise(self, want, flush, pieces)
    }

    fn seals(&self) -> bool {
        true
    }

    fn create_qp(
        self: Arc<Self>,
        cq: Arc<dyn CompletionQueue>,
        send_requests: u32,
    ) -> Result<Arc<dyn QueuePair>, QpError> {
        let cq: Arc<dyn Any + Send + Sync> = cq;
        let cq = cq.downcast::<ModelCq>().map_err(|_| QpError::ForeignCq)?;
        let spec = QpSpec { max_send_requests: send_requests, ..QpSpec::new(self.handle, &cq.queue) };
        let qp = self.device.hca().create_qp(&spec)?;
        Ok(Arc::new(ModelQp { qp, _pd: self }))
    }
}

impl Drop for ModelPd {
    fn drop(&mut self) {
        // Regions and queue pairs hold the domain, so it is empty now.
        let empty = self.device.hca().dealloc_pd(self.handle);
        debug_assert!(empty.is_ok(), "{empty:?}");
    }
}

/// A completion queue.
pub struct ModelCq {
    queue: Arc<hca::CompletionQueue>,
    _device: Arc<ModelDevice>,
}

impl ModelCq {
    pub(super) fn new(device: Arc<ModelDevice>, entries: u32) -> Result<Arc<Self>, CreateCqError> {
        let queue = device.hca().create_cq(entries)?;
        Ok(Arc::new(Self { queue, _device: device }))
    }
}

impl CompletionQueue for ModelCq {
    fn poll(&self, out: &mut Vec<Completion>, max: usize) -> Result<usize, Overrun> {
        self.queue.poll(out, max)
    }
    fn wait(&self, timeout: Duration) -> bool {
        self.queue.wait(timeout)
    }
}

/// A queue pair.
pub struct ModelQp {
    qp: Arc<hca::QueuePair>,
    _pd: Arc<ModelPd>,
}

impl QueuePair for ModelQp {
    fn endpoint(&self) -> QpAddress {
        self.qp.address()
    }
    fn connect(&self, peer: QpAddress) -> Result<(), ModifyQpError> {
        self.qp.connect(peer)
    }
    fn post_send(&self, request: &SendRequest<'_>) -> Result<(), PostError> {
        self.qp.post_send(request)
    }
}
