//! One process: its memory as its own CPU sees it, and as an address space that devices are given pages of.

use super::change::{Change, SpaceChange};
use super::fault::Touch;
use super::host::SimHost;
use super::kernel::{Kernel, MmId, Pte};
use super::op::{Outcome, SimError, SimOp};
use super::span::{HUGE_PAGES, Span};
use super::vma::{MapRequest, Protection};
use crate::notifier::Notifiers;
use crate::page::PageRun;
use crate::space::{Access, AddressSpace, FaultError, PagePin, PinError, PinKind, Rung, Watch, WatchError};
use hw_model::addr::{PAGE_SHIFT, PAGE_SIZE, VirtAddr, VirtRange};
use hw_model::bus::{AtomicOp, HostMemory, ProviderId};
use hw_model::sync::Arc;

/// One process of a [`SimHost`]. It ends when it is dropped; devices that still have pages of it are waited for.
#[derive(Debug)]
pub struct SimSpace {
    host: Arc<SimHost>,
    mm: MmId,
    notifiers: Arc<Notifiers>,
}

impl SimSpace {
    pub(super) fn of(host: &Arc<SimHost>, mm: MmId) -> Arc<Self> {
        let notifiers = {
            let kernel = host.kernel.lock();
            Arc::clone(&kernel.mm(mm).expect("a new process lives").notifiers)
        };
        Arc::new(Self { host: Arc::clone(host), mm, notifiers })
    }

    /// Its machine.
    #[must_use]
    pub fn host(&self) -> &Arc<SimHost> {
        &self.host
    }

    /// Which process it is.
    #[must_use]
    pub fn id(&self) -> MmId {
        self.mm
    }

    /// Begins a change of its memory. Invalidations have begun when this returns.
    ///
    /// # Errors
    /// See [`SimError`].
    pub fn begin(&self, change: SpaceChange) -> Result<SimOp, SimError> {
        SimOp::begin(&self.host, Change::Space(self.mm, change))
    }

    /// Makes a change of its memory, waiting for devices.
    ///
    /// # Errors
    /// See [`SimError`].
    pub fn change(&self, change: SpaceChange) -> Result<Outcome, SimError> {
        self.begin(change)?.run()
    }

    /// Makes a change of its memory now or not at all, as the out-of-memory reaper does.
    ///
    /// # Errors
    /// [`SimError::WouldWait`] if it would have to wait for a device. See [`SimError`] for the others; nothing was changed.
    pub fn try_change(&self, change: SpaceChange) -> Result<Outcome, SimError> {
        SimOp::at_once(&self.host, Change::Space(self.mm, change))
    }

    /// mmap: where the mapping is.
    ///
    /// # Errors
    /// See [`SimError`].
    pub fn map(&self, request: MapRequest) -> Result<VirtRange, SimError> {
        self.change(SpaceChange::Map(request))?.at.ok_or(SimError::Gone)
    }

    /// fork: the new process.
    ///
    /// # Errors
    /// See [`SimError`].
    pub fn fork(&self) -> Result<Arc<Self>, SimError> {
        self.change(SpaceChange::Fork)?.child.ok_or(SimError::Gone)
    }

    /// Reads as the program does, faulting pages in.
    ///
    /// # Errors
    /// What a signal would say. [`FaultError::Busy`] only on a stepped host; pages before the one named were read.
    pub fn cpu_read(&self, at: VirtAddr, out: &mut [u8]) -> Result<(), FaultError> {
        self.cpu(at, out.len(), Access::Read, |kernel, pte, offset, part| {
            kernel.store.read(pte.place, offset, &mut out[part]);
        })
    }

    /// Writes as the program does, faulting pages in.
    ///
    /// # Errors
    /// As [`SimSpace::cpu_read`].
    pub fn cpu_write(&self, at: VirtAddr, data: &[u8]) -> Result<(), FaultError> {
        self.cpu(at, data.len(), Access::Write, |kernel, pte, offset, part| {
            kernel.store.write(pte.place, offset, &data[part]);
        })
    }

    /// A locked instruction of the program on an aligned word; gives the value before it.
    ///
    /// # Errors
    /// As [`SimSpace::cpu_read`].
    ///
    /// # Panics
    /// If `at` is not a multiple of 8.
    pub fn cpu_atomic(&self, at: VirtAddr, op: AtomicOp) -> Result<u64, FaultError> {
        assert!(at.is_aligned(8), "atomic at {at}");
        let mut before = 0;
        self.cpu(at, 8, Access::Write, |kernel, pte, offset, _| {
            before = kernel.store.atomic(pte.place, offset, op);
        })?;
        Ok(before)
    }

    /// Calls `copy` for each page of the `len` bytes at `at`, with the offset in the page and the bytes of the caller's.
    fn cpu(
        &self,
        at: VirtAddr,
        len: usize,
        access: Access,
        mut copy: impl FnMut(&Kernel, Pte, u64, std::ops::Range<usize>),
    ) -> Result<(), FaultError> {
        let mut done = 0;
        while done < len {
            let here = at.checked_add(done as u64).ok_or(FaultError::NoMapping { at })?;
            let count = (len - done).min((PAGE_SIZE - here.page_offset()) as usize);
            self.host.with_page(self.mm, here.page_number(), Touch::plain(access), |kernel, pte| {
                copy(kernel, pte, here.page_offset(), done..done + count);
            })?;
            done += count;
        }
        Ok(())
    }
}

