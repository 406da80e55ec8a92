//! Queue pairs and shared receive queues (ibv_create_qp(3), ibv_modify_qp(3), ibv_create_srq(3)).
//!
//! Unsafe island. Invariant: pointers to objects are ones that this library gave. A `struct ibv_qp` is the beginning of a
//! `struct ibv_qp_ex`, so a pointer to one is cast to the other.
#![allow(unsafe_code)]

use super::completion;
use crate::abi::*;
use crate::errno::{Errno, code, minus_one, pointer};
use crate::handle::{behind, give, read, take, write, zeros};
use crate::objects::{Pd, Qp, QpWanted, Srq};
use hw_model::sync::Arc;
use std::ffi::{c_int, c_void};
use std::mem::offset_of;

const IBV_QP_INIT_ATTR_PD: u32 = 1;
const IBV_QP_INIT_ATTR_CREATE_FLAGS: u32 = 1 << 2;
const IBV_QP_INIT_ATTR_SEND_OPS_FLAGS: u32 = 1 << 6;
/// Sending by the calls of `struct ibv_qp_ex`: all that there is but segmentation offload and flush.
const SEND_OPS: u64 = 0x13ff;
const IBV_SRQ_INIT_ATTR_TYPE: u32 = 1;
const IBV_SRQ_INIT_ATTR_PD: u32 = 1 << 1;
const IBV_SRQ_MAX_WR: c_int = 1;
const IBV_SRQ_LIMIT: c_int = 1 << 1;

/// What is behind a queue pair of either kind.
///
/// # Safety
/// NULL, or one that this library gave.
pub(super) unsafe fn inner<'a>(qp: *mut IbvQp) -> Result<&'a Arc<Qp>, Errno> {
    // SAFETY: every queue pair of ours is an extended one.
    unsafe { behind(qp.cast::<IbvQpEx>()) }
}

