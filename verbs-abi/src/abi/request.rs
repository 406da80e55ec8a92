//! Work requests.

use super::c_structs;
use super::memory::{IbvAh, IbvMw, IbvMwBindInfo};
use std::ffi::{c_int, c_uint, c_void};

c_structs! {
    "struct ibv_sge" = IbvSge {
        addr: u64,
        length: u32,
        lkey: u32,
    }
    "struct ibv_data_buf" = IbvDataBuf {
        addr: *mut c_void,
        length: usize,
    }
    "struct ibv_send_wr" = IbvSendWr {
        wr_id: u64,
        next: *mut IbvSendWr,
        sg_list: *mut IbvSge,
        num_sge: c_int,
        opcode: c_int,
        send_flags: c_uint,
        // Or the key to invalidate, by `opcode`.
        imm_data: u32,
        wr: WrOperands,
        // The only member of this union: the number of a shared receive queue.
        qp_type: u32,
        bind_mw: WrBind,
    }
    "struct ibv_recv_wr" = IbvRecvWr {
        wr_id: u64,
        next: *mut IbvRecvWr,
        sg_list: *mut IbvSge,
        num_sge: c_int,
    }
}

/// `wr.rdma`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct WrRdma {
    pub remote_addr: u64,
    pub rkey: u32,
}

/// `wr.atomic`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct WrAtomic {
    pub remote_addr: u64,
    pub compare_add: u64,
    pub swap: u64,
    pub rkey: u32,
}

/// `wr.ud`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct WrUd {
    pub ah: *mut IbvAh,
    pub remote_qpn: u32,
    pub remote_qkey: u32,
}

/// `wr`, by `opcode`.
#[repr(C)]
#[derive(Clone, Copy)]
pub union WrOperands {
    pub rdma: WrRdma,
    pub atomic: WrAtomic,
    pub ud: WrUd,
}

/// `bind_mw`; the other member of its union is smaller.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct WrBind {
    pub mw: *mut IbvMw,
    pub rkey: u32,
    pub bind_info: IbvMwBindInfo,
}
