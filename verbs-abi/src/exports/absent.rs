//! What is not here, and says so: EOPNOTSUPP.
//!
//! Unsafe island. Invariant: none of these looks at its arguments, so they may be called with any.
#![allow(unsafe_code)]

use crate::errno::{Errno, code};
use std::ffi::c_int;

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
    // These return nothing, and do nothing.
    ibv_copy_ah_attr_from_kern
    ibv_copy_path_rec_from_kern
    ibv_copy_path_rec_to_kern
    ibv_copy_qp_attr_from_kern
}
