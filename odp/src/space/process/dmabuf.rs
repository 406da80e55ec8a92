//! A buffer whose pages live in system memory or in a device's BAR, and move between the two one by one.
//!
//! The exporter's side of a dynamic DMABUF (drivers/dma-buf/dma-buf.c, `move_notify`): importers are told, DMA in flight
//! ends, translations go, the bytes move, and the CPU's mapping is switched to the new place. The next fault reports the
//! new frames. Pages that are at their destination already are left alone, and nobody is told of them.

use super::bar::BarMemory;
use super::cpu_access::{CpuAccess, Turns};
use super::segments::{Frames, Segment};
use super::space::ProcessSpace;
use super::view::{self, LentRange, View};
use crate::page::Backing;
use crate::space::{AddressSpace, UserRange};
use hw_model::addr::{PAGE_SIZE, PhysAddr, VirtAddr, VirtRange, page_bytes};
use hw_model::bus::{BarStorage, ProviderId};
use hw_model::sync::atomic::{AtomicBool, Ordering};
use hw_model::sync::{Arc, Mutex};
use rustix::fd::OwnedFd;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use std::ops::Range;

/// Bytes copied at a time while a page moves.
const CHUNK: usize = 64 << 10;

/// Where a page of the buffer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PagePlace {
    /// In the host's memory.
    System,
    /// In the BAR.
    Peer,
}

/// The part of a BAR that a buffer's pages move to: page `n` of the buffer to page `n` of the part.
#[derive(Clone, Debug)]
pub struct PeerPart {
    /// What is behind the BAR.
    pub memory: Arc<BarMemory>,
    /// Where the part begins in it, in bytes: whole pages.
    pub offset: u64,
    /// What the BAR's pages are known by on the bus.
    pub provider: ProviderId,
    /// The host's physical address of the first byte of the BAR (not of the part).
    pub base: PhysAddr,
}

/// Why a buffer could not be made or moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DmabufError {
    /// No buffer of no pages, and none that does not begin on a page.
    #[error("{range} is not a range of whole pages")]
    BadRange {
        /// The range asked for.
        range: VirtRange,
    },
    /// The part of the BAR is too short.
    #[error("{bytes} bytes at {offset} are not in a BAR of {size} bytes")]
    OutsideBar {
        /// Bytes needed.
        bytes: u64,
        /// Where the part begins.
        offset: u64,
        /// Bytes of the BAR.
        size: u64,
    },
    /// The range is another buffer's, or other owned memory.
    #[error("{range} overlaps {other}, which is taken")]
    Taken {
        /// The range asked for.
        range: VirtRange,
        /// Whose it is.
        other: VirtRange,
    },
    /// Pages beyond the end.
    #[error("pages {first} to {end} are not in a buffer of {pages} pages")]
    NoSuchPages {
        /// First page asked for.
        first: u64,
        /// One past the last.
        end: u64,
        /// Pages there are.
        pages: u64,
    },
    /// The host refused memory, or one more mapping (vm.max_map_count). A page that could not move stays where it was.
    #[error("page {page} could not be placed: {reason}")]
    Refused {
        /// First page that could not be placed.
        page: u64,
        /// What the kernel said.
        reason: Errno,
    },
}

/// A buffer in the program's address space.
///
/// # CPU access
/// While a page moves, what the CPU writes there may be lost: hold a [`CpuAccess`] around accesses by pointer, as a
/// program does with DMA_BUF_IOCTL_SYNC. Moves wait for it. [`DmabufMapping::read_at`] and
/// [`DmabufMapping::write_at`] do so by themselves.
pub struct DmabufMapping {
    space: Arc<ProcessSpace>,
    system: OwnedFd,
    /// The system pages' mapping for devices.
    back: Arc<View>,
    /// The program's mapping; `None` only while dropping.
    front: Option<View>,
    layout: Arc<Layout>,
    /// Taken before whatever notifier callbacks take.
    turns: Turns,
    /// One buffer for moves, so that none is allocated while an invalidation runs.
    chunk: Mutex<Box<[u8]>>,
}