impl AddressSpace for SimSpace {
    fn memory(&self) -> Arc<dyn HostMemory> {
        Arc::clone(&self.host) as Arc<dyn HostMemory>
    }

    fn notifiers(&self) -> &Arc<Notifiers> {
        &self.notifiers
    }

    fn watch(&self, range: VirtRange) -> Result<Watch, WatchError> {
        let span = Span::of(range);
        if range.is_empty() || span.range() != range {
            return Err(WatchError::BadRange { range });
        }
        let kernel = self.host.kernel.lock();
        match kernel.mm(self.mm).and_then(|mm| mm.vmas.first_hole(span)) {
            Some(page) => Err(WatchError::NotMapped { range, at: VirtAddr::from_page_number(page) }),
            // Every change goes through the host, which tells everybody: there is nothing to set up or take down.
            None => Ok(Watch::new(range, || ())),
        }
    }

    fn watch_sparse(&self, range: VirtRange) -> Result<Watch, WatchError> {
        if range.is_empty() || Span::of(range).range() != range {
            return Err(WatchError::BadRange { range });
        }
        Ok(Watch::new(range, || ()))
    }

    fn page_shift(&self, range: VirtRange) -> u32 {
        let (span, kernel) = (Span::of(range), self.host.kernel.lock());
        let mut at = span.first;
        while at < span.end {
            match kernel.vma(self.mm, at) {
                Some(vma) if kernel.is_hugetlb(&vma) => at = vma.span.end,
                _ => return PAGE_SHIFT,
            }
        }
        PAGE_SHIFT + HUGE_PAGES.trailing_zeros()
    }

    fn snapshot(&self, range: VirtRange, out: &mut Vec<PageRun>) -> Result<(), FaultError> {
        self.snapshot_for(None, range, out)
    }

    fn fault(&self, range: VirtRange, access: Access, out: &mut Vec<PageRun>) -> Result<(), FaultError> {
        self.fault_for(None, range, access, out)
    }

    fn mapped_alike(&self, range: VirtRange, within: VirtRange) -> VirtRange {
        let Some(last) = range.last() else { return range };
        let kernel = self.host.kernel.lock();
        let end_at = |at: VirtAddr| {
            let vma = kernel.vma(self.mm, at.page_number());
            vma.and_then(|vma| vma.span.range().intersection(within)).unwrap_or(range)
        };
        let (low, high) = (end_at(range.start()).start(), end_at(last).end());
        VirtRange::new(low, high.0 - low.0).expect("part of what it is in")
    }
    /// Locked pages are pinned, too: they do not even move.
    fn pin_pages(&self, range: VirtRange, kind: PinKind) -> Result<PagePin, PinError> {
        Ok(match kind {
            PinKind::Populated => PagePin::populated(),
            PinKind::Mlock | PinKind::RealPin => PagePin::new(kind, self.pin(range)?),
        })
    }
    fn rung(&self, _range: VirtRange) -> Rung {
        Rung::Exact
    }
}

impl SimSpace {
    /// What is present of `range` for `viewer`, or for any device.
    pub(super) fn snapshot_for(
        &self,
        viewer: Option<ProviderId>,
        range: VirtRange,
        out: &mut Vec<PageRun>,
    ) -> Result<(), FaultError> {
        let span = Span::of(range);
        let kernel = self.host.kernel.lock();
        let gone = FaultError::NoMapping { at: range.start() };
        let mm = kernel.mm(self.mm).ok_or(gone)?;
        let hole = mm.vmas.first_hole(span);
        let mapped = span.first..hole.unwrap_or(span.end);
        for (page, _) in mm.table.range(mapped) {
            if let Some(run) = kernel.report(self.mm, *page, viewer) {
                PageRun::push(out, run);
            }
        }
        match hole {
            Some(page) => Err(FaultError::NoMapping { at: VirtAddr::from_page_number(page) }),
            None => Ok(()),
        }
    }

    /// Faults `range` in for `viewer`, or for any device.
    pub(super) fn fault_for(
        &self,
        viewer: Option<ProviderId>,
        range: VirtRange,
        access: Access,
        out: &mut Vec<PageRun>,
    ) -> Result<(), FaultError> {
        let touch = Touch { access, viewer, pin: false };
        for page in Span::of(range).pages() {
            let report = |kernel: &mut Kernel, _| kernel.report(self.mm, page, viewer);
            match self.host.with_page(self.mm, page, touch, report)? {
                Some(run) => PageRun::push(out, run),
                // Present for the CPU but not for a device: nothing that a fault leaves behind is.
                None => return Err(FaultError::Special { at: VirtAddr::from_page_number(page) }),
            }
        }
        Ok(())
    }

    /// munmap.
    ///
    /// # Errors
    /// See [`SimError`].
    pub fn unmap(&self, range: VirtRange) -> Result<Outcome, SimError> {
        self.change(SpaceChange::Unmap(range))
    }

    /// mprotect.
    ///
    /// # Errors
    /// See [`SimError`].
    pub fn protect(&self, range: VirtRange, to: Protection) -> Result<Outcome, SimError> {
        self.change(SpaceChange::Protect(range, to))
    }
}

impl Drop for SimSpace {
    fn drop(&mut self) {
        // Fails only if the process has ended already.
        if let Ok(op) = SimOp::begin(&self.host, Change::Exit(self.mm)) {
            let _ = op.run();
        }
    }
}
