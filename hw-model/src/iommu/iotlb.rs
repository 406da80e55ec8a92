//! The IOTLB: translations that the IOMMU remembers.
//!
//! It really caches. A translation stays in use after the page table changed, until it is invalidated or evicted; and,
//! as an IOMMU in caching mode does (Intel VT-d 6.1), it can remember that there was none, so that a mapping that was
//! never synced shows. Set associative, physically no part of the page table.
//!
//! A hit takes no lock: each set is a sequence lock, and a reader that meets a change goes the slow way. A fill walks the
//! page table while it holds the set's lock. An invalidation takes that lock after the table was changed: either the
//! fill came first and what it put in is dropped, or it comes later and walks the changed table.

use super::leaf::{Leaf, LeafSize};
use crate::addr::Iova;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard, fence};
use crossbeam::utils::CachePadded;

/// The shape of an IOTLB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IotlbConfig {
    /// Number of sets, a power of two.
    pub sets: usize,
    /// Entries a set, at least 1.
    pub ways: usize,
    /// Whether it remembers that nothing was mapped. Then a mapping is only sure to be seen after a sync.
    pub caches_not_present: bool,
}

impl Default for IotlbConfig {
    /// 1024 entries, 4 ways, caching mode on: the strictest towards software.
    fn default() -> Self {
        Self { sets: 256, ways: 4, caches_not_present: true }
    }
}

/// What an IOTLB has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IotlbStats {
    /// Translations it knew.
    pub hits: u64,
    /// Translations that needed a walk.
    pub misses: u64,
    /// Entries that made room for others.
    pub evictions: u64,
    /// Invalidation commands, whatever their size.
    pub flushes: u64,
    /// Entries that invalidations dropped.
    pub invalidated: u64,
}

pub(super) struct Iotlb {
    sets: Box<[CachePadded<Set>]>,
    /// `config.ways` for each set.
    ways: Box<[Way]>,
    config: IotlbConfig,
    granule_shift: u32,
    flushes: AtomicU64,
    invalidated: AtomicU64,
}

/// Lock order: one set at a time, nothing taken under it.
struct Set {
    /// Even: at rest. Changed only under `fill`.
    sequence: AtomicU64,
    hits: AtomicU64,
    /// Changed only under `fill`, as the next.
    misses: AtomicU64,
    evictions: AtomicU64,
    /// 0 while no entry of the set is in use and none is being filled in.
    occupied: AtomicU64,
    /// Guards changes; holds the way that is replaced next.
    fill: Mutex<usize>,
}

#[derive(Default)]
struct Way {
    /// First IOVA of the leaf, plus 1 + its size in the low bits. 0: not in use.
    tag: AtomicU64,
    /// The leaf as it was in the table; 0: known not to be present.
    word: AtomicU64,
}

/// Sizes of leaves, one bit each: 1 << size.
pub(super) type Sizes = u32;

impl Iotlb {
    pub(super) fn new(config: IotlbConfig, granule_shift: u32) -> Self {
        let set = || Set {
            sequence: AtomicU64::new(0),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            evictions: AtomicU64::new(0),
            occupied: AtomicU64::new(0),
            fill: Mutex::new(0),
        };
        Self {
            sets: (0..config.sets).map(|_| CachePadded::new(set())).collect(),
            ways: (0..config.sets * config.ways).map(|_| Way::default()).collect(),
            config,
            granule_shift,
            flushes: AtomicU64::new(0),
            invalidated: AtomicU64::new(0),
        }
    }

    fn locate(&self, iova: Iova, size: LeafSize) -> (usize, u64) {
        let shift = size.shift(self.granule_shift);
        let number = iova.0 >> shift;
        (number as usize & (self.sets.len() - 1), number << shift | (size as u64 + 1))
    }

    fn ways(&self, set: usize) -> &[Way] {
        &self.ways[set * self.config.ways..(set + 1) * self.config.ways]
    }

    /// What the IOTLB knows of `iova`, looking for leaves of `sizes`.
    pub(super) fn lookup(&self, iova: Iova, sizes: Sizes) -> Option<Leaf> {
        for size in LeafSize::ALL {
            if sizes & 1 << size as u32 == 0 {
                continue;
            }
            let (index, tag) = self.locate(iova, size);
            let set = &self.sets[index];
            let before = set.sequence.load(Ordering::Acquire);
            if before & 1 == 1 {
                continue;
            }
            for way in self.ways(index) {
                if way.tag.load(Ordering::Relaxed) == tag {
                    let word = way.word.load(Ordering::Relaxed);
                    fence(Ordering::Acquire);
                    if set.sequence.load(Ordering::Relaxed) == before {
                        set.hits.fetch_add(1, Ordering::Relaxed);
                        return Some(Leaf::from_raw(word, size));
                    }
                    break;
                }
            }
        }
        None
    }

