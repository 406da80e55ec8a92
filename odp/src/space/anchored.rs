//! Memory as it is mapped now, and not what may be mapped at its addresses later.
//!
//! A region follows its range: put another mapping there, and its key leads to that. This is right for memory whose pages
//! change kind under one key, and wrong for memory that is given back to an allocator while a peer still knows the key. An
//! anchored range ends, page by page, with the mapping that it had: when a page is unmapped, or moved, or another mapping
//! takes its place, every later fault of it fails, so that the peer is told of an access that is refused.
//!
//! It is as good as the rung that tells of the change. On the exact and owned rungs, and in the simulation, no byte of the
//! new mapping is reached. On the events rung unmaps are told after the fact, before the call returns, so memory that is
//! mapped by a later call is not reached either; a mapping that replaces another in one call (MAP_FIXED) may be reached until
//! the event is read. The poll rung does not notice.

use super::{Access, AddressSpace, FaultError, PagePin, PinError, PinKind, Rung, Watch, WatchError};
use crate::notifier::{Event, Interval, Notifiers, Notify, Raise};
use crate::page::PageRun;
use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange, page_bytes};
use hw_model::bus::HostMemory;
use hw_model::sync::Arc;
use hw_model::sync::atomic::{AtomicU64, Ordering};

#[cfg(all(test, shuttle))]
mod schedules;
#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;

/// Which pages of a range have lost the mapping that they had.
struct Lost {
    range: VirtRange,
    /// One bit a page.
    pages: Box<[AtomicU64]>,
}

impl Lost {
    fn index(&self, at: VirtAddr) -> u64 {
        (at.0 - self.range.start().0) / PAGE_SIZE
    }

    fn mark(&self, range: VirtRange) {
        let Some(part) = self.range.intersection(range.page_aligned()) else { return };
        let first = self.index(part.start());
        for page in first..first + part.page_count() {
            self.pages[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::Release);
        }
    }

    /// The first page of `range`, which is of ours, that is lost.
    fn first_in(&self, range: VirtRange) -> Option<VirtAddr> {
        let first = self.index(range.start());
        let is_lost =
            |page: &u64| self.pages[(page / 64) as usize].load(Ordering::Acquire) & (1 << (page % 64)) != 0;
        let lost = (first..first + range.page_count()).find(is_lost)?;
        Some(self.range.start().offset(page_bytes(lost)))
    }
}

impl Notify for Lost {
    /// Before the pages go. Who has taken a sequence number of the same range by now finds it raised, and who takes one
    /// later finds this.
    fn clear(&self, range: VirtRange, raise: Raise<'_>) {
        if raise.event() == Event::Unmap {
            self.mark(range);
        }
        raise.raise();
    }
    fn try_clear(&self, range: VirtRange, raise: Raise<'_>) -> bool {
        self.clear(range, raise);
        true
    }
    fn unlink(&self, _range: VirtRange) {}
    fn try_unlink(&self, _range: VirtRange) -> bool {
        true
    }
}

/// An address space of which one range is left, for as long as it stays mapped as it is.
pub(super) struct Anchored {
    inner: Arc<dyn AddressSpace>,
    lost: Arc<Lost>,
    // In the order in which they are to go.
    _told: Interval,
    _watch: Watch,
}

impl Anchored {
    /// `range` (whole pages) of `inner`.
    pub(super) fn new(inner: Arc<dyn AddressSpace>, range: VirtRange) -> Result<Self, WatchError> {
        let watch = inner.watch(range)?;
        let words = range.page_count().div_ceil(64);
        let lost = Arc::new(Lost { range, pages: (0..words).map(|_| AtomicU64::new(0)).collect() });
        let told = inner.notifiers().register(range, Arc::clone(&lost) as Arc<dyn Notify>);
        Ok(Self { inner, lost, _told: told, _watch: watch })
    }

    /// What `ask` says of `range`, up to the first page that is lost or not ours.
    fn kept(
        &self,
        range: VirtRange,
        ask: impl FnOnce(VirtRange) -> Result<(), FaultError>,
    ) -> Result<(), FaultError> {
        let Some(ours) = self.lost.range.intersection(range).filter(|ours| ours.start() == range.start())
        else {
            return Err(FaultError::NoMapping { at: range.start() });
        };
        let end = self.lost.first_in(ours).unwrap_or(ours.end());
        let before = VirtRange::new(range.start(), end.0 - range.start().0).expect("part of the range");
        if !before.is_empty() {
            ask(before)?;
        }
        if end < range.end() { Err(FaultError::NoMapping { at: end }) } else { Ok(()) }
    }
}

impl AddressSpace for Anchored {
    fn memory(&self) -> Arc<dyn HostMemory> {
        self.inner.memory()
    }
    fn notifiers(&self) -> &Arc<Notifiers> {
        self.inner.notifiers()
    }
    fn watch(&self, range: VirtRange) -> Result<Watch, WatchError> {
        if !self.lost.range.contains(range) {
            return Err(WatchError::BadRange { range });
        }
        match self.lost.first_in(range) {
            Some(at) => Err(WatchError::NotMapped { range, at }),
            None => self.inner.watch(range),
        }
    }
    fn page_shift(&self, range: VirtRange) -> u32 {
        self.inner.page_shift(range)
    }
    fn snapshot(&self, range: VirtRange, out: &mut Vec<PageRun>) -> Result<(), FaultError> {
        self.kept(range, |kept| self.inner.snapshot(kept, out))
    }
    fn fault(&self, range: VirtRange, access: Access, out: &mut Vec<PageRun>) -> Result<(), FaultError> {
        self.kept(range, |kept| self.inner.fault(kept, access, out))
    }
    fn mapped_alike(&self, range: VirtRange, within: VirtRange) -> VirtRange {
        self.inner.mapped_alike(range, within)
    }
    fn pin_pages(&self, range: VirtRange, kind: PinKind) -> Result<PagePin, PinError> {
        self.inner.pin_pages(range, kind)
    }
    fn rung(&self, range: VirtRange) -> Rung {
        self.inner.rung(range)
    }
}
