//! Each thread's own hold on the newest table, checked by one number that changes only when the table does.
//!
//! A hit reads that number, which all threads have in their caches, and then only what the thread itself holds. After a
//! change each thread takes the new table once, without a lock. A thread that sleeps keeps an old table alive: rows and weak
//! references, no region.

use super::entry::Entry;
use super::table::Table;
use arc_swap::ArcSwap;
#[cfg(not(any(loom, shuttle)))]
use crossbeam::utils::CachePadded;
use hw_model::addr::VirtRange;
use hw_model::hca::Access;
use hw_model::sync::Arc;
use hw_model::sync::atomic::{AtomicU64, Ordering};

/// The newest table of one cache.
pub(super) struct Published {
    generation: AtomicU64,
    /// The standard library's count, also under a model checker, which this is not for: a table is taken whole.
    table: ArcSwap<Table>,
    /// Hits of threads, each counted by itself.
    hits: Hits,
}

#[cfg(not(any(loom, shuttle)))]
type Hits = hw_model::sync::Mutex<Vec<Count>>;

/// Hits of one thread, on a cache line that no other writes.
#[cfg(not(any(loom, shuttle)))]
type Count = Arc<CachePadded<AtomicU64>>;
#[cfg(any(loom, shuttle))]
type Hits = AtomicU64;

impl Published {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            generation: AtomicU64::new(0),
            table: ArcSwap::from_pointee(Table::default()),
            hits: Hits::default(),
        })
    }

    /// Lookups that begin after this see `table`.
    pub(super) fn publish(&self, table: Table) {
        self.table.store(table.into());
        self.generation.fetch_add(1, Ordering::Release);
    }
}

#[cfg(not(any(loom, shuttle)))]
mod threads {
    use super::{Access, Arc, AtomicU64, CachePadded, Count, Entry, Ordering, Published, Table, VirtRange};
    use hw_model::sync::Weak;
    use std::cell::RefCell;

    /// What a thread holds of one cache.
    struct Front {
        cache: Weak<Published>,
        generation: u64,
        table: Arc<Table>,
        hits: Count,
    }

    thread_local! {
        static FRONTS: RefCell<Vec<Front>> = const { RefCell::new(Vec::new()) };
    }

    impl Published {
        /// An entry that answers the request, and had not ended after it was counted as leased.
        #[inline]
        pub(in super::super) fn find(
            self: &Arc<Self>,
            range: VirtRange,
            access: Access,
        ) -> Option<Arc<Entry>> {
            // No entry is dropped inside: that may deregister, and the front is borrowed.
            let found = FRONTS.try_with(|fronts| {
                let mut fronts = fronts.borrow_mut();
                let known = fronts.iter().position(|front| front.cache.as_ptr() == Arc::as_ptr(self));
                let front = match known {
                    Some(index) => &mut fronts[index],
                    None => self.add_front(&mut fronts),
                };
                let generation = self.generation.load(Ordering::Acquire);
                if front.generation != generation {
                    front.table = self.table.load_full();
                    front.generation = generation;
                }
                let found = front.table.find(range, access);
                let current = found.as_ref().is_some_and(|entry| !entry.tracker.is_ended());
                // This thread alone writes the count.
                let hits = front.hits.load(Ordering::Relaxed) + u64::from(current);
                front.hits.store(hits, Ordering::Relaxed);
                (found, current)
            });
            match found {
                Ok((found, current)) => found.filter(|_| current),
                // A thread that is ending has no front any more.
                Err(_) => {
                    self.table.load_full().find(range, access).filter(|entry| !entry.tracker.is_ended())
                }
            }
        }

        #[cold]
        fn add_front<'a>(self: &Arc<Self>, fronts: &'a mut Vec<Front>) -> &'a mut Front {
            fronts.retain(|front| front.cache.strong_count() > 0);
            let counted = |hits| Arc::new(CachePadded::new(AtomicU64::new(hits)));
            let hits = counted(0);
            let mut counts = self.hits.lock();
            // Those of threads that have ended become one.
            let (mut live, ended): (Vec<_>, Vec<_>) =
                counts.drain(..).partition(|count| Arc::strong_count(count) > 1);
            let sum = ended.iter().map(|count| count.load(Ordering::Relaxed)).sum();
            live.push(counted(sum));
            live.push(Arc::clone(&hits));
            *counts = live;
            drop(counts);
            let generation = self.generation.load(Ordering::Acquire);
            let table = self.table.load_full();
            fronts.push(Front { cache: Arc::downgrade(self), generation, table, hits });
            fronts.last_mut().expect("pushed")
        }

        /// Requests that were answered so far.
        pub(in super::super) fn hits(&self) -> u64 {
            self.hits.lock().iter().map(|count| count.load(Ordering::Relaxed)).sum()
        }
    }
}

/// A model checker's threads share the one that runs them, so there are no fronts.
#[cfg(any(loom, shuttle))]
impl Published {
    pub(super) fn find(self: &Arc<Self>, range: VirtRange, access: Access) -> Option<Arc<Entry>> {
        let found = self.table.load_full().find(range, access).filter(|entry| !entry.tracker.is_ended());
        self.hits.fetch_add(u64::from(found.is_some()), Ordering::Relaxed);
        found
    }
    pub(super) fn hits(&self) -> u64 {
        self.hits.load(Ordering::Relaxed)
    }
    /// What a request must not do: not to look again after it was counted. The window is a few instructions wide; here it is
    /// wide enough to be met often.
    #[cfg(all(test, shuttle))]
    pub(super) fn find_once(&self, range: VirtRange, access: Access) -> Option<Arc<Entry>> {
        let table = self.table.load_full();
        let entry = table.weakly(range, access)?;
        (0..40).for_each(|_| hw_model::sync::thread::yield_now());
        entry.upgrade()
    }
}
