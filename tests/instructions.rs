//! Costs that are counted in instructions, not in seconds: valgrind's callgrind counts the same for the same binary
//! whatever else the machine does.
//!
//! The binary runs itself under valgrind with a number of rounds in [`ROUNDS`]; the difference between two numbers of
//! rounds leaves the start of the process out.

use hw_model::addr::{PAGE_SIZE, PhysAddr, RegionAddr, page_bytes};
use hw_model::bus::{Bus, DeviceSpec, DmaPort, RamMemory};
use hw_model::fault_plan::{Point, Points};
use hw_model::hca::{
    Access, Backing, CompletionQueue, Entry, Hca, HcaConfig, Key, KeySpec, PageList, Path, QpSpec, QueuePair,
    Remote, SendRequest, Sge, Status,
};
use hw_model::iommu::{Domain, DomainConfig, LeafSize};
use hw_model::link::Fabric;
use hw_model::sync::Arc;
use libtest_mimic::{Arguments, Failed, Trial};
use mr::device::model::{ModelConfig, ModelDevice};
use mr::dma::{DmaConfig, DmaDevice, Extent, Mapping, Segments};
use mr::{Device, RegisterOptions};
use odp::space::sim::{MapRequest, SimConfig, SimHost};
use odp::space::{Access as Wanted, AddressSpace, UserRange};
use std::hint::black_box;
use std::process::{Command, ExitCode};

const ROUNDS: &str = "ANYPAGE_INSTRUCTION_ROUNDS";
const SUBJECT: &str = "ANYPAGE_INSTRUCTION_SUBJECT";
const MANY: u64 = 100_000;
/// Rounds of what takes thousands of instructions.
const FEW: u64 = 300;
/// Writes in a list.
const LIST: usize = 16;
/// Instructions of a write of 64 bytes, alone and in a list.
const MOST_ALONE: f64 = 11_000.0;
const MOST_IN_LIST: f64 = 7_000.0;
/// Pages of the regions that are counted.
const PAGES: u64 = 64;
/// BARs of a machine that has providers of peer-to-peer memory.
const PROVIDERS: u64 = 8;

const POINT: Point = Point::fallible("instructions.point");

/// What is counted.
fn subject(name: &str, rounds: u64) {
    match name {
        "loop" => bare(rounds),
        "point" => pointed(rounds),
        "write" => writes(rounds, 1),
        "writes" => writes(rounds, LIST),
        "region, no provider" => region(rounds, 0),
        "region, providers" => region(rounds, PROVIDERS),
        "mapping, no provider" => mapping(rounds, 0),
        "mapping, providers" => mapping(rounds, PROVIDERS),
        other => panic!("nothing is called {other}"),
    }
}

/// A loop with nothing in it. Not inlined, nor is the next, so that what else is counted here changes neither.
#[inline(never)]
fn bare(rounds: u64) {
    for round in 0..rounds {
        black_box(round);
    }
}

/// The same with a point in it.
#[inline(never)]
fn pointed(rounds: u64) {
    let points = black_box(Points::OFF);
    for round in 0..rounds {
        if points.meet(POINT).fails() {
            black_box(points.clone());
        }
        black_box(round);
    }
}

/// A device behind an IOMMU, on a bus with `providers` BARs of others.
fn port(memory: Arc<dyn hw_model::bus::HostMemory>, providers: u64) -> DmaPort {
    let bus = Bus::new(memory);
    let domain = Domain::new(DomainConfig::default()).expect("the default is possible");
    let port = bus.attach(DeviceSpec::new("hca0").domain(&domain)).expect("room on the bus");
    for _ in 0..providers {
        let gpu = bus.attach(DeviceSpec::new("gpu")).expect("room on the bus");
        bus.add_ram_bar(gpu.device(), 1 << 20).expect("room in the window");
    }
    port
}

