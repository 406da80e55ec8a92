//! The receive thread: reads every ring that was handed over, and sleeps when all are empty.

use super::handshake::{self, Offer};
use super::ring::{Broken, Reader};
use super::{Shared, add, ring_bell};
use crate::sync::atomic::Ordering;
use crate::wire::{Gid, Malformed, Packet, parse_parts};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

/// Packets taken from one ring in its turn.
const A_TURN: usize = 16;
/// Looks at the rings before going to sleep: a microsecond or two.
const SPINS: usize = 50;
/// How often peers that have gone are looked for, while nothing else happens.
const LOOK: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// A ring that we read.
struct Incoming {
    from: Gid,
    reader: Reader,
    stream: UnixStream,
    bell: OwnedFd,
    writer_bell: OwnedFd,
}

#[derive(Default)]
struct Peers {
    incoming: Vec<Incoming>,
    /// Connections that have not said anything yet.
    new: Vec<UnixStream>,
}

pub(super) fn run(shared: &Shared) {
    let mut peers = Peers::default();
    let mut arrived = Vec::new();
    while !shared.stop.load(Ordering::Acquire) {
        if turn(&mut peers, shared, &mut arrived) {
            continue;
        }
        if (0..SPINS).any(|_| {
            std::hint::spin_loop();
            peers.incoming.iter().any(|peer| peer.reader.has_more())
        }) {
            continue;
        }
        let more = peers.incoming.iter().fold(false, |more, peer| more | peer.reader.set_asleep(true));
        if !more && !shared.stop.load(Ordering::Acquire) {
            sleep(&mut peers, shared);
        }
        for peer in &peers.incoming {
            peer.reader.set_asleep(false);
        }
        shared.lanes.flush(shared);
    }
}

/// Reads what is there. Whether there was something.
fn turn(peers: &mut Peers, shared: &Shared, arrived: &mut Vec<Packet>) -> bool {
    let mut some = false;
    peers.incoming.retain_mut(|peer| match read(peer, shared, arrived) {
        Ok(count) => {
            some |= count > 0;
            true
        }
        Err(broken) => {
            tracing::warn!(%broken, "a peer is given up");
            add(&shared.counters.broken);
            false
        }
    });
    if some {
        let ingress = shared.ingress.lock().clone();
        if let Some(ingress) = ingress {
            ingress.deliver_all(arrived);
        }
        arrived.clear();
    }
    some
}

fn read(peer: &mut Incoming, shared: &Shared, arrived: &mut Vec<Packet>) -> Result<usize, Broken> {
    let mut count = 0;
    while count < A_TURN
        && let Some(record) = peer.reader.next()?
    {
        count += 1;
        let parsed = parse_parts((peer.from, shared.address), record.head(), record.payload);
        match parsed {
            Ok(mut packet) => {
                packet.payload = shared.pool.take(record.payload);
                record.take(&mut packet.payload);
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
    if count > 0 && peer.reader.must_wake() {
        add(&shared.counters.bells);
        ring_bell(&peer.writer_bell);
    }
    Ok(count)
}

/// Until a bell rings, somebody new comes, or somebody goes.
fn sleep(peers: &mut Peers, shared: &Shared) {
    let mut sources =
        vec![PollFd::new(&shared.bell, PollFlags::IN), PollFd::new(&shared.listener, PollFlags::IN)];
    sources.extend(peers.new.iter().map(|stream| PollFd::new(stream, PollFlags::IN)));
    sources.extend(peers.incoming.iter().map(|peer| PollFd::new(&peer.bell, PollFlags::IN)));
    sources.extend(peers.incoming.iter().map(|peer| PollFd::new(&peer.stream, PollFlags::IN)));
    // Interrupted is as good as woken.
    let _ = poll(&mut sources, Some(&LOOK));
    let events: Vec<bool> = sources.iter().map(|source| !source.revents().is_empty()).collect();
    drop(sources);
    if events.iter().all(|event| !event) {
        shared.lanes.forget_dead();
        return;
    }
    let empty = |bell: &OwnedFd| {
        // Somebody may have emptied it already.
        let _ = rustix::io::read(bell, &mut [0; 8]);
    };
    if events[0] {
        empty(&shared.bell);
    }
    let (waiting, rest) = (peers.new.len(), peers.incoming.len());
    let (bells, streams) = (2 + waiting..2 + waiting + rest, 2 + waiting + rest..);
    for (peer, _) in peers.incoming.iter().zip(&events[bells]).filter(|(_, rung)| **rung) {
        empty(&peer.bell);
    }
    // A stream says nothing but that its peer has gone; what is left in the ring is still read first.
    let mut gone = events[streams].iter();
    peers.incoming.retain(|peer| !gone.next().copied().unwrap_or(false) || peer.reader.has_more());
    for stream in std::mem::take(&mut peers.new) {
        welcome(stream, peers, shared);
    }
    while events[1]
        && let Ok((stream, _)) = shared.listener.accept()
    {
        welcome(stream, peers, shared);
    }
}

/// Opens the ring that a new connection brought, once it has.
fn welcome(stream: UnixStream, peers: &mut Peers, shared: &Shared) {
    match handshake::take(stream) {
        Ok(Offer { stream, from, ring, reader_bell, writer_bell }) => match Reader::open(&ring) {
            Ok(reader) => {
                peers.incoming.push(Incoming { from, reader, stream, bell: reader_bell, writer_bell })
            }
            Err(error) => {
                tracing::warn!(%error, "a ring is refused");
                add(&shared.counters.broken);
            }
        },
        Err((error, stream)) if error.kind() == io::ErrorKind::WouldBlock => peers.new.push(stream),
        Err((error, _)) => {
            tracing::warn!(%error, "a connection is refused");
            shared.counters.malformed.add(Malformed::Network);
        }
    }
}
