//! What crosses the wire, beside what the machine can do without us. Ratios of things measured in turns, in one run.
//!
//! Expected, in words: over UDP the kernel copies each byte twice, as in a plain stream; we add a copy from the region to a
//! payload buffer, the ICRC on both sides (a quarter of a copy each with carry-less multiplication), and two copies from the
//! receive buffer to the place, so 0.6 of the plain stream if the receiver's copies overlap with the sender's. Over shared memory a
//! byte is copied four times, two of them on each side and one of those within the cache: 0.6 of memcpy if both sides have
//! a processor. A small write over shared memory and its acknowledgement are one wake there and one back.
//!
//! `cargo bench --bench wire`; `-- udp`, `shm` or `ping` for one of them, `-- --test` to look only whether everything runs.

mod busy;
mod plain;

use busy::{Busy, Flow};
use hw_model::bus::{Bus, DeviceSpec};
use hw_model::hca::{
    Access, CompletionQueue, HcaConfig, PathMtu, QpSpec, QueuePair, Remote, SendRequest, Sge, Status,
};
use hw_model::link::{Link, ShmConfig, ShmLink, UdpConfig, UdpLink};
use hw_model::sync::{Arc, thread};
use mr::device::model::{ModelConfig, ModelDevice};
use mr::{ProtectionDomain, Region, RegisterOptions};
use odp::space::AddressSpace;
use odp::space::process::{Options, OwnedMemory, ProcessSpace};
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

/// Bytes of a message.
const MESSAGE: u32 = 64 << 10;
/// Messages under way.
const WINDOW: u64 = 16;
/// Measurements of each, in turns; the best of each counts, as everything else on the machine only takes away.
const TURNS: usize = 7;

/// One side.
struct Side {
    device: Arc<ModelDevice>,
    qp: Arc<QueuePair>,
    cq: Arc<CompletionQueue>,
    region: Arc<dyn Region>,
    bytes: u64,
}

impl Side {
    fn new(link: Arc<dyn Link>, mtu: u32, bytes: u64, seed: u64) -> Self {
        let path_mtu = PathMtu::new(mtu).expect("an MTU");
        let hca = HcaConfig { path_mtu, window_bytes: 512 << 10, seed, ..HcaConfig::default() };
        let space = ProcessSpace::open(Options::default()).expect("this process can use its own memory");
        let port = Bus::new(space.memory()).attach(DeviceSpec::new("wire")).expect("a place on the bus");
        let config = ModelConfig { hca, ..ModelConfig::default() };
        let device = ModelDevice::threaded("wire", port, link, config).expect("a device");
        let pd = device.alloc_model_pd().expect("a domain");
        let memory = Arc::new(OwnedMemory::new(&space, bytes).expect("memory"));
        let region =
            Arc::clone(&pd).register(&memory.user_range(), RegisterOptions::pinned()).expect("a region");
        let cq = device.hca().create_cq(1024).expect("a queue");
        let access = Access::REMOTE_WRITE | Access::REMOTE_READ;
        let qp = device
            .hca()
            .create_qp(&QpSpec { access, ..QpSpec::new(pd.handle(), &cq) })
            .expect("a queue pair");
        Self { device, qp, cq, region, bytes }
    }

    fn pair(links: [Arc<dyn Link>; 2], mtu: u32, bytes: u64) -> (Self, Self) {
        let [a, b] = links;
        let (a, b) = (Self::new(a, mtu, bytes, 1), Self::new(b, mtu, bytes, 2));
        a.qp.connect(b.qp.address()).expect("connects");
        b.qp.connect(a.qp.address()).expect("connects");
        (a, b)
    }

    fn post(&self, to: &Self, at: u64, length: u32) {
        let local = [Sge { key: self.region.key(), address: self.region.address().offset(at), length }];
        let remote = Remote { key: to.region.key(), address: to.region.address().offset(at) };
        self.qp.post_send(&SendRequest::write(0, &local, remote)).expect("the queue has room");
    }

    /// Writes to `to`, over all of both regions.
    fn stream(&self, to: &Self, time: Duration) -> Flow {
        let retries = || self.device.hca().stats().retries;
        let (before, busy, begun) = (retries(), Busy::now(), Instant::now());
        let (mut posted, mut ended) = (0, 0);
        let mut out = Vec::with_capacity(64);
        loop {
            let over = begun.elapsed() > time;
            while !over && posted - ended < WINDOW {
                self.post(to, posted * u64::from(MESSAGE) % self.bytes, MESSAGE);
                posted += 1;
            }
            out.clear();
            self.cq.poll(&mut out, 64).expect("no overrun");
            assert!(out.iter().all(|completion| completion.status == Status::Success), "{out:?}");
            ended += out.len() as u64;
            if over && ended == posted {
                if retries() > before {
                    println!("    ({} times sent again)", retries() - before);
                }
                return Flow::of(ended * u64::from(MESSAGE), begun, &busy);
            }
        }
    }

