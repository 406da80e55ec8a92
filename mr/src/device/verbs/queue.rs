//! Completion queues and reliable-connected queue pairs of a real device; what is posted to them is in post.rs.
//!
//! Unsafe island. Invariant: each pointer was given by libibverbs and is destroyed once, on drop, after what was made from
//! it: queue pairs hold their queues and their domain.
#![allow(unsafe_code)]

use super::context::{VerbsDevice, last_errno};
use super::error::VerbsError;
use super::events::VerbsChannel;
use super::extended;
use super::pd::VerbsPd;
use super::shared::VerbsSrq;
use super::translate;
use hw_model::hca::{Access, Attached, Completion, Cqn, Notify, QpAddress, QpState};
use hw_model::sync::Arc;
use hw_model::wire::{Gid, Immediate, Key, Psn, Qpn};
use rdma_sys::{
    ibv_cq, ibv_create_cq, ibv_create_qp, ibv_destroy_cq, ibv_destroy_qp, ibv_modify_qp, ibv_poll_cq, ibv_qp,
    ibv_qp_attr, ibv_qp_attr_mask, ibv_qp_init_attr, ibv_qp_state, ibv_qp_type, ibv_query_qp,
    ibv_req_notify_cq, ibv_resize_cq, ibv_wc,
};
use rustix::io::Errno;
use std::mem::zeroed;
use std::ptr::{self, NonNull};

/// A completion queue.
pub struct VerbsCq {
    cq: NonNull<ibv_cq>,
    /// Where its events go.
    channel: Option<Arc<VerbsChannel>>,
    device: Arc<VerbsDevice>,
}

// SAFETY: objects of libibverbs may be used by any thread.
unsafe impl Send for VerbsCq {}
// SAFETY: the same.
unsafe impl Sync for VerbsCq {}

impl VerbsCq {
    pub(super) fn new(
        device: &Arc<VerbsDevice>,
        entries: u32,
        channel: Option<Arc<VerbsChannel>>,
        cookie: u64,
    ) -> Result<Arc<Self>, VerbsError> {
        let entries = i32::try_from(entries).unwrap_or(i32::MAX);
        if channel.as_ref().is_some_and(|channel| !channel.device().is(device)) {
            return Err(VerbsError::Foreign { device: device.name().to_owned() });
        }
        let events = channel.as_ref().map_or(ptr::null_mut(), |channel| channel.as_ptr());
        let cookie = ptr::without_provenance_mut(cookie as usize);
        // SAFETY: an open context, and a channel of it or none; the cookie is given back and never followed.
        let cq = unsafe { ibv_create_cq(device.context(), entries, cookie, events, 0) };
        let cq = NonNull::new(cq).ok_or_else(|| device.refused("ibv_create_cq", last_errno()))?;
        Ok(Arc::new(Self { cq, channel, device: Arc::clone(device) }))
    }

    pub(super) fn as_ptr(&self) -> *mut ibv_cq {
        self.cq.as_ptr()
    }

    /// Where its events go, if it has any.
    #[must_use]
    pub fn channel(&self) -> Option<&Arc<VerbsChannel>> {
        self.channel.as_ref()
    }

    /// The number that its events name it by: what the kernel calls it in this context.
    #[must_use]
    pub fn number(&self) -> Cqn {
        // SAFETY: a live queue.
        Cqn(unsafe { (*self.cq.as_ptr()).handle })
    }

    /// Arms it: the next completion that `notify` speaks of is an event of its channel (ibv_req_notify_cq(3)).
    ///
    /// # Errors
    /// What the device said.
    pub fn arm(&self, notify: Notify) -> Result<(), VerbsError> {
        // SAFETY: a live queue.
        match unsafe { ibv_req_notify_cq(self.cq.as_ptr(), (notify == Notify::Solicited).into()) } {
            0 => Ok(()),
            code => Err(self.device.refused("ibv_req_notify_cq", extended::errno(code))),
        }
    }

    /// Changes how many completions it can hold, and keeps those that it holds (ibv_resize_cq(3)).
    ///
    /// # Errors
    /// What the device said.
    pub fn resize(&self, entries: u32) -> Result<(), VerbsError> {
        // SAFETY: a live queue.
        match unsafe { ibv_resize_cq(self.cq.as_ptr(), i32::try_from(entries).unwrap_or(i32::MAX)) } {
            0 => Ok(()),
            code => Err(self.device.refused("ibv_resize_cq", extended::errno(code))),
        }
    }

