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

use criterion::{Criterion, criterion_group, criterion_main};
use figure::Figure;
use hw_model::addr::{PAGE_SIZE, PhysAddr};
use hw_model::hca::PageList;
use hw_model::iommu::{Domain, DomainConfig, LeafSize};
use hw_model::sync::Arc;
use mr::dma::iova::{IovaAllocator, IovaRequest, IovaSpace};
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
        unlink(&mappings[0]);
        mappings.iter().for_each(|mapping| mapping.prepare(0, GIB).expect("memory"));
        let figure = Figure { group: "link_1_gib_contiguous", name, target_ns: Some(target), per: at_once };
        figure.measure(c, |rounds| {
            let all = || mappings.iter().for_each(link);
            (0..rounds).map(|_| timed(all, || mappings.iter().for_each(unlink))).sum()
        });
    }
}

/// What both allocators do, over and over: one range of many goes, another of any of these sizes comes.
const SIZES: [u64; 6] = [1, 1, 2, 4, 16, 512];

fn choices(count: usize) -> Vec<(usize, u64)> {
    let mut random = ChaCha8Rng::seed_from_u64(2);
    let slots: Vec<_> = (0..LIVE).collect();
    let choice = |random: &mut ChaCha8Rng| {
        let slot = *slots.choose(random).expect("not empty");
        (slot, SIZES.choose(random).expect("not empty") * PAGE_SIZE)
    };
    (0..count).map(|_| choice(&mut random)).collect()
}

fn iova(c: &mut Criterion) {
    let choices = choices(1 << 20);
    let first = |index: usize| choices[index].1;
    let group = "iova_alloc_and_free_100000_live";

    let mut segregated = IovaAllocator::new(IovaSpace { bits: 48, granule_shift: 12 });
    let mut live: Vec<_> =
        (0..LIVE).map(|index| segregated.allocate(IovaRequest::new(first(index))).expect("room")).collect();
    let mut at = 0;
    let ours =
        Figure { group, name: "this allocator", target_ns: Some(150.0), per: 1 }.measure(c, |rounds| {
            let start = Instant::now();
            for _ in 0..rounds {
                let (slot, size) = choices[at % choices.len()];
                segregated.free(live[slot]).expect("live");
                live[slot] = segregated.allocate(IovaRequest::new(size)).expect("room");
                at += 1;
            }
            start.elapsed()
        });
    let stats = segregated.stats();
    assert_eq!(stats.live_ranges, LIVE as u64);
    println!(
        "  {} holes, fragmentation {:.4}, {} searches of all holes",
        stats.holes,
        stats.fragmentation(),
        stats.full_searches
    );

    let mut ordered = OrderedMap::new(1 << 48);
    let mut live: Vec<_> = (0..LIVE).map(|index| ordered.allocate(first(index)).expect("room")).collect();
    let mut at = 0;
    let plain = Figure { group, name: "plain ordered map", target_ns: None, per: 1 }.measure(c, |rounds| {
        let start = Instant::now();
        for _ in 0..rounds {
            let (slot, size) = choices[at % choices.len()];
            ordered.free(live[slot]);
            live[slot] = black_box(ordered.allocate(size).expect("room"));
            at += 1;
        }
        start.elapsed()
    });
    if let (Some(ours), Some(plain)) = (ours, plain) {
        let word = if ours < plain { "faster" } else { "SLOWER" };
        println!("  {:.2} times as fast as a plain ordered map in this run: {word}", plain / ours);
    }
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
criterion_group!(rest, iova, metadata);
criterion_main!(linking, rest);
