//! What the machine does without us: a stream of datagrams through the kernel, and a thread that wakes another.
//!
//! Unsafe island. Invariant: every pointer handed to the kernel leads to memory that is owned by the calling function until the
//! call has returned, with the length that stands beside it.
#![allow(unsafe_code)]

use crate::busy::{Busy, Flow};
use hw_model::sync::atomic::{AtomicBool, Ordering};
use hw_model::sync::thread;
use rustix::event::{EventfdFlags, eventfd};
use std::mem::{size_of, zeroed};
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// Bytes of a datagram, and datagrams that the kernel cuts from one message: what fits into an IP packet.
const DATAGRAM: usize = 4096;
const CUT: usize = 15;
/// Messages a call.
const BATCH: usize = 4;

fn set(socket: &UdpSocket, level: i32, option: i32, value: i32) {
    let length = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the value lives until the call has returned.
    let code =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), length) };
    assert_eq!(code, 0, "socket option {option}");
}

fn socket() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUF, 4 << 20);
    set(&socket, libc::SOL_SOCKET, libc::SO_SNDBUF, 4 << 20);
    socket
}

/// As many headers as there are parts, each with one.
fn headers(parts: &mut [libc::iovec]) -> Vec<libc::mmsghdr> {
    parts
        .iter_mut()
        .map(|part| {
            // SAFETY: all zeros is a valid value of this C struct.
            let mut header: libc::mmsghdr = unsafe { zeroed() };
            header.msg_hdr.msg_iov = part;
            header.msg_hdr.msg_iovlen = 1;
            header
        })
        .collect()
}

fn parts(bytes: &mut [u8], each: usize) -> Vec<libc::iovec> {
    let part = |chunk: &mut [u8]| libc::iovec { iov_base: chunk.as_mut_ptr().cast(), iov_len: chunk.len() };
    bytes.chunks_mut(each).map(part).collect()
}

/// What arrives of all that one thread can send another through the kernel.
pub fn stream(time: Duration) -> Flow {
    let (to, from) = (socket(), socket());
    set(&to, libc::SOL_UDP, libc::UDP_GRO, 1);
    set(&from, libc::SOL_UDP, libc::UDP_SEGMENT, DATAGRAM as i32);
    from.connect(to.local_addr().expect("an address")).expect("connected");
    to.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut bytes = vec![1; BATCH * CUT * DATAGRAM];
            let mut parts = parts(&mut bytes, CUT * DATAGRAM);
            let mut headers = headers(&mut parts);
            while !stop.load(Ordering::Relaxed) {
                // SAFETY: the headers lead to `parts` and `bytes`, which live on.
                let sent = unsafe { libc::sendmmsg(from.as_raw_fd(), headers.as_mut_ptr(), BATCH as u32, 0) };
                assert!(sent > 0, "{}", std::io::Error::last_os_error());
            }
        });
        let mut bytes = vec![0; (2 * BATCH) << 16];
        let mut parts = parts(&mut bytes, 1 << 16);
        let mut headers = headers(&mut parts);
        let count = headers.len() as u32;
        let (mut received, busy, begun) = (0, Busy::now(), Instant::now());
        while begun.elapsed() < time {
            let flags = libc::MSG_WAITFORONE;
            // SAFETY: the headers lead to `parts` and `bytes`, which live on; no time limit but the socket's.
            let taken = unsafe {
                libc::recvmmsg(to.as_raw_fd(), headers.as_mut_ptr(), count, flags, std::ptr::null_mut())
            };
            received += headers
                .iter()
                .take(taken.max(0) as usize)
                .map(|header| header.msg_len as usize)
                .sum::<usize>();
        }
        let flow = Flow::of(received as u64, begun, &busy);
        stop.store(true, Ordering::Relaxed);
        flow
    })
}

/// What one thread sleeps at and another rings.
pub struct Bell(OwnedFd);

impl Bell {
    pub fn new() -> Self {
        Self(eventfd(0, EventfdFlags::CLOEXEC).expect("an event"))
    }
    pub fn ring(&self) {
        rustix::io::write(&self.0, &1_u64.to_ne_bytes()).expect("rung");
    }
    pub fn wait(&self) {
        rustix::io::read(&self.0, &mut [0; 8]).expect("woken");
    }
}
