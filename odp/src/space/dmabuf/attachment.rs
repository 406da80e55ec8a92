//! An importer's attachment: the buffer as an address space.

use super::buffer::{Dmabuf, Pin, pages_of};
use super::exporter::MapRefusal;
use super::fence::until;
use super::points;
use crate::notifier::Notifiers;
use crate::page::PageRun;
use crate::space::points as space_points;
use crate::space::{Access, AddressSpace, FaultError, Rung, UserRange, Watch, WatchError};
use hw_model::addr::{PAGE_SHIFT, VirtAddr, VirtRange, page_bytes};
use hw_model::bus::HostMemory;
use hw_model::sync::Arc;
use hw_model::sync::atomic::Ordering;
use std::fmt;
use std::ops::Range;
use std::time::Duration;

/// What an importer puts up with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImportMode {
    /// It is told of moves and faults pages in again.
    Dynamic,
    /// What it watches stays where it is (`dma_buf_pin`).
    Pinned,
    /// The same, until the exporter revokes; then it loses the buffer for good.
    PinnedRevocable,
}

/// How an importer attaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImportOptions {
    /// What it puts up with.
    pub mode: ImportMode,
    /// How long a fault or a pin waits for pages on their way, before it says busy. Zero for a world that is stepped by one
    /// thread.
    pub patience: Duration,
}

impl ImportOptions {
    /// How long pages on their way are waited for, unless told otherwise.
    pub const PATIENCE: Duration = Duration::from_millis(500);

    /// An importer of this kind, in a world with threads.
    #[must_use]
    pub fn new(mode: ImportMode) -> Self {
        Self { mode, patience: Self::PATIENCE }
    }
    /// The same with another patience.
    #[must_use]
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }
}

/// A buffer as one importer sees it. Addresses are offsets into the buffer, from 0 on.
pub struct DmabufSpace {
    buffer: Arc<Dmabuf>,
    options: ImportOptions,
}

impl DmabufSpace {
    pub(super) fn new(buffer: &Arc<Dmabuf>, options: ImportOptions) -> Arc<Self> {
        buffer.counters.attachments.fetch_add(1, Ordering::Relaxed);
        Arc::new(Self { buffer: Arc::clone(buffer), options })
    }

    /// The buffer.
    #[must_use]
    pub fn buffer(&self) -> &Arc<Dmabuf> {
        &self.buffer
    }
    /// What the importer puts up with.
    #[must_use]
    pub fn mode(&self) -> ImportMode {
        self.options.mode
    }

    /// All of it, to make regions of. `None` if the exporter is not one of this crate: then somebody has to vouch for its
    /// memory, with [`UserRange::from_raw`].
    #[must_use]
    pub fn user_range(self: &Arc<Self>) -> Option<UserRange> {
        let space = Arc::clone(self) as Arc<dyn AddressSpace>;
        let owner = Arc::clone(self) as Arc<dyn std::any::Any + Send + Sync>;
        self.buffer.is_own.then(|| UserRange::owned(space, self.buffer.range(), owner))
    }

    /// The pages of `range`.
    fn check(&self, range: VirtRange) -> Result<Range<u64>, FaultError> {
        let whole = self.buffer.range();
        if !whole.contains(range) {
            return Err(FaultError::NoMapping { at: range.start().max(whole.end()) });
        }
        self.buffer.is_there().map_err(|why| {
            self.buffer.counters.faults_refused.fetch_add(1, Ordering::Relaxed);
            FaultError::Withdrawn { at: range.start(), why }
        })?;
        Ok(pages_of(range))
    }

    fn meet(&self, point: hw_model::fault_plan::Point, at: VirtAddr) -> Result<(), FaultError> {
        match self.buffer.points.meet(point).fails() {
            true => Err(FaultError::OutOfMemory { at }),
            false => Ok(()),
        }
    }

    /// Appends where `pages` are.
    fn report(&self, pages: Range<u64>, out: &mut Vec<PageRun>) {
        let exporter = self.buffer.exporter();
        let mut page = pages.start;
        while page < pages.end {
            let piece = exporter.piece(page);
            let count = piece.pages.clamp(1, pages.end - page);
            let start = VirtAddr::from_page_number(page);
            let run = PageRun {
                start,
                pages: count,
                phys: piece.phys,
                backing: piece.backing,
                writable: exporter.is_writable(),
                order_shift: order_shift(start.0, piece.phys.0, count),
                provider: piece.provider,
            };
            PageRun::push(out, run);
            page += count;
        }
    }

    /// Gives the exporter its notice, and waits for bytes that are on their way.
    fn prepare(&self, pages: &Range<u64>, access: Access) -> Result<(), FaultError> {
        let buffer = &self.buffer;
        self.meet(points::MAP, VirtAddr::from_page_number(pages.start))?;
        buffer.counters.maps.fetch_add(1, Ordering::Relaxed);
        buffer.exporter().map(pages.clone(), access).map_err(|refusal| {
            let at = |page| VirtAddr::from_page_number(page);
            match refusal {
                MapRefusal::OutOfMemory { page } => FaultError::OutOfMemory { at: at(page) },
                MapRefusal::Busy { page } => FaultError::Busy { at: at(page) },
                MapRefusal::Poisoned { page } => FaultError::NoMapping { at: at(page) },
            }
        })?;
        let Some((page, fence)) = buffer.arriving(pages) else { return Ok(()) };
        buffer.counters.waits.fetch_add(1, Ordering::Relaxed);
        let there = fence.wait(self.options.patience) && buffer.arriving(pages).is_none();
        if there { Ok(()) } else { Err(FaultError::Busy { at: VirtAddr::from_page_number(page) }) }
    }

