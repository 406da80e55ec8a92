//! One entry, two pages that want it, an engine each, and software that remaps one of them: every thread order that shuttle
//! finds. `RUSTFLAGS="--cfg shuttle" cargo test -p hw-model --release --lib shuttle`.

use super::*;
use crate::iommu::leaf::Prot;
use crate::sync::outside::{AtomicUsize, Ordering as Count};
use crate::sync::{Arc, thread};

const PAGES: u64 = 2;
const ROUNDS: u64 = 3;

/// The page table: page `p` leads to frame `round * PAGES + p`.
struct Table([AtomicU64; PAGES as usize]);

impl Table {
    fn word(round: u64, page: u64) -> u64 {
        (round * PAGES + page) << 12 | Prot::READ.bits()
    }
    fn walk(&self, page: u64) -> Leaf {
        Leaf::from_raw(self.0[page as usize].load(Ordering::Acquire), LeafSize::Page)
    }
}

fn translate(iotlb: &Iotlb, table: &Table, page: u64) -> Leaf {
    let iova = Iova(page << 12);
    let sizes = 1 << LeafSize::Page as u32;
    iotlb.lookup(iova, sizes).unwrap_or_else(|| iotlb.fill(iova, || table.walk(page)))
}

fn execution() {
    let config = IotlbConfig { sets: 1, ways: 1, caches_not_present: true };
    let iotlb = Arc::new(Iotlb::new(config, 12));
    let table = Arc::new(Table([0, 1].map(|page| AtomicU64::new(Table::word(0, page)))));
    let flushed = Arc::new(AtomicU64::new(0));
    let engines = (0..PAGES).map(|page| {
        let (iotlb, table, flushed) = (Arc::clone(&iotlb), Arc::clone(&table), Arc::clone(&flushed));
        thread::spawn(move || {
            for _ in 0..3 {
                let floor = if page == 0 { flushed.load(Ordering::Acquire) } else { 0 };
                let leaf = translate(&iotlb, &table, page);
                if leaf.is_live() {
                    let frame = leaf.base().page_number();
                    assert_eq!(frame % PAGES, page, "a translation of another page");
                    assert!(frame / PAGES >= floor, "round {} after {floor} was flushed", frame / PAGES);
                }
            }
        })
    });
    let engines: Vec<_> = engines.collect();
    for round in 1..=ROUNDS {
        // Unmap, flush, map again, sync.
        table.0[0].store(0, Ordering::Release);
        iotlb.invalidate(Iova(0), 4096, 1);
        flushed.store(round, Ordering::Release);
        table.0[0].store(Table::word(round, 0), Ordering::Release);
        iotlb.invalidate(Iova(0), 4096, 1);
    }
    for engine in engines {
        engine.join().expect("no engine saw a wrong page");
    }
    assert_eq!(translate(&iotlb, &table, 0).word(), Table::word(ROUNDS, 0), "left stale at the end");
}

#[test]
fn shuttle_an_entry_is_never_stale_nor_of_another_page() {
    let executions = Arc::new(AtomicUsize::new(0));
    let (random, pct) = (Arc::clone(&executions), Arc::clone(&executions));
    let count = |counter: Arc<AtomicUsize>| {
        move || {
            counter.fetch_add(1, Count::Relaxed);
            execution();
        }
    };
    shuttle::check_random(count(random), 20_000);
    shuttle::check_pct(count(pct), 20_000, 3);
    println!("shuttle explored {} executions of the IOTLB", executions.load(Count::Relaxed));
    assert!(executions.load(Count::Relaxed) > 0);
}
