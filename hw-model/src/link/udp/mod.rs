//! RoCEv2 over a UDP socket of this process (annex A17): between processes, between hosts, and with devices of others.
//!
//! One link is one address, and port 4791 of it: on one host each device takes a loopback address of its own (127.0.0.2,
//! 127.0.0.3, ...). No privileges are needed.
//!
//! ```text
//!   engine --send--> lanes, one a peer --flush--> runs of equal datagrams --sendmmsg, UDP_SEGMENT--> kernel
//!   kernel --recvmmsg, UDP_GRO--> receive thread: ICRC, parse --> ingress, which may run the engine on this thread
//! ```
//!
//! **Sending** never blocks. What a step of an engine sent goes out when it is over, in one system call. A lane that is too
//! fast for its peer's congestion notifications, and everything once the socket is full, waits for the receive thread,
//! which sleeps until then.
//!
//! **What arrives** is hostile: see [`crate::wire`]. Through a socket nobody sees the IPv4 identification, which the ICRC covers.
//! We send 0 in it (an unconnected socket that asks for no fragments does), and the number of the segment where the kernel
//! cuts datagrams; a packet that was right with such a number was checked with all 32 bits, one that is right with another
//! number, as rdma_rxe's, with 16. [`UdpCounts`] tells them apart.

mod counts;
mod group;
mod outbox;
mod rate;
mod receive;
mod run;
mod sys;

pub use counts::UdpCounts;

use super::turns::Turns;
use super::{Ingress, Link};
use crate::hca::Time;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Arc, Mutex, thread};
use crate::wire::{Gid, Packet, PayloadPool, Qpn, ROCE_PORT, gid_of};
use counts::Counters;
use group::Group;
use outbox::Outbox;
use receive::Reader;
use rustix::event::EventfdFlags;
use socket2::{Domain, Protocol, Socket, Type};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

/// How to open a [`UdpLink`].
#[derive(Clone, Copy, Debug)]
pub struct UdpConfig {
    /// The address of the port.
    pub address: IpAddr,
    /// The largest payload of a packet: at most 4096, and what the interface of the address carries.
    pub max_payload: u32,
    /// Bytes a second to each peer, as long as nothing is congested.
    pub line_rate: u64,
    /// Whether the kernel may cut and join datagrams (UDP_SEGMENT, UDP_GRO), where it can.
    pub offload: bool,
}

impl UdpConfig {
    /// A port at `address`, as fast as it goes.
    #[must_use]
    pub fn at(address: IpAddr) -> Self {
        Self { address, max_payload: MAX_PAYLOAD, line_rate: 10 << 30, offload: true }
    }
}

/// The largest path MTU of RoCE (A16.3).
const MAX_PAYLOAD: u32 = 4096;
/// The smallest.
const MIN_PAYLOAD: u32 = 256;
/// What stands around the payload at most: base header, XRC, RDMA, immediate, ICRC; then UDP and IP.
const AROUND: u32 = 12 + 4 + 16 + 4 + 4 + 8;
/// What the socket may hold either way: what the kernel grants of it.
const SOCKET_BUFFER: usize = 4 << 20;
/// Payload buffers kept for reuse.
const BUFFERS: usize = 512;

/// Why a link could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenUdpError {
    /// The address is not one of this host, or another process has port 4791 of it.
    #[error("cannot have UDP port {ROCE_PORT} of {address}: {source}")]
    Bind {
        /// The address.
        address: IpAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The interface carries too little even for the smallest path MTU.
    #[error("the interface of {address} carries {mtu} bytes, {} are needed", MIN_PAYLOAD + AROUND + 20)]
    SmallMtu {
        /// The address.
        address: IpAddr,
        /// Of its interface.
        mtu: u32,
    },
    /// The system gave no socket, event or thread.
    #[error("no socket, event or thread for a link at {address}: {source}")]
    Resources {
        /// The address.
        address: IpAddr,
        /// What the system said.
        source: io::Error,
    },
}

/// A port of RoCEv2 over UDP.
pub struct UdpLink {
    shared: Arc<Shared>,
    receiver: Option<thread::JoinHandle<()>>,
}

/// What the receive thread and the senders share.
struct Shared {
    socket: Socket,
    /// Wakes the receive thread.
    bell: OwnedFd,
    groups: Mutex<Vec<Group>>,
    /// They are others than the receive thread knows.
    regroup: AtomicBool,
    address: IpAddr,
    max_payload: u32,
    pool: Arc<PayloadPool>,
    ingress: Mutex<Option<Arc<dyn Ingress>>>,
    outbox: Outbox,
    reader: Mutex<Reader>,
    turns: Turns,
    counters: Counters,
    stop: AtomicBool,
    origin: Instant,
}

