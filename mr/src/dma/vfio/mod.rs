//! The DMA layer behind an IOMMU that the kernel programs: VFIO, for drivers in user space.
//!
//! ```no_run
//! use mr::dma::vfio::{PciAddress, VfioContainer, VfioGroup};
//! use mr::dma::{DmaConfig, DmaDevice, Mapping};
//! use odp::space::process::{Options, OwnedMemory, ProcessSpace};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let memory = ProcessSpace::open(Options::default())?;
//! let address: PciAddress = "0000:00:01.0".parse()?;
//! let group = VfioGroup::of(address).ok_or("no IOMMU translates for the device")?;
//! let container = VfioContainer::open(group, &memory)?;
//! let device = container.device(address)?;
//! let registers = device.bar(0)?;
//! device.set_bus_master(true)?;
//! # let _ = registers;
//!
//! let dma = DmaDevice::over(container, DmaConfig::default());
//! let buffer = OwnedMemory::new(&memory, 8192)?;
//! let mapping = Mapping::try_alloc(&dma, buffer.size(), 0)?.ok_or("an IOMMU translates")?;
//! # let _ = mapping;
//! # Ok(())
//! # }
//! ```
//!
//! A [`VfioContainer`] is an [`IoSpace`](super::IoSpace): link, sync and unlink of a [`Mapping`](super::Mapping) work as
//! behind the modelled IOMMU, with the same refusals. What differs stands in docs/vfio.md, and `tests/vfio.rs` holds the
//! two against each other. Nothing here needs a library of C or root: a user who owns `/dev/vfio/GROUP` can do it.
//!
//! Sources: Documentation/driver-api/vfio.rst, include/uapi/linux/vfio.h, drivers/vfio/vfio_iommu_type1.c.

mod address;
mod bar;
mod container;
mod device;
mod info;
mod space;
mod sys;

pub use address::{BadAddress, PciAddress, VfioGroup};
pub use bar::Bar;
pub use container::{OpenError, VfioContainer};
pub use device::{DeviceError, VfioDevice};
pub use info::{InfoError, IommuInfo};
pub use space::VfioLimits;
