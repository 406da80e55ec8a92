//! The bus: host memory, PCI BARs, and who may reach what.
//!
//! A device puts a [`DmaAddr`](crate::addr::DmaAddr) on the bus. A peer's BAR below the same switch answers to its bus
//! address directly; everything else goes up through the device's IOMMU domain (or, without one, as a physical address)
//! to RAM or to a BAR behind the host bridge.
//!
//! ```text
//!                 RAM (HostMemory)
//!                        |
//!    host bridge --- IOMMU domain of each device
//!      |      |
//!   root    root port            ports may redirect (ACS): then peers below the switch
//!   port      |                  no longer see each other's bus addresses
//!    |      switch
//!  device    |     |
//!          device  device with a BAR
//! ```

mod bar;
mod barrier;
mod copy;
mod device;
mod epoch;
mod fabric;
mod memory;
mod outside;
mod port;
mod private;
mod ram;
mod topology;

pub use crate::iommu::IommuFault;
pub use bar::{Bar, BarStorage, RamStorage, StorageError};
pub use copy::DmaCopy;
pub use device::{DeviceSpec, DmaLimits};
pub use epoch::{Busy, Closed, DmaEpoch, Drain, MAX_SLOTS, Slot};
pub use fabric::{BarError, Bus, BusConfig, MAX_BARS, Translation};
pub use memory::{AtomicOp, CopyEnd, CopyError, HostMemory, MemoryError};
pub use outside::{Outside, OutsideMemory};
pub use port::{DmaError, DmaPort, PeerRoutes};
pub use private::PrivatePages;
pub use ram::RamMemory;
pub use topology::{Acs, DeviceId, Forwarding, NodeKind, PeerRoute, PortId, TopologyError};

/// A provider of peer-to-peer memory: one BAR of one device. What holds for one of its pages holds for all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProviderId(pub u32);
