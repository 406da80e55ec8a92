//! Many datagrams a system call, with what their IP headers say.
//!
//! What this file keeps: every pointer that the kernel is given leads to memory that lives, and is borrowed or owned here,
//! until the call has returned; every length is that of the memory it stands beside; and what the kernel wrote is read only
//! as far as it says it wrote.
#![allow(unsafe_code)]

use crate::sync::Arc;
use crate::wire::{PayloadPool, WholeBuffer};
use std::io::{self, IoSlice};
use std::mem::{size_of, zeroed};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

/// The largest content that a receive takes: the largest datagram there is, or that many joined by the kernel.
pub(super) const RECEIVE_BYTES: usize = 1 << 16;
/// Room for control messages: three numbers, each with its header.
const CONTROL_BYTES: usize = 128;

/// Bytes before the value of a control message: its length (8), level (4) and type (4), as in `struct cmsghdr`.
const CONTROL_HEADER: usize = size_of::<libc::cmsghdr>();
const _: () = assert!(CONTROL_HEADER == 16, "a 64-bit system");

/// Datagrams to one address, all of `segment` bytes but the last, which may be shorter.
#[derive(Debug)]
pub(super) struct Message<'a> {
    pub(super) destination: SocketAddr,
    /// Their contents, one after the other.
    pub(super) parts: &'a [IoSlice<'a>],
    /// Bytes of each datagram; `None` if there is only one.
    pub(super) segment: Option<u16>,
    pub(super) traffic_class: u8,
    pub(super) hop_limit: u8,
}

/// The kernel reads control messages as `usize` words.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; CONTROL_BYTES]);

/// Address, control messages and header of one message.
struct Slot {
    address: libc::sockaddr_storage,
    control: Control,
}

/// What is reused from call to call.
#[derive(Default)]
pub(super) struct SendBuffers {
    slots: Vec<Slot>,
    headers: Vec<libc::mmsghdr>,
}

// SAFETY: the pointers in the headers are made anew in every call, which has the buffers for itself.
unsafe impl Send for SendBuffers {}

impl SendBuffers {
    /// Sends, and says how many of the messages were taken: the others were not because of what a call for the first of them
    /// would say.
    pub(super) fn send(&mut self, socket: BorrowedFd<'_>, messages: &[Message<'_>]) -> io::Result<usize> {
        self.slots.clear();
        self.headers.clear();
        self.slots.reserve(messages.len());
        for message in messages {
            let (address, _) = raw_address(message.destination);
            self.slots.push(Slot { address, control: Control([0; CONTROL_BYTES]) });
        }
        for (slot, message) in self.slots.iter_mut().zip(messages) {
            // SAFETY: all zeros is a valid value of this C struct.
            let mut header: libc::mmsghdr = unsafe { zeroed() };
            header.msg_hdr.msg_name = ptr::from_mut(&mut slot.address).cast();
            header.msg_hdr.msg_namelen = raw_address(message.destination).1;
            // The kernel does not write through this pointer; it is mutable because the struct is used for receiving too.
            header.msg_hdr.msg_iov = message.parts.as_ptr().cast_mut().cast();
            header.msg_hdr.msg_iovlen = message.parts.len();
            let length = fill_control(&mut slot.control, message);
            header.msg_hdr.msg_control = slot.control.0.as_mut_ptr().cast();
            header.msg_hdr.msg_controllen = length;
            self.headers.push(header);
        }
        // SAFETY: as many headers as are said; names, controls and parts live in `slots` and `messages`, which are not
        // touched before the call returns.
        let sent = unsafe {
            libc::sendmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                self.headers.len() as u32,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(sent as usize) }
    }
}

/// Writes the control messages, and gives their length.
fn fill_control(control: &mut Control, message: &Message<'_>) -> usize {
    let mut at = 0;
    let mut put = |level: i32, kind: i32, value: &[u8]| {
        let length = CONTROL_HEADER + value.len();
        let message = &mut control.0[at..at + length];
        message[..8].copy_from_slice(&length.to_ne_bytes());
        message[8..12].copy_from_slice(&level.to_ne_bytes());
        message[12..16].copy_from_slice(&kind.to_ne_bytes());
        message[CONTROL_HEADER..].copy_from_slice(value);
        at += length.next_multiple_of(size_of::<usize>());
    };
    let (class, limit) = (i32::from(message.traffic_class), i32::from(message.hop_limit));
    if message.destination.is_ipv4() {
        put(libc::IPPROTO_IP, libc::IP_TOS, &class.to_ne_bytes());
        put(libc::IPPROTO_IP, libc::IP_TTL, &limit.to_ne_bytes());
    } else {
        put(libc::IPPROTO_IPV6, libc::IPV6_TCLASS, &class.to_ne_bytes());
        put(libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT, &limit.to_ne_bytes());
    }
    if let Some(segment) = message.segment {
        put(libc::SOL_UDP, libc::UDP_SEGMENT, &segment.to_ne_bytes());
    }
    at
}

