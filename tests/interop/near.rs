//! The near end: a modelled device over UDP, a region of shared memory, and somebody who drops its pages all the time.

use super::{PAGE, PAGES, Scenario};
use anypage::mixed::{Kind, MixedMemory};
use hw_model::bus::{Bus, DeviceSpec};
use hw_model::hca::{
    AckTimeout, CompletionQueue, HcaConfig, PathMtu, QpAddress, QpSpec, QueuePair, RecvRequest, Remote,
    SendRequest, Sge, Status,
};
use hw_model::iommu::{Domain, DomainConfig};
use hw_model::link::{
    FaultyLink, LossCounts, LossRates, LossRule, PacketDirection, PacketKinds, UdpConfig, UdpCounts, UdpLink,
};
use hw_model::sync::Arc;
use hw_model::sync::atomic::{AtomicBool, Ordering};
use mr::device::model::{ModelConfig, ModelDevice};
use mr::{ProtectionDomain, Region, RegisterOptions};
use odp::space::AddressSpace;
use odp::space::process::{Options, ProcessSpace};
use std::fs::File;
use std::net::IpAddr;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// How long a request may take: the machine is emulated, and packets are lost.
const LONG: Duration = Duration::from_secs(120);

pub struct Near {
    link: Arc<FaultyLink<Arc<UdpLink>>>,
    qp: Arc<QueuePair>,
    cq: Arc<CompletionQueue>,
    region: Arc<dyn Region>,
    memory: Arc<MixedMemory>,
    /// Our own memory as a file: reached by copies only, while its pages come and go.
    bytes: File,
    dropper: Option<(Arc<AtomicBool>, std::thread::JoinHandle<()>)>,
}

impl Near {
    pub fn new(address: IpAddr, scenario: &Scenario, seed: u64) -> Self {
        let udp = Arc::new(open(address));
        let rates = LossRates { drop: scenario.loss, ..LossRates::default() };
        let rule = |direction| LossRule { direction, kinds: PacketKinds::all(), rates };
        let rules = [rule(PacketDirection::Outgoing), rule(PacketDirection::Incoming)];
        let link = Arc::new(FaultyLink::with_rules(udp, rules, seed));
        let hca = HcaConfig {
            seed,
            path_mtu: PathMtu::new(scenario.mtu).expect("a path MTU"),
            // 134 ms, and often: an emulated machine may be slow but must not give up.
            ack_timeout: AckTimeout::from_code(15).expect("five bits"),
            retry_count: 60,
            ..HcaConfig::default()
        };
        let space = ProcessSpace::open(Options::default()).expect("this process can use its own memory");
        let bus = Bus::new(space.memory());
        let spec =
            DeviceSpec::new("anypage").domain(&Domain::new(DomainConfig::default()).expect("a domain"));
        let port = bus.attach(spec).expect("a place on the bus");
        let config = ModelConfig { hca, ..ModelConfig::default() };
        let device = ModelDevice::threaded("anypage", port, Arc::clone(&link), config).expect("a device");
        let pd = device.alloc_model_pd().expect("a domain");
        let memory = Arc::new(MixedMemory::new(&[(Kind::Shared, PAGES * PAGE)]).expect("memory"));
        let options =
            if scenario.near_on_demand { RegisterOptions::on_demand() } else { RegisterOptions::pinned() };
        let range = memory.user_range(space as _);
        let region = Arc::clone(&pd).register(&range, options.with_access(hw_model::hca::Access::all()));
        let region = region.expect("a region");
        let cq = device.hca().create_cq(64).expect("a queue");
        let spec = QpSpec { access: hw_model::hca::Access::all(), ..QpSpec::new(pd.handle(), &cq) };
        let qp = device.hca().create_qp(&spec).expect("a queue pair");
        let bytes = File::options().read(true).write(true).open("/proc/self/mem").expect("our own memory");
        let dropper = scenario.near_on_demand.then(|| drop_pages(&memory));
        Self { link, qp, cq, region, memory, bytes, dropper }
    }

    pub fn address(&self) -> QpAddress {
        self.qp.address()
    }

    pub fn connect(&self, peer: QpAddress) {
        self.qp.connect(peer).expect("a fresh queue pair connects");
    }

    /// Address and key of a place in the region, as a peer names it.
    pub fn region(&self, at: u64) -> (u64, u32) {
        (self.region.address().0 + at, self.region.key().0)
    }

    fn sge(&self, at: u64, length: u64) -> Sge {
        Sge { key: self.region.key(), address: self.region.address().offset(at), length: length as u32 }
    }

