//! A device with a page table of its own, as lib/test_hmm.c has one: it believes what it was told until it is told
//! otherwise, and moves bytes by physical address.
//!
//! Its callbacks neither allocate nor free, as the exact rung demands.

use crate::world::pattern;
use hw_model::addr::{PAGE_SIZE, PhysAddr, VirtAddr, VirtRange};
use hw_model::bus::{HostMemory, MemoryError, Slot};
use hw_model::sync::atomic::{AtomicU64, Ordering};
use hw_model::sync::{Arc, Mutex, thread};
use odp::fault::{FaultFailure, FaultWork, Publication};
use odp::notifier::{Interval, Notify, Raise};
use odp::page::{Backing, PageRun};
use odp::space::{Access, AddressSpace, FaultError, Watch};
use std::convert::Infallible;
use std::time::Duration;

/// What the device has of a page.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    pub phys: PhysAddr,
    pub writable: bool,
    pub backing: Backing,
    pub order_shift: u8,
}

/// Its page table for one range.
struct Table {
    range: VirtRange,
    entries: Mutex<Box<[Option<Entry>]>>,
    clears: AtomicU64,
}

impl Table {
    fn hide(&self, entries: &mut [Option<Entry>], range: VirtRange) {
        let Some(part) = self.range.intersection(range) else { return };
        let first = (part.start().0 - self.range.start().0) / PAGE_SIZE;
        entries[first as usize..(first + part.page_count()) as usize].fill(None);
    }
    fn is_hidden(&self, range: VirtRange) -> bool {
        let Some(part) = self.range.intersection(range) else { return true };
        let first = (part.start().0 - self.range.start().0) / PAGE_SIZE;
        let entries = self.entries.lock();
        entries[first as usize..(first + part.page_count()) as usize].iter().all(Option::is_none)
    }
}

impl Notify for Table {
    fn clear(&self, range: VirtRange, raise: Raise<'_>) {
        let mut entries = self.entries.lock();
        raise.raise();
        self.hide(&mut entries, range);
        self.clears.fetch_add(1, Ordering::Relaxed);
    }
    fn try_clear(&self, range: VirtRange, raise: Raise<'_>) -> bool {
        let Some(mut entries) = self.entries.try_lock() else { return false };
        raise.raise();
        self.hide(&mut entries, range);
        self.clears.fetch_add(1, Ordering::Relaxed);
        true
    }
    fn unlink(&self, range: VirtRange) {
        assert!(self.is_hidden(range), "an entry was published between clear and unlink");
    }
    fn try_unlink(&self, range: VirtRange) -> bool {
        self.unlink(range);
        true
    }
}

/// The device, open on some ranges. Fields in the order in which they are to go.
pub struct Device {
    intervals: Vec<(Interval, Arc<Table>)>,
    _watches: Vec<Watch>,
    slot: Mutex<Slot>,
    memory: Arc<dyn HostMemory>,
    space: Arc<dyn AddressSpace>,
}

impl Device {
    pub fn open(space: Arc<dyn AddressSpace>, ranges: &[VirtRange]) -> Self {
        let watches = ranges.iter().map(|range| space.watch(*range).expect("mapped")).collect();
        let intervals = ranges.iter().map(|range| {
            let entries = vec![None; range.page_count() as usize].into_boxed_slice();
            let table =
                Arc::new(Table { range: *range, entries: Mutex::new(entries), clears: AtomicU64::new(0) });
            (space.notifiers().register(*range, table.clone()), table)
        });
        let intervals = intervals.collect();
        let memory = space.memory();
        let slot = Mutex::new(memory.epoch().register().expect("an engine"));
        Self { intervals, _watches: watches, slot, memory, space }
    }

    fn of(&self, at: VirtAddr) -> &(Interval, Arc<Table>) {
        let inside =
            |(_, table): &&(Interval, Arc<Table>)| table.range.start() <= at && at < table.range.end();
        self.intervals.iter().find(inside).expect("the device is open there")
    }

    /// What it has of the page at `at`.
    pub fn entry(&self, at: VirtAddr) -> Option<Entry> {
        let (_, table) = self.of(at);
        table.entries.lock()[((at.0 - table.range.start().0) / PAGE_SIZE) as usize]
    }

    /// Entries that it has of `range`.
    pub fn present(&self, range: VirtRange) -> u64 {
        let pages = (0..range.page_count()).map(|page| range.start().offset(page * PAGE_SIZE));
        pages.filter(|page| self.entry(*page).is_some()).count() as u64
    }

