//! Regions: memory that a device may use, kept true while its pages change.
//!
//! A region is watched by its address space, has a page list that its device reads at DMA time, and on devices behind an
//! IOMMU a reserved range of IOVA. Pages become present by `publish`, go away by `invalidate` (the notifier's callbacks),
//! and all of it ends in `teardown`. One lock orders them; see `core`.

mod bringing;
mod core;
pub(crate) mod counters;
mod emptied;
mod fault;
mod invalidate;
mod publish;
mod register;
mod report;
mod teardown;

#[cfg(all(test, shuttle))]
mod schedules;
#[cfg(all(test, shuttle))]
pub(crate) mod two_pages;

pub(crate) use self::core::Core;
pub use self::core::{Mode, Snapshot};
pub(crate) use bringing::Bringing;
pub use counters::CounterValues;
pub(crate) use emptied::Emptied;
pub(crate) use fault::{RegionFault, WINDOW};
pub use publish::PublishError;
pub use register::MapRegionError;
pub(crate) use register::{How, Mapped};
pub use report::{MapEntry, MapRun, RegionReport};
pub use teardown::Teardown;
