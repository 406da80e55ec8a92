//! Completion queues and their events (ibv_create_cq(3), ibv_create_cq_ex(3), ibv_get_cq_event(3), ibv_poll_cq(3)).
//!
//! Unsafe island. Invariant: pointers to objects are ones that this library gave; arrays are as long as the program says. A
//! `struct ibv_cq` is the beginning of a `struct ibv_cq_ex`, so a pointer to one is cast to the other.
#![allow(unsafe_code)]

use super::device::context;
use crate::abi::*;
use crate::errno::{Errno, code, minus_one, pointer, value};
use crate::handle::{behind, give, read, take, write, zeros};
use crate::objects::{Channel, Cq};
use hw_model::hca::{Moderation, Notify};
use hw_model::sync::Arc;
use std::ffi::{c_int, c_uint, c_void};
use std::os::fd::AsRawFd;

/// `IBV_WC_EX_WITH_COMPLETION_TIMESTAMP` and what comes after it: none of it is known of our completions.
const UNKNOWN_WC_FLAGS: u64 = !0x7f;
const IBV_CQ_INIT_ATTR_MASK_FLAGS: u32 = 1;
const IBV_CQ_INIT_ATTR_MASK_PD: u32 = 1 << 1;
const IBV_CREATE_CQ_ATTR_KNOWN: u32 = 3;
const IBV_CQ_ATTR_MODERATE: u32 = 1;

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_create_comp_channel(of: *mut IbvContext) -> *mut IbvCompChannel {
    pointer(|| {
        // SAFETY: the contract of libibverbs.
        let channel = Channel::new(unsafe { context(of) }?)?;
        let fd = channel.channel.descriptor().as_raw_fd();
        Ok(give(IbvCompChannel { context: of, fd, refcnt: 0 }, channel))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_destroy_comp_channel(channel: *mut IbvCompChannel) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        if !unsafe { behind(channel) }?.is_idle() {
            return Err(Errno::BUSY);
        }
        // SAFETY: as above; it is not used any more.
        drop(unsafe { take(channel) });
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_get_cq_event(
    channel: *mut IbvCompChannel,
    into: *mut *mut IbvCq,
    cq_context: *mut *mut c_void,
) -> c_int {
    minus_one(|| {
        // SAFETY: the contract of libibverbs.
        let face = unsafe { behind(channel) }?.next()?;
        let cq = std::ptr::with_exposed_provenance_mut::<IbvCq>(face);
        // SAFETY: as above.
        unsafe { write(into, cq) }?;
        // SAFETY: the face of a queue that is not destroyed, as events of it are not acknowledged yet.
        let face = unsafe { read(cq) }?;
        // SAFETY: as above.
        unsafe { write(cq_context, face.cq_context) }?;
        Ok(0)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_ack_cq_events(cq: *mut IbvCq, events: c_uint) {
    value((), || {
        // SAFETY: the contract of libibverbs.
        unsafe { inner(cq) }?.queue.acknowledge_events(events);
        Ok(())
    });
}

/// What is behind a completion queue of either kind.
///
/// # Safety
/// NULL, or one that this library gave.
pub(super) unsafe fn inner<'a>(cq: *mut IbvCq) -> Result<&'a Arc<Cq>, Errno> {
    // SAFETY: every queue of ours is an extended one.
    unsafe { behind(cq.cast::<IbvCqEx>()) }
}

/// Makes a queue of at least `entries`.
///
/// # Safety
/// The contract of libibverbs.
unsafe fn create(
    of: *mut IbvContext,
    entries: u32,
    cq_context: *mut c_void,
    channel: *mut IbvCompChannel,
    vector: u32,
) -> Result<*mut IbvCqEx, Errno> {
    // SAFETY: the contract of libibverbs.
    let context = unsafe { context(of) }?;
    // SAFETY: as above.
    let known = if channel.is_null() { None } else { Some(unsafe { behind(channel) }?) };
    if vector != 0 {
        return Err(Errno::INVAL);
    }
    let cq = Cq::new(context, entries, known)?;
    let face = IbvCqEx {
        context: of,
        channel,
        cq_context,
        handle: cq.queue.number().0,
        cqe: c_int::try_from(entries).map_err(|_| Errno::INVAL)?,
        start_poll: Some(start_poll),
        next_poll: Some(next_poll),
        end_poll: Some(end_poll),
        read_opcode: Some(read_opcode),
        read_vendor_err: Some(read_vendor_err),
        read_byte_len: Some(read_byte_len),
        read_imm_data: Some(read_imm_data),
        read_qp_num: Some(read_qp_num),
        read_src_qp: Some(read_src_qp),
        read_wc_flags: Some(read_wc_flags),
        read_slid: Some(read_slid),
        read_sl: Some(read_sl),
        read_dlid_path_bits: Some(read_dlid_path_bits),
        ..zeros()
    };
    let given = give(face, Arc::clone(&cq));
    cq.appear(given.expose_provenance());
    context.event_faces().insert_cq(cq.queue.number(), given.expose_provenance());
    Ok(given)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_create_cq(
    of: *mut IbvContext,
    entries: c_int,
    cq_context: *mut c_void,
    channel: *mut IbvCompChannel,
    vector: c_int,
) -> *mut IbvCq {
    pointer(|| {
        let entries = u32::try_from(entries).map_err(|_| Errno::INVAL)?;
        let vector = u32::try_from(vector).map_err(|_| Errno::INVAL)?;
        // SAFETY: the contract of libibverbs.
        Ok(unsafe { create(of, entries, cq_context, channel, vector) }?.cast())
    })
}

pub(super) unsafe extern "C" fn create_cq_ex(
    of: *mut IbvContext,
    attr: *mut IbvCqInitAttrEx,
) -> *mut IbvCqEx {
    pointer(|| {
        // SAFETY: the contract of libibverbs.
        let attr = unsafe { read(attr) }?;
        let flags = if attr.comp_mask & IBV_CQ_INIT_ATTR_MASK_FLAGS != 0 { attr.flags } else { 0 };
        if attr.comp_mask & !(IBV_CQ_INIT_ATTR_MASK_FLAGS | IBV_CQ_INIT_ATTR_MASK_PD) != 0 {
            return Err(Errno::INVAL);
        }
        if attr.wc_flags & UNKNOWN_WC_FLAGS != 0 || flags & !IBV_CREATE_CQ_ATTR_KNOWN != 0 {
            return Err(Errno::NOTSUPP);
        }
        // SAFETY: as above.
        unsafe { create(of, attr.cqe, attr.cq_context, attr.channel, attr.comp_vector) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_resize_cq(cq: *mut IbvCq, entries: c_int) -> c_int {
    code(|| {
        let count = u32::try_from(entries).map_err(|_| Errno::INVAL)?;
        // SAFETY: the contract of libibverbs.
        unsafe { inner(cq) }?.queue.resize(count)?;
        let field = cq.wrapping_byte_add(std::mem::offset_of!(IbvCq, cqe)).cast::<c_int>();
        // SAFETY: a field of a face of ours.
        unsafe { write(field, entries) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_destroy_cq(cq: *mut IbvCq) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        let known = unsafe { inner(cq) }?;
        if Arc::strong_count(known) > 1 {
            return Err(Errno::BUSY);
        }
        known.disappear();
        known.faces().remove_cq(known.queue.number());
        // SAFETY: as above; it is not used any more.
        drop(unsafe { take(cq.cast::<IbvCqEx>()) });
        Ok(())
    })
}

pub(super) unsafe extern "C" fn poll_cq(cq: *mut IbvCq, most: c_int, into: *mut IbvWc) -> c_int {
    minus_one(|| {
        let most = usize::try_from(most).map_err(|_| Errno::INVAL)?;
        if into.is_null() && most > 0 {
            return Err(Errno::INVAL);
        }
        // SAFETY: the contract of libibverbs.
        let count = unsafe { inner(cq) }?.poll(most, |at, completion| {
            // SAFETY: not NULL, so it has room for `most`, of which this is one.
            unsafe { into.wrapping_add(at).write_unaligned(completion) };
        })?;
        c_int::try_from(count).map_err(|_| Errno::INVAL)
    })
}

pub(super) unsafe extern "C" fn req_notify_cq(cq: *mut IbvCq, solicited_only: c_int) -> c_int {
    code(|| {
        let notify = if solicited_only == 0 { Notify::Any } else { Notify::Solicited };
        // SAFETY: the contract of libibverbs.
        unsafe { inner(cq) }?.queue.arm(notify);
        Ok(())
    })
}

pub(super) unsafe extern "C" fn modify_cq(cq: *mut IbvCq, attr: *mut IbvModifyCqAttr) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        let attr = unsafe { read(attr) }?;
        if attr.attr_mask != IBV_CQ_ATTR_MODERATE {
            return Err(Errno::INVAL);
        }
        let [count, period] = attr.moderate;
        // SAFETY: as above.
        unsafe { inner(cq) }?.queue.moderate(Moderation { count, period });
        Ok(())
    })
}

/// Makes the next completion the one that is read. ENOENT if there is none.
///
/// # Safety
/// The contract of libibverbs.
unsafe fn advance(cq: *mut IbvCqEx) -> c_int {
    let mut nothing = false;
    let done = code(|| {
        // SAFETY: the contract of libibverbs.
        let Some(completion) = unsafe { behind(cq) }?.advance()? else {
            nothing = true;
            return Ok(());
        };
        let status = cq.wrapping_byte_add(std::mem::offset_of!(IbvCqEx, status)).cast::<c_int>();
        let wr_id = cq.wrapping_byte_add(std::mem::offset_of!(IbvCqEx, wr_id)).cast::<u64>();
        // SAFETY: fields of a face of ours.
        unsafe { write(status, completion.status) }?;
        // SAFETY: as above.
        unsafe { write(wr_id, completion.wr_id) }
    });
    // An empty queue is no failure: errno stays as it was.
    if nothing { libc::ENOENT } else { done }
}

unsafe extern "C" fn start_poll(cq: *mut IbvCqEx, attr: *mut IbvPollCqAttr) -> c_int {
    // SAFETY: NULL or the program's struct.
    if !attr.is_null() && unsafe { read(attr) }.is_ok_and(|attr| attr.comp_mask != 0) {
        return libc::EINVAL;
    }
    // SAFETY: the contract of libibverbs.
    unsafe { advance(cq) }
}

unsafe extern "C" fn next_poll(cq: *mut IbvCqEx) -> c_int {
    // SAFETY: the contract of libibverbs.
    unsafe { advance(cq) }
}

extern "C" fn end_poll(_cq: *mut IbvCqEx) {}

/// The completion that is read.
///
/// # Safety
/// The contract of libibverbs.
unsafe fn current(cq: *mut IbvCqEx) -> IbvWc {
    // SAFETY: the contract of libibverbs.
    value(zeros(), || Ok(unsafe { behind(cq) }?.current()))
}

macro_rules! readers {
    ($($name:ident: $ty:ty = $field:ident,)*) => {
        $(
            unsafe extern "C" fn $name(cq: *mut IbvCqEx) -> $ty {
                // SAFETY: the contract of libibverbs.
                unsafe { current(cq) }.$field.into()
            }
        )*
    };
}

readers! {
    read_opcode: c_int = opcode,
    read_vendor_err: u32 = vendor_err,
    read_byte_len: u32 = byte_len,
    read_imm_data: u32 = imm_data,
    read_qp_num: u32 = qp_num,
    read_src_qp: u32 = src_qp,
    read_wc_flags: c_uint = wc_flags,
    read_slid: u32 = slid,
    read_sl: u8 = sl,
    read_dlid_path_bits: u8 = dlid_path_bits,
}
