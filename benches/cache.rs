//! The registration cache: hit and release, with one thread and with two, beside the plain cache that one would write first.
//!
//! Expected, before measuring: a hit reads the generation, the thread's own table and the row (all in the first cache), counts
//! itself in and looks at one flag; a release counts itself out. Two locked instructions of some 5 ns, and 5 to 10 ns for
//! the rest. Two threads on different regions share no line that anybody writes, so twice the rate. The plain cache,
//! `RwLock<BTreeMap>` of `Arc`s, takes and gives back a lock whose word all threads write: 20 ns alone, and several
//! times that for each of two.
//!
//! Rates of one and two threads are taken in turns in one run; the best tenth counts, since others use the machine too. Beside
//! them in the same turns: two threads that share nothing, which is what the machine has to give.

#[path = "dma/figure.rs"]
mod figure;

use anypage::machine::{Machine, MachineConfig};
use criterion::{Criterion, criterion_group, criterion_main};
use figure::{Figure, undisturbed};
use hw_model::hca::Access;
use hw_model::sync::atomic::{AtomicU64, Ordering};
use hw_model::sync::{Arc, RwLock};
use mr::{Cache, CacheConfig, Device, RegisterOptions};
use odp::space::process::{Options, OwnedMemory, ProcessSpace};
use odp::space::{AddressSpace, UserRange};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use std::alloc::System;
use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Regions in the cache.
const REGIONS: u64 = 64;
const SIZE: u64 = 64 << 10;
/// Requests between two looks at the clock: some 50 us, in which two threads that begin together mostly run beside each other,
/// also on a machine that others use.
const BATCH: u64 = 2_000;
/// The region of the first thread.
const OF_FIRST: u64 = 3;
const RIGHTS: Access = Access::REMOTE_READ;

/// Regions and their lengths by their first bytes.
type PlainMap = BTreeMap<u64, (u64, Arc<dyn mr::Region>)>;

struct Stand {
    cache: Cache,
    plain: RwLock<PlainMap>,
    memory: UserRange,
}

fn a_stand() -> Stand {
    let space = ProcessSpace::open(Options::default()).expect("this process can use its own memory");
    let machine = Machine::new(space.memory(), None, &MachineConfig::default()).expect("a machine");
    let pd = Arc::clone(&machine.near).alloc_pd().expect("a protection domain");
    let memory = Arc::new(OwnedMemory::new(&space, REGIONS * SIZE).expect("memory")).user_range();
    let cache =
        Cache::new(Arc::clone(&pd), Arc::clone(&space) as Arc<dyn AddressSpace>, CacheConfig::default());
    let mut plain = BTreeMap::new();
    for index in 0..REGIONS {
        drop(cache.get_part(&memory, index * SIZE, SIZE, RIGHTS).expect("a region"));
        let part = memory.part(index * SIZE, SIZE).expect("in it");
        let region = Arc::clone(&pd).register(&part, RegisterOptions::on_demand()).expect("a region");
        plain.insert(part.range().start().0, (region.len(), region));
    }
    assert_eq!(cache.stats().entries, REGIONS, "neighbours that only touch stay apart");
    Stand { cache, plain: RwLock::new(plain), memory }
}

impl Stand {
    fn hit(&self, index: u64) {
        let lease = self.cache.get_part(&self.memory, black_box(index * SIZE), 4096, RIGHTS);
        black_box(lease.expect("a hit").key());
    }

    fn plain_hit(&self, index: u64) {
        let at = self.memory.range().start().0 + black_box(index * SIZE);
        let found = {
            let map = self.plain.read();
            let (start, (len, region)) = map.range(..=at).next_back().expect("a hit");
            assert!(at + 4096 <= start + len);
            Arc::clone(region)
        };
        black_box(found.key());
    }
}

/// Requests a nanosecond of `threads` threads, each on a region of its own: all of them, by the time from the first's start to
/// the last's end, so that threads which did not run beside each other gain nothing.
fn rate(threads: u64, hit: impl Fn(u64) + Sync) -> f64 {
    let ready = AtomicU64::new(0);
    let spans: Vec<(Instant, Instant)> = std::thread::scope(|scope| {
        let (hit, ready) = (&hit, &ready);
        let spawn = |thread| {
            scope.spawn(move || {
                let region = OF_FIRST + thread * 17;
                (0..1000).for_each(|_| hit(region));
                ready.fetch_add(1, Ordering::AcqRel);
                while ready.load(Ordering::Acquire) < threads {
                    std::hint::spin_loop();
                }
                let start = Instant::now();
                (0..BATCH).for_each(|_| hit(region));
                (start, Instant::now())
            })
        };
        let spawned: Vec<_> = (0..threads).map(spawn).collect();
        spawned.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let first = spans.iter().map(|span| span.0).min().expect("a thread");
    let last = spans.iter().map(|span| span.1).max().expect("a thread");
    (threads * BATCH) as f64 / (last - first).as_nanos() as f64
}

fn cache(c: &mut Criterion) {
    let stand = a_stand();
    // Counted: a hit allocates nothing, registers nothing and tells the notifiers nothing.
    stand.hit(0);
    let before = stand.cache.stats();
    let region = Region::new(ALLOCATOR);
    (0..1000).for_each(|round| stand.hit(round % REGIONS));
    let change = region.change();
    assert_eq!((change.allocations, change.deallocations, change.reallocations), (0, 0, 0));
    let after = stand.cache.stats();
    assert_eq!((after.hits - before.hits, after.misses - before.misses), (1000, 0));
    println!("1000 hits and releases: 0 allocations, 0 registrations");

    let group = "cache_hit_and_release";
    let run = |rounds: u64, hit: &dyn Fn(u64)| {
        let start = Instant::now();
        (0..rounds).for_each(|_| hit(3));
        start.elapsed()
    };
    Figure { group, name: "this cache", target_ns: Some(30.0), per: 1 }
        .measure(c, |rounds| run(rounds, &|index| stand.hit(index)));
    Figure { group, name: "plain RwLock<BTreeMap>", target_ns: None, per: 1 }
        .measure(c, |rounds| run(rounds, &|index| stand.plain_hit(index)));

    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    // What the machine lets two threads have, whatever they do: each with a cache, a device and a process's memory of its own.
    let other = a_stand();
    let apart = |index| if index == OF_FIRST { stand.hit(index) } else { other.hit(index) };
    for (name, target, hit) in [
        ("this cache", Some(1.8), &(|index| stand.hit(index)) as &(dyn Fn(u64) + Sync)),
        ("plain RwLock<BTreeMap>", None, &|index| stand.plain_hit(index)),
    ] {
        // In turns, so that whatever disturbs one disturbs the others. The time a request takes, so that less is better.
        let turns = || [1.0 / rate(1, hit), 1.0 / rate(2, hit), 1.0 / rate(2, apart)];
        let turns: Vec<[f64; 3]> = (0..1000).map(|_| turns()).collect();
        let best = |which: usize| undisturbed(turns.iter().map(|turn| turn[which]).collect());
        if let (Some(one), Some(two), Some(apart)) = (best(0), best(1), best(2)) {
            let ratio = one / two;
            let verdict = target.map_or(String::new(), |target| {
                let word = if ratio >= target { "reached" } else { "NOT reached" };
                let most = one / apart;
                format!(" (target {target}: {word}; two that share nothing at all, a cache each: {most:.2})")
            });
            println!(
                "{group}, {name}: {one:.1} ns with one thread; two threads have {ratio:.2} times its rate{verdict}"
            );
        }
    }
}

criterion_group!(benches, cache);
criterion_main!(benches);
