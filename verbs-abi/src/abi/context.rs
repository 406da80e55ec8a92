//! An open device: the two tables through which the inline functions of the header call.

use super::c_structs;
use super::completion::{IbvCq, IbvCqEx, IbvCqInitAttrEx, IbvModifyCqAttr, IbvWc};
use super::device::{IbvDevice, IbvDeviceAttrEx, IbvPortAttr, IbvValuesEx};
use super::memory::{
    IbvAllocDmAttr, IbvDm, IbvMr, IbvMw, IbvMwBind, IbvParentDomainInitAttr, IbvPd, IbvTd, IbvTdInitAttr,
    IbvXrcd, IbvXrcdInitAttr,
};
use super::queue::{IbvQp, IbvQpInitAttrEx, IbvQpOpenAttr, IbvQpRateLimitAttr, IbvSrq, IbvSrqInitAttrEx};
use super::request::{IbvRecvWr, IbvSendWr, IbvSge};
use std::ffi::{c_int, c_uint, c_void};

/// A slot that our device leaves empty: the inline function then says EOPNOTSUPP.
pub type Empty = *mut c_void;

pub type PostSend = unsafe extern "C" fn(*mut IbvQp, *mut IbvSendWr, *mut *mut IbvSendWr) -> c_int;
pub type PostRecv = unsafe extern "C" fn(*mut IbvQp, *mut IbvRecvWr, *mut *mut IbvRecvWr) -> c_int;
pub type PostSrqRecv = unsafe extern "C" fn(*mut IbvSrq, *mut IbvRecvWr, *mut *mut IbvRecvWr) -> c_int;
pub type QueryDeviceEx =
    unsafe extern "C" fn(*mut IbvContext, *const c_void, *mut IbvDeviceAttrEx, usize) -> c_int;
pub type RegDmMr = unsafe extern "C" fn(*mut IbvPd, *mut IbvDm, u64, usize, c_uint) -> *mut IbvMr;

c_structs! {
    "struct ibv_context_ops" = IbvContextOps {
        _compat_query_device: Empty,
        _compat_query_port: Empty,
        _compat_alloc_pd: Empty,
        _compat_dealloc_pd: Empty,
        _compat_reg_mr: Empty,
        _compat_rereg_mr: Empty,
        _compat_dereg_mr: Empty,
        alloc_mw: Option<unsafe extern "C" fn(*mut IbvPd, c_int) -> *mut IbvMw>,
        bind_mw: Option<unsafe extern "C" fn(*mut IbvQp, *mut IbvMw, *mut IbvMwBind) -> c_int>,
        dealloc_mw: Option<unsafe extern "C" fn(*mut IbvMw) -> c_int>,
        _compat_create_cq: Empty,
        poll_cq: Option<unsafe extern "C" fn(*mut IbvCq, c_int, *mut IbvWc) -> c_int>,
        req_notify_cq: Option<unsafe extern "C" fn(*mut IbvCq, c_int) -> c_int>,
        _compat_cq_event: Empty,
        _compat_resize_cq: Empty,
        _compat_destroy_cq: Empty,
        _compat_create_srq: Empty,
        _compat_modify_srq: Empty,
        _compat_query_srq: Empty,
        _compat_destroy_srq: Empty,
        post_srq_recv: Option<PostSrqRecv>,
        _compat_create_qp: Empty,
        _compat_query_qp: Empty,
        _compat_modify_qp: Empty,
        _compat_destroy_qp: Empty,
        post_send: Option<PostSend>,
        post_recv: Option<PostRecv>,
        _compat_create_ah: Empty,
        _compat_destroy_ah: Empty,
        _compat_attach_mcast: Empty,
        _compat_detach_mcast: Empty,
        _compat_async_event: Empty,
    }
    "struct ibv_context" = IbvContext {
        device: *mut IbvDevice,
        ops: IbvContextOps,
        cmd_fd: c_int,
        async_fd: c_int,
        num_comp_vectors: c_int,
        mutex: libc::pthread_mutex_t,
        abi_compat: *mut c_void,
    }
    "struct verbs_context" = VerbsContext {
        query_port: Option<unsafe extern "C" fn(*mut IbvContext, u8, *mut IbvPortAttr, usize) -> c_int>,
        advise_mr: Option<unsafe extern "C" fn(*mut IbvPd, c_int, u32, *mut IbvSge, u32) -> c_int>,
        alloc_null_mr: Option<unsafe extern "C" fn(*mut IbvPd) -> *mut IbvMr>,
        read_counters: Empty,
        attach_counters_point_flow: Empty,
        create_counters: Empty,
        destroy_counters: Empty,
        reg_dm_mr: Option<RegDmMr>,
        alloc_dm: Option<unsafe extern "C" fn(*mut IbvContext, *mut IbvAllocDmAttr) -> *mut IbvDm>,
        free_dm: Option<unsafe extern "C" fn(*mut IbvDm) -> c_int>,
        modify_flow_action_esp: Empty,
        destroy_flow_action: Empty,
        create_flow_action_esp: Empty,
        modify_qp_rate_limit: Option<unsafe extern "C" fn(*mut IbvQp, *mut IbvQpRateLimitAttr) -> c_int>,
        alloc_parent_domain: Option<unsafe extern "C" fn(*mut IbvContext, *mut IbvParentDomainInitAttr) -> *mut IbvPd>,
        dealloc_td: Option<unsafe extern "C" fn(*mut IbvTd) -> c_int>,
        alloc_td: Option<unsafe extern "C" fn(*mut IbvContext, *mut IbvTdInitAttr) -> *mut IbvTd>,
        modify_cq: Option<unsafe extern "C" fn(*mut IbvCq, *mut IbvModifyCqAttr) -> c_int>,
        post_srq_ops: Empty,
        destroy_rwq_ind_table: Empty,
        create_rwq_ind_table: Empty,
        destroy_wq: Empty,
        modify_wq: Empty,
        create_wq: Empty,
        query_rt_values: Option<unsafe extern "C" fn(*mut IbvContext, *mut IbvValuesEx) -> c_int>,
        create_cq_ex: Option<unsafe extern "C" fn(*mut IbvContext, *mut IbvCqInitAttrEx) -> *mut IbvCqEx>,
        r#priv: *mut c_void,
        query_device_ex: Option<QueryDeviceEx>,
        ibv_destroy_flow: Empty,
        abi_placeholder2: Empty,
        ibv_create_flow: Empty,
        abi_placeholder1: Empty,
        open_qp: Option<unsafe extern "C" fn(*mut IbvContext, *mut IbvQpOpenAttr) -> *mut IbvQp>,
        create_qp_ex: Option<unsafe extern "C" fn(*mut IbvContext, *mut IbvQpInitAttrEx) -> *mut IbvQp>,
        get_srq_num: Option<unsafe extern "C" fn(*mut IbvSrq, *mut u32) -> c_int>,
        create_srq_ex: Option<unsafe extern "C" fn(*mut IbvContext, *mut IbvSrqInitAttrEx) -> *mut IbvSrq>,
        open_xrcd: Option<unsafe extern "C" fn(*mut IbvContext, *mut IbvXrcdInitAttr) -> *mut IbvXrcd>,
        close_xrcd: Option<unsafe extern "C" fn(*mut IbvXrcd) -> c_int>,
        _abi_placeholder3: u64,
        sz: usize,
        context: IbvContext,
    }
}
