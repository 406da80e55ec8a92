//! Completion queues and reliable-connected queue pairs of a real device.
//!
//! Unsafe island. Invariant: each pointer was given by libibverbs and is destroyed once, on drop, after what was made from
//! it: queue pairs hold their queue and their domain. The memory that requests name is reached by keys alone; those of
//! regions over memory that somebody owns or vouched for.
#![allow(unsafe_code)]

use super::context::{VerbsDevice, last_errno};
use super::error::VerbsError;
use super::extended;
use super::pd::VerbsPd;
use super::translate;
use hw_model::hca::{Completion, Operation, QpAddress, SendRequest, Sge};
use hw_model::sync::Arc;
use hw_model::wire::{Gid, Psn, Qpn};
use rdma_sys::{
    atomic_t, ibv_cq, ibv_create_cq, ibv_create_qp, ibv_destroy_cq, ibv_destroy_qp, ibv_modify_qp,
    ibv_poll_cq, ibv_post_recv, ibv_post_send, ibv_qp, ibv_qp_attr, ibv_qp_attr_mask, ibv_qp_init_attr,
    ibv_qp_state, ibv_qp_type, ibv_recv_wr, ibv_send_flags, ibv_send_wr, ibv_sge, ibv_wc, ibv_wr_opcode,
    rdma_t, wr_t,
};
use rustix::io::Errno;
use std::mem::zeroed;
use std::ptr::{self, NonNull};

/// A completion queue.
pub struct VerbsCq {
    cq: NonNull<ibv_cq>,
    device: Arc<VerbsDevice>,
}

// SAFETY: objects of libibverbs may be used by any thread.
unsafe impl Send for VerbsCq {}
// SAFETY: the same.
unsafe impl Sync for VerbsCq {}