    /// Moves up to `max` completions to the end of `out`; gives how many.
    ///
    /// # Errors
    /// What the device said; completions are lost then (ibv_poll_cq(3)).
    pub fn poll(&self, out: &mut Vec<Completion>, max: usize) -> Result<usize, VerbsError> {
        let mut moved = 0;
        while moved < max {
            // SAFETY: all zeroes is a value of this C struct.
            let mut found: [ibv_wc; 16] = unsafe { zeroed() };
            let most = found.len().min(max - moved);
            // SAFETY: a live queue, and room for as many completions.
            let count = unsafe { ibv_poll_cq(self.cq.as_ptr(), most as i32, found.as_mut_ptr()) };
            let Ok(count) = usize::try_from(count) else {
                return Err(self.device.refused("ibv_poll_cq", Errno::IO));
            };
            out.extend(found[..count].iter().map(|found| translate::completion(found, attached(found))));
            moved += count;
            if count < most {
                break;
            }
        }
        Ok(moved)
    }
}

impl Drop for VerbsCq {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once; queue pairs held it.
        unsafe { ibv_destroy_cq(self.cq.as_ptr()) };
    }
}

/// What a receive carried beside its bytes.
fn attached(found: &ibv_wc) -> Attached {
    /// `IBV_WC_WITH_IMM` and `IBV_WC_WITH_INV`.
    const IMMEDIATE: u32 = 1 << 1;
    const INVALIDATED: u32 = 1 << 3;
    let carried = &found.imm_data_invalidated_rkey_union;
    // SAFETY: a number of 32 bits, whatever was written.
    let data = unsafe { carried.imm_data };
    // SAFETY: the same.
    let key = unsafe { carried.invalidated_rkey };
    match found.wc_flags {
        flags if flags & IMMEDIATE != 0 => Attached::Immediate(Immediate(u32::from_be(data))),
        flags if flags & INVALIDATED != 0 => Attached::Invalidated(Key(key)),
        _ => Attached::Nothing,
    }
}

/// What a queue pair is made with (ibv_create_qp(3)).
#[derive(Clone)]
pub struct VerbsQpOptions {
    /// Where its send requests complete.
    pub send_cq: Arc<VerbsCq>,
    /// Where its receives complete.
    pub recv_cq: Arc<VerbsCq>,
    /// Where its receives come from, if not from a queue of its own.
    pub srq: Option<Arc<VerbsSrq>>,
    /// Requests that can be outstanding either way.
    pub requests: u32,
    /// Scatter-gather entries that a request can have.
    pub sges: u32,
    /// Bytes that a send request can carry inline.
    pub inline: u32,
}

impl VerbsQpOptions {
    /// Completing to `cq`, `requests` of 4 entries either way, nothing inline.
    #[must_use]
    pub fn new(cq: &Arc<VerbsCq>, requests: u32) -> Self {
        let (send_cq, recv_cq) = (Arc::clone(cq), Arc::clone(cq));
        Self { send_cq, recv_cq, srq: None, requests, sges: 4, inline: 0 }
    }
}

/// What a connection is set to beside its peer (ibv_modify_qp(3)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// What the peer may do.
    pub access: Access,
    /// How long an acknowledgement is waited for, as the specification codes it: 4.096 us times 2 to this. 0 is for ever.
    pub timeout: u8,
    /// How often it is asked again without an answer, 0 to 7.
    pub retries: u8,
    /// How often it is asked again when the peer was not ready, 0 to 6; 7 is for ever.
    pub rnr_retries: u8,
}

impl Default for Terms {
    /// A peer that may do everything, asked as long as there is: half a second each time, as an emulated machine may be slow
    /// but must not give up.
    fn default() -> Self {
        let access = Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ | Access::REMOTE_ATOMIC;
        Self { access, timeout: 17, retries: 7, rnr_retries: 7 }
    }
}

