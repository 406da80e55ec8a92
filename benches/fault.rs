//! Page faults, held against the floor: MADV_POPULATE_WRITE and PAGEMAP_SCAN of the same pages.
//!
//! Expected, before measuring: the floor of one page is two system calls, 0.6 to 1 us. The handler adds what it takes to
//! find the region, look at the sequence, link one page and sync (two table walks), store one entry and leave the answer in
//! a mailbox: 0.2 us. A fault of 2 MiB has 512 entries to store and to link at some 10 ns each, against 512 pages to
//! populate and scan at 75 ns. End to end there are two wakes of a sleeping thread on top, the handler's and the engine's.
//!
//! What can be counted is asserted; times are printed beside their targets.

use anypage::bench::Floor;
use anypage::machine::{End, Machine, MachineConfig};
use anypage::mixed::{Kind, MixedMemory};
use hw_model::addr::{PAGE_SIZE, VirtRange};
use hw_model::hca::{Remote, SendRequest, Sge, Status, Time};
use hw_model::sync::Arc;
use mr::device::model::FaultPolicy;
use mr::{Device, RegisterOptions};
use odp::fault::Want;
use odp::prefetch::PrefetchPolicy;
use odp::space::process::{Options, OwnedMemory, ProcessSpace};
use odp::space::sim::{SimConfig, SimHost};
use odp::space::{Access, AddressSpace, UserRange};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use std::alloc::System;
use std::sync::mpsc;
use std::time::{Duration, Instant};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const MESSAGE: u32 = 64 << 10;