impl UdpLink {
    /// Opens port 4791 of an address of this host.
    ///
    /// # Errors
    /// See [`OpenUdpError`].
    pub fn open(config: &UdpConfig) -> Result<Self, OpenUdpError> {
        let address = config.address;
        let resources = |source| OpenUdpError::Resources { address, source };
        let mut max_payload = config.max_payload.clamp(MIN_PAYLOAD, MAX_PAYLOAD);
        if let Some(mtu) = interface_mtu(address) {
            let around = AROUND + if address.is_ipv4() { 20 } else { 40 };
            let room = mtu.checked_sub(around).filter(|room| *room >= MIN_PAYLOAD);
            max_payload = max_payload.min(room.ok_or(OpenUdpError::SmallMtu { address, mtu })?);
        }
        // A path MTU is a power of two.
        let max_payload = 1 << max_payload.ilog2();
        let socket = Socket::new(Domain::for_address((address, 0).into()), Type::DGRAM, Some(Protocol::UDP))
            .map_err(resources)?;
        let offload = prepare(&socket, address, config.offload).map_err(resources)?;
        socket
            .bind(&SocketAddr::new(address, ROCE_PORT).into())
            .map_err(|source| OpenUdpError::Bind { address, source })?;
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| resources(error.into()))?;
        let shared = Arc::new(Shared {
            socket,
            bell,
            groups: Mutex::default(),
            regroup: AtomicBool::new(false),
            address,
            max_payload,
            pool: PayloadPool::new(MAX_PAYLOAD as usize, BUFFERS),
            ingress: Mutex::new(None),
            outbox: Outbox::new(config.line_rate.max(1), offload),
            reader: Mutex::new(Reader::new()),
            turns: Turns::default(),
            counters: Counters::default(),
            stop: AtomicBool::new(false),
            origin: Instant::now(),
        });
        let body = {
            let shared = Arc::clone(&shared);
            move || receive::run(&shared)
        };
        let receiver = thread::Builder::new().name("roce-udp".to_owned()).spawn(body).map_err(resources)?;
        Ok(Self { shared, receiver: Some(receiver) })
    }

    /// What was counted so far.
    #[must_use]
    pub fn counts(&self) -> UdpCounts {
        self.shared.counters.read()
    }

    /// Whether the kernel cuts what we send into datagrams.
    #[must_use]
    pub fn offloads(&self) -> bool {
        self.shared.outbox.offloads()
    }
}

/// Sets the options of a new socket. Whether the kernel can cut and join datagrams.
fn prepare(socket: &Socket, address: IpAddr, offload: bool) -> io::Result<bool> {
    let set = |level, option, value| sys::set_option(socket.as_fd(), level, option, value);
    socket.set_nonblocking(true)?;
    // As much as the system allows, which may be less.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
    if let IpAddr::V4(own) = address {
        // What goes to a group leaves here; a host without groups may refuse.
        let _ = socket.set_multicast_if_v4(&own);
        set(libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO)?;
        set(libc::IPPROTO_IP, libc::IP_RECVTOS, 1)?;
        set(libc::IPPROTO_IP, libc::IP_RECVTTL, 1)?;
    } else {
        socket.set_only_v6(true)?;
        set(libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO)?;
        set(libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 1)?;
        set(libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT, 1)?;
        // rdma_rxe sends no UDP checksum over IPv6 either; the ICRC covers more than it would.
        set(libc::SOL_UDP, libc::UDP_NO_CHECK6_RX, 1)?;
    }
    // An old kernel, or a sandbox's, has neither.
    Ok(offload && set(libc::SOL_UDP, libc::UDP_GRO, 1).is_ok())
}

/// The MTU of the interface that an address belongs to, if it can be found out.
fn interface_mtu(address: IpAddr) -> Option<u32> {
    let name = sys::interface_of(address)?;
    std::fs::read_to_string(format!("/sys/class/net/{name}/mtu")).ok()?.trim().parse().ok()
}

impl Shared {
    fn now(&self) -> Time {
        Time(self.origin.elapsed().as_nanos() as u64)
    }

    fn flush(&self) {
        if self.outbox.flush(self) {
            self.ring();
        }
    }

    /// Wakes the receive thread.
    fn ring(&self) {
        // It fails only when the counter is full, and then the thread is being woken already.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }
}

impl Link for UdpLink {
    fn address(&self) -> Gid {
        gid_of(self.shared.address)
    }
    fn max_payload(&self) -> usize {
        self.shared.max_payload as usize
    }
    fn attach(&self, ingress: Arc<dyn Ingress>) {
        *self.shared.ingress.lock() = Some(ingress);
    }
    fn detach(&self) {
        let gone = self.shared.ingress.lock().take();
        drop(gone);
    }
    fn send(&self, packet: Packet) {
        self.shared.outbox.put(packet, &self.shared);
    }
    fn join(&self, group: Gid) -> io::Result<()> {
        self.shared.join(group)
    }
    fn part(&self, group: Gid) {
        self.shared.part(group);
    }
    fn flush(&self) {
        self.shared.flush();
    }
    fn poll(&self) {
        self.shared.turns.polled();
        if let Some(mut reader) = self.shared.reader.try_lock() {
            reader.turn(&self.shared);
        }
    }
    fn rest(&self) {
        if self.shared.turns.end() {
            self.shared.ring();
        }
    }
    fn named_counts(&self) -> Vec<(&'static str, u64)> {
        let mut counts = self.counts().named();
        counts.extend(self.shared.counters.malformed.named());
        counts
    }
    fn congested(&self, peer: Gid, qp: Qpn) {
        self.shared.outbox.notify(peer, qp, &self.shared);
    }
}

impl Drop for UdpLink {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.ring();
        // The receive thread may itself have run the engine that held the device last.
        if let Some(receiver) = self.receiver.take()
            && receiver.thread().id() != std::thread::current().id()
            && receiver.join().is_err()
        {
            tracing::error!("the receive thread of a UDP link panicked");
        }
    }
}

impl std::fmt::Debug for UdpLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UdpLink")
            .field("address", &self.shared.address)
            .field("max_payload", &self.shared.max_payload)
            .field("counts", &self.counts())
            .finish_non_exhaustive()
    }
}
