use super::*;
use crate::bounce::BounceRequest;
use crate::bus::{
    AtomicOp, DmaError, DmaLimits, IommuFault, MemoryError, PeerRoutes, PrivatePages, RamMemory,
};
use crate::iommu::{DomainConfig, Prot};

const MIB: u64 = 1 << 20;

fn memory() -> Arc<dyn HostMemory> {
    RamMemory::new(4 * MIB).expect("4 MiB")
}

fn domain() -> Arc<Domain> {
    Domain::new(DomainConfig::default()).expect("the default is possible")
}

/// Two devices below one switch, the first with a BAR of 64 KiB, the second in `translation`.
fn below_a_switch(config: BusConfig, acs: Acs, translation: Translation) -> (Arc<Bus>, Arc<Bar>, DmaPort) {
    let bus = Bus::with_config(memory(), config);
    let root = bus.add_root_port(bus.first_bridge(), Acs::Off).expect("fits");
    let switch = bus.add_switch(root).expect("fits");
    let ports = [0, 1].map(|_| bus.add_downstream_port(switch, acs).expect("fits"));
    let gpu = bus.attach(DeviceSpec::new("gpu").under(ports[0])).expect("fits");
    let nic = bus.attach(DeviceSpec::new("nic").under(ports[1]).translation(translation)).expect("fits");
    let bar = bus.add_ram_bar(gpu.device(), 64 << 10).expect("room");
    (bus, bar, nic)
}

fn stored(bar: &Bar, offset: u64) -> u8 {
    let mut byte = [0];
    bar.storage().read(offset, &mut byte).expect("in the BAR");
    byte[0]
}

#[test]
fn a_peer_below_the_same_switch_answers_to_its_bus_address_past_the_iommu() {
    for bus_offset in [0, 0x1000_0000_0000] {
        let config = BusConfig { bus_offset, forwarding: Forwarding::None, ..BusConfig::default() };
        let (bus, bar, nic) = below_a_switch(config, Acs::Off, Translation::Domain(domain()));
        assert_eq!(nic.peer_route(bar.provider()), Some(PeerRoute::BusAddress));
        let at = bar.to_bus(bar.base().offset(0x123)).expect("in the BAR");
        assert_eq!(at.0, bar.base().0 + 0x123 - bus_offset);
        nic.write(at, &[7]).expect("the switch routes it");
        assert_eq!(stored(&bar, 0x123), 7);
        assert_eq!((bar.bursts_by_bus_address(), bar.bursts_through_host_bridge()), (1, 0));
        let stats = nic.domain().expect("has one").stats();
        assert_eq!((stats.iotlb.hits, stats.iotlb.misses, stats.faults), (0, 0, 0), "the IOMMU never saw it");
        let (window, size) = bus.bus_window();
        assert!(at >= window && at.0 - window.0 < size, "an IOVA allocator keeps clear of it");
    }
}

#[test]
fn with_acs_the_same_address_goes_up_and_the_iommu_stops_it() {
    let (_, bar, nic) = below_a_switch(BusConfig::default(), Acs::Redirect, Translation::Domain(domain()));
    assert_eq!(nic.peer_route(bar.provider()), Some(PeerRoute::HostBridge));
    let refused = nic.write(bar.bus_base(), &[7]).unwrap_err();
    assert_eq!(refused, DmaError::Iommu { iova: bar.bus_base().to_iova(), reason: IommuFault::NotPresent });
    assert_eq!(stored(&bar, 0), 0);
}

#[test]
fn through_the_host_bridge_a_bar_is_mapped_as_any_page() {
    let (_, bar, nic) = below_a_switch(BusConfig::default(), Acs::Redirect, Translation::Domain(domain()));
    let domain = nic.domain().expect("has one");
    let iova = crate::addr::Iova(0x10_0000);
    domain.map(iova, bar.base(), 0x1000, Prot::READ_WRITE | Prot::MMIO).expect("free");
    nic.write(iova.to_dma().offset(5), &[9]).expect("mapped");
    let mut back = [0];
    nic.read(iova.to_dma().offset(5), &mut back).expect("mapped");
    assert_eq!((stored(&bar, 5), back[0]), (9, 9));
    assert_eq!(nic.atomic(iova.to_dma(), AtomicOp::FetchAdd(3)), Ok(9 << 40));
    assert_eq!((bar.bursts_by_bus_address(), bar.bursts_through_host_bridge()), (0, 3));
}

#[test]
fn a_host_bridge_that_does_not_forward_loses_the_request() {
    let config = BusConfig { forwarding: Forwarding::None, ..BusConfig::default() };
    let (_, bar, nic) = below_a_switch(config, Acs::Redirect, Translation::None);
    assert_eq!(nic.peer_route(bar.provider()), Some(PeerRoute::NotSupported));
    let at = bar.base().to_dma_identity();
    assert_eq!(nic.write(at, &[1]), Err(DmaError::Unrouted { at }));
    assert_eq!(stored(&bar, 0), 0);
}

