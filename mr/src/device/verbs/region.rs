//! A region of a real device. The kernel keeps it true.
//!
//! Unsafe island. Invariant: `mr` is a live region of `pd`, which it holds, until it is deregistered, once; the memory is
//! held as long.
#![allow(unsafe_code)]

use super::capabilities::Capability;
use super::error::VerbsError;
use super::pd::VerbsPd;
use crate::device::{AdviseError, Region, RegisterOptions, SyncError};
use crate::region::{CounterValues, MapRun, Mode, RegionReport};
use hw_model::addr::RegionAddr;
use hw_model::hca::{Access, Key};
use hw_model::sync::atomic::Ordering;
use hw_model::sync::{Arc, Mutex};
use odp::fault::{FaultFailure, Want};
use odp::space::{Access as PageAccess, Rung, UserRange};
use rdma_sys::{ibv_dereg_mr, ibv_mr};
use std::ptr::NonNull;

/// `IB_UVERBS_ADVISE_MR_FLAG_FLUSH`: done when the call returns.
const FLUSH: u32 = 1;

/// A region that libibverbs knows.
pub(super) struct Registered {
    mr: NonNull<ibv_mr>,
    pd: Arc<VerbsPd>,
}

// SAFETY: objects of libibverbs may be used by any thread.
unsafe impl Send for Registered {}
// SAFETY: the same.
unsafe impl Sync for Registered {}

impl Registered {
    pub(super) fn new(pd: &Arc<VerbsPd>, mr: NonNull<ibv_mr>) -> Self {
        Self { mr, pd: Arc::clone(pd) }
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
            // Windows of the program's own making are bound to it; the kernel takes it down with the context.
            tracing::warn!(device = self.pd.device().name(), code, "ibv_dereg_mr failed; the region stays");
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
    memory: UserRange,
}

impl VerbsRegion {
    pub(super) fn new(
        registered: Registered,
        memory: &UserRange,
        options: RegisterOptions,
        address: RegionAddr,
    ) -> Result<Arc<Self>, VerbsError> {
        let (local, remote) = registered.keys();
        let pd = Arc::clone(&registered.pd);
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
            memory: memory.clone(),
        }))
    }

    fn is_writable(&self) -> bool {
        self.access.intersects(Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_ATOMIC)
    }

    fn part(&self, offset: u64, len: u64) -> Option<UserRange> {
        self.memory.part(offset, len)
    }

    /// ibv_advise_mr(3) with `flags`, or populating where the driver has it not.
    fn advise_with(&self, offset: u64, len: u64, want: Want, flags: u32) -> Result<(), AdviseError> {
        let part = self.part(offset, len);
        let part = part.ok_or(AdviseError::OutOfRange { offset, len, region: self.len() })?;
        let registered = self.registered.lock();
        let Some(registered) = &*registered else { return Err(AdviseError::Deregistered) };
        if want == Want::Fault(PageAccess::Write) && !self.is_writable() {
            return Err(AdviseError::NotWritable);
        }
        if self.mode == Mode::Pinned || len == 0 {
            return Ok(());
        }
        let device = self.pd.device();
        if device.capabilities().has(Capability::Advise) {
            // IB_UVERBS_ADVISE_MR_ADVICE_PREFETCH, _PREFETCH_WRITE, _PREFETCH_NO_FAULT.
            let advice = match want {
                Want::Fault(PageAccess::Read) => 0,
                Want::Fault(PageAccess::Write) => 1,
                Want::Snapshot => 2,
            };
            let advised = self.pd.advise(advice, flags, registered.keys().0, part.range());
            return advised.map_err(|reason| AdviseError::Refused {
                device: device.name().to_owned(),
                errno: reason.raw_os_error(),
            });
        }
        match want {
            // Nothing to do for the pages that are there: the device's fault finds them.
            Want::Snapshot => Ok(()),
            Want::Fault(access) => self
                .memory
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
        self.memory.range().len()
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
        self.part(offset, len).map(drop).ok_or(SyncError::OutOfRange { offset, len, region })
    }
    fn sync_for_device(&self, offset: u64, len: u64) -> Result<(), SyncError> {
        self.sync_for_cpu(offset, len)
    }
    /// Pages of a pinned region are all present; of one on demand nobody outside the kernel knows.
    fn report(&self) -> RegionReport {
        let entries = self.memory.range().page_count();
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
        self.memory.space().rung(self.memory.range())
    }
    fn deregister(&self) {
        // Held over it: who comes second waits for the promise as well.
        let mut registered = self.registered.lock();
        drop(registered.take());
    }
}

impl std::fmt::Debug for VerbsRegion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VerbsRegion")
            .field("key", &self.key)
            .field("range", &self.memory.range())
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}
