//! The DMA layer under everything else: every step of the two-step API failing in turn, and every path in one region.

use crate::overlay::{Instead, Overlay};
use crate::remapped::Remapped;
use hw_model::addr::{PAGE_SIZE, PhysAddr, VirtRange, page_bytes};
use hw_model::bounce::{BounceConfig, BouncePool};
use hw_model::bus::{Acs, Bar, Bus, BusConfig, DeviceSpec, RamMemory};
use hw_model::fault_plan::{FaultPlan, Points};
use hw_model::hca::{Backing, Entry, Path};
use hw_model::iommu::{Domain, DomainConfig, FlushMode, LeafSize};
use hw_model::link::Fabric;
use hw_model::sync::Arc;
use mr::device::model::{ModelConfig, ModelDevice};
use mr::dma::{DmaConfig, DmaDevice, Extent, Mapping, Policy, Segments};
use mr::{Device, RegisterOptions};
use odp::space::AddressSpace;
use odp::space::process::{Options, ProcessSpace};
use std::collections::BTreeMap;

/// A device of the policy `legacy` and all that can leak.
struct Stand {
    plan: Arc<FaultPlan>,
    device: Arc<DmaDevice>,
    domain: Arc<Domain>,
    pool: Arc<BouncePool>,
}

impl Stand {
    fn new(granule_shift: u32, mode: FlushMode) -> Self {
        let plan = FaultPlan::new(0, Vec::new());
        let config = BusConfig { bounce: Some(BounceConfig::default()), ..BusConfig::default() };
        let bus = Bus::with_config(RamMemory::new(1 << 20).expect("1 MiB"), config);
        let domain =
            Domain::new(DomainConfig { granule_shift, mode, ..DomainConfig::default() }).expect("possible");
        let spec = DeviceSpec::new("stranger").domain(&domain).untrusted();
        let points = Points::with(&plan);
        let config = DmaConfig { policy: Policy::Legacy, points, ..DmaConfig::default() };
        let device = DmaDevice::new(bus.attach(spec).expect("room on the bus"), config);
        Self { plan, device, domain, pool: Arc::clone(bus.bounce().expect("a pool")) }
    }

    /// IOVA ranges, bytes mapped, slots taken, contract broken.
    fn left(&self) -> [u64; 4] {
        let (iova, domain) = (self.device.iova_stats(), self.domain.stats());
        [iova.live_ranges, domain.mapped_bytes, self.pool.stats().used, domain.violations]
    }

    /// Bounced head, direct middle, bounced tail; then scattered pages behind a hole. Who fails unlinks what it linked.
    fn maps(&self) -> Result<(), String> {
        const PAGES: u64 = 16;
        let (at, len) = (0x8200, 2 * PAGE_SIZE);
        let words = |error: &dyn std::fmt::Display| error.to_string();
        let mapping =
            Mapping::try_alloc(&self.device, PAGES * PAGE_SIZE, at).map_err(|error| words(&error))?;
        let mapping = mapping.expect("something translates");
        mapping.prepare(0, mapping.len()).map_err(|error| words(&error))?;
        let extent = Extent {
            at: 0,
            phys: PhysAddr(at),
            len,
            backing: Backing::Anonymous,
            provider: None,
            writable: true,
        };
        let mut linked = Vec::new();
        // The tail ends inside an IO page, which only the end of a mapping may: its IO page is left out.
        let segments: Vec<_> =
            Segments::new(&self.device, [extent]).collect::<Result<_, _>>().expect("a way");
        let [whole @ .., _tail] = &segments[..] else { panic!("a head, a middle and a tail") };
        let mut outcome = whole.iter().try_for_each(|segment| {
            mapping.link_segment(segment, LeafSize::Huge)?;
            linked.push((segment.at, segment.len));
            Ok(())
        });
        let first_edge = PAGE_SIZE - at % PAGE_SIZE;
        if outcome.is_ok() && mapping.granule() <= PAGE_SIZE {
            let scattered = first_edge + 8 * PAGE_SIZE;
            let frames = [9, 4, 30].map(|page| PhysAddr(page * PAGE_SIZE));
            outcome = mapping.link_scattered(scattered, frames);
            if outcome.is_ok() {
                linked.push((scattered, 3 * PAGE_SIZE));
            }
        }
        let outcome = outcome
            .and_then(|()| mapping.sync(0, mapping.len()))
            .and_then(|()| mapping.sync_for_device(0, mapping.len()));
        for (offset, len) in linked {
            mapping.unlink(offset, len).expect("taking down never fails");
        }
        mapping.free().expect("taking down never fails");
        outcome.map_err(|error| words(&error))
    }
}

