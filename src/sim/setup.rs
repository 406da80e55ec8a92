//! A world is put together: hosts, their buses and devices, processes and what they have mapped, connections.

use super::buffers::Exportable;
use super::choices::Choices;
use super::gpus::GPU;
use super::hugetlb::HUGETLB_PAGES;
use super::memory::Memory;
use super::network::{Network, Weather};
use super::unreliable::QKEY;
use super::world::{Connection, Dev, Host, Options, Process, Swarm, World};
use super::{Broken, Counts};
use hw_model::addr::{PAGE_SIZE, PhysAddr, VirtAddr, VirtRange};
use hw_model::bus::{
    Acs, BarStorage, Bus, BusConfig, DeviceSpec, Forwarding, HostMemory, PeerRoute, PortId, ProviderId,
    RamStorage,
};
use hw_model::fault_plan::{Action as FaultAction, FaultPlan, Points, Rule};
use hw_model::hca::{
    AckTimeout, CacheShape, FaultScheme, HcaConfig, PathMtu, Replacement, Time, TranslationCacheConfig,
    Transport,
};
use hw_model::iommu::{Domain, DomainConfig, IotlbConfig};
use hw_model::sync::Arc;
use mr::device::model::{FaultPolicy, ModelConfig, ModelDevice};
use mr::device::{Device, QpOptions};
use mr::dma::DmaConfig;
use odp::prefetch::PrefetchPolicy;
use odp::space::dmabuf::BarPart;
use odp::space::sim::{
    DeviceKind, DeviceMemoryId, FaultMode, HUGE_PAGES, MapRequest, ObjectId, Protection, Residence,
    SimConfig, SimHost, Source,
};
use std::fmt::Debug;

/// Frames of RAM of a host: enough for its processes and a few huge pages.
const RAM_PAGES: u32 = 4096;
/// Pages of each device memory.
const DEVICE_PAGES: u64 = 16;
/// Pages of shared memory, of a file, of a DMABUF.
pub const OBJECT_PAGES: u64 = 16;
/// Pages of the file that private mappings are made of. It never changes.
const PRIVATE_PAGES: u64 = 8;
/// Where the first process of a host has its memory, in pages; the next have theirs further on.
const ARENA: u64 = 0x10000;
/// From one process's memory to the next one's, in pages.
const ARENA_STRIDE: u64 = 0x1000;
/// From the start of its memory to its huge pages, in pages.
pub const HUGE_AT: u64 = 0x200;

/// The points that fail at random where a plan says so.
const FALLIBLE: &[&str] =
    &["dma.reserve", "dma.prepare", "dma.link", "dma.sync", "mr.*", "hca.create_key", "hca.fault_event"];

/// What a set-up error is: always a mistake of the simulation.
pub fn setup<T, E: Debug>(result: Result<T, E>) -> Result<T, Broken> {
    result.map_err(|error| Broken { rule: "set-up", detail: format!("{error:?}") })
}

fn some<T>(value: Option<T>) -> Result<T, Broken> {
    value.ok_or_else(|| Broken { rule: "set-up", detail: "this machine has no memory for it".to_owned() })
}

/// A seed for a part that draws on its own.
fn seed(choices: &mut Choices) -> u64 {
    u64::from(choices.below(u32::MAX))
}

impl World {
    /// A world in which nothing has happened yet.
    ///
    /// # Errors
    /// If it cannot be built.
    pub fn new(mut choices: Choices, options: &Options) -> Result<Self, Broken> {
        let choices_ref = &mut choices;
        let lossy = choices_ref.chance(600);
        let weather = Weather {
            lost: if lossy { choices_ref.below(80) } else { 0 },
            twice: if lossy { choices_ref.below(60) } else { 0 },
            longest_ns: choices_ref.of(&[0, 2_000, 20_000]),
        };
        let swarm = Swarm::new(choices_ref);
        // Both ends of a connection have agreed on it.
        let mtu = choices_ref.of(&[256, 1024, 4096]);
        let mut world = Self {
            mtu,
            network: Network::new(weather),
            lossy,
            swarm,
            now: Time(1),
            hastened: 0,
            memory: Memory::default(),
            hosts: Vec::new(),
            devices: Vec::new(),
            processes: Vec::new(),
            regions: Vec::new(),
            registrations: Vec::new(),
            reregs: Vec::new(),
            wholes: Vec::new(),
            leaving: Vec::new(),
            aliases: Vec::new(),
            advices: Vec::new(),
            teardowns: Vec::new(),
            connections: Vec::new(),
            requests: Default::default(),
            receives: Default::default(),
            retired: Vec::new(),
            changes: Vec::new(),
            buffer_changes: Vec::new(),
            pins: Vec::new(),
            disturbances: 0,
            dead_keys: Vec::new(),
            counts: Counts::default(),
            next_id: 1,
            stamp: 1,
            checked: 0,
            log: options.log.then(Vec::new),
            digest: Default::default(),
            choices,
        };
        let hosts = 2 + world.choices.below(2) as usize;
        let injected = world.choices.chance(500);
        let plan = match &options.plan {
            Some(plan) => plan.clone(),
            None if injected => FALLIBLE.iter().map(|point| ((*point).to_owned(), 0.02)).collect(),
            None => Vec::new(),
        };
        for host in 0..hosts {
            world.add_host(host, &plan)?;
        }
        let connections = 2 + world.choices.below(3);
        for _ in 0..connections {
            let count = world.devices.len() as u32;
            let first = world.choices.below(count) as usize;
            let second = (first + 1 + world.choices.below(count - 1) as usize) % count as usize;
            let services = [
                Transport::ReliableConnection,
                Transport::ReliableConnection,
                Transport::ReliableConnection,
                Transport::UnreliableConnection,
                Transport::UnreliableDatagram,
            ];
            let service = world.choices.of(&services);
            let connection = world.connect(first, second, service)?;
            world.connections.push(connection);
        }
        Ok(world)
    }

