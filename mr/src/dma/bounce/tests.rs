//! What bounces, where the bytes are at each moment, and that nothing stays taken.

use super::*;
use crate::dma::{DmaConfig, Extent, LinkError, Mapping, Policy, Refusal, Segment, Segments};
use hw_model::bounce::{BounceConfig, BounceError as PoolError};
use hw_model::bus::{Bus, BusConfig, DeviceSpec, DmaLimits, PrivatePages, RamMemory};
use hw_model::fault_plan::{Action, FaultPlan, Points, Rule};
use hw_model::hca::{Backing, Path};
use hw_model::iommu::{Domain, DomainConfig, LeafSize};

const PAGE: u64 = PAGE_SIZE;

/// RAM of 1 MiB with a pool of `segments` of 256 KiB.
struct Stand {
    bus: Arc<Bus>,
    memory: Arc<RamMemory>,
    domain: Arc<Domain>,
}

fn stand(granule_shift: u32, segments: u64) -> Stand {
    let memory = RamMemory::new(1 << 20).expect("1 MiB");
    let pool = BounceConfig { size: segments * SEGMENT_SIZE, ..BounceConfig::default() };
    let bounce = (segments > 0).then_some(pool);
    let bus = Bus::with_config(Arc::clone(&memory) as _, BusConfig { bounce, ..BusConfig::default() });
    let config = DomainConfig { granule_shift, audit: true, ..DomainConfig::default() };
    let domain = Domain::new(config).expect("possible");
    Stand { bus, memory, domain }
}

impl Stand {
    fn device(&self, policy: Policy, spec: DeviceSpec) -> (Arc<DmaDevice>, DmaPort) {
        let port = self.bus.attach(spec).expect("room on the bus");
        (DmaDevice::new(port.clone(), DmaConfig { policy, ..DmaConfig::default() }), port)
    }
    /// A device that is not trusted, behind the IOMMU.
    fn stranger(&self, policy: Policy) -> (Arc<DmaDevice>, DmaPort) {
        self.device(policy, DeviceSpec::new("stranger").domain(&self.domain).untrusted())
    }
    /// A device that nothing translates for, and that reaches 64 KiB and, to get at the pool, nothing of the rest.
    fn short(&self, policy: Policy) -> (Arc<DmaDevice>, DmaPort) {
        let limits = DmaLimits { mask_bits: 16, ..DmaLimits::default() };
        let port = self.bus.attach(DeviceSpec::new("short")).expect("room on the bus");
        let config = DmaConfig { policy, limits: Some(limits), ..DmaConfig::default() };
        (DmaDevice::new(port.clone(), config), port)
    }
    fn used(&self) -> u64 {
        self.bus.bounce().expect("a pool").stats().used
    }
    fn write(&self, at: PhysAddr, bytes: &[u8]) {
        self.memory_of().write(at, bytes).expect("RAM");
    }
    fn memory_of(&self) -> &dyn HostMemory {
        &*self.memory
    }
    fn read(&self, at: PhysAddr, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory_of().read(at, &mut bytes).expect("RAM");
        bytes
    }
}

fn ram(phys: u64, len: u64) -> Extent {
    let (phys, backing) = (PhysAddr(phys), Backing::Anonymous);
    Extent { at: 0, phys, len, backing, provider: None, writable: true }
}

fn segments(device: &DmaDevice, extent: Extent) -> Result<Vec<Segment>, (u64, Refusal)> {
    Segments::new(device, [extent]).collect()
}

fn paths(segments: &[Segment]) -> Vec<(u64, u64, Path)> {
    segments.iter().map(|segment| (segment.at, segment.len, segment.path)).collect()
}

fn mapping(device: &Arc<DmaDevice>, extent: Extent) -> Mapping {
    Mapping::try_alloc(device, extent.len, extent.phys.0).expect("room").expect("a domain translates")
}

fn dma_read(port: &DmaPort, at: DmaAddr, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    port.read(at, &mut bytes).expect("linked");
    bytes
}

