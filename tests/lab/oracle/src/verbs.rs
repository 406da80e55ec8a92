//! As much of libibverbs as the oracle needs: a device, regions, and pairs of connected queue pairs.
//!
//! Invariant of this file: every pointer in a struct here was given by libibverbs and is destroyed once, by `Drop`, after
//! everything made from it; each struct holds its parents by `Rc`, regions their memory too.
//!
//! Of rdma-sys, types and plain functions only: version 0.3.0 takes a fallback in every inline that goes through
//! `verbs_context`, because it compares `abi_compat` with a 32-bit all-ones.
#![allow(unsafe_code)]

use crate::memory::Memory;
use rdma_sys::*;
use std::ffi::CStr;
use std::io;
use std::mem::zeroed;
use std::ops::Range;
use std::ptr;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Access rights of a region, as in `enum ibv_access_flags`.
pub mod access {
    /// The device may write for its own queue pairs.
    pub const LOCAL_WRITE: u32 = 1;
    /// Peers may write.
    pub const REMOTE_WRITE: u32 = 2;
    /// Peers may read.
    pub const REMOTE_READ: u32 = 4;
    /// Peers may do atomics.
    pub const REMOTE_ATOMIC: u32 = 8;
    /// Pages are not pinned but faulted in.
    pub const ON_DEMAND: u32 = 64;
    /// Everything a peer can do.
    pub const ALL: u32 = LOCAL_WRITE | REMOTE_WRITE | REMOTE_READ | REMOTE_ATOMIC;
}

/// What the set-up fails with; the scenarios themselves never fail, they report.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No device of that name.
    #[error("no RDMA device {0}")]
    NoDevice(String),
    /// A call said no.
    #[error("{0}: {1}")]
    Call(&'static str, io::Error),
}

fn made<T>(call: &'static str, pointer: *mut T) -> Result<*mut T, Error> {
    if pointer.is_null() { Err(Error::Call(call, io::Error::last_os_error())) } else { Ok(pointer) }
}

/// libibverbs returns the error number itself where it does not return a pointer.
fn done(call: &'static str, code: i32) -> Result<(), Error> {
    if code == 0 { Ok(()) } else { Err(Error::Call(call, io::Error::from_raw_os_error(code))) }
}

/// An open device with the local address that connections use.
pub struct Device {
    context: *mut ibv_context,
    gid: ibv_gid,
    gid_index: u8,
}

impl Device {
    /// Opens a device by name.
    pub fn open(name: &str, gid_index: u8) -> Result<Rc<Self>, Error> {
        let mut count = 0;
        // SAFETY: the list is freed below, after the device was opened from it.
        let list = made("ibv_get_device_list", unsafe { ibv_get_device_list(&mut count) })?;
        let context = (0..count as usize)
            // SAFETY: the list has `count` entries.
            .map(|index| unsafe { *list.add(index) })
            .find(|device| {
                // SAFETY: an entry of the list, whose name is a string that lives as long.
                let its = unsafe { CStr::from_ptr(ibv_get_device_name(*device)) };
                its.to_bytes() == name.as_bytes()
            })
            // SAFETY: a device of the list, which is still there.
            .map(|device| unsafe { ibv_open_device(device) });
        // SAFETY: the list came from ibv_get_device_list and is not used again.
        unsafe { ibv_free_device_list(list) };
        let context = made("ibv_open_device", context.ok_or_else(|| Error::NoDevice(name.to_owned()))?)?;
        let mut device = Self { context, gid: ibv_gid { raw: [0; 16] }, gid_index };
        // SAFETY: the context is open and the result has room for a GID.
        done("ibv_query_gid", unsafe { ibv_query_gid(context, 1, gid_index.into(), &mut device.gid) })?;
        Ok(Rc::new(device))
    }
}

impl Device {
    /// The address of its port under the GID index it was opened with.
    pub fn gid(&self) -> [u8; 16] {
        // SAFETY: every byte of the union is initialised, as raw bytes.
        unsafe { self.gid.raw }
    }
}

/// The other end of a connection, and how to talk to it.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// Its port.
    pub gid: [u8; 16],
    /// Its queue pair.
    pub number: u32,
    /// The first sequence number that it sends.
    pub psn: u32,
    /// The first sequence number that it expects.
    pub own_psn: u32,
    /// Bytes of payload in a full packet: a value of `enum ibv_mtu`.
    pub mtu: u32,
    /// How often a request that is refused because nobody is ready is tried again.
    pub rnr_retry: u8,
}

