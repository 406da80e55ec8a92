//! Asynchronous events (ibv_get_async_event(3)).
//!
//! Unsafe island. Invariant: pointers to objects are ones that this library gave.
#![allow(unsafe_code)]

use super::device::context;
use crate::abi::*;
use crate::errno::{minus_one, value};
use crate::handle::{read, write};
use std::ffi::c_int;
use std::mem::offset_of;

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_get_async_event(of: *mut IbvContext, into: *mut IbvAsyncEvent) -> c_int {
    minus_one(|| {
        // SAFETY: the contract of libibverbs.
        let (event_type, element) = unsafe { context(of) }?.next_event()?;
        // SAFETY: as above.
        unsafe { write(into, IbvAsyncEvent { element, event_type }) }?;
        Ok(0)
    })
}

/// Counts the event as dealt with, where its object says so: what destroys an object does not wait for it here, because the
/// object's events go with it.
#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_ack_async_event(event: *mut IbvAsyncEvent) {
    value((), || {
        // SAFETY: the contract of libibverbs.
        let event = unsafe { read(event) }?;
        let completed = match event.event_type {
            0 => offset_of!(IbvCq, async_events_completed),
            1..=7 | 16 => offset_of!(IbvQp, events_completed),
            14 | 15 => offset_of!(IbvSrq, events_completed),
            _ => return Ok(()),
        };
        let face = std::ptr::with_exposed_provenance_mut::<u8>(event.element as usize);
        let field = face.wrapping_byte_add(completed).cast::<u32>();
        // SAFETY: the object of an event that is not acknowledged is still there.
        let count = unsafe { read(field) }?;
        // SAFETY: as above.
        unsafe { write(field, count.wrapping_add(1)) }
    });
}
