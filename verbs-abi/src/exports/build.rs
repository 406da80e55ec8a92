//! Building requests call by call (ibv_wr_post(3)): the functions in `struct ibv_qp_ex`.
//!
//! Unsafe island. Invariant: the queue pair is one that this library gave; its `wr_id` and `wr_flags` are the program's to
//! set before each request. Lists are as long as the program says, and inline data is readable.
#![allow(unsafe_code)]

use super::post::{SEND_FLAGS, datagram};
use crate::abi::*;
use crate::errno::{Errno, code, value};
use crate::handle::{array, behind, read, zeros};
use crate::objects::{Qp, sge};
use hw_model::addr::RegionAddr;
use hw_model::hca::{Destination, Immediate, Key, Operation, PostError, Remote, Srqn};
use hw_model::sync::Arc;
use std::ffi::{c_int, c_void};
use std::mem::offset_of;

/// The functions, in a queue pair with nothing else in it.
pub(super) fn calls() -> IbvQpEx {
    IbvQpEx {
        wr_atomic_cmp_swp: Some(atomic_cmp_swp),
        wr_atomic_fetch_add: Some(atomic_fetch_add),
        wr_bind_mw: Some(bind_mw),
        wr_local_inv: Some(local_inv),
        wr_rdma_read: Some(rdma_read),
        wr_rdma_write: Some(rdma_write),
        wr_rdma_write_imm: Some(rdma_write_imm),
        wr_send: Some(send),
        wr_send_imm: Some(send_imm),
        wr_send_inv: Some(send_inv),
        wr_set_ud_addr: Some(set_ud_addr),
        wr_set_xrc_srqn: Some(set_xrc_srqn),
        wr_set_inline_data: Some(set_inline_data),
        wr_set_inline_data_list: Some(set_inline_data_list),
        wr_set_sge: Some(set_sge),
        wr_set_sge_list: Some(set_sge_list),
        wr_start: Some(start),
        wr_complete: Some(complete),
        wr_abort: Some(abort),
        wr_atomic_write: Some(atomic_write),
        ..zeros()
    }
}

/// Does something to a queue pair; these functions have no way to fail but by spoiling the batch.
///
/// # Safety
/// As this file says.
unsafe fn with(qp: *mut IbvQpEx, act: impl FnOnce(&Arc<Qp>) -> Result<(), Errno>) {
    value((), || {
        // SAFETY: as this file says.
        let known = unsafe { behind(qp) }?;
        if let Err(errno) = act(known) {
            known.building.batch().fail(errno);
        }
        Ok(())
    });
}

/// Begins a request that does `operation`.
///
/// # Safety
/// As this file says.
unsafe fn begin(qp: *mut IbvQpEx, operation: Operation) {
    let id = qp.wrapping_byte_add(offset_of!(IbvQpEx, wr_id)).cast::<u64>();
    let flags = qp.wrapping_byte_add(offset_of!(IbvQpEx, wr_flags)).cast::<u32>();
    let act = |known: &Arc<Qp>| {
        // SAFETY: fields of a face of ours.
        let (id, flags) = (unsafe { read(id) }?, unsafe { read(flags) }?);
        known.building.batch().begin(id, flags & SEND_FLAGS, operation);
        Ok(())
    };
    // SAFETY: as this file says.
    unsafe { with(qp, act) };
}

fn remote(rkey: u32, address: u64) -> Remote {
    Remote { key: Key(rkey), address: RegionAddr(address) }
}

macro_rules! requests {
    ($($name:ident($($argument:ident: $ty:ty),*) = $operation:expr;)*) => {
        $(
            unsafe extern "C" fn $name(qp: *mut IbvQpEx $(, $argument: $ty)*) {
                // SAFETY: as this file says.
                unsafe { begin(qp, $operation) };
            }
        )*
    };
}

requests! {
    atomic_cmp_swp(rkey: u32, address: u64, compare: u64, swap: u64) =
        Operation::CompareSwap { remote: remote(rkey, address), compare, swap };
    atomic_fetch_add(rkey: u32, address: u64, add: u64) = Operation::FetchAdd { remote: remote(rkey, address), add };
    local_inv(rkey: u32) = Operation::Invalidate { key: Key(rkey) };
    rdma_read(rkey: u32, address: u64) = Operation::Read(remote(rkey, address));
    rdma_write(rkey: u32, address: u64) = Operation::Write(remote(rkey, address));
    rdma_write_imm(rkey: u32, address: u64, immediate: u32) =
        Operation::WriteImmediate(remote(rkey, address), Immediate(u32::from_be(immediate)));
    send() = Operation::Send;
    send_imm(immediate: u32) = Operation::SendImmediate(Immediate(u32::from_be(immediate)));
    send_inv(rkey: u32) = Operation::SendInvalidate(Key(rkey));
}

