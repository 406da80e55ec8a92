//! What is not here, and says so: EOPNOTSUPP.
//!
//! Unsafe island. Invariant: none of these looks at its arguments, so they may be called with any.
#![allow(unsafe_code)]

use crate::errno::{Errno, code, pointer};
use std::ffi::{c_int, c_void};

macro_rules! absent {
    ($($name:ident)*) => {
        $(
            #[unsafe(no_mangle)]
            extern "C" fn $name() -> c_int {
                code(|| Err(Errno::NOTSUPP))
            }
        )*
    };
}

absent! {
    ibv_ack_async_event
    ibv_ack_cq_events
    ibv_attach_mcast
    ibv_destroy_ah
    ibv_destroy_comp_channel
    ibv_destroy_cq
    ibv_destroy_qp
    ibv_destroy_srq
    ibv_detach_mcast
    ibv_get_async_event
    ibv_get_cq_event
    ibv_init_ah_from_wc
    ibv_modify_qp
    ibv_modify_srq
    ibv_query_ece
    ibv_query_qp
    ibv_query_qp_data_in_order
    ibv_query_srq
    ibv_resize_cq
    ibv_resolve_eth_l2_from_gid
    ibv_set_ece
    // These return nothing, and do nothing.
    ibv_copy_ah_attr_from_kern
    ibv_copy_path_rec_from_kern
    ibv_copy_path_rec_to_kern
    ibv_copy_qp_attr_from_kern
    ibv_unimport_dm
    ibv_unimport_mr
    ibv_unimport_pd
}

macro_rules! absent_object {
    ($($name:ident)*) => {
        $(
            #[unsafe(no_mangle)]
            extern "C" fn $name() -> *mut c_void {
                pointer(|| Err(Errno::NOTSUPP))
            }
        )*
    };
}

absent_object! {
    ibv_create_ah
    ibv_create_ah_from_wc
    ibv_create_comp_channel
    ibv_create_cq
    ibv_create_qp
    ibv_create_srq
    ibv_import_device
    ibv_import_dm
    ibv_import_mr
    ibv_import_pd
    ibv_qp_to_qp_ex
}