    fn add_host(&mut self, index: usize, plan: &[(String, f64)]) -> Result<(), Broken> {
        let config = SimConfig {
            ram_pages: RAM_PAGES,
            seed: seed(&mut self.choices),
            faults: FaultMode::Park,
            nodes: 2,
        };
        let sim = some(SimHost::new(config))?;
        let forwarding = self.choices.of(&[Forwarding::Any, Forwarding::Any, Forwarding::None]);
        let memory: Arc<dyn HostMemory> = Arc::clone(&sim) as _;
        let bus = Bus::with_config(memory, BusConfig { forwarding, ..BusConfig::default() });
        let acs = self.choices.of(&[Acs::Off, Acs::Off, Acs::Redirect]);
        let root = setup(bus.add_root_port(bus.first_bridge(), Acs::Off))?;
        let switch = setup(bus.add_switch(root))?;
        let below_first = setup(bus.add_downstream_port(switch, acs))?;
        let below_second = setup(bus.add_downstream_port(switch, acs))?;
        let elsewhere = setup(bus.add_root_port(bus.first_bridge(), Acs::Off))?;
        let gpu = setup(bus.attach(DeviceSpec::new("gpu").under(below_second)))?;
        let bar = |kind| -> Result<DeviceMemoryId, Broken> {
            let storage: Arc<dyn BarStorage> = some(RamStorage::new(DEVICE_PAGES * PAGE_SIZE))?;
            let bar = setup(bus.add_bar(gpu.device(), Arc::clone(&storage)))?;
            setup(sim.add_device(kind, bar.provider(), bar.base(), storage))
        };
        let peer = bar(DeviceKind::Peer)?;
        let coherent = bar(DeviceKind::Coherent)?;
        let exported: Arc<dyn BarStorage> = some(RamStorage::new(OBJECT_PAGES * PAGE_SIZE))?;
        let exported = setup(bus.add_bar(gpu.device(), exported))?;
        let exportable = Exportable {
            system: setup(sim.system_pages(OBJECT_PAGES))?,
            part: setup(BarPart::new(&exported, 0, OBJECT_PAGES * PAGE_SIZE))?,
            fails: !plan.is_empty(),
        };
        let storage: Arc<dyn BarStorage> = some(RamStorage::new(DEVICE_PAGES * PAGE_SIZE))?;
        let base = PhysAddr(0x2000_0000_0000);
        let private = setup(sim.add_device(DeviceKind::Private, GPU, base, storage))?;
        let residence = self.choices.of(&[Residence::System, Residence::Peer]);
        let host = Host {
            shmem: sim.new_shmem(OBJECT_PAGES),
            file: sim.new_file(OBJECT_PAGES),
            private_file: sim.new_file(PRIVATE_PAGES),
            hugetlb: sim.new_hugetlb(HUGETLB_PAGES / HUGE_PAGES),
            dmabuf: setup(sim.new_dmabuf(peer, 0, OBJECT_PAGES as u32, residence))?,
            coherent,
            private,
            devices: Vec::new(),
            next_arena: ARENA,
            exportable,
            exports: Vec::new(),
            sim,
        };
        for (object, pages) in [
            (host.shmem, OBJECT_PAGES),
            (host.file, OBJECT_PAGES),
            (host.private_file, PRIVATE_PAGES),
            (host.hugetlb, HUGETLB_PAGES),
            (host.dmabuf, OBJECT_PAGES),
        ] {
            self.memory.add_object((index, object), pages);
        }
        self.hosts.push(host);
        // One host behind an IOMMU, one without: what holds on both holds by the protocol.
        let iommu = index == 0 || index > 1 && self.choices.chance(500);
        let count = 1 + self.choices.below(2);
        for place in [below_first, elsewhere].into_iter().take(count as usize) {
            self.add_device(index, &bus, place, iommu, plan)?;
        }
        let processes = 1 + self.choices.below(2);
        self.fill_private_file(index)?;
        for _ in 0..processes {
            self.add_process(index)?;
        }
        self.export(index)
    }

