//! A request that no entry answers: watch the memory, register it, put the region on the shelf.
//!
//! The tracker listens before the region is made, so a change at any moment from then on is found on its flag when the
//! region is about to be kept. A region whose memory changed meanwhile is given out and not kept: it follows its memory, but
//! nobody else is to find it.

use super::config::CacheError;
use super::entry::{Entry, Lease};
use super::registration_cache::Cache;
use super::shelf::{Displaced, Kept, Owner, Put, Shelf};
use super::table::Row;
use super::tracker::Tracker;
use super::unkept::unkept;
use crate::device::{RegisterError, RegisterOptions};
use crate::points;
use hw_model::addr::{VirtAddr, VirtRange};
use hw_model::hca::Access;
use hw_model::sync::Arc;
use odp::space::UserRange;

/// A region that was just made, with the two references that it begins with.
struct Fresh {
    entry: Arc<Entry>,
    kept: Kept,
}

impl Cache {
    #[cold]
    pub(super) fn miss(
        &self,
        memory: &UserRange,
        wanted: VirtRange,
        access: Access,
    ) -> Result<Lease, CacheError> {
        self.reap();
        let (memory, owner) = unkept(memory, &*self.pd);
        let single = self.widened(&memory, wanted);
        let whole = {
            let mut shelf = self.shelf.lock();
            shelf.misses += 1;
            shelf.merged(&single, &owner, access, &self.config)
        };
        let fresh = self.register_some(&whole, &single, &owner, access)?;
        let _ = self.config.points.meet(points::CACHE_PUT);
        let Fresh { entry, kept } = fresh;
        let mut put = Put::Refused;
        let displaced = self.put(kept, wanted, &mut put);
        // Without the lock: what nobody has a lease on is deregistered here.
        drop(displaced);
        Ok(match put {
            Put::Covered(theirs) => Lease::new(theirs, wanted.start(), wanted.len()),
            Put::Kept | Put::Refused => Lease::new(entry, wanted.start(), wanted.len()),
        })
    }

    fn put(&self, kept: Kept, wanted: VirtRange, outcome: &mut Put) -> Displaced {
        let mut displaced = Displaced::new();
        let mut shelf = self.shelf.lock();
        *outcome = shelf.put(kept, wanted, &self.config, &mut displaced);
        if matches!(outcome, Put::Kept) {
            self.published.publish(shelf.table());
        }
        displaced
    }

    /// The whole, or where that cannot be had, what was asked for; or that once every idle entry has gone.
    fn register_some(
        &self,
        whole: &UserRange,
        single: &UserRange,
        owner: &Owner,
        access: Access,
    ) -> Result<Fresh, RegisterError> {
        if whole.range() != single.range()
            && let Ok(fresh) = self.register(whole, owner, access)
        {
            return Ok(fresh);
        }
        match self.register(single, owner, access) {
            Ok(fresh) => Ok(fresh),
            Err(error) => {
                let displaced = self.change(Shelf::take_idle);
                if displaced.is_empty() {
                    return Err(error);
                }
                drop(displaced);
                self.register(single, owner, access)
            }
        }
    }

    fn register(&self, memory: &UserRange, owner: &Owner, access: Access) -> Result<Fresh, RegisterError> {
        let range = memory.range();
        let tracker = Tracker::new(&self.ended);
        let interval = self.space.notifiers().register(range.page_aligned(), Arc::clone(&tracker) as Arc<_>);
        // An invalidation that began before does not call the tracker. It counts on the interval, though, and what is
        // registered under it would be of the time before.
        let quiet = interval.begin();
        let options = RegisterOptions { access, mode: self.config.mode, ..RegisterOptions::on_demand() };
        let region = Arc::clone(&self.pd).register(memory, options)?;
        if quiet.is_none_or(|seq| interval.retry(&seq)) {
            tracker.end();
        }
        let entry = Arc::new(Entry {
            key: region.key(),
            start: range.start(),
            address: region.address(),
            region,
            tracker: Arc::clone(&tracker),
            _interval: interval,
        });
        // Both references are there before the tracker can count them.
        let row = Row {
            start: range.start(),
            last: range.last().expect("a region holds a byte"),
            access,
            tracker: Arc::clone(&tracker),
            entry: Arc::downgrade(&entry),
        };
        let kept = Kept { row, memory: memory.clone(), owner: owner.clone(), entry: Arc::clone(&entry) };
        tracker.arm(&entry, owner.clone());
        Ok(Fresh { entry, kept })
    }

    /// `wanted` in whole granules, within `memory`.
    fn widened(&self, memory: &UserRange, wanted: VirtRange) -> UserRange {
        let granule = self.config.granule.max(1);
        let whole = memory.range();
        let first = (wanted.start().0 - wanted.start().0 % granule).max(whole.start().0);
        let last = wanted.last().expect("a request holds a byte").0;
        let end = (last - last % granule).saturating_add(granule - 1);
        let last = end.min(whole.last().expect("it holds the request").0);
        let offset = VirtAddr(first).0 - whole.start().0;
        memory.part(offset, last - first + 1).expect("within the memory")
    }
}
