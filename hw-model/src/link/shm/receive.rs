//! Reading the rings that were handed over; and the receive thread, which does when nobody else does, and sleeps when all
//! are empty.

use super::handshake::{self, Offer};
use super::ring::{Broken, Reader};
use super::{LEFT, Shared, add};
use crate::link::turns::{TURN, Watch};
use crate::sync::Arc;
use crate::sync::atomic::Ordering;
use crate::wire::{Gid, Malformed, Packet, Service, parse_parts};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Packets taken from one ring in its turn.
const A_TURN: usize = 16;
/// Looks at the rings before going to sleep: some microseconds, about what a wake costs.
const SPINS: usize = 200;
/// How often peers that have gone are looked for, while nothing else happens. Where nobody was sent to, never.
const LOOK: Duration = Duration::from_secs(1);

/// A ring that we read.
struct Incoming {
    from: Gid,
    reader: Reader,
    ends: Arc<Ends>,
    /// Its writer is not to be believed any more.
    broken: bool,
}

/// What the receive thread sleeps at.
struct Ends {
    stream: UnixStream,
    bell: OwnedFd,
}

/// The rings that are read, by whoever has the lock.
#[derive(Default)]
pub(super) struct Rings {
    incoming: Vec<Incoming>,
    arrived: Vec<Packet>,
}

impl Rings {
    /// Reads what is there and hands it over. Whether there was something.
    pub(super) fn turn(&mut self, shared: &Shared) -> bool {
        let mut some = false;
        let ingress = shared.ingress.lock().clone();
        let leave = ingress.as_ref().is_some_and(|ingress| ingress.takes_lots());
        for peer in self.incoming.iter_mut().filter(|peer| !peer.broken) {
            match read(peer, leave, shared, &mut self.arrived) {
                Ok(count) => some |= count > 0,
                Err(broken) => {
                    tracing::warn!(%broken, "a peer is given up");
                    add(&shared.counters.broken);
                    peer.broken = true;
                }
            }
        }
        if some {
            if let Some(ingress) = ingress {
                ingress.deliver_all(&mut self.arrived);
            }
            self.arrived.clear();
        }
        some
    }

    fn has_more(&self) -> bool {
        self.incoming.iter().any(|peer| peer.reader.has_more())
    }

    /// Announces that nobody reads until a bell rings, or that somebody does. Whether there is something all the same.
    fn set_asleep(&self, asleep: bool) -> bool {
        self.incoming.iter().fold(false, |more, peer| more | peer.reader.set_asleep(asleep))
    }
}

pub(super) fn run(shared: &Shared) {
    // Connections that have not said anything yet.
    let mut new = Vec::new();
    let mut watch = Watch::new(&shared.turns);
    while !shared.stop.load(Ordering::Acquire) {
        if watch.are_theirs(Instant::now()) {
            sleep(&mut new, shared, Some(TURN));
            shared.lanes.flush(shared);
            continue;
        }
        let mut rings = shared.rings.lock();
        rings.incoming.retain(|peer| !peer.broken);
        let some = rings.turn(shared);
        watch.has_read(some, Instant::now());
        if some {
            continue;
        }
        if (0..SPINS).any(|_| {
            std::hint::spin_loop();
            rings.has_more()
        }) {
            continue;
        }
        let more = rings.set_asleep(true);
        drop(rings);
        if !more && !shared.stop.load(Ordering::Acquire) {
            sleep(&mut new, shared, None);
        }
        shared.rings.lock().set_asleep(false);
        shared.lanes.flush(shared);
    }
}

