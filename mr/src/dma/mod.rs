//! The DMA layer: which way to a page, and the two-step API that links it.
//!
//! [`route`] is the one table of decisions. [`Segments`] is the one place that finds path boundaries. [`Mapping`] is the
//! one way to IOVA. A caller that has no peer-to-peer page never touches what exists for those that have.

pub mod batch;
mod bounce;
mod device;
mod extent;
pub mod iova;
mod mapping;
pub mod page_size;
pub mod points;
pub mod route;
mod segments;
mod space;
#[cfg(all(feature = "vfio", not(any(loom, shuttle))))]
pub mod vfio;

pub use bounce::{BounceError, Bounced, SyncDirection};
pub use device::{DmaConfig, DmaDevice, Way};
pub use extent::Extent;
pub use iova::IovaError;
pub use mapping::{DestroyError, LinkError, Mapping, RangeError, StillLinked, UnlinkError};
pub use route::{Policy, Refusal};
pub use segments::{Segment, Segments};
pub use space::IoSpace;