    fn add_device(
        &mut self,
        host: usize,
        bus: &Arc<Bus>,
        place: PortId,
        iommu: bool,
        plan: &[(String, f64)],
    ) -> Result<(), Broken> {
        let index = self.devices.len();
        let name = format!("hca{index}");
        let choices = &mut self.choices;
        let iotlb = IotlbConfig {
            sets: choices.of(&[1, 4, 64]),
            ways: choices.of(&[1, 2, 4]),
            caches_not_present: choices.chance(500),
        };
        let domain =
            setup(Domain::new(DomainConfig { iotlb: Some(iotlb), audit: true, ..DomainConfig::default() }))?;
        let spec = DeviceSpec::new(name.clone()).under(place);
        let port = setup(bus.attach(if iommu { spec.domain(&domain) } else { spec }))?;
        let mtu = self.mtu;
        let timeout = setup(AckTimeout::from_code(9).ok_or("five bits"))?;
        let hca = HcaConfig {
            path_mtu: setup(PathMtu::new(mtu).ok_or("a power of two"))?,
            window_bytes: mtu * choices.of(&[2, 8]),
            ack_timeout: timeout,
            fault_queue_depth: choices.of(&[2, 64]),
            key_quarantine: 16,
            ..HcaConfig::simulated(seed(choices))
        };
        let hca = with_choices_of_its_seed(hca);
        let rule = |(point, probability): &(String, f64)| Rule {
            probability: *probability,
            ..Rule::always(point, FaultAction::Fail)
        };
        let plan = (!plan.is_empty()).then(|| FaultPlan::new(seed(choices), plan.iter().map(rule).collect()));
        let points = plan.as_ref().map_or(Points::OFF, Points::with);
        // Neighbouring numbers of the BARs: the mapped DMABUF's, that of coherent memory, the exported buffer's.
        let routes = [0, 1, 2].map(|provider| port.peer_route(ProviderId(provider)));
        let reaches_peers =
            routes.iter().all(|route| route.is_some_and(|route| route != PeerRoute::NotSupported));
        let dma = DmaConfig { points, ..DmaConfig::default() };
        let faults = some_policy(choices);
        let config = ModelConfig { hca, dma, faults };
        let link = self.network.port();
        let device = setup(ModelDevice::stepped(&name, port, link, config))?;
        let pd = setup(device.alloc_model_pd())?;
        let cq = setup(Arc::clone(&device).create_cq(4096))?;
        self.hosts[host].devices.push(index);
        let (jobs, prefetches) = (Vec::new(), Vec::new());
        self.devices.push(Dev { host, device, pd, cq, plan, asleep: None, reaches_peers, jobs, prefetches });
        Ok(())
    }

    /// A process with memory of several kinds, one behind the other.
    fn add_process(&mut self, host: usize) -> Result<(), Broken> {
        let process = self.processes.len();
        let space = self.hosts[host].sim.new_space();
        let arena = self.hosts[host].next_arena;
        self.hosts[host].next_arena += ARENA_STRIDE;
        self.memory.add_process(process);
        self.processes.push(Process { host, space: Some(space), buffer: None, arena });
        let mut page = arena;
        let parts = 3 + self.choices.below(4);
        for _ in 0..parts {
            let pages = self.choices.between(4, 12);
            let request = self.some_mapping(host, pages);
            self.map_now(process, page, request)?;
            page += request.pages;
        }
        if self.choices.chance(300) {
            let request = MapRequest::anonymous(HUGE_PAGES).huge();
            self.map_now(process, arena + HUGE_AT, request)?;
        }
        if self.choices.chance(400) {
            let request = self.some_huge_mapping(process, false);
            self.map_there(process, &request)?;
        }
        Ok(())
    }

    /// Memory of some kind, of at most `pages` pages.
    pub fn some_mapping(&mut self, host: usize, pages: u64) -> MapRequest {
        let of = |object: ObjectId, have: u64, choices: &mut Choices, private: bool| {
            let pages = pages.min(have);
            let first = choices.between(0, have - pages);
            let source =
                if private { Source::Private { object, first } } else { Source::Shared { object, first } };
            MapRequest::anonymous(pages).of(source)
        };
        let Host { shmem, file, private_file, dmabuf, .. } = self.hosts[host];
        let choices = &mut self.choices;
        match choices.below(6) {
            0 | 1 => MapRequest::anonymous(pages),
            2 => of(shmem, OBJECT_PAGES, choices, false),
            3 => of(file, OBJECT_PAGES, choices, false),
            4 => of(private_file, PRIVATE_PAGES, choices, true),
            _ => of(dmabuf, OBJECT_PAGES, choices, false),
        }
    }

