//! The DMA layer: linking, IOVA, metadata. Each figure is printed beside its target; what can be counted is asserted.
//!
//! Expected, before measuring:
//! * a scattered page is one read of its frame number (sequential), one load and one exchange of its table word
//!   (sequential, 8 bytes): some 8 ns, most of it the locked exchange;
//! * a leaf of 1 GiB or 2 MiB is one exchange, and a call around it has a few more: 50 to 100 ns, and 512 more exchanges;
//! * an IOVA range is taken from the list of its size class and put back: two bitmaps, and the nodes of the range and its
//!   neighbours, none of them in the first cache with 100,000 alive: some 100 ns. An ordered map of as many holes is three
//!   or four nodes deep and is searched for each of some eight changes: five to ten times that.

mod figure;
mod ordered_map;
mod transfers;

use criterion::{Criterion, criterion_group, criterion_main};
use figure::{Figure, undisturbed};
use hw_model::addr::{PAGE_SIZE, PhysAddr, RegionAddr};
use hw_model::hca::PageList;
use hw_model::iommu::{Domain, DomainConfig, LeafSize};
use hw_model::sync::Arc;
use mr::dma::iova::{IovaAllocator, IovaRequest, IovaSpace};
use mr::dma::page_size::{DmaRange, FirstByte, ListPlan, PageSizes};
use mr::dma::{DmaConfig, DmaDevice, Mapping};
use ordered_map::OrderedMap;
use rand::SeedableRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use std::alloc::System;
use std::hint::black_box;
use std::time::{Duration, Instant};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const GIB: u64 = 1 << 30;
const PAGES: u64 = GIB / PAGE_SIZE;
/// Ranges that live while others are allocated and freed.
const LIVE: usize = 100_000;

fn device() -> (Arc<DmaDevice>, Arc<Domain>) {
    let domain = Domain::new(DomainConfig::default()).expect("the default is possible");
    (DmaDevice::over(Arc::clone(&domain) as _, DmaConfig::default()), domain)
}

fn mapping(device: &Arc<DmaDevice>) -> Mapping {
    Mapping::try_alloc(device, GIB, GIB).expect("there is room").expect("a domain translates")
}

/// Allocations while `work` runs.
fn allocations(work: impl FnOnce()) -> usize {
    let region = Region::new(ALLOCATOR);
    work();
    let change = region.change();
    change.allocations + change.reallocations
}

/// A GiB of pages in no order.
fn frames() -> Vec<PhysAddr> {
    let mut frames: Vec<_> = (0..PAGES).map(|page| PhysAddr(4 * GIB + page * PAGE_SIZE)).collect();
    frames.shuffle(&mut ChaCha8Rng::seed_from_u64(1));
    frames
}

fn scattered(c: &mut Criterion) {
    let (device, domain) = device();
    let (mapping, frames) = (mapping(&device), frames());
    let tables = domain.stats().tables;
    let of_tables = allocations(|| mapping.prepare(0, GIB).expect("memory"));
    let link = || mapping.link_scattered(0, frames.iter().copied()).expect("free");
    let before = domain.stats();
    let allocated = allocations(|| {
        link();
        mapping.sync(0, GIB).expect("linked");
    });
    let after = domain.stats();
    assert_eq!(allocated, 0, "linking allocates nothing but tables, and those were made before");
    assert_eq!(after.iotlb.flushes - before.iotlb.flushes, 1, "one flush");
    assert_eq!(after.leaves_mapped[0] - before.leaves_mapped[0], PAGES, "one table write a page");
    mapping.unlink(0, GIB).expect("linked");
    println!("1 GiB of scattered pages: 1 flush, {PAGES} table writes, 0 allocations");
    println!(
        "  tables made before: {} of 4 KiB in {of_tables} allocations, untouched until used",
        before.tables - tables
    );
    let group = "link_1_gib_scattered";
    Figure { group, name: "page, flush free", target_ns: Some(15.0), per: PAGES }.measure(c, |rounds| {
        (0..rounds).map(|_| timed(link, || mapping.unlink(0, GIB).expect("linked"))).sum()
    });
    link();
    let sync = || mapping.sync(0, GIB).expect("linked");
    Figure { group, name: "the flush itself", target_ns: None, per: 1 }
        .measure(c, |rounds| (0..rounds).map(|_| timed(sync, || ())).sum());
    mapping.unlink(0, GIB).expect("linked");
}

/// How long `work` takes; then `undo`.
fn timed(work: impl FnOnce(), undo: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    let elapsed = start.elapsed();
    undo();
    elapsed
}

fn contiguous(c: &mut Criterion) {
    let (device, domain) = device();
    // So many are linked between two looks at the clock, which take some 30 ns. Their tables stay in the cache.
    for (name, largest, leaves, target, at_once) in [
        ("aligned GiB, one leaf", LeafSize::Huge, [0, 0, 1], 200.0, 16),
        ("512 leaves of 2 MiB", LeafSize::Large, [0, 512, 0], 3000.0, 1),
    ] {
        let mappings: Vec<_> = (0..at_once).map(|_| mapping(&device)).collect();
        let link = |mapping: &Mapping| mapping.link(0, PhysAddr(GIB), GIB, largest).expect("free");
        let unlink = |mapping: &Mapping| mapping.unlink(0, GIB).expect("linked");
        let before = domain.stats().leaves_mapped;
        link(&mappings[0]);
        let after = domain.stats().leaves_mapped;
        assert_eq!(
            std::array::from_fn(|size| after[size] - before[size]),
            leaves,
            "the largest leaves that fit"
        );
        let range = DmaRange { dma: mappings[0].dma_address(0), len: GIB };
        let list =
            ListPlan::new([range], FirstByte::Address(RegionAddr(GIB)), PageSizes::X86).expect("a GiB");
        assert_eq!(list.entries, 1, "one IOVA range is one entry, whatever leaves lead to its memory");
        println!("{name}: a page list of {} entry of {} bytes", list.entries, list.page_size.bytes());
        unlink(&mappings[0]);
        mappings.iter().for_each(|mapping| mapping.prepare(0, GIB).expect("memory"));
        let figure = Figure { group: "link_1_gib_contiguous", name, target_ns: Some(target), per: at_once };
        figure.measure(c, |rounds| {
            let all = || mappings.iter().for_each(link);
            (0..rounds).map(|_| timed(all, || mappings.iter().for_each(unlink))).sum()
        });
    }
}

