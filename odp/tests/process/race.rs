//! Copies while other threads take the memory away: the process survives, and nothing is placed through a stale frame.

use crate::mapped::{Mapped, Recorder, fault, open, until};
use hw_model::addr::{PAGE_SIZE, PhysAddr};
use hw_model::bus::{AtomicOp, MemoryError};
use hw_model::sync::Arc;
use hw_model::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use odp::space::process::Options;
use odp::space::{Access, AddressSpace, FaultError, Rung};
use rustix::mm::{Advice, MprotectFlags, ProtFlags};
use std::time::{Duration, Instant};

const PAGES: u64 = 64;
const RUN: Duration = Duration::from_secs(2);

#[derive(Default)]
struct Counts {
    copied: AtomicU64,
    vanished: AtomicU64,
    retired: AtomicU64,
    closed: AtomicU64,
    refused_faults: AtomicU64,
}

/// A panic of the one that waits must end the others too.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn race(options: Options) {
    let space = open(options);
    let memory = Mapped::anonymous(PAGES);
    let _watch = space.watch(memory.range()).expect("mapped");
    let interval = space.notifiers().register(memory.range(), Recorder::new());
    let frames: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
    let (stop, counts) = (AtomicBool::new(false), Counts::default());
    let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
    std::thread::scope(|scope| {
        let _ends = StopOnDrop(&stop);
        // Two engines.
        for engine in 0..2_u64 {
            let (host, counts, stop, frames) = (space.memory(), &counts, &stop, &frames);
            scope.spawn(move || {
                let mut slot = host.epoch().register().expect("a slot");
                let mut buffer = vec![engine as u8; PAGE_SIZE as usize];
                let mut step = engine;
                while !stop.load(Ordering::Relaxed) {
                    step = step.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let phys = PhysAddr(frames[(step >> 33) as usize % frames.len()].load(Ordering::Acquire));
                    let Ok(_burst) = slot.enter() else {
                        count(&counts.closed);
                        continue;
                    };
                    let result = match step >> 60 & 3 {
                        0 => host.atomic(phys, AtomicOp::FetchAdd(1)).map(drop),
                        1 => host.write(phys, &buffer),
                        _ => host.read(phys, &mut buffer),
                    };
                    match result {
                        Ok(()) => count(&counts.copied),
                        Err(MemoryError::Vanished { .. }) => count(&counts.vanished),
                        Err(MemoryError::Retired { .. } | MemoryError::Unbacked { .. }) => {
                            count(&counts.retired)
                        }
                        Err(other) => panic!("{other}"),
                    };
                }
            });
        }
        // One that takes pages away in every way.
        scope.spawn(|| {
            let mut step = 7_u64;
            while !stop.load(Ordering::Relaxed) {
                step = step.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let page = (step >> 33) % (PAGES - 4);
                match step >> 60 & 7 {
                    0 => memory.replace_with(page, 2, ProtFlags::empty()),
                    1 => memory.protect(page, 2, MprotectFlags::empty()),
                    2 => memory.protect(page, 2, MprotectFlags::READ),
                    3 | 4 => memory.replace(page, 4),
                    _ => memory.drop_pages(page, 2),
                }
            }
        });
        // One that faults pages in, as a driver does.
        let started = Instant::now();
        let mut out = Vec::new();
        while started.elapsed() < RUN {
            for page in 0..PAGES {
                out.clear();
                let Some(sequence) = interval.begin() else { continue };
                match space.fault(memory.part(page, 1), Access::Write, &mut out) {
                    Ok(()) if !interval.retry(&sequence) => {
                        frames[page as usize].store(out[0].phys.0, Ordering::Release);
                    }
                    Ok(()) => {}
                    Err(
                        FaultError::NoMapping { .. }
                        | FaultError::Permission { .. }
                        | FaultError::Busy { .. },
                    ) => {
                        count(&counts.refused_faults);
                    }
                    Err(other) => panic!("{other}"),
                }
            }
        }
    });
    let all = [&counts.copied, &counts.vanished, &counts.retired, &counts.closed, &counts.refused_faults]
        .map(|counter| counter.load(Ordering::Relaxed));
    let [copied, vanished, retired, closed, refused] = all;
    println!(
        "copied {copied}, vanished {vanished}, retired {retired}, closed {closed}, refused faults {refused}"
    );
    assert!(copied > 1000 && retired > 0, "the race did not happen: {all:?}");
    let exact = space.capabilities().rung == Rung::Exact;
    assert_eq!(
        vanished == 0,
        exact,
        "a frame that is not retired has its page, on the exact rung alone: {all:?}"
    );
    until("invalidations end", || space.notifiers().stats().running == 0);
    let events = space.capabilities().rung <= Rung::Events;
    let stats = space.stats();
    assert_eq!(events, stats.removed > 0 && stats.unmapped > 0, "{stats:?}");
    let alive = Arc::downgrade(&space);
    drop((interval, _watch, space));
    assert_eq!(alive.strong_count(), 0, "something kept the space");
}

#[test]
fn memory_may_go_while_devices_copy() {
    race(Options::default());
}

#[test]
fn memory_may_go_while_devices_copy_and_nobody_tells() {
    race(Options { strongest: Rung::Poll, ..Options::default() });
}

/// Found by traffic over memory that was mapped anew: mappings are asked for one by one, and where two had become one in
/// between, pages were reported twice. A fault linked them twice, was refused by the IOMMU, and the request failed.
#[test]
fn pages_are_reported_once_while_their_mapping_is_cut_and_joined() {
    const ROUNDS: usize = 20_000;
    let space = open(Options::default());
    let memory = Mapped::anonymous(PAGES);
    let _watch = space.watch(memory.range()).expect("mapped");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _ends = StopOnDrop(&stop);
        let (cut, stop) = (&memory, &stop);
        // Neither takes a page away, and no owner is told.
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                cut.advise(16, 8, Advice::LinuxDontDump).expect("our own memory");
                cut.advise(16, 8, Advice::LinuxDoDump).expect("our own memory");
            }
        });
        for _ in 0..ROUNDS {
            let runs = match fault(&space, memory.range(), Access::Read) {
                Err(FaultError::Busy { .. }) => continue,
                outcome => outcome.expect("it is mapped throughout"),
            };
            let apart = runs.is_sorted_by(|one, next| one.range().end() <= next.range().start());
            assert!(apart, "a page twice: {runs:?}");
            assert_eq!(runs.iter().map(|run| run.pages).sum::<u64>(), PAGES);
        }
    });
}
