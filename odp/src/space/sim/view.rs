//! A process as one device sees it: its own private memory and what is lent to it are present for it, and for nobody else
//! (`dev_private_owner` of `hmm_range`, `owner` of `make_device_exclusive`).

use super::process::SimSpace;
use super::store::Store;
use crate::notifier::Notifiers;
use crate::page::PageRun;
use crate::space::{Access, AddressSpace, FaultError, PagePin, PinError, PinKind, Rung, Watch, WatchError};
use hw_model::addr::{PhysAddr, VirtRange};
use hw_model::bus::{AtomicOp, DmaEpoch, HostMemory, MemoryError, PrivatePages, ProviderId};
use hw_model::sync::Arc;

/// The memory of a process for the device that has the memory, or BAR, of this provider. See [`SimSpace::seen_by`].
#[derive(Debug)]
pub struct DeviceView {
    space: Arc<SimSpace>,
    device: ProviderId,
}

impl SimSpace {
    /// The same memory for a device that has some of its own: [`Backing::DevicePrivate`](crate::page::Backing) pages of its
    /// own are reported where they are instead of coming back, and pages lent to it are present.
    #[must_use]
    pub fn seen_by(self: &Arc<Self>, device: ProviderId) -> DeviceView {
        DeviceView { space: Arc::clone(self), device }
    }
}

impl AddressSpace for DeviceView {
    /// Memory as the device reaches it: all that is on the bus, and its own.
    fn memory(&self) -> Arc<dyn HostMemory> {
        let host = self.space.host();
        Arc::new(OwnMemory {
            store: Arc::clone(host.store()),
            epoch: Arc::clone(host.epoch()),
            device: self.device,
        })
    }
    fn notifiers(&self) -> &Arc<Notifiers> {
        self.space.notifiers()
    }
    fn watch(&self, range: VirtRange) -> Result<Watch, WatchError> {
        self.space.watch(range)
    }
    fn watch_sparse(&self, range: VirtRange) -> Result<Watch, WatchError> {
        self.space.watch_sparse(range)
    }
    fn page_shift(&self, range: VirtRange) -> u32 {
        self.space.page_shift(range)
    }
    fn snapshot(&self, range: VirtRange, out: &mut Vec<PageRun>) -> Result<(), FaultError> {
        self.space.snapshot_for(Some(self.device), range, out)
    }
    fn fault(&self, range: VirtRange, access: Access, out: &mut Vec<PageRun>) -> Result<(), FaultError> {
        self.space.fault_for(Some(self.device), range, access, out)
    }
    fn mapped_alike(&self, range: VirtRange, within: VirtRange) -> VirtRange {
        self.space.mapped_alike(range, within)
    }
    fn pin_pages(&self, range: VirtRange, kind: PinKind) -> Result<PagePin, PinError> {
        self.space.pin_pages(range, kind)
    }
    fn rung(&self, range: VirtRange) -> Rung {
        self.space.rung(range)
    }
}

/// What one device reaches.
#[derive(Debug)]
struct OwnMemory {
    store: Arc<Store>,
    epoch: Arc<DmaEpoch>,
    device: ProviderId,
}

impl HostMemory for OwnMemory {
    fn read(&self, at: PhysAddr, out: &mut [u8]) -> Result<(), MemoryError> {
        self.store.dma_read(at, Some(self.device), out)
    }
    fn write(&self, at: PhysAddr, data: &[u8]) -> Result<(), MemoryError> {
        self.store.dma_write(at, Some(self.device), data)
    }
    fn atomic(&self, at: PhysAddr, op: AtomicOp) -> Result<u64, MemoryError> {
        self.store.dma_atomic(at, Some(self.device), op)
    }
    fn epoch(&self) -> &Arc<DmaEpoch> {
        &self.epoch
    }
    fn private_pages(&self) -> Option<Arc<PrivatePages>> {
        Some(Arc::clone(self.store.private_pages()))
    }
}