    /// Times that it was told to let go.
    pub fn clears(&self) -> u64 {
        self.intervals.iter().map(|(_, table)| table.clears.load(Ordering::Relaxed)).sum()
    }

    /// Faults `range`, part of one of its ranges, in.
    pub fn fault(&self, range: VirtRange, access: Access) -> Result<(), FaultError> {
        const WAIT: Duration = Duration::from_secs(5);
        let (interval, table) = self.of(range.start());
        let mut work = FaultWork::new(interval.sequence(), range, access);
        let done = work.run(&*self.space, WAIT, |runs, check| -> Result<_, Infallible> {
            let mut entries = table.entries.lock();
            if check.retry() {
                return Ok(Publication::Retry);
            }
            publish(table.range, &mut entries, runs);
            Ok(Publication::Published(()))
        });
        done.map_err(|failure| match failure {
            FaultFailure::Space(error) => error,
            FaultFailure::Unsettled { range, .. } => FaultError::Busy { at: range.start() },
            FaultFailure::Publish(never) => match never {},
        })
    }

    /// What is there of `range`, without faulting.
    pub fn snapshot(&self, range: VirtRange) -> Vec<PageRun> {
        let mut runs = Vec::new();
        self.space.snapshot(range, &mut runs).expect("mapped");
        runs
    }

    /// Calls `copy` in a burst, with the entry of the page at `at`, faulted in if it has to be.
    fn burst(
        &self,
        at: VirtAddr,
        access: Access,
        mut copy: impl FnMut(&dyn HostMemory, PhysAddr) -> Result<(), MemoryError>,
    ) -> Result<(), FaultError> {
        const TRIES: u32 = 100_000;
        let page = VirtRange::new(at.page_start(), PAGE_SIZE).expect("a page");
        let mut slot = self.slot.lock();
        for _ in 0..TRIES {
            let Ok(burst) = slot.enter() else {
                thread::yield_now();
                continue;
            };
            let usable = |entry: &Entry| access == Access::Read || entry.writable;
            if let Some(entry) = self.entry(at).filter(usable) {
                match copy(&*self.memory, entry.phys.offset(at.page_offset())) {
                    Ok(()) => return Ok(()),
                    // Gone without a word, as may be below the exact rung: what is to be had now a fault will tell.
                    Err(MemoryError::Vanished { .. }) => {
                        let (_, table) = self.of(at);
                        table.hide(&mut table.entries.lock(), page);
                    }
                    Err(stale) => panic!("through an entry that it was never told to drop, at {at}: {stale}"),
                }
            }
            drop(burst);
            self.fault(page, access)?;
        }
        Err(FaultError::Busy { at })
    }

    pub fn read(&self, at: VirtAddr) -> Result<u64, FaultError> {
        let mut word = [0; 8];
        self.burst(at, Access::Read, |memory, phys| memory.read(phys, &mut word))?;
        Ok(u64::from_ne_bytes(word))
    }

    pub fn write(&self, at: VirtAddr, word: u64) -> Result<(), FaultError> {
        self.burst(at, Access::Write, |memory, phys| memory.write(phys, &word.to_ne_bytes()))
    }

    /// Writes a pattern.
    pub fn fill(&self, range: VirtRange, salt: u64) {
        pattern(range, salt).for_each(|(at, word)| self.write(at, word).expect("it may be written"));
    }

    /// Whether it sees the pattern.
    pub fn holds(&self, range: VirtRange, salt: u64) -> bool {
        pattern(range, salt).all(|(at, word)| self.read(at).expect("it may be read") == word)
    }

    /// Whether it sees zeroes.
    pub fn is_zero(&self, range: VirtRange) -> bool {
        pattern(range, 0).all(|(at, _)| self.read(at).expect("it may be read") == 0)
    }

    /// While the result lives, the device is in the middle of moving data.
    pub fn in_a_burst<R>(&self, meanwhile: impl FnOnce() -> R) -> R {
        let mut slot = self.slot.lock();
        let burst = slot.enter().expect("open");
        let result = meanwhile();
        drop(burst);
        result
    }
}

fn publish(of: VirtRange, entries: &mut [Option<Entry>], runs: &[PageRun]) {
    for run in runs {
        let first = (run.start.0 - of.start().0) / PAGE_SIZE;
        for n in 0..run.pages {
            let PageRun { writable, backing, order_shift, .. } = *run;
            let entry = Entry { phys: run.phys.offset(n * PAGE_SIZE), writable, backing, order_shift };
            let old = entries[(first + n) as usize].replace(entry);
            // While nobody took it away, the page is where it was.
            assert!(old.is_none_or(|old| old.phys == entry.phys), "a page moved without a word");
        }
    }
}
