//! Host memory that is nothing but memory.

use super::bar::{BarStorage, RamStorage};
use super::{AtomicOp, DmaEpoch, HostMemory, MemoryError, PrivatePages};
use crate::addr::PhysAddr;
use crate::sync::Arc;

/// RAM from physical address 0, with no address space above it: for a device used without one.
#[derive(Debug)]
pub struct RamMemory {
    words: Arc<RamStorage>,
    epoch: Arc<DmaEpoch>,
    private: Option<Arc<PrivatePages>>,
}

impl RamMemory {
    /// `size` bytes of zeroes, rounded up to 8; `None` if the host has no memory for them.
    #[must_use]
    pub fn new(size: u64) -> Option<Arc<Self>> {
        Some(Arc::new(Self { words: RamStorage::new(size)?, epoch: DmaEpoch::new(), private: None }))
    }

    /// The same for an encrypted guest: devices do not reach the pages of `private`.
    #[must_use]
    pub fn encrypted(size: u64, private: Arc<PrivatePages>) -> Option<Arc<Self>> {
        let (words, epoch) = (RamStorage::new(size)?, DmaEpoch::new());
        Some(Arc::new(Self { words, epoch, private: Some(private) }))
    }
}

const BASE: PhysAddr = PhysAddr(0);

impl HostMemory for RamMemory {
    fn read(&self, at: PhysAddr, out: &mut [u8]) -> Result<(), MemoryError> {
        self.words.read(at.0, out).map_err(|error| error.at(BASE))
    }
    fn write(&self, at: PhysAddr, data: &[u8]) -> Result<(), MemoryError> {
        self.words.write(at.0, data).map_err(|error| error.at(BASE))
    }
    fn atomic(&self, at: PhysAddr, op: AtomicOp) -> Result<u64, MemoryError> {
        self.words.atomic(at.0, op).map_err(|error| error.at(BASE))
    }
    fn epoch(&self) -> &Arc<DmaEpoch> {
        &self.epoch
    }
    fn private_pages(&self) -> Option<Arc<PrivatePages>> {
        self.private.clone()
    }
}