fn read(
    peer: &mut Incoming,
    leave: bool,
    shared: &Shared,
    arrived: &mut Vec<Packet>,
) -> Result<usize, Broken> {
    let mut count = 0;
    while count < A_TURN
        && let Some(mut record) = peer.reader.next()?
    {
        count += 1;
        let parsed = parse_parts((peer.from, shared.address), record.head(), record.payload);
        match parsed {
            Ok(mut packet) => {
                // A datagram gets a header in front of it, and is copied anyway.
                let datagram = matches!(packet.service, Service::UnreliableDatagram(_));
                let left = if leave && !datagram && record.payload >= LEFT { record.leave() } else { None };
                packet.payload = left.unwrap_or_else(|| {
                    let mut payload = shared.pool.take(record.payload);
                    record.take(&mut payload);
                    payload
                });
                add(&shared.counters.received);
                arrived.push(packet);
            }
            Err(reason) => {
                record.skip();
                shared.counters.malformed.add(reason);
                tracing::debug!(%reason, "dropped");
            }
        }
    }
    if count > 0 && peer.reader.wake_writer() {
        add(&shared.counters.bells);
    }
    Ok(count)
}

/// Until a bell rings, somebody new comes, somebody goes, or the time is over.
fn sleep(new: &mut Vec<UnixStream>, shared: &Shared, time: Option<Duration>) {
    let ends: Vec<Arc<Ends>> =
        shared.rings.lock().incoming.iter().map(|peer| Arc::clone(&peer.ends)).collect();
    let mut sources =
        vec![PollFd::new(&shared.bell, PollFlags::IN), PollFd::new(&shared.listener, PollFlags::IN)];
    sources.extend(new.iter().map(|stream| PollFd::new(stream, PollFlags::IN)));
    sources.extend(ends.iter().map(|ends| PollFd::new(&ends.bell, PollFlags::IN)));
    sources.extend(ends.iter().map(|ends| PollFd::new(&ends.stream, PollFlags::IN)));
    let look = (!shared.lanes.are_none()).then_some(LOOK);
    let limit = time
        .or(look)
        .map(|limit| Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) });
    // Interrupted is as good as woken.
    let _ = poll(&mut sources, limit.as_ref());
    let events: Vec<bool> = sources.iter().map(|source| !source.revents().is_empty()).collect();
    drop(sources);
    if events.iter().all(|event| !event) {
        if time.is_none() {
            shared.lanes.forget_dead();
        }
        return;
    }
    let empty = |bell: &OwnedFd| {
        // Somebody may have emptied it already.
        let _ = rustix::io::read(bell, &mut [0; 8]);
    };
    if events[0] {
        empty(&shared.bell);
    }
    let (bells, streams) = events[2 + new.len()..].split_at(ends.len());
    for (ends, _) in ends.iter().zip(bells).filter(|(_, rung)| **rung) {
        empty(&ends.bell);
    }
    // A stream says nothing but that its peer has gone; what is left in the ring is still read first.
    let is_gone =
        |peer: &Incoming| ends.iter().zip(streams).any(|(ends, gone)| *gone && Arc::ptr_eq(ends, &peer.ends));
    let mut rings = shared.rings.lock();
    rings.incoming.retain(|peer| !is_gone(peer) || peer.reader.has_more());
    for stream in std::mem::take(new) {
        welcome(stream, new, &mut rings, shared);
    }
    while events[1]
        && let Ok((stream, _)) = shared.listener.accept()
    {
        welcome(stream, new, &mut rings, shared);
    }
}

/// Opens the ring that a new connection brought, once it has.
fn welcome(stream: UnixStream, new: &mut Vec<UnixStream>, rings: &mut Rings, shared: &Shared) {
    match handshake::take(stream) {
        Ok(Offer { stream, from, ring, reader_bell, writer_bell }) => {
            match Reader::open(&ring, writer_bell) {
                Ok(reader) => {
                    let ends = Arc::new(Ends { stream, bell: reader_bell });
                    rings.incoming.push(Incoming { from, reader, ends, broken: false });
                }
                Err(error) => {
                    tracing::warn!(%error, "a ring is refused");
                    add(&shared.counters.broken);
                }
            }
        }
        Err((error, stream)) if error.kind() == io::ErrorKind::WouldBlock => new.push(stream),
        Err((error, _)) => {
            tracing::warn!(%error, "a connection is refused");
            shared.counters.malformed.add(Malformed::Network);
        }
    }
}