/// Registers memory that has no peer's page in it, moves a word through each page, and deregisters.
fn region(rounds: u64, providers: u64) {
    let host = SimHost::new(SimConfig::default()).expect("memory");
    let space = host.new_space();
    let range = space.map(MapRequest::anonymous(PAGES)).expect("memory");
    space.fault(range, Wanted::Write, &mut Vec::new()).expect("mapped");
    let memory = UserRange::simulated(&space, range);
    let config = ModelConfig { hca: HcaConfig::simulated(1), ..ModelConfig::default() };
    let port = port(space.memory(), providers);
    let device = ModelDevice::stepped("hca0", port.clone(), Fabric::new().port(), config).expect("a device");
    let pd = device.alloc_pd().expect("a domain");
    for _ in 0..rounds {
        let region = Arc::clone(&pd).register(&memory, RegisterOptions::pinned()).expect("a region");
        for entry in region.raw_entries().expect("the model shows its list") {
            let mut word = [0; 8];
            port.read(Entry::from_bits(entry).address(), &mut word).expect("present");
            black_box(word);
        }
        region.deregister();
    }
}

/// The same with nothing but the DMA layer around the pages, which lie scattered.
fn mapping(rounds: u64, providers: u64) {
    let port = port(RamMemory::new(1 << 20).expect("1 MiB"), providers);
    let device = DmaDevice::new(port.clone(), DmaConfig::default());
    let extents: Vec<_> = (0..PAGES)
        .map(|page| Extent {
            at: page_bytes(page),
            phys: PhysAddr(page_bytes(page * 7 % PAGES)),
            len: PAGE_SIZE,
            backing: Backing::Anonymous,
            provider: None,
            writable: true,
        })
        .collect();
    for _ in 0..rounds {
        let mapping = Mapping::try_alloc(&device, page_bytes(PAGES), 0).expect("room").expect("translated");
        for segment in Segments::new(&device, extents.iter().copied()) {
            mapping.link_segment(&segment.expect("a way"), LeafSize::Page).expect("free");
        }
        mapping.sync(0, mapping.len()).expect("linked");
        for page in 0..PAGES {
            let mut word = [0; 8];
            port.read(mapping.dma_address(page_bytes(page)), &mut word).expect("linked and synced");
            black_box(word);
        }
        mapping.destroy(mapping.len()).expect("all of it is linked");
    }
}

/// One end of [`writes`]: an HCA on a bus of its own, with a region of one page.
struct End {
    hca: Arc<Hca>,
    qp: Arc<QueuePair>,
    cq: Arc<CompletionQueue>,
    key: Key,
}

impl End {
    fn new(memory: &Arc<RamMemory>, fabric: &Arc<Fabric>, page: u64) -> Self {
        let port = DmaPort::direct(Arc::clone(memory) as _);
        let config = HcaConfig { seed: page, ..HcaConfig::default() };
        let hca = Hca::new(config, port, Box::new(fabric.port())).expect("an HCA");
        let pd = hca.alloc_pd().expect("a domain");
        let pages = Arc::new(PageList::new(1).expect("one entry"));
        let at = PhysAddr(page_bytes(page)).to_dma_identity();
        pages.store(0, Entry::present(at, Path::Direct, Backing::Anonymous, true));
        let (access, address, length) = (Access::all(), RegionAddr(0), PAGE_SIZE);
        let spec = KeySpec { pd, access, address, length, first_page_offset: 0, pages };
        let key = hca.create_key(spec).expect("a key");
        let cq = hca.create_cq(64).expect("a queue");
        let qp = hca.create_qp(&QpSpec::new(pd, &cq)).expect("a queue pair");
        Self { hca, qp, cq, key }
    }
}

/// Writes of 64 bytes between two HCAs of one process, so many at a time, from the post to the last completion.
fn writes(rounds: u64, list: usize) {
    let (memory, fabric) = (RamMemory::new(2 * PAGE_SIZE).expect("8 KiB"), Fabric::new());
    let (near, far) = (End::new(&memory, &fabric, 0), End::new(&memory, &fabric, 1));
    near.qp.connect(far.qp.address()).expect("connected");
    far.qp.connect(near.qp.address()).expect("connected");
    far.hca.progress();
    let local = [Sge { key: near.key, address: RegionAddr(0), length: 64 }];
    let remote = Remote { key: far.key, address: RegionAddr(0) };
    let requests = vec![SendRequest::write(0, &local, remote); list];
    let mut completions = Vec::with_capacity(list);
    for _ in 0..rounds {
        near.qp.post_send_list(&requests).expect("posted");
        completions.clear();
        while completions.len() < list {
            near.cq.poll(&mut completions, list).expect("no overrun");
        }
        assert!(completions.iter().all(|completion| completion.status == Status::Success));
    }
}

