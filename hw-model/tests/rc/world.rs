//! A small world to test in: words as memory, page lists filled by hand, two HCAs on one fabric, stepped by hand.

use hw_model::addr::{PAGE_SIZE, PhysAddr, RegionAddr};
use hw_model::bus::{AtomicOp, DmaEpoch, DmaPort, HostMemory, MemoryError};
use hw_model::fault_plan::Points;
use hw_model::hca::{
    Access, Backing, Completion, CompletionQueue, Entry, FaultOutcome, Hca, HcaConfig, Key, KeySpec,
    PageFault, PageList, Path, Pd, QpSpec, QueuePair, Remote, SendRequest, Sge, Status, Step, Time,
};
use hw_model::link::{Fabric, Link};
use hw_model::sync::atomic::{AtomicU64, Ordering};
use hw_model::sync::{Arc, Mutex};

/// Memory of so many pages from physical address 0, as words that any thread may change. Pages can be made to vanish.
pub struct Words {
    words: Box<[AtomicU64]>,
    epoch: Arc<DmaEpoch>,
    /// Pages that answer [`MemoryError::Vanished`] or [`MemoryError::Retired`].
    pub gone: Mutex<Vec<(u64, bool)>>,
    /// First bytes of the writes seen, in order, while it is `Some`.
    pub writes: Mutex<Option<Vec<(u64, usize)>>>,
}

impl Words {
    pub fn new(pages: u64) -> Arc<Self> {
        let words = (0..pages * PAGE_SIZE / 8).map(|_| AtomicU64::new(0)).collect();
        Arc::new(Self { words, epoch: DmaEpoch::new(), gone: Mutex::default(), writes: Mutex::default() })
    }

    pub fn load(&self, at: u64, out: &mut [u8]) {
        for (index, byte) in out.iter_mut().enumerate() {
            let at = at as usize + index;
            *byte = self.words[at / 8].load(Ordering::Relaxed).to_le_bytes()[at % 8];
        }
    }

    pub fn store(&self, at: u64, data: &[u8]) {
        let mut done = 0;
        while done < data.len() {
            let at = at as usize + done;
            let offset = at % 8;
            let count = (8 - offset).min(data.len() - done);
            let part = &data[done..done + count];
            let word = &self.words[at / 8];
            if count == 8 {
                word.store(u64::from_le_bytes(part.try_into().expect("eight")), Ordering::Relaxed);
            } else {
                let change = |old: u64| {
                    let mut bytes = old.to_le_bytes();
                    bytes[offset..offset + count].copy_from_slice(part);
                    Some(u64::from_le_bytes(bytes))
                };
                word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, change).expect("always changes");
            }
            done += count;
        }
    }

    fn check(&self, at: PhysAddr, len: usize) -> Result<(), MemoryError> {
        assert!(at.page_offset() + len as u64 <= PAGE_SIZE, "a DMA crosses a page");
        assert!((at.0 + len as u64) <= self.words.len() as u64 * 8, "a DMA outside memory");
        match self.gone.lock().iter().find(|(page, _)| *page == at.page_number()) {
            Some((_, true)) => Err(MemoryError::Retired { at }),
            Some((_, false)) => Err(MemoryError::Vanished { at }),
            None => Ok(()),
        }
    }
}

impl HostMemory for Words {
    fn read(&self, at: PhysAddr, out: &mut [u8]) -> Result<(), MemoryError> {
        self.check(at, out.len())?;
        self.load(at.0, out);
        Ok(())
    }
    fn write(&self, at: PhysAddr, data: &[u8]) -> Result<(), MemoryError> {
        self.check(at, data.len())?;
        if let Some(writes) = &mut *self.writes.lock() {
            writes.push((at.0, data.len()));
        }
        self.store(at.0, data);
        Ok(())
    }
    fn atomic(&self, at: PhysAddr, op: AtomicOp) -> Result<u64, MemoryError> {
        if !at.0.is_multiple_of(8) {
            return Err(MemoryError::Misaligned { at });
        }
        self.check(at, 8)?;
        let word = &self.words[at.0 as usize / 8];
        let change = |old: u64| match op {
            AtomicOp::FetchAdd(add) => Some(old.wrapping_add(add)),
            AtomicOp::CompareSwap { compare, swap } => Some(if old == compare { swap } else { old }),
        };
        Ok(word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change).expect("always changes"))
    }
    fn epoch(&self) -> &Arc<DmaEpoch> {
        &self.epoch
    }
}

