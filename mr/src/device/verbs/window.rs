//! Memory windows of a real device (IBTA volume 1, 10.6.7; ibv_alloc_mw(3), ibv_bind_mw(3)).
//!
//! Unsafe island. Invariant: `mw` is a live window of `pd`, which is held, until it is given back, once. What it was bound to
//! last is held as well, and is deregistered only when the window has gone: a driver refuses it before.
#![allow(unsafe_code)]

use super::capabilities::Capability;
use super::context::last_errno;
use super::error::VerbsError;
use super::extended;
use super::pd::{VerbsPd, translated};
use super::queue::VerbsQp;
use super::region::VerbsRegion;
use hw_model::addr::RegionAddr;
use hw_model::hca::{Access, Key, WindowKind};
use hw_model::sync::{Arc, Mutex};
use rdma_sys::{
    bind_mw_t, ibv_alloc_mw, ibv_dealloc_mw, ibv_mw, ibv_mw_bind, ibv_mw_bind_info, ibv_mw_type,
    ibv_send_flags, ibv_send_wr, ibv_wr_opcode,
};
use rustix::io::Errno;
use std::mem::zeroed;
use std::ptr::{self, NonNull};

/// A memory window. It reaches nothing until [`VerbsQp::bind`] binds it. Dropping it ends what it is bound to.
pub struct VerbsWindow {
    state: Mutex<State>,
    kind: WindowKind,
    pd: Arc<VerbsPd>,
}

struct State {
    /// `None` once it was ended.
    mw: Option<NonNull<ibv_mw>>,
    key: Key,
    /// What it was bound to last.
    bound: Option<Arc<VerbsRegion>>,
}

// SAFETY: objects of libibverbs may be used by any thread.
unsafe impl Send for VerbsWindow {}
// SAFETY: the same; the state is behind a lock.
unsafe impl Sync for VerbsWindow {}

/// A part of a region, and what peers may do there through a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opening {
    /// First address in the region.
    pub address: RegionAddr,
    /// Bytes.
    pub length: u64,
    /// What peers may do. [`Access::ZERO_BASED`] has them count from 0.
    pub access: Access,
}

impl VerbsWindow {
    pub(super) fn new(pd: &Arc<VerbsPd>, kind: WindowKind) -> Result<Arc<Self>, VerbsError> {
        let device = pd.device();
        let (capability, number) = match kind {
            WindowKind::One => (Capability::WindowType1, ibv_mw_type::IBV_MW_TYPE_1),
            WindowKind::TwoB => (Capability::WindowType2, ibv_mw_type::IBV_MW_TYPE_2),
        };
        device.require(capability)?;
        // SAFETY: a domain that is there.
        let mw = unsafe { ibv_alloc_mw(pd.as_ptr(), number) };
        let mw = mw.and_then(NonNull::new).ok_or_else(|| device.refused("ibv_alloc_mw", last_errno()))?;
        // SAFETY: a live window.
        let key = Key(unsafe { (*mw.as_ptr()).rkey });
        let state = Mutex::new(State { mw: Some(mw), key, bound: None });
        Ok(Arc::new(Self { state, kind, pd: Arc::clone(pd) }))
    }

    /// The key that it has now. Each bind gives it another lowest byte; the rest is its name.
    #[must_use]
    pub fn key(&self) -> Key {
        self.state.lock().key
    }

    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> WindowKind {
        self.kind
    }

    /// Ends it: its key reaches nothing when this returns. A second call does nothing.
    pub fn end(&self) {
        // The region that it held may be deregistered by letting go of it: not under the lock.
        let held = {
            let mut state = self.state.lock();
            let Some(mw) = state.mw.take() else { return };
            // SAFETY: made once, given back once: it was taken.
            let code = unsafe { ibv_dealloc_mw(mw.as_ptr()) };
            if code != 0 {
                tracing::warn!(
                    device = self.pd.device().name(),
                    code,
                    "ibv_dealloc_mw failed; the window stays"
                );
            }
            state.bound.take()
        };
        drop(held);
    }

