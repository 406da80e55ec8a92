//! Protection domains and regions (ibv_alloc_pd(3), ibv_reg_mr(3), ibv_advise_mr(3)).
//!
//! Unsafe island. Invariant: pointers to objects are ones that this library gave; memory that is registered is vouched for
//! by the program that registers it: the C contract of `ibv_reg_mr` is that of `UserRange::from_raw`.
#![allow(unsafe_code)]

use super::device::context;
use crate::abi::number::*;
use crate::abi::*;
use crate::errno::{Errno, code, pointer};
use crate::handle::{array, behind, give, read, take, write};
use crate::objects::{Mr, Pd, advise};
use hw_model::addr::{VirtAddr, VirtRange};
use hw_model::sync::Arc;
use odp::space::UserRange;
use std::ffi::{c_int, c_uint, c_void};
use std::os::fd::BorrowedFd;

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_alloc_pd(of: *mut IbvContext) -> *mut IbvPd {
    pointer(|| {
        // SAFETY: the contract of libibverbs.
        let pd = Pd::new(unsafe { context(of) }?)?;
        let handle = pd.context.event_faces().handles.insert_pd(&pd.domain);
        Ok(give(IbvPd { context: of, handle }, pd))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_dealloc_pd(pd: *mut IbvPd) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        let inner = unsafe { behind(pd) }?;
        if Arc::strong_count(inner) > 1 {
            return Err(Errno::BUSY);
        }
        // SAFETY: as above; it is not used any more.
        drop(unsafe { take(pd) });
        Ok(())
    })
}

/// Bytes of a process's address space: its last page is never mapped.
const ADDRESS_SPACE: u64 = (1 << 47) - 4096;

/// Registers memory of the process.
///
/// # Safety
/// That of `ibv_reg_mr`.
unsafe fn register(
    pd: *mut IbvPd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: c_uint,
) -> *mut IbvMr {
    pointer(|| {
        // SAFETY: the contract of libibverbs.
        let inner = unsafe { behind(pd) }?;
        // All of the address space, by the agreement that NULL and the largest length mean that.
        let implicit = addr.is_null() && length == usize::MAX && access & IBV_ACCESS_ON_DEMAND != 0;
        let length_here = if implicit { ADDRESS_SPACE } else { length as u64 };
        let range = VirtRange::new(VirtAddr(addr as u64), length_here).ok_or(Errno::INVAL)?;
        let space = Arc::clone(&inner.context.process.space) as _;
        // SAFETY: the program vouches for what it registers.
        let memory = unsafe { UserRange::from_raw(space, range) };
        let mr = if implicit {
            Mr::implicit(inner, &memory, access)?
        } else {
            Mr::register(inner, &memory, iova, access)?
        };
        // SAFETY: as above.
        let context = unsafe { read(pd) }?.context;
        let key = mr.key().0;
        Ok(give(IbvMr { context, pd, addr, length, handle: key, lkey: key, rkey: key }, mr))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_reg_mr(
    pd: *mut IbvPd,
    addr: *mut c_void,
    length: usize,
    access: c_int,
) -> *mut IbvMr {
    // SAFETY: the contract is the same.
    unsafe { register(pd, addr, length, addr as u64, access.cast_unsigned()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_reg_mr_iova(
    pd: *mut IbvPd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: c_int,
) -> *mut IbvMr {
    // SAFETY: the contract is the same.
    unsafe { register(pd, addr, length, iova, access.cast_unsigned()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_reg_mr_iova2(
    pd: *mut IbvPd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: c_uint,
) -> *mut IbvMr {
    // SAFETY: the contract is the same.
    unsafe { register(pd, addr, length, iova, access) }
}

/// Registers a part of what a descriptor stands for: a DMABUF, or a memfd that is sealed against shrinking.
#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_reg_dmabuf_mr(
    pd: *mut IbvPd,
    offset: u64,
    length: usize,
    iova: u64,
    fd: c_int,
    access: c_int,
) -> *mut IbvMr {
    pointer(|| {
        // SAFETY: the contract of libibverbs.
        let (inner, context) = (unsafe { behind(pd) }?, unsafe { read(pd) }?.context);
        // SAFETY: the program's; it is looked at before this function returns. A number that is no file is an error.
        let fd = if fd < 0 { Err(Errno::BADF) } else { Ok(unsafe { BorrowedFd::borrow_raw(fd) }) }?;
        let mr = Mr::of_dmabuf(inner, fd, (offset, length as u64), iova, access.cast_unsigned())?;
        let key = mr.key().0;
        // The buffer has no address in the program.
        let addr = std::ptr::null_mut();
        Ok(give(IbvMr { context, pd, addr, length, handle: key, lkey: key, rkey: key }, mr))
    })
}

/// Changes a region. The answers are those of `enum ibv_rereg_mr_err_code`: after either error it is as it was.
#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_rereg_mr(
    mr: *mut IbvMr,
    flags: c_int,
    pd: *mut IbvPd,
    addr: *mut c_void,
    length: usize,
    access: c_int,
) -> c_int {
    let told = |flag| flags & flag != 0;
    let known = IBV_REREG_MR_CHANGE_TRANSLATION | IBV_REREG_MR_CHANGE_PD | IBV_REREG_MR_CHANGE_ACCESS;
    let mut answer = IBV_REREG_MR_ERR_INPUT;
    let outcome = code(|| {
        let moves = told(IBV_REREG_MR_CHANGE_TRANSLATION);
        let strange = access != 0 && !told(IBV_REREG_MR_CHANGE_ACCESS);
        if flags == 0 || flags & !known != 0 || strange || moves && (addr.is_null() || length == 0) {
            return Err(Errno::INVAL);
        }
        // SAFETY: the contract of libibverbs.
        let region = unsafe { behind(mr) }?;
        // SAFETY: as above.
        let domain = if told(IBV_REREG_MR_CHANGE_PD) { Some(unsafe { behind(pd) }?) } else { None };
        let range = moves.then(|| VirtRange::new(VirtAddr(addr as u64), length as u64));
        let range = range.map(|range| range.ok_or(Errno::INVAL)).transpose()?;
        // SAFETY: the program vouches for what it registers.
        let memory = range.map(|range| unsafe { UserRange::from_raw(region.space(), range) });
        answer = IBV_REREG_MR_ERR_CMD;
        let access = told(IBV_REREG_MR_CHANGE_ACCESS).then_some(access.cast_unsigned());
        region.rereg(domain, memory, access)?;
        // SAFETY: a face of ours.
        let mut face = unsafe { read(mr) }?;
        if domain.is_some() {
            face.pd = pd;
        }
        if moves {
            (face.addr, face.length) = (addr, length);
        }
        // SAFETY: as above.
        unsafe { write(mr, face) }
    });
    if outcome == 0 { 0 } else { answer }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_dereg_mr(mr: *mut IbvMr) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        unsafe { behind(mr) }?;
        // SAFETY: as above; it is not used any more.
        drop(unsafe { take(mr) });
        Ok(())
    })
}

pub(super) unsafe extern "C" fn advise_mr(
    pd: *mut IbvPd,
    advice: c_int,
    flags: u32,
    list: *mut IbvSge,
    count: u32,
) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        let (pd, ranges) = (unsafe { behind(pd) }?, unsafe { array(list, count as usize) }?);
        if flags & !IBV_ADVISE_MR_FLAG_FLUSH != 0 {
            return Err(Errno::NOTSUPP);
        }
        advise(pd, advice, flags != 0, ranges)
    })
}
