//! Memory windows (ibv_alloc_mw(3), ibv_bind_mw(3)).
//!
//! Unsafe island. Invariant: pointers to objects are ones that this library gave.
#![allow(unsafe_code)]

use super::queue;
use crate::abi::*;
use crate::errno::{Errno, code, pointer};
use crate::handle::{behind, give, read, take, write};
use crate::objects::{Mw, request, rights};
use hw_model::addr::RegionAddr;
use hw_model::hca::{Access, Key, Operation, WindowBind};
use std::ffi::c_int;
use std::mem::offset_of;

pub(super) unsafe extern "C" fn alloc_mw(pd: *mut IbvPd, kind: c_int) -> *mut IbvMw {
    pointer(|| {
        // SAFETY: the contract of libibverbs.
        let (domain, face) = (unsafe { behind(pd) }?, unsafe { read(pd) }?);
        let mw = Mw::new(domain, kind)?;
        let rkey = mw.key.0;
        Ok(give(IbvMw { context: face.context, pd, rkey, handle: rkey, r#type: kind }, mw))
    })
}

pub(super) unsafe extern "C" fn dealloc_mw(mw: *mut IbvMw) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        unsafe { behind(mw) }?;
        // SAFETY: as above; it is not used any more.
        drop(unsafe { take(mw) });
        Ok(())
    })
}

/// What binds a window, by a key that the program has chosen the lowest byte of.
///
/// # Safety
/// The contract of libibverbs.
pub(super) unsafe fn bind_operation(
    mw: *mut IbvMw,
    rkey: u32,
    info: &IbvMwBindInfo,
) -> Result<Operation, Errno> {
    // SAFETY: the contract of libibverbs.
    let window = unsafe { behind(mw) }?;
    if (window.key.0 ^ rkey) & !0xff != 0 {
        return Err(Errno::INVAL);
    }
    let region = if info.mr.is_null() {
        Key(0)
    } else {
        // SAFETY: as above.
        unsafe { behind(info.mr) }?.key()
    };
    // The owner's queue pairs do not use a window, so what it says of them is nothing to the device.
    let access = rights(info.mw_access_flags)? - Access::LOCAL_WRITE;
    let bind =
        WindowBind { key: Key(rkey), region, address: RegionAddr(info.addr), length: info.length, access };
    Ok(Operation::Bind(bind))
}

/// Binds a window of type 1, whose key the library chooses.
pub(super) unsafe extern "C" fn bind_mw(qp: *mut IbvQp, mw: *mut IbvMw, bind: *mut IbvMwBind) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        let (bind, face) = (unsafe { read(bind) }?, unsafe { read(mw) }?);
        let rkey = face.rkey & !0xff | face.rkey.wrapping_add(1) & 0xff;
        // SAFETY: as above.
        let operation = unsafe { bind_operation(mw, rkey, &bind.bind_info) }?;
        let request = request(bind.wr_id, operation, bind.send_flags, (&[], &[]));
        // SAFETY: as above.
        unsafe { queue::inner(qp) }?.qp.post_send(&request).map_err(|_| Errno::INVAL)?;
        let field = mw.wrapping_byte_add(offset_of!(IbvMw, rkey)).cast::<u32>();
        // SAFETY: a field of a face of ours.
        unsafe { write(field, rkey) }
    })
}
