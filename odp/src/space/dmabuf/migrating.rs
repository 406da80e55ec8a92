//! An exporter whose pages live in system memory or in its device's BAR, and migrate between the two one by one: a GPU.

use super::bar::BarPart;
use super::buffer::Dmabuf;
use super::exporter::{Exporter, Piece};
use super::fence::until;
use crate::page::Backing;
use hw_model::addr::{PAGE_SIZE, PhysAddr, page_bytes};
use hw_model::bus::{BarStorage, DmaEpoch, HostMemory, MemoryError, Slot, StorageError};
use hw_model::fault_plan::Points;
use hw_model::sync::atomic::{AtomicBool, Ordering};
use hw_model::sync::{Arc, Mutex, MutexGuard};
use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::time::Duration;

/// Where a page of a buffer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PagePlace {
    /// In the host's memory.
    System,
    /// In the BAR.
    Peer,
}

impl PagePlace {
    /// The other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::System => Self::Peer,
            Self::Peer => Self::System,
        }
    }
}

/// Pages of system memory that a driver has taken for itself.
#[derive(Clone)]
pub struct SystemPages {
    memory: Arc<dyn HostMemory>,
    pages: Box<[PhysAddr]>,
    /// Keeps them.
    _owner: Arc<dyn Any + Send + Sync>,
}

impl SystemPages {
    /// `pages` of `memory`, which `owner` keeps, and to which no references exist.
    pub(in crate::space) fn new(
        memory: Arc<dyn HostMemory>,
        pages: Box<[PhysAddr]>,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        Self { memory, pages, _owner: owner }
    }

    /// The same in the opposite order: no two neighbours are contiguous.
    #[must_use]
    pub fn reversed(mut self) -> Self {
        self.pages.reverse();
        self
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.pages.len() as u64
    }
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }
}

/// How a [`Migrating`] exporter is made.
#[derive(Clone, Debug)]
pub struct MigratingOptions {
    /// Where all pages are at first.
    pub place: PagePlace,
    /// Whether importers may write.
    pub writable: bool,
    /// Whether it may take the buffer back.
    pub revokes: bool,
    /// Fault points ([`super::points`]).
    pub points: Points,
}

impl Default for MigratingOptions {
    fn default() -> Self {
        Self { place: PagePlace::System, writable: true, revokes: false, points: Points::OFF }
    }
}

/// Why a buffer was not exported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExportError {
    /// Page `n` of the buffer has a page `n` in either place, and there is at least one.
    #[error(
        "{system} pages of system memory and {peer} of the BAR; as many of each are needed, and at least one"
    )]
    Uneven {
        /// Pages of system memory.
        system: u64,
        /// Pages of the BAR.
        peer: u64,
    },
    /// The memory knows of no room for another engine, and the exporter copies with one.
    #[error("no engine is left to copy with ({slots} are in use)")]
    NoEngine {
        /// Engines in use.
        slots: u32,
    },
    /// The memory refused to be cleared.
    #[error("the memory could not be cleared")]
    Access(#[from] AccessError),
}

/// Why bytes of the buffer could not be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// Not in the buffer.
    #[error("{len} bytes at {offset} are not in a buffer of {size} bytes")]
    OutOfRange {
        /// Where they begin.
        offset: u64,
        /// How many.
        len: u64,
        /// Bytes of the buffer.
        size: u64,
    },
    /// Its bytes are on their way: wait for the migration.
    #[error("page {page} is on its way")]
    Moving {
        /// The page.
        page: u64,
    },
    /// The memory is closed to engines for a moment: try again.
    #[error("the memory is closed for a moment")]
    Closed,
    /// System memory did not answer.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The BAR did not answer.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// The exporter. Page `n` of its buffer is in page `n` of its system memory or in page `n` of its part of the BAR.
pub struct Migrating {
    pub(in crate::space) pages: Arc<Pages>,
    buffer: Arc<Dmabuf>,
}

/// What the buffer knows of it.
pub(in crate::space) struct Pages {
    system: SystemPages,
    peer: BarPart,
    writable: bool,
    revokes: bool,
    /// Whether the page is in the BAR. Changed while no importer has the page or is given it.
    in_bar: Box<[AtomicBool]>,
    /// The exporter's own engine: it masters memory as any device does. Held while bytes are copied.
    engine: Mutex<Slot>,
}

