//! The translation cache from outside: what it counts, and that it never serves what software took away.

use crate::world::{Pair, Region, config, pattern};
use hw_model::addr::{PAGE_SIZE, RegionAddr};
use hw_model::hca::{
    CacheShape, FaultOutcome, HcaConfig, HcaStats, KeyChange, KeyMemory, NewHcaError, Remote, Replacement,
    SendRequest, Status, TranslationCacheConfig,
};
use hw_model::link::Fabric;
use hw_model::sync::Arc;

const PAGES: u64 = 8;

fn cached(pages: u32, keys: u32) -> HcaConfig {
    let shape = |ways| CacheShape { sets: 1, ways, replacement: Replacement::LeastRecent };
    let cache = TranslationCacheConfig { pages: shape(pages), keys: shape(keys) };
    HcaConfig { translation_cache: Some(cache), ..config() }
}

/// Page hits and misses, key hits and misses, flushes.
fn counted(stats: &HcaStats) -> [u64; 5] {
    let HcaStats { page_cache_hits, page_cache_misses, key_cache_hits, key_cache_misses, .. } = *stats;
    [page_cache_hits, page_cache_misses, key_cache_hits, key_cache_misses, stats.translation_flushes]
}

/// Writes the first `pages` pages of `region`, and what `b` counted meanwhile.
fn write(pair: &mut Pair, region: &Region, pages: u64) -> [u64; 5] {
    let local = pair.a.region(PAGES * PAGE_SIZE);
    pair.a.fill(&local, 0, &pattern(pages, pages * PAGE_SIZE));
    let before = counted(&pair.b.hca.stats());
    let sges = [local.sge(0, (pages * PAGE_SIZE) as u32)];
    assert_eq!(pair.ask(&SendRequest::write(1, &sges, region.remote(0))), Status::Success);
    let after = counted(&pair.b.hca.stats());
    assert_eq!(pair.b.bytes(region, 0, pages * PAGE_SIZE), pattern(pages, pages * PAGE_SIZE));
    std::array::from_fn(|at| after[at] - before[at])
}

#[test]
fn a_working_set_that_fits_misses_once_and_one_that_does_not_misses_always() {
    let mut pair = Pair::new(cached(4, 4));
    let region = pair.b.region(PAGES * PAGE_SIZE);
    let [hits, misses, ..] = write(&mut pair, &region, 4);
    assert_eq!((hits, misses), (0, 4), "cold");
    let [hits, misses, key_hits, key_misses, _] = write(&mut pair, &region, 4);
    assert_eq!((hits, misses), (4, 0), "all of it is known");
    assert!(key_hits > 0 && key_misses == 0);
    // Round and round through five pages of four ways: the oldest is always the one that is wanted next.
    write(&mut pair, &region, 5);
    for _ in 0..3 {
        let [hits, misses, ..] = write(&mut pair, &region, 5);
        assert!(misses >= 4 && hits <= 1, "{hits} hits, {misses} misses");
    }
}

#[test]
fn misses_can_be_forced() {
    let mut pair = Pair::new(cached(8, 4));
    let region = pair.b.region(PAGES * PAGE_SIZE);
    write(&mut pair, &region, 4);
    assert_eq!(write(&mut pair, &region, 4)[..2], [4, 0]);
    pair.b.hca.flush_translation_cache();
    let [hits, misses, _, key_misses, flushes] = write(&mut pair, &region, 4);
    assert_eq!((hits, misses, key_misses, flushes), (0, 4, 1, 1));
}

#[test]
fn without_a_cache_nothing_is_counted() {
    let mut pair = Pair::new(config());
    let region = pair.b.region(PAGES * PAGE_SIZE);
    assert_eq!(write(&mut pair, &region, 4), [0; 5]);
}

