//! How packets get from one HCA to another. One trait: in-process, and whatever wraps or replaces it.
//!
//! A link may lose, duplicate and reorder; the transport (`hca::qp`) makes up for it. A link never blocks the sender
//! and never calls into an engine: it hands packets to the receiving HCA's [`Ingress`], which queues and wakes.

mod faulty;
mod loopback;
#[cfg(not(any(loom, shuttle)))]
mod nearby;
mod pcap;
mod planned;
mod roused;
#[cfg(not(any(loom, shuttle)))]
mod shm;
#[cfg(not(any(loom, shuttle)))]
mod turns;
#[cfg(not(any(loom, shuttle)))]
mod udp;

pub use faulty::{FaultyLink, LossCounts, LossRates, LossRule, PacketDirection, PacketKinds};
pub use loopback::{Fabric, FabricPort};
#[cfg(not(any(loom, shuttle)))]
pub use nearby::NearbyLink;
pub use pcap::PcapLink;
pub use planned::{OPCODES, POINTS as PLANNED_POINTS, PlannedLink, RECEIVE, SEND};
pub use roused::Roused;
#[cfg(not(any(loom, shuttle)))]
pub use shm::{OpenShmError, ShmConfig, ShmCounts, ShmLink};
#[cfg(not(any(loom, shuttle)))]
pub use udp::{OpenUdpError, UdpConfig, UdpCounts, UdpLink};

use crate::bus::DmaEpoch;
use crate::sync::Arc;
use crate::wire::{Gid, Packet, Payload, Qpn};

/// One port of a link, owned by one HCA.
pub trait Link: Send + Sync {
    /// This port's address.
    fn address(&self) -> Gid;

    /// All that packets for this port can be addressed to. The first is [`Link::address`].
    fn addresses(&self) -> Vec<Gid> {
        vec![self.address()]
    }

    /// The largest payload a packet may have.
    fn max_payload(&self) -> usize;

    /// Who takes the packets that arrive here. Called once by the HCA that owns the port.
    fn attach(&self, ingress: Arc<dyn Ingress>);

    /// Nobody takes packets here any more: what arrives is dropped. Called when the HCA goes.
    fn detach(&self);

    /// Room for `len` bytes of a packet of a connected service to `destination`, where that will find them: nobody on the way
    /// looks at them. `None`: they are copied when the packet is sent.
    fn room(&self, destination: Gid, len: usize) -> Option<Payload> {
        let _ = (destination, len);
        None
    }

    /// Sends a packet to `packet.destination`. Best effort, never blocks. It may wait for [`Link::flush`].
    fn send(&self, packet: Packet);

    /// What is sent to `group`, a multicast address, is to arrive here from now on.
    ///
    /// # Errors
    /// What the system said; [`std::io::ErrorKind::Unsupported`] of a link that has no groups.
    fn join(&self, group: Gid) -> std::io::Result<()> {
        let _ = group;
        Err(std::io::ErrorKind::Unsupported.into())
    }

    /// It is not, any more.
    fn part(&self, group: Gid) {
        let _ = group;
    }

    /// Whoever sent has no more at the moment: what waits goes out. Never blocks.
    fn flush(&self) {}

    /// Hands over what has arrived, on the calling thread. That is one that polls and will soon come again, so what arrives
    /// meanwhile need wake nobody. Never blocks.
    fn poll(&self) {}

    /// The calling thread polls no more for the moment: what arrives is to be handed over without it.
    fn rest(&self) {}

