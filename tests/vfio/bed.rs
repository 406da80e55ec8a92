//! What every test starts with: a device that may be used, memory, and a container.

use hw_model::addr::{PAGE_SIZE, PhysAddr};
use hw_model::sync::Arc;
use mr::dma::vfio::{OpenError, PciAddress, VfioContainer, VfioGroup};
use mr::dma::{DmaConfig, DmaDevice, Mapping};
use odp::space::process::{Options, OwnedMemory, ProcessSpace};

/// Bytes of a page.
pub const PAGE: u64 = PAGE_SIZE;

/// A device, its group, and the memory of this process.
#[derive(Clone)]
pub struct Bed {
    pub address: PciAddress,
    pub group: VfioGroup,
    pub space: Arc<ProcessSpace>,
}

impl Bed {
    /// The device that the environment names, or why there is none.
    pub fn find() -> Result<Self, String> {
        const NAME: &str = "ANYPAGE_LAB_NVME";
        let address =
            std::env::var(NAME).map_err(|_| format!("{NAME} names no device: tests/lab/vm --iommu"))?;
        let address: PciAddress = address.parse().map_err(|error| format!("{NAME}: {error}"))?;
        let group = VfioGroup::of(address).ok_or(format!("no IOMMU translates for {address}"))?;
        let space = ProcessSpace::open(Options::default()).map_err(|error| error.to_string())?;
        // What is missing is said here, once, and not by every test.
        VfioContainer::open(group, &space).map_err(|error| error.to_string())?;
        Ok(Self { address, group, space })
    }

    pub fn container(&self) -> Result<Arc<VfioContainer>, OpenError> {
        VfioContainer::open(self.group, &self.space)
    }

    /// Memory of `pages` pages, and where it is.
    pub fn memory(&self, pages: u64) -> (OwnedMemory, PhysAddr) {
        let memory = OwnedMemory::new(&self.space, pages * PAGE).expect("the machine has memory");
        let phys = memory.physical_base();
        (memory, phys)
    }
}

/// A mapping of `len` bytes for the devices behind `container`.
pub fn mapping(container: &Arc<VfioContainer>, len: u64) -> Mapping {
    let device = DmaDevice::over(Arc::clone(container) as _, DmaConfig::default());
    Mapping::try_alloc(&device, len, 0).expect("there is room").expect("a container translates")
}
