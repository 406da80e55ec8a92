//! Completion queues, channels, events.

use super::c_structs;
use super::context::IbvContext;
use super::memory::IbvPd;
use std::ffi::{c_int, c_uint, c_void};

pub type CqExRead<T> = Option<unsafe extern "C" fn(*mut IbvCqEx) -> T>;
pub type CqExStart = unsafe extern "C" fn(*mut IbvCqEx, *mut IbvPollCqAttr) -> c_int;
pub type CqExEnd = unsafe extern "C" fn(*mut IbvCqEx);
pub type CqExReadTm = unsafe extern "C" fn(*mut IbvCqEx, *mut IbvWcTmInfo);

c_structs! {
    "struct ibv_wc" = IbvWc {
        wr_id: u64,
        status: c_int,
        opcode: c_int,
        vendor_err: u32,
        byte_len: u32,
        // Or the key that was invalidated, by `wc_flags`.
        imm_data: u32,
        qp_num: u32,
        src_qp: u32,
        wc_flags: c_uint,
        pkey_index: u16,
        slid: u16,
        sl: u8,
        dlid_path_bits: u8,
    }
    "struct ibv_comp_channel" = IbvCompChannel {
        context: *mut IbvContext,
        fd: c_int,
        refcnt: c_int,
    }
    "struct ibv_cq" = IbvCq {
        context: *mut IbvContext,
        channel: *mut IbvCompChannel,
        cq_context: *mut c_void,
        handle: u32,
        cqe: c_int,
        mutex: libc::pthread_mutex_t,
        cond: libc::pthread_cond_t,
        comp_events_completed: u32,
        async_events_completed: u32,
    }
    "struct ibv_poll_cq_attr" = IbvPollCqAttr {
        comp_mask: u32,
    }
    "struct ibv_wc_tm_info" = IbvWcTmInfo {
        tag: u64,
        r#priv: u32,
    }
    // The first fields are those of `struct ibv_cq`: a pointer to one is a pointer to the other.
    "struct ibv_cq_ex" = IbvCqEx {
        context: *mut IbvContext,
        channel: *mut IbvCompChannel,
        cq_context: *mut c_void,
        handle: u32,
        cqe: c_int,
        mutex: libc::pthread_mutex_t,
        cond: libc::pthread_cond_t,
        comp_events_completed: u32,
        async_events_completed: u32,
        comp_mask: u32,
        status: c_int,
        wr_id: u64,
        start_poll: Option<CqExStart>,
        next_poll: CqExRead<c_int>,
        end_poll: Option<CqExEnd>,
        read_opcode: CqExRead<c_int>,
        read_vendor_err: CqExRead<u32>,
        read_byte_len: CqExRead<u32>,
        read_imm_data: CqExRead<u32>,
        read_qp_num: CqExRead<u32>,
        read_src_qp: CqExRead<u32>,
        read_wc_flags: CqExRead<c_uint>,
        read_slid: CqExRead<u32>,
        read_sl: CqExRead<u8>,
        read_dlid_path_bits: CqExRead<u8>,
        read_completion_ts: CqExRead<u64>,
        read_cvlan: CqExRead<u16>,
        read_flow_tag: CqExRead<u32>,
        read_tm_info: Option<CqExReadTm>,
        read_completion_wallclock_ns: CqExRead<u64>,
    }
    "struct ibv_cq_init_attr_ex" = IbvCqInitAttrEx {
        cqe: u32,
        cq_context: *mut c_void,
        channel: *mut IbvCompChannel,
        comp_vector: u32,
        wc_flags: u64,
        comp_mask: u32,
        flags: u32,
        parent_domain: *mut IbvPd,
    }
    "struct ibv_modify_cq_attr" = IbvModifyCqAttr {
        attr_mask: u32,
        moderate: [u16; 2],
    }
    "struct ibv_async_event" = IbvAsyncEvent {
        // A queue pair, completion queue, shared receive queue, work queue, or the number of a port.
        element: u64,
        event_type: c_int,
    }
}
