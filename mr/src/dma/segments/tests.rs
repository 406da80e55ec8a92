//! Where paths begin and end.

use super::*;
use crate::dma::DmaConfig;
use hw_model::addr::PAGE_SIZE;
use hw_model::bus::{Acs, Bus, DeviceSpec, DmaLimits, ProviderId};
use hw_model::iommu::{Domain, DomainConfig};
use hw_model::sync::Arc;
use odp::space::AddressSpace;
use odp::space::process::{Options, ProcessSpace};

const PAGE: u64 = PAGE_SIZE;

/// A device behind an IOMMU, a peer below the same switch and one behind the host bridge, each with a BAR of 64 KiB.
struct Stand {
    bus: Arc<Bus>,
    device: Arc<DmaDevice>,
    near: Extent,
    far: Extent,
}

fn stand() -> Stand {
    let space = ProcessSpace::open(Options::default()).expect("this process can use its own memory");
    let bus = Bus::new(space.memory());
    let root = bus.add_root_port(bus.first_bridge(), Acs::Off).expect("a place");
    let switch = bus.add_switch(root).expect("a place");
    let [one, other] = [(); 2].map(|()| bus.add_downstream_port(switch, Acs::Off).expect("a place"));
    let domain = Domain::new(DomainConfig::default()).expect("the default is possible");
    let port = bus.attach(DeviceSpec::new("device").domain(&domain).under(one)).expect("a place");
    let peers = [DeviceSpec::new("near").under(other), DeviceSpec::new("far")];
    let [near, far] = peers.map(|spec| {
        let peer = bus.attach(spec).expect("a place");
        let bar = bus.add_ram_bar(peer.device(), 0x1_0000).expect("room");
        let provider = Some(bar.provider());
        let backing = Backing::DmabufPeer;
        Extent { at: 0, phys: bar.base(), len: PAGE, backing, provider, writable: true }
    });
    Stand { bus, device: DmaDevice::new(port, DmaConfig::default()), near, far }
}

fn ram(at: u64, phys: u64, len: u64) -> Extent {
    let (phys, backing) = (PhysAddr(phys), Backing::Anonymous);
    Extent { at, phys, len, backing, provider: None, writable: true }
}

impl Stand {
    fn segments(&self, extents: impl IntoIterator<Item = Extent>) -> Vec<(u64, u64, Path)> {
        let segments = Segments::new(&self.device, extents);
        segments
            .map(|step| step.map(|segment| (segment.at, segment.len, segment.path)).expect("a way"))
            .collect()
    }
}

#[test]
fn extents_that_continue_each_other_are_one_segment() {
    let extents = [ram(0, 0x8200, 0xe00), ram(0xe00, 0x9000, PAGE), ram(0x1e00, 0xa000, 0x10)];
    assert_eq!(stand().segments(extents), [(0, 0x1e10, Path::Iova)]);
}

#[test]
fn a_gap_for_the_user_or_in_memory_and_every_difference_begins_a_segment() {
    let first = ram(0, 0x8000, PAGE);
    let next = ram(PAGE, 0x9000, PAGE);
    let others = [
        Extent { at: 2 * PAGE, ..next },
        Extent { phys: PhysAddr(0xa000), ..next },
        Extent { backing: Backing::File, ..next },
        Extent { writable: false, ..next },
    ];
    for other in others {
        assert_eq!(stand().segments([first, other]).len(), 2, "{other:?}");
    }
    let top = ram(u64::MAX - PAGE + 1, 0x8000, PAGE);
    assert_eq!(stand().segments([top, ram(0, 0x9000, PAGE)]).len(), 2, "nothing follows the top");
}

#[test]
fn every_way_in_one_list_with_one_look_up_a_provider() {
    let stand = stand();
    let near = |page| Extent { at: page * PAGE, ..stand.near };
    let far = |page| Extent { at: page * PAGE, ..stand.far };
    let extents = [ram(0, 0x8000, PAGE), near(1), near(2), far(3), far(4), ram(5 * PAGE, 0xd000, PAGE)];
    let paths: Vec<_> = stand.segments(extents).into_iter().map(|(_, _, path)| path).collect();
    let [bus, bridge] = [Path::BusAddress, Path::HostBridge];
    assert_eq!(paths, [Path::Iova, bus, bus, bridge, bridge, Path::Iova]);
    assert_eq!(stand.bus.route_lookups(), 2);
}

