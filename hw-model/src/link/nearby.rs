//! UDP to whoever has an address, and shared memory to those who have it in a process of this host and user.
//!
//! Both are ports at one address. Asked for every packet is who listens at its destination: a peer that goes, or comes, is sent to
//! the other way from then on, and what passes what on the way is for the transport to put in order.

use super::{Ingress, Link, ShmLink, UdpLink};
use crate::sync::Arc;
use crate::sync::atomic::{AtomicU32, Ordering};
use crate::wire::{Gid, Packet, Payload, Qpn};

/// A UDP link, with shared memory to peers that are near.
#[derive(Debug)]
pub struct NearbyLink {
    far: UdpLink,
    near: ShmLink,
    polls: AtomicU32,
}

/// Polls of the rings, which cost next to nothing, for one of the socket, which is a system call.
const POLLS_A_CALL: u32 = 8;

impl NearbyLink {
    /// Of two ports at one address.
    ///
    /// # Panics
    /// If their addresses differ.
    #[must_use]
    pub fn new(far: UdpLink, near: ShmLink) -> Self {
        assert_eq!(far.address(), near.address(), "a device has one address");
        Self { far, near, polls: AtomicU32::new(0) }
    }

    /// The port that peers of this host are sent to through.
    #[must_use]
    pub fn near(&self) -> &ShmLink {
        &self.near
    }

    /// The port that the others are sent to through.
    #[must_use]
    pub fn far(&self) -> &UdpLink {
        &self.far
    }
}

impl Link for NearbyLink {
    fn address(&self) -> Gid {
        self.far.address()
    }
    fn max_payload(&self) -> usize {
        self.far.max_payload().min(self.near.max_payload())
    }
    fn attach(&self, ingress: Arc<dyn Ingress>) {
        self.far.attach(Arc::clone(&ingress));
        self.near.attach(ingress);
    }
    fn detach(&self) {
        self.far.detach();
        self.near.detach();
    }
    fn room(&self, destination: Gid, len: usize) -> Option<Payload> {
        self.near.room(destination, len)
    }
    fn send(&self, packet: Packet) {
        if let Some(packet) = self.near.send_if_there(packet) {
            self.far.send(packet);
        }
    }
    fn join(&self, group: Gid) -> std::io::Result<()> {
        self.far.join(group)
    }
    fn part(&self, group: Gid) {
        self.far.part(group);
    }
    fn flush(&self) {
        self.near.flush();
        self.far.flush();
    }
    fn poll(&self) {
        self.near.poll();
        if self.polls.fetch_add(1, Ordering::Relaxed).is_multiple_of(POLLS_A_CALL) {
            self.far.poll();
        }
    }
    fn rest(&self) {
        self.near.rest();
        self.far.rest();
    }
    fn named_counts(&self) -> Vec<(&'static str, u64)> {
        let mut counts = self.near.named_counts();
        for (name, count) in self.far.named_counts() {
            match counts.iter_mut().find(|(known, _)| *known == name) {
                Some((_, sum)) => *sum += count,
                None => counts.push((name, count)),
            }
        }
        counts
    }
    fn congested(&self, peer: Gid, qp: Qpn) {
        self.far.congested(peer, qp);
    }
}
