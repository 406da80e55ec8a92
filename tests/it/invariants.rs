//! The sixteen invariants of the house, each with a test, and with a test in which it is broken on purpose and the same
//! check sees it.
//!
//! What breaks them is the layer below used in the wrong order, by hand: the regions of `mr` cannot be talked into it.

mod keys;
mod links;
mod order;
mod pages;
mod work;

use hw_model::addr::{PAGE_SIZE, VirtRange, page_bytes};
use hw_model::bus::{Bus, DeviceSpec, DmaPort};
use hw_model::iommu::{Domain, DomainConfig};
use hw_model::sync::Arc;
use mr::dma::{DmaConfig, DmaDevice, Mapping};
use odp::space::process::{OwnedMemory, ProcessSpace};
use odp::space::{Access, AddressSpace};

/// A device without an HCA, to do by hand what regions do: its engine is the test.
struct Hand {
    space: Arc<ProcessSpace>,
    domain: Arc<Domain>,
    port: DmaPort,
    device: Arc<DmaDevice>,
    memory: Arc<OwnedMemory>,
}

impl Hand {
    /// With memory of `pages` pages, all there.
    fn new(pages: u64) -> Self {
        let space = crate::bed::space();
        let bus = Bus::new(space.memory());
        let domain = Domain::new(DomainConfig::default()).expect("the default is possible");
        let port = bus.attach(DeviceSpec::new("hand").domain(&domain)).expect("room on the bus");
        let device = DmaDevice::new(port.clone(), DmaConfig::default());
        let memory = Arc::new(OwnedMemory::new(&space, page_bytes(pages)).expect("memory"));
        space.fault(memory.range(), Access::Write, &mut Vec::new()).expect("our own memory");
        Self { space, domain, port, device, memory }
    }

    fn mapping(&self) -> Mapping {
        let mapping = Mapping::try_alloc(&self.device, self.memory.size(), self.memory.range().start().0);
        mapping.expect("room").expect("a domain translates")
    }

    fn page(&self, index: u64) -> VirtRange {
        page_of(self.memory.range(), index)
    }
}

fn page_of(range: VirtRange, index: u64) -> VirtRange {
    VirtRange::new(range.start().offset(page_bytes(index)), PAGE_SIZE).expect("in the range")
}