#[test]
fn a_bus_address_is_the_bars_own_and_follows_the_segment() {
    let stand = stand();
    let bar = stand.bus.bar(stand.near.provider.expect("a peer")).expect("on the bus").clone();
    let halves = [0, PAGE].map(|at| Extent { at, phys: stand.near.phys.offset(at), ..stand.near });
    let segments: Vec<_> = Segments::new(&stand.device, halves).collect::<Result<_, _>>().expect("a way");
    assert_eq!(segments.len(), 1, "two halves of one range");
    assert_eq!(segments[0].unlinked_address(PAGE + 8), bar.bus_base().offset(PAGE + 8));
}

#[test]
fn what_cannot_be_reached_is_refused_where_it_begins() {
    let stand = stand();
    let lost = Extent { at: PAGE, provider: Some(ProviderId(63)), ..stand.near };
    let mut segments = Segments::new(&stand.device, [ram(0, 0x8000, PAGE), lost]);
    assert!(segments.next().is_some_and(|step| step.is_ok()));
    assert_eq!(segments.next(), Some(Err((PAGE, Refusal::PeerUnreachable))));
    assert_eq!(segments.next(), None);
}

/// A device without an IOMMU whose limits are all in the way.
fn narrow(bus: &Arc<Bus>, limits: DmaLimits) -> Arc<DmaDevice> {
    let port = bus.attach(DeviceSpec::new("narrow").limits(limits)).expect("a place");
    DmaDevice::new(port, DmaConfig::default())
}

#[test]
fn what_is_not_linked_is_cut_at_the_longest_segment_and_at_the_boundary() {
    let bus = stand().bus;
    let limits = DmaLimits { max_segment: 0x3000, boundary: 0x1_0000, ..DmaLimits::default() };
    let device = narrow(&bus, limits);
    let extents = [ram(0, 0xe800, 0x800), ram(0x800, 0xf000, 0x5000)];
    let cut: Vec<_> = Segments::new(&device, extents).collect::<Result<_, _>>().expect("a way");
    let pieces: Vec<_> =
        cut.iter().map(|segment| (segment.at, segment.len, segment.unlinked_address(segment.at).0)).collect();
    assert_eq!(pieces, [(0, 0x1800, 0xe800), (0x1800, 0x3000, 0x1_0000), (0x4800, 0x1000, 0x1_3000)]);
    let same: Vec<_> = device.pieces(DmaAddr(0xe800), 0x5800).map(|(at, len)| (len, at.0)).collect();
    assert_eq!(same, [(0x1800, 0xe800), (0x3000, 0x1_0000), (0x1000, 0x1_3000)]);
    assert_eq!(device.pieces(DmaAddr(0), 0).count(), 0);
}

#[test]
fn what_is_linked_is_one_segment_whatever_the_limits_and_cut_by_its_iova() {
    let Stand { bus, .. } = stand();
    let domain = Domain::new(DomainConfig::default()).expect("the default is possible");
    let limits = DmaLimits { max_segment: 0x3000, mask_bits: 32, ..DmaLimits::default() };
    let port = bus.attach(DeviceSpec::new("narrow").domain(&domain).limits(limits)).expect("a place");
    let device = DmaDevice::new(port, DmaConfig::default());
    let beyond = ram(0, 1 << 40, 0x8000);
    let cut: Vec<_> = Segments::new(&device, [beyond]).collect::<Result<_, _>>().expect("a way");
    assert_eq!((cut.len(), cut[0].len, cut[0].path), (1, 0x8000, Path::Iova), "its IOVA is within reach");
}

#[test]
fn a_bar_beyond_the_mask_is_refused_and_so_is_one_cut_by_it() {
    let Stand { bus, far, .. } = stand();
    let device = narrow(&bus, DmaLimits { mask_bits: 32, ..DmaLimits::default() });
    assert_eq!(Segments::new(&device, [far]).next(), Some(Err((0, Refusal::BounceOfMmio))));
    let reach = DmaLimits { mask_bits: 46, ..DmaLimits::default() };
    let wide = narrow(&bus, reach);
    let whole = Segments::new(&wide, [far]).next().expect("a segment").expect("within reach");
    assert_eq!((whole.path, whole.unlinked_address(0).0), (Path::Direct, far.phys.0));
}

#[test]
fn part_of_a_segment_is_where_it_was() {
    let stand = stand();
    let whole = Segments::new(&stand.device, [Extent { at: PAGE, len: 4 * PAGE, ..stand.near }]);
    let whole: Segment = whole.map(|step| step.expect("a way")).next().expect("one");
    let part = whole.part(3 * PAGE, PAGE);
    assert_eq!((part.at, part.len, part.phys), (3 * PAGE, PAGE, whole.phys_at(3 * PAGE)));
    assert_eq!(part.unlinked_address(3 * PAGE), whole.unlinked_address(3 * PAGE));
}
