//! Protection domains, completion queues and queue pairs of the modelled HCA.

use super::{
    ImplicitRegion, ModelAh, ModelDevice, ModelDeviceRegion, ModelNullRegion, ModelRegion, ModelWindow,
    advise,
};
use crate::device::{
    AddressHandle, AdviseError, CompletionQueue, DeviceMemory, Flush, KeyHandle, ObjectError,
    ProtectionDomain, QpError, QpOptions, QueuePair, Region, RegisterError, RegisterOptions,
    SharedReceiveQueue, Window,
};
use crate::region::Mode;
use hw_model::hca::{
    self, Access, AddressVector, Completion, CqSpec, CreateAhError, CreateCqError, CreateKeyError,
    CreateNullKeyError, CreateSrqError, Moderation, ModifyQpError, Notify, Overrun, Pd, PdError, PostError,
    QKey, QpAddress, QpAttributes, QpChange, QpSpec, RecvRequest, RegisterDeviceMemoryError, ResizeCqError,
    SendRequest, Sge, SrqLimitError, SrqSpec, Srqn, Transport, WindowKind,
};
use hw_model::sync::Arc;
use odp::fault::Want;
use odp::space::UserRange;
use std::any::Any;
use std::convert::Infallible;
use std::time::Duration;

/// A protection domain. Given back when the last object in it is gone.
pub struct ModelPd {
    device: Arc<ModelDevice>,
    handle: Pd,
}

impl ModelPd {
    /// A new one on `device`, as [`Device::alloc_pd`](crate::Device::alloc_pd) makes it, with the model's own type.
    ///
    /// # Errors
    /// [`PdError`] if the device has no more.
    pub fn alloc(device: &Arc<ModelDevice>) -> Result<Arc<Self>, PdError> {
        Self::new(Arc::clone(device))
    }

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
        let options = QpOptions { send_requests, ..QpOptions::new(Transport::ReliableConnection, &cq) };
        self.create_qp_with(options)
    }

    fn create_qp_with(self: Arc<Self>, options: QpOptions) -> Result<Arc<dyn QueuePair>, QpError> {
        let QpOptions { transport, access, signal_all, .. } = options;
        let srq = options.srq.map(|srq| -> Arc<dyn Any + Send + Sync> { srq });
        let srq = srq.map(|srq| srq.downcast::<ModelSrq>().map_err(|_| QpError::ForeignSrq)).transpose()?;
        let spec = QpSpec {
            transport,
            pd: self.handle,
            send_cq: Arc::clone(&model_cq(options.send_cq)?.queue),
            recv_cq: Arc::clone(&model_cq(options.recv_cq)?.queue),
            srq: srq.as_ref().map(|srq| Arc::clone(&srq.queue)),
            domain: None,
            access,
            max_send_requests: options.send_requests,
            max_sges: options.send_sges,
            max_inline: options.inline,
            max_recv_requests: options.recv_requests,
            max_recv_sges: options.recv_sges,
            signal_all,
        };
        let qp = self.device.hca().create_qp(&spec)?;
        Ok(Arc::new(ModelQp { qp, _srq: srq, _pd: self }))
    }

    fn create_srq(
        self: Arc<Self>,
        requests: u32,
        sges: u32,
    ) -> Result<Arc<dyn SharedReceiveQueue>, CreateSrqError> {
        let spec = SrqSpec { pd: self.handle, max_requests: requests, max_sges: sges };
        let queue = self.device.hca().create_srq(&spec)?;
        Ok(Arc::new(ModelSrq { queue, _pd: self }))
    }

    fn alloc_window(
        self: Arc<Self>,
        kind: WindowKind,
    ) -> Result<Arc<dyn Window>, ObjectError<CreateKeyError>> {
        Ok(ModelWindow::new(self, kind)?)
    }

    fn create_ah(
        self: Arc<Self>,
        vector: AddressVector,
    ) -> Result<Arc<dyn AddressHandle>, ObjectError<CreateAhError>> {
        Ok(ModelAh::new(self, vector)?)
    }

    fn register_device_memory(
        self: Arc<Self>,
        memory: Arc<dyn DeviceMemory>,
        access: Access,
        offset: u64,
        length: u64,
    ) -> Result<Arc<dyn KeyHandle>, ObjectError<RegisterDeviceMemoryError>> {
        Ok(ModelDeviceRegion::new(self, memory, access, (offset, length))?)
    }

    fn alloc_null(self: Arc<Self>) -> Result<Arc<dyn KeyHandle>, ObjectError<CreateNullKeyError>> {
        Ok(ModelNullRegion::new(self)?)
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
    pub(super) fn new(device: Arc<ModelDevice>, spec: &CqSpec) -> Result<Arc<Self>, CreateCqError> {
        let queue = device.hca().create_cq_with(spec)?;
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
    fn arm(&self, notify: Notify) -> bool {
        self.queue.arm(notify)
    }
    fn acknowledge_events(&self, events: u32) {
        self.queue.acknowledge_events(events);
    }
    fn unacknowledged_events(&self) -> u32 {
        self.queue.unacknowledged_events()
    }
    fn resize(&self, entries: u32) -> Result<(), ObjectError<ResizeCqError>> {
        Ok(self.queue.resize(entries)?)
    }
    fn moderate(&self, moderation: Moderation) -> Result<(), ObjectError<Infallible>> {
        self.queue.moderate(moderation);
        Ok(())
    }
}

fn model_cq(cq: Arc<dyn CompletionQueue>) -> Result<Arc<ModelCq>, QpError> {
    let cq: Arc<dyn Any + Send + Sync> = cq;
    cq.downcast::<ModelCq>().map_err(|_| QpError::ForeignCq)
}

/// A shared receive queue.
pub struct ModelSrq {
    queue: Arc<hca::SharedReceiveQueue>,
    _pd: Arc<ModelPd>,
}

impl SharedReceiveQueue for ModelSrq {
    fn post(&self, request: &RecvRequest<'_>) -> Result<(), PostError> {
        self.queue.post(request)
    }
    fn set_limit(&self, limit: u32) -> Result<(), SrqLimitError> {
        self.queue.set_limit(limit)
    }
    fn limit(&self) -> u32 {
        self.queue.limit()
    }
    fn outstanding(&self) -> u32 {
        self.queue.outstanding()
    }
    fn number(&self) -> Srqn {
        self.queue.number()
    }
}

/// A queue pair.
pub struct ModelQp {
    qp: Arc<hca::QueuePair>,
    _srq: Option<Arc<ModelSrq>>,
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
    fn post_send_list(&self, requests: &[SendRequest<'_>]) -> Result<(), (usize, PostError)> {
        self.qp.post_send_list(requests)
    }
    fn post_recv(&self, request: &RecvRequest<'_>) -> Result<(), PostError> {
        self.qp.post_recv(request)
    }
    fn modify(&self, change: &QpChange) -> Result<(), ModifyQpError> {
        self.qp.modify(change)
    }
    fn query(&self) -> Result<QpAttributes, ModifyQpError> {
        self.qp.query()
    }
    fn open(&self, qkey: QKey) -> Result<(), ModifyQpError> {
        self.qp.open(qkey)
    }
}