/// The value of `enum ibv_mtu` for so many bytes.
pub fn mtu(bytes: u32) -> u32 {
    match bytes {
        ..512 => ibv_mtu::IBV_MTU_256,
        512..1024 => ibv_mtu::IBV_MTU_512,
        1024..2048 => ibv_mtu::IBV_MTU_1024,
        2048..4096 => ibv_mtu::IBV_MTU_2048,
        4096.. => ibv_mtu::IBV_MTU_4096,
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: all that was made from it held it alive.
        unsafe { ibv_close_device(self.context) };
    }
}

/// A protection domain.
pub struct Domain {
    pd: *mut ibv_pd,
    device: Rc<Device>,
}

impl Domain {
    /// Allocates one.
    pub fn new(device: &Rc<Device>) -> Result<Rc<Self>, Error> {
        // SAFETY: the context is open.
        let pd = made("ibv_alloc_pd", unsafe { ibv_alloc_pd(device.context) })?;
        Ok(Rc::new(Self { pd, device: Rc::clone(device) }))
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: regions and queue pairs held it alive.
        unsafe { ibv_dealloc_pd(self.pd) };
    }
}

/// A registered region over a part of a [`Memory`].
pub struct Region {
    mr: *mut ibv_mr,
    /// The bytes of `memory` that are registered.
    pub range: Range<usize>,
    /// What is registered.
    pub memory: Rc<Memory>,
    _domain: Rc<Domain>,
}

impl Region {
    /// `ibv_reg_mr` over a range of offsets, with flags of [`access`].
    pub fn new(
        domain: &Rc<Domain>,
        memory: &Rc<Memory>,
        range: Range<usize>,
        flags: u32,
    ) -> Result<Self, Error> {
        let address = (memory.address() + range.start as u64) as *mut _;
        // SAFETY: `Memory` is only ever reached by copies that may race with the device, and outlives the region.
        let mr = made("ibv_reg_mr", unsafe { ibv_reg_mr(domain.pd, address, range.len(), flags as i32) })?;
        Ok(Self { mr, range, memory: Rc::clone(memory), _domain: Rc::clone(domain) })
    }

    /// The key that work requests of our own use.
    pub fn lkey(&self) -> u32 {
        // SAFETY: a live region.
        unsafe { (*self.mr).lkey }
    }

    /// The key that peers use.
    pub fn rkey(&self) -> u32 {
        // SAFETY: a live region.
        unsafe { (*self.mr).rkey }
    }

    /// The address of the first byte of the region.
    pub fn address(&self) -> u64 {
        self.memory.address() + self.range.start as u64
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: made by ibv_reg_mr and deregistered here only.
        unsafe { ibv_dereg_mr(self.mr) };
    }
}

/// One operation, as in `enum ibv_wr_opcode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// RDMA write.
    Write,
    /// RDMA read.
    Read,
    /// Send into a posted receive.
    Send,
    /// Compare with the first, swap in the second.
    CompareSwap(u64, u64),
    /// Add.
    FetchAdd(u64),
}

/// A work request with one local piece.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// What to do.
    pub operation: Operation,
    /// Local address, length in bytes and key.
    pub local: (u64, u32, u32),
    /// Remote address and key; a send has none.
    pub remote: (u64, u32),
}

/// What came out of a completion queue.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// A value of `enum ibv_wc_status`.
    pub status: u32,
    /// A value of `enum ibv_wc_opcode`; means something only on success.
    pub opcode: u32,
    /// Bytes; means something only on success, and for receives and reads.
    pub byte_len: u32,
}

/// What became of a request.
#[derive(Debug)]
pub enum Answer {
    /// It completed, with success or not.
    Completed(Completion),
    /// No completion came.
    Nothing,
    /// `ibv_post_send` said no.
    NotPosted(io::Error),
}

/// A reliable-connected queue pair with a completion queue of its own.
pub struct Queue {
    qp: *mut ibv_qp,
    cq: *mut ibv_cq,
    domain: Rc<Domain>,
}

/// How many times a send into an empty receive queue is tried again: for ever.
pub const RNR_FOR_EVER: u8 = 7;

impl Queue {
    /// Two queue pairs of one domain, connected to each other. The first gives up after `rnr_retry` refusals.
    pub fn pair(domain: &Rc<Domain>, rnr_retry: u8) -> Result<(Self, Self), Error> {
        let (a, b) = (Self::new(domain)?, Self::new(domain)?);
        let peer = |number, rnr_retry| Peer {
            gid: domain.device.gid(),
            number,
            psn: 0,
            own_psn: 0,
            mtu: mtu(4096),
            rnr_retry,
        };
        a.connect(&peer(b.number(), rnr_retry))?;
        b.connect(&peer(a.number(), RNR_FOR_EVER))?;
        Ok((a, b))
    }

