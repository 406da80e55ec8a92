//! The cache against a list of entries that is searched from end to end.

use super::*;
use hw_model::hca::Key;
use proptest::prelude::*;
use proptest::sample::Index;

const PAGES: u64 = 24;

#[derive(Clone, Debug)]
enum Step {
    Get { offset: u64, len: u64, more: bool },
    Release(Index),
    Discard { page: u64, count: u64 },
    Forget { page: u64, count: u64 },
    Reap,
}

fn step() -> impl Strategy<Value = Step> {
    let bytes = page_bytes(PAGES);
    let pages = || (0..PAGES, 1..4_u64).prop_map(|(page, count)| (page, count.min(PAGES - page)));
    prop_oneof![
        6 => (0..bytes, 1..page_bytes(4), any::<bool>())
            .prop_map(move |(offset, len, more)| Step::Get { offset, len: len.min(bytes - offset), more }),
        3 => any::<Index>().prop_map(Step::Release),
        2 => pages().prop_map(|(page, count)| Step::Discard { page, count }),
        1 => pages().prop_map(|(page, count)| Step::Forget { page, count }),
        1 => Just(Step::Reap),
    ]
}

/// An entry, as the model sees it. Bytes are offsets in the memory; `end` is exclusive.
#[derive(Clone, Debug)]
struct Known {
    start: u64,
    end: u64,
    access: Access,
    key: Key,
}

/// Every entry that can be found, in no order. Limits are not part of it.
struct Naive {
    merging: Merging,
    entries: Vec<Known>,
    hits: u64,
    misses: u64,
    merged: u64,
}

impl Naive {
    fn covering(&self, start: u64, end: u64, access: Access) -> Vec<Key> {
        let covers = |e: &&Known| e.start <= start && end <= e.end && e.access.contains(access);
        self.entries.iter().filter(covers).map(|e| e.key).collect()
    }

    /// What is to be registered for a miss.
    fn hull(&self, mut start: u64, mut end: u64, access: Access) -> (u64, u64) {
        for _ in 0..=self.entries.len() {
            for e in self.entries.iter().filter(|e| e.access == access) {
                let joins = match self.merging {
                    Merging::Never => false,
                    Merging::Overlapping => e.start < end && start < e.end,
                    Merging::Touching => e.start <= end && start <= e.end,
                };
                if joins {
                    (start, end) = (start.min(e.start), end.max(e.end));
                }
            }
        }
        (start, end)
    }

    fn end_overlapping(&mut self, start: u64, end: u64, whole_pages: bool) {
        let page = |at: u64| if whole_pages { at / PAGE_SIZE * PAGE_SIZE } else { at };
        let page_end = |at: u64| if whole_pages { at.next_multiple_of(PAGE_SIZE) } else { at };
        self.entries.retain(|e| !(page(e.start) < end && start < page_end(e.end)));
    }
}

fn run(merging: Merging, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let world = World::new(PAGES);
    let cache = world.cache(CacheConfig { merging, granule: 1, ..CacheConfig::default() });
    let mut naive = Naive { merging, entries: Vec::new(), hits: 0, misses: 0, merged: 0 };
    let mut leases: Vec<Lease> = Vec::new();
    for step in steps {
        match step {
            Step::Get { offset, len, more } => {
                let access = if more { rights() } else { READ };
                let lease = cache.get_part(&world.memory, offset, len, access).expect("mapped");
                let keys = naive.covering(offset, offset + len, access);
                prop_assert!(lease.is_current());
                prop_assert_eq!(lease.address().0, world.memory.range().start().0 + offset);
                prop_assert!(lease.region().access().contains(access));
                if keys.is_empty() {
                    naive.misses += 1;
                    let (start, end) = naive.hull(offset, offset + len, access);
                    prop_assert_eq!(lease.region().len(), end - start);
                    let before = naive.entries.len();
                    naive
                        .entries
                        .retain(|e| !(start <= e.start && e.end <= end && access.contains(e.access)));
                    naive.merged += (before - naive.entries.len()) as u64;
                    naive.entries.push(Known { start, end, access, key: lease.key() });
                } else {
                    naive.hits += 1;
                    prop_assert!(keys.contains(&lease.key()), "a stale hit, or a needless registration");
                }
                leases.push(lease);
            }
            Step::Release(index) if !leases.is_empty() => {
                drop(leases.swap_remove(index.index(leases.len())));
            }
            Step::Release(_) => {}
            Step::Discard { page, count } => {
                // What is not there yet goes too: the address space tells of the range, not of its pages.
                world.discard(page, count);
                naive.end_overlapping(page_bytes(page), page_bytes(page + count), true);
            }
            Step::Forget { page, count } => {
                cache.forget(world.pages(page, count));
                naive.end_overlapping(page_bytes(page), page_bytes(page + count), false);
            }
            Step::Reap => cache.reap(),
        }
        let stats = cache.stats();
        prop_assert_eq!((stats.hits, stats.misses), (naive.hits, naive.misses));
        prop_assert!(stats.merged <= naive.merged, "ended entries do not count as merged, others do");
    }
    cache.reap();
    let stats = cache.stats();
    prop_assert_eq!(stats.entries, naive.entries.len() as u64);
    prop_assert_eq!(stats.bytes, naive.entries.iter().map(|e| e.end - e.start).sum::<u64>());
    drop((leases, cache));
    prop_assert_eq!(world.left(), (0, 0));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn finds_what_a_list_of_all_entries_finds(
        merging in prop_oneof![Just(Merging::Never), Just(Merging::Overlapping), Just(Merging::Touching)],
        steps in prop::collection::vec(step(), 1..60),
    ) {
        run(merging, steps)?;
    }

    #[test]
    fn never_holds_more_than_it_may_and_never_lets_a_leased_region_go(
        max_entries in 0..5_usize,
        max_pages in 1..20_u64,
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let world = World::new(PAGES);
        let max_bytes = page_bytes(max_pages);
        let cache = world.cache(CacheConfig { max_entries, max_bytes, granule: 1, ..CacheConfig::default() });
        let mut leases: Vec<Lease> = Vec::new();
        for step in steps {
            match step {
                Step::Get { offset, len, more } => {
                    let access = if more { rights() } else { READ };
                    leases.push(cache.get_part(&world.memory, offset, len, access).expect("mapped"));
                }
                Step::Release(index) if !leases.is_empty() => {
                    drop(leases.swap_remove(index.index(leases.len())));
                }
                Step::Release(_) => {}
                Step::Discard { page, count } => world.discard(page, count),
                Step::Forget { page, count } => drop(cache.forget(world.pages(page, count))),
                Step::Reap => cache.reap(),
            }
            let stats = cache.stats();
            prop_assert!(stats.entries <= max_entries as u64 && stats.bytes <= max_bytes, "{:?}", stats);
            for lease in &leases {
                let followed = lease.region().advise(0, 1, Want::Fault(PageAccess::Read));
                prop_assert!(followed.is_ok(), "{:?}: {:?}", lease, followed);
            }
        }
        drop((leases, cache));
        prop_assert_eq!(world.left(), (0, 0));
    }
}