    fn map_now(&mut self, process: usize, page: u64, request: MapRequest) -> Result<(), Broken> {
        self.map_there(process, &request.fixed(VirtAddr::from_page_number(page)))
    }

    fn map_there(&mut self, process: usize, request: &MapRequest) -> Result<(), Broken> {
        let range = setup(self.space(process).map(*request))?;
        self.note_mapping(process, range, request);
        Ok(())
    }

    /// What a mapping means to the oracle.
    pub fn note_mapping(&mut self, process: usize, range: VirtRange, request: &MapRequest) {
        let host = self.processes[process].host;
        let protection = request.protection;
        match request.source {
            Source::Anonymous | Source::Special => self.memory.map_anonymous(process, range, protection),
            Source::Shared { object, first } => {
                self.memory.map_object(process, range, ((host, object), first), false, protection);
            }
            Source::Private { object, first } => {
                self.memory.map_object(process, range, ((host, object), first), true, protection);
            }
        }
    }

    /// Gives the file of private mappings its content, before anybody maps it so.
    fn fill_private_file(&mut self, host: usize) -> Result<(), Broken> {
        let object = self.hosts[host].private_file;
        let writer = usize::MAX;
        self.memory.add_process(writer);
        let space = self.hosts[host].sim.new_space();
        let source = Source::Shared { object, first: 0 };
        let request = MapRequest::anonymous(PRIVATE_PAGES).of(source).protected(Protection::ReadWrite);
        let range = setup(space.map(request))?;
        self.memory.map_object(writer, range, ((host, object), 0), false, Protection::ReadWrite);
        let data = self.fresh_bytes((PRIVATE_PAGES * PAGE_SIZE) as usize);
        setup(space.cpu_write(range.start(), &data))?;
        self.memory.write(writer, range.start(), &data);
        self.memory.end_process(writer);
        Ok(())
    }

    /// Connects two devices.
    ///
    /// # Errors
    /// If they have no queue pairs left.
    pub fn connect(&mut self, first: usize, second: usize, service: Transport) -> Result<Connection, Broken> {
        let qp = |device: usize| {
            let Dev { pd, cq, .. } = &self.devices[device];
            let pd: Arc<dyn mr::ProtectionDomain> = Arc::clone(pd) as _;
            let options = QpOptions { send_requests: 16, ..QpOptions::new(service, cq) };
            setup(pd.create_qp_with(options))
        };
        let qps = [qp(first)?, qp(second)?];
        if service == Transport::UnreliableDatagram {
            qps.iter().try_for_each(|qp| setup(qp.open(QKEY)))?;
        } else {
            setup(qps[0].connect(qps[1].endpoint()))?;
            setup(qps[1].connect(qps[0].endpoint()))?;
        }
        let devices = [first, second];
        devices.iter().for_each(|device| self.devices[*device].asleep = None);
        Ok(Connection {
            devices,
            service,
            qps,
            received: [false; 2],
            broken: false,
            closing: false,
            haunted_from: None,
            ended_badly: Vec::new(),
        })
    }
}

/// How a device answers its faults. Windows are a few pages: so are the regions.
fn some_policy(choices: &mut Choices) -> FaultPolicy {
    let prefetch = choices.of(&[
        PrefetchPolicy::Off,
        PrefetchPolicy::Fixed { window: 3 * PAGE_SIZE },
        PrefetchPolicy::Adaptive { first: PAGE_SIZE, most: 16 * PAGE_SIZE },
        PrefetchPolicy::ADAPTIVE,
    ]);
    FaultPolicy { neighbours: choices.of(&[0, 4 * PAGE_SIZE, 16 * PAGE_SIZE]), prefetch }
}

/// What else an HCA is chosen to be, by its seed alone: two of three remember translations, few or more of them, and one
/// of two asks for pages by range.
fn with_choices_of_its_seed(config: HcaConfig) -> HcaConfig {
    let replacement = [Replacement::LeastRecent, Replacement::Oldest, Replacement::Random];
    // Spread over all bits, however small the seed is.
    let mixed = config.seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let pick = |of: u64, shift: u32| (mixed >> shift) % of;
    let shape = |sets: u32, shift: u32| CacheShape {
        sets,
        ways: 1 << pick(3, shift),
        replacement: replacement[pick(3, shift + 4) as usize],
    };
    let cache = TranslationCacheConfig { pages: shape(1 << pick(6, 24), 8), keys: shape(1, 16) };
    let fault_scheme = [FaultScheme::ByRequest, FaultScheme::ByRange][pick(2, 32) as usize];
    HcaConfig { translation_cache: (pick(3, 40) > 0).then_some(cache), fault_scheme, ..config }
}
