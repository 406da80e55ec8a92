//! Windows, address handles, channels and device memory of the modelled HCA: what `mr` adds is who holds whom.

use super::{ModelDevice, ModelPd};
use crate::device::objects::{
    AddressHandle, AsyncEventStream, CompletionChannel, DeviceMemory, KeyHandle, ObjectError, Window,
};
use hw_model::hca::{
    self, Access, AddressVector, AsyncEvent, CompletionEvent, CreateAhError, CreateKeyError,
    CreateNullKeyError, Key, OutsideDeviceMemory, RegisterDeviceMemoryError, WindowKind, WindowSpec,
};
use hw_model::sync::Arc;
use std::any::Any;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// A completion channel.
pub struct ModelChannel {
    pub(super) channel: Arc<hca::CompletionChannel>,
    pub(super) _device: Arc<ModelDevice>,
}

impl CompletionChannel for ModelChannel {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.channel.descriptor()
    }
    fn next(&self) -> io::Result<CompletionEvent> {
        self.channel.next()
    }
    fn next_within(&self, timeout: Duration) -> Option<CompletionEvent> {
        self.channel.next_within(timeout)
    }
}

impl AsyncEventStream for hca::AsyncEvents {
    fn descriptor(&self) -> io::Result<BorrowedFd<'_>> {
        self.descriptor()
    }
    fn next(&self) -> io::Result<AsyncEvent> {
        self.next()
    }
    fn next_within(&self, timeout: Duration) -> Option<AsyncEvent> {
        self.next_within(timeout)
    }
    fn acknowledge(&self, events: u64) {
        self.acknowledge(events);
    }
    fn unacknowledged(&self) -> u64 {
        self.unacknowledged()
    }
}

/// A memory window.
pub struct ModelWindow {
    key: Key,
    kind: WindowKind,
    pd: Arc<ModelPd>,
}

impl ModelWindow {
    pub(super) fn new(pd: Arc<ModelPd>, kind: WindowKind) -> Result<Arc<Self>, CreateKeyError> {
        let key = pd.device().hca().alloc_window(WindowSpec { pd: pd.handle(), kind })?;
        Ok(Arc::new(Self { key, kind, pd }))
    }
}

impl Window for ModelWindow {
    fn key(&self) -> Key {
        self.key
    }
    fn kind(&self) -> WindowKind {
        self.kind
    }
}

impl Drop for ModelWindow {
    fn drop(&mut self) {
        let known = self.pd.device().hca().dealloc_window(self.key);
        debug_assert!(known.is_ok(), "{known:?}");
    }
}

/// An address handle.
pub struct ModelAh {
    handle: Arc<hca::AddressHandle>,
    _pd: Arc<ModelPd>,
}

impl ModelAh {
    pub(super) fn new(pd: Arc<ModelPd>, vector: AddressVector) -> Result<Arc<Self>, CreateAhError> {
        let handle = pd.device().hca().create_ah(pd.handle(), vector)?;
        Ok(Arc::new(Self { handle, _pd: pd }))
    }
}

impl AddressHandle for ModelAh {
    fn vector(&self) -> AddressVector {
        self.handle.vector()
    }
}

/// Device memory.
pub struct ModelDeviceMemory {
    pub(super) memory: Arc<hca::DeviceMemory>,
    pub(super) device: Arc<ModelDevice>,
}

impl DeviceMemory for ModelDeviceMemory {
    fn len(&self) -> u64 {
        self.memory.len()
    }
    fn copy_to(&self, offset: u64, data: &[u8]) -> Result<(), OutsideDeviceMemory> {
        self.memory.copy_to(offset, data)
    }
    fn copy_from(&self, offset: u64, out: &mut [u8]) -> Result<(), OutsideDeviceMemory> {
        self.memory.copy_from(offset, out)
    }
}

/// A region of device memory. Its key goes first, then its domain.
pub struct ModelDeviceRegion {
    region: Arc<hca::DeviceRegion>,
    _pd: Arc<ModelPd>,
}

impl ModelDeviceRegion {
    pub(super) fn new(
        pd: Arc<ModelPd>,
        memory: Arc<dyn DeviceMemory>,
        access: Access,
        (offset, length): (u64, u64),
    ) -> Result<Arc<Self>, ObjectError<RegisterDeviceMemoryError>> {
        let foreign = || ObjectError::Foreign { object: "device memory" };
        let memory: Arc<dyn Any + Send + Sync> = memory;
        let memory = memory.downcast::<ModelDeviceMemory>().map_err(|_| foreign())?;
        if !Arc::ptr_eq(&memory.device, pd.device()) {
            return Err(foreign());
        }
        let region = memory.memory.register(pd.handle(), access, offset, length)?;
        Ok(Arc::new(Self { region, _pd: pd }))
    }
}

impl KeyHandle for ModelDeviceRegion {
    fn key(&self) -> Key {
        self.region.key()
    }
    fn len(&self) -> u64 {
        self.region.len()
    }
}

/// A null key.
pub struct ModelNullRegion {
    key: Key,
    pd: Arc<ModelPd>,
}

impl ModelNullRegion {
    pub(super) fn new(pd: Arc<ModelPd>) -> Result<Arc<Self>, CreateNullKeyError> {
        let key = pd.device().hca().create_null_key(pd.handle())?;
        Ok(Arc::new(Self { key, pd }))
    }
}

impl KeyHandle for ModelNullRegion {
    fn key(&self) -> Key {
        self.key
    }
    fn len(&self) -> u64 {
        u64::MAX
    }
}

impl Drop for ModelNullRegion {
    fn drop(&mut self) {
        let known = self.pd.device().hca().destroy_null_key(self.key);
        debug_assert!(known.is_ok(), "{known:?}");
    }
}
