//! The poll rung: ranges whose changes nobody reports.
//!
//! What is mapped there is compared, before each burst, with what was mapped when the range was last reported: file,
//! offset, permission. That is weak. One anonymous mapping is like another, a page dropped and touched again is like the
//! one before, and a change between the look and the copy is not seen. The copy itself stays safe.

use super::mappings::{Identity, Mapping, Mappings};
use hw_model::addr::{VirtAddr, VirtRange};
use hw_model::sync::atomic::{AtomicUsize, Ordering};
use hw_model::sync::{Arc, Mutex, RwLock};
use rustix::io::Errno;

/// A range that nobody watches for us.
#[derive(Clone, Copy, Debug)]
pub(super) struct Record {
    pub(super) range: VirtRange,
    /// Why it could not be watched.
    pub(super) reason: Errno,
    identity: Identity,
}

/// All such ranges, disjoint and in ascending order.
///
/// Locks: `change`, then `records`. Engines read `records` inside a burst, so nothing is allocated, freed or mapped while
/// it is held for writing: a list is built aside, swapped in, and the old one freed afterwards.
pub(super) struct Polled {
    mappings: Arc<Mappings>,
    count: AtomicUsize,
    change: Mutex<()>,
    records: RwLock<Vec<Record>>,
}

impl Polled {
    pub(super) fn new(mappings: Arc<Mappings>) -> Self {
        Self {
            mappings,
            count: AtomicUsize::new(0),
            change: Mutex::new(()),
            records: RwLock::new(Vec::new()),
        }
    }

    /// Whether `at` still is what was reported. True for what is not in here.
    pub(super) fn still_holds(&self, at: VirtAddr) -> bool {
        if self.count.load(Ordering::Acquire) == 0 || !self.mappings.can_query() {
            return true;
        }
        let identity = {
            let records = self.records.read();
            let index = records.partition_point(|record| record.range.end() <= at);
            match records.get(index) {
                Some(record) if record.range.start() <= at => record.identity,
                _ => return true,
            }
        };
        self.mappings.identity_at(at) == Some(identity)
    }

    /// The records that overlap `range`, cut to it.
    pub(super) fn overlapping(&self, range: VirtRange) -> Vec<Record> {
        if self.count.load(Ordering::Acquire) == 0 {
            return Vec::new();
        }
        let records = self.records.read();
        let from = records.partition_point(|record| record.range.end() <= range.start());
        records[from..]
            .iter()
            .map_while(|record| record.range.intersection(range).map(|range| Record { range, ..*record }))
            .collect()
    }

    /// From now on `range`, part of `mapping`, is polled.
    pub(super) fn insert(&self, range: VirtRange, mapping: &Mapping, reason: Errno) {
        self.replace(range, Some(Record { range, reason, identity: mapping.identity }));
    }

    /// From now on `range` is not polled.
    pub(super) fn remove(&self, range: VirtRange) {
        if self.count.load(Ordering::Acquire) > 0 {
            self.replace(range, None);
        }
    }

    /// The parts of `range` that are polled and were reported as another mapping than this one, with the reason.
    pub(super) fn changed(&self, range: VirtRange, mapping: &Mapping) -> Vec<Record> {
        let mut records = self.overlapping(range);
        records.retain(|record| record.identity != mapping.identity);
        records
    }

    fn replace(&self, range: VirtRange, new: Option<Record>) {
        let changing = self.change.lock();
        let mut next = Vec::with_capacity(self.records.read().len() + 2);
        for old in self.records.read().iter() {
            let (before, after) = without(old.range, range);
            next.extend([before, after].into_iter().flatten().map(|range| Record { range, ..*old }));
        }
        if let Some(new) = new {
            let at = next.partition_point(|record| record.range.start() < range.start());
            next.insert(at, new);
        }
        self.count.store(next.len(), Ordering::Release);
        let mut records = self.records.write();
        std::mem::swap(&mut *records, &mut next);
        drop(records);
        drop(changing);
    }
}

/// What is left of `whole` before and after `hole`.
pub(super) fn without(whole: VirtRange, hole: VirtRange) -> (Option<VirtRange>, Option<VirtRange>) {
    let Some(hole) = whole.intersection(hole) else { return (Some(whole), None) };
    let before = VirtRange::new(whole.start(), hole.start().0 - whole.start().0);
    let after = VirtRange::new(hole.end(), whole.end().0.wrapping_sub(hole.end().0));
    let some = |part: Option<VirtRange>| part.filter(|part| !part.is_empty());
    (some(before), some(after))
}
