//! A region of a real device. The kernel keeps it true.
//!
//! Unsafe island. Invariant: `mr` is a live region of `pd`, which it holds, until it is deregistered, once; the memory is
//! held as long, for ever if the device does not give the region back.
#![allow(unsafe_code)]

use super::capabilities::Capability;
use super::error::VerbsError;
use super::pd::VerbsPd;
use super::window::VerbsWindow;
use crate::device::{AdviseError, ObjectError, Region, RegisterOptions, SyncError};
use crate::region::{CounterValues, MapRun, Mode, RegionReport};
use hw_model::addr::{PAGE_SIZE, RegionAddr};
use hw_model::hca::{Access, DestroyKeyError, Key};
use hw_model::sync::atomic::Ordering;
use hw_model::sync::{Arc, Mutex, Weak};
use odp::fault::{FaultFailure, Want};
use odp::space::{Access as PageAccess, Rung, UserRange};
use rdma_sys::{ibv_dereg_mr, ibv_mr};
use std::ptr::NonNull;

/// What a region is over.
#[derive(Clone)]
pub(super) enum Memory {
    /// Memory of this process.
    Process(UserRange),
    /// So many bytes of a DMABUF, which the kernel holds.
    Dmabuf(u64),
}

impl Memory {
    fn len(&self) -> u64 {
        match self {
            Self::Process(memory) => memory.range().len(),
            Self::Dmabuf(len) => *len,
        }
    }
}

/// `IB_UVERBS_ADVISE_MR_FLAG_FLUSH`: done when the call returns.
const FLUSH: u32 = 1;

/// A region that libibverbs knows.
pub(super) struct Registered {
    mr: NonNull<ibv_mr>,
    pd: Arc<VerbsPd>,
    memory: Memory,
}

// SAFETY: objects of libibverbs may be used by any thread.
unsafe impl Send for Registered {}
// SAFETY: the same.
unsafe impl Sync for Registered {}

impl Registered {
    /// A region that was made just now.
    pub(super) fn new(pd: &Arc<VerbsPd>, mr: NonNull<ibv_mr>, memory: Memory) -> Self {
        pd.device().regions.fetch_add(1, Ordering::Relaxed);
        Self { mr, pd: Arc::clone(pd), memory }
    }

    pub(super) fn as_ptr(&self) -> *mut ibv_mr {
        self.mr.as_ptr()
    }

    /// The same region, in `pd` and over `memory` since it was changed.
    pub(super) fn moved(mut self, pd: &Arc<VerbsPd>, memory: Memory) -> Self {
        (self.pd, self.memory) = (Arc::clone(pd), memory);
        self
    }

