//! A device with a page list of its own, that believes what it was told until it is told otherwise.

use crate::fault::{FaultFailure, FaultWork, Progress, Publication};
use crate::notifier::{Interval, Notify, Raise};
use crate::page::Backing;
use crate::page::PageRun;
use crate::space::sim::SimSpace;
use crate::space::{Access, AddressSpace, FaultError};
use hw_model::addr::{PAGE_SIZE, PhysAddr, VirtAddr, VirtRange, page_bytes};
use hw_model::sync::{Arc, Mutex};
use std::collections::BTreeMap;
use std::convert::Infallible;

/// What the device has of a page.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    pub phys: PhysAddr,
    pub writable: bool,
    pub backing: Backing,
}

#[derive(Default)]
pub struct List {
    pub entries: Mutex<BTreeMap<u64, Entry>>,
}

impl Notify for List {
    fn clear(&self, range: VirtRange, raise: Raise<'_>) {
        let mut entries = self.entries.lock();
        raise.raise();
        let first = range.start().page_number();
        entries.retain(|page, _| !(first..first + range.page_count()).contains(page));
    }
    fn unlink(&self, range: VirtRange) {
        let first = range.start().page_number();
        let entries = self.entries.lock();
        let visible = entries.range(first..first + range.page_count()).next();
        assert!(visible.is_none(), "an entry was published between clear and unlink");
    }
}

/// Pages of an interval. A device has one after another over all that tests map, so that a change here leaves a fault
/// there alone.
const INTERVAL_PAGES: u64 = 1 << 16;
const INTERVALS: u64 = 260;

pub struct Device {
    pub list: Arc<List>,
    intervals: Vec<Interval>,
}

impl Device {
    pub fn new(space: &SimSpace) -> Self {
        let list = Arc::new(List::default());
        let intervals = (0..INTERVALS).map(|n| {
            let first = VirtAddr::from_page_number(n * INTERVAL_PAGES);
            let range = VirtRange::new(first, page_bytes(INTERVAL_PAGES)).expect("fits");
            space.notifiers().register(range, list.clone())
        });
        let intervals = intervals.collect();
        Self { list, intervals }
    }

    fn interval(&self, page: u64) -> &Interval {
        &self.intervals[(page / INTERVAL_PAGES) as usize]
    }

    /// The entry of `page`, faulted in if it is not there or does not allow `access`.
    pub fn entry(&self, space: &SimSpace, page: u64, access: Access) -> Result<Entry, FaultError> {
        if let Some(entry) = self.list.entries.lock().get(&page)
            && (access == Access::Read || entry.writable)
        {
            return Ok(*entry);
        }
        let range = VirtRange::new(VirtAddr::from_page_number(page), page_bytes(1)).expect("fits");
        let mut work = FaultWork::new(self.interval(page).sequence(), range, access);
        loop {
            let step = work.poll(space, |runs, check| -> Result<_, Infallible> {
                let mut entries = self.list.entries.lock();
                if check.retry() {
                    return Ok(Publication::Retry);
                }
                Ok(Publication::Published(publish(&mut entries, runs)))
            });
            match step {
                Ok(Progress::Done(entry)) => return Ok(entry),
                Ok(Progress::Again) => {}
                // Somebody else has to step first.
                Ok(Progress::Blocked) | Err(FaultFailure::Unsettled { .. }) => {
                    return Err(FaultError::Busy { at: range.start() });
                }
                Err(FaultFailure::Space(error)) => return Err(error),
                Err(FaultFailure::Publish(never)) => match never {},
            }
        }
    }

    /// Takes in what is present of `range` without faulting; nothing while the range is changing.
    pub fn prefetch(&self, space: &SimSpace, range: VirtRange) {
        let interval = self.interval(range.start().page_number());
        let range = range.intersection(interval.range()).expect("it starts there");
        let Some(seq) = interval.begin() else { return };
        let mut runs = Vec::new();
        // A hole in the range ends the snapshot; what came before it counts.
        let _ = space.snapshot(range, &mut runs);
        let mut entries = self.list.entries.lock();
        if !interval.retry(&seq) && !runs.is_empty() {
            publish(&mut entries, &runs);
        }
    }
}

/// Stores `runs`, and gives the last entry.
fn publish(entries: &mut BTreeMap<u64, Entry>, runs: &[PageRun]) -> Entry {
    let mut last = None;
    for run in runs {
        for n in 0..run.pages {
            let entry =
                Entry { phys: run.phys.offset(n * PAGE_SIZE), writable: run.writable, backing: run.backing };
            let page = run.start.page_number() + n;
            if let Some(old) = entries.insert(page, entry) {
                // Invariant 11: while no invalidation came, the page is where it was.
                assert_eq!(old.phys, entry.phys, "page {page:#x} moved without a word");
            }
            last = Some(entry);
        }
    }
    last.expect("a fault reports at least one page")
}