#[test]
fn head_and_tail_bounce_the_middle_does_not_and_the_device_sees_one_range() {
    let stand = stand(12, 1);
    let (device, port) = stand.stranger(Policy::Legacy);
    let extent = ram(0x8e00, 0x3400);
    let data: Vec<u8> = (0..0x3400_u32).map(|at| (at % 251) as u8 + 1).collect();
    for (page, bytes) in [(0x8e00, 0..0x200), (0x9000, 0x200..0x1200), (0xa000, 0x1200..0x2200)] {
        stand.write(PhysAddr(page), &data[bytes]);
    }
    stand.write(PhysAddr(0xb000), &data[0x2200..0x3200]);
    stand.write(PhysAddr(0xc000), &data[0x3200..]);
    stand.write(PhysAddr(0xc200), b"somebody else's");
    stand.write(PhysAddr(0x8d00), b"somebody else's");
    let segments = segments(&device, extent).expect("a way");
    let expected = [(0, 0x200, Path::Bounce), (0x200, 0x3000, Path::Iova), (0x3200, 0x200, Path::Bounce)];
    assert_eq!(paths(&segments), expected);

    let mapping = mapping(&device, extent);
    for segment in &segments {
        mapping.link_segment(segment, LeafSize::Huge).expect("room");
    }
    mapping.sync(0, extent.len).expect("linked");
    assert!(mapping.has_bounced() && stand.used() == 4, "two IO pages of two slots");
    let seen: Vec<u8> =
        (0..0x3400).step_by(0x200).flat_map(|at| dma_read(&port, mapping.dma_address(at), 0x200)).collect();
    assert_eq!(seen, data, "one range for the device");
    let first_page = DmaAddr(mapping.iova().0 & !(PAGE - 1));
    let beside = [(first_page, 0xe00), (mapping.dma_address(0x3400), 0xe00)];
    for (at, len) in beside {
        assert_eq!(dma_read(&port, at, len), vec![0; len], "what lies beside the data is zeroed");
    }
    assert!((0..0x3400).all(|at| mapping.leads_to(at, extent.phys.offset(at))));
    assert!(!mapping.leads_to(0, extent.phys.offset(1)));

    for at in [0, 0x400, 0x3300] {
        port.write(mapping.dma_address(at), b"device").expect("linked");
    }
    assert_eq!(stand.read(PhysAddr(0x8e00), 6), data[..6], "the head is a copy");
    assert_eq!(stand.read(PhysAddr(0x9200), 6), b"device", "the middle is the memory");
    mapping.sync_for_cpu(0x10, 0x3300 - 0x10).expect("in the mapping");
    assert_eq!(stand.read(PhysAddr(0xc100), 6), data[0x3300..0x3306], "the sync ends where it was told to");
    mapping.sync_for_cpu(0, 6).expect("in the mapping");
    assert_eq!(stand.read(PhysAddr(0x8e00), 6), b"device");
    stand.write(PhysAddr(0x8e00), b"CPU");
    assert_eq!(dma_read(&port, mapping.dma_address(0), 3), b"dev");
    mapping.sync_for_device(0, 0x200).expect("in the mapping");
    assert_eq!(dma_read(&port, mapping.dma_address(0), 3), b"CPU");

    mapping.unlink(0, extent.len).expect("linked in three calls, unlinked in one");
    assert_eq!(stand.read(PhysAddr(0xc100), 6), b"device", "unlinking copies back");
    assert_eq!(stand.read(PhysAddr(0xc200), 15), b"somebody else's");
    mapping.free().expect("empty");
    let stats = stand.domain.stats();
    assert_eq!((stand.used(), stats.mapped_bytes, stats.violations, stats.stale_hits), (0, 0, 0, 0));
}

#[test]
fn under_the_policy_coherent_the_same_is_refused_by_name_where_it_would_bounce() {
    let stand = stand(12, 1);
    let (device, _) = stand.stranger(Policy::Coherent);
    assert_eq!(segments(&device, ram(0x8e00, 0x3200)), Err((0, Refusal::WouldBounce)));
    assert_eq!(segments(&device, ram(0x8000, 0x3200)), Err((0x3000, Refusal::WouldBounce)));
    let whole = segments(&device, ram(0x8000, 0x3000)).expect("whole IO pages");
    assert_eq!(paths(&whole), [(0, 0x3000, Path::Iova)]);
    let (trusted, _) = stand.device(Policy::Coherent, DeviceSpec::new("trusted").domain(&stand.domain));
    let any = segments(&trusted, ram(0x8e00, 0x3210)).expect("a trusted device sees whole IO pages");
    assert_eq!(paths(&any), [(0, 0x3210, Path::Iova)]);
}

