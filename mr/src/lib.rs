//! What an application calls: devices, regions over any pages, the two-step DMA API.
//!
//! ```text
//! device -> protection domain -> region (key, page list)
//!                             -> queue pair -> completion queue
//! ```

pub mod block;
pub mod cache;
pub mod device;
pub mod dma;
pub mod plan;
pub mod points;
mod region;
pub mod rw;

pub use cache::{Cache, CacheConfig, Lease};
pub use device::{
    CompletionQueue, Device, Flush, ProtectionDomain, QueuePair, Region, RegisterOptions, Rereg,
};
pub use odp::space::PinKind;
pub use region::{
    CounterValues, MapEntry, MapRegionError, MapRun, Mode, PublishError, RegionReport, Snapshot, Teardown,
};