#[test]
fn devices_without_translation_reach_ram_and_bars_by_physical_address() {
    for translation in [Translation::None, Translation::Bypass] {
        let (bus, bar, nic) = below_a_switch(BusConfig::default(), Acs::Redirect, translation);
        nic.write(DmaAddr(0x2000), b"ram").expect("RAM");
        let mut back = [0; 3];
        bus.memory().read(PhysAddr(0x2000), &mut back).expect("RAM");
        assert_eq!(&back, b"ram");
        nic.write(bar.base().to_dma_identity(), &[4]).expect("forwarded");
        assert_eq!(stored(&bar, 0), 4);
        let nowhere = bar.base().offset(1 << 30).to_dma_identity();
        assert_eq!(nic.write(nowhere, &[1]), Err(DmaError::Unrouted { at: nowhere }));
        let beyond = DmaAddr(4 * MIB);
        let unbacked = MemoryError::Unbacked { at: PhysAddr(4 * MIB) };
        assert_eq!(nic.write(beyond, &[1]), Err(DmaError::Memory(unbacked)));
    }
}

/// With an IO page of half a host page, one burst within a page needs two translations.
#[test]
fn a_burst_that_leaves_its_io_page_is_translated_again() {
    let domain =
        Domain::new(DomainConfig { granule_shift: 11, ..DomainConfig::default() }).expect("possible");
    let bus = Bus::new(memory());
    let nic = bus.attach(DeviceSpec::new("nic").domain(&domain)).expect("fits");
    let iova = crate::addr::Iova(0x1_0000);
    domain.map(iova, PhysAddr(0x8000), 0x800, Prot::READ_WRITE).expect("free");
    domain.map(iova.offset(0x800), PhysAddr(0x3000), 0x800, Prot::READ_WRITE).expect("free");
    let data: Vec<u8> = (0..16).collect();
    nic.write(iova.to_dma().offset(0x7f8), &data).expect("both mapped");
    let mut back = [0; 8];
    bus.memory().read(PhysAddr(0x87f8), &mut back).expect("RAM");
    assert_eq!(back, data[..8]);
    bus.memory().read(PhysAddr(0x3000), &mut back).expect("RAM");
    assert_eq!(back, data[8..]);
    let mut whole = [0; 16];
    nic.read(iova.to_dma().offset(0x7f8), &mut whole).expect("both mapped");
    assert_eq!(whole, data[..]);
}

#[test]
fn one_look_up_a_provider_however_many_pages() {
    let (bus, bar, nic) = below_a_switch(BusConfig::default(), Acs::Off, Translation::None);
    let second = bus.add_ram_bar(bar.device(), 8 << 10).expect("room");
    let mut routes = PeerRoutes::default();
    for _ in 0..1000 {
        assert_eq!(routes.route(&nic, bar.provider()), Some(PeerRoute::BusAddress));
    }
    assert_eq!((bus.route_lookups(), bus.routes_computed()), (1, 1));
    for _ in 0..1000 {
        assert_eq!(routes.route(&nic, second.provider()), Some(PeerRoute::BusAddress));
    }
    assert_eq!(bus.route_lookups(), 2);
    assert_eq!(nic.peer_route(bar.provider()), Some(PeerRoute::BusAddress));
    assert_eq!((bus.route_lookups(), bus.routes_computed()), (3, 2), "the bus remembers its answers");
    nic.write(bar.bus_base(), &[1]).expect("routed");
    assert_eq!(bus.route_lookups(), 3, "a DMA asks nothing");
    assert_eq!(nic.peer_route(ProviderId(60)), None);
}

#[test]
fn bars_are_aligned_powers_of_two_in_their_window() {
    let config = BusConfig { mmio_size: 3 << 16, ..BusConfig::default() };
    let bus = Bus::with_config(memory(), config);
    let device = bus.attach(DeviceSpec::new("gpu")).expect("fits").device();
    assert_eq!(bus.add_ram_bar(device, 12 << 10).unwrap_err(), BarError::Size { size: 12 << 10 });
    assert_eq!(bus.add_ram_bar(device, 2048).unwrap_err(), BarError::Size { size: 2048 });
    let stranger = DeviceId(9);
    assert_eq!(bus.add_ram_bar(stranger, 4096).unwrap_err(), BarError::NoDevice { device: stranger });
    let small = bus.add_ram_bar(device, 4096).expect("room");
    let large = bus.add_ram_bar(device, 1 << 16).expect("room");
    assert_eq!(small.base(), config.mmio_base);
    assert_eq!(large.base(), config.mmio_base.offset(1 << 16), "naturally aligned");
    assert_eq!(
        bus.add_ram_bar(device, 1 << 17).unwrap_err(),
        BarError::WindowFull { size: 1 << 17, left: 1 << 16 }
    );
    assert_eq!(bus.bar(large.provider()).expect("there").base(), large.base());
    assert!(bus.bar_at(small.base().offset(4096)).is_none());
    assert_eq!(large.to_bus(small.base()), None);
    assert_eq!(bus.device_name(device).as_deref(), Some("gpu"));

    let bus = Bus::new(memory());
    let device = bus.attach(DeviceSpec::new("gpu")).expect("fits").device();
    for _ in 0..MAX_BARS {
        bus.add_ram_bar(device, 4096).expect("room");
    }
    assert_eq!(bus.add_ram_bar(device, 4096).unwrap_err(), BarError::TooMany);
}