/// Instructions that `rounds` rounds of `name` take, with the process around them.
fn count(name: &str, rounds: u64) -> Result<u64, Failed> {
    let me = std::env::current_exe()?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(me)
        .env(SUBJECT, name)
        .env(ROUNDS, rounds.to_string())
        .output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    let line = text.lines().find_map(|line| line.split_once("Collected : "));
    let (_, number) = line.ok_or_else(|| format!("valgrind counted nothing: {text}"))?;
    Ok(number.trim().parse()?)
}

/// Instructions of one round of `name`, of so many.
fn per_round(name: &str, rounds: u64) -> Result<f64, Failed> {
    Ok((count(name, rounds)? - count(name, 0)?) as f64 / rounds as f64)
}

/// Invariant 14: memory without a peer's page costs the same whether or not peers exist.
fn invariant_14_providers_cost_nothing_where_there_is_none() -> Result<(), Failed> {
    for what in ["region", "mapping"] {
        let without = per_round(&format!("{what}, no provider"), FEW)?;
        let with = per_round(&format!("{what}, providers"), FEW)?;
        let more = (with / without - 1.0) * 100.0;
        println!(
            "a {what} of {PAGES} pages, mapped, read and taken down: {without:.0} instructions without providers, \
             {with:.0} with {PROVIDERS}: {more:+.3} % (target: within 2 %)"
        );
        if more.abs() > 2.0 {
            return Err(format!("providers make a {what} without their pages {more:+.3} % dearer").into());
        }
    }
    Ok(())
}

/// A point without a plan is a load, a compare and a branch that is never taken.
fn a_point_that_is_off_is_one_branch() -> Result<(), Failed> {
    let cost = per_round("point", MANY)? - per_round("loop", MANY)?;
    println!("a fault point that is off: {cost:.2} instructions");
    if cost > 3.5 {
        return Err(format!(
            "a fault point that is off costs {cost:.2} instructions, at most 3 are one branch"
        )
        .into());
    }
    Ok(())
}

/// What a write of 64 bytes takes at most, alone and in a list: a fifth more than when this was written.
fn a_small_write_takes_no_more_instructions_than_before() -> Result<(), Failed> {
    for (name, list, most) in [("write", 1, MOST_ALONE), ("writes", LIST, MOST_IN_LIST)] {
        let each = per_round(name, FEW)? / list as f64;
        println!("a write of 64 bytes, {list} at a time: {each:.0} instructions from post to completion");
        if each > most {
            return Err(format!("a small write takes {each:.0} instructions, {most} were enough").into());
        }
    }
    Ok(())
}

type Check = fn() -> Result<(), Failed>;

fn main() -> ExitCode {
    if let (Ok(name), Ok(rounds)) = (std::env::var(SUBJECT), std::env::var(ROUNDS)) {
        subject(&name, rounds.parse().expect("a number of rounds"));
        return ExitCode::SUCCESS;
    }
    let reason = if cfg!(debug_assertions) {
        Some("what an optimised build costs: cargo test --release --test instructions")
    } else if Command::new("valgrind").arg("--version").output().is_err() {
        Some("valgrind is not installed")
    } else {
        None
    };
    let tests: [(&str, Check); 3] = [
        (
            "a_small_write_takes_no_more_instructions_than_before",
            a_small_write_takes_no_more_instructions_than_before,
        ),
        ("a_point_that_is_off_is_one_branch", a_point_that_is_off_is_one_branch),
        (
            "invariant_14_providers_cost_nothing_where_there_is_none",
            invariant_14_providers_cost_nothing_where_there_is_none,
        ),
    ];
    let mut trials = Vec::new();
    for (name, test) in tests {
        match reason {
            Some(reason) => println!("SKIPPED {name}: {reason}"),
            None => trials.push(Trial::test(name, test)),
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
