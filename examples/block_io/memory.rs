//! The memory of the request, and the machine it is in: a controller and a GPU below one switch.

use crate::Error;
use anypage::mixed::{HUGE, Kind, MixedMemory};
use hw_model::addr::{PAGE_SIZE, PhysAddr, VirtRange, page_bytes};
use hw_model::bus::{Acs, Bar, Bus, DeviceSpec, DmaPort, HostMemory};
use hw_model::fault_plan::{FaultPlan, Point, Points};
use hw_model::hca::Backing;
use hw_model::iommu::{Domain, DomainConfig};
use hw_model::sync::Arc;
use mr::block::Bvec;
use mr::dma::{DmaConfig, DmaDevice};
use odp::page::PageRun;
use odp::space::process::{Options, ProcessSpace};
use odp::space::{Access, AddressSpace, Watch};

/// Pages of anonymous memory, used in an order of their own.
const ANONYMOUS: u64 = 16;
/// Bytes of file pages, and of the BAR that the request uses first and later.
const FILE: u64 = 64 << 10;
const BAR_FIRST: u64 = 64 << 10;
const BAR_LATER: u64 = 16 << 10;
/// Bytes of shared memory, and of them in the request.
const SHARED: u64 = 64 << 10;
const SHARED_USED: u64 = (40 << 10) + 1536;
/// Where in its page the first byte lies.
const HEAD: u64 = 512;

/// A piece of the request before it has an address: what of which memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Bytes of the process's memory.
    Process { offset: u64, len: u64 },
    /// Bytes of the BAR.
    Peer { offset: u64, len: u64 },
}

/// The request's memory. What is in it may be at any place; its pages stay as nothing here changes them.
pub struct RequestMemory {
    space: Arc<ProcessSpace>,
    host: Arc<dyn HostMemory>,
    range: VirtRange,
    runs: Vec<PageRun>,
    bar: Arc<Bar>,
    disk: DmaPort,
    dma: Arc<DmaDevice>,
    steps: Arc<FaultPlan>,
    places: Vec<Place>,
    _watch: Watch,
    _memory: Arc<MixedMemory>,
}

impl RequestMemory {
    pub fn new(iommu: bool) -> Result<Self, Error> {
        let space = ProcessSpace::open(Options::default())?;
        let parts = [
            (Kind::TransparentHuge, HUGE),
            (Kind::Anonymous, page_bytes(ANONYMOUS)),
            (Kind::File, FILE),
            (Kind::Shared, SHARED),
        ];
        let memory = Arc::new(MixedMemory::new(&parts)?);
        let range = memory.range();
        let watch = space.watch(range)?;
        let mut runs = Vec::new();
        space.fault(range, Access::Write, &mut runs)?;

        let bus = Bus::new(space.memory());
        let root = bus.add_root_port(bus.first_bridge(), Acs::Off)?;
        let switch = bus.add_switch(root)?;
        let disk = DeviceSpec::new("nvme0").under(bus.add_downstream_port(switch, Acs::Off)?);
        let disk = if iommu { disk.domain(&Domain::new(DomainConfig::default())?) } else { disk };
        let disk = bus.attach(disk)?;
        let gpu = bus.attach(DeviceSpec::new("gpu0").under(bus.add_downstream_port(switch, Acs::Off)?))?;
        let bar = bus.add_ram_bar(gpu.device(), 1 << 20)?;
        // A plan without rules injects nothing and counts everything.
        let steps = FaultPlan::new(0, Vec::new());
        let config = DmaConfig { points: Points::with(&steps), ..DmaConfig::default() };
        let dma = DmaDevice::new(disk.clone(), config);
        let (host, places) = (space.memory(), places());
        Ok(Self { space, host, range, runs, bar, disk, dma, steps, places, _watch: watch, _memory: memory })
    }

    pub fn space(&self) -> &Arc<ProcessSpace> {
        &self.space
    }
    pub fn disk(&self) -> &DmaPort {
        &self.disk
    }
    pub fn dma(&self) -> &Arc<DmaDevice> {
        &self.dma
    }
    pub fn bar(&self) -> &Bar {
        &self.bar
    }

    /// How often the DMA layer came to `point`.
    pub fn steps(&self, point: Point) -> u64 {
        self.steps.visits().iter().find(|(met, _)| *met == point).map_or(0, |(_, visits)| *visits)
    }

    /// The request's bvecs.
    pub fn bvecs(&self) -> Vec<Bvec> {
        self.places.iter().flat_map(|place| self.bvecs_of(*place)).collect()
    }