    /// What it has counted, by name: packets, and those that were dropped, by reason.
    fn named_counts(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    /// What queue pair `qp` of `peer` sends here met congestion on its way: it is to be told (A17.9.3).
    fn congested(&self, peer: Gid, qp: Qpn) {
        let _ = (peer, qp);
    }

    /// The HCA at `destination`, if it is in this process and packets get to it as they are, at once. Whoever has it leaves
    /// packets there itself, and sees to it that they are heard of.
    fn neighbour(&self, destination: Gid) -> Option<Arc<dyn Ingress>> {
        let _ = destination;
        None
    }

    /// Whether the HCA at `destination` takes loans on these terms, and packets get to it without anybody on the way
    /// looking at their bytes.
    fn takes_loans(&self, destination: Gid, terms: &LoanTerms<'_>) -> bool {
        let _ = (destination, terms);
        false
    }
}

/// What a lender and a borrower must have in common: then a packet can say where its bytes are instead of holding them.
#[derive(Clone, Copy, Debug)]
pub struct LoanTerms<'a> {
    /// The epoch of the memory that the bytes are in. The borrower's bursts keep its pages as the lender's would.
    pub epoch: &'a Arc<DmaEpoch>,
    /// Whether a burst of the lender's device is over within a step.
    pub whole_bursts: bool,
}

/// The receiving side of an HCA.
pub trait Ingress: Send + Sync {
    /// Queues a packet for the engine that serves its queue pair, and wakes that engine. Never blocks.
    fn deliver(&self, packet: Packet);

    /// Queues packets that arrived together. The calling thread may be made to run engines with them; it holds no lock that
    /// sending takes.
    fn deliver_all(&self, packets: &mut Vec<Packet>) {
        packets.drain(..).for_each(|packet| self.deliver(packet));
    }

    /// Queues a packet and wakes nobody: the engine with the number that this gives is to be run or woken.
    fn leave(&self, packet: Packet) -> usize {
        self.deliver(packet);
        0
    }

    /// Wakes engine `index` if it sleeps.
    fn wake(&self, index: usize) {
        let _ = index;
    }

    /// Runs engine `index` on the calling thread for up to `steps` steps, from which it takes what it used; or, where
    /// callers do not run engines, wakes it. Engines that it left packets for are added to `roused`. Never blocks.
    fn run(&self, index: usize, steps: &mut usize, roused: &mut Roused) {
        let _ = (steps, roused);
        self.wake(index);
    }

    /// Whether the bytes of packets of a connected service may still be in memory shared with another process, see
    /// [`Lot`](crate::wire::Lot): nobody looks at them before they are copied to their place.
    fn takes_lots(&self) -> bool {
        false
    }

    /// Where the state of queue pair `qpn` lies in the memory of this process, if that is known at the moment: for hints to the
    /// cache. Nothing is read there. Never blocks.
    fn whereabouts(&self, qpn: Qpn) -> Option<[usize; 2]> {
        let _ = qpn;
        None
    }

    /// Whether its engines fetch the bytes of packets on these terms.
    fn takes_loans(&self, terms: &LoanTerms<'_>) -> bool {
        let _ = terms;
        false
    }
}

impl<L: Link + ?Sized> Link for Arc<L> {
    fn address(&self) -> Gid {
        (**self).address()
    }
    fn addresses(&self) -> Vec<Gid> {
        (**self).addresses()
    }
    fn max_payload(&self) -> usize {
        (**self).max_payload()
    }
    fn attach(&self, ingress: Arc<dyn Ingress>) {
        (**self).attach(ingress);
    }
    fn detach(&self) {
        (**self).detach();
    }
    fn room(&self, destination: Gid, len: usize) -> Option<Payload> {
        (**self).room(destination, len)
    }
    fn send(&self, packet: Packet) {
        (**self).send(packet);
    }
    fn join(&self, group: Gid) -> std::io::Result<()> {
        (**self).join(group)
    }
    fn part(&self, group: Gid) {
        (**self).part(group);
    }
    fn flush(&self) {
        (**self).flush();
    }
    fn poll(&self) {
        (**self).poll();
    }
    fn rest(&self) {
        (**self).rest();
    }
    fn named_counts(&self) -> Vec<(&'static str, u64)> {
        (**self).named_counts()
    }
    fn congested(&self, peer: Gid, qp: Qpn) {
        (**self).congested(peer, qp);
    }
    fn neighbour(&self, destination: Gid) -> Option<Arc<dyn Ingress>> {
        (**self).neighbour(destination)
    }
    fn takes_loans(&self, destination: Gid, terms: &LoanTerms<'_>) -> bool {
        (**self).takes_loans(destination, terms)
    }
}