#[test]
fn a_page_that_was_hidden_and_flushed_faults_and_its_new_place_is_used() {
    let mut pair = Pair::new(cached(8, 4));
    let (region, other) = (pair.b.region(PAGES * PAGE_SIZE), pair.b.region(PAGE_SIZE));
    write(&mut pair, &region, 2);
    region.absent(1);
    region.pages.flush();
    let local = pair.a.region(PAGES * PAGE_SIZE);
    pair.a.fill(&local, 0, &pattern(9, 2 * PAGE_SIZE));
    let sges = [local.sge(0, 2 * PAGE_SIZE as u32)];
    pair.qa.post_send(&SendRequest::write(1, &sges, region.remote(0))).expect("posted");
    let mut faults = 0;
    pair.run(|_, fault| {
        faults += 1;
        assert_eq!(region.page_of(fault), 1);
        region.pages.store(1, other.entry(0, true));
        FaultOutcome::Resolved
    });
    assert_eq!(pair.a.take()[0].status, Status::Success);
    assert_eq!(faults, 1, "a page that is not there was served from the cache");
    let expected = pattern(9, 2 * PAGE_SIZE);
    assert_eq!(
        pair.b.bytes(&other, 0, PAGE_SIZE),
        expected[PAGE_SIZE as usize..],
        "not where the page is now"
    );
}

/// Regression: an atomic took the remembered entry that only allows reading, and asked for its page for ever.
#[test]
fn an_atomic_asks_once_for_a_page_that_is_remembered_read_only() {
    let mut pair = Pair::new(cached(8, 4));
    let (near, far) = (pair.a.region(PAGE_SIZE), pair.b.region(PAGE_SIZE));
    far.pages.store(0, far.entry(0, false));
    let sges = [near.sge(8, 8)];
    assert_eq!(pair.ask(&SendRequest::read(1, &sges, far.remote(64))), Status::Success);
    pair.qa.post_send(&SendRequest::fetch_add(2, &sges, far.remote(64), 5)).expect("posted");
    let mut faults = 0;
    pair.run(|_, _| {
        faults += 1;
        far.pages.store(0, far.entry(0, true));
        if faults < 10 { FaultOutcome::Resolved } else { FaultOutcome::Failed }
    });
    assert_eq!((pair.a.take()[0].status, faults), (Status::Success, 1));
    assert_eq!(pair.b.word(&far, 64), 5);
}

#[test]
fn a_changed_or_destroyed_key_takes_its_pages_out_of_the_cache() {
    let mut pair = Pair::new(cached(8, 4));
    let (region, other) = (pair.b.region(2 * PAGE_SIZE), pair.b.region(2 * PAGE_SIZE));
    write(&mut pair, &region, 2);
    // The same key and the same addresses lead elsewhere now.
    let memory = KeyMemory {
        address: RegionAddr(region.base),
        length: 2 * PAGE_SIZE,
        first_page_offset: 0,
        pages: Arc::clone(&other.pages),
    };
    let change = KeyChange { memory: Some(memory), ..KeyChange::default() };
    pair.b.hca.rereg_key(region.key, change).expect("a region's key");
    let moved = Region { key: region.key, ..other };
    write(&mut pair, &moved, 2);
    pair.b.hca.destroy_key(region.key).expect("there");
    let local = pair.a.region(PAGE_SIZE);
    let sges = [local.sge(0, 8)];
    let remote = Remote { key: region.key, address: RegionAddr(region.base) };
    assert_eq!(pair.ask(&SendRequest::write(1, &sges, remote)), Status::RemoteAccessError);
}

#[test]
fn a_cache_of_an_impossible_shape_is_refused() {
    let shape = |sets, ways| CacheShape { sets, ways, replacement: Replacement::Oldest };
    for wrong in [shape(0, 1), shape(3, 1), shape(1, 0), shape(1 << 20, 1 << 20)] {
        for (pages, keys) in [(wrong, shape(1, 1)), (shape(1, 1), wrong)] {
            let cache = TranslationCacheConfig { pages, keys };
            let config = HcaConfig { translation_cache: Some(cache), ..config() };
            let memory = crate::world::Words::new(1);
            let port = hw_model::bus::DmaPort::direct(memory);
            let refused = hw_model::hca::Hca::new(config, port, Box::new(Fabric::new().port())).err();
            assert_eq!(refused, Some(NewHcaError::CacheShape { shape: wrong }));
        }
    }
}
