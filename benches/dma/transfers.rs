//! What a kernel-style transfer costs behind an IOMMU, and where nothing translates: counts, not times.

use criterion::Criterion;
use hw_model::addr::{PAGE_SIZE, PhysAddr};
use hw_model::bus::{Bus, DeviceSpec, RamMemory};
use hw_model::hca::{Backing, Hca, HcaConfig};
use hw_model::iommu::{Domain, DomainConfig};
use hw_model::link::Fabric;
use mr::dma::{DmaConfig, DmaDevice, Extent};
use mr::rw::{RwConfig, RwCost, RwEndpoint};

/// Pages of the transfer: 1 MiB, as a large block request.
const PAGES: u64 = 256;

/// Every second page of memory: no two are one piece.
fn scattered() -> impl Iterator<Item = Extent> + Clone {
    (0..PAGES).map(|page| Extent {
        at: page * PAGE_SIZE,
        phys: PhysAddr(2 * page * PAGE_SIZE),
        len: PAGE_SIZE,
        backing: Backing::Anonymous,
        provider: None,
        writable: true,
    })
}

fn cost(iommu: bool, config: RwConfig) -> RwCost {
    let bus = Bus::new(RamMemory::new(2 * PAGES * PAGE_SIZE).expect("memory"));
    let spec = DeviceSpec::new("nic");
    let domain = Domain::new(DomainConfig::default()).expect("the default is possible");
    let port = bus.attach(if iommu { spec.domain(&domain) } else { spec }).expect("room on the bus");
    let dma = DmaDevice::new(port.clone(), DmaConfig::default());
    let hca = Hca::new(HcaConfig::default(), port, Box::new(Fabric::new().port())).expect("an HCA");
    let pd = hca.alloc_pd().expect("a domain");
    let endpoint = RwEndpoint::new(&hca, &dma, pd, config).expect("keys");
    endpoint.transfer(scattered()).expect("enough regions").cost()
}

/// Prints the table, and asserts what the two-step API is for: one range, one request, no region.
pub fn transfers(_: &mut Criterion) {
    let gaps = RwConfig { regions: 64, direct_ranges: 16, ..RwConfig::default() };
    let lists = RwConfig { gaps: false, entries: 64, ..gaps };
    let requests = RwConfig { direct_ranges: usize::MAX, ..gaps };
    println!("a transfer of {PAGES} scattered pages:       ranges  regions  requests  entries");
    let mut costs = Vec::new();
    for (name, iommu, config) in [
        ("behind an IOMMU", true, gaps),
        ("without: page lists", false, lists),
        ("without: a list with gaps", false, gaps),
        ("without: work requests", false, requests),
    ] {
        let RwCost { ranges, regions, requests, entries } = cost(iommu, config);
        println!("  {name:<38} {ranges:>6} {regions:>8} {requests:>9} {entries:>8}");
        costs.push((ranges, regions, requests));
    }
    assert_eq!(costs[0], (1, 0, 1), "one range, no region, one request");
    assert!(
        costs[1..].iter().all(|(ranges, ..)| *ranges == PAGES as usize),
        "every piece is seen: {costs:?}"
    );
}
