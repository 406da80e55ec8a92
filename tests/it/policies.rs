//! One list over every path at once, and what each policy makes of memory that must bounce.

use anypage::machine::{End, MachineConfig};
use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange};
use hw_model::bounce::BounceConfig;
use hw_model::bus::{Acs, BarStorage, Bus, BusConfig, DeviceSpec, HostMemory, RamStorage};
use hw_model::hca::{Path, Remote, SendRequest, Sge, Status};
use hw_model::iommu::{Domain, DomainConfig};
use hw_model::link::Fabric;
use hw_model::sync::Arc;
use mr::device::model::{ModelConfig, ModelDevice};
use mr::dma::{DmaConfig, Policy, Refusal};
use mr::{PublishError, RegisterOptions};
use odp::fault::FaultFailure;
use odp::space::UserRange;
use odp::space::sim::{
    DeviceKind, Encryption, MapRequest, Residence, SimConfig, SimHost, SimSpace, Source, SpaceChange,
};
use std::collections::BTreeMap;
use std::time::Duration;

/// Pages of each kind.
const PAGES: u64 = 4;
const ARENA: u64 = 0x1000_0000;

/// A host with a pool, a near and a far device, and a process whose range holds every kind of page.
struct Stand {
    bus: Arc<Bus>,
    space: Arc<SimSpace>,
    near: Arc<ModelDevice>,
    far: Arc<ModelDevice>,
    /// What the near device is to register.
    mixed: VirtRange,
    /// As much memory for the far one.
    plain: VirtRange,
}

impl Stand {
    fn new(policy: Policy, iommu: bool) -> Self {
        let sim = SimHost::new(SimConfig { ram_pages: 2048, ..SimConfig::default() }).expect("memory");
        let memory: Arc<dyn HostMemory> = Arc::clone(&sim) as _;
        let config = BusConfig { bounce: Some(BounceConfig::default()), ..BusConfig::default() };
        let bus = Bus::with_config(memory, config);
        let switch = bus.add_switch(bus.add_root_port(bus.first_bridge(), Acs::Off).expect("a port"));
        let switch = switch.expect("a switch");
        let [beside, own] = [(); 2].map(|()| bus.add_downstream_port(switch, Acs::Off).expect("a port"));
        let bar = |spec: DeviceSpec| {
            let gpu = bus.attach(spec).expect("room on the bus");
            let storage: Arc<dyn BarStorage> = RamStorage::new(64 * PAGE_SIZE).expect("memory");
            let bar = bus.add_bar(gpu.device(), Arc::clone(&storage)).expect("a window");
            let id = sim.add_device(DeviceKind::Peer, bar.provider(), bar.base(), storage).expect("room");
            sim.new_dmabuf(id, 0, PAGES as u32, Residence::Peer).expect("pages of the BAR")
        };
        let below_switch = bar(DeviceSpec::new("gpu0").under(beside));
        let elsewhere = bar(DeviceSpec::new("gpu1"));
        let space = sim.new_space();
        let shmem = sim.new_shmem(PAGES);
        let file = sim.new_file(PAGES);
        let mut at = ARENA;
        for source in [
            Source::Anonymous,
            Source::Shared { object: below_switch, first: 0 },
            Source::Shared { object: shmem, first: 0 },
            Source::Shared { object: elsewhere, first: 0 },
            Source::Anonymous,
            Source::Shared { object: file, first: 0 },
        ] {
            let request = MapRequest::anonymous(PAGES).of(source).fixed(VirtAddr(at));
            at = space.map(request).expect("room").end().0;
        }
        let mixed = VirtRange::new(VirtAddr(ARENA), at - ARENA).expect("user memory");
        let secret = VirtRange::new(VirtAddr(ARENA + 4 * PAGES * PAGE_SIZE), PAGES * PAGE_SIZE);
        let encrypt = SpaceChange::Encrypt(secret.expect("user memory"), Encryption::Private);
        space.change(encrypt).expect("anonymous memory");
        let plain = space.map(MapRequest::anonymous(mixed.page_count())).expect("room");
        let fabric = Fabric::new();
        let device = |name: &str, spec: DeviceSpec, policy| {
            let domain =
                Domain::new(DomainConfig { audit: true, ..DomainConfig::default() }).expect("possible");
            let port = bus.attach(if iommu { spec.domain(&domain) } else { spec }).expect("room on the bus");
            let dma = DmaConfig { policy, ..DmaConfig::default() };
            let config = ModelConfig { hca: MachineConfig::default().hca, dma, ..ModelConfig::default() };
            ModelDevice::threaded(name, port, fabric.port(), config).expect("a device")
        };
        let near = device("near", DeviceSpec::new("near").under(own), policy);
        let far = device("far", DeviceSpec::new("far"), Policy::Coherent);
        Self { bus, space, near, far, mixed, plain }
    }

    fn end(
        &self,
        device: &Arc<ModelDevice>,
        range: VirtRange,
        options: RegisterOptions,
    ) -> Result<End, String> {
        End::new(device, &UserRange::simulated(&self.space, range), options)
            .map_err(|error| error.to_string())
    }

    fn used_slots(&self) -> u64 {
        self.bus.bounce().expect("a pool").stats().used
    }
}