/// How much is measured: all of it, or that it runs.
struct Scale {
    rounds: usize,
    stream: u64,
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn ratio(this: Duration, that: Duration) -> f64 {
    this.as_secs_f64() / that.as_secs_f64()
}

fn space() -> Arc<ProcessSpace> {
    ProcessSpace::open(Options::default()).expect("this process can use its own memory")
}

fn memory(space: &Arc<ProcessSpace>, bytes: u64) -> UserRange {
    let memory = Arc::new(MixedMemory::new(&[(Kind::Untouched, bytes)]).expect("memory"));
    memory.user_range(Arc::clone(space) as _)
}

/// A near end over `range`, a far one over a few MiB, connected.
fn ends(space: &Arc<ProcessSpace>, range: &UserRange, config: &MachineConfig) -> (Machine, End, End) {
    let machine = Machine::new(space.memory(), None, config).expect("a machine");
    let near = End::new(&machine.near, range, RegisterOptions::on_demand()).expect("a region");
    let mirror = Arc::new(OwnedMemory::new(space, 4 * MIB).expect("memory"));
    let far = End::new(&machine.far, &mirror.user_range(), RegisterOptions::pinned()).expect("a region");
    near.connect(&far).expect("fresh");
    (machine, near, far)
}

fn sge(end: &End, length: u32) -> [Sge; 1] {
    [Sge { key: end.region.key(), address: end.region.address(), length }]
}

fn remote(end: &End, offset: u64) -> Remote {
    Remote { key: end.region.key(), address: end.region.address().offset(offset) }
}

/// What the handler itself does, in steps: the device's event is there, and its answer is left for the device.
fn own_work(scale: &Scale, bytes: u64) -> Option<(Duration, Duration)> {
    let space = space();
    let range = memory(&space, 4 * MIB);
    let config = MachineConfig { threads: false, ..MachineConfig::default() };
    let (machine, near, far) = ends(&space, &range, &config);
    let part = VirtRange::new(range.range().start(), bytes).expect("in it");
    let mut floor = Floor::new(part)?;
    let (mut ours, mut least) = (Vec::new(), Vec::new());
    let mut now = 0;
    for _ in 0..scale.rounds {
        space.notifiers().invalidate(part, || ());
        let before = near.region.counters();
        far.qp.post_send(&SendRequest::write(1, &sge(&far, bytes as u32), remote(&near, 0))).expect("room");
        let mut done = Vec::new();
        while done.is_empty() {
            now += 1_000_000;
            for device in [&machine.near, &machine.far] {
                let _ = device.hca().step_engine(0, Time(now));
            }
            if let Some(job) = machine.near.next_fault() {
                let start = Instant::now();
                job.run();
                ours.push(start.elapsed());
            }
            far.cq.poll(&mut done, 1).expect("no overrun");
        }
        assert_eq!(done[0].status, Status::Success);
        let counted = near.region.counters() - before;
        let pages = bytes / PAGE_SIZE;
        assert_eq!((counted.page_faults, counted.entries_published, counted.syncs), (1, pages, 1));
        let start = Instant::now();
        floor.populate(part);
        floor.scan(part);
        least.push(start.elapsed());
    }
    Some((median(ours), median(least)))
}

/// From one thread to another and back, both asleep in between.
fn two_wakes(scale: &Scale) -> Duration {
    let (there, hears) = mpsc::channel::<()>();
    let (back, answer) = mpsc::channel::<()>();
    let echo = std::thread::spawn(move || {
        while hears.recv().is_ok() {
            if back.send(()).is_err() {
                return;
            }
        }
    });
    let times = (0..scale.rounds).map(|_| {
        // Long enough for the other to be asleep.
        std::thread::sleep(Duration::from_micros(50));
        let start = Instant::now();
        there.send(()).expect("it listens");
        answer.recv().expect("it answers");
        start.elapsed()
    });
    let time = median(times.collect());
    drop(there);
    echo.join().expect("it ends");
    time
}

/// A write from a page of our own, present or not: from posting to its completion.
fn end_to_end(scale: &Scale) -> (Duration, Duration) {
    let space = space();
    let range = memory(&space, MIB);
    let (_machine, near, far) = ends(&space, &range, &MachineConfig::default());
    let page = VirtRange::new(range.range().start(), PAGE_SIZE).expect("in it");
    let once = |cold: bool| {
        if cold {
            space.notifiers().invalidate(page, || ());
        }
        std::thread::sleep(Duration::from_micros(50));
        let start = Instant::now();
        near.qp.post_send(&SendRequest::write(1, &sge(&near, 8), remote(&far, 0))).expect("room");
        let mut done = Vec::new();
        while done.is_empty() {
            near.cq.poll(&mut done, 1).expect("no overrun");
        }
        assert_eq!(done[0].status, Status::Success);
        start.elapsed()
    };
    once(true);
    let warm = median((0..scale.rounds).map(|_| once(false)).collect());
    let cold = median((0..scale.rounds).map(|_| once(true)).collect());
    (cold, warm)
}

/// Reads of all of the near region, eight messages at a time.
fn stream(near: &End, far: &End, bytes: u64) -> Duration {
    let start = Instant::now();
    let (mut posted, mut ended) = (0, 0);
    let mut done = Vec::new();
    while ended < bytes / u64::from(MESSAGE) {
        while posted < bytes / u64::from(MESSAGE) && posted - ended < 8 {
            let offset = posted * u64::from(MESSAGE);
            let mut local = sge(far, MESSAGE);
            local[0].address = local[0].address.offset(posted % 8 * u64::from(MESSAGE));
            far.qp.post_send(&SendRequest::read(posted, &local, remote(near, offset))).expect("room");
            posted += 1;
        }
        done.clear();
        ended += far.cq.poll(&mut done, 8).expect("no overrun") as u64;
        assert!(done.iter().all(|done| done.status == Status::Success), "{done:?}");
    }
    start.elapsed()
}

fn populate_floor(space: &Arc<ProcessSpace>, bytes: u64) -> Option<Duration> {
    let held = memory(space, bytes);
    let range = held.range();
    let mut floor = Floor::new(VirtRange::new(range.start(), PAGE_SIZE)?)?;
    let start = Instant::now();
    floor.populate(range);
    floor.scan(range);
    let took = start.elapsed();
    drop(held);
    Some(took)
}

fn cold_stream(scale: &Scale, policy: PrefetchPolicy) {
    let space = space();
    let bytes = scale.stream;
    let range = memory(&space, bytes);
    let config = MachineConfig {
        faults: FaultPolicy { prefetch: policy, ..FaultPolicy::default() },
        ..MachineConfig::default()
    };
    let (_machine, near, far) = ends(&space, &range, &config);
    let cold = stream(&near, &far, bytes);
    let warm = stream(&near, &far, bytes);
    let counters = near.region.counters();
    assert_eq!(near.region.report().present, bytes / PAGE_SIZE);
    if policy == PrefetchPolicy::ADAPTIVE {
        assert!(counters.page_faults < 600, "{} faults", counters.page_faults);
    }
    let Some(floor) = populate_floor(&space, bytes) else { return };
    let allowed = warm.mul_f64(1.5) + floor;
    println!(
        "cold read of {} MiB, {policy:?}: {} faults (target: under 600), {cold:.2?}; warm {warm:.2?}, populating alone \
         {floor:.2?}: {:.2} of 1.5 warm + floor (target 1)",
        bytes / MIB,
        counters.page_faults,
        ratio(cold, allowed)
    );
}

fn prefetch(scale: &Scale) {
    let space = space();
    let machine = Machine::new(space.memory(), None, &MachineConfig::default()).expect("a machine");
    let pd = Arc::clone(&machine.near).alloc_pd().expect("a domain");
    let (mut ours, mut least) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let range = memory(&space, scale.stream);
        let region = pd.clone().register(&range, RegisterOptions::on_demand()).expect("a region");
        let start = Instant::now();
        region.advise(0, scale.stream, Want::Fault(Access::Write)).expect("there is memory");
        ours.push(start.elapsed());
        assert_eq!(region.counters().page_prefetch, scale.stream / PAGE_SIZE);
        drop((region, range));
        least.extend(populate_floor(&space, scale.stream));
    }
    let (Some(ours), Some(least)) = (ours.iter().min(), least.iter().min()) else { return };
    println!(
        "prefetch of {} MiB cold: {ours:.2?}, the floor {least:.2?}: {:.0} % of its speed (target 90)",
        scale.stream / MIB,
        100.0 / ratio(*ours, *least)
    );
}

