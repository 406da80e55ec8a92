//! A buffer whose pages live in system memory or in a device's BAR, and move between the two one by one, as the program
//! maps it.
//!
//! The exporter is [`Migrating`]; this is its mapping by the CPU (drivers/dma-buf/dma-buf.c, `dma_buf_mmap`). A page moves
//! when those who imported the buffer and those who registered the mapping's addresses have let go of it; then the mapping
//! is switched to the new place. Pages that are at their destination already are left alone, and nobody is told of them.

use super::bar::BarMemory;
use super::cpu_access::{CpuAccess, Turns};
use super::owned::{OwnedError, OwnedMemory};
use super::segments::{Frames, Segment};
use super::space::ProcessSpace;
use super::view::{LentRange, View};
use crate::notifier::Event;
use crate::space::dmabuf::{
    AccessError, BarPart, Dmabuf, ExportError, Exporter, Migrating, MigratingOptions, MoveError, OutsideBar,
    PagePlace, Pages,
};
use crate::space::{AddressSpace, UserRange};
use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange, page_bytes};
use hw_model::bus::Bar;
use hw_model::sync::{Arc, Mutex, thread};
use rustix::io::Errno;
use std::ops::Range;

/// The part of a BAR that a buffer's pages move to: page `n` of the buffer to page `n` of the part.
#[derive(Clone, Debug)]
pub struct PeerPart {
    memory: Arc<BarMemory>,
    part: BarPart,
}