/// Pages of the ranges that come and go.
const SIZES: [u64; 6] = [1, 1, 2, 4, 16, 512];

/// Which of many ranges goes, and how many bytes come in its place, over and over.
fn choices(count: usize) -> Vec<(usize, u64)> {
    let mut random = ChaCha8Rng::seed_from_u64(2);
    let slots: Vec<_> = (0..LIVE).collect();
    let choice = |random: &mut ChaCha8Rng| {
        let slot = *slots.choose(random).expect("not empty");
        (slot, SIZES.choose(random).expect("not empty") * PAGE_SIZE)
    };
    (0..count).map(|_| choice(&mut random)).collect()
}

/// [`LIVE`] ranges of an allocator, of which one goes and one comes a round.
struct Churn<'a, A, R> {
    choices: &'a [(usize, u64)],
    allocator: A,
    live: Vec<R>,
    at: usize,
}

impl<'a, A, R: Copy> Churn<'a, A, R> {
    fn new(choices: &'a [(usize, u64)], mut allocator: A, allocate: impl Fn(&mut A, u64) -> R) -> Self {
        let live = choices[..LIVE].iter().map(|(_, size)| allocate(&mut allocator, *size)).collect();
        Self { choices, allocator, live, at: 0 }
    }

    fn run(
        &mut self,
        rounds: u64,
        allocate: impl Fn(&mut A, u64) -> R,
        free: impl Fn(&mut A, R),
    ) -> Duration {
        let start = Instant::now();
        for _ in 0..rounds {
            let (slot, size) = self.choices[self.at % self.choices.len()];
            free(&mut self.allocator, self.live[slot]);
            self.live[slot] = black_box(allocate(&mut self.allocator, size));
            self.at += 1;
        }
        start.elapsed()
    }
}

fn iova(c: &mut Criterion) {
    /// Rounds of one allocator before it is the other's turn.
    const TURN: u64 = 50_000;
    let choices = choices(1 << 20);
    let group = "iova_alloc_and_free_100000_live";

    let take = |iova: &mut IovaAllocator, size| iova.allocate(IovaRequest::new(size)).expect("room");
    let give = |iova: &mut IovaAllocator, range| iova.free(range).expect("live");
    let empty = IovaAllocator::new(IovaSpace { bits: 48, granule_shift: 12 });
    let mut ours = Churn::new(&choices, empty, take);
    Figure { group, name: "this allocator", target_ns: Some(150.0), per: 1 }
        .measure(c, |rounds| ours.run(rounds, take, give));

    let take_plain = |map: &mut OrderedMap, size| map.allocate(size).expect("room");
    let give_plain = |map: &mut OrderedMap, range| map.free(range);
    let mut plain = Churn::new(&choices, OrderedMap::new(1 << 48), take_plain);
    Figure { group, name: "plain ordered map", target_ns: None, per: 1 }
        .measure(c, |rounds| plain.run(rounds, take_plain, give_plain));

    // In turns, so that whatever disturbs one disturbs the other.
    let per_round = |elapsed: Duration| elapsed.as_secs_f64() * 1e9 / TURN as f64;
    let turns = (0..40).map(|_| {
        let ours = per_round(ours.run(TURN, take, give));
        (ours, per_round(plain.run(TURN, take_plain, give_plain)))
    });
    let (of_ours, of_plain): (Vec<_>, Vec<_>) = turns.unzip();
    if let (Some(one), Some(other)) = (undisturbed(of_ours), undisturbed(of_plain)) {
        let word = if one < other { "faster" } else { "SLOWER" };
        println!("{group}, in turns: {one:.1} ns against {other:.1} ns of a plain ordered map: {word}");
    }
    let stats = ours.allocator.stats();
    assert_eq!(stats.live_ranges, LIVE as u64);
    println!(
        "  {} holes, fragmentation {:.4}, {} searches of all holes",
        stats.holes,
        stats.fragmentation(),
        stats.full_searches
    );
}

fn metadata(_: &mut Criterion) {
    let region = Region::new(ALLOCATOR);
    let list = PageList::new(PAGES).expect("memory");
    let bytes = region.change().bytes_allocated as u64;
    assert_eq!(list.len(), PAGES);
    assert!(bytes <= 8 * PAGES, "{bytes} bytes for {PAGES} pages");
    let state = size_of::<Mapping>();
    assert!(state <= 32, "{state} bytes a mapping");
    println!("page list: {} bytes a page (target 8: reached)", bytes as f64 / PAGES as f64);
    println!(
        "  the fault word is the same 8 bytes: present, seen, linked, path and kind are bits of the entry"
    );
    println!(
        "  an IOMMU entry beside it: {} bytes a 4 KiB leaf, none where nothing translates",
        size_of::<u64>()
    );
    println!("state of a mapping: {state} bytes (target 32: reached), whatever is linked");
}

fn slow() -> Criterion {
    Criterion::default().sample_size(20)
}

criterion_group! { name = linking; config = slow(); targets = scattered, contiguous }
criterion_group!(rest, iova, metadata, transfers::transfers);
criterion_main!(linking, rest);
