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
use hw_model::hca::Gid;
use hw_model::sync::Arc;
use std::ffi::{c_int, c_void};
use std::mem::offset_of;

const IBV_QP_INIT_ATTR_PD: u32 = 1;
const IBV_QP_INIT_ATTR_XRCD: u32 = 1 << 1;
const IBV_QP_INIT_ATTR_CREATE_FLAGS: u32 = 1 << 2;
const IBV_QP_INIT_ATTR_SEND_OPS_FLAGS: u32 = 1 << 6;
/// Sending by the calls of `struct ibv_qp_ex`: all that there is but segmentation offload and flush.
const SEND_OPS: u64 = 0x13ff;
const IBV_SRQ_INIT_ATTR_TYPE: u32 = 1;
const IBV_SRQ_INIT_ATTR_PD: u32 = 1 << 1;
const IBV_SRQ_INIT_ATTR_XRCD: u32 = 1 << 2;
const IBV_SRQ_INIT_ATTR_CQ: u32 = 1 << 3;
const IBV_SRQT_BASIC: c_int = 0;
const IBV_SRQT_XRC: c_int = 1;
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

/// Gives a queue pair to the program.
pub(super) fn appear(
    qp: Arc<Qp>,
    context: *mut IbvContext,
    pd: *mut IbvPd,
    asked: &IbvQpInitAttr,
) -> *mut IbvQp {
    let number = qp.qp.qpn();
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
            state: crate::objects::state_number(qp.qp.state()),
            qp_type: asked.qp_type,
            ..zeros()
        },
        ..super::build::calls()
    };
    let known = Arc::clone(&qp.context);
    let given: *mut IbvQp = give(face, qp).cast();
    known.event_faces().insert_qp(number, given.expose_provenance());
    given
}

/// Makes a queue pair, and says in `attr` how much it holds.
///
/// # Safety
/// The contract of libibverbs.
unsafe fn create(pd: *mut IbvPd, attr: *mut IbvQpInitAttr) -> Result<*mut IbvQp, Errno> {
    // SAFETY: the contract of libibverbs.
    let (domain, asked) = (unsafe { behind(pd) }?, unsafe { read(attr) }?);
    // SAFETY: as above.
    let send_cq = unsafe { completion::inner(asked.send_cq) }?;
    // The initiator of extended connections receives nothing.
    let recv_cq = match asked.qp_type {
        number::IBV_QPT_XRC_SEND => send_cq,
        // SAFETY: as above.
        _ => unsafe { completion::inner(asked.recv_cq) }?,
    };
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
    let cap = qp.capacity();
    let field = attr.wrapping_byte_add(offset_of!(IbvQpInitAttr, cap)).cast::<IbvQpCap>();
    // SAFETY: a field of the program's struct.
    unsafe { write(field, cap) }?;
    // SAFETY: as above.
    Ok(appear(qp, unsafe { read(pd) }?.context, pd, &asked))
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
        let known = IBV_QP_INIT_ATTR_PD
            | IBV_QP_INIT_ATTR_XRCD
            | IBV_QP_INIT_ATTR_CREATE_FLAGS
            | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS;
        if asked.comp_mask & !known != 0 {
            return Err(Errno::NOTSUPP);
        }
        let target = asked.qp_type == number::IBV_QPT_XRC_RECV;
        let needed = if target { IBV_QP_INIT_ATTR_XRCD } else { IBV_QP_INIT_ATTR_PD };
        if asked.comp_mask & needed == 0 {
            return Err(Errno::INVAL);
        }
        if asked.comp_mask & IBV_QP_INIT_ATTR_CREATE_FLAGS != 0 && asked.create_flags != 0 {
            return Err(Errno::NOTSUPP);
        }
        if asked.comp_mask & IBV_QP_INIT_ATTR_SEND_OPS_FLAGS != 0 && asked.send_ops_flags & !SEND_OPS != 0 {
            return Err(Errno::NOTSUPP);
        }
        if target {
            // SAFETY: as above.
            return unsafe { super::xrc::create_target(&asked) };
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
        known.context.event_faces().remove_qp(known.qp.qpn(), qp.addr());
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
    unsafe { give_shared(srq, pd, asked.srq_context) }
}

/// Gives a shared receive queue to the program.
///
/// # Safety
/// The contract of libibverbs.
unsafe fn give_shared(srq: Arc<Srq>, pd: *mut IbvPd, srq_context: *mut c_void) -> Result<*mut IbvSrq, Errno> {
    // SAFETY: the contract of libibverbs.
    let context = unsafe { read(pd) }?.context;
    let (number, known) = (srq.queue.number(), Arc::clone(&srq.context));
    let given = give(IbvSrq { context, srq_context, pd, handle: number.0, ..zeros() }, srq);
    known.event_faces().insert_srq(number, given.expose_provenance());
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
        let kind =
            if asked.comp_mask & IBV_SRQ_INIT_ATTR_TYPE == 0 { IBV_SRQT_BASIC } else { asked.srq_type };
        let needed = match kind {
            IBV_SRQT_BASIC => IBV_SRQ_INIT_ATTR_PD,
            IBV_SRQT_XRC => IBV_SRQ_INIT_ATTR_PD | IBV_SRQ_INIT_ATTR_XRCD | IBV_SRQ_INIT_ATTR_CQ,
            _ => return Err(Errno::NOTSUPP),
        };
        if asked.comp_mask & !(IBV_SRQ_INIT_ATTR_TYPE | needed) != 0 {
            return Err(Errno::NOTSUPP);
        }
        if asked.comp_mask & needed != needed {
            return Err(Errno::INVAL);
        }
        if kind == IBV_SRQT_XRC {
            // SAFETY: as above.
            let (pd, xrcd) = (unsafe { behind(asked.pd) }?, unsafe { behind(asked.xrcd) }?);
            // SAFETY: as above.
            let cq = unsafe { completion::inner(asked.cq) }?;
            let srq = Srq::extended(pd, (xrcd, cq), (asked.attr.max_wr, asked.attr.max_sge))?;
            // SAFETY: as above.
            return unsafe { give_shared(srq, asked.pd, asked.srq_context) };
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
        let known = unsafe { behind(srq) }?;
        if Arc::strong_count(known) > 1 {
            return Err(Errno::BUSY);
        }
        known.context.event_faces().remove_srq(known.queue.number());
        // SAFETY: as above; it is not used any more.
        drop(unsafe { take(srq) });
        Ok(())
    })
}

/// The group of a `union ibv_gid`.
///
/// # Safety
/// NULL, or the program's.
unsafe fn group(gid: *const IbvGid) -> Result<Gid, Errno> {
    // SAFETY: as above.
    Ok(Gid(u128::from_be_bytes(unsafe { read(gid) }?.raw)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_attach_mcast(qp: *mut IbvQp, gid: *const IbvGid, _lid: u16) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        let (known, group) = (unsafe { inner(qp) }?, unsafe { group(gid) }?);
        Ok(known.qp.hca().attach_multicast(&known.qp, group)?)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_detach_mcast(qp: *mut IbvQp, gid: *const IbvGid, _lid: u16) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        let (known, group) = (unsafe { inner(qp) }?, unsafe { group(gid) }?);
        Ok(known.qp.hca().detach_multicast(&known.qp, group)?)
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