    pub(super) fn is_bound_to(&self, region: &VerbsRegion) -> bool {
        self.state.lock().bound.as_ref().is_some_and(|bound| ptr::eq(Arc::as_ptr(bound), region))
    }

    fn ended(&self) -> VerbsError {
        VerbsError::WindowEnded { device: self.pd.device().name().to_owned() }
    }
}

impl Drop for VerbsWindow {
    fn drop(&mut self) {
        self.end();
    }
}

impl VerbsQp {
    /// Posts the binding of `window` to a part of `region`, which allows it ([`Access::WINDOW_BIND`]). Gives the key that the
    /// window has when the request has completed. The window holds the region until it is bound to another, or ends; the former
    /// region is to be kept until that binding has completed, as a device refuses to give up a region with a window.
    ///
    /// # Errors
    /// [`VerbsError::Foreign`] for a window or a region of another domain than this queue pair's,
    /// [`VerbsError::WindowEnded`], [`VerbsError::Deregistered`], and what the device said.
    pub fn bind(
        &self,
        id: u64,
        window: &Arc<VerbsWindow>,
        region: &Arc<VerbsRegion>,
        opening: Opening,
    ) -> Result<Key, VerbsError> {
        let same = |pd: &Arc<VerbsPd>| Arc::ptr_eq(pd, self.pd());
        if !same(&window.pd) || !same(region.pd()) {
            return Err(VerbsError::Foreign { device: self.pd().device().name().to_owned() });
        }
        let before = region.with_mr(|mr| {
            let mut state = window.state.lock();
            let mw = state.mw.ok_or_else(|| window.ended())?;
            // The owner's queue pairs do not use a window.
            let mw_access_flags = translated(opening.access - Access::LOCAL_WRITE).cast_unsigned();
            let (addr, length) = (opening.address.0, opening.length);
            let bind_info = ibv_mw_bind_info { mr, addr, length, mw_access_flags };
            // SAFETY: a live window and a live region, both of the queue pair's domain.
            state.key = unsafe { self.post_bind(id, mw, window.kind, bind_info) }?;
            // What it was bound to is let go of outside: its own lock may be taken then.
            Ok::<_, VerbsError>((state.key, state.bound.replace(Arc::clone(region))))
        })?;
        let (key, before) = before?;
        if !before.as_ref().is_some_and(|before| Arc::ptr_eq(before, region)) {
            region.has_window(window);
        }
        drop(before);
        Ok(key)
    }

    /// Posts what takes a window of type 1 from its region: binding it to no byte (10.6.7.2.1). One of type 2 is invalidated
    /// instead: [`VerbsQp::invalidate`]. What was said of the former region of [`VerbsQp::bind`] holds here too.
    ///
    /// # Errors
    /// [`VerbsError::WindowEnded`], [`VerbsError::WindowFree`] for a window that is not bound, and what the device said: EINVAL for
    /// a window of type 2.
    pub fn unbind(&self, id: u64, window: &Arc<VerbsWindow>) -> Result<Key, VerbsError> {
        if window.kind != WindowKind::One {
            return Err(self.pd().device().refused("ibv_bind_mw", Errno::INVAL));
        }
        let region = {
            let state = window.state.lock();
            state.mw.ok_or_else(|| window.ended())?;
            state.bound.clone().ok_or(VerbsError::WindowFree { key: state.key })?
        };
        let (key, before) = region.with_mr(|mr| {
            let mut state = window.state.lock();
            let mw = state.mw.ok_or_else(|| window.ended())?;
            // The library of rdma_rxe looks at the region even then (convert_send_wr, providers/rxe/rxe.c).
            let bind_info = ibv_mw_bind_info { mr, addr: 0, length: 0, mw_access_flags: 0 };
            // SAFETY: a live window and a live region of its domain.
            state.key = unsafe { self.post_bind(id, mw, window.kind, bind_info) }?;
            Ok::<_, VerbsError>((state.key, state.bound.take()))
        })??;
        drop(before);
        Ok(key)
    }

