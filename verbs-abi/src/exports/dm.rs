//! Device memory and the null region (ibv_alloc_dm(3), ibv_reg_dm_mr(3), ibv_alloc_null_mr(3)).
//!
//! Unsafe island. Invariant: pointers to objects are ones that this library gave; host memory is as long as the program says.
#![allow(unsafe_code)]

use super::device::context;
use crate::abi::number::*;
use crate::abi::*;
use crate::errno::{Errno, code, pointer};
use crate::handle::{array, behind, give, read, take};
use crate::objects::{Dm, Mr};
use hw_model::sync::Arc;
use std::ffi::{c_int, c_uint, c_void};

/// Copies are of whole words of 4 bytes, as on the devices that have such memory.
const WORD: u64 = 4;

pub(super) unsafe extern "C" fn alloc_dm(of: *mut IbvContext, attr: *mut IbvAllocDmAttr) -> *mut IbvDm {
    pointer(|| {
        // SAFETY: the contract of libibverbs.
        let (context, attr) = (unsafe { context(of) }?, unsafe { read(attr) }?);
        if attr.comp_mask != 0 {
            return Err(Errno::NOTSUPP);
        }
        let dm = Dm::new(context, attr.length as u64, attr.log_align_req)?;
        let handle = context.event_faces().handles.insert_memory(&dm.memory);
        Ok(give(face(of, handle), dm))
    })
}

/// Device memory as the program sees it.
pub(super) fn face(context: *mut IbvContext, handle: u32) -> IbvDm {
    let (to, from): (MemcpyToDm, MemcpyFromDm) = (memcpy_to_dm, memcpy_from_dm);
    IbvDm { context, memcpy_to_dm: Some(to), memcpy_from_dm: Some(from), comp_mask: 0, handle }
}

pub(super) unsafe extern "C" fn free_dm(dm: *mut IbvDm) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        if Arc::strong_count(&unsafe { behind(dm) }?.memory) > 1 {
            return Err(Errno::BUSY);
        }
        // SAFETY: as above; it is not used any more.
        drop(unsafe { take(dm) });
        Ok(())
    })
}

fn whole_words(offset: u64, length: usize) -> Result<(), Errno> {
    if offset.is_multiple_of(WORD) && (length as u64).is_multiple_of(WORD) {
        Ok(())
    } else {
        Err(Errno::INVAL)
    }
}

unsafe extern "C" fn memcpy_to_dm(dm: *mut IbvDm, offset: u64, from: *const c_void, length: usize) -> c_int {
    code(|| {
        whole_words(offset, length)?;
        // SAFETY: the contract of libibverbs.
        let (dm, data) = (unsafe { behind(dm) }?, unsafe { array(from.cast::<u8>(), length) }?);
        dm.memory.copy_to(offset, data).map_err(|_| Errno::FAULT)
    })
}

unsafe extern "C" fn memcpy_from_dm(to: *mut c_void, dm: *mut IbvDm, offset: u64, length: usize) -> c_int {
    code(|| {
        whole_words(offset, length)?;
        // SAFETY: the contract of libibverbs.
        let dm = unsafe { behind(dm) }?;
        if to.is_null() || u64::try_from(length).is_ok_and(|length| length > dm.memory.len()) {
            return Err(Errno::FAULT);
        }
        let mut data = vec![0; length];
        dm.memory.copy_from(offset, &mut data).map_err(|_| Errno::FAULT)?;
        // SAFETY: not NULL, so it has room for `length` bytes.
        unsafe { to.cast::<u8>().copy_from_nonoverlapping(data.as_ptr(), length) };
        Ok(())
    })
}

pub(super) unsafe extern "C" fn reg_dm_mr(
    pd: *mut IbvPd,
    dm: *mut IbvDm,
    offset: u64,
    length: usize,
    access: c_uint,
) -> *mut IbvMr {
    pointer(|| {
        // Its addresses count from 0: programs must say that they know.
        if access & IBV_ACCESS_ZERO_BASED == 0 {
            return Err(Errno::INVAL);
        }
        // SAFETY: the contract of libibverbs.
        let (domain, face) = (unsafe { behind(pd) }?, unsafe { read(pd) }?);
        // SAFETY: as above.
        let mr = Mr::of_device(domain, unsafe { behind(dm) }?, offset, length as u64, access)?;
        let key = mr.key().0;
        let addr = std::ptr::null_mut();
        Ok(give(IbvMr { context: face.context, pd, addr, length, handle: key, lkey: key, rkey: key }, mr))
    })
}

pub(super) unsafe extern "C" fn alloc_null_mr(pd: *mut IbvPd) -> *mut IbvMr {
    pointer(|| {
        // SAFETY: the contract of libibverbs.
        let (domain, face) = (unsafe { behind(pd) }?, unsafe { read(pd) }?);
        let mr = Mr::null(domain)?;
        let lkey = mr.key().0;
        let (addr, length) = (std::ptr::null_mut(), usize::MAX);
        Ok(give(IbvMr { context: face.context, pd, addr, length, handle: lkey, lkey, rkey: 0 }, mr))
    })
}
