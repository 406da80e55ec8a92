//! How a ring gets to the process that reads it: over an abstract socket with the address in its name.

use crate::wire::Gid;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

/// What the first bytes are, with the version of the ring's layout.
const GREETING: [u8; 8] = *b"anypage1";
/// Files that come along: the ring, its reader's bell, its writer's bell.
const FILES: usize = 3;

fn name(address: Gid) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("anypage-roce-{:032x}", address.0))
}

/// Takes an address.
pub(super) fn listen(address: Gid) -> io::Result<UnixListener> {
    let listener = UnixListener::bind_addr(&name(address)?)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Hands a ring from one address to another, with both bells. The connection that is left ends when either side goes.
pub(super) fn offer(from: Gid, to: Gid, files: [&OwnedFd; FILES]) -> io::Result<UnixStream> {
    let stream = UnixStream::connect_addr(&name(to)?)?;
    check_user(&stream)?;
    stream.set_nonblocking(true)?;
    let files = files.map(AsFd::as_fd);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&files));
    let from = from.0.to_be_bytes();
    let parts = [IoSlice::new(&GREETING), IoSlice::new(&from)];
    rustix::net::sendmsg(&stream, &parts, &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(stream)
}

/// What somebody handed over.
pub(super) struct Offer {
    pub(super) stream: UnixStream,
    /// The address of the port that writes.
    pub(super) from: Gid,
    pub(super) ring: OwnedFd,
    /// The bell that its reader, we, sleeps at.
    pub(super) reader_bell: OwnedFd,
    /// The bell that its writer sleeps at.
    pub(super) writer_bell: OwnedFd,
}

/// Takes what comes over a new connection, if it has come.
///
/// # Errors
/// `WouldBlock` if nothing has come yet; anything else ends the connection.
pub(super) fn take(stream: UnixStream) -> Result<Offer, (io::Error, UnixStream)> {
    match receive(&stream) {
        Ok((from, [ring, reader_bell, writer_bell])) => {
            Ok(Offer { stream, from, ring, reader_bell, writer_bell })
        }
        Err(error) => Err((error, stream)),
    }
}

fn receive(stream: &UnixStream) -> io::Result<(Gid, [OwnedFd; FILES])> {
    check_user(stream)?;
    stream.set_nonblocking(true)?;
    let (mut greeting, mut from) = ([0; GREETING.len()], [0; size_of::<Gid>()]);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let length = {
        let mut parts = [IoSliceMut::new(&mut greeting), IoSliceMut::new(&mut from)];
        rustix::net::recvmsg(stream, &mut parts, &mut ancillary, flags)?.bytes
    };
    let mut files = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            files.extend(rights);
        }
    }
    if length != greeting.len() + from.len() || greeting != GREETING {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "another greeting"));
    }
    let files = files.try_into();
    let files = files.map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "another number of files"))?;
    Ok((Gid(u128::from_be_bytes(from)), files))
}

/// Whether the other end belongs to the same user: only such a process may share memory with this one.
fn check_user(stream: &UnixStream) -> io::Result<()> {
    let theirs = rustix::net::sockopt::socket_peercred(stream)?.uid;
    if theirs == rustix::process::geteuid() {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::PermissionDenied, "a process of another user"))
}
