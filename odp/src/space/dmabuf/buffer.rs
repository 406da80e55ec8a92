//! The buffer: what is known of it while exporter and importers do with it what they like.

use super::attachment::{DmabufSpace, ImportMode, ImportOptions};
use super::exporter::Exporter;
use super::fence::Fence;
use super::points;
use crate::notifier::Notifiers;
use crate::space::Withdrawn;
use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange, page_bytes};
use hw_model::bus::HostMemory;
use hw_model::fault_plan::Points;
use hw_model::sync::atomic::{AtomicU64, Ordering};
use hw_model::sync::{Arc, Mutex};
use std::fmt;
use std::ops::Range;

/// A buffer that an exporter gives and importers attach to (`struct dma_buf`).
pub struct Dmabuf {
    exporter: Arc<dyn Exporter>,
    memory: Arc<dyn HostMemory>,
    /// Of all importers: a move tells all of them and drains once.
    notifiers: Arc<Notifiers>,
    pub(super) points: Points,
    /// One of this crate's exporters made it, of memory that nobody has references to.
    pub(super) is_own: bool,
    pub(super) book: Mutex<Book>,
    pub(super) counters: Counters,
}

/// Who does what with the buffer. Nothing is called under its lock.
#[derive(Debug, Default)]
pub(super) struct Book {
    /// `None` while it lives.
    pub(super) withdrawn: Option<Withdrawn>,
    pub(super) pins: Vec<Pin>,
    /// Pages of moves under way.
    pub(super) moving: Vec<Range<u64>>,
    /// Pages whose bytes are on their way to where they are said to be.
    pub(super) arriving: Vec<(Range<u64>, Fence)>,
}

/// Pages that stay where they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pin {
    pub(super) pages: Range<u64>,
    pub(super) revocable: bool,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) attachments: AtomicU64,
    pub(super) watches: AtomicU64,
    pub(super) maps: AtomicU64,
    pub(super) waits: AtomicU64,
    pub(super) moves: AtomicU64,
    pub(super) moves_refused: AtomicU64,
    pub(super) pages_moved: AtomicU64,
    pub(super) faults_refused: AtomicU64,
}

/// What has happened to a buffer since it was exported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DmabufStats {
    /// Attachments alive.
    pub attachments: u64,
    /// Ranges watched, by registered regions for instance.
    pub watches: u64,
    /// Of those, the ones that are pinned.
    pub pins: u64,
    /// Pieces of the buffer on their way to another place.
    pub moving: u64,
    /// Map notices given to the exporter.
    pub maps: u64,
    /// Faults that met pages whose bytes were still on their way.
    pub waits: u64,
    /// Moves finished.
    pub moves: u64,
    /// Moves refused because pages were pinned.
    pub moves_refused: u64,
    /// Pages of finished moves.
    pub pages_moved: u64,
    /// Faults and walks refused because the buffer had been withdrawn.
    pub faults_refused: u64,
    /// Withdrawn, and by what.
    pub withdrawn: Option<Withdrawn>,
}

/// Why a buffer cannot be attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// The exporter has taken it back, or is gone.
    #[error(transparent)]
    Withdrawn(#[from] Withdrawn),
    /// The exporter may revoke, and an importer that pins has to let go then.
    #[error("the exporter revokes: an importer that pins must be revocable")]
    MustBeRevocable,
    /// The host has no memory for the attachment.
    #[error("no memory for an attachment")]
    OutOfMemory,
}

