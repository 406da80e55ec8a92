//! Queue pairs and shared receive queues.

use super::c_structs;
use super::completion::IbvCq;
use super::context::IbvContext;
use super::device::IbvAhAttr;
use super::memory::{IbvAh, IbvMw, IbvMwBindInfo, IbvPd, IbvXrcd};
use super::request::{IbvDataBuf, IbvSge};
use std::ffi::{c_int, c_uint, c_void};

pub type WrRkeyAddr = unsafe extern "C" fn(*mut IbvQpEx, u32, u64);
pub type WrPlain = unsafe extern "C" fn(*mut IbvQpEx);
pub type WrKey = unsafe extern "C" fn(*mut IbvQpEx, u32);

c_structs! {
    "struct ibv_qp_cap" = IbvQpCap {
        max_send_wr: u32,
        max_recv_wr: u32,
        max_send_sge: u32,
        max_recv_sge: u32,
        max_inline_data: u32,
    }
    "struct ibv_qp_init_attr" = IbvQpInitAttr {
        qp_context: *mut c_void,
        send_cq: *mut IbvCq,
        recv_cq: *mut IbvCq,
        srq: *mut IbvSrq,
        cap: IbvQpCap,
        qp_type: c_int,
        sq_sig_all: c_int,
    }
    "struct ibv_rx_hash_conf" = IbvRxHashConf {
        rx_hash_function: u8,
        rx_hash_key_len: u8,
        rx_hash_key: *mut u8,
        rx_hash_fields_mask: u64,
    }
    "struct ibv_qp_init_attr_ex" = IbvQpInitAttrEx {
        qp_context: *mut c_void,
        send_cq: *mut IbvCq,
        recv_cq: *mut IbvCq,
        srq: *mut IbvSrq,
        cap: IbvQpCap,
        qp_type: c_int,
        sq_sig_all: c_int,
        comp_mask: u32,
        pd: *mut IbvPd,
        xrcd: *mut IbvXrcd,
        create_flags: u32,
        max_tso_header: u16,
        rwq_ind_tbl: *mut c_void,
        rx_hash_conf: IbvRxHashConf,
        source_qpn: u32,
        send_ops_flags: u64,
    }
    "struct ibv_qp_open_attr" = IbvQpOpenAttr {
        comp_mask: u32,
        qp_num: u32,
        xrcd: *mut IbvXrcd,
        qp_context: *mut c_void,
        qp_type: c_int,
    }
    "struct ibv_qp_attr" = IbvQpAttr {
        qp_state: c_int,
        cur_qp_state: c_int,
        path_mtu: c_int,
        path_mig_state: c_int,
        qkey: u32,
        rq_psn: u32,
        sq_psn: u32,
        dest_qp_num: u32,
        qp_access_flags: c_uint,
        cap: IbvQpCap,
        ah_attr: IbvAhAttr,
        alt_ah_attr: IbvAhAttr,
        pkey_index: u16,
        alt_pkey_index: u16,
        en_sqd_async_notify: u8,
        sq_draining: u8,
        max_rd_atomic: u8,
        max_dest_rd_atomic: u8,
        min_rnr_timer: u8,
        port_num: u8,
        timeout: u8,
        retry_cnt: u8,
        rnr_retry: u8,
        alt_port_num: u8,
        alt_timeout: u8,
        rate_limit: u32,
    }
    "struct ibv_qp_rate_limit_attr" = IbvQpRateLimitAttr {
        rate_limit: u32,
        max_burst_sz: u32,
        typical_pkt_sz: u16,
        comp_mask: u32,
    }
    "struct ibv_ece" = IbvEce {
        vendor_id: u32,
        options: u32,
        comp_mask: u32,
    }
    "struct ibv_qp" = IbvQp {
        context: *mut IbvContext,
        qp_context: *mut c_void,
        pd: *mut IbvPd,
        send_cq: *mut IbvCq,
        recv_cq: *mut IbvCq,
        srq: *mut IbvSrq,
        handle: u32,
        qp_num: u32,
        state: c_int,
        qp_type: c_int,
        mutex: libc::pthread_mutex_t,
        cond: libc::pthread_cond_t,
        events_completed: u32,
    }
    "struct ibv_qp_ex" = IbvQpEx {
        qp_base: IbvQp,
        comp_mask: u64,
        wr_id: u64,
        wr_flags: c_uint,
        wr_atomic_cmp_swp: Option<unsafe extern "C" fn(*mut IbvQpEx, u32, u64, u64, u64)>,
        wr_atomic_fetch_add: Option<unsafe extern "C" fn(*mut IbvQpEx, u32, u64, u64)>,
        wr_bind_mw: Option<unsafe extern "C" fn(*mut IbvQpEx, *mut IbvMw, u32, *const IbvMwBindInfo)>,
        wr_local_inv: Option<WrKey>,
        wr_rdma_read: Option<WrRkeyAddr>,
        wr_rdma_write: Option<WrRkeyAddr>,
        wr_rdma_write_imm: Option<unsafe extern "C" fn(*mut IbvQpEx, u32, u64, u32)>,
        wr_send: Option<WrPlain>,
        wr_send_imm: Option<WrKey>,
        wr_send_inv: Option<WrKey>,
        wr_send_tso: Option<unsafe extern "C" fn(*mut IbvQpEx, *mut c_void, u16, u16)>,
        wr_set_ud_addr: Option<unsafe extern "C" fn(*mut IbvQpEx, *mut IbvAh, u32, u32)>,
        wr_set_xrc_srqn: Option<WrKey>,
        wr_set_inline_data: Option<unsafe extern "C" fn(*mut IbvQpEx, *mut c_void, usize)>,
        wr_set_inline_data_list: Option<unsafe extern "C" fn(*mut IbvQpEx, usize, *const IbvDataBuf)>,
        wr_set_sge: Option<unsafe extern "C" fn(*mut IbvQpEx, u32, u64, u32)>,
        wr_set_sge_list: Option<unsafe extern "C" fn(*mut IbvQpEx, usize, *const IbvSge)>,
        wr_start: Option<WrPlain>,
        wr_complete: Option<unsafe extern "C" fn(*mut IbvQpEx) -> c_int>,
        wr_abort: Option<WrPlain>,
        wr_atomic_write: Option<unsafe extern "C" fn(*mut IbvQpEx, u32, u64, *const c_void)>,
        // The newest member, which older headers do not have.
        wr_flush: Option<unsafe extern "C" fn(*mut IbvQpEx, u32, u64, usize, u8, u8)>,
    }
    "struct ibv_srq_attr" = IbvSrqAttr {
        max_wr: u32,
        max_sge: u32,
        srq_limit: u32,
    }
    "struct ibv_srq_init_attr" = IbvSrqInitAttr {
        srq_context: *mut c_void,
        attr: IbvSrqAttr,
    }
    "struct ibv_srq_init_attr_ex" = IbvSrqInitAttrEx {
        srq_context: *mut c_void,
        attr: IbvSrqAttr,
        comp_mask: u32,
        srq_type: c_int,
        pd: *mut IbvPd,
        xrcd: *mut IbvXrcd,
        cq: *mut IbvCq,
        tm_cap: [u32; 2],
    }
    "struct ibv_srq" = IbvSrq {
        context: *mut IbvContext,
        srq_context: *mut c_void,
        pd: *mut IbvPd,
        handle: u32,
        mutex: libc::pthread_mutex_t,
        cond: libc::pthread_cond_t,
        events_completed: u32,
    }
}
