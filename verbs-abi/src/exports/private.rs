//! The names that providers of other vendors import, and that nothing here needs.
//!
//! perftest and others are linked, every symbol at once, to libmlx5, libefa and librdmacm, whose constructors register
//! their drivers. Ours is the only device, so registering does nothing, and everything else says once that it is not here
//! and fails with ENOSYS.
//!
//! Unsafe island. Invariant: none of these looks at its arguments, so they may be called with any.
#![allow(unsafe_code)]

use crate::errno::{Errno, code};
use crate::settings::complain;
use hw_model::sync::atomic::{AtomicBool, Ordering};
use std::ffi::c_int;

/// Says it once a process, for the first of them.
fn refuse(name: &str) -> c_int {
    static SAID: AtomicBool = AtomicBool::new(false);
    code(|| {
        if !SAID.swap(true, Ordering::Relaxed) {
            complain(&format!("{name} is for providers of other devices, which this library has none of"));
        }
        Err(Errno::NOSYS)
    })
}

macro_rules! refused {
    ($($name:ident)*) => {
        $(
            #[unsafe(no_mangle)]
            extern "C" fn $name() -> c_int {
                refuse(stringify!($name))
            }
        )*
    };
}

refused! {
    ibv_cmd_advise_mr
    ibv_cmd_alloc_dm
    ibv_cmd_alloc_mw
    ibv_cmd_alloc_pd
    ibv_cmd_attach_mcast
    ibv_cmd_close_xrcd
    ibv_cmd_create_ah
    ibv_cmd_create_counters
    ibv_cmd_create_cq
    ibv_cmd_create_cq_ex
    ibv_cmd_create_flow
    ibv_cmd_create_flow_action_esp
    ibv_cmd_create_qp
    ibv_cmd_create_qp_ex
    ibv_cmd_create_qp_ex2
    ibv_cmd_create_rwq_ind_table
    ibv_cmd_create_srq
    ibv_cmd_create_srq_ex
    ibv_cmd_create_wq
    ibv_cmd_dealloc_mw
    ibv_cmd_dealloc_pd
    ibv_cmd_dereg_mr
    ibv_cmd_destroy_ah
    ibv_cmd_destroy_counters
    ibv_cmd_destroy_cq
    ibv_cmd_destroy_flow
    ibv_cmd_destroy_flow_action
    ibv_cmd_destroy_qp
    ibv_cmd_destroy_rwq_ind_table
    ibv_cmd_destroy_srq
    ibv_cmd_destroy_wq
    ibv_cmd_detach_mcast
    ibv_cmd_free_dm
    ibv_cmd_get_context
    ibv_cmd_modify_cq
    ibv_cmd_modify_flow_action_esp
    ibv_cmd_modify_qp
    ibv_cmd_modify_qp_ex
    ibv_cmd_modify_srq
    ibv_cmd_modify_wq
    ibv_cmd_open_qp
    ibv_cmd_open_xrcd
    ibv_cmd_poll_cq
    ibv_cmd_post_recv
    ibv_cmd_post_send
    ibv_cmd_post_srq_recv
    ibv_cmd_query_context
    ibv_cmd_query_device_any
    ibv_cmd_query_mr
    ibv_cmd_query_port
    ibv_cmd_query_qp
    ibv_cmd_query_srq
    ibv_cmd_read_counters
    ibv_cmd_reg_dm_mr
    ibv_cmd_reg_dmabuf_mr
    ibv_cmd_reg_mr
    ibv_cmd_req_notify_cq
    ibv_cmd_rereg_mr
    ibv_cmd_resize_cq
    execute_ioctl
    __ioctl_final_num_attrs
    ibv_read_ibdev_sysfs_file
}

macro_rules! nothing {
    ($($name:ident)*) => {
        $(
            #[unsafe(no_mangle)]
            extern "C" fn $name() -> *mut std::ffi::c_void {
                refuse(stringify!($name));
                std::ptr::null_mut()
            }
        )*
    };
}

nothing! {
    _verbs_init_and_alloc_context
    verbs_open_device
}

macro_rules! silent {
    ($($name:ident)*) => {
        $(
            #[unsafe(no_mangle)]
            extern "C" fn $name() {}
        )*
    };
}

silent! {
    __verbs_log
    verbs_init_cq
    verbs_register_driver_34
    verbs_set_ops
    verbs_uninit_context
}

/// Whether providers may destroy objects of a device that is gone.
#[unsafe(no_mangle)]
static verbs_allow_disassociate_destroy: AtomicBool = AtomicBool::new(false);
