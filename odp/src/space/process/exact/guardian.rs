//! A small process that outlives the supervisor.
//!
//! Where nobody listens, filtered calls fail with ENOSYS: a program that this process execs, or a child that it leaves
//! behind, could not free memory. So before the filter is installed a process is forked that gets the listening descriptor
//! too, and waits. When this process is gone, or has exec'd, it lets every call pass, until no process is left that the
//! filter is on.
//!
//! It is no child of this process, so that nobody waits for it by mistake, and keeps nothing of it open.

use super::InstallError;
use super::sys::{self, Answer, Listener};
use crate::space::process::fork::NotInChildren;
use rustix::event::{PollFd, PollFlags};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use std::io::{IoSlice, IoSliceMut};

/// Our end of the connection to it. When no process holds one, its time has come.
pub(super) struct Guardian(OwnedFd);

impl Guardian {
    /// Forks it. The process has one thread.
    pub(super) fn fork() -> Result<Self, InstallError> {
        let system = |what| move |reason| InstallError::System { what, reason };
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(system("a socket to the guardian"))?;
        let child = sys::fork_alone().map_err(system("a process for the guardian"))?;
        let Some(child) = child else {
            drop(ours);
            match sys::fork_alone() {
                Ok(None) => guard(&theirs),
                Ok(Some(_)) => sys::exit(0),
                Err(_) => sys::exit(1),
            }
        };
        drop(theirs);
        if !sys::ended_well(child) {
            return Err(system("a process for the guardian")(Errno::AGAIN));
        }
        Ok(Self(ours))
    }

    /// Gives it the listening descriptor. From now on it stands ready. What this gives is to be kept for good.
    pub(super) fn hand_over(self, listener: Listener) -> Result<NotInChildren, Errno> {
        let fds = [listener.fd()];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        rustix::net::sendmsg(&self.0, &[IoSlice::new(&[1])], &mut control, SendFlags::empty())?;
        Ok(NotInChildren::new(self.0))
    }
}

/// What it does. It has no business but this, and nothing of the process that it was forked from.
fn guard(connection: &OwnedFd) -> ! {
    sys::leave_all_but(connection.as_fd());
    let Some(listener) = listener(connection) else { sys::exit(0) };
    // Somebody is there to answer, for as long as the connection has another end.
    while !has_ended(connection.as_fd(), PollFlags::empty()) {
        if has_ended(listener.fd(), PollFlags::empty()) {
            sys::exit(0);
        }
        let mut both =
            [connection.as_fd(), listener.fd()].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::empty()));
        let _ = rustix::event::poll(&mut both, None);
    }
    // The listener ends with the last process that is filtered.
    while !has_ended(listener.fd(), PollFlags::IN) {
        if let Ok(call) = sys::receive(listener) {
            sys::answer(listener, &call, Answer::Pass);
        }
    }
    sys::exit(0)
}

/// Waits until `fd` has ended or has one of `events`, if there are any to wait for; whether it has ended.
fn has_ended(fd: BorrowedFd<'_>, events: PollFlags) -> bool {
    let at_once = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut polled = [PollFd::from_borrowed_fd(fd, events)];
    let timeout = events.is_empty().then_some(&at_once);
    let _ = rustix::event::poll(&mut polled, timeout);
    polled[0].revents().intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL)
}

/// The listening descriptor, once there is one; `None` if there never will be.
fn listener(connection: &OwnedFd) -> Option<Listener> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let received = loop {
        match rustix::net::recvmsg(
            connection,
            &mut [IoSliceMut::new(&mut byte)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(Errno::INTR) => {}
            received => break received.ok()?,
        }
    };
    let message = (received.bytes > 0).then(|| control.drain().next()).flatten()?;
    match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next().map(Listener::keep),
        _ => None,
    }
}
