//! The translation cache of an engine: what it remembers of page lists (the MTT cache) and of keys (the key cache).
//!
//! A real HCA keeps both in host memory and remembers a part. This one has nothing to gain by that; it is here so that the
//! cost of a working set can be counted, misses can be forced, and software that forgets to flush is found out. Off unless
//! the configuration says otherwise.
//!
//! **It really caches pages.** A hit gives the entry as it was when it was read. The page list is the truth: whoever hides
//! entries of one flushes what is remembered of it ([`PageList::flush`]) in the same step, before the drain. A burst that
//! begins after that sees the flush, because the epoch makes it see what was stored before the drain; one that began before
//! is waited for. Entries that are not there, or not for this access, are not remembered: a page that comes in is seen.
//!
//! **Of keys it remembers names only.** What a key covers is looked up every time (invariant 15 rests on that), and the
//! cache counts whether a device would have known it. Any change to a key forgets everything, pages too, as pages are
//! remembered by key.

use super::key::KeyTable;
use super::page_list::{Entry, PageList};
use super::stats::Counters;
use crate::wire::Key;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha20Rng;

/// Which entry of a set makes room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Replacement {
    /// The one whose last use is longest ago.
    LeastRecent,
    /// The one that came first.
    Oldest,
    /// Any, from the device's seed.
    Random,
}

/// The shape of one cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheShape {
    /// Sets, a power of two.
    pub sets: u32,
    /// Entries a set, at least 1.
    pub ways: u32,
    /// Which entry of a set makes room.
    pub replacement: Replacement,
}

impl CacheShape {
    /// Whether there is such a cache: a power of two of sets, and no more than 2^24 entries.
    pub(super) fn is_possible(&self) -> bool {
        let entries = u64::from(self.sets) * u64::from(self.ways);
        self.sets.is_power_of_two() && (1..=1 << 24).contains(&entries)
    }
}

/// The caches of each engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TranslationCacheConfig {
    /// Of entries of page lists.
    pub pages: CacheShape,
    /// Of keys.
    pub keys: CacheShape,
}

impl TranslationCacheConfig {
    /// 4096 pages in 8 ways and 256 keys in 4, least recent first to go.
    #[must_use]
    pub const fn usual() -> Self {
        let replacement = Replacement::LeastRecent;
        Self {
            pages: CacheShape { sets: 512, ways: 8, replacement },
            keys: CacheShape { sets: 64, ways: 4, replacement },
        }
    }
}

#[derive(Clone, Copy)]
struct Way<T, V> {
    tag: T,
    value: V,
    /// When it came in, or was last used: what decides who makes room.
    stamp: u64,
}

struct Ways<T, V> {
    slots: Box<[Option<Way<T, V>>]>,
    shape: CacheShape,
    clock: u64,
    random: ChaCha20Rng,
}

impl<T: Copy + PartialEq, V: Copy> Ways<T, V> {
    fn new(shape: CacheShape, seed: u64) -> Self {
        let entries = shape.sets as usize * shape.ways as usize;
        Self { slots: vec![None; entries].into(), shape, clock: 0, random: ChaCha20Rng::seed_from_u64(seed) }
    }

    fn set(&mut self, number: u64) -> &mut [Option<Way<T, V>>] {
        let ways = self.shape.ways as usize;
        let set = number as usize & (self.shape.sets as usize - 1);
        &mut self.slots[set * ways..(set + 1) * ways]
    }

    fn get(&mut self, number: u64, tag: T) -> Option<V> {
        self.clock += 1;
        let stamp = (self.shape.replacement == Replacement::LeastRecent).then_some(self.clock);
        let way = self.set(number).iter_mut().flatten().find(|way| way.tag == tag)?;
        way.stamp = stamp.unwrap_or(way.stamp);
        Some(way.value)
    }

