//! A program on the crate `rdma-sys`: a queue pair that is connected to itself and writes to its own memory.
//!
//! Unsafe island. Invariant: every pointer was given by libibverbs and lives until the program ends; the region's memory is
//! leaked, so it outlives every request.
#![allow(unsafe_code)]

use rdma_sys::*;
use std::error::Error;
use std::io;
use std::mem::zeroed;

const BYTES: usize = 4096;

fn made<T>(call: &str, pointer: *mut T) -> Result<*mut T, String> {
    if pointer.is_null() { Err(format!("{call}: {}", io::Error::last_os_error())) } else { Ok(pointer) }
}

fn done(call: &str, code: i32) -> Result<(), String> {
    if code == 0 { Ok(()) } else { Err(format!("{call}: {}", io::Error::from_raw_os_error(code))) }
}

fn main() -> Result<(), Box<dyn Error>> {
    // SAFETY: as this file says, for all calls of libibverbs here; structs of zeros are empty requests and attributes.
    unsafe { write_to_itself() }.map_err(Into::into)
}

/// # Safety
/// As this file says.
unsafe fn write_to_itself() -> Result<(), String> {
    let mut count = 0;
    // SAFETY: as this file says.
    let list = made("ibv_get_device_list", unsafe { ibv_get_device_list(&mut count) })?;
    if count == 0 {
        return Err("there is no RDMA device".to_owned());
    }
    // SAFETY: the list has an entry.
    let context = made("ibv_open_device", unsafe { ibv_open_device(*list) })?;
    // SAFETY: as this file says.
    let pd = made("ibv_alloc_pd", unsafe { ibv_alloc_pd(context) })?;
    let no_channel = std::ptr::null_mut();
    // SAFETY: as this file says.
    let cq =
        made("ibv_create_cq", unsafe { ibv_create_cq(context, 16, std::ptr::null_mut(), no_channel, 0) })?;
    let memory: &'static mut [u8] = Box::leak(vec![0; BYTES].into_boxed_slice());
    memory[..BYTES / 2].fill(0x5a);
    let (start, rights) = (memory.as_mut_ptr(), ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0);
    let rights = (rights | ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0) as i32;
    // SAFETY: as this file says.
    let mr = made("ibv_reg_mr", unsafe { ibv_reg_mr(pd, start.cast(), BYTES, rights) })?;
    // SAFETY: as this file says.
    let mut init: ibv_qp_init_attr = unsafe { zeroed() };
    (init.send_cq, init.recv_cq, init.qp_type) = (cq, cq, ibv_qp_type::IBV_QPT_RC);
    (init.cap.max_send_wr, init.cap.max_recv_wr, init.cap.max_send_sge, init.cap.max_recv_sge) = (4, 4, 1, 1);
    // SAFETY: as this file says.
    let qp = made("ibv_create_qp", unsafe { ibv_create_qp(pd, &mut init) })?;
    // SAFETY: as this file says.
    unsafe { connect_to_itself(context, qp) }?;

    let half = (BYTES / 2) as u32;
    // SAFETY: a region that is there.
    let (lkey, rkey) = unsafe { ((*mr).lkey, (*mr).rkey) };
    let mut sge = ibv_sge { addr: start as u64, length: half, lkey };
    // SAFETY: as this file says.
    let mut request: ibv_send_wr = unsafe { zeroed() };
    (request.wr_id, request.sg_list, request.num_sge) = (9, &mut sge, 1);
    request.opcode = ibv_wr_opcode::IBV_WR_RDMA_WRITE;
    request.send_flags = ibv_send_flags::IBV_SEND_SIGNALED.0;
    request.wr.rdma.remote_addr = start as u64 + u64::from(half);
    request.wr.rdma.rkey = rkey;
    let mut bad = std::ptr::null_mut();
    // SAFETY: as this file says.
    done("ibv_post_send", unsafe { ibv_post_send(qp, &mut request, &mut bad) })?;
    // SAFETY: as this file says.
    let mut completion: ibv_wc = unsafe { zeroed() };
    // SAFETY: as this file says.
    while unsafe { ibv_poll_cq(cq, 1, &mut completion) } == 0 {}
    if completion.status != ibv_wc_status::IBV_WC_SUCCESS || completion.wr_id != 9 {
        return Err(format!("request {}: status {}", completion.wr_id, completion.status));
    }
    // SAFETY: the device wrote to it before the completion, and does not any more.
    let landed = unsafe { std::slice::from_raw_parts(start, BYTES) };
    if landed.iter().any(|byte| *byte != 0x5a) {
        return Err("other bytes landed".to_owned());
    }
    println!("{half} bytes written");
    // SAFETY: each once, children first.
    unsafe {
        done("ibv_destroy_qp", ibv_destroy_qp(qp))?;
        done("ibv_dereg_mr", ibv_dereg_mr(mr))?;
        done("ibv_destroy_cq", ibv_destroy_cq(cq))?;
        done("ibv_dealloc_pd", ibv_dealloc_pd(pd))?;
        done("ibv_close_device", ibv_close_device(context))
    }
}

/// # Safety
/// As this file says.
unsafe fn connect_to_itself(context: *mut ibv_context, qp: *mut ibv_qp) -> Result<(), String> {
    use ibv_qp_attr_mask as mask;
    let mut gid = ibv_gid { raw: [0; 16] };
    // SAFETY: as this file says.
    done("ibv_query_gid", unsafe { ibv_query_gid(context, 1, 0, &mut gid) })?;
    // SAFETY: as this file says.
    let (mut attr, number): (ibv_qp_attr, u32) = unsafe { (zeroed(), (*qp).qp_num) };
    let change = |attr: &mut ibv_qp_attr, told: &[mask]| {
        let bits = told.iter().fold(mask::IBV_QP_STATE.0, |bits, one| bits | one.0);
        // SAFETY: as this file says.
        done("ibv_modify_qp", unsafe { ibv_modify_qp(qp, attr, bits as i32) })
    };
    (attr.qp_state, attr.port_num) = (ibv_qp_state::IBV_QPS_INIT, 1);
    attr.qp_access_flags = ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0;
    change(&mut attr, &[mask::IBV_QP_PKEY_INDEX, mask::IBV_QP_PORT, mask::IBV_QP_ACCESS_FLAGS])?;
    (attr.qp_state, attr.path_mtu, attr.dest_qp_num) =
        (ibv_qp_state::IBV_QPS_RTR, ibv_mtu::IBV_MTU_1024, number);
    (attr.max_dest_rd_atomic, attr.min_rnr_timer) = (1, 12);
    (attr.ah_attr.is_global, attr.ah_attr.port_num, attr.ah_attr.grh.dgid) = (1, 1, gid);
    change(
        &mut attr,
        &[
            mask::IBV_QP_AV,
            mask::IBV_QP_PATH_MTU,
            mask::IBV_QP_DEST_QPN,
            mask::IBV_QP_RQ_PSN,
            mask::IBV_QP_MAX_DEST_RD_ATOMIC,
            mask::IBV_QP_MIN_RNR_TIMER,
        ],
    )?;
    attr.qp_state = ibv_qp_state::IBV_QPS_RTS;
    (attr.timeout, attr.retry_cnt, attr.rnr_retry, attr.max_rd_atomic) = (14, 7, 7, 1);
    change(
        &mut attr,
        &[
            mask::IBV_QP_TIMEOUT,
            mask::IBV_QP_RETRY_CNT,
            mask::IBV_QP_RNR_RETRY,
            mask::IBV_QP_SQ_PSN,
            mask::IBV_QP_MAX_QP_RD_ATOMIC,
        ],
    )
}