    fn bvecs_of(&self, place: Place) -> Vec<Bvec> {
        match place {
            Place::Peer { offset, len } => {
                let (phys, provider) = (self.bar.base().offset(offset), Some(self.bar.provider()));
                vec![Bvec { phys, len, backing: Backing::DmabufPeer, provider }]
            }
            Place::Process { offset, len } => {
                let part = VirtRange::new(self.range.start().offset(offset), len).expect("part of a mapping");
                let of_run = |run: &PageRun| {
                    let part = run.range().intersection(part)?;
                    let phys = run.phys.offset(part.start().0 - run.start.0);
                    Some(Bvec { phys, len: part.len(), backing: run.backing, provider: run.provider })
                };
                self.runs.iter().filter_map(of_run).collect()
            }
        }
    }

    /// Writes `data` to the request's bytes, in order.
    pub fn put(&self, data: &[u8]) -> Result<(), Error> {
        let mut rest = data;
        for bvec in self.bvecs() {
            let (now, later) = rest.split_at(bvec.len as usize);
            self.write(&bvec, now)?;
            rest = later;
        }
        Ok(())
    }

    /// The request's bytes, in order.
    pub fn get(&self) -> Result<Vec<u8>, Error> {
        self.read_all(self.bvecs())
    }

    /// Writes `byte` everywhere, outside the request too.
    pub fn fill(&self, byte: u8) -> Result<(), Error> {
        for bvec in self.everything() {
            self.write(&bvec, &vec![byte; bvec.len as usize])?;
        }
        Ok(())
    }

    /// Whether every byte that is not in the request is `byte`.
    pub fn is_untouched_around(&self, byte: u8) -> Result<bool, Error> {
        let all = self.read_all(self.everything())?.iter().filter(|found| **found == byte).count();
        let inside = self.get()?.iter().filter(|found| **found == byte).count();
        let bytes: u64 = self.everything().iter().map(|bvec| bvec.len).sum();
        let used: u64 = self.bvecs().iter().map(|bvec| bvec.len).sum();
        Ok((all - inside) as u64 == bytes - used)
    }

    fn everything(&self) -> Vec<Bvec> {
        let whole = [
            Place::Process { offset: 0, len: self.range.len() },
            Place::Peer { offset: 0, len: self.bar.size() },
        ];
        whole.iter().flat_map(|place| self.bvecs_of(*place)).collect()
    }

    fn read_all(&self, bvecs: Vec<Bvec>) -> Result<Vec<u8>, Error> {
        let mut all = Vec::new();
        for bvec in bvecs {
            let mut bytes = vec![0; bvec.len as usize];
            self.by_page(&bvec, |phys, from, to| match bvec.provider {
                Some(_) => Ok(self.bar.storage().read(phys.0 - self.bar.base().0, &mut bytes[from..to])?),
                None => Ok(self.host.read(phys, &mut bytes[from..to])?),
            })?;
            all.append(&mut bytes);
        }
        Ok(all)
    }

    fn write(&self, bvec: &Bvec, data: &[u8]) -> Result<(), Error> {
        self.by_page(bvec, |phys, from, to| match bvec.provider {
            Some(_) => Ok(self.bar.storage().write(phys.0 - self.bar.base().0, &data[from..to])?),
            None => Ok(self.host.write(phys, &data[from..to])?),
        })
    }

    /// Goes over the pages of `bvec` inside the DMA epoch, as whoever copies by physical address does.
    fn by_page(
        &self,
        bvec: &Bvec,
        mut copy: impl FnMut(PhysAddr, usize, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut slot = self.host.epoch().register().ok_or("the memory has no room for another copier")?;
        let mut done = 0;
        while done < bvec.len {
            let phys = bvec.phys.offset(done);
            let now = (bvec.len - done).min(PAGE_SIZE - phys.page_offset());
            let _busy = slot.enter().map_err(|_| "the DMA epoch is closed")?;
            copy(phys, done as usize, (done + now) as usize)?;
            done += now;
        }
        Ok(())
    }
}

fn places() -> Vec<Place> {
    let anonymous = |index: u64| {
        let (page, head) = (index * 7 % ANONYMOUS, if index == 0 { HEAD } else { 0 });
        Place::Process { offset: HUGE + page_bytes(page) + head, len: PAGE_SIZE - head }
    };
    let after = HUGE + page_bytes(ANONYMOUS);
    let mut places: Vec<Place> = (0..ANONYMOUS).map(anonymous).collect();
    places.extend([
        Place::Peer { offset: BAR_FIRST, len: BAR_FIRST },
        Place::Process { offset: 0, len: HUGE },
        Place::Peer { offset: 0, len: BAR_LATER },
        Place::Process { offset: after, len: FILE },
        Place::Process { offset: after + FILE, len: SHARED_USED },
    ]);
    places
}