/// A region: pages from `first_page` of the memory, in order.
pub struct Region {
    pub key: Key,
    pub base: u64,
    pub first_page: u64,
    pub offset: u64,
    pub pages: Arc<PageList>,
}

impl Region {
    pub fn sge(&self, at: u64, length: u32) -> Sge {
        Sge { key: self.key, address: RegionAddr(self.base + at), length }
    }
    pub fn remote(&self, at: u64) -> Remote {
        Remote { key: self.key, address: RegionAddr(self.base.wrapping_add(at)) }
    }
    /// Physical address of a byte.
    pub fn phys(&self, at: u64) -> u64 {
        self.first_page * PAGE_SIZE + self.offset + at
    }
    pub fn entry(&self, page: u64, write: bool) -> Entry {
        let at = PhysAddr((self.first_page + page) * PAGE_SIZE).to_dma_identity();
        Entry::present(at, Path::Direct, Backing::Anonymous, write)
    }
    pub fn present(&self, page: u64, write: bool) {
        self.pages.store(page, self.entry(page, write));
    }
    pub fn absent(&self, page: u64) {
        self.pages.store(page, Entry::EMPTY);
    }
    /// The page that an event speaks of.
    pub fn page_of(&self, fault: &PageFault) -> u64 {
        (self.offset + fault.address.0 - self.base) / PAGE_SIZE
    }
}

pub const ALL: Access = Access::all();

/// One HCA with its memory.
pub struct Host {
    pub memory: Arc<Words>,
    pub hca: Arc<Hca>,
    pub pd: Pd,
    pub cq: Arc<CompletionQueue>,
    next_page: Mutex<u64>,
}

impl Host {
    pub fn new(link: Box<dyn Link>, config: HcaConfig, pages: u64) -> Self {
        Self::on(Words::new(pages), link, config, 0)
    }

    /// A host whose regions are in `memory` from page `first` on.
    pub fn on(memory: Arc<Words>, link: Box<dyn Link>, config: HcaConfig, first: u64) -> Self {
        Self::planned(memory, link, (config, Points::OFF), first)
    }

    /// The same whose fault points do what they are told.
    pub fn planned(
        memory: Arc<Words>,
        link: Box<dyn Link>,
        (config, points): (HcaConfig, Points),
        first: u64,
    ) -> Self {
        let port = DmaPort::direct(memory.clone());
        let hca = Hca::with_points(config, port, link, points).expect("an HCA");
        let pd = hca.alloc_pd().expect("a domain");
        let cq = hca.create_cq(4096).expect("a queue");
        Self { memory, hca, pd, cq, next_page: Mutex::new(first) }
    }

    /// A region of `length` bytes that begins `offset` bytes into its first page, all present and writable.
    pub fn region_at(&self, base: u64, offset: u64, length: u64, access: Access, pd: Pd) -> Region {
        let count = (offset + length).div_ceil(PAGE_SIZE);
        let mut next = self.next_page.lock();
        let first_page = *next;
        *next += count;
        let pages = Arc::new(PageList::new(count).expect("a list"));
        let spec = KeySpec {
            pd,
            access,
            address: RegionAddr(base),
            length,
            first_page_offset: offset,
            pages: Arc::clone(&pages),
        };
        let key = self.hca.create_key(spec).expect("a key");
        let region = Region { key, base, first_page, offset, pages };
        (0..count).for_each(|page| region.present(page, true));
        region
    }

    pub fn region(&self, length: u64) -> Region {
        self.region_at(0x7f00_0000_1000, 0, length, ALL, self.pd)
    }

    /// The word at `at` of a region.
    pub fn word(&self, region: &Region, at: u64) -> u64 {
        u64::from_le_bytes(self.bytes(region, at, 8).try_into().expect("eight"))
    }

    pub fn qp(&self) -> Arc<QueuePair> {
        self.hca.create_qp(&QpSpec::new(self.pd, &self.cq)).expect("a queue pair")
    }

    pub fn bytes(&self, region: &Region, at: u64, length: u64) -> Vec<u8> {
        let mut out = vec![0; length as usize];
        self.memory.load(region.phys(at), &mut out);
        out
    }

