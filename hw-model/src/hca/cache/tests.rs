use super::*;
use crate::addr::DmaAddr;
use crate::hca::page_list::{Backing, Path};
use proptest::prelude::*;

fn shape(sets: u32, ways: u32, replacement: Replacement) -> CacheShape {
    CacheShape { sets, ways, replacement }
}

fn entry(page: u64, write: bool) -> Entry {
    Entry::present(DmaAddr(page << 12), Path::Direct, Backing::Anonymous, write)
}

/// Which of pages 0 to 2 a set of two knows after these were used, in order.
fn known(replacement: Replacement, used: &[u64]) -> Vec<u64> {
    let mut ways = Ways::new(shape(1, 2, replacement), 1);
    for page in used {
        if ways.get(*page, *page).is_none() {
            ways.put(*page, *page, ());
        }
    }
    (0..3).filter(|page| ways.get(*page, *page).is_some()).collect()
}

#[test]
fn a_full_set_makes_room_as_its_policy_says() {
    assert_eq!(known(Replacement::LeastRecent, &[0, 1, 0, 2]), [0, 2]);
    assert_eq!(known(Replacement::Oldest, &[0, 1, 0, 2]), [1, 2]);
    let random = known(Replacement::Random, &[0, 1, 0, 2]);
    assert_eq!(random.len(), 2);
    assert!(random.contains(&2), "what came last is known");
}

#[test]
fn what_was_hidden_and_flushed_is_not_served_and_what_was_not_flushed_is() {
    let list = PageList::new(4).expect("a list");
    let counters = Counters::default();
    let mut cache = TranslationCache::new(TranslationCacheConfig::usual(), 1);
    list.store(1, entry(7, true));
    let key = Key(9);
    assert_eq!(cache.load((key, &list), 1, true, &counters), entry(7, true));
    list.store(1, entry(7, true).cleared());
    let stale = cache.load((key, &list), 1, true, &counters);
    assert_eq!(stale, entry(7, true), "it really caches: this is what a forgotten flush looks like");
    list.flush();
    assert!(!cache.load((key, &list), 1, true, &counters).is_valid());
    // What is not there is not remembered, and neither is what does not serve.
    list.store(1, entry(8, false));
    assert_eq!(cache.load((key, &list), 1, false, &counters), entry(8, false));
    assert_eq!(cache.load((key, &list), 1, true, &counters), entry(8, false), "the list is asked");
    list.store(1, entry(8, true));
    assert_eq!(cache.load((key, &list), 1, true, &counters), entry(8, true), "an upgrade needs no flush");
    assert_eq!(counters.page_cache_hits.get(), 1, "the stale one and no other");
}

#[test]
fn pages_of_two_keys_and_past_the_end_are_told_apart() {
    let lists = [1, 2].map(|first| {
        let list = PageList::new(2).expect("a list");
        list.store(0, entry(first, true));
        list
    });
    let counters = Counters::default();
    let one = shape(1, 1, Replacement::Oldest);
    let mut cache = TranslationCache::new(TranslationCacheConfig { pages: one, keys: one }, 1);
    for _ in 0..3 {
        for (key, list) in lists.iter().enumerate() {
            let found = cache.load((Key(key as u32), list), 0, true, &counters);
            assert_eq!(found.address().0 >> 12, key as u64 + 1);
        }
    }
    assert_eq!(cache.load((Key(0), &lists[0]), 2, false, &counters), Entry::EMPTY);
    assert_eq!(counters.page_cache_hits.get(), 0, "one entry, two pages: they push each other out");
}

proptest! {
    /// With flushes where they belong, the cache and the list never differ, whatever its shape.
    #[test]
    fn a_cache_that_is_flushed_answers_as_the_list_does(
        sets in 0..3_u32,
        ways in 1..4_u32,
        which in 0..3_usize,
        turns in prop::collection::vec((0..6_u64, 0..5_u8, any::<bool>()), 1..200),
    ) {
        let policy = [Replacement::LeastRecent, Replacement::Oldest, Replacement::Random][which];
        let shape = shape(1 << sets, ways, policy);
        let counters = Counters::default();
        let mut cache = TranslationCache::new(TranslationCacheConfig { pages: shape, keys: shape }, 3);
        let list = PageList::new(6).expect("a list");
        for (turn, (page, what, write)) in turns.into_iter().enumerate() {
            let before = list.load(page).expect("in it");
            match what {
                0 => list.store(page, entry(turn as u64 + 1, write)),
                1 if before.is_valid() => list.store(page, before.upgraded()),
                2 => list.store(page, before.cleared()),
                _ => {}
            }
            // A new place or less permission is only for a page that was hidden before, as in a region.
            if what == 2 || what == 0 {
                list.flush();
            }
            let found = cache.load((Key(1), &list), page, write, &counters);
            let truth = list.load(page).expect("in it");
            let usable = if write { truth.is_writable() } else { truth.is_valid() };
            prop_assert_eq!(if write { found.is_writable() } else { found.is_valid() }, usable);
            if usable {
                prop_assert_eq!(found.address(), truth.address());
            }
        }
    }
}
