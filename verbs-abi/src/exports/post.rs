//! Posting requests (ibv_post_send(3), ibv_post_recv(3)).
//!
//! Unsafe island. Invariant: a list of requests is one of the program's: each leads to the next or to NULL, and has as many
//! entries as it says. Inline data is readable. The operands that are read of a union are those of its opcode.
#![allow(unsafe_code)]

use super::queue;
use crate::abi::number::*;
use crate::abi::*;
use crate::errno::{Errno, code};
use crate::handle::{array, behind, read, write};
use crate::objects::{request, sge};
use hw_model::addr::RegionAddr;
use hw_model::hca::{
    Destination, Immediate, Key, Operation, PostError, QKey, Qpn, RecvRequest, Remote, SendRequest, Sge, Srqn,
};
use std::ffi::{c_int, c_uint};

/// More entries than any queue pair may have: a request with more is refused before it is looked at.
const MOST_SGES: usize = 64;

/// The entries of a request.
///
/// # Safety
/// As this file says.
unsafe fn entries<'a>(list: *const IbvSge, count: c_int) -> Result<&'a [IbvSge], Errno> {
    let count = usize::try_from(count).ok().filter(|count| *count <= MOST_SGES).ok_or(Errno::INVAL)?;
    // SAFETY: as this file says.
    unsafe { array(list, count) }
}

const EMPTY: Sge = Sge { key: Key(0), address: RegionAddr(0), length: 0 };

/// Our entries of C's.
fn convert<'a>(entries: &[IbvSge], room: &'a mut [Sge; MOST_SGES]) -> &'a [Sge] {
    for (slot, entry) in room.iter_mut().zip(entries) {
        *slot = sge(entry.addr, entry.length, entry.lkey);
    }
    &room[..entries.len()]
}

/// What a send request does.
///
/// # Safety
/// As this file says.
unsafe fn operation(wr: &IbvSendWr) -> Result<Operation, Errno> {
    let immediate = Immediate(u32::from_be(wr.imm_data));
    // SAFETY: every member of the union is integers and pointers, so that any bytes are a value of it.
    let rdma = unsafe { wr.wr.rdma };
    // SAFETY: as above.
    let atomic = unsafe { wr.wr.atomic };
    let remote = Remote { key: Key(rdma.rkey), address: RegionAddr(rdma.remote_addr) };
    let word = Remote { key: Key(atomic.rkey), address: RegionAddr(atomic.remote_addr) };
    Ok(match wr.opcode {
        IBV_WR_RDMA_WRITE => Operation::Write(remote),
        IBV_WR_RDMA_WRITE_WITH_IMM => Operation::WriteImmediate(remote, immediate),
        IBV_WR_SEND => Operation::Send,
        IBV_WR_SEND_WITH_IMM => Operation::SendImmediate(immediate),
        IBV_WR_RDMA_READ => Operation::Read(remote),
        IBV_WR_ATOMIC_CMP_AND_SWP => {
            Operation::CompareSwap { remote: word, compare: atomic.compare_add, swap: atomic.swap }
        }
        IBV_WR_ATOMIC_FETCH_AND_ADD => Operation::FetchAdd { remote: word, add: atomic.compare_add },
        IBV_WR_LOCAL_INV => Operation::Invalidate { key: Key(wr.imm_data) },
        IBV_WR_SEND_WITH_INV => Operation::SendInvalidate(Key(wr.imm_data)),
        IBV_WR_ATOMIC_WRITE => Operation::AtomicWrite(remote),
        IBV_WR_BIND_MW => {
            // SAFETY: the region and window are ones that this library gave.
            unsafe { super::window::bind_operation(wr.bind_mw.mw, wr.bind_mw.rkey, &wr.bind_mw.bind_info) }?
        }
        IBV_WR_TSO | IBV_WR_FLUSH => return Err(Errno::NOTSUPP),
        _ => return Err(Errno::INVAL),
    })
}

/// To whom a datagram goes.
///
/// # Safety
/// The handle is NULL or one that this library gave.
pub(super) unsafe fn datagram(ah: *mut IbvAh, qpn: u32, qkey: u32) -> Result<Destination, Errno> {
    // SAFETY: the contract of libibverbs.
    let to = unsafe { behind(ah) }?.handle.vector();
    Ok(Destination::Datagram { to, qpn: Qpn(qpn & 0xff_ffff), qkey: QKey(qkey) })
}

fn refused(error: PostError) -> Errno {
    match error {
        PostError::QueueFull { .. } => Errno::NOMEM,
        _ => Errno::INVAL,
    }
}