/// Sweeps all; counts the points that were visited.
pub fn every_step_fails(visited: &mut BTreeMap<&'static str, u64>) {
    for granule_shift in [11, 12] {
        for mode in [FlushMode::Strict, FlushMode::Lazy] {
            let stand = Stand::new(granule_shift, mode);
            let before = stand.left();
            let mut injected = 0;
            for nth in 1.. {
                stand.plan.fail_nth_from_now(nth);
                let outcome = stand.maps();
                let failed = stand.plan.failed_at();
                stand.plan.disarm();
                let at = format!("IO pages of 2^{granule_shift}, {mode:?}, failure {nth} at {failed:?}");
                assert_eq!(stand.left(), before, "{at}: {outcome:?}");
                if failed.is_none() {
                    outcome.expect(&at);
                    break;
                }
                outcome.expect_err(&at);
                injected += 1;
            }
            assert!(injected >= 7, "reserve, prepare, links, bounces and sync; {injected} failed");
            for (point, visits) in stand.plan.visits() {
                *visited.entry(point.name()).or_default() += visits;
            }
        }
    }
}

#[test]
fn every_step_of_the_two_step_api_fails_and_leaves_nothing() {
    every_step_fails(&mut BTreeMap::new());
}

/// One region, one key, one list: memory that is linked, memory that bounces, a BAR by bus address and one through the
/// host bridge. Bytes go through every entry and arrive where they belong.
#[test]
fn one_region_mixes_every_path_and_moves_data_through_each_entry() {
    let space = ProcessSpace::open(Options::default()).expect("this process can use its own memory");
    let overlay = Overlay::new(&space);
    let memory = Remapped::new(5);
    let page = |index: u64| {
        let start = memory.range().start().offset(page_bytes(index));
        VirtRange::new(start, PAGE_SIZE).expect("a page of it")
    };
    let config = BusConfig { bounce: Some(BounceConfig::default()), ..BusConfig::default() };
    let bus = Bus::with_config(space.memory(), config);
    let root = bus.add_root_port(bus.first_bridge(), Acs::Off).expect("a place");
    let switch = bus.add_switch(root).expect("a place");
    let [here, beside] = [(); 2].map(|()| bus.add_downstream_port(switch, Acs::Off).expect("a place"));
    let [near, far] = [DeviceSpec::new("near").under(beside), DeviceSpec::new("far")].map(|spec| {
        let gpu = bus.attach(spec).expect("a place");
        bus.add_ram_bar(gpu.device(), 0x1_0000).expect("room in the window")
    });
    overlay.say(page(1), Instead::Kind(Backing::EncryptedPrivate));
    overlay.say(page(2), Instead::Peer(Arc::clone(&near)));
    overlay.say(page(3), Instead::Peer(Arc::clone(&far)));
    let domain = Domain::new(DomainConfig::default()).expect("possible");
    let port = bus.attach(DeviceSpec::new("hca0").under(here).domain(&domain)).expect("a place");
    let dma = DmaConfig { policy: Policy::Legacy, ..DmaConfig::default() };
    let config = ModelConfig { dma, ..ModelConfig::default() };
    let device = ModelDevice::stepped("hca0", port.clone(), Fabric::new().port(), config).expect("a device");
    let pd = Arc::clone(&device).alloc_pd().expect("a domain");
    let region = pd.register(&memory.user_range(overlay as _), RegisterOptions::pinned()).expect("a region");

    let entries: Vec<_> = region.raw_entries().expect("the model shows its list");
    let entries: Vec<_> = entries.into_iter().map(Entry::from_bits).collect();
    let paths = [Path::Iova, Path::Bounce, Path::BusAddress, Path::HostBridge, Path::Iova];
    assert_eq!(entries.iter().map(|entry| entry.path()).collect::<Vec<_>>(), paths);
    for (index, entry) in entries.iter().enumerate() {
        port.write(entry.address().offset(8), &[index as u8 + 1; 4]).expect("present");
    }
    let mut runs = Vec::new();
    space.snapshot(memory.range(), &mut runs).expect("mapped");
    let phys = |index: u64| {
        let run = runs.iter().find(|run| run.range().contains(page(index))).expect("every page is there");
        run.phys.offset(page(index).start().0 - run.start.0)
    };
    let of_ram = |index: u64| {
        let mut bytes = [0; 4];
        space.memory().read(phys(index).offset(8), &mut bytes).expect("RAM");
        bytes
    };
    let of_bar = |bar: &Bar| {
        let mut bytes = [0; 4];
        bar.storage().read(8, &mut bytes).expect("in the BAR");
        bytes
    };
    assert_eq!([0, 1, 2, 3, 4].map(of_ram), [[1; 4], [0; 4], [0; 4], [0; 4], [5; 4]]);
    assert_eq!([of_bar(&near), of_bar(&far)], [[3; 4], [4; 4]]);
    assert_eq!((near.bursts_by_bus_address(), far.bursts_through_host_bridge()), (1, 1));
    region.deregister();
    assert_eq!(of_ram(1), [2; 4], "what bounced is copied back when it is unlinked");
    let stats = domain.stats();
    assert_eq!((stats.mapped_bytes, stats.violations, stats.faults), (0, 0, 0));
    assert_eq!((bus.bounce().expect("a pool").stats().used, device.dma().iova_stats().live_ranges), (0, 0));
}
