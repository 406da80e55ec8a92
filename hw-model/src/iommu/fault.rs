//! The fault log: every DMA that the IOMMU stopped.

use crate::addr::{Iova, PhysAddr};
use crate::bus::DeviceId;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU64, Ordering};
use std::collections::VecDeque;

/// What a device wanted to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DmaAccess {
    /// Read memory.
    Read,
    /// Write memory.
    Write,
    /// A locked read and write.
    Atomic,
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

/// One refused DMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultRecord {
    /// Position among all faults of the domain, from 0.
    pub number: u64,
    /// Who asked.
    pub device: DeviceId,
    /// For which address.
    pub iova: Iova,
    /// To do what.
    pub access: DmaAccess,
    /// Why it was refused.
    pub reason: IommuFault,
    /// Where the table leads the IOVA, or led it before it was unmapped: a DMA that came too late, as against one that
    /// never was allowed.
    pub last_mapped: Option<PhysAddr>,
    /// The table allows what was refused: the IOTLB remembers that nothing was mapped, and the mapping was used before it
    /// was synced.
    pub unsynced: bool,
}

impl std::fmt::Display for FaultRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { number, device, iova, access, reason, last_mapped, unsynced } = self;
        write!(f, "IOMMU fault {number}: {device} {access:?} at {iova}: {reason}")?;
        match last_mapped {
            Some(phys) if *unsynced => write!(f, " (mapped to {phys}, not synced)"),
            Some(phys) => write!(f, " (the table has, or had, {phys})"),
            None => Ok(()),
        }
    }
}

/// A bounded ring of [`FaultRecord`]s. The newest are kept; all are counted.
#[derive(Debug)]
pub struct FaultLog {
    ring: Mutex<VecDeque<FaultRecord>>,
    capacity: usize,
    total: AtomicU64,
}

impl FaultLog {
    pub(super) fn new(capacity: usize) -> Self {
        Self { ring: Mutex::new(VecDeque::with_capacity(capacity)), capacity, total: AtomicU64::new(0) }
    }

    pub(super) fn push(
        &self,
        device: DeviceId,
        iova: Iova,
        access: DmaAccess,
        reason: IommuFault,
        last_mapped: Option<PhysAddr>,
        unsynced: bool,
    ) {
        let mut ring = self.ring.lock();
        let number = self.total.fetch_add(1, Ordering::Relaxed);
        let record = FaultRecord { number, device, iova, access, reason, last_mapped, unsynced };
        tracing::debug!(%record, "dma refused");
        if self.capacity == 0 {
            return;
        }
        if ring.len() == self.capacity {
            ring.pop_front();
        }
        ring.push_back(record);
    }

    /// Faults so far, those that the ring has lost included.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// The newest faults, oldest first.
    #[must_use]
    pub fn recent(&self) -> Vec<FaultRecord> {
        self.ring.lock().iter().copied().collect()
    }
}