#[test]
fn without_a_pool_the_policy_legacy_refuses_too() {
    let stand = stand(12, 0);
    let (device, _) = stand.stranger(Policy::Legacy);
    assert_eq!(segments(&device, ram(0x8e00, 0x3200)), Err((0, Refusal::WouldBounce)));
    let mapping = mapping(&device, ram(0x8000, PAGE));
    let refused = mapping.link_bounced(0, PhysAddr(0x8000), PAGE);
    assert_eq!(refused, Err(LinkError::Bounce(BounceError::NoPool)));
    assert_eq!(mapping.linked(), 0);
}

#[test]
fn what_is_smaller_than_the_io_page_bounces_though_it_is_a_whole_page_of_the_host() {
    let stand = stand(16, 2);
    let (device, port) = stand.stranger(Policy::Legacy);
    let extent = ram(0x1_8000, PAGE);
    stand.write(extent.phys, b"one page");
    let segments = segments(&device, extent).expect("a way");
    assert_eq!(paths(&segments), [(0, PAGE, Path::Bounce)]);
    let mapping = mapping(&device, extent);
    mapping.link_segment(&segments[0], LeafSize::Page).expect("room");
    mapping.sync(0, PAGE).expect("linked");
    assert_eq!(dma_read(&port, mapping.dma_address(0), 8), b"one page");
    assert_eq!((stand.used(), mapping.linked()), (32, 0x1_0000), "an IO page of 64 KiB to itself");
    mapping.unlink(0, PAGE).expect("linked");
    assert_eq!(stand.used(), 0);
}

#[test]
fn private_memory_bounces_as_a_whole_or_is_refused_as_encrypted() {
    let private = Arc::new(PrivatePages::new());
    private.make_private(PhysAddr(0x1_0000), 3 * PAGE);
    let memory = RamMemory::encrypted(1 << 20, Arc::clone(&private)).expect("1 MiB");
    let config = BusConfig { bounce: Some(BounceConfig::default()), ..BusConfig::default() };
    let bus = Bus::with_config(memory, config);
    let domain = Domain::new(DomainConfig::default()).expect("possible");
    for behind_iommu in [true, false] {
        let spec = DeviceSpec::new("device");
        let spec = if behind_iommu { spec.domain(&domain) } else { spec };
        let port = bus.attach(spec).expect("room on the bus");
        let extent = Extent { backing: Backing::EncryptedPrivate, ..ram(0x1_0000, 3 * PAGE) };
        let coherent = DmaDevice::new(port.clone(), DmaConfig::default());
        assert_eq!(segments(&coherent, extent), Err((0, Refusal::Encrypted)));
        let legacy = DmaConfig { policy: Policy::Legacy, ..DmaConfig::default() };
        let device = DmaDevice::new(port.clone(), legacy);
        let found = segments(&device, extent).expect("a way");
        assert_eq!(paths(&found), [(0, 3 * PAGE, Path::Bounce)]);
        let through = |at: DmaAddr| port.write(at, b"shared").expect("slots are shared");
        if behind_iommu {
            let mapping = mapping(&device, extent);
            mapping.link_segment(&found[0], LeafSize::Huge).expect("room");
            mapping.sync(0, extent.len).expect("linked");
            through(mapping.dma_address(2 * PAGE));
            mapping.unlink(PAGE, PAGE).expect("an IO page of it");
            mapping.unlink(0, PAGE).expect("an IO page of it");
            mapping.unlink(2 * PAGE, PAGE).expect("an IO page of it");
        } else {
            let bounced = Bounced::new(&device, extent.phys, extent.len).expect("room");
            let (at, len) = bounced.pieces().next().expect("one");
            assert_eq!(len, 3 * PAGE);
            through(at.offset(2 * PAGE));
        }
        let mut back = [0; 6];
        let memory = bus.memory();
        memory.read(PhysAddr(0x1_2000), &mut back).expect("the CPU reads private memory");
        assert_eq!(&back, b"shared");
        memory.write(PhysAddr(0x1_2000), &[0; 6]).expect("the CPU writes it");
        assert_eq!(bus.bounce().expect("a pool").stats().used, 0);
    }
    assert_eq!(private.refused(), 0, "no device ever tried the memory itself");
}

