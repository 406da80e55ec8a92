//! The simulated address space, with two devices that have memory of their own.

use crate::device::Device;
use crate::world::{Allow, Area, By, Cpu, Kind, Skip, World};
use hw_model::addr::{PAGE_SIZE, PhysAddr, VirtAddr, VirtRange};
use hw_model::bus::{ProviderId, RamStorage};
use hw_model::sync::{Arc, Mutex};
use odp::space::AddressSpace;
use odp::space::sim::{
    DeviceKind, DeviceMemoryId, HUGE_PAGES, MapRequest, ObjectChange, ObjectId, Protection, SimConfig,
    SimHost, SimSpace, Source, SpaceChange,
};

/// Pages of a device's memory: room for two huge pages.
pub const DEVICE_PAGES: u64 = 2 * HUGE_PAGES;

/// The device that most behaviours are about.
pub const OURS: ProviderId = ProviderId(1);
/// Another one.
pub const THEIRS: ProviderId = ProviderId(2);

pub struct SimWorld {
    pub host: Arc<SimHost>,
    pub sim: Arc<SimSpace>,
    /// Memory that only our device reaches.
    pub private: DeviceMemoryId,
    /// Memory of the other device that everybody reaches.
    pub coherent: DeviceMemoryId,
    /// Memory of our device with room for 64 pages.
    pub small: DeviceMemoryId,
    objects: Mutex<Vec<ObjectId>>,
}

impl SimWorld {
    pub fn new() -> Self {
        let host = SimHost::new(SimConfig { ram_pages: 16 * 512, seed: 5, ..SimConfig::default() });
        let host = host.expect("memory for a small host");
        let add = |kind, provider, number: u64, pages| {
            let storage = RamStorage::new(pages * PAGE_SIZE).expect("memory for a small device");
            let base = PhysAddr(0x3800_0000_0000 + (number << 30));
            host.add_device(kind, provider, base, storage).expect("room for it")
        };
        let private = add(DeviceKind::Private, OURS, 1, DEVICE_PAGES);
        let coherent = add(DeviceKind::Coherent, THEIRS, 2, DEVICE_PAGES);
        let small = add(DeviceKind::Private, OURS, 3, 64);
        let sim = host.new_space();
        Self { host, sim, private, coherent, small, objects: Mutex::default() }
    }

    /// That the host agrees with itself.
    pub fn check(&self) {
        self.host.check().expect("the host agrees with itself");
    }

    /// Our device, which sees its own memory, open on some ranges.
    pub fn ours(&self, ranges: &[VirtRange]) -> Device {
        Device::open(Arc::new(self.sim.seen_by(OURS)), ranges)
    }

    /// Makes a change that succeeds; how many pages it was about.
    pub fn change(&self, change: SpaceChange) -> u64 {
        self.sim.change(change).expect("it can be done").pages
    }

    /// Moves pages to the memory of our device; how many went.
    pub fn migrate(&self, range: VirtRange) -> u64 {
        self.change(SpaceChange::ToDevice { range, memory: self.private })
    }

    pub fn object(&self, area: &Area) -> ObjectId {
        self.objects.lock()[area.object]
    }
}

/// One process's loads and stores.
struct Program<'a>(&'a SimSpace);

impl Cpu for Program<'_> {
    fn get(&self, at: VirtAddr) -> u64 {
        let mut word = [0; 8];
        self.0.cpu_read(at, &mut word).expect("the behaviour has it mapped");
        u64::from_ne_bytes(word)
    }
    fn put(&self, at: VirtAddr, word: u64) {
        self.0.cpu_write(at, &word.to_ne_bytes()).expect("the behaviour has it mapped");
    }
}

impl Cpu for SimWorld {
    fn get(&self, at: VirtAddr) -> u64 {
        Program(&self.sim).get(at)
    }
    fn put(&self, at: VirtAddr, word: u64) {
        Program(&self.sim).put(at, word);
    }
}

impl World for SimWorld {
    fn space(&self) -> Arc<dyn AddressSpace> {
        self.sim.clone()
    }

    fn map(&self, kind: Kind, pages: u64) -> Result<Area, Skip> {
        let mut objects = self.objects.lock();
        let mut new = |object| {
            objects.push(object);
            object
        };
        let shared = |object| Source::Shared { object, first: 0 };
        let source = match kind {
            Kind::Anonymous | Kind::Huge => Source::Anonymous,
            Kind::Shared => shared(new(self.host.new_shmem(pages))),
            Kind::File => shared(new(self.host.new_file(pages))),
            Kind::Hugetlb => shared(new(self.host.new_hugetlb(pages / HUGE_PAGES))),
            Kind::PrivateFile => Source::Private { object: new(self.host.new_file(pages)), first: 0 },
        };
        let request = MapRequest::anonymous(pages).of(source);
        let request = if kind == Kind::Huge { request.huge() } else { request };
        let range = self.sim.map(request).expect("room");
        Ok(Area { range, object: objects.len().wrapping_sub(1) })
    }

    fn protect(&self, range: VirtRange, to: Allow) {
        let to = match to {
            Allow::Nothing => Protection::None,
            Allow::Read => Protection::Read,
            Allow::ReadWrite => Protection::ReadWrite,
        };
        self.sim.protect(range, to).expect("mapped");
    }
    fn unmap(&self, range: VirtRange) {
        self.sim.unmap(range).expect("mapped");
    }
    fn discard(&self, range: VirtRange) {
        self.change(SpaceChange::Discard(range));
    }
    fn replace(&self, range: VirtRange) {
        self.change(SpaceChange::Map(MapRequest::anonymous(range.page_count()).fixed(range.start())));
    }
    fn remap(&self, from: VirtRange, to: VirtAddr) {
        self.change(SpaceChange::Remap { from, to });
    }
    fn fork(&self, child: &dyn Fn(&dyn Cpu) -> bool, meanwhile: &mut dyn FnMut()) -> bool {
        let other = self.sim.fork().expect("memory");
        meanwhile();
        child(&Program(&other))
    }
    fn truncate(&self, area: &Area, pages: u64, _by: By) {
        // It is an object of the host; no process is needed.
        self.host.change(ObjectChange::Truncate { object: self.object(area), pages }).expect("a file");
    }
    fn write_back(&self, area: &Area) {
        let object = self.object(area);
        self.host.change(ObjectChange::WriteBack { object, first: 0, end: area.pages() }).expect("a file");
    }
    fn in_file(&self, area: &Area, page: u64) -> u64 {
        // Another process reads it through a mapping of its own.
        let reader = self.host.new_space();
        let source = Source::Shared { object: self.object(area), first: 0 };
        let range = reader.map(MapRequest::anonymous(area.pages()).of(source)).expect("room");
        Program(&reader).get(range.start().offset(page * PAGE_SIZE))
    }
}
