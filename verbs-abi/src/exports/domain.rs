//! Thread and parent domains (ibv_alloc_td(3), ibv_alloc_parent_domain(3)).
//!
//! Unsafe island. Invariant: pointers to objects are ones that this library gave.
#![allow(unsafe_code)]

use super::device::context;
use crate::abi::*;
use crate::errno::{Errno, code, pointer};
use crate::handle::{behind, give, read, take};
use crate::objects::{Pd, Td};
use hw_model::sync::Arc;
use std::ffi::c_int;

/// Allocators, which are never called as there is nothing to allocate, and what they are given.
const IBV_PARENT_DOMAIN_INIT_ATTR_KNOWN: u32 = 3;

pub(super) unsafe extern "C" fn alloc_td(of: *mut IbvContext, attr: *mut IbvTdInitAttr) -> *mut IbvTd {
    pointer(|| {
        // SAFETY: the contract of libibverbs.
        let (context, attr) = (unsafe { context(of) }?, unsafe { read(attr) }?);
        if attr.comp_mask != 0 {
            return Err(Errno::NOTSUPP);
        }
        Ok(give(IbvTd { context: of }, Arc::new(Td { _context: Arc::clone(context) })))
    })
}

pub(super) unsafe extern "C" fn dealloc_td(td: *mut IbvTd) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        if Arc::strong_count(unsafe { behind(td) }?) > 1 {
            return Err(Errno::BUSY);
        }
        // SAFETY: as above; it is not used any more.
        drop(unsafe { take(td) });
        Ok(())
    })
}

/// It goes as any domain does, by `ibv_dealloc_pd`.
pub(super) unsafe extern "C" fn alloc_parent_domain(
    of: *mut IbvContext,
    attr: *mut IbvParentDomainInitAttr,
) -> *mut IbvPd {
    pointer(|| {
        // SAFETY: the contract of libibverbs.
        let attr = unsafe { read(attr) }?;
        if attr.comp_mask & !IBV_PARENT_DOMAIN_INIT_ATTR_KNOWN != 0 {
            return Err(Errno::NOTSUPP);
        }
        // SAFETY: as above.
        let td = if attr.td.is_null() { None } else { Some(unsafe { behind(attr.td) }?) };
        // SAFETY: as above.
        Ok(give(IbvPd { context: of, handle: 0 }, Pd::parent(unsafe { behind(attr.pd) }?, td)))
    })
}
