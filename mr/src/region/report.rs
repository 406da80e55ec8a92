//! What a region looks like at the moment: for pictures, tables and tests.

use super::core::Core;
use super::counters::CounterValues;
use hw_model::hca::{Backing, Path};

/// Neighbouring entries that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapRun {
    /// Index of the first page in the list.
    pub first: u64,
    /// Pages of 4 KiB.
    pub pages: u64,
    /// What they are; `None` where nothing is present.
    pub entry: Option<MapEntry>,
}

/// What a present entry says of its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MapEntry {
    /// What the page is made of.
    pub backing: Backing,
    /// How DMA reaches it.
    pub path: Path,
    /// Whether the device may write it.
    pub writable: bool,
}

/// A region at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionReport {
    /// Pages of 4 KiB that it has room for.
    pub entries: u64,
    /// Pages of 4 KiB that are present.
    pub present: u64,
    /// Entries that stand for a huge page of 2 MiB, and so for 512 of these pages.
    pub huge: u64,
    /// Pages of 4 KiB that occupy their slot of the IOVA range.
    pub linked: u64,
    /// Bytes of the page list: 8 an entry, of either size. Of them, those are in memory in whose pages an entry was ever written.
    pub list_bytes: u64,
    /// Parts of an implicit region that have a page list of their own.
    pub children: u64,
    /// What has happened so far.
    pub counters: CounterValues,
}

impl Core {
    pub(crate) fn report(&self) -> RegionReport {
        let state = self.state.lock();
        RegionReport {
            entries: self.list.len(),
            present: state.present,
            huge: self.huge(state.clamp(0, self.list.len())),
            linked: state.linked,
            list_bytes: self.list.words() * 8,
            children: 0,
            counters: self.counters.values(),
        }
    }

    /// Huge entries that are present.
    fn huge(&self, span: std::ops::Range<u64>) -> u64 {
        if !self.list.has_huge() {
            return 0;
        }
        self.list.slots(span).filter(|(slot, entry)| slot.is_huge() && entry.is_valid()).count() as u64
    }

    /// The page list in runs of like entries. A moment's view: pages may come and go meanwhile.
    pub(crate) fn map(&self) -> Vec<MapRun> {
        let mut runs: Vec<MapRun> = Vec::new();
        for index in 0..self.list.len() {
            let entry = self.list.load(index).filter(|entry| entry.is_valid()).map(|entry| MapEntry {
                backing: entry.backing(),
                path: entry.path(),
                writable: entry.is_writable(),
            });
            match runs.last_mut() {
                Some(last) if last.entry == entry => last.pages += 1,
                _ => runs.push(MapRun { first: index, pages: 1, entry }),
            }
        }
        runs
    }

    /// The raw words of the list, to compare entries before and after.
    pub(crate) fn raw_entries(&self) -> Vec<u64> {
        (0..self.list.len()).map(|index| self.list.load(index).map_or(0, |entry| entry.bits())).collect()
    }
}
