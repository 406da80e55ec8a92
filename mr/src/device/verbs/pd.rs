//! Protection domains of a real device.
//!
//! Unsafe island. Invariant: `pd` belongs to `device`, which it holds, and lives until this is dropped, after everything that
//! was made in it: all of that holds the domain by `Arc`.
#![allow(unsafe_code)]

use super::capabilities::Capability;
use super::context::{VerbsDevice, last_errno};
use super::error::VerbsError;
use super::extended;
use super::queue::{VerbsCq, VerbsQp, VerbsQpOptions};
use super::shared::VerbsSrq;
use super::window::VerbsWindow;
use hw_model::addr::{PAGE_SIZE, RegionAddr};
use hw_model::hca::{Access, WindowKind};
use hw_model::sync::Arc;
use rdma_sys::{
    ibv_alloc_pd, ibv_dealloc_pd, ibv_dereg_mr, ibv_mr, ibv_pd, ibv_reg_dmabuf_mr, ibv_reg_mr, ibv_rereg_mr,
    ibv_sge,
};
use rustix::io::Errno;
use std::any::Any;
use std::os::raw::c_int;
use std::ptr::{self, NonNull};

/// `IBV_REREG_MR_CHANGE_ACCESS`.
const CHANGE_ACCESS: c_int = 1 << 2;

/// Who gives the domain back.
enum Owner {
    Ours,
    /// Held until the domain goes.
    Theirs {
        _keep: Arc<dyn Any + Send + Sync>,
    },
}

/// A protection domain of a real device.
pub struct VerbsPd {
    pd: NonNull<ibv_pd>,
    owner: Owner,
    device: Arc<VerbsDevice>,
}

// SAFETY: objects of libibverbs may be used by any thread.
unsafe impl Send for VerbsPd {}
// SAFETY: the same.
unsafe impl Sync for VerbsPd {}

impl VerbsPd {
    pub(super) fn new(device: &Arc<VerbsDevice>) -> Result<Self, VerbsError> {
        // SAFETY: the device's context is open.
        let pd = NonNull::new(unsafe { ibv_alloc_pd(device.context()) });
        let pd = pd.ok_or_else(|| device.refused("ibv_alloc_pd", last_errno()))?;
        Ok(Self { pd, owner: Owner::Ours, device: Arc::clone(device) })
    }