    /// A queue pair that is not connected yet.
    pub fn new(domain: &Rc<Domain>) -> Result<Self, Error> {
        let context = domain.device.context;
        // SAFETY: an open context; no channel and no user pointer.
        let cq = unsafe { ibv_create_cq(context, 16, ptr::null_mut(), ptr::null_mut(), 0) };
        let cq = made("ibv_create_cq", cq)?;
        // SAFETY: all zeros is a valid value of this C struct.
        let mut attributes: ibv_qp_init_attr = unsafe { zeroed() };
        attributes.send_cq = cq;
        attributes.recv_cq = cq;
        attributes.qp_type = ibv_qp_type::IBV_QPT_RC;
        attributes.sq_sig_all = 1;
        attributes.cap.max_send_wr = 8;
        attributes.cap.max_recv_wr = 8;
        attributes.cap.max_send_sge = 1;
        attributes.cap.max_recv_sge = 1;
        // SAFETY: a live domain and completion queue.
        match made("ibv_create_qp", unsafe { ibv_create_qp(domain.pd, &mut attributes) }) {
            Ok(qp) => Ok(Self { qp, cq, domain: Rc::clone(domain) }),
            Err(error) => {
                // SAFETY: nothing uses the queue yet.
                unsafe { ibv_destroy_cq(cq) };
                Err(error)
            }
        }
    }

    /// Its number.
    pub fn number(&self) -> u32 {
        // SAFETY: a live queue pair.
        unsafe { (*self.qp).qp_num }
    }

    /// From reset to ready-to-send (IB specification, volume 1, 11.2.5.2; `ibv_modify_qp(3)`).
    pub fn connect(&self, peer: &Peer) -> Result<(), Error> {
        use ibv_qp_attr_mask as Mask;
        // SAFETY: all zeros is a valid value of this C struct.
        let mut attributes: ibv_qp_attr = unsafe { zeroed() };
        let flags = access::REMOTE_READ | access::REMOTE_WRITE | access::REMOTE_ATOMIC;
        attributes.qp_state = ibv_qp_state::IBV_QPS_INIT;
        attributes.port_num = 1;
        attributes.qp_access_flags = flags;
        let init =
            Mask::IBV_QP_STATE | Mask::IBV_QP_PKEY_INDEX | Mask::IBV_QP_PORT | Mask::IBV_QP_ACCESS_FLAGS;
        self.modify(&mut attributes, init)?;

        attributes.qp_state = ibv_qp_state::IBV_QPS_RTR;
        attributes.path_mtu = peer.mtu;
        attributes.dest_qp_num = peer.number;
        attributes.rq_psn = peer.psn;
        attributes.max_dest_rd_atomic = 16;
        attributes.min_rnr_timer = 1;
        attributes.ah_attr.is_global = 1;
        attributes.ah_attr.port_num = 1;
        attributes.ah_attr.grh.dgid = ibv_gid { raw: peer.gid };
        attributes.ah_attr.grh.sgid_index = self.domain.device.gid_index;
        attributes.ah_attr.grh.hop_limit = 64;
        let receive = Mask::IBV_QP_STATE
            | Mask::IBV_QP_AV
            | Mask::IBV_QP_PATH_MTU
            | Mask::IBV_QP_DEST_QPN
            | Mask::IBV_QP_RQ_PSN
            | Mask::IBV_QP_MAX_DEST_RD_ATOMIC
            | Mask::IBV_QP_MIN_RNR_TIMER;
        self.modify(&mut attributes, receive)?;

        attributes.qp_state = ibv_qp_state::IBV_QPS_RTS;
        // 4.096 us * 2^17, about half a second: an emulated machine may be slow but must not give up.
        attributes.timeout = 17;
        attributes.retry_cnt = 7;
        attributes.rnr_retry = peer.rnr_retry;
        attributes.sq_psn = peer.own_psn;
        attributes.max_rd_atomic = 16;
        let send = Mask::IBV_QP_STATE
            | Mask::IBV_QP_TIMEOUT
            | Mask::IBV_QP_RETRY_CNT
            | Mask::IBV_QP_RNR_RETRY
            | Mask::IBV_QP_SQ_PSN
            | Mask::IBV_QP_MAX_QP_RD_ATOMIC;
        self.modify(&mut attributes, send)
    }