/// Posts one request.
///
/// # Safety
/// As this file says.
unsafe fn post_one(qp: *mut IbvQp, wr: &IbvSendWr, kind: c_int) -> Result<(), Errno> {
    // SAFETY: as this file says.
    let (known, entries) = (unsafe { queue::inner(qp) }?, unsafe { entries(wr.sg_list, wr.num_sge) }?);
    // SAFETY: as above.
    let operation = unsafe { operation(wr) }?;
    let mut room = [EMPTY; MOST_SGES];
    let mut gathered = Vec::new();
    let inline = wr.send_flags & IBV_SEND_INLINE != 0;
    let memory: (&[Sge], &[u8]) = if !inline {
        (convert(entries, &mut room), &[])
    } else {
        match entries {
            [one] => {
                // SAFETY: inline data is readable.
                (&[], unsafe {
                    array(std::ptr::with_exposed_provenance(one.addr as usize), one.length as usize)
                }?)
            }
            many => {
                for one in many {
                    let start = std::ptr::with_exposed_provenance(one.addr as usize);
                    // SAFETY: as above.
                    gathered.extend_from_slice(unsafe { array::<u8>(start, one.length as usize) }?);
                }
                (&[], &gathered)
            }
        }
    };
    let mut request: SendRequest<'_> = request(wr.wr_id, operation, wr.send_flags, memory);
    if kind == IBV_QPT_XRC_SEND {
        request.destination = Destination::SharedQueue(Srqn(wr.qp_type & 0xff_ffff));
    } else if kind == IBV_QPT_UD {
        // SAFETY: any bytes are a value of this member too.
        let ud = unsafe { wr.wr.ud };
        // SAFETY: as this file says.
        request.destination = unsafe { datagram(ud.ah, ud.remote_qpn, ud.remote_qkey) }?;
    }
    known.qp.post_send(&request).map_err(refused)
}

pub(super) unsafe extern "C" fn post_send(
    qp: *mut IbvQp,
    first: *mut IbvSendWr,
    bad: *mut *mut IbvSendWr,
) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        let kind = unsafe { read(qp) }?.qp_type;
        let mut next = first;
        while !next.is_null() {
            // SAFETY: as this file says.
            let wr = unsafe { read(next) }?;
            // SAFETY: as above.
            if let Err(error) = unsafe { post_one(qp, &wr, kind) } {
                // SAFETY: NULL, or the program's pointer.
                unsafe { write(bad, next) }?;
                return Err(error);
            }
            next = wr.next;
        }
        Ok(())
    })
}

/// Hands each receive of a list to `post`.
///
/// # Safety
/// As this file says.
unsafe fn post_receives(
    first: *mut IbvRecvWr,
    bad: *mut *mut IbvRecvWr,
    post: impl Fn(&RecvRequest<'_>) -> Result<(), PostError>,
) -> Result<(), Errno> {
    let mut next = first;
    while !next.is_null() {
        // SAFETY: as this file says.
        let wr = unsafe { read(next) }?;
        // SAFETY: as above.
        let posted = unsafe { entries(wr.sg_list, wr.num_sge) }.and_then(|entries| {
            let mut room = [EMPTY; MOST_SGES];
            post(&RecvRequest::new(wr.wr_id, convert(entries, &mut room))).map_err(refused)
        });
        if let Err(error) = posted {
            // SAFETY: NULL, or the program's pointer.
            unsafe { write(bad, next) }?;
            return Err(error);
        }
        next = wr.next;
    }
    Ok(())
}

pub(super) unsafe extern "C" fn post_recv(
    qp: *mut IbvQp,
    first: *mut IbvRecvWr,
    bad: *mut *mut IbvRecvWr,
) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        let known = unsafe { queue::inner(qp) }?;
        // SAFETY: as this file says.
        unsafe { post_receives(first, bad, |request| known.qp.post_recv(request)) }
    })
}

pub(super) unsafe extern "C" fn post_srq_recv(
    srq: *mut IbvSrq,
    first: *mut IbvRecvWr,
    bad: *mut *mut IbvRecvWr,
) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        let known = unsafe { behind(srq) }?;
        // SAFETY: as this file says.
        unsafe { post_receives(first, bad, |request| known.queue.post(request)) }
    })
}

/// The flags that a builder may set, so that nothing else is taken for one.
pub(super) const SEND_FLAGS: c_uint = IBV_SEND_FENCE | IBV_SEND_SIGNALED | IBV_SEND_SOLICITED;
