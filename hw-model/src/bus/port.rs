//! A device's connection to the bus.

use super::{AtomicOp, DmaEpoch, HostMemory, MemoryError};
use crate::addr::{DmaAddr, Iova};
use crate::sync::Arc;

/// What one device masters the bus through. Clones are the same device.
#[derive(Clone)]
pub struct DmaPort {
    memory: Arc<dyn HostMemory>,
}

impl DmaPort {
    /// A device without an IOMMU, alone with host memory: DMA addresses are physical addresses.
    #[must_use]
    pub fn direct(memory: Arc<dyn HostMemory>) -> Self {
        Self { memory }
    }

    /// Copies from the bus. The range lies in one 4 KiB page; the caller is inside [`DmaEpoch`].
    ///
    /// # Errors
    /// See [`DmaError`].
    pub fn read(&self, at: DmaAddr, out: &mut [u8]) -> Result<(), DmaError> {
        Ok(self.memory.read(at.to_phys_identity(), out)?)
    }

    /// Copies to the bus. The range lies in one 4 KiB page; the caller is inside [`DmaEpoch`].
    ///
    /// # Errors
    /// See [`DmaError`].
    pub fn write(&self, at: DmaAddr, data: &[u8]) -> Result<(), DmaError> {
        Ok(self.memory.write(at.to_phys_identity(), data)?)
    }

    /// A locked operation on an aligned 64-bit word.
    ///
    /// # Errors
    /// See [`DmaError`].
    pub fn atomic(&self, at: DmaAddr, op: AtomicOp) -> Result<u64, DmaError> {
        Ok(self.memory.atomic(at.to_phys_identity(), op)?)
    }

    /// The epoch that engines of this device move data in.
    #[must_use]
    pub fn epoch(&self) -> &Arc<DmaEpoch> {
        self.memory.epoch()
    }
}

/// Why a DMA was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DmaError {
    /// The IOMMU has no translation, or none for this access. It is in the domain's fault log.
    #[error("IOMMU fault at {iova}: {reason}")]
    Iommu {
        /// The IOVA used.
        iova: Iova,
        /// Why.
        reason: IommuFault,
    },
    /// The memory behind the translation refused.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Nothing on the bus answers to the address.
    #[error("nothing answers to bus address {at}")]
    Unrouted {
        /// The bus address used.
        at: DmaAddr,
    },
}

/// Why an IOMMU stopped a DMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum IommuFault {
    /// No entry for the IOVA.
    #[error("not present")]
    NotPresent,
    /// The entry does not allow reading.
    #[error("no read permission")]
    NoRead,
    /// The entry does not allow writing.
    #[error("no write permission")]
    NoWrite,
    /// The IOVA is beyond the width of the domain.
    #[error("beyond the address width")]
    BeyondWidth,
}
