//! What hardware is: addresses, the bus with its BARs and IOMMU, and an RDMA host channel adapter.
//!
//! Nothing in this crate calls software above it. The HCA posts page-fault events and completions to queues that
//! software drains; memory is reached through [`bus::HostMemory`], which the address spaces of `odp` implement.

pub mod addr;
pub mod bounce;
pub mod bus;
pub mod fault_plan;
pub mod hca;
pub mod iommu;
pub mod link;
#[cfg(feature = "planted-bugs")]
pub mod planted;
mod prefetch;
pub mod sync;
pub mod wire;