    /// A domain that the program has made itself. `keep` is held as long as it is used here.
    ///
    /// # Safety
    /// `pd` is a domain of `device`'s context, and lives while `keep` does.
    #[must_use]
    pub unsafe fn from_pd(
        device: &Arc<VerbsDevice>,
        pd: NonNull<ibv_pd>,
        keep: Arc<dyn Any + Send + Sync>,
    ) -> Arc<Self> {
        Arc::new(Self { pd, owner: Owner::Theirs { _keep: keep }, device: Arc::clone(device) })
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Arc<VerbsDevice> {
        &self.device
    }

    pub(super) fn as_ptr(&self) -> *mut ibv_pd {
        self.pd.as_ptr()
    }

    /// A new memory window.
    ///
    /// # Errors
    /// [`VerbsError::Lacks`] from a device that has none of the kind, and what the device said.
    pub fn alloc_window(self: &Arc<Self>, kind: WindowKind) -> Result<Arc<VerbsWindow>, VerbsError> {
        VerbsWindow::new(self, kind)
    }

    /// A reliable-connected queue pair that completes to `cq`.
    ///
    /// # Errors
    /// What the device said.
    pub fn create_qp(self: &Arc<Self>, cq: &Arc<VerbsCq>, requests: u32) -> Result<Arc<VerbsQp>, VerbsError> {
        VerbsQp::new(self, VerbsQpOptions::new(cq, requests))
    }

    /// The same with all that can be said of one.
    ///
    /// # Errors
    /// What the device said.
    pub fn create_qp_with(self: &Arc<Self>, options: VerbsQpOptions) -> Result<Arc<VerbsQp>, VerbsError> {
        VerbsQp::new(self, options)
    }

    /// A shared receive queue: so many receives, of so many entries each (ibv_create_srq(3)).
    ///
    /// # Errors
    /// What the device said.
    pub fn create_srq(self: &Arc<Self>, requests: u32, sges: u32) -> Result<Arc<VerbsSrq>, VerbsError> {
        VerbsSrq::new(self, requests, sges)
    }

    /// Tells the device what is going to be done with `len` bytes of the region behind `lkey`, from what the region calls
    /// `address` on.
    pub(super) fn advise(
        &self,
        advice: u32,
        flags: u32,
        lkey: u32,
        (address, len): (RegionAddr, u64),
    ) -> Result<(), Errno> {
        // The length of a piece has 32 bits.
        const STEP: u64 = 1 << 30;
        let pieces = (0..len.div_ceil(STEP)).map(|step| {
            let done = step * STEP;
            ibv_sge { addr: address.offset(done).0, length: STEP.min(len - done) as u32, lkey }
        });
        let mut pieces: Vec<_> = pieces.collect();
        // SAFETY: the domain is there.
        unsafe { extended::advise(self.as_ptr(), advice, flags, &mut pieces) }
    }

    /// What the device has that only trying tells. Everything that is made goes again.
    pub(super) fn probe(&self) -> Vec<Capability> {
        let absent = |errno| matches!(errno, Errno::OPNOTSUPP | Errno::NOSYS | Errno::PROTONOSUPPORT);
        let mut has = Vec::new();
        // No piece: refused by who knows the call, and not known by who does not.
        // SAFETY: the domain is there.
        let advised = unsafe { extended::advise(self.as_ptr(), 0, 0, &mut []) };
        if !advised.is_err_and(absent) {
            has.push(Capability::Advise);
        }
        // SAFETY: no file is behind -1, so there is nothing to register.
        let mr = unsafe { ibv_reg_dmabuf_mr(self.as_ptr(), 0, PAGE_SIZE as usize, 0, -1, 0) };
        match NonNull::new(mr) {
            None if absent(last_errno()) => {}
            made => {
                has.push(Capability::Dmabuf);
                if let Some(mr) = made {
                    // SAFETY: made just now.
                    unsafe { ibv_dereg_mr(mr.as_ptr()) };
                }
            }
        }
        if self.has_rereg(absent) {
            has.push(Capability::Rereg);
        }
        has
    }

    fn has_rereg(&self, absent: impl Fn(Errno) -> bool) -> bool {
        // A page that nobody else has, for as long as the region.
        let page = vec![0_u8; 2 * PAGE_SIZE as usize];
        let start = page.as_ptr().expose_provenance().next_multiple_of(PAGE_SIZE as usize);
        let at = ptr::with_exposed_provenance_mut(start);
        // SAFETY: the page is in the vector, which outlives the region; nothing is allowed but local reading.
        let mr = unsafe { ibv_reg_mr(self.as_ptr(), at, PAGE_SIZE as usize, 0) };
        let Some(mr) = NonNull::<ibv_mr>::new(mr) else { return false };
        // SAFETY: a live region, whose rights become what they are.
        let code =
            unsafe { ibv_rereg_mr(mr.as_ptr(), CHANGE_ACCESS, ptr::null_mut(), ptr::null_mut(), 0, 0) };
        let has = code == 0 || !absent(last_errno());
        // SAFETY: made above, and not used again.
        unsafe { ibv_dereg_mr(mr.as_ptr()) };
        has
    }
}

/// The rights as libibverbs has them: the model's bits are the specification's, but for the flushes.
pub(super) fn translated(access: Access) -> c_int {
    /// `IBV_ACCESS_FLUSH_GLOBAL` and `IBV_ACCESS_FLUSH_PERSISTENT`.
    const FLUSHES: [(Access, c_int); 2] =
        [(Access::FLUSH_GLOBAL, 1 << 8), (Access::FLUSH_PERSISTENT, 1 << 9)];
    let mut flags = (access.bits() & 0x3f) as c_int;
    for (right, flag) in FLUSHES {
        if access.contains(right) {
            flags |= flag;
        }
    }
    flags
}

impl Drop for VerbsPd {
    fn drop(&mut self) {
        if matches!(self.owner, Owner::Ours) {
            // SAFETY: made by us, given back once, and what was made in it is gone: it held the domain.
            unsafe { ibv_dealloc_pd(self.pd.as_ptr()) };
        }
    }
}

impl std::fmt::Debug for VerbsPd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VerbsPd").field("device", &self.device).finish_non_exhaustive()
    }
}
