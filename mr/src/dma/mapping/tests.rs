//! The contract of the two-step API: what is illegal is refused, and changes nothing.

use super::*;
use crate::dma::DmaConfig;
use hw_model::bus::{Bus, DeviceSpec};
use hw_model::fault_plan::{Action, FaultPlan, Points, Rule};
use hw_model::iommu::{Domain, DomainConfig};
use odp::space::AddressSpace;
use odp::space::process::{Options, ProcessSpace};

const PAGE: u64 = PAGE_SIZE;
const LARGE: u64 = 2 << 20;
/// Some memory, aligned for large leaves. Nothing is ever moved there.
const PHYS: PhysAddr = PhysAddr(0x4000_0000);

fn device(points: Points) -> (Arc<DmaDevice>, Arc<Domain>) {
    let space = ProcessSpace::open(Options::default()).expect("this process can use its own memory");
    let bus = Bus::new(space.memory());
    let domain = Domain::new(DomainConfig::default()).expect("the default is possible");
    let port = bus.attach(DeviceSpec::new("device").domain(&domain)).expect("room on the bus");
    (DmaDevice::new(port, DmaConfig { points, ..DmaConfig::default() }), domain)
}

fn mapping(device: &Arc<DmaDevice>, len: u64) -> Mapping {
    Mapping::try_alloc(device, len, 0).expect("room").expect("a domain translates")
}

#[test]
fn offsets_and_lengths_outside_or_inside_a_page_are_refused_by_every_call() {
    let (device, domain) = device(Points::OFF);
    let mapping = mapping(&device, 4 * PAGE);
    let bad = [
        (0, 0),
        (0, 1),
        (1, PAGE),
        (0, 5 * PAGE),
        (4 * PAGE, PAGE),
        (u64::MAX - PAGE + 1, PAGE),
        (PAGE, u64::MAX),
    ];
    for (offset, len) in bad {
        let range = RangeError { offset, len, reserved: 4 * PAGE, granule: PAGE };
        assert_eq!(mapping.link(offset, PHYS, len, LeafSize::Page), Err(range.into()));
        assert_eq!(mapping.prepare(offset, len), Err(range.into()));
        assert_eq!(mapping.sync(offset, len), Err(range.into()));
        assert_eq!(mapping.unlink(offset, len), Err(range.into()));
    }
    assert_eq!((mapping.linked(), domain.stats().mapped_bytes), (0, 0));
}

#[test]
fn a_link_over_a_live_link_is_refused_and_the_live_one_stays() {
    let (device, domain) = device(Points::OFF);
    let mapping = mapping(&device, 4 * PAGE);
    mapping.link(PAGE, PHYS, PAGE, LeafSize::Page).expect("free");
    let over = mapping.link(0, PHYS.offset(16 * PAGE), 4 * PAGE, LeafSize::Page);
    assert!(matches!(over, Err(LinkError::Map(MapError::AlreadyMapped { .. }))), "{over:?}");
    assert_eq!(mapping.linked(), PAGE, "the part before the live link was taken down again");
    assert!(mapping.leads_to(PAGE, PHYS));
    assert_eq!(domain.iova_to_phys(mapping.iova()), None);
    mapping.unlink(PAGE, PAGE).expect("linked");
}

#[test]
fn a_hole_is_not_unlinked_and_nothing_beside_it_is() {
    let (device, domain) = device(Points::OFF);
    let mapping = mapping(&device, 4 * PAGE);
    mapping.link(0, PHYS, PAGE, LeafSize::Page).expect("free");
    mapping.link(2 * PAGE, PHYS, PAGE, LeafSize::Page).expect("free");
    assert!(matches!(mapping.unlink(0, 3 * PAGE), Err(UnlinkError::Unmap(_))));
    assert_eq!((mapping.linked(), domain.stats().mapped_bytes), (2 * PAGE, 2 * PAGE));
    mapping.unlink(0, PAGE).expect("linked");
    mapping.unlink(2 * PAGE, PAGE).expect("linked");
}

#[test]
fn a_unit_is_unlinked_whole_or_not_at_all() {
    let (device, domain) = device(Points::OFF);
    let mapping = mapping(&device, LARGE);
    mapping.link(0, PHYS, LARGE, LeafSize::Huge).expect("free");
    assert_eq!(mapping.unit_at(PAGE), LARGE, "the memory and the IOVA are aligned: one leaf");
    assert!(matches!(mapping.unlink(0, PAGE), Err(UnlinkError::Unmap(_))));
    assert_eq!(domain.stats().mapped_bytes, LARGE, "not even a part of it went");
    mapping.unlink(0, LARGE).expect("whole");
    assert_eq!(mapping.unit_at(PAGE), 0);
}

