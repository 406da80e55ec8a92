//! What a device still reaches, and when: after a free, in lazy mode, beyond its mask.

use super::*;
use crate::dma::IovaError;
use hw_model::bus::{DmaError, DmaLimits, DmaPort, RamMemory};
use hw_model::iommu::{FlushMode, IommuFault};

/// RAM of 1 MiB, and a device behind an IOMMU that really moves bytes.
fn machine(mode: FlushMode, limits: DmaLimits) -> (Arc<DmaDevice>, Arc<Domain>, DmaPort) {
    let bus = Bus::new(RamMemory::new(1 << 20).expect("1 MiB"));
    let domain =
        Domain::new(DomainConfig { mode, audit: true, ..DomainConfig::default() }).expect("possible");
    let port = bus.attach(DeviceSpec::new("device").domain(&domain).limits(limits)).expect("room");
    (DmaDevice::new(port.clone(), DmaConfig::default()), domain, port)
}

const FRAME: PhysAddr = PhysAddr(0x8000);

fn filled(device: &Arc<DmaDevice>, port: &DmaPort) -> Mapping {
    let mapping = mapping(device, PAGE);
    mapping.link(0, FRAME, PAGE, LeafSize::Page).expect("free");
    mapping.sync(0, PAGE).expect("linked");
    port.write(mapping.dma_address(0), b"seen").expect("linked and synced");
    mapping
}

/// The fault log tells a DMA that came too late, by name, from one that never was allowed.
#[test]
fn a_dma_through_freed_iova_is_stopped_and_logged() {
    let (device, domain, port) = machine(FlushMode::Strict, DmaLimits::default());
    let mapping = filled(&device, &port);
    let at = mapping.dma_address(8);
    mapping.destroy(PAGE).expect("all that was linked");
    let refused = port.write(at, b"late");
    assert_eq!(refused, Err(DmaError::Iommu { iova: at.to_iova(), reason: IommuFault::NotPresent }));
    let log = domain.faults().recent();
    assert_eq!((log.len(), log[0].device, log[0].iova), (1, port.device(), at.to_iova()));
    assert_eq!((log[0].last_mapped, log[0].unsynced), (Some(FRAME.offset(8)), false));
    let mut bytes = [0; 12];
    port.bus().memory().read(FRAME, &mut bytes).expect("RAM");
    assert_eq!(&bytes, b"seen\0\0\0\0\0\0\0\0", "not a byte of it landed");
    assert_eq!(domain.stats().stale_hits, 0);
}

#[test]
fn a_dma_before_the_sync_is_logged_as_unsynced() {
    let (device, domain, port) = machine(FlushMode::Strict, DmaLimits::default());
    let mapping = mapping(&device, PAGE);
    port.read(mapping.dma_address(0), &mut [0]).expect_err("nothing is linked; the IOTLB remembers that");
    mapping.link(0, FRAME, PAGE, LeafSize::Page).expect("free");
    port.read(mapping.dma_address(0), &mut [0]).expect_err("not synced");
    assert!(domain.faults().recent()[1].unsynced);
    mapping.sync(0, PAGE).expect("linked");
    port.read(mapping.dma_address(0), &mut [0]).expect("synced");
    mapping.unlink(0, PAGE).expect("linked");
}

#[test]
fn lazily_destroyed_iova_is_reachable_and_kept_from_others_until_one_flush_for_all() {
    let (device, domain, port) = machine(FlushMode::Lazy, DmaLimits::default());
    let mapping = filled(&device, &port);
    let (at, flushes) = (mapping.dma_address(0), domain.stats().iotlb.flushes);
    mapping.destroy(PAGE).expect("all that was linked");
    mapping.destroy(PAGE).expect_err("once");
    port.write(at, b"late").expect("the window that lazy mode leaves open");
    assert_eq!((domain.stats().stale_hits, domain.stats().iotlb.flushes), (1, flushes));
    assert_eq!(device.iova_stats().live_ranges, 1, "the IOVA waits");
    let other = self::mapping(&device, PAGE);
    assert_ne!(other.dma_address(0), at);
    assert!(!device.poll_flush(0), "asked for the first time");
    assert!(device.poll_flush(u64::MAX));
    assert_eq!((domain.stats().iotlb.flushes, device.iova_stats().live_ranges), (flushes + 1, 1));
    port.write(at, b"late").expect_err("flushed");
    assert!(!device.poll_flush(u64::MAX), "nothing waits");
}

