//! The memory of this process as devices reach it.
//!
//! Two kinds of physical addresses meet here. Synthetic ones ([`super::frames`]) are reached through the virtual address
//! that they name, after a look at the generation. Those of memory that we own lie in *windows*, reached through a second
//! mapping of our own: there a stale translation really moves the wrong bytes.
//!
//! All of it runs inside an engine's burst. Nothing here allocates, frees, or waits for a lock that is held while
//! allocating: an engine that made the kernel unmap watched memory would wait for the monitor, which waits for the engine.

use super::bell::Bell;
use super::copy::{Copier, Short};
use super::frames::{self, Generations};
use super::polled::Polled;
use super::view::View;
use hw_model::addr::{PAGE_SIZE, PhysAddr, VirtAddr, VirtRange};
use hw_model::bus::{AtomicOp, CopyEnd, CopyError, DmaEpoch, HostMemory, MemoryError, Outside};
use hw_model::sync::atomic::{AtomicU64, Ordering};
use hw_model::sync::{Arc, Mutex, RwLock, RwLockReadGuard};

/// Physical addresses of owned memory start here. Never given out twice: a stale translation to memory that was given
/// back meets nothing.
const WINDOWS: u64 = 1 << 62;
/// Windows start at multiples of this, with at least as much unused space before the next.
const WINDOW_ALIGN: u64 = 1 << 30;

struct Window {
    base: PhysAddr,
    view: Arc<View>,
}

pub(super) struct ProcessMemory {
    epoch: Arc<DmaEpoch>,
    pub(super) generations: Generations,
    copier: Copier,
    polled: Arc<Polled>,
    bell: Arc<Bell>,
    /// Taken before `windows` by whoever changes them, and never inside a burst.
    change: Mutex<()>,
    /// In ascending order. Swapped as a whole, see [`Polled`].
    windows: RwLock<Vec<Window>>,
    next_window: AtomicU64,
    retired_uses: AtomicU64,
    vanished: AtomicU64,
}

impl ProcessMemory {
    pub(super) fn new(epoch: Arc<DmaEpoch>, copier: Copier, polled: Arc<Polled>, bell: Arc<Bell>) -> Self {
        Self {
            epoch,
            generations: Generations::new(),
            copier,
            polled,
            bell,
            change: Mutex::new(()),
            windows: RwLock::new(Vec::new()),
            next_window: AtomicU64::new(WINDOWS),
            retired_uses: AtomicU64::new(0),
            vanished: AtomicU64::new(0),
        }
    }

    /// DMA refused because it came through a retired frame.
    pub(super) fn retired_uses(&self) -> u64 {
        self.retired_uses.load(Ordering::Relaxed)
    }

    /// Copies that found the memory gone.
    pub(super) fn vanished(&self) -> u64 {
        self.vanished.load(Ordering::Relaxed)
    }

    pub(super) fn copier(&self) -> Copier {
        self.copier
    }

    /// Gives a view physical addresses of its own; where they start.
    pub(super) fn add_window(&self, view: Arc<View>) -> PhysAddr {
        let span = view.range().len().next_multiple_of(WINDOW_ALIGN) + WINDOW_ALIGN;
        let base = PhysAddr(self.next_window.fetch_add(span, Ordering::Relaxed));
        self.swap_windows(|windows| {
            let at = windows.partition_point(|window| window.base < base);
            windows.insert(at, Window { base, view });
        });
        base
    }

    /// Takes the addresses back. Copies under way end first.
    pub(super) fn remove_window(&self, base: PhysAddr) {
        self.swap_windows(|windows| windows.retain(|window| window.base != base));
    }

    /// Builds the next list aside and swaps it in; the old one is freed after the lock.
    fn swap_windows(&self, change: impl FnOnce(&mut Vec<Window>)) {
        let changing = self.change.lock();
        let mut next: Vec<_> = {
            let windows = self.windows.read();
            windows.iter().map(|old| Window { base: old.base, view: Arc::clone(&old.view) }).collect()
        };
        change(&mut next);
        std::mem::swap(&mut *self.windows.write(), &mut next);
        drop(changing);
    }