fn raw_address(address: SocketAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    // SAFETY: all zeros is a valid value of this C struct.
    let mut storage: libc::sockaddr_storage = unsafe { zeroed() };
    match address {
        SocketAddr::V4(address) => {
            let raw = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: address.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address.ip().octets()) },
                sin_zero: [0; 8],
            };
            // SAFETY: a sockaddr_storage has room and alignment for every address.
            unsafe { ptr::from_mut(&mut storage).cast::<libc::sockaddr_in>().write(raw) };
            (storage, size_of::<libc::sockaddr_in>() as libc::socklen_t)
        }
        SocketAddr::V6(address) => {
            let raw = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: address.port().to_be(),
                sin6_flowinfo: address.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: address.ip().octets() },
                sin6_scope_id: address.scope_id(),
            };
            // SAFETY: likewise.
            unsafe { ptr::from_mut(&mut storage).cast::<libc::sockaddr_in6>().write(raw) };
            (storage, size_of::<libc::sockaddr_in6>() as libc::socklen_t)
        }
    }
}

fn address_of(storage: &libc::sockaddr_storage, length: libc::socklen_t) -> Option<SocketAddr> {
    let length = length as usize;
    match i32::from(storage.ss_family) {
        libc::AF_INET if length >= size_of::<libc::sockaddr_in>() => {
            // SAFETY: the family says what it is, and the kernel wrote all of it.
            let raw = unsafe { ptr::from_ref(storage).cast::<libc::sockaddr_in>().read() };
            let ip = Ipv4Addr::from(raw.sin_addr.s_addr.to_ne_bytes());
            Some(SocketAddrV4::new(ip, u16::from_be(raw.sin_port)).into())
        }
        libc::AF_INET6 if length >= size_of::<libc::sockaddr_in6>() => {
            // SAFETY: likewise.
            let raw = unsafe { ptr::from_ref(storage).cast::<libc::sockaddr_in6>().read() };
            let ip = Ipv6Addr::from(raw.sin6_addr.s6_addr);
            let port = u16::from_be(raw.sin6_port);
            Some(SocketAddrV6::new(ip, port, raw.sin6_flowinfo, raw.sin6_scope_id).into())
        }
        _ => None,
    }
}

/// What one receive took: one datagram, or several of one sender joined by the kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Received<'a> {
    pub(super) source: SocketAddr,
    pub(super) bytes: &'a [u8],
    /// Where they are, from its beginning on.
    pub(super) whole: &'a WholeBuffer,
    /// Bytes of each datagram, the last of which may be shorter.
    pub(super) segment: usize,
    /// More came than there was room for.
    pub(super) truncated: bool,
    pub(super) traffic_class: u8,
    pub(super) hop_limit: u8,
}

/// Room for what arrives.
pub(super) struct ReceiveBuffers {
    pool: Arc<PayloadPool>,
    wholes: Vec<WholeBuffer>,
    slots: Vec<Slot>,
    parts: Vec<libc::iovec>,
    headers: Vec<libc::mmsghdr>,
}

// SAFETY: the pointers in the headers and parts are made anew in every call, which has the buffers for itself.
unsafe impl Send for ReceiveBuffers {}

impl ReceiveBuffers {
    /// Room for `messages` receives at a time.
    pub(super) fn new(messages: usize) -> Self {
        // SAFETY: all zeros is a valid value of this C struct.
        let address: libc::sockaddr_storage = unsafe { zeroed() };
        let slots = (0..messages).map(|_| Slot { address, control: Control([0; CONTROL_BYTES]) }).collect();
        let (parts, headers) = (Vec::with_capacity(messages), Vec::with_capacity(messages));
        let pool = PayloadPool::new(RECEIVE_BYTES, 2 * messages);
        let wholes = (0..messages).map(|_| pool.take_whole()).collect();
        Self { pool, wholes, slots, parts, headers }
    }

    /// Takes what is there, without waiting. How many of them.
    pub(super) fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        self.parts.clear();
        self.headers.clear();
        for whole in &mut self.wholes {
            if whole.bytes_mut().is_none() {
                // Packets of the last time are still on their way.
                *whole = self.pool.take_whole();
            }
            let bytes = whole.bytes_mut().unwrap_or_default();
            self.parts.push(libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() });
        }
        for (slot, part) in self.slots.iter_mut().zip(&mut self.parts) {
            // SAFETY: all zeros is a valid value of this C struct.
            let mut header: libc::mmsghdr = unsafe { zeroed() };
            header.msg_hdr.msg_name = ptr::from_mut(&mut slot.address).cast();
            header.msg_hdr.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_hdr.msg_iov = part;
            header.msg_hdr.msg_iovlen = 1;
            header.msg_hdr.msg_control = slot.control.0.as_mut_ptr().cast();
            header.msg_hdr.msg_controllen = CONTROL_BYTES;
            self.headers.push(header);
        }
        // SAFETY: as many headers as are said; everything they point to is owned by `self` and not touched before the call
        // returns.
        let received = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                self.headers.len() as u32,
                libc::MSG_DONTWAIT,
                ptr::null_mut(),
            )
        };
        if received < 0 {
            self.headers.clear();
            return Err(io::Error::last_os_error());
        }
        self.headers.truncate(received as usize);
        Ok(received as usize)
    }

    /// What receive number `index` of the last call took; `None` if its sender has no address that we know.
    pub(super) fn get(&self, index: usize) -> Option<Received<'_>> {
        let header = self.headers.get(index)?;
        let slot = &self.slots[index];
        let length = (header.msg_len as usize).min(RECEIVE_BYTES);
        let whole = &self.wholes[index];
        let bytes = &whole.bytes()[..length];
        let source = address_of(&slot.address, header.msg_hdr.msg_namelen)?;
        let truncated = header.msg_hdr.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0;
        let mut received =
            Received { source, bytes, whole, segment: length, truncated, traffic_class: 0, hop_limit: 0 };
        read_control(&slot.control, header.msg_hdr.msg_controllen, &mut received);
        Some(received)
    }
}