    /// Pins what is watched, if this importer pins.
    fn pin(&self, range: VirtRange) -> Result<Option<Pin>, WatchError> {
        let revocable = match self.options.mode {
            ImportMode::Dynamic => return Ok(None),
            ImportMode::Pinned => false,
            ImportMode::PinnedRevocable => true,
        };
        if self.buffer.points.meet(points::PIN).fails() {
            return Err(WatchError::Refused { range, reason: "fault injection".to_owned() });
        }
        let pin = Pin { pages: pages_of(range), revocable };
        let mut outcome = Err(WatchError::Moving { range });
        // A move under way would take the pages away after they were pinned.
        until(self.options.patience, || {
            outcome = self.try_pin(range, &pin);
            !matches!(outcome, Err(WatchError::Moving { .. }))
        });
        outcome?;
        self.buffer.exporter().pinned(pin.pages.clone());
        Ok(Some(pin))
    }

    fn try_pin(&self, range: VirtRange, pin: &Pin) -> Result<(), WatchError> {
        let mut book = self.buffer.book.lock();
        if let Some(why) = book.withdrawn {
            return Err(WatchError::Withdrawn { range, why });
        }
        if book.is_moving(&pin.pages) {
            return Err(WatchError::Moving { range });
        }
        book.pins.push(pin.clone());
        Ok(())
    }
}

impl Dmabuf {
    fn unpin(&self, pin: &Pin) {
        let mut book = self.book.lock();
        let index = book.pins.iter().position(|other| other == pin);
        book.pins.swap_remove(index.expect("pinned until now"));
        drop(book);
        self.exporter().unpinned(pin.pages.clone());
    }
}

/// log2 of the largest page that `pages` pages at `offset` and `phys` begin with: 30, 21 or 12.
fn order_shift(offset: u64, phys: u64, pages: u64) -> u8 {
    let fits = |shift: &u32| (offset | phys) & ((1 << shift) - 1) == 0 && page_bytes(pages) >> shift > 0;
    [30, 21].into_iter().find(fits).unwrap_or(PAGE_SHIFT) as u8
}

impl AddressSpace for DmabufSpace {
    fn memory(&self) -> Arc<dyn HostMemory> {
        Arc::clone(self.buffer.memory())
    }

    fn notifiers(&self) -> &Arc<Notifiers> {
        self.buffer.notifiers()
    }

    /// Pins too, for as long as the watch lives, if this importer pins.
    fn watch(&self, range: VirtRange) -> Result<Watch, WatchError> {
        if range.is_empty() || range.page_aligned() != range {
            return Err(WatchError::BadRange { range });
        }
        let whole = self.buffer.range();
        if !whole.contains(range) {
            return Err(WatchError::NotMapped { range, at: range.start().max(whole.end()) });
        }
        if self.buffer.points.meet(space_points::WATCH).fails() {
            return Err(WatchError::Refused { range, reason: "fault injection".to_owned() });
        }
        self.buffer.is_there().map_err(|why| WatchError::Withdrawn { range, why })?;
        let pin = self.pin(range)?;
        self.buffer.counters.watches.fetch_add(1, Ordering::Relaxed);
        let buffer = Arc::clone(&self.buffer);
        Ok(Watch::new(range, move || {
            buffer.counters.watches.fetch_sub(1, Ordering::Relaxed);
            if let Some(pin) = pin {
                buffer.unpin(&pin);
            }
        }))
    }

    /// Pages whose bytes are on their way are left out.
    fn snapshot(&self, range: VirtRange, out: &mut Vec<PageRun>) -> Result<(), FaultError> {
        let mut left = self.check(range)?;
        self.meet(space_points::SNAPSHOT, range.start())?;
        while let Some((page, _)) = self.buffer.arriving(&left) {
            self.report(left.start..page, out);
            left.start = page + 1;
        }
        self.report(left, out);
        Ok(())
    }

    fn fault(&self, range: VirtRange, access: Access, out: &mut Vec<PageRun>) -> Result<(), FaultError> {
        let pages = self.check(range)?;
        self.meet(space_points::FAULT, range.start())?;
        if access == Access::Write && !self.buffer.exporter().is_writable() {
            return Err(FaultError::Permission { at: range.start(), access });
        }
        self.prepare(&pages, access)?;
        self.report(pages, out);
        Ok(())
    }

    fn rung(&self, _range: VirtRange) -> Rung {
        Rung::Exact
    }
}

impl Drop for DmabufSpace {
    fn drop(&mut self) {
        self.buffer.counters.attachments.fetch_sub(1, Ordering::Relaxed);
    }
}

impl fmt::Debug for DmabufSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmabufSpace").field("buffer", &self.buffer).field("options", &self.options).finish()
    }
}