/// What an implicit region costs a process that does not use it.
fn idle() {
    // A simulated process: all of a real one's memory is nothing that a benchmark may vouch for.
    let space = SimHost::new(SimConfig::default()).expect("a host").new_space();
    let machine = Machine::new(space.memory(), None, &MachineConfig::default()).expect("a machine");
    let pd = Arc::clone(&machine.near).alloc_pd().expect("a domain");
    let everything = UserRange::simulated(&space, space.addresses());
    // What the tables of keys make room for is the device's.
    drop(pd.clone().register(&everything, RegisterOptions::implicit()).expect("a region"));
    let allocated = Region::new(ALLOCATOR);
    let region = pd.register(&everything, RegisterOptions::implicit()).expect("a region");
    let change = allocated.change();
    let bytes = change.bytes_allocated - change.bytes_deallocated;
    assert!(bytes < 64 << 10, "{bytes} bytes");
    assert_eq!(region.report().children, 0);
    println!("an implicit region over {:#x} bytes, idle: {bytes} bytes (target: under 65536)", region.len());
}

fn main() {
    let tries = std::env::args().any(|argument| argument == "--test");
    let scale = match tries {
        true => Scale { rounds: 20, stream: 32 * MIB },
        false => Scale { rounds: 2000, stream: GIB },
    };
    match own_work(&scale, PAGE_SIZE) {
        Some((ours, least)) => {
            println!("one page: {ours:.2?}, the floor {least:.2?}: {:.2} (target 1.3)", ratio(ours, least));
            let (cold, warm) = end_to_end(&scale);
            let wakes = two_wakes(&scale);
            let extra = cold.saturating_sub(warm);
            println!(
                "end to end: {extra:.2?} more than warm, the floor and two wakes {:.2?} (wakes {wakes:.2?}): {:.2} (target 1)",
                least + wakes,
                ratio(extra, least + wakes)
            );
        }
        None => println!("SKIPPED what is held against the floor: this kernel has no PAGEMAP_SCAN"),
    }
    let large = Scale { rounds: scale.rounds / 10, ..scale };
    if let Some((ours, least)) = own_work(&large, 2 * MIB) {
        println!("2 MiB: {ours:.2?}, the floor {least:.2?}: {:.2} (target 1.1)", ratio(ours, least));
    }
    prefetch(&scale);
    cold_stream(&scale, PrefetchPolicy::Off);
    cold_stream(&scale, PrefetchPolicy::ADAPTIVE);
    idle();
}