/// A reliable-connected queue pair.
pub struct VerbsQp {
    qp: NonNull<ibv_qp>,
    _queues: (Arc<VerbsCq>, Arc<VerbsCq>, Option<Arc<VerbsSrq>>),
    pd: Arc<VerbsPd>,
    gid: Gid,
    gid_index: u8,
}

// SAFETY: objects of libibverbs may be used by any thread.
unsafe impl Send for VerbsQp {}
// SAFETY: the same.
unsafe impl Sync for VerbsQp {}

/// The port that connections go through. Devices with several are opened port by port elsewhere too.
const PORT: u8 = 1;

impl VerbsQp {
    pub(super) fn new(pd: &Arc<VerbsPd>, options: VerbsQpOptions) -> Result<Arc<Self>, VerbsError> {
        let device = pd.device();
        let VerbsQpOptions { send_cq, recv_cq, srq, requests, sges, inline } = options;
        // One context may have been handed over twice.
        let foreign = |other: &Arc<VerbsDevice>| !device.is(other);
        if [&send_cq, &recv_cq].into_iter().any(|cq| foreign(&cq.device))
            || srq.as_ref().is_some_and(|srq| foreign(srq.pd().device()))
        {
            return Err(VerbsError::Foreign { device: device.name().to_owned() });
        }
        let (gid, gid_index) = address_of(device)?;
        // SAFETY: all zeroes is a value of this C struct.
        let mut attributes: ibv_qp_init_attr = unsafe { zeroed() };
        attributes.send_cq = send_cq.as_ptr();
        attributes.recv_cq = recv_cq.as_ptr();
        attributes.srq = srq.as_ref().map_or(ptr::null_mut(), |srq| srq.as_ptr());
        attributes.qp_type = ibv_qp_type::IBV_QPT_RC;
        attributes.cap.max_send_wr = requests;
        attributes.cap.max_recv_wr = if srq.is_some() { 0 } else { requests };
        attributes.cap.max_send_sge = sges;
        attributes.cap.max_recv_sge = if srq.is_some() { 0 } else { sges };
        attributes.cap.max_inline_data = inline;
        // SAFETY: a live domain, and live queues of the same device.
        let qp = NonNull::new(unsafe { ibv_create_qp(pd.as_ptr(), &raw mut attributes) });
        let qp = qp.ok_or_else(|| device.refused("ibv_create_qp", last_errno()))?;
        let _queues = (send_cq, recv_cq, srq);
        Ok(Arc::new(Self { qp, _queues, pd: Arc::clone(pd), gid, gid_index }))
    }

    /// How a peer addresses it.
    #[must_use]
    pub fn endpoint(&self) -> QpAddress {
        // SAFETY: a live queue pair.
        let qpn = unsafe { (*self.qp.as_ptr()).qp_num };
        QpAddress { gid: self.gid, qpn: Qpn(qpn), psn: Psn::new(0) }
    }

    /// Connects it, from reset to ready to send (IBTA volume 1, 11.2.5.2; ibv_modify_qp(3)).
    ///
    /// # Errors
    /// What the device said.
    pub fn connect(&self, peer: QpAddress) -> Result<(), VerbsError> {
        self.connect_with(peer, Terms::default())
    }

