//! An IOMMU: what stands between the addresses a device puts on the bus and physical memory.
//!
//! A [`Domain`] is one I/O address space: a radix page table that software writes and engines walk without a lock, and
//! an IOTLB that really caches: what it holds is used until it is invalidated, whatever the table says meanwhile.
//! Software owes it three things, and is told by name when it breaks one of them: nothing is mapped over a live mapping;
//! what is unmapped is exactly what was mapped; what was unmapped is flushed before its page is released or its IOVA
//! used again. Sources: drivers/iommu/iommu.c (`iommu_map`, `iommu_unmap_fast`, `iommu_iotlb_gather`),
//! drivers/iommu/dma-iommu.c (the flush queue), Intel VT-d specification chapter 6 (caching of translations).

mod config;
mod cookie;
mod domain;
mod fault;
mod flush_queue;
mod host;
mod iotlb;
mod leaf;
mod page_table;
mod queue;

pub use config::{ConfigError, DomainConfig, DomainStats, FlushMode, Gather};
pub use cookie::Cookie;
pub use domain::Domain;
pub use fault::{DmaAccess, FaultLog, FaultRecord, IommuFault};
pub use flush_queue::FlushQueue;
pub use host::HostRefusal;
pub use iotlb::{IotlbConfig, IotlbStats};
pub use leaf::{LeafSize, Prot};
pub use page_table::{MapError, UnmapError, Violation};
pub use queue::{FlushTicket, QueueFull, QueueStats};