    pub fn fill(&self, region: &Region, at: u64, data: &[u8]) {
        self.memory.store(region.phys(at), data);
    }
}

pub fn connect(a: &QueuePair, b: &QueuePair) {
    a.connect(b.address()).expect("a connects");
    b.connect(a.address()).expect("b connects");
}

/// Two hosts with one queue pair each, connected, driven by steps and a time that jumps when there is nothing to do.
pub struct Pair {
    pub a: Host,
    pub b: Host,
    pub qa: Arc<QueuePair>,
    pub qb: Arc<QueuePair>,
    pub now: Time,
}

pub fn config() -> HcaConfig {
    HcaConfig { callers_drive: false, ..HcaConfig::default() }
}

impl Pair {
    pub fn new(config: HcaConfig) -> Self {
        let fabric = Fabric::new();
        Self::over(config, Box::new(fabric.port()), Box::new(fabric.port()))
    }

    pub fn over(config: HcaConfig, a: Box<dyn Link>, b: Box<dyn Link>) -> Self {
        // Two seeds, so that the keys of the two devices are not the same numbers.
        Self::of(Host::new(a, config, 2048), Host::new(b, HcaConfig { seed: 1, ..config }, 2048))
    }

    /// Two devices over one memory.
    pub fn sharing(config: HcaConfig, a: Box<dyn Link>, b: Box<dyn Link>) -> Self {
        let memory = Words::new(2048);
        let a = Host::on(Arc::clone(&memory), a, config, 0);
        Self::of(a, Host::on(memory, b, HcaConfig { seed: 1, ..config }, 1024))
    }

    pub fn of(a: Host, b: Host) -> Self {
        let (qa, qb) = (a.qp(), b.qp());
        connect(&qa, &qb);
        Self { a, b, qa, qb, now: Time(0) }
    }

    /// One step of every engine. The earliest time at which there is something to do, or `None` if there is now.
    pub fn step(&mut self) -> Option<Option<Time>> {
        let mut wake: Option<Time> = None;
        let mut idle = true;
        for host in [&self.a, &self.b] {
            for engine in 0..host.hca.config().engines as usize {
                match host.hca.step_engine(engine, self.now) {
                    Step::Worked | Step::Blocked => idle = false,
                    Step::Idle { wake_at } => wake = [wake, wake_at].into_iter().flatten().min(),
                }
            }
        }
        idle.then_some(wake)
    }

    /// Until nothing is left to do now; time stands still.
    pub fn settle(&mut self) {
        for _ in 0..1_000_000 {
            if self.step().is_some() {
                return;
            }
        }
        panic!("the engines never come to rest");
    }

    /// Until nothing is left to do at all: time jumps from deadline to deadline. Faults are answered by `answer`.
    pub fn run(&mut self, mut answer: impl FnMut(&Host, &PageFault) -> FaultOutcome) {
        for _ in 0..10_000_000 {
            let idle = self.step();
            let mut answered = false;
            for host in [&self.a, &self.b] {
                while let Some(fault) = host.hca.faults().next() {
                    let outcome = answer(host, &fault);
                    host.hca.resume(fault.token, outcome);
                    answered = true;
                }
            }
            match idle {
                Some(None) if !answered => return,
                Some(Some(wake)) if !answered => self.now = wake.max(self.now),
                _ => {}
            }
        }
        panic!("the engines never come to rest");
    }

    pub fn run_without_faults(&mut self) {
        self.run(|_, fault| panic!("unexpected {fault:?}"));
    }

    /// Posts on `qa`, runs, and gives the one completion.
    pub fn ask(&mut self, request: &SendRequest<'_>) -> Status {
        self.qa.post_send(request).expect("posted");
        self.run_without_faults();
        let completions = self.a.take();
        assert_eq!(completions.len(), 1, "one request, one completion: {completions:?}");
        assert_eq!(completions[0].id, request.id);
        completions[0].status
    }
}

impl Host {
    /// All completions.
    pub fn take(&self) -> Vec<Completion> {
        let mut out = Vec::new();
        while self.cq.poll(&mut out, 64).expect("no overrun") > 0 {}
        out
    }
}

/// Bytes that differ from place to place.
pub fn pattern(seed: u64, length: u64) -> Vec<u8> {
    (0..length).map(|at| ((at * 31 + at / 251 + seed * 97) % 255) as u8 + 1).collect()
}
