//! Where an engine's packets leave: into the mailbox of a peer in this process, or onto the link.

use crate::link::{Ingress, Link, Roused};
use crate::sync::Arc;
use crate::wire::{Gid, Packet};
use std::cell::{Cell, RefCell};

/// One engine's way out.
#[derive(Default)]
pub(super) struct Outbox {
    /// The peer that the last packet went to, so that the link is not asked for every packet.
    latest: RefCell<Option<(Gid, Arc<dyn Ingress>)>>,
    roused: RefCell<Roused>,
    /// Packets given to the link since it was last flushed.
    waiting: Cell<usize>,
}

impl Outbox {
    pub(super) fn send(&self, link: &dyn Link, packet: Packet) {
        let mut latest = self.latest.borrow_mut();
        if latest.as_ref().is_none_or(|(gid, _)| *gid != packet.destination) {
            *latest = link.neighbour(packet.destination).map(|peer| (packet.destination, peer));
        }
        match &*latest {
            Some((_, peer)) => {
                let index = peer.leave(packet);
                self.roused.borrow_mut().add(peer, index);
            }
            None => {
                self.waiting.set(self.waiting.get() + 1);
                link.send(packet);
            }
        }
    }

    /// Has the link send what it was given, if that is at least `least` packets.
    pub(super) fn flush(&self, link: &dyn Link, least: usize) {
        if self.waiting.get() >= least {
            self.waiting.set(0);
            link.flush();
        }
    }

    /// Those that are to hear of what was sent.
    pub(super) fn roused(&mut self) -> &mut Roused {
        self.roused.get_mut()
    }
}