/// What walks need of it.
struct Layout {
    range: VirtRange,
    system_base: PhysAddr,
    peer: PeerPart,
    /// Whether the page is in the BAR. Changed while an invalidation covers the page.
    in_bar: Box<[AtomicBool]>,
}

impl Layout {
    fn place(&self, page: u64) -> PagePlace {
        match self.in_bar[page as usize].load(Ordering::Acquire) {
            true => PagePlace::Peer,
            false => PagePlace::System,
        }
    }

    fn pages(&self) -> u64 {
        self.in_bar.len() as u64
    }
}

impl Segment for Layout {
    fn range(&self) -> VirtRange {
        self.range
    }

    fn frames(&self, at: VirtAddr) -> Frames {
        let page = at.page_number() - self.range.start().page_number();
        let place = self.place(page);
        let pages = (page..self.pages()).take_while(|page| self.place(*page) == place).count().max(1);
        let (base, backing, provider) = match place {
            PagePlace::System => (self.system_base, Backing::DmabufSystem, None),
            PagePlace::Peer => {
                let base = self.peer.base.offset(self.peer.offset);
                (base, Backing::DmabufPeer, Some(self.peer.provider))
            }
        };
        Frames { phys: base.offset(page_bytes(page)), pages: pages as u64, backing, provider }
    }
}

impl DmabufMapping {
    /// A zeroed buffer of `pages` pages, all in system memory, where the kernel finds room.
    ///
    /// # Errors
    /// See [`DmabufError`].
    pub fn new(space: &Arc<ProcessSpace>, pages: u64, peer: PeerPart) -> Result<Self, DmabufError> {
        let refused = |reason| DmabufError::Refused { page: 0, reason };
        let nothing = VirtRange::new(VirtAddr(0), 0).expect("nothing");
        if pages == 0 {
            return Err(DmabufError::BadRange { range: nothing });
        }
        let bytes = pages.checked_mul(PAGE_SIZE).ok_or(refused(Errno::NOMEM))?;
        let front = View::reserve(bytes, PAGE_SIZE).map_err(refused)?;
        Self::over(space, front.range(), peer, || front)
    }

    /// The same in the place of what is mapped at `range`, part of a larger buffer of the program, say. Whoever watches
    /// what was there is told.
    ///
    /// # Errors
    /// See [`DmabufError`].
    pub fn at(space: &Arc<ProcessSpace>, lent: LentRange, peer: PeerPart) -> Result<Self, DmabufError> {
        let range = lent.range();
        let whole = range.start().is_aligned(PAGE_SIZE) && range.len().is_multiple_of(PAGE_SIZE);
        if !whole || range.is_empty() || !super::frames::user_space().contains(range) {
            return Err(DmabufError::BadRange { range });
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
        let bytes = range.len();
        let size = peer.memory.size();
        let fits = peer.offset.checked_add(bytes).is_some_and(|end| end <= size);
        if !fits || !peer.offset.is_multiple_of(PAGE_SIZE) {
            return Err(DmabufError::OutsideBar { bytes, offset: peer.offset, size });
        }
        let refused = |reason| DmabufError::Refused { page: 0, reason };
        let system = view::memory_file("anypage-dmabuf", bytes, false).map_err(refused)?;
        let back = Arc::new(View::of_file(&system, bytes).map_err(refused)?);
        let system_base = space.memory.add_window(Arc::clone(&back));
        let in_bar = (0..range.page_count()).map(|_| AtomicBool::new(false)).collect();
        let layout = Arc::new(Layout { range, system_base, peer, in_bar });
        if let Err(other) = space.segments.add(Arc::clone(&layout) as Arc<dyn Segment>) {
            space.memory.remove_window(system_base);
            return Err(DmabufError::Taken { range, other });
        }
        // From here on dropping it undoes everything.
        let made = Self {
            space: Arc::clone(space),
            system,
            back,
            front: Some(front()),
            layout,
            turns: Turns::default(),
            chunk: Mutex::new(vec![0; CHUNK].into_boxed_slice()),
        };
        let placed = space.notifiers().invalidate(range, || {
            space.memory.generations.retire(range);
            made.front().place(0, bytes, (&made.system, 0), true)
        });
        placed.map_err(refused)?;
        Ok(made)
    }

    fn front(&self) -> &View {
        self.front.as_ref().expect("there until dropped")
    }

    /// Where it lies in the program's address space.
    #[must_use]
    pub fn range(&self) -> VirtRange {
        self.layout.range
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
        self.layout.pages()
    }

    /// Where a page is; `None` past the end.
    #[must_use]
    pub fn place(&self, page: u64) -> Option<PagePlace> {
        (page < self.pages()).then(|| self.layout.place(page))
    }

    /// Keeps pages from moving while the CPU accesses the buffer by pointer.
    pub fn cpu_access(&self) -> CpuAccess<'_> {
        self.turns.access()
    }