#[test]
fn the_iova_stays_while_anything_is_linked() {
    let (device, _) = device(Points::OFF);
    let mapping = mapping(&device, 2 * PAGE);
    mapping.link(PAGE, PHYS, PAGE, LeafSize::Page).expect("free");
    assert_eq!(mapping.free(), Err(StillLinked { iova: mapping.iova(), linked: PAGE }));
    assert_eq!(device.iova_stats().live_ranges, 1);
    mapping.unlink(PAGE, PAGE).expect("linked");
    assert_eq!(mapping.free(), Ok(()));
    assert_eq!(mapping.free(), Ok(()), "a second time does nothing");
    assert_eq!(device.iova_stats().live_ranges, 0);
}

/// Regression: unlinking by a stale handle took down the link of whoever had the IOVA next.
#[test]
fn a_freed_mapping_reaches_nothing_of_who_has_its_iova_next() {
    let (device, domain) = device(Points::OFF);
    let old = mapping(&device, PAGE);
    old.free().expect("nothing linked");
    let new = mapping(&device, PAGE);
    assert_eq!(new.iova(), old.iova(), "the hole is used again, or this test shows nothing");
    new.link(0, PHYS, PAGE, LeafSize::Page).expect("free");
    let freed = LinkError::Freed { iova: old.iova() };
    assert_eq!(old.link(0, PHYS, PAGE, LeafSize::Page), Err(freed));
    assert_eq!(old.sync(0, PAGE), Err(freed));
    assert_eq!(old.unlink(0, PAGE), Err(UnlinkError::Freed { iova: old.iova() }));
    drop(old);
    assert_eq!((domain.stats().mapped_bytes, device.iova_stats().live_ranges), (PAGE, 1));
    new.unlink(0, PAGE).expect("linked");
}

#[test]
fn a_mapping_dropped_while_linked_loses_its_iova_rather_than_giving_it_away() {
    let (device, domain) = device(Points::OFF);
    let mapping = mapping(&device, PAGE);
    mapping.link(0, PHYS, PAGE, LeafSize::Page).expect("free");
    drop(mapping);
    assert_eq!((device.iova_stats().live_ranges, domain.stats().mapped_bytes), (1, PAGE));
}

#[test]
fn every_step_that_fails_leaves_what_was_there() {
    for point in [points::PREPARE, points::LINK, points::SYNC] {
        let plan = FaultPlan::new(0, vec![Rule::nth(point.name(), 2, Action::Fail)]);
        let (device, domain) = device(Points::with(&plan));
        let mapping = mapping(&device, 2 * PAGE);
        let bring = |offset| {
            mapping.prepare(offset, PAGE)?;
            mapping.link(offset, PHYS, PAGE, LeafSize::Page)?;
            mapping.sync(offset, PAGE).inspect_err(|_| mapping.unlink(offset, PAGE).expect("linked just now"))
        };
        bring(0).expect("the first time nothing fails");
        bring(PAGE).expect_err("the second time something does");
        assert_eq!(plan.fired(), [(point.name().to_owned(), 1)]);
        assert_eq!((mapping.linked(), domain.stats().mapped_bytes), (PAGE, PAGE), "after {point}");
        mapping.unlink(0, PAGE).expect("the first is still there");
    }
}

#[test]
fn without_an_iommu_there_is_no_mapping_and_nothing_is_reserved() {
    let space = ProcessSpace::open(Options::default()).expect("this process can use its own memory");
    let port = Bus::new(space.memory()).attach(DeviceSpec::new("device")).expect("room on the bus");
    let device = DmaDevice::new(port, DmaConfig::default());
    assert!(Mapping::try_alloc(&device, PAGE, 0).expect("an ordinary answer").is_none());
    assert_eq!(device.iova_stats().live_ranges, 0);
}

/// Regression: two devices of one domain each had an allocator, and were given the same IOVA.
#[test]
fn devices_of_one_domain_share_its_iova() {
    let space = ProcessSpace::open(Options::default()).expect("this process can use its own memory");
    let bus = Bus::new(space.memory());
    let domain = Domain::new(DomainConfig::default()).expect("the default is possible");
    let [one, other] = ["one", "other"].map(|name| {
        let port = bus.attach(DeviceSpec::new(name).domain(&domain)).expect("room on the bus");
        DmaDevice::new(port, DmaConfig::default())
    });
    let over = DmaDevice::over(Arc::clone(&domain) as _, DmaConfig::default());
    let mappings = [&one, &other, &over].map(|device| mapping(device, PAGE));
    for (index, mapping) in mappings.iter().enumerate() {
        mapping.link(0, PHYS.offset(index as u64 * PAGE), PAGE, LeafSize::Page).expect("nobody else's");
    }
    assert_eq!((one.iova_stats().live_ranges, domain.stats().violations), (3, 0));
    for mapping in mappings {
        mapping.unlink(0, PAGE).expect("linked");
    }
}

mod granules;
mod late;