unsafe extern "C" fn atomic_write(qp: *mut IbvQpEx, rkey: u32, address: u64, word: *const c_void) {
    // SAFETY: as this file says.
    unsafe { begin(qp, Operation::AtomicWrite(remote(rkey, address))) };
    // SAFETY: the program's 8 bytes.
    unsafe { set_inline_data(qp, word.cast_mut(), 8) };
}

unsafe extern "C" fn bind_mw(qp: *mut IbvQpEx, mw: *mut IbvMw, rkey: u32, info: *const IbvMwBindInfo) {
    let operation = || {
        // SAFETY: the program's struct.
        let info = unsafe { read(info) }?;
        // SAFETY: a window and a region that this library gave.
        unsafe { super::window::bind_operation(mw, rkey, &info) }
    };
    match operation() {
        // SAFETY: as this file says.
        Ok(operation) => unsafe { begin(qp, operation) },
        // SAFETY: as this file says.
        Err(errno) => unsafe { with(qp, |_| Err(errno)) },
    }
}

unsafe extern "C" fn set_ud_addr(qp: *mut IbvQpEx, ah: *mut IbvAh, qpn: u32, qkey: u32) {
    let act = |known: &Arc<Qp>| {
        // SAFETY: a handle that this library gave.
        let destination = unsafe { datagram(ah, qpn, qkey) }?;
        known.building.batch().set_destination(destination);
        Ok(())
    };
    // SAFETY: as this file says.
    unsafe { with(qp, act) };
}

unsafe extern "C" fn set_xrc_srqn(qp: *mut IbvQpEx, number: u32) {
    let act = |known: &Arc<Qp>| {
        known.building.batch().set_destination(Destination::SharedQueue(Srqn(number)));
        Ok(())
    };
    // SAFETY: as this file says.
    unsafe { with(qp, act) };
}

unsafe extern "C" fn set_inline_data(qp: *mut IbvQpEx, start: *mut c_void, length: usize) {
    let act = |known: &Arc<Qp>| {
        // SAFETY: inline data is readable.
        known.building.batch().add_inline(unsafe { array(start.cast_const().cast::<u8>(), length) }?);
        Ok(())
    };
    // SAFETY: as this file says.
    unsafe { with(qp, act) };
}

unsafe extern "C" fn set_inline_data_list(qp: *mut IbvQpEx, count: usize, list: *const IbvDataBuf) {
    let act = |known: &Arc<Qp>| {
        // SAFETY: a list of the program's.
        for piece in unsafe { array(list, count) }? {
            // SAFETY: inline data is readable.
            let data = unsafe { array(piece.addr.cast_const().cast::<u8>(), piece.length) }?;
            known.building.batch().add_inline(data);
        }
        Ok(())
    };
    // SAFETY: as this file says.
    unsafe { with(qp, act) };
}

unsafe extern "C" fn set_sge(qp: *mut IbvQpEx, lkey: u32, address: u64, length: u32) {
    let act = |known: &Arc<Qp>| {
        known.building.batch().set_sges(std::iter::once(sge(address, length, lkey)));
        Ok(())
    };
    // SAFETY: as this file says.
    unsafe { with(qp, act) };
}

unsafe extern "C" fn set_sge_list(qp: *mut IbvQpEx, count: usize, list: *const IbvSge) {
    let act = |known: &Arc<Qp>| {
        // SAFETY: a list of the program's.
        let entries = unsafe { array(list, count) }?;
        let sges = entries.iter().map(|entry| sge(entry.addr, entry.length, entry.lkey));
        known.building.batch().set_sges(sges);
        Ok(())
    };
    // SAFETY: as this file says.
    unsafe { with(qp, act) };
}

unsafe extern "C" fn start(qp: *mut IbvQpEx) {
    let act = |known: &Arc<Qp>| {
        known.building.start();
        Ok(())
    };
    // SAFETY: as this file says.
    unsafe { with(qp, act) };
}

unsafe extern "C" fn complete(qp: *mut IbvQpEx) -> c_int {
    code(|| {
        // SAFETY: as this file says.
        let known = unsafe { behind(qp) }?;
        known.building.end(|batch| {
            let requests = batch.requests()?;
            known.qp.post_send_list(&requests).map_err(|(_, error)| match error {
                PostError::QueueFull { .. } => Errno::NOMEM,
                _ => Errno::INVAL,
            })
        })
    })
}

unsafe extern "C" fn abort(qp: *mut IbvQpEx) {
    let act = |known: &Arc<Qp>| {
        known.building.end(|_| ());
        Ok(())
    };
    // SAFETY: as this file says.
    unsafe { with(qp, act) };
}