#[test]
fn a_device_without_an_iommu_bounces_what_lies_beyond_its_mask() {
    let stand = stand(12, 2);
    let (coherent, _) = stand.short(Policy::Coherent);
    assert_eq!(segments(&coherent, ram(0xf000, 2 * PAGE)), Err((PAGE, Refusal::WouldBounce)));
    let (device, port) = stand.short(Policy::Legacy);
    let len = 0x5_0000;
    let found = segments(&device, ram(0xff00, len)).expect("a way");
    assert_eq!(paths(&found), [(0, 0x100, Path::Direct), (0x100, len - 0x100, Path::Bounce)]);
    assert_eq!(found[0].unlinked_address(0), DmaAddr(0xff00));
    let Segment { phys, len, .. } = found[1];
    stand.write(PhysAddr(0x2_3450), b"from the CPU");
    let bounced = Bounced::new(&device, phys, len).expect("room");
    let pieces: Vec<_> = bounced.pieces().collect();
    assert_eq!(pieces.iter().map(|(_, len)| *len).collect::<Vec<_>>(), [SEGMENT_SIZE, len - SEGMENT_SIZE]);
    let seen = pieces[0].0.offset(0x2_3450 - 0x1_0000);
    assert_eq!(dma_read(&port, seen, 12), b"from the CPU");
    port.write(pieces[1].0, b"from the device").expect("a slot");
    let last = phys.offset(SEGMENT_SIZE);
    bounced.sync(SEGMENT_SIZE, 4, SyncDirection::ForCpu).expect("in it");
    assert_eq!(stand.read(last, 15), b"from\0\0\0\0\0\0\0\0\0\0\0");
    drop(bounced);
    assert_eq!(stand.read(last, 15), b"from the device", "the rest comes back in the end");
    assert_eq!(stand.used(), 0);
    let bounced = Bounced::new(&device, phys, PAGE).expect("room");
    port.write(bounced.pieces().next().expect("one").0, b"never").expect("a slot");
    bounced.discard();
    assert_eq!((stand.read(phys, 5), stand.used()), (vec![0; 5], 0));
}

#[test]
fn a_full_pool_is_named_and_leaves_nothing_taken() {
    let stand = stand(12, 1);
    let (device, _) = stand.stranger(Policy::Legacy);
    let extent = ram(0, 0x8_0000);
    let mapping = mapping(&device, extent);
    mapping.link(0x4_1000, PhysAddr(0x4_1000), PAGE, LeafSize::Page).expect("free");
    // 64 IO pages of two slots fill the pool; the 65th is one too many.
    let error = mapping.link_bounced(0, PhysAddr(0), 65 * PAGE).unwrap_err();
    let full = PoolError::Full { wanted: 2, free: 0, slots: 128, longest: 0 };
    assert_eq!(error, LinkError::Bounce(BounceError::Pool(full)));
    assert_eq!((stand.used(), mapping.linked()), (0, PAGE), "earlier links stay");
    mapping.link_bounced(0, PhysAddr(0), 64 * PAGE).expect("exactly full");
    let over = mapping.link_bounced(0x4_0000, PhysAddr(0x4_0000), 2 * PAGE).unwrap_err();
    assert!(matches!(over, LinkError::Bounce(_)), "{over}");
    mapping.unlink(63 * PAGE, PAGE).expect("linked");
    let live = mapping.link_bounced(0x4_1000, PhysAddr(0x4_1000), PAGE).unwrap_err();
    assert!(matches!(live, LinkError::Map(_)), "over a live link: {live}");
    assert_eq!(stand.used(), 126, "the slots of the refused link went back");
    mapping.unlink(0, 63 * PAGE).expect("linked");
    mapping.unlink(0x4_1000, PAGE).expect("linked");
    let long = Bounced::new(&stand.short(Policy::Legacy).0, PhysAddr(0), 0x8_0000).err().expect("too long");
    assert!(matches!(long, BounceError::Pool(PoolError::Full { .. })), "{long}");
    assert_eq!(stand.used(), 0);
}

#[test]
fn a_mapping_that_ever_bounced_still_checks_what_it_unlinks() {
    let stand = stand(12, 1);
    let (device, _) = stand.stranger(Policy::Legacy);
    let mapping = mapping(&device, ram(0, 4 << 20));
    mapping.link_bounced(0, PhysAddr(0x3_0000), PAGE).expect("room");
    mapping.link(PAGE, PhysAddr(0x4_0000), PAGE, LeafSize::Page).expect("free");
    mapping.link(2 << 20, PhysAddr(0), 2 << 20, LeafSize::Large).expect("free");
    let linked = mapping.linked();
    mapping.unlink(0, 3 * PAGE).expect_err("a hole");
    mapping.unlink(2 << 20, PAGE).expect_err("part of a leaf");
    assert_eq!((mapping.linked(), stand.used()), (linked, 2), "and nothing went");
    assert_eq!(stand.domain.stats().violations, 2);
    mapping.unlink_and_discard(0, 2 * PAGE).expect("linked");
    mapping.unlink(2 << 20, 2 << 20).expect("linked");
    mapping.free().expect("empty");
    let late = mapping.sync_for_cpu(0, 1).unwrap_err();
    assert_eq!(late, LinkError::Freed { iova: mapping.iova() });
}

