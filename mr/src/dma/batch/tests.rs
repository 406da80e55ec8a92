//! Extents of every sort mapped as one: bytes go where they should, once, and everything is given back.

use super::*;
use crate::dma::DmaConfig;
use hw_model::addr::PAGE_SIZE;
use hw_model::bus::{Acs, Bus, BusConfig, DeviceSpec, DmaPort, ProviderId};
use hw_model::fault_plan::{FaultPlan, Points};
use hw_model::iommu::{Domain, DomainConfig};
use odp::space::AddressSpace;
use odp::space::process::{Options, ProcessSpace};
use proptest::prelude::*;

const PAGE: u64 = PAGE_SIZE;
/// Some memory. Nothing is ever moved there.
const PHYS: u64 = 0x4000_0000;

struct Bed {
    device: Arc<DmaDevice>,
    domain: Option<Arc<Domain>>,
    port: DmaPort,
    provider: ProviderId,
    bar: PhysAddr,
}

/// A device and a BAR below one switch.
fn bed(translated: bool, limits: DmaLimits, points: Points) -> Bed {
    let space = ProcessSpace::open(Options::default()).expect("this process can use its own memory");
    let bus = Bus::with_config(space.memory(), BusConfig::default());
    let root = bus.add_root_port(bus.first_bridge(), Acs::Off).expect("a root port");
    let switch = bus.add_switch(root).expect("a switch");
    let below = [(); 2].map(|()| bus.add_downstream_port(switch, Acs::Off).expect("a port"));
    let domain = translated.then(|| Domain::new(DomainConfig::default()).expect("the default is possible"));
    let spec = DeviceSpec::new("disk").under(below[0]).limits(limits);
    let spec = match &domain {
        Some(domain) => spec.domain(domain),
        None => spec,
    };
    let port = bus.attach(spec).expect("room on the bus");
    let gpu = bus.attach(DeviceSpec::new("gpu").under(below[1])).expect("room on the bus");
    let bar = bus.add_ram_bar(gpu.device(), 1 << 20).expect("a BAR");
    let device = DmaDevice::new(port.clone(), DmaConfig { points, ..DmaConfig::default() });
    Bed { device, domain, port, provider: bar.provider(), bar: bar.base() }
}

fn ram(at: u64, phys: u64, len: u64) -> Extent {
    Extent { at, phys: PhysAddr(phys), len, backing: Backing::Anonymous, provider: None, writable: true }
}

impl Bed {
    fn peer(&self, at: u64, offset: u64, len: u64) -> Extent {
        let (phys, provider) = (self.bar.offset(offset), Some(self.provider));
        Extent { at, phys, len, backing: Backing::DmabufPeer, provider, writable: true }
    }

    /// Where the device gets with each range: (offset in what is mapped, physical address, bytes), page by page.
    fn reached(&self, batch: &Batch) -> Vec<(u64, u64, u64)> {
        let mut reached: Vec<(u64, u64, u64)> = Vec::new();
        for MappedRange { at, range, path, .. } in batch.ranges() {
            let mut done = 0;
            while done < range.len {
                let dma = range.dma.offset(done);
                let len = (range.len - done).min(PAGE - dma.page_offset());
                let phys = match (&self.domain, path.is_linked()) {
                    (Some(domain), true) => domain.iova_to_phys(dma.to_iova()).expect("linked").0,
                    _ => dma.0,
                };
                match reached.last_mut() {
                    Some(last) if last.0 + last.2 == at + done && last.1 + last.2 == phys => last.2 += len,
                    _ => reached.push((at + done, phys, len)),
                }
                done += len;
            }
        }
        reached
    }
}

fn places(extents: &[Extent]) -> Vec<(u64, u64, u64)> {
    let mut places: Vec<(u64, u64, u64)> = Vec::new();
    for extent in extents {
        match places.last_mut() {
            Some(last) if last.1 + last.2 == extent.phys.0 => last.2 += extent.len,
            _ => places.push((extent.at, extent.phys.0, extent.len)),
        }
    }
    places
}