/// Makes a queue pair, and says in `attr` how much it holds.
///
/// # Safety
/// The contract of libibverbs.
unsafe fn create(pd: *mut IbvPd, attr: *mut IbvQpInitAttr) -> Result<*mut IbvQp, Errno> {
    // SAFETY: the contract of libibverbs.
    let (domain, asked) = (unsafe { behind(pd) }?, unsafe { read(attr) }?);
    // SAFETY: as above.
    let (send_cq, recv_cq) =
        (unsafe { completion::inner(asked.send_cq) }?, unsafe { completion::inner(asked.recv_cq) }?);
    // SAFETY: as above.
    let srq = if asked.srq.is_null() { None } else { Some(Arc::clone(unsafe { behind(asked.srq) }?)) };
    let wanted = QpWanted {
        kind: asked.qp_type,
        cap: asked.cap,
        signal_all: asked.sq_sig_all != 0,
        send_cq: Arc::clone(send_cq),
        recv_cq: Arc::clone(recv_cq),
        srq,
    };
    let qp = Qp::new(domain, wanted)?;
    let number = qp.qp.qpn();
    // SAFETY: as above.
    let context = unsafe { read(pd) }?.context;
    let face = IbvQpEx {
        qp_base: IbvQp {
            context,
            qp_context: asked.qp_context,
            pd,
            send_cq: asked.send_cq,
            recv_cq: asked.recv_cq,
            srq: asked.srq,
            handle: number.0,
            qp_num: number.0,
            state: 0,
            qp_type: asked.qp_type,
            ..zeros()
        },
        ..super::build::calls()
    };
    let cap = qp.capacity();
    let faces = Arc::clone(domain.context.event_faces());
    let given: *mut IbvQp = give(face, qp).cast();
    faces.insert_qp(number, given.expose_provenance());
    let field = attr.wrapping_byte_add(offset_of!(IbvQpInitAttr, cap)).cast::<IbvQpCap>();
    // SAFETY: a field of the program's struct.
    unsafe { write(field, cap) }?;
    Ok(given)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_create_qp(pd: *mut IbvPd, attr: *mut IbvQpInitAttr) -> *mut IbvQp {
    // SAFETY: the contract of libibverbs.
    pointer(|| unsafe { create(pd, attr) })
}

pub(super) unsafe extern "C" fn create_qp_ex(_of: *mut IbvContext, attr: *mut IbvQpInitAttrEx) -> *mut IbvQp {
    pointer(|| {
        // SAFETY: the contract of libibverbs.
        let asked = unsafe { read(attr) }?;
        let known = IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_CREATE_FLAGS | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS;
        if asked.comp_mask & !known != 0 {
            return Err(Errno::NOTSUPP);
        }
        if asked.comp_mask & IBV_QP_INIT_ATTR_PD == 0 {
            return Err(Errno::INVAL);
        }
        if asked.comp_mask & IBV_QP_INIT_ATTR_CREATE_FLAGS != 0 && asked.create_flags != 0 {
            return Err(Errno::NOTSUPP);
        }
        if asked.comp_mask & IBV_QP_INIT_ATTR_SEND_OPS_FLAGS != 0 && asked.send_ops_flags & !SEND_OPS != 0 {
            return Err(Errno::NOTSUPP);
        }
        // The struct begins as the older one does.
        // SAFETY: as above.
        unsafe { create(asked.pd, attr.cast()) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn ibv_qp_to_qp_ex(qp: *mut IbvQp) -> *mut IbvQpEx {
    qp.cast()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_modify_qp(qp: *mut IbvQp, attr: *mut IbvQpAttr, mask: c_int) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        let (known, attr) = (unsafe { inner(qp) }?, unsafe { read(attr) }?);
        known.modify(&attr, mask)?;
        let field = qp.wrapping_byte_add(offset_of!(IbvQp, state)).cast::<c_int>();
        // SAFETY: a field of a face of ours.
        unsafe { write(field, crate::objects::state_number(known.qp.state())) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_qp(
    qp: *mut IbvQp,
    attr: *mut IbvQpAttr,
    _mask: c_int,
    init_attr: *mut IbvQpInitAttr,
) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        let (known, face) = (unsafe { inner(qp) }?, unsafe { read(qp) }?);
        let attributes = known.attributes()?;
        // SAFETY: as above.
        unsafe { write(attr, attributes) }?;
        let init = IbvQpInitAttr {
            qp_context: face.qp_context,
            send_cq: face.send_cq,
            recv_cq: face.recv_cq,
            srq: face.srq,
            cap: attributes.cap,
            qp_type: face.qp_type,
            sq_sig_all: known.qp.spec().signal_all.into(),
        };
        let state = qp.wrapping_byte_add(offset_of!(IbvQp, state)).cast::<c_int>();
        // SAFETY: a field of a face of ours.
        unsafe { write(state, attributes.qp_state) }?;
        // SAFETY: as above.
        unsafe { write(init_attr, init) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_qp_data_in_order(qp: *mut IbvQp, _operation: c_int, flags: u32) -> c_int {
    // The bytes of a message are placed in the order of their addresses, the last one last.
    // SAFETY: the contract of libibverbs.
    minus_one(|| unsafe { inner(qp) }.map(|_| c_int::from(flags == 0)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_destroy_qp(qp: *mut IbvQp) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        let known = unsafe { inner(qp) }?;
        let faces = known.pd.context.event_faces();
        faces.remove_qp(known.qp.qpn());
        // SAFETY: as above; it is not used any more.
        drop(unsafe { take(qp.cast::<IbvQpEx>()) });
        Ok(())
    })
}

/// Makes a shared receive queue.
///
/// # Safety
/// The contract of libibverbs.
unsafe fn create_shared(pd: *mut IbvPd, attr: *mut IbvSrqInitAttr) -> Result<*mut IbvSrq, Errno> {
    // SAFETY: the contract of libibverbs.
    let (domain, asked): (&Arc<Pd>, _) = (unsafe { behind(pd) }?, unsafe { read(attr) }?);
    let srq = Srq::new(domain, asked.attr.max_wr, asked.attr.max_sge)?;
    // SAFETY: as above.
    let context = unsafe { read(pd) }?.context;
    let number = srq.queue.number();
    let face = IbvSrq { context, srq_context: asked.srq_context, pd, handle: number.0, ..zeros() };
    let given = give(face, srq);
    domain.context.event_faces().insert_srq(number, given.expose_provenance());
    Ok(given)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_create_srq(pd: *mut IbvPd, attr: *mut IbvSrqInitAttr) -> *mut IbvSrq {
    // SAFETY: the contract of libibverbs.
    pointer(|| unsafe { create_shared(pd, attr) })
}

pub(super) unsafe extern "C" fn create_srq_ex(
    _of: *mut IbvContext,
    attr: *mut IbvSrqInitAttrEx,
) -> *mut IbvSrq {
    pointer(|| {
        // SAFETY: the contract of libibverbs.
        let asked = unsafe { read(attr) }?;
        let basic = asked.comp_mask & IBV_SRQ_INIT_ATTR_TYPE == 0 || asked.srq_type == 0;
        if asked.comp_mask & !(IBV_SRQ_INIT_ATTR_TYPE | IBV_SRQ_INIT_ATTR_PD) != 0 || !basic {
            return Err(Errno::NOTSUPP);
        }
        if asked.comp_mask & IBV_SRQ_INIT_ATTR_PD == 0 {
            return Err(Errno::INVAL);
        }
        // SAFETY: the struct begins as the older one does.
        unsafe { create_shared(asked.pd, attr.cast()) }
    })
}

pub(super) unsafe extern "C" fn get_srq_num(srq: *mut IbvSrq, into: *mut u32) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        let number = unsafe { behind(srq) }?.queue.number().0;
        // SAFETY: as above.
        unsafe { write(into, number) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_modify_srq(srq: *mut IbvSrq, attr: *mut IbvSrqAttr, mask: c_int) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        let (known, attr) = (unsafe { behind(srq) }?, unsafe { read(attr) }?);
        if mask & !(IBV_SRQ_MAX_WR | IBV_SRQ_LIMIT) != 0 {
            return Err(Errno::INVAL);
        }
        if mask & IBV_SRQ_MAX_WR != 0 && attr.max_wr != known.queue.capacity() {
            return Err(Errno::NOTSUPP);
        }
        if mask & IBV_SRQ_LIMIT != 0 {
            known.queue.set_limit(attr.srq_limit).map_err(|_| Errno::INVAL)?;
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_srq(srq: *mut IbvSrq, into: *mut IbvSrqAttr) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        let queue = &unsafe { behind(srq) }?.queue;
        let attr =
            IbvSrqAttr { max_wr: queue.capacity(), max_sge: queue.max_sges(), srq_limit: queue.limit() };
        // SAFETY: as above.
        unsafe { write(into, attr) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_destroy_srq(srq: *mut IbvSrq) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        let (known, face) = (unsafe { behind(srq) }?, unsafe { read(srq) }?);
        if Arc::strong_count(known) > 1 {
            return Err(Errno::BUSY);
        }
        // SAFETY: the domain outlives what is in it.
        unsafe { behind(face.pd) }?.context.event_faces().remove_srq(known.queue.number());
        // SAFETY: as above; it is not used any more.
        drop(unsafe { take(srq) });
        Ok(())
    })
}

/// Enhanced connection establishment: options that vendors agree on. There are none.
#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_ece(_qp: *mut IbvQp, into: *mut IbvEce) -> c_int {
    // SAFETY: the contract of libibverbs.
    code(|| unsafe { write(into, zeros()) })
}

#[unsafe(no_mangle)]
extern "C" fn ibv_set_ece(_qp: *mut IbvQp, _ece: *mut c_void) -> c_int {
    code(|| Err(Errno::NOTSUPP))
}
