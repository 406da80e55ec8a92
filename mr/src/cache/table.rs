//! All entries of a cache at one moment, for lookups that take no lock. A table never changes; it is replaced.

use super::entry::Entry;
use super::tracker::Tracker;
use hw_model::addr::{VirtAddr, VirtRange};
use hw_model::hca::Access;
use hw_model::sync::{Arc, Weak};

/// One entry, as lookups see it.
#[derive(Clone)]
pub(super) struct Row {
    /// First and last byte.
    pub(super) start: VirtAddr,
    pub(super) last: VirtAddr,
    pub(super) access: Access,
    pub(super) tracker: Arc<Tracker>,
    pub(super) entry: Weak<Entry>,
}

impl Row {
    /// Whether a request for these bytes with these rights can be answered by this entry, current or not.
    pub(super) fn covers(&self, start: VirtAddr, last: VirtAddr, access: Access) -> bool {
        self.start <= start && last <= self.last && self.access.contains(access)
    }
}

/// The rows in the order of their first bytes.
#[derive(Default)]
pub(super) struct Table {
    /// First byte of each row, apart so that a search touches few cache lines.
    starts: Vec<VirtAddr>,
    rows: Vec<Row>,
    /// The furthest last byte of this row and all before it: where a search towards the front may end.
    reach: Vec<VirtAddr>,
}

impl Table {
    /// Of rows in the order of their first bytes.
    pub(super) fn new(rows: Vec<Row>) -> Self {
        debug_assert!(rows.is_sorted_by_key(|row| row.start));
        let mut furthest = VirtAddr(0);
        let reach = rows.iter().map(|row| {
            furthest = furthest.max(row.last);
            furthest
        });
        let reach = reach.collect();
        Self { starts: rows.iter().map(|row| row.start).collect(), rows, reach }
    }

    /// An entry that answers the request, counted as used by the caller from here on. It may have ended between two looks:
    /// the caller looks again.
    #[inline]
    pub(super) fn find(&self, range: VirtRange, access: Access) -> Option<Arc<Entry>> {
        let (start, last) = (range.start(), range.last()?);
        let mut index = self.starts.partition_point(|first| *first <= start);
        while index > 0 {
            index -= 1;
            if self.reach[index] < last {
                return None;
            }
            let row = &self.rows[index];
            if !row.covers(start, last, access) || row.tracker.is_ended() {
                continue;
            }
            row.tracker.mark_used();
            if let Some(entry) = row.entry.upgrade() {
                return Some(entry);
            }
        }
        None
    }

    /// An entry that answers the request, counted by nobody.
    #[cfg(all(test, shuttle))]
    pub(super) fn weakly(&self, range: VirtRange, access: Access) -> Option<Weak<Entry>> {
        let last = range.last()?;
        let covers = |row: &&Row| row.covers(range.start(), last, access) && !row.tracker.is_ended();
        self.rows.iter().find(covers).map(|row| row.entry.clone())
    }
}
