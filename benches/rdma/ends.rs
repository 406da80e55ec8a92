//! Two HCAs of one process with memory, keys and queue pairs, and writes from one to the other.

use anypage::machine::{Machine, MachineConfig};
use hw_model::addr::{PAGE_SIZE, RegionAddr};
use hw_model::hca::{
    Access, Completion, CompletionQueue, Entry, Key, KeySpec, PageList, QpSpec, QueuePair, Remote,
    SendRequest, Sge, Status,
};
use hw_model::sync::Arc;
use mr::device::model::{ModelDevice, ModelPd, ModelRegion};
use mr::{Region, RegisterOptions};
use odp::space::AddressSpace;
use odp::space::UserRange;
use odp::space::process::{Options, OwnedMemory, ProcessSpace};

/// Requests in a list.
pub const LIST: usize = 16;

/// What writes go from or to: a key, its first address, and its bytes.
#[derive(Clone, Copy)]
pub struct Place {
    key: Key,
    address: RegionAddr,
    bytes: u64,
}

/// A device with a protection domain.
pub struct Side {
    device: Arc<ModelDevice>,
    pd: Arc<ModelPd>,
    cq: Arc<CompletionQueue>,
    regions: Vec<Arc<ModelRegion>>,
    keys: Vec<Key>,
}

impl Drop for Side {
    fn drop(&mut self) {
        for key in self.keys.drain(..) {
            self.device.hca().destroy_key(key).expect("made here");
        }
    }
}

impl Side {
    fn new(device: &Arc<ModelDevice>) -> Self {
        let pd = ModelPd::alloc(device).expect("a domain");
        let cq = device.hca().create_cq(1024).expect("a queue");
        Self { device: Arc::clone(device), pd, cq, regions: Vec::new(), keys: Vec::new() }
    }

    /// Registers memory.
    pub fn register(&mut self, memory: &UserRange, options: RegisterOptions) -> Place {
        let region = self.pd.register_model(memory, options).expect("a region");
        let place = Place { key: region.key(), address: region.address(), bytes: region.len() };
        self.regions.push(region);
        place
    }

    /// So many keys, each with a page list of its own that names one page of the first region.
    pub fn keys(&mut self, count: u64) -> Vec<Place> {
        let entries = self.regions[0].raw_entries().expect("the model shows its list");
        let (address, bytes, pd) = (RegionAddr(0), PAGE_SIZE, self.pd.handle());
        for index in 0..count {
            let pages = Arc::new(PageList::new(1).expect("one entry"));
            pages.store(0, Entry::from_bits(entries[index as usize % entries.len()]));
            let access = Access::LOCAL_WRITE | Access::REMOTE_WRITE;
            let spec = KeySpec { pd, access, address, length: bytes, first_page_offset: 0, pages };
            self.keys.push(self.device.hca().create_key(spec).expect("a key"));
        }
        self.keys.iter().map(|&key| Place { key, address, bytes }).collect()
    }

    fn queue_pair(&self) -> Arc<QueuePair> {
        let spec = QpSpec { max_send_requests: 64, ..QpSpec::new(self.pd.handle(), &self.cq) };
        self.device.hca().create_qp(&spec).expect("a queue pair")
    }
}

/// Both sides, over memory of this process.
pub struct Ends {
    pub space: Arc<ProcessSpace>,
    pub near: Side,
    pub far: Side,
    /// The machine outlives its objects.
    _machine: Machine,
}

impl Ends {
    pub fn new() -> Self {
        let space = ProcessSpace::open(Options::default()).expect("this process can use its own memory");
        let machine = Machine::new(space.memory(), None, &MachineConfig::default()).expect("a machine");
        let (near, far) = (Side::new(&machine.near), Side::new(&machine.far));
        Self { space, near, far, _machine: machine }
    }

    pub fn memory(&self, bytes: u64) -> UserRange {
        Arc::new(OwnedMemory::new(&self.space, bytes).expect("memory")).user_range()
    }

    /// Connects so many pairs of queue pairs.
    pub fn connect(&self, count: usize) -> Vec<(Arc<QueuePair>, Arc<QueuePair>)> {
        let pair = |_| {
            let (far, near) = (self.far.queue_pair(), self.near.queue_pair());
            far.connect(near.address()).expect("connected");
            near.connect(far.address()).expect("connected");
            (far, near)
        };
        let pairs: Vec<_> = (0..count).map(pair).collect();
        // A new queue pair has one turn, in which it finds nothing to do.
        for _ in 0..=count / 16 {
            self.far.device.hca().progress();
            self.near.device.hca().progress();
        }
        pairs
    }
}

/// Writes over some queue pairs, one after the other, from place to place of some regions.
pub struct Writer<'a> {
    pub ends: &'a Ends,
    pub pairs: &'a [(Arc<QueuePair>, Arc<QueuePair>)],
    pub from: &'a [Place],
    pub to: &'a [Place],
    turn: usize,
    offset: u64,
    completions: Vec<Completion>,
}

impl<'a> Writer<'a> {
    pub fn new(
        ends: &'a Ends,
        pairs: &'a [(Arc<QueuePair>, Arc<QueuePair>)],
        from: &'a [Place],
        to: &'a [Place],
    ) -> Self {
        Self { ends, pairs, from, to, turn: 0, offset: 0, completions: Vec::with_capacity(1) }
    }

    /// One write, and its completion.
    pub fn one(&mut self, bytes: u32) {
        let (local, remote) = self.next(bytes);
        self.post(&[SendRequest::write(0, &[local], remote)]);
    }

    /// A list of [`LIST`] writes on one queue pair, of which the last leaves a completion.
    pub fn list(&mut self, bytes: u32) {
        let places: [_; LIST] = std::array::from_fn(|_| self.next(bytes));
        let locals = places.map(|(local, _)| [local]);
        let requests: [_; LIST] = std::array::from_fn(|index| SendRequest {
            signaled: index == LIST - 1,
            ..SendRequest::write(0, &locals[index], places[index].1)
        });
        self.post(&requests);
    }

    fn post(&mut self, requests: &[SendRequest<'_>]) {
        self.turn += 1;
        self.pairs[self.turn % self.pairs.len()].0.post_send_list(requests).expect("the queue has room");
        self.completions.clear();
        while self.ends.far.cq.poll(&mut self.completions, 1).expect("no overrun") == 0 {
            std::hint::spin_loop();
        }
        assert_eq!(self.completions[0].status, Status::Success);
    }

    /// Where the next write is from and to: the next region, and the next place in it.
    fn next(&mut self, bytes: u32) -> (Sge, Remote) {
        let stride = u64::from(bytes).next_multiple_of(64);
        self.offset += 1;
        // Not the neighbour in memory: a region is met as its user comes along.
        let region = (self.offset.wrapping_mul(7919)) as usize;
        let place = |places: &[Place]| {
            let place = places[region % places.len()];
            (place.key, place.address.offset(self.offset * stride % (place.bytes - stride + 1) / 64 * 64))
        };
        let ((local, from), (key, to)) = (place(self.from), place(self.to));
        (Sge { key: local, address: from, length: bytes }, Remote { key, address: to })
    }
}