#[test]
fn pieces_that_meet_on_granules_are_one_range_with_one_sync() {
    let bed = bed(true, DmaLimits::default(), Points::OFF);
    let domain = bed.domain.as_ref().expect("translated");
    let extents = [
        ram(0, PHYS + 0x200, 0xe00),
        ram(0xe00, PHYS + 9 * PAGE, 3 * PAGE),
        ram(0x3e00, PHYS + 5 * PAGE, 0x100),
    ];
    let before = (domain.stats().mapped_bytes, bed.device.iova_stats().live_bytes);
    let batch = Batch::map(&bed.device, extents).expect("mapped");
    assert_eq!(batch.ranges().len(), 1, "{:?}", batch.ranges());
    assert_eq!((batch.ranges()[0].range.len, batch.reserved()), (0x3f00, 0x3f00));
    assert_eq!(batch.ranges()[0].range.dma.page_offset(), 0x200, "the page offset of the first byte stays");
    assert_eq!(bed.reached(&batch), places(&extents));
    assert_eq!(domain.stats().mapped_bytes, before.0 + 5 * PAGE);
    drop(batch);
    assert_eq!((domain.stats().mapped_bytes, bed.device.iova_stats().live_bytes), before);
}

#[test]
fn a_gap_inside_a_granule_begins_another_range_in_the_same_reservation() {
    let bed = bed(true, DmaLimits::default(), Points::OFF);
    let extents = [
        ram(0, PHYS, 0x800),
        ram(0x800, PHYS + 9 * PAGE + 0x400, 0x1000),
        ram(0x1800, PHYS + 4 * PAGE, PAGE),
    ];
    let batch = Batch::map(&bed.device, extents).expect("mapped");
    assert_eq!(batch.ranges().len(), 3);
    assert_eq!((batch.bytes(), batch.reserved()), (0x2800, 4 * PAGE));
    assert_eq!(bed.reached(&batch), places(&extents));
}

#[test]
fn peers_below_the_switch_take_no_iova_and_are_asked_for_once() {
    let bed = bed(true, DmaLimits::default(), Points::OFF);
    let extents: Vec<_> = (0..40)
        .map(|n| match n % 2 {
            0 => ram(n * PAGE, PHYS + 3 * n * PAGE, PAGE),
            _ => bed.peer(n * PAGE, 2 * n * PAGE, PAGE),
        })
        .collect();
    let asked = bed.port.bus().route_lookups();
    let batch = Batch::map(&bed.device, extents.iter().copied()).expect("mapped");
    assert_eq!(bed.port.bus().route_lookups(), asked + 1);
    assert_eq!(batch.reserved(), 20 * PAGE);
    assert_eq!(batch.ranges().iter().filter(|range| range.path == Path::BusAddress).count(), 20);
    let peer = batch.ranges()[1];
    assert_eq!(
        bed.port.bus().bar(bed.provider).and_then(|bar| bar.to_bus(bed.bar.offset(2 * PAGE))),
        Some(peer.range.dma)
    );
}

#[test]
fn where_nothing_translates_nothing_is_reserved_and_addresses_are_physical() {
    let bed = bed(false, DmaLimits::default(), Points::OFF);
    let extents = [ram(0, PHYS + 5, 100), ram(100, PHYS + 105, 50), ram(150, PHYS + 9 * PAGE, PAGE)];
    let batch = Batch::map(&bed.device, extents).expect("mapped");
    assert_eq!(batch.reserved(), 0);
    let ranges: Vec<_> = batch.dma_ranges().map(|range| (range.dma.0, range.len)).collect();
    assert_eq!(ranges, [(PHYS + 5, 150), (PHYS + 9 * PAGE, PAGE)]);
}

#[test]
fn ranges_are_cut_at_the_limits_of_the_device() {
    let limits = DmaLimits { max_segment: 3 * PAGE, boundary: 16 * PAGE, ..DmaLimits::default() };
    for translated in [true, false] {
        let bed = bed(translated, limits, Points::OFF);
        let extents: Vec<_> = (0..30).map(|n| ram(n * PAGE, PHYS + (n + n / 10) * PAGE, PAGE)).collect();
        let batch = Batch::map(&bed.device, extents.iter().copied()).expect("mapped");
        assert_eq!(bed.reached(&batch), places(&extents));
        for DmaRange { dma, len } in batch.dma_ranges() {
            assert!(
                len <= 3 * PAGE && dma.0 / (16 * PAGE) == (dma.0 + len - 1) / (16 * PAGE),
                "{dma} {len:#x}"
            );
        }
        assert!(batch.ranges().len() <= 14, "{} ranges: cut too often", batch.ranges().len());
    }
}

