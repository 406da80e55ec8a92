//! Extended connections (ibv_open_xrcd(3), ibv_open_qp(3); shared receive queues of them: ibv_create_srq_ex(3)).
//!
//! Unsafe island. Invariant: pointers to objects are ones that this library gave.
#![allow(unsafe_code)]

use super::device::context;
use super::queue::appear;
use crate::abi::*;
use crate::errno::{Errno, code, pointer};
use crate::handle::{behind, give, read, take, zeros};
use crate::objects::{FileName, Qp, Xrcd, file_name};
use hw_model::hca::Qpn;
use hw_model::sync::Arc;
use std::ffi::c_int;
use std::os::fd::BorrowedFd;

const IBV_XRCD_INIT_ATTR_KNOWN: u32 = 3;
const IBV_QP_OPEN_ATTR_NUM: u32 = 1;
const IBV_QP_OPEN_ATTR_XRCD: u32 = 1 << 1;
const IBV_QP_OPEN_ATTR_CONTEXT: u32 = 1 << 2;
const IBV_QP_OPEN_ATTR_TYPE: u32 = 1 << 3;
const IBV_QP_OPEN_ATTR_KNOWN: u32 = 0xf;

pub(super) unsafe extern "C" fn open_xrcd(of: *mut IbvContext, attr: *mut IbvXrcdInitAttr) -> *mut IbvXrcd {
    pointer(|| {
        // SAFETY: the contract of libibverbs.
        let (context, attr) = (unsafe { context(of) }?, unsafe { read(attr) }?);
        if attr.comp_mask != IBV_XRCD_INIT_ATTR_KNOWN {
            return Err(Errno::INVAL);
        }
        let file: Option<FileName> = match attr.fd {
            -1 => None,
            fd => {
                // SAFETY: the program's; it is looked at before this function returns. A number that is no file is an error.
                let fd = if fd < 0 { Err(Errno::BADF) } else { Ok(unsafe { BorrowedFd::borrow_raw(fd) }) }?;
                Some(file_name(fd)?)
            }
        };
        let flags = (attr.oflags & libc::O_CREAT != 0, attr.oflags & libc::O_EXCL != 0);
        Ok(give(IbvXrcd { context: of }, Xrcd::open(context, file, flags)?))
    })
}

pub(super) unsafe extern "C" fn close_xrcd(xrcd: *mut IbvXrcd) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        if Arc::strong_count(unsafe { behind(xrcd) }?) > 1 {
            return Err(Errno::BUSY);
        }
        // SAFETY: as above; it is not used any more.
        drop(unsafe { take(xrcd) });
        Ok(())
    })
}

/// A queue pair that receives over extended connections, for all who have its domain.
///
/// # Safety
/// The contract of libibverbs.
pub(super) unsafe fn create_target(attr: &IbvQpInitAttrEx) -> Result<*mut IbvQp, Errno> {
    // SAFETY: the contract of libibverbs.
    let (xrcd, face) = (unsafe { behind(attr.xrcd) }?, unsafe { read(attr.xrcd) }?);
    let asked = IbvQpInitAttr { qp_context: attr.qp_context, qp_type: attr.qp_type, ..zeros() };
    Ok(appear(Qp::target(xrcd)?, face.context, std::ptr::null_mut(), &asked))
}

pub(super) unsafe extern "C" fn open_qp(of: *mut IbvContext, attr: *mut IbvQpOpenAttr) -> *mut IbvQp {
    pointer(|| {
        // SAFETY: the contract of libibverbs.
        let attr = unsafe { read(attr) }?;
        let needed = IBV_QP_OPEN_ATTR_NUM | IBV_QP_OPEN_ATTR_XRCD | IBV_QP_OPEN_ATTR_TYPE;
        if attr.comp_mask & needed != needed || attr.comp_mask & !IBV_QP_OPEN_ATTR_KNOWN != 0 {
            return Err(Errno::INVAL);
        }
        if attr.qp_type != number::IBV_QPT_XRC_RECV {
            return Err(Errno::INVAL);
        }
        // SAFETY: as above.
        let qp = Qp::open(unsafe { behind(attr.xrcd) }?, Qpn(attr.qp_num))?;
        let told = attr.comp_mask & IBV_QP_OPEN_ATTR_CONTEXT != 0;
        let qp_context = if told { attr.qp_context } else { std::ptr::null_mut() };
        let asked = IbvQpInitAttr { qp_context, qp_type: attr.qp_type, ..zeros() };
        Ok(appear(qp, of, std::ptr::null_mut(), &asked))
    })
}
