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
    ibv_attach_mcast
    ibv_detach_mcast
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
    ibv_import_device
    ibv_import_dm
    ibv_import_mr
    ibv_import_pd
}