#[test]
fn unlink_and_free_are_strict_in_lazy_mode_too() {
    let (device, domain, port) = machine(FlushMode::Lazy, DmaLimits::default());
    let mapping = filled(&device, &port);
    mapping.unlink(0, PAGE).expect("linked");
    port.write(mapping.dma_address(0), b"late").expect_err("flushed at once");
    mapping.free().expect("empty");
    assert_eq!((device.iova_stats().live_ranges, domain.stats().stale_hits), (0, 0));
}

/// 2048 MiB and a bit fit below 4 GiB; what waits for a flush is flushed before anybody is refused.
#[test]
fn what_waits_for_a_flush_is_no_reason_for_exhaustion() {
    let config = DomainConfig { mode: FlushMode::Lazy, width: 32, ..DomainConfig::default() };
    let domain = Domain::new(config).expect("possible");
    let device = DmaDevice::over(Arc::clone(&domain) as _, DmaConfig::default());
    for _ in 0..3 {
        let mapping = mapping(&device, 3 << 30);
        mapping.link(0, PHYS, PAGE, LeafSize::Page).expect("free");
        mapping.destroy(PAGE).expect("all that was linked");
    }
    assert_eq!(domain.stats().iotlb.flushes, 2);
}

#[test]
fn mappings_lie_where_the_device_reaches() {
    let limits = DmaLimits { mask_bits: 30, ..DmaLimits::default() };
    let (device, _, _) = machine(FlushMode::Strict, limits);
    let mapping = mapping(&device, 1 << 29);
    assert!(limits.reaches(mapping.dma_address(0), mapping.len()));
    let Err(error) = Mapping::try_alloc(&device, 1 << 30, 0) else { panic!("0 is never given out") };
    let IovaError::Exhausted { last, free, largest_hole, .. } = error else { panic!("{error}") };
    assert_eq!((last, free), (Iova((1 << 30) - 1), (1 << 30) - (1 << 29) - PAGE));
    assert!(largest_hole <= free && error.to_string().contains("48 bits exhausted"), "{error}");
}

#[test]
fn mappings_lie_below_4_gib_unless_told_otherwise() {
    let domain = Domain::new(DomainConfig::default()).expect("possible");
    for (high_first, expected) in [(false, true), (true, false)] {
        let config = DmaConfig { high_first, ..DmaConfig::default() };
        let device = DmaDevice::over(Arc::clone(&domain) as _, config);
        assert_eq!(mapping(&device, PAGE).iova().0 >> 32 == 0, expected);
    }
}

#[test]
fn only_a_dense_prefix_is_destroyed() {
    let (device, domain, _) = machine(FlushMode::Lazy, DmaLimits::default());
    let mapping = mapping(&device, 4 * PAGE);
    mapping.link(0, FRAME, 2 * PAGE, LeafSize::Page).expect("free");
    mapping.link(3 * PAGE, FRAME, PAGE, LeafSize::Page).expect("free");
    assert!(matches!(mapping.destroy(4 * PAGE), Err(DestroyError::Unlink(UnlinkError::Unmap(_)))));
    assert_eq!(mapping.linked(), 3 * PAGE, "nothing of it went");
    let left = StillLinked { iova: mapping.iova(), linked: PAGE };
    assert_eq!(mapping.destroy(2 * PAGE), Err(left.into()));
    assert_eq!((domain.stats().mapped_bytes, device.iova_stats().live_ranges), (PAGE, 1));
    assert!(domain.stats().iotlb.flushes > 0, "what went was flushed, for nobody will flush it later");
    mapping.unlink(3 * PAGE, PAGE).expect("linked");
    mapping.destroy(0).expect("empty");
}
