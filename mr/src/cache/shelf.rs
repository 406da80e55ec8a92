//! The entries that are kept: in order, counted, and evicted when there are too many.
//!
//! Eviction is a clock: a hand goes round, passes over what is leased, takes the mark off what was found since it last came
//! by, and takes out the first that has none. What leaves the shelf is handed to the caller, to be dropped when the lock is
//! not held any more.

use super::config::{CacheConfig, Merging};
use super::entry::Entry;
use super::table::{Row, Table};
use hw_model::addr::VirtRange;
use hw_model::hca::Access;
use hw_model::sync::{Arc, Weak};
use odp::space::UserRange;
use std::any::Any;

/// What entries a request has to have been made for to be merged: the owner of memory that the cache does not keep.
pub(super) type Owner = Option<Weak<dyn Any + Send + Sync>>;

/// One entry that is kept.
pub(super) struct Kept {
    pub(super) row: Row,
    pub(super) memory: UserRange,
    pub(super) owner: Owner,
    /// The shelf's own reference.
    pub(super) entry: Arc<Entry>,
}

impl Kept {
    fn bytes(&self) -> u64 {
        self.memory.range().len()
    }
    fn is_leased(&self) -> bool {
        Arc::strong_count(&self.entry) > 1
    }
}

/// What has left the shelf. To be dropped without its lock.
pub(super) type Displaced = Vec<Kept>;

#[derive(Default)]
pub(super) struct Shelf {
    /// In the order of their first bytes.
    kept: Vec<Kept>,
    bytes: u64,
    hand: usize,
    pub(super) misses: u64,
    pub(super) merged: u64,
    pub(super) evicted: u64,
    pub(super) unkept: u64,
}

/// What became of an entry that was to be put on the shelf.
pub(super) enum Put {
    /// It is there.
    Kept,
    /// There is one already that answers the same request. Ours is in what was displaced.
    Covered(Arc<Entry>),
    /// It is in what was displaced: it has ended, or there is no room.
    Refused,
}

fn same_owner(one: &Owner, other: &Owner) -> bool {
    match (one, other) {
        (None, None) => true,
        (Some(one), Some(other)) => Weak::ptr_eq(one, other),
        _ => false,
    }
}

impl Shelf {
    pub(super) fn len(&self) -> usize {
        self.kept.len()
    }
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The table of what is kept now.
    pub(super) fn table(&self) -> Table {
        Table::new(self.kept.iter().map(|kept| kept.row.clone()).collect())
    }

    /// The range to register for a request for `wanted`: with the entries that it is to become one with.
    pub(super) fn merged(
        &self,
        wanted: &UserRange,
        owner: &Owner,
        access: Access,
        config: &CacheConfig,
    ) -> UserRange {
        let mut whole = wanted.clone();
        if config.merging == Merging::Never {
            return whole;
        }
        // Each round may reach entries that the one before did not.
        loop {
            let before = whole.range();
            for kept in self.kept.iter().filter(|kept| kept.row.access == access) {
                let theirs = kept.memory.range();
                if before.contains(theirs)
                    || kept.row.tracker.is_ended()
                    || !same_owner(&kept.owner, owner)
                    || (config.merging == Merging::Overlapping && !whole.range().overlaps(theirs))
                {
                    continue;
                }
                whole = whole
                    .joined(&kept.memory)
                    .filter(|joined| joined.range().len() <= config.max_merged)
                    .unwrap_or(whole);
            }
            if whole.range() == before {
                return whole;
            }
        }
    }

    /// Puts `new`, made for a request for `wanted`, on the shelf; what it holds all of leaves it, and what must make room.
    pub(super) fn put(
        &mut self,
        new: Kept,
        wanted: VirtRange,
        config: &CacheConfig,
        displaced: &mut Displaced,
    ) -> Put {
        if let Some(last) = wanted.last()
            && let Some(theirs) = self.kept.iter().find(|kept| {
                kept.row.covers(wanted.start(), last, new.row.access) && !kept.row.tracker.is_ended()
            })
        {
            let entry = Arc::clone(&theirs.entry);
            self.refuse(new, displaced);
            // It may have ended while it was being counted; as with any hit, look again.
            return if entry.tracker.is_ended() { Put::Refused } else { Put::Covered(entry) };
        }
        if new.row.tracker.is_ended() {
            self.refuse(new, displaced);
            return Put::Refused;
        }
        let (whole, access) = (new.memory.range(), new.row.access);
        let before = displaced.len();
        self.take(displaced, |kept| access.contains(kept.row.access) && whole.contains(kept.memory.range()));
        self.merged += (displaced.len() - before) as u64;
        while self.kept.len() >= config.max_entries || self.bytes + new.bytes() > config.max_bytes {
            let Some(victim) = self.victim() else {
                self.refuse(new, displaced);
                return Put::Refused;
            };
            self.evicted += 1;
            self.remove(victim, displaced);
        }
        let at = self.kept.partition_point(|kept| kept.row.start <= new.row.start);
        self.bytes += new.bytes();
        if at < self.hand {
            self.hand += 1;
        }
        self.kept.insert(at, new);
        Put::Kept
    }

    fn refuse(&mut self, new: Kept, displaced: &mut Displaced) {
        new.row.tracker.unkeep();
        self.unkept += 1;
        displaced.push(new);
    }

    /// Where the hand stops: at an entry that nobody has a lease on and nobody has found lately.
    fn victim(&mut self) -> Option<usize> {
        for _ in 0..2 * self.kept.len() {
            let index = self.hand % self.kept.len();
            let kept = &self.kept[index];
            if !kept.is_leased() && !kept.row.tracker.take_used() {
                self.hand = index;
                return Some(index);
            }
            self.hand = index + 1;
        }
        None
    }

    fn remove(&mut self, index: usize, displaced: &mut Displaced) {
        let kept = self.kept.remove(index);
        self.hand -= usize::from(index < self.hand);
        self.bytes -= kept.bytes();
        kept.row.tracker.unkeep();
        displaced.push(kept);
    }

    /// Takes off everything that `which` says.
    pub(super) fn take(&mut self, displaced: &mut Displaced, which: impl Fn(&Kept) -> bool) {
        let mut index = 0;
        while index < self.kept.len() {
            if which(&self.kept[index]) {
                self.remove(index, displaced);
            } else {
                index += 1;
            }
        }
    }

    /// Takes off what has ended.
    pub(super) fn take_ended(&mut self, displaced: &mut Displaced) {
        self.take(displaced, |kept| kept.row.tracker.is_ended());
    }

    /// Takes off what nobody has a lease on.
    pub(super) fn take_idle(&mut self, displaced: &mut Displaced) {
        let before = displaced.len();
        self.take(displaced, |kept| !kept.is_leased());
        self.evicted += (displaced.len() - before) as u64;
    }
}