    /// The same on other terms.
    ///
    /// # Errors
    /// What the device said.
    pub fn connect_with(&self, peer: QpAddress, terms: Terms) -> Result<(), VerbsError> {
        use ibv_qp_attr_mask as Mask;
        // SAFETY: all zeroes is a value of this C struct.
        let mut to: ibv_qp_attr = unsafe { zeroed() };
        to.qp_state = ibv_qp_state::IBV_QPS_INIT;
        to.port_num = PORT;
        to.qp_access_flags = super::pd::translated(terms.access) as u32;
        let init = Mask::IBV_QP_PKEY_INDEX | Mask::IBV_QP_PORT | Mask::IBV_QP_ACCESS_FLAGS;
        self.modify(&mut to, init)?;

        to.qp_state = ibv_qp_state::IBV_QPS_RTR;
        to.path_mtu = self.pd.device().active_mtu(PORT)?;
        to.dest_qp_num = peer.qpn.0;
        to.rq_psn = peer.psn.get();
        to.max_dest_rd_atomic = 1;
        to.min_rnr_timer = 1;
        to.ah_attr.is_global = 1;
        to.ah_attr.port_num = PORT;
        to.ah_attr.grh.dgid.raw = peer.gid.0.to_be_bytes();
        to.ah_attr.grh.sgid_index = self.gid_index;
        to.ah_attr.grh.hop_limit = 64;
        let receive = Mask::IBV_QP_AV
            | Mask::IBV_QP_PATH_MTU
            | Mask::IBV_QP_DEST_QPN
            | Mask::IBV_QP_RQ_PSN
            | Mask::IBV_QP_MAX_DEST_RD_ATOMIC
            | Mask::IBV_QP_MIN_RNR_TIMER;
        self.modify(&mut to, receive)?;

        to.qp_state = ibv_qp_state::IBV_QPS_RTS;
        to.timeout = terms.timeout;
        to.retry_cnt = terms.retries;
        to.rnr_retry = terms.rnr_retries;
        to.max_rd_atomic = 1;
        let send = Mask::IBV_QP_TIMEOUT
            | Mask::IBV_QP_RETRY_CNT
            | Mask::IBV_QP_RNR_RETRY
            | Mask::IBV_QP_SQ_PSN
            | Mask::IBV_QP_MAX_QP_RD_ATOMIC;
        self.modify(&mut to, send)
    }

    /// Puts it in the error state: what was posted and what will be is flushed (10.3.1).
    ///
    /// # Errors
    /// What the device said.
    pub fn fail(&self) -> Result<(), VerbsError> {
        // SAFETY: all zeroes is a value of this C struct.
        let mut to: ibv_qp_attr = unsafe { zeroed() };
        to.qp_state = ibv_qp_state::IBV_QPS_ERR;
        self.modify(&mut to, ibv_qp_attr_mask::IBV_QP_STATE)
    }

    /// Its state (ibv_query_qp(3)).
    ///
    /// # Errors
    /// What the device said.
    pub fn state(&self) -> Result<QpState, VerbsError> {
        // SAFETY: all zeroes is a value of this C struct.
        let mut said: ibv_qp_attr = unsafe { zeroed() };
        // SAFETY: the same.
        let mut made: ibv_qp_init_attr = unsafe { zeroed() };
        let mask = ibv_qp_attr_mask::IBV_QP_STATE.0 as i32;
        // SAFETY: a live queue pair, and room for what it says.
        match unsafe { ibv_query_qp(self.qp.as_ptr(), &raw mut said, mask, &raw mut made) } {
            0 => Ok(translate::state(said.qp_state)),
            code => Err(self.refused("ibv_query_qp", code)),
        }
    }

    fn modify(&self, to: &mut ibv_qp_attr, mask: ibv_qp_attr_mask) -> Result<(), VerbsError> {
        let mask = (mask | ibv_qp_attr_mask::IBV_QP_STATE).0 as i32;
        // SAFETY: a live queue pair, and attributes for the length of the call.
        match unsafe { ibv_modify_qp(self.qp.as_ptr(), to, mask) } {
            0 => Ok(()),
            code => Err(self.refused("ibv_modify_qp", code)),
        }
    }

    pub(super) fn as_ptr(&self) -> *mut ibv_qp {
        self.qp.as_ptr()
    }

    /// Its domain.
    #[must_use]
    pub fn pd(&self) -> &Arc<VerbsPd> {
        &self.pd
    }

    pub(super) fn refused(&self, call: &'static str, code: i32) -> VerbsError {
        self.pd.device().refused(call, extended::errno(code))
    }
}

/// The port's address to connect from: the last that an IPv4 address is mapped into (RoCEv2), or else the first.
fn address_of(device: &VerbsDevice) -> Result<(Gid, u8), VerbsError> {
    const MAPPED: u128 = 0xffff << 32;
    let first = device.gid(PORT, 0)?;
    let known = (0..16).map_while(|index| Some((device.gid(PORT, index).ok()?, index)));
    let mapped = known.filter(|(gid, _)| gid.0 >> 32 == MAPPED >> 32).last();
    Ok(mapped.unwrap_or((first, 0)))
}

impl Drop for VerbsQp {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once.
        unsafe { ibv_destroy_qp(self.qp.as_ptr()) };
    }
}