pub(super) fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl Dmabuf {
    /// The buffer of `exporter`. Regions of it are made of a [`UserRange`](crate::space::UserRange) that somebody vouches for,
    /// since this exporter may give any physical address ([`UserRange::from_raw`](crate::space::UserRange::from_raw)).
    ///
    /// # Panics
    /// If its size is not some whole pages: a mistake of the exporter.
    #[must_use]
    pub fn new(exporter: Arc<dyn Exporter>, points: Points) -> Arc<Self> {
        Self::of(exporter, points, false)
    }

    /// The buffer of an exporter of ours.
    pub(in crate::space) fn own(exporter: Arc<dyn Exporter>, points: Points) -> Arc<Self> {
        Self::of(exporter, points, true)
    }

    fn of(exporter: Arc<dyn Exporter>, points: Points, is_own: bool) -> Arc<Self> {
        let size = exporter.size();
        assert!(size > 0 && size.is_multiple_of(PAGE_SIZE), "a buffer of {size:#x} bytes");
        let memory = exporter.memory();
        let notifiers = Notifiers::new(Arc::clone(memory.epoch()));
        let (book, counters) = (Mutex::default(), Counters::default());
        Arc::new(Self { exporter, memory, notifiers, points, is_own, book, counters })
    }

    /// An importer attaches.
    ///
    /// # Errors
    /// See [`AttachError`].
    pub fn attach(self: &Arc<Self>, options: ImportOptions) -> Result<Arc<DmabufSpace>, AttachError> {
        if self.points.meet(points::ATTACH).fails() {
            return Err(AttachError::OutOfMemory);
        }
        if options.mode == ImportMode::Pinned && self.exporter.revokes() {
            return Err(AttachError::MustBeRevocable);
        }
        self.is_there()?;
        Ok(DmabufSpace::new(self, options))
    }

    /// Its exporter.
    #[must_use]
    pub fn exporter(&self) -> &Arc<dyn Exporter> {
        &self.exporter
    }
    /// Pages of 4 KiB it has.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.range().page_count()
    }
    /// All of it, as an attachment's addresses: from 0 on.
    ///
    /// # Panics
    /// Never: any length fits from 0 on.
    #[must_use]
    pub fn range(&self) -> VirtRange {
        VirtRange::new(VirtAddr(0), self.exporter.size()).expect("from 0 on anything fits")
    }
    pub(super) fn memory(&self) -> &Arc<dyn HostMemory> {
        &self.memory
    }
    /// Who is told before pages go, whichever attachment they came through.
    #[must_use]
    pub fn notifiers(&self) -> &Arc<Notifiers> {
        &self.notifiers
    }
    /// Signals when the importers' DMA that is under way now has ended.
    #[must_use]
    pub fn in_flight(&self) -> Fence {
        Fence::of_dma(self.memory.epoch())
    }

    /// Whether it has not been withdrawn.
    ///
    /// # Errors
    /// By what it has.
    pub fn is_there(&self) -> Result<(), Withdrawn> {
        self.book.lock().withdrawn.map_or(Ok(()), Err)
    }

    /// What has happened so far.
    #[must_use]
    pub fn stats(&self) -> DmabufStats {
        let book = self.book.lock();
        let counters = &self.counters;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DmabufStats {
            attachments: load(&counters.attachments),
            watches: load(&counters.watches),
            pins: book.pins.len() as u64,
            moving: book.moving.len() as u64,
            maps: load(&counters.maps),
            waits: load(&counters.waits),
            moves: load(&counters.moves),
            moves_refused: load(&counters.moves_refused),
            pages_moved: load(&counters.pages_moved),
            faults_refused: load(&counters.faults_refused),
            withdrawn: book.withdrawn,
        }
    }

    /// The first of `pages` whose bytes are still on their way, with what will say that they are there.
    pub(super) fn arriving(&self, pages: &Range<u64>) -> Option<(u64, Fence)> {
        let mut book = self.book.lock();
        book.arriving.retain(|(_, fence)| !fence.is_signalled());
        let arriving = book.arriving.iter().filter(|(other, _)| overlap(other, pages));
        arriving
            .min_by_key(|(other, _)| other.start)
            .map(|(other, fence)| (other.start.max(pages.start), fence.clone()))
    }
}

impl Book {
    /// Whether one of the running moves takes any of `pages`.
    pub(super) fn is_moving(&self, pages: &Range<u64>) -> bool {
        self.moving.iter().any(|other| overlap(other, pages))
    }
}

/// The pages of `range`, which consists of whole pages.
pub(super) fn pages_of(range: VirtRange) -> Range<u64> {
    let first = range.start().page_number();
    first..first + range.page_count()
}

/// The addresses of `pages`, which lie in a buffer.
pub(super) fn range_of(pages: &Range<u64>) -> VirtRange {
    VirtRange::new(VirtAddr::from_page_number(pages.start), page_bytes(pages.end - pages.start))
        .expect("pages of a buffer")
}

impl fmt::Debug for Dmabuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dmabuf").field("range", &self.range()).field("stats", &self.stats()).finish()
    }
}