    fn put(&mut self, number: u64, tag: T, value: V) {
        self.clock += 1;
        let new = Way { tag, value, stamp: self.clock };
        let any = self.random.next_u32() as usize % self.shape.ways as usize;
        let random = self.shape.replacement == Replacement::Random;
        let set = self.set(number);
        let known = set.iter().position(|slot| slot.is_some_and(|way| way.tag == tag));
        let free = || set.iter().position(Option::is_none);
        let victim = known.or_else(free).unwrap_or_else(|| match random {
            true => any,
            false => (0..set.len()).min_by_key(|way| set[*way].map_or(0, |way| way.stamp)).unwrap_or(0),
        });
        set[victim] = Some(new);
    }

    fn clear(&mut self) {
        self.slots.fill(None);
    }
}

/// The caches of one engine. Nothing of them is allocated after they were made: they are used inside bursts.
pub(super) struct TranslationCache {
    /// By key and page: the entry, and the generation of its list when it was read.
    pages: Ways<(Key, u64), (Entry, u64)>,
    keys: Ways<Key, ()>,
    /// The key table's generation of which the above is.
    generation: u64,
}

impl TranslationCache {
    pub(super) fn new(config: TranslationCacheConfig, seed: u64) -> Self {
        let (pages, keys) = (Ways::new(config.pages, seed), Ways::new(config.keys, !seed));
        Self { pages, keys, generation: 0 }
    }

    /// A burst begins.
    pub(super) fn begin(&mut self, table: &KeyTable, counters: &Counters) {
        let generation = table.generation();
        if self.generation != generation {
            self.generation = generation;
            self.pages.clear();
            self.keys.clear();
            counters.translation_flushes.add(1);
        }
    }

    /// A key is looked up.
    pub(super) fn look_up(&mut self, key: Key, counters: &Counters) {
        if self.keys.get(u64::from(key.0), key).is_some() {
            counters.key_cache_hits.add(1);
        } else {
            counters.key_cache_misses.add(1);
            self.keys.put(u64::from(key.0), key, ());
        }
    }

    /// Entry `index` of the list of `key`, for writing or for reading.
    pub(super) fn load(
        &mut self,
        (key, list): (Key, &PageList),
        index: u64,
        write: bool,
        counters: &Counters,
    ) -> Entry {
        let (number, tag) = (index ^ u64::from(key.0), (key, index));
        let usable = |entry: Entry| if write { entry.is_writable() } else { entry.is_valid() };
        // Before the entry: one that is read before a flush is remembered under the generation before it.
        let generation = list.generation();
        if let Some((entry, of)) = self.pages.get(number, tag)
            && of == generation
            && usable(entry)
        {
            counters.page_cache_hits.add(1);
            return entry;
        }
        counters.page_cache_misses.add(1);
        let entry = list.load(index).unwrap_or_default();
        if usable(entry) {
            self.pages.put(number, tag, (entry, generation));
        }
        entry
    }
}

/// The caches of an engine during a burst, or none: then this is one branch a page.
pub(super) struct Cache<'a>(Option<(&'a mut TranslationCache, &'a Counters)>);

impl<'a> Cache<'a> {
    pub(super) fn new(cache: Option<&'a mut TranslationCache>, counters: &'a Counters) -> Self {
        Self(cache.map(|cache| (cache, counters)))
    }

    /// None.
    pub(super) fn none() -> Self {
        Self(None)
    }

    /// A burst begins.
    #[inline]
    pub(super) fn begin(&mut self, table: &KeyTable) {
        if let Some((cache, counters)) = &mut self.0 {
            cache.begin(table, counters);
        }
    }

    /// A key is looked up.
    #[inline]
    pub(super) fn look_up(&mut self, key: Key) {
        if let Some((cache, counters)) = &mut self.0 {
            cache.look_up(key, counters);
        }
    }

    /// Entry `index` of the list of `key`, for writing or for reading, with the number of pages whose addresses go on from
    /// there, as far as that is known; an empty one past the end.
    #[inline]
    pub(super) fn load(&mut self, key: Key, list: &PageList, index: u64, write: bool) -> (Entry, u64) {
        match &mut self.0 {
            None => list.load_run(index).unwrap_or((Entry::EMPTY, 1)),
            Some((cache, counters)) => (cache.load((key, list), index, write, counters), 1),
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