/// Why a buffer could not be made or moved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DmabufError {
    /// The buffer has other pages than its place in the program's address space.
    #[error("{range} is not a range of {pages} whole pages")]
    BadRange {
        /// The range given.
        range: VirtRange,
        /// Pages of the buffer.
        pages: u64,
    },
    /// The BAR has no such part.
    #[error(transparent)]
    OutsideBar(#[from] OutsideBar),
    /// The memory is not what stands behind the BAR.
    #[error("the BAR's memory is another")]
    OtherMemory,
    /// The range is another buffer's, or other owned memory.
    #[error("{range} overlaps {other}, which is taken")]
    Taken {
        /// The range asked for.
        range: VirtRange,
        /// Whose it is.
        other: VirtRange,
    },
    /// Bytes beyond the end.
    #[error("{len} bytes at {offset} are not in a buffer of {pages} pages")]
    OutOfRange {
        /// Where they begin.
        offset: u64,
        /// How many.
        len: u64,
        /// Pages there are.
        pages: u64,
    },
    /// The pages cannot be moved now; importers have pinned them, for instance.
    #[error(transparent)]
    Move(#[from] MoveError),
    /// The host refused memory, or one more mapping (vm.max_map_count). A page that could not move stays where it was.
    #[error("page {page} could not be placed: {reason}")]
    Refused {
        /// First page that could not be placed.
        page: u64,
        /// What the kernel said.
        reason: Errno,
    },
    /// The buffer could not be exported.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// The memory that a page was, or was to be in, did not answer. The page stays where it was.
    #[error("page {page} could not be copied: {reason}")]
    Copy {
        /// The page.
        page: u64,
        /// Why.
        reason: AccessError,
    },
}

impl PeerPart {
    /// `bytes` bytes of `bar`, behind which `memory` stands, from `offset` on.
    ///
    /// # Errors
    /// [`DmabufError::OutsideBar`], [`DmabufError::OtherMemory`].
    pub fn new(
        memory: &Arc<BarMemory>,
        bar: &Arc<Bar>,
        offset: u64,
        bytes: u64,
    ) -> Result<Self, DmabufError> {
        let part = BarPart::new(bar, offset, bytes)?;
        if !std::ptr::addr_eq(Arc::as_ptr(bar.storage()), Arc::as_ptr(memory)) {
            return Err(DmabufError::OtherMemory);
        }
        Ok(Self { memory: Arc::clone(memory), part })
    }

    fn pages(&self) -> u64 {
        self.part.pages()
    }
}

/// A buffer in the program's address space.
///
/// # CPU access
/// While a page moves, what the CPU writes there may be lost: hold a [`CpuAccess`] around accesses by pointer, as a
/// program does with DMA_BUF_IOCTL_SYNC. Moves wait for it. [`DmabufMapping::read_at`] and
/// [`DmabufMapping::write_at`] do so by themselves.
pub struct DmabufMapping {
    space: Arc<ProcessSpace>,
    exporter: Arc<Migrating>,
    system: Arc<OwnedMemory>,
    peer: PeerPart,
    /// The program's mapping; `None` only while dropping.
    front: Option<View>,
    range: VirtRange,
    /// Taken before whatever notifier callbacks take.
    turns: Turns,
    /// One page for moves, so that none is allocated while an invalidation runs.
    chunk: Mutex<Box<[u8]>>,
}

/// What walks need of it.
struct Layout {
    range: VirtRange,
    pages: Arc<Pages>,
}

impl Segment for Layout {
    fn range(&self) -> VirtRange {
        self.range
    }

    fn frames(&self, at: VirtAddr) -> Frames {
        let piece = self.pages.piece(at.page_number() - self.range.start().page_number());
        Frames { phys: piece.phys, pages: piece.pages, backing: piece.backing, provider: piece.provider }
    }
}

impl DmabufMapping {
    /// A zeroed buffer as large as `peer`, all in system memory, where the kernel finds room.
    ///
    /// # Errors
    /// See [`DmabufError`].
    pub fn new(space: &Arc<ProcessSpace>, peer: PeerPart) -> Result<Self, DmabufError> {
        let refused = |reason| DmabufError::Refused { page: 0, reason };
        let front = View::reserve(page_bytes(peer.pages()), PAGE_SIZE).map_err(refused)?;
        Self::over(space, front.range(), peer, || front)
    }

    /// The same in the place of what is mapped at `range`, part of a larger buffer of the program, say. Whoever watches
    /// what was there is told.
    ///
    /// # Errors
    /// See [`DmabufError`].
    pub fn at(space: &Arc<ProcessSpace>, lent: LentRange, peer: PeerPart) -> Result<Self, DmabufError> {
        let (range, pages) = (lent.range(), peer.pages());
        let whole = range.start().is_aligned(PAGE_SIZE) && range.len() == page_bytes(pages);
        if !whole || !super::frames::user_space().contains(range) {
            return Err(DmabufError::BadRange { range, pages });
        }
        Self::over(space, range, peer, || View::lent(lent))
    }

    /// `front` takes `range` over; called once it is known to be nobody's.
    fn over(
        space: &Arc<ProcessSpace>,
        range: VirtRange,
        peer: PeerPart,
        front: impl FnOnce() -> View,
    ) -> Result<Self, DmabufError> {
        let refused = |reason| DmabufError::Refused { page: 0, reason };
        let system = OwnedMemory::new(space, range.len()).map_err(|error| match error {
            OwnedError::OutOfMemory { reason, .. } => refused(reason),
            _ => refused(Errno::NOMEM),
        })?;
        let system = Arc::new(system);
        let exporter =
            Migrating::export(system.system_pages(), peer.part.clone(), MigratingOptions::default())?;
        let layout = Arc::new(Layout { range, pages: Arc::clone(&exporter.pages) });
        if let Err(other) = space.segments.add(layout) {
            return Err(DmabufError::Taken { range, other });
        }
        // From here on dropping it undoes everything.
        let made = Self {
            space: Arc::clone(space),
            exporter,
            system,
            peer,
            front: Some(front()),
            range,
            turns: Turns::default(),
            chunk: Mutex::new(vec![0; PAGE_SIZE as usize].into_boxed_slice()),
        };
        let placed = space.notifiers().invalidate_event(range, Event::Unmap, || {
            space.memory.generations.retire(range);
            made.front().place(0, range.len(), (made.system.file(), 0), true)
        });
        placed.map_err(refused)?;
        Ok(made)
    }

    fn front(&self) -> &View {
        self.front.as_ref().expect("there until dropped")
    }

    /// The buffer, for importers that have no use for its place in the program's address space.
    #[must_use]
    pub fn buffer(&self) -> &Arc<Dmabuf> {
        self.exporter.buffer()
    }

    /// Where it lies in the program's address space.
    #[must_use]
    pub fn range(&self) -> VirtRange {
        self.range
    }

    /// The first byte, for programs. See [`DmabufMapping`] on access by the CPU.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.range().start().0 as usize)
    }

    /// All of it, to make regions of. The buffer stays while that lives.
    #[must_use]
    pub fn user_range(self: &Arc<Self>) -> UserRange {
        let space = Arc::clone(&self.space) as Arc<dyn AddressSpace>;
        let owner = Arc::clone(self) as Arc<dyn std::any::Any + Send + Sync>;
        UserRange::owned(space, self.range(), owner)
    }

    /// Pages of 4 KiB it has.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.exporter.pages.count()
    }

    /// Where a page is; `None` past the end.
    #[must_use]
    pub fn place(&self, page: u64) -> Option<PagePlace> {
        self.exporter.place(page)
    }

    /// Keeps pages from moving while the CPU accesses the buffer by pointer.
    pub fn cpu_access(&self) -> CpuAccess<'_> {
        self.turns.access()
    }

    /// Copies out of it, wherever its pages are.
    ///
    /// # Errors
    /// [`DmabufError::OutOfRange`]; [`DmabufError::Refused`] if the host had no memory for a page.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), DmabufError> {
        let at = self.address(offset, out.len() as u64)?;
        let _access = self.cpu_access();
        let copied = self.space.memory.copier().read(at, out);
        copied.map_err(|short| no_memory(offset + short.copied))
    }

    /// Copies into it, wherever its pages are.
    ///
    /// # Errors
    /// As [`DmabufMapping::read_at`].
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DmabufError> {
        let at = self.address(offset, data.len() as u64)?;
        let _access = self.cpu_access();
        let copied = self.space.memory.copier().write(at, data);
        copied.map_err(|short| no_memory(offset + short.copied))
    }

    /// Moves `pages` to the BAR; how many were not there yet. Waits for DMA under way: not to be called while holding a
    /// [`CpuAccess`] of this buffer or a lock that notifier callbacks take.
    ///
    /// # Errors
    /// See [`DmabufError`]; pages before the one that failed have moved.
    pub fn move_to_peer(&self, pages: Range<u64>) -> Result<u64, DmabufError> {
        self.move_to(pages, PagePlace::Peer)
    }

    /// Moves `pages` to system memory, as [`DmabufMapping::move_to_peer`].
    ///
    /// # Errors
    /// See [`DmabufError`]; pages before the one that failed have moved.
    pub fn move_to_system(&self, pages: Range<u64>) -> Result<u64, DmabufError> {
        self.move_to(pages, PagePlace::System)
    }

    fn move_to(&self, pages: Range<u64>, to: PagePlace) -> Result<u64, DmabufError> {
        if pages.start > pages.end || pages.end > self.pages() {
            return Err(MoveError::NoSuchPages { pages, size: self.pages() }.into());
        }
        let _moving = self.turns.moving();
        let mut moved = 0;
        let mut page = pages.start;
        while page < pages.end {
            let there = self.exporter.pages.place(page) == to;
            let alike = |other: &u64| (self.exporter.pages.place(*other) == to) == there;
            let run = page..page + (page..pages.end).take_while(alike).count() as u64;
            if !there {
                self.move_run(run.clone(), to)?;
                moved += run.end - run.start;
            }
            page = run.end;
        }
        Ok(moved)
    }

    /// Moves pages that are all at the other place, under one invalidation.
    fn move_run(&self, pages: Range<u64>, to: PagePlace) -> Result<(), DmabufError> {
        let (offset, bytes) = (page_bytes(pages.start), page_bytes(pages.end - pages.start));
        let range = VirtRange::new(self.range().start().offset(offset), bytes).expect("part of the buffer");
        let mut chunk = self.chunk.lock();
        // First those who imported the buffer let go, then those who have it by its addresses.
        let mut moving = self.buffer().begin_move(pages.clone())?;
        while !moving.poll() {
            thread::yield_now();
        }
        self.space.notifiers().invalidate(range, || {
            for page in pages.clone() {
                self.copy(page, to, &mut chunk)?;
            }
            let file = match to {
                PagePlace::System => (self.system.file(), offset),
                PagePlace::Peer => (self.peer.memory.file(), self.peer.part.offset_of(pages.start)),
            };
            let placed = self.front().place(offset, bytes, file, true);
            placed.map_err(|reason| DmabufError::Refused { page: pages.start, reason })?;
            self.exporter.pages.put(pages.clone(), to);
            Ok::<(), DmabufError>(())
        })?;
        moving.finish(None);
        if to == PagePlace::Peer {
            // The host's memory is free for others. Should it refuse, it stays taken, and nothing else is lost.
            let _ = self.system.discard(offset, bytes);
        }
        Ok(())
    }

    /// Copies a page to where it is about to be.
    fn copy(&self, page: u64, to: PagePlace, chunk: &mut [u8]) -> Result<(), DmabufError> {
        loop {
            match self.exporter.pages.copy(page, to, chunk) {
                // For the moment in which the monitor reads an event.
                Err(AccessError::Closed) => thread::yield_now(),
                copied => return copied.map_err(|reason| DmabufError::Copy { page, reason }),
            }
        }
    }

    fn address(&self, offset: u64, len: u64) -> Result<VirtAddr, DmabufError> {
        let size = self.range().len();
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(DmabufError::OutOfRange { offset, len, pages: self.pages() });
        }
        Ok(self.range().start().offset(offset))
    }
}

fn no_memory(offset: u64) -> DmabufError {
    DmabufError::Refused { page: offset / PAGE_SIZE, reason: Errno::NOMEM }
}

impl Drop for DmabufMapping {
    fn drop(&mut self) {
        let (range, front) = (self.range(), self.front.take());
        self.space.notifiers().invalidate_event(range, Event::Unmap, || drop(front));
        self.space.segments.remove(range);
    }
}

impl std::fmt::Debug for DmabufMapping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DmabufMapping")
            .field("range", &self.range())
            .field("exporter", &self.exporter)
            .finish_non_exhaustive()
    }
}
