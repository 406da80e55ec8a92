//! Protection domains, regions, windows, device memory.

use super::c_structs;
use super::context::IbvContext;
use std::ffi::{c_int, c_uint, c_void};

pub type MemcpyToDm = unsafe extern "C" fn(*mut IbvDm, u64, *const c_void, usize) -> c_int;
pub type MemcpyFromDm = unsafe extern "C" fn(*mut c_void, *mut IbvDm, u64, usize) -> c_int;

c_structs! {
    "struct ibv_pd" = IbvPd {
        context: *mut IbvContext,
        handle: u32,
    }
    "struct ibv_mr" = IbvMr {
        context: *mut IbvContext,
        pd: *mut IbvPd,
        addr: *mut c_void,
        length: usize,
        handle: u32,
        lkey: u32,
        rkey: u32,
    }
    "struct ibv_mw" = IbvMw {
        context: *mut IbvContext,
        pd: *mut IbvPd,
        rkey: u32,
        handle: u32,
        r#type: c_int,
    }
    "struct ibv_mw_bind_info" = IbvMwBindInfo {
        mr: *mut IbvMr,
        addr: u64,
        length: u64,
        mw_access_flags: c_uint,
    }
    "struct ibv_mw_bind" = IbvMwBind {
        wr_id: u64,
        send_flags: c_uint,
        bind_info: IbvMwBindInfo,
    }
    "struct ibv_alloc_dm_attr" = IbvAllocDmAttr {
        length: usize,
        log_align_req: u32,
        comp_mask: u32,
    }
    "struct ibv_dm" = IbvDm {
        context: *mut IbvContext,
        memcpy_to_dm: Option<MemcpyToDm>,
        memcpy_from_dm: Option<MemcpyFromDm>,
        comp_mask: u32,
        handle: u32,
    }
    "struct ibv_td" = IbvTd {
        context: *mut IbvContext,
    }
    "struct ibv_td_init_attr" = IbvTdInitAttr {
        comp_mask: u32,
    }
    "struct ibv_parent_domain_init_attr" = IbvParentDomainInitAttr {
        pd: *mut IbvPd,
        td: *mut IbvTd,
        comp_mask: u32,
        alloc: *mut c_void,
        free: *mut c_void,
        pd_context: *mut c_void,
    }
    "struct ibv_ah" = IbvAh {
        context: *mut IbvContext,
        pd: *mut IbvPd,
        handle: u32,
    }
    "struct ibv_xrcd" = IbvXrcd {
        context: *mut IbvContext,
    }
    "struct ibv_xrcd_init_attr" = IbvXrcdInitAttr {
        comp_mask: u32,
        fd: c_int,
        oflags: c_int,
    }
}