/// Moves all of the far region to the near one, or back.
fn transfer(near: &End, far: &End, write: bool) {
    let length = near.region.len() as u32;
    let local = [Sge { key: far.region.key(), address: far.region.address(), length }];
    let remote = Remote { key: near.region.key(), address: near.region.address() };
    let request = match write {
        true => SendRequest::write(1, &local, remote),
        false => SendRequest::read(1, &local, remote),
    };
    far.qp.post_send(&request).expect("room");
    let mut done = Vec::new();
    while done.is_empty() {
        assert!(far.cq.wait(Duration::from_secs(30)), "the request never ends");
        far.cq.poll(&mut done, 1).expect("no overrun");
    }
    assert_eq!(done[0].status, Status::Success);
}

fn pattern(seed: u8, len: u64) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add((at >> 8) as u8) ^ seed).collect()
}

fn paths(end: &End) -> BTreeMap<Path, u64> {
    let mut pages = BTreeMap::new();
    for run in end.region.page_map().expect("the model shows it") {
        if let Some(entry) = run.entry {
            *pages.entry(entry.path).or_insert(0) += run.pages;
        }
    }
    pages
}

#[test]
fn one_list_holds_every_path_and_every_byte_moves_through_its_own() {
    let stand = Stand::new(Policy::Legacy, true);
    let near = stand.end(&stand.near, stand.mixed, RegisterOptions::pinned()).expect("the policy bounces");
    let far = stand.end(&stand.far, stand.plain, RegisterOptions::pinned()).expect("plain memory");
    near.connect(&far).expect("fresh queue pairs connect");
    let expected = [
        (Path::Iova, 3 * PAGES),
        (Path::HostBridge, PAGES),
        (Path::BusAddress, PAGES),
        (Path::Bounce, PAGES),
    ];
    assert_eq!(paths(&near), BTreeMap::from(expected));
    let len = stand.mixed.len();
    let read = |range: VirtRange| {
        let mut bytes = vec![0; len as usize];
        stand.space.cpu_read(range.start(), &mut bytes).expect("mapped");
        bytes
    };

    // What the device writes: at once everywhere but where it bounces, and there once the program asks.
    let sent = pattern(0x5a, len);
    stand.space.cpu_write(stand.plain.start(), &sent).expect("mapped");
    transfer(&near, &far, true);
    let (from, to) = (4 * PAGES * PAGE_SIZE, 5 * PAGES * PAGE_SIZE);
    let bounced = from as usize..to as usize;
    let mut before = sent.clone();
    before[bounced.clone()].fill(0);
    assert!(read(stand.mixed) == before, "before the sync only what bounces is missing");
    near.region.sync_for_cpu(from + 100, PAGE_SIZE).expect("in the region");
    before[from as usize + 100..(from + 100 + PAGE_SIZE) as usize]
        .copy_from_slice(&sent[from as usize + 100..(from + 100 + PAGE_SIZE) as usize]);
    assert!(read(stand.mixed) == before, "a sync copies what it was asked for and no byte more");
    near.region.sync_for_cpu(0, len).expect("in the region");
    assert!(read(stand.mixed) == sent, "after it all is there");

    // What the program writes.
    let answer = pattern(0xc3, len);
    stand.space.cpu_write(stand.mixed.start(), &answer).expect("mapped");
    transfer(&near, &far, false);
    let mut stale = answer.clone();
    stale[bounced.clone()].copy_from_slice(&sent[bounced.clone()]);
    assert!(read(stand.plain) == stale, "the device still has the old copy");
    near.region.sync_for_device(0, len).expect("in the region");
    transfer(&near, &far, false);
    assert!(read(stand.plain) == answer, "after the sync it has the new one");

    // What was not asked for comes back with the end of the region, and the slots with it.
    stand.space.cpu_write(stand.plain.start(), &sent).expect("mapped");
    transfer(&near, &far, true);
    assert!(stand.used_slots() > 0);
    near.region.deregister();
    assert!(read(stand.mixed) == sent, "deregistration copies back");
    assert_eq!(stand.used_slots(), 0, "slots leak");
    assert!(near.region.sync_for_cpu(0, len).is_err(), "a region that is gone copies nothing");
    assert_eq!(stand.near.dma().domain().map(|domain| domain.stats().stale_hits), Some(0));
}

#[test]
fn what_must_bounce_is_refused_where_nobody_could_say_when_to_copy() {
    for (policy, iommu, options, refusal) in [
        (Policy::Coherent, true, RegisterOptions::pinned(), Refusal::Encrypted),
        (Policy::Coherent, false, RegisterOptions::pinned(), Refusal::Encrypted),
        (Policy::Legacy, true, RegisterOptions::on_demand(), Refusal::WouldBounce),
        (Policy::Legacy, false, RegisterOptions::pinned(), Refusal::WouldBounce),
    ] {
        let stand = Stand::new(policy, iommu);
        // On demand, only present pages are looked at: make them so.
        let bytes = pattern(1, stand.mixed.len());
        stand.space.cpu_write(stand.mixed.start(), &bytes).expect("mapped");
        let pd = stand.near.alloc_model_pd().expect("a domain");
        let error = match pd.register_model(&UserRange::simulated(&stand.space, stand.mixed), options) {
            Err(error) => error,
            Ok(_) => panic!("registered under {policy:?}, IOMMU {iommu}"),
        };
        let at = stand.mixed.start().offset(4 * PAGES * PAGE_SIZE);
        let refused = FaultFailure::Publish(PublishError::Refused { at, refusal });
        assert_eq!(error, mr::MapRegionError::Pages(refused).into(), "{policy:?}, IOMMU {iommu}");
        assert_eq!(stand.used_slots(), 0);
        assert_eq!(stand.near.dma().iova_stats().live_ranges, 0);
    }
}