    pub fn fill(&self, seed: u64, at: u64, length: u64) {
        self.bytes
            .write_all_at(&pattern(seed, at, length), self.memory.range().start().0 + at)
            .expect("written");
    }

    pub fn verify(&self, seed: u64, at: u64, length: u64, what: &str) {
        let mut found = vec![0; length as usize];
        self.bytes.read_exact_at(&mut found, self.memory.range().start().0 + at).expect("read");
        let expected = pattern(seed, at, length);
        let wrong = found.iter().zip(&expected).filter(|(a, b)| a != b).count();
        assert_eq!(wrong, 0, "{what} {length} bytes at {at}");
    }

    pub fn write(&self, at: u64, length: u64, remote: Remote) {
        self.run(&SendRequest::write(1, &[self.sge(at, length)], remote));
    }

    pub fn read(&self, at: u64, length: u64, remote: Remote) {
        self.run(&SendRequest::read(1, &[self.sge(at, length)], remote));
    }

    pub fn send(&self, at: u64, length: u64) {
        self.run(&SendRequest::send(1, &[self.sge(at, length)]));
    }

    /// Posts a receive.
    pub fn receive(&self, at: u64, length: u64) {
        self.qp.post_recv(&RecvRequest::new(2, &[self.sge(at, length)])).expect("posted");
    }

    /// Waits for the message of a posted receive.
    pub fn received(&self) {
        assert_eq!(self.completed(), Status::Success, "a receive");
    }

    /// Adds to a word of rxe; what it was goes to `at`.
    pub fn fetch_add(&self, at: u64, remote: Remote, add: u64) -> u64 {
        self.run(&SendRequest::fetch_add(1, &[self.sge(at, 8)], remote, add));
        self.word(at)
    }

    /// Swaps a word of rxe if it is what is expected; what it was goes to `at`.
    pub fn compare_swap(&self, at: u64, remote: Remote, compare: u64, swap: u64) -> u64 {
        self.run(&SendRequest::compare_swap(1, &[self.sge(at, 8)], remote, compare, swap));
        self.word(at)
    }

    /// A word of our region.
    pub fn word(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.bytes.read_exact_at(&mut bytes, self.memory.range().start().0 + at).expect("read");
        u64::from_ne_bytes(bytes)
    }

    fn run(&self, request: &SendRequest<'_>) {
        self.qp.post_send(request).expect("posted");
        assert_eq!(self.completed(), Status::Success, "{:?}", request.operation);
    }

    /// Waits for one completion.
    fn completed(&self) -> Status {
        assert!(self.cq.wait(LONG), "no completion: {:?} {:?}", self.qp.hca().stats(), self.udp());
        let mut out = Vec::new();
        self.cq.poll(&mut out, 1).expect("no overrun");
        out[0].status
    }

    pub fn lost(&self) -> LossCounts {
        self.link.counts()
    }

    pub fn udp(&self) -> UdpCounts {
        self.link.inner().counts()
    }

    /// Page faults that were handled.
    pub fn faults(&self) -> u64 {
        self.region.counters().page_faults
    }
}

/// The port may still be that of the scenario before.
fn open(address: IpAddr) -> UdpLink {
    let end = Instant::now() + LONG;
    loop {
        match UdpLink::open(&UdpConfig::at(address)) {
            Ok(link) => return link,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Takes pages out of the page table, here and there, until it is told to stop. What they hold stays in the file.
fn drop_pages(memory: &Arc<MixedMemory>) -> (Arc<AtomicBool>, std::thread::JoinHandle<()>) {
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, memory) = (Arc::clone(&stop), Arc::clone(memory));
    let body = move || {
        let mut turn = 0;
        while !stopped.load(Ordering::Relaxed) {
            turn += 1;
            memory.forget(turn * 29 % (PAGES - 3), 1 + turn % 3).expect("pages can be dropped");
            std::thread::sleep(Duration::from_micros(500));
        }
    };
    (stop, std::thread::spawn(body))
}

impl Drop for Near {
    fn drop(&mut self) {
        if let Some((stop, dropper)) = self.dropper.take() {
            stop.store(true, Ordering::Relaxed);
            dropper.join().expect("it drops pages and nothing else");
        }
    }
}

/// Bytes that differ from place to place and from seed to seed. rxe-end has the same.
fn pattern(seed: u64, from: u64, length: u64) -> Vec<u8> {
    (from..from + length).map(|at| ((at * 31 + at / 251 + seed * 97) % 255) as u8 + 1).collect()
}