/// DMA is held up while memory changes; what bounces must not be copied then, and nobody waits for ever.
#[test]
fn nothing_is_copied_while_dma_is_held_up() {
    let stand = stand(12, 1);
    let (device, _) = stand.stranger(Policy::Legacy);
    let mapping = mapping(&device, ram(0, 4 * PAGE));
    mapping.link_bounced(0, PhysAddr(0x3_0000), 2 * PAGE).expect("room");
    stand.write(PhysAddr(0x3_0000), b"newer");
    stand.memory_of().epoch().close();
    let held = mapping.link_bounced(2 * PAGE, PhysAddr(0x3_2000), PAGE).unwrap_err();
    assert_eq!(held, LinkError::Bounce(BounceError::Held));
    mapping.unlink(0, 2 * PAGE).expect("unlinking never fails for that");
    stand.memory_of().epoch().open();
    assert_eq!(stand.read(PhysAddr(0x3_0000), 5), b"newer", "nothing was copied back");
    assert_eq!((stand.used(), mapping.linked()), (0, 0));
}

/// Whoever does not ask for the policy `legacy` has no part in any of this, not even a place among the engines.
#[test]
fn a_device_that_never_bounces_takes_no_slot_of_the_epoch() {
    let stand = stand(12, 1);
    let engines = stand.memory_of().epoch().slot_count();
    let (coherent, _) = stand.stranger(Policy::Coherent);
    assert_eq!(stand.memory_of().epoch().slot_count(), engines);
    let (legacy, _) = stand.stranger(Policy::Legacy);
    assert_eq!(stand.memory_of().epoch().slot_count(), engines + 1);
    drop((coherent, legacy));
    assert_eq!(stand.memory_of().epoch().slot_count(), engines);
}

#[test]
fn a_buffer_that_fails_gives_back_those_before_it() {
    let stand = stand(12, 2);
    let port = stand.bus.attach(DeviceSpec::new("short")).expect("room on the bus");
    let plan = FaultPlan::new(0, vec![Rule::nth(crate::dma::points::BOUNCE.name(), 2, Action::Fail)]);
    let (policy, points) = (Policy::Legacy, Points::with(&plan));
    let device = DmaDevice::new(port, DmaConfig { policy, points, ..DmaConfig::default() });
    stand.write(PhysAddr(0x1_0000), b"as it was");
    let failed = Bounced::new(&device, PhysAddr(0x1_0000), 2 * SEGMENT_SIZE).err();
    assert_eq!((failed, stand.used()), (Some(BounceError::Held), 0));
    assert_eq!(stand.bus.bounce().expect("a pool").stats().bytes_to_cpu, 0, "nothing to copy back");
    let whole = Bounced::new(&device, PhysAddr(0x1_0000), 2 * SEGMENT_SIZE).expect("the pool is empty");
    assert_eq!((whole.pieces().count(), stand.used()), (2, 256));
}

/// Regression: a sync took the buffer out of the pool for a moment, and an unlink that came then lost its slots.
#[test]
fn syncs_beside_an_unlink_lose_no_slot() {
    let stand = stand(12, 1);
    let (device, _) = stand.stranger(Policy::Legacy);
    let mapping = mapping(&device, ram(0, 4 * PAGE));
    let unlinking = hw_model::sync::atomic::AtomicU32::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while unlinking.load(hw_model::sync::atomic::Ordering::Acquire) == 0 {
                mapping.sync_for_device(0, 4 * PAGE).expect("in the mapping");
            }
        });
        for _ in 0..20_000 {
            mapping.link_bounced(0, PhysAddr(0x3_0000), 4 * PAGE).expect("room");
            mapping.unlink(0, 4 * PAGE).expect("linked");
            if stand.used() != 0 {
                break;
            }
        }
        unlinking.store(1, hw_model::sync::atomic::Ordering::Release);
    });
    assert_eq!((stand.used(), mapping.linked()), (0, 0));
}