    fn modify(&self, attributes: &mut ibv_qp_attr, mask: ibv_qp_attr_mask) -> Result<(), Error> {
        // SAFETY: a live queue pair, and attributes for the whole call.
        done("ibv_modify_qp", unsafe { ibv_modify_qp(self.qp, attributes, mask.0 as i32) })
    }

    /// The state the device says the queue pair is in: a value of `enum ibv_qp_state`.
    pub fn state(&self) -> Result<u32, Error> {
        // SAFETY: all zeros is a valid value of this C struct.
        let mut attributes: ibv_qp_attr = unsafe { zeroed() };
        // SAFETY: likewise.
        let mut initial: ibv_qp_init_attr = unsafe { zeroed() };
        let mask = ibv_qp_attr_mask::IBV_QP_STATE.0 as i32;
        // SAFETY: a live queue pair, and room for both results.
        done("ibv_query_qp", unsafe { ibv_query_qp(self.qp, &mut attributes, mask, &mut initial) })?;
        Ok(attributes.qp_state)
    }

    /// Posts a work request and waits for its completion.
    pub fn run(&self, request: Request) -> Answer {
        match self.post(request) {
            Ok(()) => self.completion(),
            Err(error) => Answer::NotPosted(error),
        }
    }

    /// Posts a work request.
    ///
    /// # Errors
    /// What `ibv_post_send` said.
    pub fn post(&self, request: Request) -> io::Result<()> {
        let (address, length, lkey) = request.local;
        let mut piece = ibv_sge { addr: address, length, lkey };
        let (remote_addr, rkey) = request.remote;
        // SAFETY: all zeros is a valid value of this C struct.
        let mut work: ibv_send_wr = unsafe { zeroed() };
        work.sg_list = &mut piece;
        work.num_sge = 1;
        work.send_flags = ibv_send_flags::IBV_SEND_SIGNALED.0;
        let atomic = |compare_add, swap| wr_t { atomic: atomic_t { remote_addr, compare_add, swap, rkey } };
        let rdma = wr_t { rdma: rdma_t { remote_addr, rkey } };
        (work.opcode, work.wr) = match request.operation {
            Operation::Write => (ibv_wr_opcode::IBV_WR_RDMA_WRITE, rdma),
            Operation::Read => (ibv_wr_opcode::IBV_WR_RDMA_READ, rdma),
            Operation::Send => (ibv_wr_opcode::IBV_WR_SEND, rdma),
            Operation::CompareSwap(old, new) => (ibv_wr_opcode::IBV_WR_ATOMIC_CMP_AND_SWP, atomic(old, new)),
            Operation::FetchAdd(term) => (ibv_wr_opcode::IBV_WR_ATOMIC_FETCH_AND_ADD, atomic(term, 0)),
        };
        let mut bad = ptr::null_mut();
        // SAFETY: a live queue pair; the request and its piece are read before the call returns.
        match unsafe { ibv_post_send(self.qp, &mut work, &mut bad) } {
            0 => Ok(()),
            code => Err(io::Error::from_raw_os_error(code)),
        }
    }

    /// Posts a receive of `length` bytes at a local address.
    pub fn receive(&self, (addr, length, lkey): (u64, u32, u32)) -> Result<(), Error> {
        let mut piece = ibv_sge { addr, length, lkey };
        let mut work = ibv_recv_wr { wr_id: 0, next: ptr::null_mut(), sg_list: &mut piece, num_sge: 1 };
        let mut bad = ptr::null_mut();
        // SAFETY: as in `post`.
        done("ibv_post_recv", unsafe { ibv_post_recv(self.qp, &mut work, &mut bad) })
    }

    /// Waits for the next completion; none after half a minute is an answer too.
    pub fn completion(&self) -> Answer {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(30) {
            // SAFETY: all zeros is a valid value of this C struct.
            let mut found: ibv_wc = unsafe { zeroed() };
            // SAFETY: a live completion queue, and room for one completion.
            if unsafe { ibv_poll_cq(self.cq, 1, &mut found) } == 1 {
                let (status, opcode, byte_len) = (found.status, found.opcode, found.byte_len);
                return Answer::Completed(Completion { status, opcode, byte_len });
            }
            std::thread::yield_now();
        }
        Answer::Nothing
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: made by ibv_create_qp and destroyed here only.
        unsafe { ibv_destroy_qp(self.qp) };
        // SAFETY: the queue pair that used it is gone.
        unsafe { ibv_destroy_cq(self.cq) };
    }
}