impl VerbsCq {
    pub(super) fn new(device: &Arc<VerbsDevice>, entries: u32) -> Result<Arc<Self>, VerbsError> {
        let entries = i32::try_from(entries).unwrap_or(i32::MAX);
        // SAFETY: an open context; no channel and no pointer of the program's.
        let cq = unsafe { ibv_create_cq(device.context(), entries, ptr::null_mut(), ptr::null_mut(), 0) };
        let cq = NonNull::new(cq).ok_or_else(|| device.refused("ibv_create_cq", last_errno()))?;
        Ok(Arc::new(Self { cq, device: Arc::clone(device) }))
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
            out.extend(found[..count].iter().map(translate::completion));
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

/// A reliable-connected queue pair.
pub struct VerbsQp {
    qp: NonNull<ibv_qp>,
    _cq: Arc<VerbsCq>,
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
    pub(super) fn new(pd: &Arc<VerbsPd>, cq: &Arc<VerbsCq>, requests: u32) -> Result<Arc<Self>, VerbsError> {
        let device = pd.device();
        if !Arc::ptr_eq(device, &cq.device) {
            return Err(VerbsError::Foreign { device: device.name().to_owned() });
        }
        let (gid, gid_index) = address_of(device)?;
        // SAFETY: all zeroes is a value of this C struct.
        let mut attributes: ibv_qp_init_attr = unsafe { zeroed() };
        attributes.send_cq = cq.cq.as_ptr();
        attributes.recv_cq = cq.cq.as_ptr();
        attributes.qp_type = ibv_qp_type::IBV_QPT_RC;
        attributes.cap.max_send_wr = requests;
        attributes.cap.max_recv_wr = requests;
        attributes.cap.max_send_sge = 4;
        attributes.cap.max_recv_sge = 4;
        // SAFETY: a live domain and queue of one device.
        let qp = NonNull::new(unsafe { ibv_create_qp(pd.as_ptr(), &raw mut attributes) });
        let qp = qp.ok_or_else(|| device.refused("ibv_create_qp", last_errno()))?;
        Ok(Arc::new(Self { qp, _cq: Arc::clone(cq), pd: Arc::clone(pd), gid, gid_index }))
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
        use ibv_qp_attr_mask as Mask;
        // SAFETY: all zeroes is a value of this C struct.
        let mut to: ibv_qp_attr = unsafe { zeroed() };
        to.qp_state = ibv_qp_state::IBV_QPS_INIT;
        to.port_num = PORT;
        // Local writing, remote writing, reading and atomics.
        to.qp_access_flags = 0xf;
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
        // 4.096 us times 2^17, half a second: an emulated machine may be slow but must not give up.
        to.timeout = 17;
        to.retry_cnt = 7;
        to.rnr_retry = 7;
        to.max_rd_atomic = 1;
        let send = Mask::IBV_QP_TIMEOUT
            | Mask::IBV_QP_RETRY_CNT
            | Mask::IBV_QP_RNR_RETRY
            | Mask::IBV_QP_SQ_PSN
            | Mask::IBV_QP_MAX_QP_RD_ATOMIC;
        self.modify(&mut to, send)
    }

    fn modify(&self, to: &mut ibv_qp_attr, mask: ibv_qp_attr_mask) -> Result<(), VerbsError> {
        let mask = (mask | ibv_qp_attr_mask::IBV_QP_STATE).0 as i32;
        // SAFETY: a live queue pair, and attributes for the length of the call.
        match unsafe { ibv_modify_qp(self.qp.as_ptr(), to, mask) } {
            0 => Ok(()),
            code => Err(self.refused("ibv_modify_qp", code)),
        }
    }

    /// Posts a send request.
    ///
    /// # Errors
    /// [`VerbsError::NotPosted`] for what this backend has no words for, and what the device said.
    pub fn post_send(&self, request: &SendRequest<'_>) -> Result<(), VerbsError> {
        let device = || self.pd.device().name().to_owned();
        let operation =
            |remote: hw_model::hca::Remote| rdma_t { remote_addr: remote.address.0, rkey: remote.key.0 };
        let atomic = |remote: hw_model::hca::Remote, compare_add, swap| {
            let (remote_addr, rkey) = (remote.address.0, remote.key.0);
            wr_t { atomic: atomic_t { remote_addr, compare_add, swap, rkey } }
        };
        let nothing = wr_t { rdma: rdma_t { remote_addr: 0, rkey: 0 } };
        let (opcode, to) = match request.operation {
            Operation::Send => (ibv_wr_opcode::IBV_WR_SEND, nothing),
            Operation::Write(remote) => (ibv_wr_opcode::IBV_WR_RDMA_WRITE, wr_t { rdma: operation(remote) }),
            Operation::Read(remote) => (ibv_wr_opcode::IBV_WR_RDMA_READ, wr_t { rdma: operation(remote) }),
            Operation::CompareSwap { remote, compare, swap } => {
                (ibv_wr_opcode::IBV_WR_ATOMIC_CMP_AND_SWP, atomic(remote, compare, swap))
            }
            Operation::FetchAdd { remote, add } => {
                (ibv_wr_opcode::IBV_WR_ATOMIC_FETCH_AND_ADD, atomic(remote, add, 0))
            }
            _ => return Err(VerbsError::NotPosted { device: device(), what: "such an operation" }),
        };
        if !request.inline.is_empty() {
            return Err(VerbsError::NotPosted { device: device(), what: "inline data" });
        }
        let mut pieces = pieces(request.local);
        // SAFETY: all zeroes is a value of this C struct.
        let mut work: ibv_send_wr = unsafe { zeroed() };
        work.wr_id = request.id.0;
        work.sg_list = pieces.as_mut_ptr();
        work.num_sge = pieces.len() as i32;
        work.opcode = opcode;
        work.wr = to;
        let flag = |set, flag: ibv_send_flags| if set { flag.0 } else { 0 };
        work.send_flags = flag(request.signaled, ibv_send_flags::IBV_SEND_SIGNALED)
            | flag(request.fence, ibv_send_flags::IBV_SEND_FENCE)
            | flag(request.solicited, ibv_send_flags::IBV_SEND_SOLICITED);
        // SAFETY: the pieces are there as long as the call, and name memory by keys.
        unsafe { self.post(&mut work) }
    }

    /// Posts one request.
    ///
    /// # Safety
    /// What the request points to is there until this returns.
    pub(super) unsafe fn post(&self, work: &mut ibv_send_wr) -> Result<(), VerbsError> {
        let mut bad = ptr::null_mut();
        // SAFETY: a live queue pair; the request and its pieces are read before the call returns.
        match unsafe { ibv_post_send(self.qp.as_ptr(), work, &raw mut bad) } {
            0 => Ok(()),
            code => Err(self.refused("ibv_post_send", code)),
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

    /// Posts a receive into `local`.
    ///
    /// # Errors
    /// What the device said.
    pub fn post_receive(&self, id: u64, local: &[Sge]) -> Result<(), VerbsError> {
        let mut pieces = pieces(local);
        let (sg_list, num_sge) = (pieces.as_mut_ptr(), pieces.len() as i32);
        let mut work = ibv_recv_wr { wr_id: id, next: ptr::null_mut(), sg_list, num_sge };
        let mut bad = ptr::null_mut();
        // SAFETY: as in `post_send`.
        match unsafe { ibv_post_recv(self.qp.as_ptr(), &raw mut work, &raw mut bad) } {
            0 => Ok(()),
            code => Err(self.refused("ibv_post_recv", code)),
        }
    }

    fn refused(&self, call: &'static str, code: i32) -> VerbsError {
        self.pd.device().refused(call, extended::errno(code))
    }
}

fn pieces(local: &[Sge]) -> Vec<ibv_sge> {
    local.iter().map(|sge| ibv_sge { addr: sge.address.0, length: sge.length, lkey: sge.key.0 }).collect()
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