/// How long a buffer that is being made waits for memory that is closed.
const PATIENCE: Duration = Duration::from_secs(1);

/// What a page is filled with that was left: who still goes there sees that it is the wrong place.
const LEFT: [u8; PAGE_SIZE as usize] = [0xdb; PAGE_SIZE as usize];

impl Migrating {
    /// A zeroed buffer of as many pages as `system` and `peer` have.
    ///
    /// # Errors
    /// See [`ExportError`].
    pub fn export(
        system: SystemPages,
        peer: BarPart,
        options: MigratingOptions,
    ) -> Result<Arc<Self>, ExportError> {
        let (count, in_peer) = (system.len(), peer.pages());
        if count != in_peer || count == 0 {
            return Err(ExportError::Uneven { system: count, peer: in_peer });
        }
        let epoch: &Arc<DmaEpoch> = system.memory.epoch();
        let slot = epoch.register().ok_or(ExportError::NoEngine { slots: epoch.slot_count() })?;
        let MigratingOptions { place, writable, revokes, points } = options;
        let in_bar = (0..count).map(|_| AtomicBool::new(place == PagePlace::Peer)).collect();
        let engine = Mutex::new(slot);
        let pages = Arc::new(Pages { system, peer, writable, revokes, in_bar, engine });
        for page in 0..count {
            let clear = || pages.burst(|| pages.write_page(page, place, &[0; PAGE_SIZE as usize]));
            let mut cleared = clear();
            // Other pages of the memory may be changing, for moments each.
            until(PATIENCE, || {
                if cleared == Err(AccessError::Closed) {
                    cleared = clear();
                }
                cleared != Err(AccessError::Closed)
            });
            cleared?;
        }
        let buffer = Dmabuf::own(Arc::clone(&pages) as Arc<dyn Exporter>, points);
        Ok(Arc::new(Self { pages, buffer }))
    }

    /// The buffer, for importers.
    #[must_use]
    pub fn buffer(&self) -> &Arc<Dmabuf> {
        &self.buffer
    }
    /// Where a page is; `None` past the end.
    #[must_use]
    pub fn place(&self, page: u64) -> Option<PagePlace> {
        (page < self.pages.count()).then(|| self.pages.place(page))
    }

    /// Reads as the exporter's driver does, wherever the pages are.
    ///
    /// # Errors
    /// See [`AccessError`].
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), AccessError> {
        self.each_part(offset, out.len() as u64, |page, inside, part| {
            self.pages.read(page, inside, &mut out[part])
        })
    }

    /// Writes as the exporter's driver does.
    ///
    /// # Errors
    /// See [`AccessError`].
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        self.each_part(offset, data.len() as u64, |page, inside, part| {
            self.pages.write(page, inside, &data[part])
        })
    }

    /// Calls `copy` with a page, where in it, and which of the bytes, for each page of `len` bytes at `offset`.
    fn each_part(
        &self,
        offset: u64,
        len: u64,
        mut copy: impl FnMut(u64, u64, Range<usize>) -> Result<(), AccessError>,
    ) -> Result<(), AccessError> {
        let size = self.pages.size();
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(AccessError::OutOfRange { offset, len, size });
        }
        let mut done = 0;
        while done < len {
            let (page, inside) = ((offset + done) / PAGE_SIZE, (offset + done) % PAGE_SIZE);
            let count = (len - done).min(PAGE_SIZE - inside);
            self.pages.burst(|| {
                // A migration copies with the same engine: while we have it, a page that has arrived stays so.
                if self.buffer.arriving(&(page..page + 1)).is_some() {
                    return Err(AccessError::Moving { page });
                }
                copy(page, inside, done as usize..(done + count) as usize)
            })?;
            done += count;
        }
        Ok(())
    }
}

impl Pages {
    pub(in crate::space) fn count(&self) -> u64 {
        self.in_bar.len() as u64
    }

    pub(in crate::space) fn place(&self, page: u64) -> PagePlace {
        match self.in_bar[page as usize].load(Ordering::Acquire) {
            true => PagePlace::Peer,
            false => PagePlace::System,
        }
    }

