//! Shared receive queues of a real device.
//!
//! Unsafe island. Invariant: the pointer was given by libibverbs and is destroyed once, on drop, after the queue pairs that
//! receive from it: they hold it.
#![allow(unsafe_code)]

use super::context::last_errno;
use super::error::VerbsError;
use super::extended;
use super::pd::VerbsPd;
use hw_model::sync::Arc;
use hw_model::wire::Srqn;
use rdma_sys::{
    ibv_create_srq, ibv_destroy_srq, ibv_modify_srq, ibv_query_srq, ibv_srq, ibv_srq_attr, ibv_srq_attr_mask,
    ibv_srq_init_attr,
};
use std::mem::zeroed;
use std::ptr::NonNull;

/// A shared receive queue: one queue of receives for many queue pairs.
pub struct VerbsSrq {
    srq: NonNull<ibv_srq>,
    pd: Arc<VerbsPd>,
}

// SAFETY: objects of libibverbs may be used by any thread.
unsafe impl Send for VerbsSrq {}
// SAFETY: the same.
unsafe impl Sync for VerbsSrq {}

impl VerbsSrq {
    pub(super) fn new(pd: &Arc<VerbsPd>, requests: u32, sges: u32) -> Result<Arc<Self>, VerbsError> {
        // SAFETY: all zeroes is a value of this C struct.
        let mut attributes: ibv_srq_init_attr = unsafe { zeroed() };
        attributes.attr.max_wr = requests;
        attributes.attr.max_sge = sges;
        // SAFETY: a live domain.
        let srq = NonNull::new(unsafe { ibv_create_srq(pd.as_ptr(), &raw mut attributes) });
        let srq = srq.ok_or_else(|| pd.device().refused("ibv_create_srq", last_errno()))?;
        Ok(Arc::new(Self { srq, pd: Arc::clone(pd) }))
    }

    pub(super) fn as_ptr(&self) -> *mut ibv_srq {
        self.srq.as_ptr()
    }

    pub(super) fn pd(&self) -> &Arc<VerbsPd> {
        &self.pd
    }

    /// The number that asynchronous events name it by: what the kernel calls it in this context.
    #[must_use]
    pub fn number(&self) -> Srqn {
        // SAFETY: a live queue.
        Srqn(unsafe { (*self.srq.as_ptr()).handle })
    }

    /// Asks for an asynchronous event when fewer than `limit` receives are posted, once (ibv_modify_srq(3)).
    ///
    /// # Errors
    /// What the device said.
    pub fn set_limit(&self, limit: u32) -> Result<(), VerbsError> {
        let mut to = ibv_srq_attr { max_wr: 0, max_sge: 0, srq_limit: limit };
        let mask = ibv_srq_attr_mask::IBV_SRQ_LIMIT.0 as i32;
        // SAFETY: a live queue, and attributes for the length of the call.
        match unsafe { ibv_modify_srq(self.srq.as_ptr(), &raw mut to, mask) } {
            0 => Ok(()),
            code => Err(self.refused("ibv_modify_srq", code)),
        }
    }

    /// The limit that is armed; 0 if none is (ibv_query_srq(3)).
    ///
    /// # Errors
    /// What the device said.
    pub fn limit(&self) -> Result<u32, VerbsError> {
        let mut said = ibv_srq_attr { max_wr: 0, max_sge: 0, srq_limit: 0 };
        // SAFETY: a live queue, and room for what it says.
        match unsafe { ibv_query_srq(self.srq.as_ptr(), &raw mut said) } {
            0 => Ok(said.srq_limit),
            code => Err(self.refused("ibv_query_srq", code)),
        }
    }

    pub(super) fn refused(&self, call: &'static str, code: i32) -> VerbsError {
        self.pd.device().refused(call, extended::errno(code))
    }
}

impl Drop for VerbsSrq {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once; queue pairs held it.
        unsafe { ibv_destroy_srq(self.srq.as_ptr()) };
    }
}