    /// The address at which this process reaches `len` bytes at `at`. While it is used, `windows` stays locked if it is
    /// now: a window that is removed waits for the copies under way in it.
    fn locate<'a>(
        &'a self,
        at: PhysAddr,
        len: u64,
        windows: &mut Option<RwLockReadGuard<'a, Vec<Window>>>,
    ) -> Result<VirtAddr, MemoryError> {
        if let Some((virt, generation)) = frames::decode(at) {
            self.check(at, virt, generation, len)?;
            return Ok(virt);
        }
        let windows = windows.get_or_insert_with(|| self.windows.read());
        let index = windows.partition_point(|window| window.base <= at);
        let window = index.checked_sub(1).and_then(|index| windows.get(index));
        let window = window.ok_or(MemoryError::Unbacked { at })?;
        let inside = at.0 - window.base.0;
        if inside.checked_add(len).is_none_or(|end| end > window.view.range().len()) {
            return Err(MemoryError::Unbacked { at });
        }
        Ok(window.view.range().start().offset(inside))
    }

    /// Has `touch` reach `len` bytes at `at`, by the address it is handed. Its error is how many bytes it got to.
    fn reach<T>(
        &self,
        at: PhysAddr,
        len: usize,
        touch: impl FnOnce(VirtAddr) -> Result<T, Short>,
    ) -> Result<T, MemoryError> {
        let mut windows = None;
        let virt = self.locate(at, len as u64, &mut windows)?;
        touch(virt).map_err(|short| self.gone(at.offset(short.copied)))
    }

    /// Lends `use_it` the address at which this process reaches `len` bytes at `at`. Memory that we own stays mapped
    /// meanwhile.
    pub(super) fn with_address<T>(
        &self,
        at: PhysAddr,
        len: u64,
        use_it: impl FnOnce(VirtAddr) -> T,
    ) -> Result<T, MemoryError> {
        let len = usize::try_from(len).map_err(|_| MemoryError::Unbacked { at })?;
        self.reach(at, len, |virt| Ok(use_it(virt)))
    }

    /// Whether every page of the synthetic range is in the generation it was reported in.
    fn check(&self, at: PhysAddr, virt: VirtAddr, generation: u16, len: u64) -> Result<(), MemoryError> {
        let Some(range) =
            VirtRange::new(virt, len.max(1)).filter(|range| frames::user_space().contains(*range))
        else {
            return Err(MemoryError::Unbacked { at });
        };
        let mut page = virt.page_start();
        for _ in 0..range.page_count() {
            let here = PhysAddr(at.page_start().0 + (page.0 - virt.page_start().0));
            match self.generations.current(page) {
                None => return Err(MemoryError::Unbacked { at: here }),
                Some(current) if current != generation => {
                    self.retired_uses.fetch_add(1, Ordering::Relaxed);
                    return Err(MemoryError::Retired { at: here });
                }
                Some(_) if !self.polled.still_holds(page) => return Err(self.gone(here)),
                Some(_) => {}
            }
            page = page.offset(PAGE_SIZE);
        }
        Ok(())
    }

    /// Has the monitor invalidate the page, so that the next use faults and learns why.
    fn gone(&self, at: PhysAddr) -> MemoryError {
        self.vanished.fetch_add(1, Ordering::Relaxed);
        if let Some((virt, _)) = frames::decode(at) {
            self.bell.suspect(virt);
        }
        MemoryError::Vanished { at }
    }
}

impl HostMemory for ProcessMemory {
    fn read(&self, at: PhysAddr, out: &mut [u8]) -> Result<(), MemoryError> {
        self.reach(at, out.len(), |virt| self.copier.read(virt, out))
    }

    fn write(&self, at: PhysAddr, data: &[u8]) -> Result<(), MemoryError> {
        self.reach(at, data.len(), |virt| self.copier.write(virt, data))
    }

    fn read_to(&self, at: PhysAddr, to: Outside<'_>) -> Result<(), MemoryError> {
        let target = VirtAddr(to.address() as u64);
        self.reach(at, to.len(), |virt| self.copier.copy(virt, target, to.len()).map_err(|(_, short)| short))
    }

    fn write_from(&self, at: PhysAddr, from: Outside<'_>) -> Result<(), MemoryError> {
        let source = VirtAddr(from.address() as u64);
        self.reach(at, from.len(), |virt| {
            self.copier.copy(source, virt, from.len()).map_err(|(_, short)| short)
        })
    }

    fn copy(&self, from: PhysAddr, to: PhysAddr, len: usize) -> Result<(), CopyError<MemoryError>> {
        let mut windows = None;
        let mut locate = |end, start: PhysAddr| {
            let error =
                |error: MemoryError| CopyError { end, done: error.at().0.wrapping_sub(start.0), error };
            self.locate(start, len as u64, &mut windows).map_err(error)
        };
        let source = locate(CopyEnd::Source, from)?;
        let target = locate(CopyEnd::Target, to)?;
        self.copier.copy(source, target, len).map_err(|(end, short)| {
            let start = if end == CopyEnd::Source { from } else { to };
            CopyError { end, done: short.copied, error: self.gone(start.offset(short.copied)) }
        })
    }

    fn atomic(&self, at: PhysAddr, op: AtomicOp) -> Result<u64, MemoryError> {
        if !at.is_aligned(8) {
            return Err(MemoryError::Misaligned { at });
        }
        self.reach(at, 8, |virt| self.copier.atomic(virt, op).ok_or(Short { copied: 0 }))
    }

    fn epoch(&self) -> &Arc<DmaEpoch> {
        &self.epoch
    }
}