    /// Keeps everybody, the driver too, from reaching any page.
    pub(super) fn hold(&self) -> MutexGuard<'_, Slot> {
        self.engine.lock()
    }

    /// Says that `pages` are at `to`.
    pub(in crate::space) fn put(&self, pages: Range<u64>, to: PagePlace) {
        for page in pages {
            self.in_bar[page as usize].store(to == PagePlace::Peer, Ordering::Release);
        }
    }

    /// Runs `copy` as a burst of the exporter's engine.
    fn burst<T>(&self, copy: impl FnOnce() -> Result<T, AccessError>) -> Result<T, AccessError> {
        let mut engine = self.hold();
        let _busy = engine.enter().map_err(|_| AccessError::Closed)?;
        copy()
    }

    /// Copies `page`, through a `chunk` of its size, to `to` from the other place, where its bytes are too from then on.
    ///
    /// # Errors
    /// See [`AccessError`].
    pub(in crate::space) fn copy(
        &self,
        page: u64,
        to: PagePlace,
        chunk: &mut [u8],
    ) -> Result<(), AccessError> {
        self.burst(|| {
            match to {
                PagePlace::Peer => self.system.memory.read(self.system.pages[page as usize], chunk)?,
                PagePlace::System => self.storage().read(self.peer.offset_of(page), chunk)?,
            }
            self.write_page(page, to, chunk)
        })
    }

    /// Fills the place of `page` that it has left.
    ///
    /// # Errors
    /// See [`AccessError`].
    pub(in crate::space) fn leave(&self, page: u64, from: PagePlace) -> Result<(), AccessError> {
        self.burst(|| self.write_page(page, from, &LEFT))
    }

    fn storage(&self) -> &Arc<dyn BarStorage> {
        self.peer.bar().storage()
    }

    fn write_page(&self, page: u64, at: PagePlace, data: &[u8]) -> Result<(), AccessError> {
        match at {
            PagePlace::System => Ok(self.system.memory.write(self.system.pages[page as usize], data)?),
            PagePlace::Peer => Ok(self.storage().write(self.peer.offset_of(page), data)?),
        }
    }

    fn read(&self, page: u64, inside: u64, out: &mut [u8]) -> Result<(), AccessError> {
        match self.place(page) {
            PagePlace::System => {
                Ok(self.system.memory.read(self.system.pages[page as usize].offset(inside), out)?)
            }
            PagePlace::Peer => Ok(self.storage().read(self.peer.offset_of(page) + inside, out)?),
        }
    }

    fn write(&self, page: u64, inside: u64, data: &[u8]) -> Result<(), AccessError> {
        match self.place(page) {
            PagePlace::System => {
                Ok(self.system.memory.write(self.system.pages[page as usize].offset(inside), data)?)
            }
            PagePlace::Peer => Ok(self.storage().write(self.peer.offset_of(page) + inside, data)?),
        }
    }

    /// Pages from `page` on, at the same place as it, for which `follows` holds of the number of steps from `page`.
    fn alike(&self, page: u64, follows: impl Fn(u64) -> bool) -> u64 {
        let place = self.place(page);
        let same = |next: &u64| self.place(*next) == place && follows(next - page);
        1 + (page + 1..self.count()).take_while(same).count() as u64
    }
}

impl Exporter for Pages {
    fn size(&self) -> u64 {
        page_bytes(self.count())
    }
    fn memory(&self) -> Arc<dyn HostMemory> {
        Arc::clone(&self.system.memory)
    }
    fn piece(&self, page: u64) -> Piece {
        match self.place(page) {
            PagePlace::Peer => self.peer.piece(page, self.alike(page, |_| true)),
            PagePlace::System => {
                let first = self.system.pages[page as usize];
                let follows =
                    |step: u64| self.system.pages[(page + step) as usize] == first.offset(page_bytes(step));
                let pages = self.alike(page, follows);
                Piece { phys: first, pages, backing: Backing::DmabufSystem, provider: None }
            }
        }
    }
    fn is_writable(&self) -> bool {
        self.writable
    }
    fn revokes(&self) -> bool {
        self.revokes
    }
}

impl fmt::Debug for Migrating {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let in_bar =
            (0..self.pages.count()).filter(|page| self.pages.place(*page) == PagePlace::Peer).count();
        f.debug_struct("Migrating").field("in_bar", &in_bar).field("buffer", &self.buffer).finish()
    }
}

impl fmt::Debug for SystemPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SystemPages").field("pages", &self.pages.len()).finish_non_exhaustive()
    }
}