    /// Nanoseconds of a write of 8 bytes and its acknowledgement, one at a time.
    fn ping(&self, to: &Self, rounds: u32) -> f64 {
        let begun = Instant::now();
        let mut out = Vec::with_capacity(1);
        for _ in 0..rounds {
            self.post(to, 0, 8);
            out.clear();
            while self.cq.poll(&mut out, 1).expect("no overrun") == 0 {
                std::hint::spin_loop();
            }
            assert_eq!(out[0].status, Status::Success);
        }
        begun.elapsed().as_nanos() as f64 / f64::from(rounds)
    }
}

/// The first of many loopback addresses that can be opened.
fn free<T>(open: impl Fn(IpAddr) -> Option<T>) -> T {
    let of_process = std::process::id() % 200 + 2;
    let mut addresses = (2..250).map(|last| IpAddr::from(Ipv4Addr::new(127, 9, of_process as u8, last)));
    addresses.find_map(open).expect("a free loopback address")
}

fn udp() -> Arc<dyn Link> {
    free(|address| Some(Arc::new(UdpLink::open(&UdpConfig::at(address)).ok()?)))
}

fn shm() -> Arc<dyn Link> {
    free(|address| Some(Arc::new(ShmLink::open(&ShmConfig::at(address)).ok()?)))
}

/// Plain copies of a message, over memory that is larger than the caches.
fn memcpy(bytes: usize, time: Duration) -> Flow {
    let (source, mut target) = (vec![1_u8; bytes], vec![0_u8; bytes]);
    let message = MESSAGE as usize;
    let (mut copied, busy, begun) = (0, Busy::now(), Instant::now());
    while begun.elapsed() < time {
        let at = copied % bytes;
        target[at..at + message].copy_from_slice(&source[at..at + message]);
        black_box(&target[at]);
        copied += message;
    }
    Flow::of(copied as u64, begun, &busy)
}

/// Nanoseconds of two wakes: one thread wakes another, which wakes it.
fn two_wakes(rounds: u32) -> f64 {
    let (to, from) = (plain::Bell::new(), plain::Bell::new());
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..rounds {
                to.wait();
                from.ring();
            }
        });
        let begun = Instant::now();
        for _ in 0..rounds {
            to.ring();
            from.wait();
        }
        begun.elapsed().as_nanos() as f64 / f64::from(rounds)
    })
}

/// The best of ours beside the best of theirs, by the clock and by the time of the busiest thread.
fn say(ours: &str, theirs: &str, flows: &[(Flow, Flow)]) {
    let most = |rate: fn(&Flow) -> f64| {
        let all =
            |of: fn(&(Flow, Flow)) -> &Flow| flows.iter().map(|pair| rate(of(pair))).fold(0.0, f64::max);
        (all(|pair| &pair.0), all(|pair| &pair.1))
    };
    let (a, b) = most(|flow| flow.rate);
    println!("{ours}: {:.0} MB/s; {theirs} {:.0} MB/s; ratio {:.2}", a / 1e6, b / 1e6, a / b);
    let (a, b) = most(|flow| flow.possible);
    println!("    a second of the busiest thread: {:.0} MB; {:.0} MB; ratio {:.2}", a / 1e6, b / 1e6, a / b);
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let quick = arguments.iter().any(|argument| argument == "--test");
    let chosen: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let wanted = |name: &str| chosen.is_empty() || chosen.iter().any(|chosen| *chosen == name);
    let (turns, time, rounds) =
        if quick { (1, Duration::from_millis(50), 200) } else { (TURNS, Duration::from_millis(400), 20_000) };

    if wanted("udp") {
        let (a, b) = Side::pair([udp(), udp()], 4096, 1 << 20);
        let flows: Vec<_> = (0..turns).map(|_| (a.stream(&b, time), plain::stream(time))).collect();
        say("write of 64 KiB over UDP, path MTU 4096", "a plain sendmmsg stream with GSO", &flows);
    }

    const LARGE: u64 = 64 << 20;
    if wanted("shm") {
        let (a, b) = Side::pair([shm(), shm()], 16 << 10, LARGE);
        let flows: Vec<_> = (0..turns).map(|_| (a.stream(&b, time), memcpy(LARGE as usize, time))).collect();
        say("write of 64 KiB over shared memory", "memcpy", &flows);
    }
    if wanted("ping") {
        let (a, b) = Side::pair([shm(), shm()], 16 << 10, 4096);
        let pairs: Vec<_> = (0..turns).map(|_| (a.ping(&b, rounds), two_wakes(rounds))).collect();
        let ours = pairs.iter().map(|pair| pair.0).fold(f64::MAX, f64::min);
        let theirs = pairs.iter().map(|pair| pair.1).fold(f64::MAX, f64::min);
        println!(
            "write of 8 B and its acknowledgement over shared memory: {:.1} us; two wakes {:.1} us; ratio {:.2}",
            ours / 1e3,
            theirs / 1e3,
            ours / theirs
        );
    }
}
