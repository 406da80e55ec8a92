//! The bus: host memory, PCI BARs, and who may reach what.
//!
//! A device puts a [`DmaAddr`](crate::addr::DmaAddr) on the bus. A peer's BAR below the same switch answers to its bus
//! address directly; everything else goes up through the device's IOMMU domain (or, without one, as a physical address)
//! to RAM or to a BAR behind the host bridge.

mod barrier;
mod epoch;
mod memory;
mod port;

pub use epoch::{Busy, Closed, DmaEpoch, Drain, MAX_SLOTS, Slot};
pub use memory::{AtomicOp, HostMemory, MemoryError};
pub use port::{DmaError, DmaPort, IommuFault};

/// A provider of peer-to-peer memory: one BAR of one device. What holds for one of its pages holds for all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProviderId(pub u32);