    /// Posts the local invalidation of `window`, of type 2 (10.6.5, `IBV_WR_LOCAL_INV`). What was said of the former region of
    /// [`VerbsQp::bind`] holds here too.
    ///
    /// # Errors
    /// [`VerbsError::WindowEnded`], [`VerbsError::WindowFree`] for a window that is not bound (some kernels die of it:
    /// `rxe_invalidate_mw`, rxe_mw.c), and what the device said: EINVAL for a window of type 1.
    pub fn invalidate(&self, id: u64, window: &Arc<VerbsWindow>) -> Result<(), VerbsError> {
        let mut state = window.state.lock();
        state.mw.ok_or_else(|| window.ended())?;
        if window.kind != WindowKind::TwoB {
            return Err(self.pd().device().refused("ibv_post_send", Errno::INVAL));
        }
        if state.bound.is_none() {
            return Err(VerbsError::WindowFree { key: state.key });
        }
        // SAFETY: all zeroes is a value of this C struct.
        let mut work: ibv_send_wr = unsafe { zeroed() };
        work.wr_id = id;
        work.opcode = ibv_wr_opcode::IBV_WR_LOCAL_INV;
        work.send_flags = ibv_send_flags::IBV_SEND_SIGNALED.0;
        work.imm_data_invalidated_rkey_union.invalidated_rkey = state.key.0;
        // SAFETY: no memory and no object is named.
        unsafe { self.post(&mut work) }?;
        let before = state.bound.take();
        drop(state);
        drop(before);
        Ok(())
    }

    /// The two ways to bind: a call of the driver's that chooses the key, and a request with a key that we choose.
    ///
    /// # Safety
    /// `mw` and what `bind_info` names are live, and of this queue pair's domain.
    unsafe fn post_bind(
        &self,
        id: u64,
        mw: NonNull<ibv_mw>,
        kind: WindowKind,
        bind_info: ibv_mw_bind_info,
    ) -> Result<Key, VerbsError> {
        let send_flags = ibv_send_flags::IBV_SEND_SIGNALED.0;
        // SAFETY: the caller's window.
        let rkey = unsafe { (*mw.as_ptr()).rkey };
        if kind == WindowKind::One {
            let mut bind = ibv_mw_bind { wr_id: id, send_flags, bind_info };
            // SAFETY: the caller's window.
            let context = unsafe { (*mw.as_ptr()).context };
            // SAFETY: it is open as long as the window is there.
            let call = unsafe { (*context).ops.bind_mw };
            let call = call.ok_or_else(|| self.pd().device().refused("ibv_bind_mw", Errno::OPNOTSUPP))?;
            // SAFETY: a live queue pair, window and region; the request is read before the call returns.
            let code = unsafe { call(self.as_ptr(), mw.as_ptr(), &raw mut bind) };
            if code != 0 {
                return Err(self.pd().device().refused("ibv_bind_mw", extended::errno(code)));
            }
            // SAFETY: the caller's window, whose key the driver has changed.
            return Ok(Key(unsafe { (*mw.as_ptr()).rkey }));
        }
        let next = rkey & !0xff | rkey.wrapping_add(1) & 0xff;
        // SAFETY: all zeroes is a value of this C struct.
        let mut work: ibv_send_wr = unsafe { zeroed() };
        work.wr_id = id;
        work.opcode = ibv_wr_opcode::IBV_WR_BIND_MW;
        work.send_flags = send_flags;
        work.bind_mw_tso_union.bind_mw = bind_mw_t { mw: mw.as_ptr(), rkey: next, bind_info };
        // SAFETY: the caller's window and region.
        unsafe { self.post(&mut work) }?;
        // SAFETY: the caller's window; a program counts its key on by itself for type 2 (ibv_bind_mw(3)).
        unsafe { (*mw.as_ptr()).rkey = next };
        Ok(Key(next))
    }
}

impl std::fmt::Debug for VerbsWindow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VerbsWindow")
            .field("key", &self.key())
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}