    /// Walks and remembers the result.
    #[cold]
    pub(super) fn fill(&self, iova: Iova, walk: impl Fn() -> Leaf) -> Leaf {
        let mut size = LeafSize::Page;
        let mut counted = false;
        // The set depends on the size of the leaf, which the walk tells. Software that changes it all the time gets an
        // answer that is not remembered.
        for _ in 0..LeafSize::ALL.len() {
            let (index, tag) = self.locate(iova, size);
            let mut next = self.sets[index].fill.lock();
            if !std::mem::replace(&mut counted, true) {
                count_locked(&self.sets[index].misses);
            }
            self.announce(index);
            let mut leaf = walk();
            if !leaf.is_live() {
                leaf = Leaf::ABSENT;
            }
            if leaf.size() == size {
                if leaf.is_live() || self.config.caches_not_present {
                    self.insert(index, tag, leaf.word(), &mut next);
                }
                return leaf;
            }
            size = leaf.size();
        }
        walk()
    }

    /// Marks the set as in use before the walk begins, so that an invalidation that finds it unused knows that a walk
    /// under way will see the changed table.
    fn announce(&self, index: usize) {
        let set = &self.sets[index];
        if set.occupied.load(Ordering::Relaxed) == 0 {
            set.occupied.store(1, Ordering::Relaxed);
            fence(Ordering::SeqCst);
        }
    }

    fn insert(&self, index: usize, tag: u64, word: u64, next: &mut MutexGuard<'_, usize>) {
        let ways = self.ways(index);
        let position = |wanted: u64| ways.iter().position(|way| way.tag.load(Ordering::Relaxed) == wanted);
        let victim = position(tag).or_else(|| position(0)).unwrap_or_else(|| {
            count_locked(&self.sets[index].evictions);
            let victim = **next;
            **next = (victim + 1) % ways.len();
            victim
        });
        self.change(index, || {
            ways[victim].tag.store(tag, Ordering::Relaxed);
            ways[victim].word.store(word, Ordering::Relaxed);
        });
    }

    /// Runs `stores` as the writer of the set's sequence lock. The caller holds its `fill`.
    fn change(&self, index: usize, stores: impl FnOnce()) {
        let sequence = &self.sets[index].sequence;
        let before = sequence.load(Ordering::Relaxed);
        sequence.store(before + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        stores();
        sequence.store(before + 2, Ordering::Release);
    }

    /// Drops what is known of the range. `sizes` are those that were ever mapped.
    pub(super) fn invalidate(&self, iova: Iova, len: u64, sizes: Sizes) {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        // After the table was changed, before `occupied` is read: the counterpart of `announce`.
        fence(Ordering::SeqCst);
        let last = iova.0.saturating_add(len.saturating_sub(1));
        let numbers = |size: LeafSize| {
            let shift = size.shift(self.granule_shift);
            (iova.0 >> shift, last >> shift)
        };
        let (first_page, last_page) = numbers(LeafSize::Page);
        let dropped: u64 = if last_page - first_page < self.sets.len() as u64 {
            let known = LeafSize::ALL.into_iter().filter(|size| sizes & 1 << *size as u32 != 0);
            known
                .flat_map(|size| {
                    let (first, last) = numbers(size);
                    first..=last
                })
                .map(|number| self.drop_from_set(number as usize, iova.0, last))
                .sum()
        } else {
            (0..self.sets.len()).map(|set| self.drop_from_set(set, iova.0, last)).sum()
        };
        self.invalidated.fetch_add(dropped, Ordering::Relaxed);
    }

    /// Drops what the set knows of leaves that overlap `[first, last]`.
    fn drop_from_set(&self, set: usize, first: u64, last: u64) -> u64 {
        let index = set & (self.sets.len() - 1);
        let set = &self.sets[index];
        if set.occupied.load(Ordering::Relaxed) == 0 {
            return 0;
        }
        let _fill = set.fill.lock();
        let mut dropped = 0;
        let mut left = 0;
        for way in self.ways(index) {
            let tag = way.tag.load(Ordering::Relaxed);
            if tag == 0 {
                continue;
            }
            if self.overlaps(tag, first, last) {
                self.change(index, || way.tag.store(0, Ordering::Relaxed));
                dropped += 1;
            } else {
                left += 1;
            }
        }
        if left == 0 {
            set.occupied.store(0, Ordering::Relaxed);
        }
        dropped
    }

    fn overlaps(&self, tag: u64, first: u64, last: u64) -> bool {
        let Some(size) = LeafSize::ALL.get((tag & 3) as usize - 1) else { return true };
        let start = tag & !3;
        start <= last && first <= start + ((1 << size.shift(self.granule_shift)) - 1)
    }

    pub(super) fn stats(&self) -> IotlbStats {
        IotlbStats {
            hits: self.sets.iter().map(|set| set.hits.load(Ordering::Relaxed)).sum(),
            misses: self.sets.iter().map(|set| set.misses.load(Ordering::Relaxed)).sum(),
            evictions: self.sets.iter().map(|set| set.evictions.load(Ordering::Relaxed)).sum(),
            flushes: self.flushes.load(Ordering::Relaxed),
            invalidated: self.invalidated.load(Ordering::Relaxed),
        }
    }
}

/// Counts one more of what only the holder of a set's lock counts: no locked instruction.
fn count_locked(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

#[cfg(all(test, shuttle))]
mod schedules;
