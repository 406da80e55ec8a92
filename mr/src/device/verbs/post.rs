//! Requests, posted to a real device.
//!
//! Unsafe island. Invariant: what a request points at lives until the call returns, which has read it by then; the objects are
//! live, as who posts holds them. The memory that requests name is reached by keys alone: those of regions over memory that
//! somebody owns or vouched for.
#![allow(unsafe_code)]

use super::error::VerbsError;
use super::queue::VerbsQp;
use super::shared::VerbsSrq;
use hw_model::hca::{Operation, RecvRequest, Remote, SendRequest, Sge};
use rdma_sys::{
    atomic_t, ibv_post_recv, ibv_post_send, ibv_post_srq_recv, ibv_recv_wr, ibv_send_flags, ibv_send_wr,
    ibv_sge, ibv_wr_opcode as Code, imm_data_invalidated_rkey_union_t, rdma_t, wr_t,
};
use std::mem::zeroed;
use std::ptr;

/// The opcode, where it goes, and what it carries beside its bytes. `None` is what this backend has no words for.
fn coded(operation: Operation) -> Option<(Code::Type, wr_t, imm_data_invalidated_rkey_union_t)> {
    type Carried = imm_data_invalidated_rkey_union_t;
    let to = |remote: Remote| wr_t { rdma: rdma_t { remote_addr: remote.address.0, rkey: remote.key.0 } };
    let word = |remote: Remote, compare_add, swap| {
        let (remote_addr, rkey) = (remote.address.0, remote.key.0);
        wr_t { atomic: atomic_t { remote_addr, compare_add, swap, rkey } }
    };
    let nowhere = wr_t { rdma: rdma_t { remote_addr: 0, rkey: 0 } };
    let nothing = Carried { invalidated_rkey: 0 };
    let immediate = |data: u32| Carried { imm_data: data.to_be() };
    Some(match operation {
        Operation::Send => (Code::IBV_WR_SEND, nowhere, nothing),
        Operation::SendImmediate(data) => (Code::IBV_WR_SEND_WITH_IMM, nowhere, immediate(data.0)),
        Operation::SendInvalidate(key) => {
            (Code::IBV_WR_SEND_WITH_INV, nowhere, Carried { invalidated_rkey: key.0 })
        }
        Operation::Write(remote) => (Code::IBV_WR_RDMA_WRITE, to(remote), nothing),
        Operation::WriteImmediate(remote, data) => {
            (Code::IBV_WR_RDMA_WRITE_WITH_IMM, to(remote), immediate(data.0))
        }
        Operation::Read(remote) => (Code::IBV_WR_RDMA_READ, to(remote), nothing),
        Operation::CompareSwap { remote, compare, swap } => {
            (Code::IBV_WR_ATOMIC_CMP_AND_SWP, word(remote, compare, swap), nothing)
        }
        Operation::FetchAdd { remote, add } => {
            (Code::IBV_WR_ATOMIC_FETCH_AND_ADD, word(remote, add, 0), nothing)
        }
        Operation::Invalidate { key } => {
            (Code::IBV_WR_LOCAL_INV, nowhere, Carried { invalidated_rkey: key.0 })
        }
        _ => return None,
    })
}

fn pieces(local: &[Sge]) -> Vec<ibv_sge> {
    local.iter().map(|sge| ibv_sge { addr: sge.address.0, length: sge.length, lkey: sge.key.0 }).collect()
}

impl VerbsQp {
    /// Posts a send request (ibv_post_send(3)).
    ///
    /// # Errors
    /// [`VerbsError::NotPosted`] for what this backend has no words for, and what the device said.
    pub fn post_send(&self, request: &SendRequest<'_>) -> Result<(), VerbsError> {
        let Some((opcode, to, carried)) = coded(request.operation) else {
            let device = self.pd().device().name().to_owned();
            return Err(VerbsError::NotPosted { device, what: "such an operation" });
        };
        let mut pieces = pieces(request.local);
        if !request.inline.is_empty() {
            let (addr, length) = (request.inline.as_ptr().expose_provenance() as u64, request.inline.len());
            pieces.push(ibv_sge { addr, length: length as u32, lkey: 0 });
        }
        // SAFETY: all zeroes is a value of this C struct.
        let mut work: ibv_send_wr = unsafe { zeroed() };
        work.wr_id = request.id.0;
        work.sg_list = pieces.as_mut_ptr();
        work.num_sge = pieces.len() as i32;
        work.opcode = opcode;
        work.wr = to;
        work.imm_data_invalidated_rkey_union = carried;
        let flag = |set, flag: ibv_send_flags| if set { flag.0 } else { 0 };
        work.send_flags = flag(request.signaled, ibv_send_flags::IBV_SEND_SIGNALED)
            | flag(request.fence, ibv_send_flags::IBV_SEND_FENCE)
            | flag(request.solicited, ibv_send_flags::IBV_SEND_SOLICITED)
            | flag(!request.inline.is_empty(), ibv_send_flags::IBV_SEND_INLINE);
        // SAFETY: the pieces and the inline bytes are there as long as the call; the former name memory by keys.
        unsafe { self.post(&mut work) }
    }

    /// Posts one request.
    ///
    /// # Safety
    /// What the request points to is there until this returns.
    pub(super) unsafe fn post(&self, work: &mut ibv_send_wr) -> Result<(), VerbsError> {
        let mut bad = ptr::null_mut();
        // SAFETY: a live queue pair; the request and what it points to are read before the call returns.
        match unsafe { ibv_post_send(self.as_ptr(), work, &raw mut bad) } {
            0 => Ok(()),
            code => Err(self.refused("ibv_post_send", code)),
        }
    }

    /// Posts a receive (ibv_post_recv(3)).
    ///
    /// # Errors
    /// What the device said.
    pub fn post_recv(&self, request: &RecvRequest<'_>) -> Result<(), VerbsError> {
        // SAFETY: a live queue pair; the request and its pieces are read before the call returns.
        match receive(request, |work, bad| unsafe { ibv_post_recv(self.as_ptr(), work, bad) }) {
            0 => Ok(()),
            code => Err(self.refused("ibv_post_recv", code)),
        }
    }
}

impl VerbsSrq {
    /// Posts a receive (ibv_post_srq_recv(3)).
    ///
    /// # Errors
    /// What the device said.
    pub fn post(&self, request: &RecvRequest<'_>) -> Result<(), VerbsError> {
        // SAFETY: a live queue; the request and its pieces are read before the call returns.
        match receive(request, |work, bad| unsafe { ibv_post_srq_recv(self.as_ptr(), work, bad) }) {
            0 => Ok(()),
            code => Err(self.refused("ibv_post_srq_recv", code)),
        }
    }
}

fn receive(
    request: &RecvRequest<'_>,
    post: impl FnOnce(*mut ibv_recv_wr, *mut *mut ibv_recv_wr) -> i32,
) -> i32 {
    let mut pieces = pieces(request.local);
    let (sg_list, num_sge) = (pieces.as_mut_ptr(), pieces.len() as i32);
    let mut work = ibv_recv_wr { wr_id: request.id.0, next: ptr::null_mut(), sg_list, num_sge };
    let mut bad = ptr::null_mut();
    post(&raw mut work, &raw mut bad)
}