#[test]
fn what_is_not_a_request_is_refused_by_name() {
    let bed = bed(true, DmaLimits::default(), Points::OFF);
    let refused = |extents: &[Extent]| Batch::map(&bed.device, extents.iter().copied()).err();
    assert_eq!(refused(&[]), Some(BatchError::Empty { at: 0 }));
    assert_eq!(refused(&[ram(0, PHYS, PAGE), ram(PAGE, PHYS, 0)]), Some(BatchError::Empty { at: PAGE }));
    let gap = [ram(0, PHYS, PAGE), ram(PAGE + 1, PHYS, 8)];
    assert_eq!(refused(&gap), Some(BatchError::NotInOrder { at: PAGE + 1, end: PAGE }));
    let private = Extent { backing: Backing::DevicePrivate, ..ram(PAGE, PHYS, PAGE) };
    let reason = Refusal::DevicePrivate;
    assert_eq!(refused(&[ram(0, PHYS, PAGE), private]), Some(BatchError::NoWay { at: PAGE, reason }));
    assert_eq!(bed.device.iova_stats().live_ranges, 0, "nothing stays reserved");
}

#[test]
fn whatever_step_fails_nothing_stays_mapped() {
    let plan = FaultPlan::new(1, Vec::new());
    let bed = bed(true, DmaLimits::default(), Points::with(&plan));
    let domain = bed.domain.as_ref().expect("translated");
    let extents: Vec<_> = (0..4).map(|n| ram(n * PAGE, PHYS + 3 * n * PAGE, PAGE)).collect();
    let before = (domain.stats().mapped_bytes, bed.device.iova_stats().live_ranges);
    let mut failed = Vec::new();
    for nth in 1.. {
        plan.fail_nth_from_now(nth);
        let result = Batch::map(&bed.device, extents.iter().copied());
        let at = plan.failed_at();
        plan.disarm();
        let Some(at) = at else {
            result.expect("nothing failed");
            break;
        };
        assert!(result.is_err(), "{at:?} failed unnoticed");
        failed.push(at.name());
        assert_eq!(
            (domain.stats().mapped_bytes, bed.device.iova_stats().live_ranges),
            before,
            "after {at:?}"
        );
    }
    assert_eq!(failed, ["dma.reserve", "dma.link", "dma.link", "dma.link", "dma.link", "dma.sync"]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_device_reaches_exactly_the_bytes_of_the_extents(
        pieces in prop::collection::vec((0..200_u64, 0..5_u64, 1..9_u64, any::<bool>()), 1..12),
        grain in prop_oneof![Just(512_u64), Just(1024), Just(PAGE)], translated: bool,
    ) {
        let bed = bed(translated, DmaLimits::default(), Points::OFF);
        let mut at = 0;
        let mut extents = Vec::new();
        for (page, into, len, ordinary) in pieces {
            let (offset, len) = (page * PAGE + into * grain, len * grain);
            extents.push(if ordinary { ram(at, PHYS + offset, len) } else { bed.peer(at, offset, len) });
            at += len;
        }
        let batch = Batch::map(&bed.device, extents.iter().copied()).expect("mapped");
        let physical = bed.reached(&batch).into_iter().map(|(at, phys, len)| {
            let bar = bed.port.bus().bar(bed.provider).expect("it is on the bus");
            let into = phys.wrapping_sub(bar.bus_base().0);
            (at, if into < bar.size() { bar.base().0 + into } else { phys }, len)
        });
        prop_assert_eq!(merged(physical), places(&extents));
        let taken = extents.iter().filter(|extent| extent.provider.is_none() && translated);
        let granules: u64 = taken.map(|e| (e.phys.page_offset() + e.len).div_ceil(PAGE) * PAGE).sum();
        prop_assert!(batch.reserved() <= granules);
        drop(batch);
        prop_assert_eq!(bed.domain.map_or(0, |domain| domain.stats().mapped_bytes), 0);
    }
}

fn merged(places: impl Iterator<Item = (u64, u64, u64)>) -> Vec<(u64, u64, u64)> {
    let mut merged: Vec<(u64, u64, u64)> = Vec::new();
    for (at, phys, len) in places {
        match merged.last_mut() {
            Some(last) if last.1 + last.2 == phys => last.2 += len,
            _ => merged.push((at, phys, len)),
        }
    }
    merged
}
