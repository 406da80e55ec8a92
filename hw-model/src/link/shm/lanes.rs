//! What is to be sent: a ring a peer, made when something is first sent to it.

use super::ring::{MAX_PAYLOAD, Writer};
use super::{LEFT, Shared, add, handshake, ring_bell};
use crate::sync::Mutex;
use crate::wire::{Gid, Head, Packet, Payload};
use hashbrown::HashMap;
use rustix::event::EventfdFlags;
use std::collections::VecDeque;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Packets that may wait for room in one ring.
const WAITING: usize = 8192;

/// Peers that are remembered as not there.
const MOST_ABSENT: usize = 1024;

/// After so long without anything to send, it is looked whether the peer is still the same. Shorter than any timeout.
const PAUSE: Duration = Duration::from_millis(5);

/// The way to one peer.
struct Lane {
    writer: Writer,
    stream: UnixStream,
    /// The bell that its reader sleeps at.
    bell: OwnedFd,
    waiting: VecDeque<Packet>,
    /// Something was written since its reader was last looked at.
    written: bool,
    used_at: Instant,
}

/// Who is sent to, and who was not there when he was looked for.
#[derive(Default)]
struct Ways {
    lanes: HashMap<Gid, Lane>,
    absent: HashMap<Gid, Instant>,
}

/// All of them.
pub(super) struct Lanes {
    lanes: Mutex<Ways>,
    ring_bytes: usize,
}

impl Lane {
    fn to(peer: Gid, ring_bytes: usize, shared: &Shared) -> io::Result<Self> {
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let (writer, file) = Writer::create(ring_bytes, bell.try_clone()?)?;
        let stream = handshake::offer(shared.address, peer, [&file, &bell, &shared.bell])?;
        Ok(Self { writer, stream, bell, waiting: VecDeque::new(), written: false, used_at: Instant::now() })
    }

    /// Whether the reader has gone: its end of the connection is closed.
    fn is_dead(&self) -> bool {
        match (&self.stream).read(&mut [0]) {
            Ok(0) => true,
            Ok(_) => false,
            Err(error) => error.kind() != io::ErrorKind::WouldBlock,
        }
    }

    /// Writes what fits. False if the ring holds nonsense.
    fn write(&mut self, shared: &Shared) -> bool {
        while let Some(packet) = self.waiting.front() {
            match self.writer.push(Head::of(packet).bytes(), &packet.payload) {
                Ok(true) => {}
                Ok(false) => return true,
                Err(broken) => {
                    tracing::warn!(%broken, "a peer is given up");
                    add(&shared.counters.broken);
                    return false;
                }
            }
            add(&shared.counters.sent);
            self.written = true;
            self.waiting.pop_front();
        }
        true
    }

    fn wake(&mut self, shared: &Shared) {
        if std::mem::take(&mut self.written) && self.writer.must_wake() {
            add(&shared.counters.bells);
            ring_bell(&self.bell);
        }
    }
}

impl Lanes {
    pub(super) fn new(ring_bytes: usize) -> Self {
        Self { lanes: Mutex::default(), ring_bytes }
    }

    pub(super) fn send(&self, packet: Packet, shared: &Shared) {
        if self.send_if_there(packet, shared, None).is_some() {
            add(&shared.counters.dropped);
        }
    }

    /// Room for a payload to a peer who is sent to already.
    pub(super) fn room(&self, peer: Gid, len: usize) -> Option<Payload> {
        let mut ways = self.lanes.lock();
        let lane = ways.lanes.get_mut(&peer)?;
        let now = Instant::now();
        // Nothing overtakes what waits; and after a pause it is looked first whether the peer is still the same.
        let free = lane.waiting.is_empty() && now.duration_since(lane.used_at) <= PAUSE;
        if !free || !(LEFT..=MAX_PAYLOAD).contains(&len) {
            return None;
        }
        lane.used_at = now;
        lane.writer.room(len).ok().flatten()
    }

    /// Sends to a peer that is there, and gives the packet back if nobody is. One who was not there is not looked for again
    /// before `again`.
    pub(super) fn send_if_there(
        &self,
        packet: Packet,
        shared: &Shared,
        again: Option<Duration>,
    ) -> Option<Packet> {
        let peer = packet.destination;
        let mut packet = packet;
        if packet.payload.outside().is_some() {
            // It was written to the ring of the peer that was there then. Should that be gone, nobody misses it.
            let head = Head::of(&packet);
            let sent = packet.payload.send(head.bytes());
            add(if sent { &shared.counters.sent } else { &shared.counters.dropped });
            if let Some(lane) = self.lanes.lock().lanes.get_mut(&peer) {
                lane.written = true;
            }
            return None;
        }
        let mut ways = self.lanes.lock();
        let Ways { lanes, absent } = &mut *ways;
        let now = Instant::now();
        // What is sent again comes after a pause: by then the peer may be another one.
        if let Some(lane) = lanes.get_mut(&peer)
            && now.duration_since(std::mem::replace(&mut lane.used_at, now)) > PAUSE
            && lane.is_dead()
        {
            lanes.remove(&peer);
        }
        if !lanes.contains_key(&peer) {
            if let (Some(again), Some(at)) = (again, absent.get(&peer))
                && now.duration_since(*at) < again
            {
                return Some(packet);
            }
            match Lane::to(peer, self.ring_bytes, shared) {
                Ok(lane) => {
                    absent.remove(&peer);
                    if lanes.is_empty() {
                        // The receive thread sleeps without end while there is nobody who could go.
                        ring_bell(&shared.bell);
                    }
                    lanes.insert(peer, lane);
                }
                Err(error) => {
                    tracing::debug!(%error, ?peer, "nobody there");
                    if again.is_some() {
                        if absent.len() >= MOST_ABSENT {
                            absent.clear();
                        }
                        absent.insert(peer, now);
                    }
                    return Some(packet);
                }
            }
        }
        let Some(lane) = lanes.get_mut(&peer) else { return Some(packet) };
        if lane.waiting.len() >= WAITING || packet.payload.len() > MAX_PAYLOAD {
            add(&shared.counters.dropped);
            return None;
        }
        lane.waiting.push_back(packet);
        if !lane.write(shared) {
            lanes.remove(&peer);
        }
        None
    }

    /// Writes what waited for room, and wakes readers that sleep.
    pub(super) fn flush(&self, shared: &Shared) {
        self.lanes.lock().lanes.retain(|_, lane| {
            let whole = lane.write(shared);
            lane.wake(shared);
            whole
        });
    }

    /// Whether nobody is sent to.
    pub(super) fn are_none(&self) -> bool {
        self.lanes.lock().lanes.is_empty()
    }

    /// Forgets peers that have gone: what is sent to them next looks for whoever has their address then.
    pub(super) fn forget_dead(&self) {
        self.lanes.lock().lanes.retain(|_, lane| !lane.is_dead());
    }
}