    /// Copies out of it, wherever its pages are.
    ///
    /// # Errors
    /// [`DmabufError::NoSuchPages`]; [`DmabufError::Refused`] if the host had no memory for a page.
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
            return Err(DmabufError::NoSuchPages { first: pages.start, end: pages.end, pages: self.pages() });
        }
        let _moving = self.turns.moving();
        let mut moved = 0;
        let mut page = pages.start;
        while page < pages.end {
            let there = self.layout.place(page) == to;
            let alike = |other: &u64| (self.layout.place(*other) == to) == there;
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
        self.space.notifiers().invalidate(range, || {
            self.copy(offset, bytes, to, &mut chunk)?;
            let peer = &self.layout.peer;
            let placed = match to {
                PagePlace::System => self.front().place(offset, bytes, (&self.system, offset), true),
                PagePlace::Peer => {
                    self.front().place(offset, bytes, (peer.memory.file(), peer.offset + offset), true)
                }
            };
            placed.map_err(|reason| DmabufError::Refused { page: pages.start, reason })?;
            for page in pages.clone() {
                self.layout.in_bar[page as usize].store(to == PagePlace::Peer, Ordering::Release);
            }
            Ok(())
        })?;
        if to == PagePlace::Peer {
            // The host's memory is free for others. Should it refuse, it stays taken, and nothing else is lost.
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let _ = rustix::fs::fallocate(&self.system, punch, offset, bytes);
        }
        Ok(())
    }

    /// Copies bytes to where they are about to be.
    fn copy(&self, offset: u64, bytes: u64, to: PagePlace, chunk: &mut [u8]) -> Result<(), DmabufError> {
        let peer = &self.layout.peer;
        let peer_at = peer.memory.place(peer.offset + offset, bytes).expect("checked when it was made");
        let system_at = self.back.part(offset, bytes);
        let (from, into) = match to {
            PagePlace::Peer => (system_at, peer_at),
            PagePlace::System => (peer_at, system_at),
        };
        let copier = self.space.memory.copier();
        let mut done = 0;
        while done < bytes {
            let len = (bytes - done).min(chunk.len() as u64);
            let part = &mut chunk[..len as usize];
            let copied =
                copier.read(from.offset(done), part).and_then(|()| copier.write(into.offset(done), part));
            copied.map_err(|short| no_memory(offset + done + short.copied))?;
            done += len;
        }
        Ok(())
    }

    fn address(&self, offset: u64, len: u64) -> Result<VirtAddr, DmabufError> {
        let size = self.range().len();
        if offset.checked_add(len).is_none_or(|end| end > size) {
            let (first, end) = (offset / PAGE_SIZE, offset.saturating_add(len).div_ceil(PAGE_SIZE));
            return Err(DmabufError::NoSuchPages { first, end, pages: self.pages() });
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
        self.space.notifiers().invalidate(range, || drop(front));
        self.space.segments.remove(range);
        self.space.memory.remove_window(self.layout.system_base);
    }
}

impl std::fmt::Debug for DmabufMapping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let in_bar = (0..self.pages()).filter(|page| self.layout.place(*page) == PagePlace::Peer).count();
        f.debug_struct("DmabufMapping")
            .field("range", &self.range())
            .field("pages", &self.pages())
            .field("in_bar", &in_bar)
            .finish_non_exhaustive()
    }
}