#[test]
fn a_copy_past_the_end_of_a_bar_lands_nowhere() {
    let (_, bar, nic) = below_a_switch(BusConfig::default(), Acs::Off, Translation::None);
    let last = bar.bus_base().offset(bar.size() - 1);
    let beyond = MemoryError::Unbacked { at: bar.base().offset(bar.size()) };
    assert_eq!(nic.write(last, &[1, 2]), Err(DmaError::Memory(beyond)));
    assert_eq!(stored(&bar, bar.size() - 1), 0);
}

#[test]
fn a_device_cannot_put_more_address_on_the_bus_than_it_has_wires_for() {
    let bus = Bus::new(memory());
    let limits = DmaLimits { mask_bits: 20, ..DmaLimits::default() };
    let device = bus.attach(DeviceSpec::new("old").limits(limits)).expect("fits");
    device.write(DmaAddr((1 << 20) - 1), &[1]).expect("within 20 bits");
    let at = DmaAddr(1 << 20);
    assert_eq!(device.write(at, &[1]), Err(DmaError::BeyondMask { at, bits: 20 }));
    assert_eq!((device.limits().last().0, device.is_trusted()), ((1 << 20) - 1, true));
}

#[test]
fn private_memory_is_stopped_at_the_bus_and_reached_through_the_bounce_pool() {
    let private = Arc::new(PrivatePages::new());
    private.make_private(PhysAddr(0), 4 * MIB);
    private.share(PhysAddr(0x3000), PAGE_SIZE);
    let memory = RamMemory::encrypted(4 * MIB, Arc::clone(&private)).expect("4 MiB");
    let config = BusConfig { bounce: Some(BounceConfig::default()), ..BusConfig::default() };
    let bus = Bus::with_config(Arc::clone(&memory) as _, config);
    let bypass = bus.attach(DeviceSpec::new("bypass").untrusted()).expect("fits");
    let behind = bus.attach(DeviceSpec::new("behind").domain(&domain())).expect("fits");
    let mapped = behind.domain().expect("has one");
    let iova = crate::addr::Iova(0x10_0000);
    mapped.map(iova, PhysAddr(0x1000), 0x1000, Prot::READ_WRITE).expect("free");

    let stopped = Err(DmaError::Private { at: PhysAddr(0x1004) });
    let mut word = [0; 4];
    assert_eq!(bypass.write(DmaAddr(0x1004), b"leak"), stopped);
    assert_eq!(behind.read(iova.to_dma().offset(4), &mut word), stopped);
    assert_eq!(private.refused(), 2);
    bypass.write(DmaAddr(0x3000), b"open").expect("shared");

    memory.write(PhysAddr(0x1004), b"mine").expect("the CPU reaches it");
    let pool = bus.bounce().expect("configured");
    let mut slot = memory.epoch().register().expect("a slot");
    let burst = slot.enter().expect("open");
    let ask =
        BounceRequest { origin: PhysAddr(0x1004), len: 4, granule: PAGE_SIZE, trusted: bypass.is_trusted() };
    let bounce = pool.map(ask, &*memory, &burst).expect("room");
    let at = bounce.phys().to_dma_identity();
    bypass.read(at, &mut word).expect("the pool is shared");
    assert_eq!(&word, b"mine");
    bypass.write(at, b"DMA!").expect("the pool is shared");
    mapped.map(iova.offset(0x1000), bounce.phys().page_start(), 0x1000, Prot::READ_WRITE).expect("free");
    behind.read(iova.offset(0x1004).to_dma(), &mut word).expect("through the IOMMU as well");
    assert_eq!(&word, b"DMA!");
    pool.unmap(bounce, &*memory, &burst).expect("RAM is there");
    memory.read(PhysAddr(0x1004), &mut word).expect("the CPU reaches it");
    assert_eq!(&word, b"DMA!");
}