/// Reads what the kernel said beside the bytes.
fn read_control(control: &Control, length: usize, received: &mut Received<'_>) {
    let control = &control.0[..length.min(CONTROL_BYTES)];
    let mut at = 0;
    while let Some((header, rest)) = control[at..].split_first_chunk::<CONTROL_HEADER>() {
        let (words, _) = header.as_chunks::<4>();
        let (length, _) = header.as_chunks::<8>();
        let length = usize::from_ne_bytes(length[0]);
        let (level, kind) = (i32::from_ne_bytes(words[2]), i32::from_ne_bytes(words[3]));
        let Some(value) = length.checked_sub(CONTROL_HEADER).and_then(|bytes| rest.get(..bytes)) else {
            return;
        };
        let byte = value.first().copied().unwrap_or_default();
        let number = value.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes));
        match (level, kind) {
            (libc::IPPROTO_IP, libc::IP_TOS) => received.traffic_class = byte,
            (libc::IPPROTO_IP, libc::IP_TTL) | (libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT) => {
                received.hop_limit = number.unwrap_or_default() as u8;
            }
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                received.traffic_class = number.unwrap_or_default() as u8;
            }
            (libc::SOL_UDP, libc::UDP_GRO) => {
                // No segment at all would have no end.
                received.segment = number.unwrap_or_default().max(1) as usize;
            }
            _ => {}
        }
        at = (at + length.next_multiple_of(size_of::<usize>())).min(control.len());
    }
}

/// Sets an option that is a number.
pub(super) fn set_option(socket: BorrowedFd<'_>, level: i32, option: i32, value: i32) -> io::Result<()> {
    let length = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the value has the length that is said, and is read before the call returns.
    let code =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, ptr::from_ref(&value).cast(), length) };
    if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The name of the interface whose network `address` is in, if there is one: the one with the longest prefix.
pub(super) fn interface_of(address: IpAddr) -> Option<String> {
    let mut list = ptr::null_mut();
    // SAFETY: the list is freed below, after it was read.
    if unsafe { libc::getifaddrs(&mut list) } != 0 {
        return None;
    }
    let mut best: Option<(u32, String)> = None;
    let mut entry = list;
    while !entry.is_null() {
        // SAFETY: an entry of the list, which is not freed yet.
        let interface = unsafe { &*entry };
        entry = interface.ifa_next;
        let Some(theirs) = ip_at(interface.ifa_addr) else { continue };
        let mask = ip_at(interface.ifa_netmask).map_or(u128::MAX, bits);
        let same = theirs.is_ipv4() == address.is_ipv4() && (bits(theirs) ^ bits(address)) & mask == 0;
        if same && best.as_ref().is_none_or(|(ones, _)| *ones < mask.count_ones()) {
            // SAFETY: the name of an entry is a string that lives as long as the list.
            let name = unsafe { std::ffi::CStr::from_ptr(interface.ifa_name) };
            best = Some((mask.count_ones(), name.to_string_lossy().into_owned()));
        }
    }
    // SAFETY: made by getifaddrs, and not used again.
    unsafe { libc::freeifaddrs(list) };
    best.map(|(_, name)| name)
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    }
}

/// The address at a pointer of the interface list.
fn ip_at(address: *const libc::sockaddr) -> Option<IpAddr> {
    if address.is_null() {
        return None;
    }
    // SAFETY: every address of the list begins with its family.
    match i32::from(unsafe { (*address).sa_family }) {
        libc::AF_INET => {
            // SAFETY: the family says what it is.
            let raw = unsafe { address.cast::<libc::sockaddr_in>().read_unaligned() };
            Some(Ipv4Addr::from(raw.sin_addr.s_addr.to_ne_bytes()).into())
        }
        libc::AF_INET6 => {
            // SAFETY: likewise.
            let raw = unsafe { address.cast::<libc::sockaddr_in6>().read_unaligned() };
            Some(Ipv6Addr::from(raw.sin6_addr.s6_addr).into())
        }
        _ => None,
    }
}
