//! Packets between two processes of one host through memory that both have mapped.
//!
//! ```text
//!   engine --send--> ring of the peer (memfd) --bell (eventfd), if it sleeps--> receive thread: parse --> ingress
//! ```
//!
//! The semantics are those of [`UdpLink`](super::UdpLink): packets with their transport headers, lost if nobody is there, and
//! checked by the receiver for all that a hostile sender could do. There is no UDP and no ICRC, as memory loses no bits.
//!
//! **Who finds whom.** A port listens on an abstract socket that has its address in its name, as a UDP port has in its
//! own: the same network name space sees it, and nobody else. Who sends to an address for the first time makes a ring for
//! it and hands it over there, with the two bells; only processes of the same user are listened to.
//!
//! **Copies.** An engine that sends copies from its memory into the ring, and one that receives copies from there to the place:
//! packets say where their bytes are ([`Lot`](crate::wire::Lot)). Small ones, those that do not lie in one piece, and those of
//! receivers who look at them are copied once more.
//!
//! **Waking.** A reader that has nothing to read says so in the ring and sleeps; the writer that sees it rings once. A writer
//! that finds the ring full says so too, keeps what it has, and is rung when there is room.

mod handshake;
mod lanes;
mod receive;
mod ring;

use super::turns::Turns;
use super::{Ingress, Link};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Arc, Mutex, thread};
use crate::wire::{Gid, MalformedCounts, Packet, Payload, PayloadPool, Qpn, gid_of};
use lanes::Lanes;
use receive::Rings;
use rustix::event::EventfdFlags;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::time::Duration;

/// How to open a [`ShmLink`].
#[derive(Clone, Copy, Debug)]
pub struct ShmConfig {
    /// The address of the port. It need not be one of this host's.
    pub address: IpAddr,
    /// Bytes of the ring to each peer: a power of two from 256 KiB to 64 MiB.
    pub ring_bytes: usize,
}

impl ShmConfig {
    /// A port at `address` with rings of 512 KiB, which stay in the cache.
    #[must_use]
    pub fn at(address: IpAddr) -> Self {
        Self { address, ring_bytes: 512 << 10 }
    }
}

/// Why a link could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenShmError {
    /// Another process, or another device of this one, has the address.
    #[error("{address} is taken by another process of this host")]
    Taken {
        /// The address.
        address: IpAddr,
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

/// What a [`ShmLink`] has counted since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShmCounts {
    /// Packets put into a ring.
    pub sent: u64,
    /// Packets dropped because nobody has their address.
    pub dropped: u64,
    /// Packets received that were well formed.
    pub received: u64,
    /// Packets that were not, and were dropped.
    pub malformed: u64,
    /// Times that a sleeping peer was woken.
    pub bells: u64,
    /// Peers whose rings were closed because they held nonsense.
    pub broken: u64,
}

/// How soon one is looked for again who was not there: well before a packet that was lost is sent again.
const AGAIN: Duration = Duration::from_millis(20);
/// Payloads below this are copied into the ring and out of it: keeping count of their places costs more than the copy.
const LEFT: usize = 1024;
/// Payload buffers kept for reuse.
const BUFFERS: usize = 64;

/// A port of memory shared with other processes of this host.
pub struct ShmLink {
    shared: Arc<Shared>,
    receiver: Option<thread::JoinHandle<()>>,
}

/// What the receive thread and the senders share.
struct Shared {
    address: Gid,
    listener: UnixListener,
    /// Rung to wake the receive thread: by writers that have something for it, readers that made room, and ourselves.
    bell: OwnedFd,
    pool: Arc<PayloadPool>,
    ingress: Mutex<Option<Arc<dyn Ingress>>>,
    lanes: Lanes,
    rings: Mutex<Rings>,
    turns: Turns,
    counters: Counters,
    stop: AtomicBool,
}

#[derive(Default)]
struct Counters {
    sent: AtomicU64,
    dropped: AtomicU64,
    received: AtomicU64,
    bells: AtomicU64,
    broken: AtomicU64,
    malformed: MalformedCounts,
}

fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl ShmLink {
    /// Opens a port at an address.
    ///
    /// # Errors
    /// See [`OpenShmError`].
    pub fn open(config: &ShmConfig) -> Result<Self, OpenShmError> {
        let address = config.address;
        let resources = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => OpenShmError::Taken { address },
            _ => OpenShmError::Resources { address, source },
        };
        let gid = gid_of(address);
        let listener = handshake::listen(gid).map_err(resources)?;
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| resources(error.into()))?;
        let shared = Arc::new(Shared {
            address: gid,
            listener,
            bell,
            pool: PayloadPool::new(ring::MAX_PAYLOAD, BUFFERS),
            ingress: Mutex::new(None),
            lanes: Lanes::new(config.ring_bytes),
            rings: Mutex::default(),
            turns: Turns::default(),
            counters: Counters::default(),
            stop: AtomicBool::new(false),
        });
        let body = {
            let shared = Arc::clone(&shared);
            move || receive::run(&shared)
        };
        let receiver = thread::Builder::new().name("roce-shm".to_owned()).spawn(body).map_err(resources)?;
        Ok(Self { shared, receiver: Some(receiver) })
    }

    /// Sends to a peer of this host, or gives the packet back: nobody here has its address.
    pub(super) fn send_if_there(&self, packet: Packet) -> Option<Packet> {
        self.shared.lanes.send_if_there(packet, &self.shared, Some(AGAIN))
    }

    /// What was counted so far.
    #[must_use]
    pub fn counts(&self) -> ShmCounts {
        let Counters { sent, dropped, received, bells, broken, malformed } = &self.shared.counters;
        let [sent, dropped, received, bells, broken] =
            [sent, dropped, received, bells, broken].map(|counter| counter.load(Ordering::Relaxed));
        ShmCounts { sent, dropped, received, malformed: malformed.total(), bells, broken }
    }
}

impl Shared {
    fn ring_own_bell(&self) {
        ring_bell(&self.bell);
    }
}

/// Wakes whoever sleeps at this bell.
fn ring_bell(bell: &OwnedFd) {
    // It fails only when the counter is full, and then somebody is being woken already.
    let _ = rustix::io::write(bell, &1_u64.to_ne_bytes());
}

impl Link for ShmLink {
    fn address(&self) -> Gid {
        self.shared.address
    }
    fn max_payload(&self) -> usize {
        ring::MAX_PAYLOAD
    }
    fn attach(&self, ingress: Arc<dyn Ingress>) {
        *self.shared.ingress.lock() = Some(ingress);
    }
    fn detach(&self) {
        let gone = self.shared.ingress.lock().take();
        drop(gone);
    }
    fn room(&self, destination: Gid, len: usize) -> Option<Payload> {
        self.shared.lanes.room(destination, len)
    }
    fn send(&self, packet: Packet) {
        self.shared.lanes.send(packet, &self.shared);
    }
    fn flush(&self) {
        self.shared.lanes.flush(&self.shared);
    }
    fn poll(&self) {
        self.shared.turns.polled();
        if let Some(mut rings) = self.shared.rings.try_lock() {
            rings.turn(&self.shared);
        }
    }
    fn rest(&self) {
        if self.shared.turns.end() {
            self.shared.ring_own_bell();
        }
    }
    fn named_counts(&self) -> Vec<(&'static str, u64)> {
        let ShmCounts { sent, dropped, received, bells, broken, .. } = self.counts();
        let mut counts = vec![
            ("shm_sent", sent),
            ("shm_received", received),
            ("shm_bells", bells),
            ("shm_dropped_nobody_there", dropped),
            ("shm_dropped_broken", broken),
        ];
        counts.extend(self.shared.counters.malformed.named());
        counts
    }
    fn congested(&self, _peer: Gid, _qp: Qpn) {
        // Nothing here marks packets.
    }
}

impl Drop for ShmLink {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.ring_own_bell();
        // The receive thread may itself have run the engine that held the device last.
        if let Some(receiver) = self.receiver.take()
            && receiver.thread().id() != std::thread::current().id()
            && receiver.join().is_err()
        {
            tracing::error!("the receive thread of a shared-memory link panicked");
        }
    }
}

impl std::fmt::Debug for ShmLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShmLink")
            .field("address", &self.shared.address)
            .field("counts", &self.counts())
            .finish_non_exhaustive()
    }
}
