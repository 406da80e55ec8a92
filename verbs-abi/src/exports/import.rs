//! Objects that one part of a program shares with another (ibv_import_device(3), ibv_import_pd(3), ibv_import_mr(3)).
//!
//! Unsafe island. Invariant: pointers to objects are ones that this library gave; a descriptor that a device is imported by is
//! the imported device's from then on.
#![allow(unsafe_code)]

use super::device::{context, give_context};
use crate::abi::*;
use crate::errno::{Errno, pointer, value};
use crate::handle::{behind, give, read, take};
use crate::objects::{Context, Dm, Mr, Pd};
use hw_model::hca::Key;
use std::ffi::{c_int, c_void};
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_import_device(fd: c_int) -> *mut IbvContext {
    pointer(|| {
        // SAFETY: the program's; it is looked at before this function returns. A number that is no file is an error.
        let lent = if fd < 0 { Err(Errno::BADF) } else { Ok(unsafe { BorrowedFd::borrow_raw(fd) }) }?;
        let index = Context::index_of(lent)?;
        // SAFETY: it is a device's, and by contract the imported device's from now on.
        let owned = unsafe { OwnedFd::from_raw_fd(fd) };
        give_context(Context::import(index, owned)?)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_import_pd(of: *mut IbvContext, handle: u32) -> *mut IbvPd {
    pointer(|| {
        // SAFETY: the contract of libibverbs.
        let pd = Pd::import(unsafe { context(of) }?, handle)?;
        Ok(give(IbvPd { context: of, handle }, pd))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_unimport_pd(pd: *mut IbvPd) {
    value((), || {
        // SAFETY: the contract of libibverbs.
        unsafe { behind(pd) }?;
        // SAFETY: as above; it is not used any more.
        drop(unsafe { take(pd) });
        Ok(())
    });
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_import_mr(pd: *mut IbvPd, handle: u32) -> *mut IbvMr {
    pointer(|| {
        // SAFETY: the contract of libibverbs.
        let mr = Mr::import(unsafe { behind(pd) }?, Key(handle))?;
        // SAFETY: as above.
        let context = unsafe { read(pd) }?.context;
        let (addr, length) = (std::ptr::null_mut::<c_void>(), 0);
        Ok(give(IbvMr { context, pd, addr, length, handle, lkey: handle, rkey: handle }, mr))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_unimport_mr(mr: *mut IbvMr) {
    value((), || {
        // SAFETY: the contract of libibverbs.
        unsafe { behind(mr) }?;
        // SAFETY: as above; it is not used any more.
        drop(unsafe { take(mr) });
        Ok(())
    });
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_import_dm(of: *mut IbvContext, handle: u32) -> *mut IbvDm {
    pointer(|| {
        // SAFETY: the contract of libibverbs.
        let dm = Dm::import(unsafe { context(of) }?, handle)?;
        Ok(give(super::dm::face(of, handle), dm))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_unimport_dm(dm: *mut IbvDm) {
    value((), || {
        // SAFETY: the contract of libibverbs.
        unsafe { behind(dm) }?;
        // SAFETY: as above; it is not used any more.
        drop(unsafe { take(dm) });
        Ok(())
    });
}