    /// Its local and its remote key.
    fn keys(&self) -> (u32, u32) {
        // SAFETY: a live region.
        let local = unsafe { (*self.mr.as_ptr()).lkey };
        // SAFETY: the same.
        (local, unsafe { (*self.mr.as_ptr()).rkey })
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // SAFETY: made once, deregistered once.
        let code = unsafe { ibv_dereg_mr(self.mr.as_ptr()) };
        if code != 0 {
            // A window is bound to it, of which the device has not yet heard that it is bound elsewhere, or of the program's own
            // making; the kernel takes it down with the context. Until then the device reaches the memory, so it is kept.
            tracing::warn!(
                device = self.pd.device().name(),
                code,
                "ibv_dereg_mr failed; the region and its memory stay"
            );
            std::mem::forget(self.memory.clone());
            return;
        }
        self.pd.device().regions.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A region of a real device. Dropping it deregisters it.
pub struct VerbsRegion {
    registered: Mutex<Option<Registered>>,
    pd: Arc<VerbsPd>,
    key: Key,
    address: RegionAddr,
    access: Access,
    mode: Mode,
    memory: Memory,
    /// Windows that were bound to it, perhaps elsewhere since.
    windows: Mutex<Vec<Weak<VerbsWindow>>>,
}

impl VerbsRegion {
    pub(super) fn new(
        registered: Registered,
        options: RegisterOptions,
        address: RegionAddr,
    ) -> Result<Arc<Self>, VerbsError> {
        let (local, remote) = registered.keys();
        let (pd, memory) = (Arc::clone(&registered.pd), registered.memory.clone());
        // Without a remote right the remote key means nothing, and some drivers give none.
        let remote_rights = Access::REMOTE_READ | Access::REMOTE_WRITE | Access::REMOTE_ATOMIC;
        if local != remote && options.access.intersects(remote_rights) {
            return Err(VerbsError::TwoKeys { device: pd.device().name().to_owned(), local, remote });
        }
        Ok(Arc::new(Self {
            registered: Mutex::new(Some(registered)),
            pd,
            key: Key(local),
            address,
            access: options.access,
            mode: options.mode,
            memory,
            windows: Mutex::new(Vec::new()),
        }))
    }

    /// The domain that it is in.
    #[must_use]
    pub fn pd(&self) -> &Arc<VerbsPd> {
        &self.pd
    }

    /// How its pages are kept.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// What is done with the region while it is there for certain.
    pub(super) fn with_mr<R>(&self, action: impl FnOnce(*mut ibv_mr) -> R) -> Result<R, VerbsError> {
        let registered = self.registered.lock();
        let live = registered.as_ref().ok_or(VerbsError::Deregistered { key: self.key })?;
        Ok(action(live.mr.as_ptr()))
    }

    /// Has `action` change what the device has; what it gives back stays here.
    pub(super) fn hand_on<R>(
        &self,
        action: impl FnOnce(Registered) -> (Option<Registered>, R),
    ) -> Result<R, VerbsError> {
        let mut registered = self.registered.lock();
        let live = registered.take().ok_or(VerbsError::Deregistered { key: self.key })?;
        let (left, outcome) = action(live);
        *registered = left;
        Ok(outcome)
    }

    /// `window` is bound to it.
    pub(super) fn has_window(&self, window: &Arc<VerbsWindow>) {
        let mut windows = self.windows.lock();
        // Each once: it may have been bound to it before.
        windows.retain(|known| {
            known.upgrade().is_some_and(|known| !Arc::ptr_eq(&known, window) && known.is_bound_to(self))
        });
        windows.push(Arc::downgrade(window));
    }

    /// Windows that hold it.
    pub(super) fn windows(&self) -> Vec<Arc<VerbsWindow>> {
        let windows: Vec<_> = self.windows.lock().iter().filter_map(Weak::upgrade).collect();
        windows.into_iter().filter(|window| window.is_bound_to(self)).collect()
    }

    fn is_writable(&self) -> bool {
        self.access.intersects(Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_ATOMIC)
    }

    /// Whether `len` bytes from `offset` on are inside.
    fn contains(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.memory.len())
    }

    /// ibv_advise_mr(3) with `flags`, or populating where the driver has it not.
    fn advise_with(&self, offset: u64, len: u64, want: Want, flags: u32) -> Result<(), AdviseError> {
        if !self.contains(offset, len) {
            return Err(AdviseError::OutOfRange { offset, len, region: self.len() });
        }
        let registered = self.registered.lock();
        let Some(registered) = &*registered else { return Err(AdviseError::Deregistered) };
        if want == Want::Fault(PageAccess::Write) && !self.is_writable() {
            return Err(AdviseError::NotWritable);
        }
        // A DMABUF's pages are the exporter's.
        let Memory::Process(memory) = &self.memory else { return Ok(()) };
        let Some(part) = memory.part(offset, len).filter(|_| self.mode != Mode::Pinned && len > 0) else {
            return Ok(());
        };
        let device = self.pd.device();
        if device.capabilities().has(Capability::Advise) {
            // IB_UVERBS_ADVISE_MR_ADVICE_PREFETCH, _PREFETCH_WRITE, _PREFETCH_NO_FAULT.
            let advice = match want {
                Want::Fault(PageAccess::Read) => 0,
                Want::Fault(PageAccess::Write) => 1,
                Want::Snapshot => 2,
            };
            let advised =
                self.pd.advise(advice, flags, registered.keys().0, (self.address.offset(offset), len));
            return advised.map_err(|reason| AdviseError::Refused {
                device: device.name().to_owned(),
                errno: reason.raw_os_error(),
            });
        }
        match want {
            // Nothing to do for the pages that are there: the device's fault finds them.
            Want::Snapshot => Ok(()),
            Want::Fault(access) => memory
                .space()
                .fault(part.range().page_aligned(), access, &mut Vec::new())
                .map_err(|error| AdviseError::Pages(FaultFailure::Space(error))),
        }
    }
}

impl Region for VerbsRegion {
    fn key(&self) -> Key {
        self.key
    }
    fn address(&self) -> RegionAddr {
        self.address
    }
    fn access(&self) -> Access {
        self.access
    }
    fn len(&self) -> u64 {
        self.memory.len()
    }
    fn advise(&self, offset: u64, len: u64, want: Want) -> Result<(), AdviseError> {
        self.advise_with(offset, len, want, FLUSH)
    }
    /// At once: the device's own asynchronous advice says no more than this of what became of it.
    fn advise_later(&self, offset: u64, len: u64, want: Want) -> Result<(), AdviseError> {
        match self.advise_with(offset, len, want, 0) {
            Err(AdviseError::Pages(_)) => Ok(()),
            outcome => outcome,
        }
    }
    fn sync_for_cpu(&self, offset: u64, len: u64) -> Result<(), SyncError> {
        let region = self.len();
        self.contains(offset, len).then_some(()).ok_or(SyncError::OutOfRange { offset, len, region })
    }
    fn sync_for_device(&self, offset: u64, len: u64) -> Result<(), SyncError> {
        self.sync_for_cpu(offset, len)
    }
    /// Pages of a pinned region are all present; of one on demand nobody outside the kernel knows.
    fn report(&self) -> RegionReport {
        let entries = match &self.memory {
            Memory::Process(memory) => memory.range().page_count(),
            Memory::Dmabuf(len) => len.div_ceil(PAGE_SIZE),
        };
        let present = if self.mode == Mode::Pinned { entries } else { 0 };
        let counters = CounterValues::default();
        RegionReport { entries, present, huge: 0, linked: 0, list_bytes: 0, children: 0, counters }
    }
    fn page_map(&self) -> Option<Vec<MapRun>> {
        None
    }
    fn raw_entries(&self) -> Option<Vec<u64>> {
        None
    }
    fn rung(&self) -> Rung {
        match &self.memory {
            Memory::Process(memory) => memory.space().rung(memory.range()),
            // The exporter tells the kernel before it moves anything.
            Memory::Dmabuf(_) => Rung::Exact,
        }
    }
    fn try_deregister(&self) -> Result<(), ObjectError<DestroyKeyError>> {
        let windows = self.windows();
        if !windows.is_empty() {
            return Err(DestroyKeyError::WindowsBound { key: self.key, windows: windows.len() }.into());
        }
        self.deregister();
        Ok(())
    }
    /// Ends the windows that are bound to it, too.
    fn deregister(&self) {
        self.windows().iter().for_each(|window| window.end());
        // Held over it: who comes second waits for the promise as well.
        let mut registered = self.registered.lock();
        drop(registered.take());
    }
}

impl std::fmt::Debug for VerbsRegion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VerbsRegion")
            .field("key", &self.key)
            .field("bytes", &self.memory.len())
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}
