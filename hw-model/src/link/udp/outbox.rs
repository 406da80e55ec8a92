//! What is to be sent: a lane a peer, so that one who must wait holds up nobody else.
//!
//! Packets are put into their lane under one lock, held for moments. They are taken out, written and handed to the kernel under
//! another, which is only ever tried: whoever finds it taken leaves his packets to the one who has it, who looks again after
//! he has let go of it.

use super::Shared;
use super::counts::add;
use super::rate::Rate;
use super::run::{Run, runs};
use super::sys::{Message, SendBuffers};
use crate::hca::Time;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::wire::{Flow, Gid, Head, Packet, Payload, Qpn, ROCE_PORT, Tail, gid_of};
use hashbrown::HashMap;
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::AsFd;

/// Packets that may wait in one lane.
const LANE: usize = 8192;
/// Packets handed to the kernel in one call.
const BATCH: usize = 64;
/// A peer is told of congestion at most once in this time (A17.9.3 leaves it open).
const NOTIFY_NS: u64 = 50_000;
/// ECN-capable transport (RFC 3168): routers may mark what we send instead of dropping it.
const ECN_CAPABLE: u8 = 2;
/// No deadline.
const NEVER: u64 = u64::MAX;

/// The way to one peer.
struct Lane {
    waiting: VecDeque<Datagram>,
    rate: Rate,
    notified_at: Option<Time>,
    active: bool,
}

/// What becomes one datagram.
struct Datagram {
    head: Head,
    payload: Payload,
    traffic_class: u8,
    hop_limit: u8,
}

impl Datagram {
    fn bytes(&self) -> usize {
        self.head.bytes().len() + Tail::bytes_after(self.payload.len()) + self.payload.len()
    }
}

#[derive(Default)]
struct Lanes {
    lanes: HashMap<Gid, Lane>,
    /// Those in which something waits.
    active: VecDeque<Gid>,
}

/// What the thread that sends works with.
#[derive(Default)]
struct Sender {
    batch: Vec<(Gid, Datagram)>,
    keys: Vec<((Gid, u8, u8), usize)>,
    runs: Vec<Run>,
    /// The datagrams as they go out, one after the other, and where each ends.
    bytes: Vec<u8>,
    ends: Vec<usize>,
    buffers: SendBuffers,
}

pub(super) struct Outbox {
    lanes: Mutex<Lanes>,
    sender: Mutex<Sender>,
    line_rate: u64,
    offload: AtomicBool,
    /// The socket is full.
    blocked: AtomicBool,
    /// When the first lane that is too fast may go on.
    due: AtomicU64,
}

impl Outbox {
    pub(super) fn new(line_rate: u64, offload: bool) -> Self {
        Self {
            lanes: Mutex::default(),
            sender: Mutex::default(),
            line_rate,
            offload: AtomicBool::new(offload),
            blocked: AtomicBool::new(false),
            due: AtomicU64::new(NEVER),
        }
    }

    pub(super) fn offloads(&self) -> bool {
        self.offload.load(Ordering::Relaxed)
    }

    /// Puts a packet into its lane.
    pub(super) fn put(&self, packet: Packet, shared: &Shared) {
        let head = Head::of(&packet);
        let Packet { destination, route, payload, .. } = packet;
        let (traffic_class, hop_limit) = (route.traffic_class, route.hop_limit);
        self.enter(destination, Datagram { head, payload, traffic_class, hop_limit }, shared);
    }

    fn enter(&self, to: Gid, datagram: Datagram, shared: &Shared) {
        let mut lanes = self.lanes.lock();
        let Lanes { lanes, active } = &mut *lanes;
        let lane = lanes.entry(to).or_insert_with(|| Lane::new(self.line_rate, shared.now()));
        if lane.waiting.len() >= LANE {
            add(&shared.counters.dropped, 1);
            return;
        }
        lane.waiting.push_back(datagram);
        if !lane.active {
            lane.active = true;
            active.push_back(to);
        }
    }

    /// Tells a peer's queue pair that what it sends meets congestion, unless it was told a moment ago.
    pub(super) fn notify(&self, peer: Gid, qp: Qpn, shared: &Shared) {
        let now = shared.now();
        let mut lanes = self.lanes.lock();
        let lane = lanes.lanes.entry(peer).or_insert_with(|| Lane::new(self.line_rate, now));
        if lane.notified_at.is_some_and(|at| now < at.after(NOTIFY_NS)) {
            return;
        }
        lane.notified_at = Some(now);
        drop(lanes);
        add(&shared.counters.notifications_sent, 1);
        let head = Head::congestion(qp);
        self.enter(peer, Datagram { head, payload: Payload::EMPTY, traffic_class: 0, hop_limit: 64 }, shared);
    }

    /// A peer says that what we send it meets congestion.
    pub(super) fn notified(&self, peer: Gid, now: Time) {
        // Nothing is made for one to whom we never sent.
        if let Some(lane) = self.lanes.lock().lanes.get_mut(&peer) {
            lane.rate.notified(now);
        }
    }

    /// When there is something to do again without anything new, and whether to wait for room in the socket.
    pub(super) fn waits(&self) -> (Option<Time>, bool) {
        let due = self.due.load(Ordering::SeqCst);
        ((due != NEVER).then_some(Time(due)), self.blocked.load(Ordering::SeqCst))
    }

    /// Sends what may go. True if the receive thread must be woken to send the rest.
    pub(super) fn flush(&self, shared: &Shared) -> bool {
        loop {
            if self.lanes.lock().active.is_empty() {
                return false;
            }
            let Some(mut sender) = self.sender.try_lock() else { return false };
            let waits_before = self.waits();
            self.due.store(NEVER, Ordering::SeqCst);
            self.blocked.store(false, Ordering::SeqCst);
            while self.fill(&mut sender.batch, shared.now()) {
                let sent = self.send(&mut sender, shared);
                if sent < sender.batch.len() {
                    self.blocked.store(true, Ordering::SeqCst);
                    self.put_back(&mut sender.batch, sent);
                    break;
                }
                sender.batch.clear();
            }
            drop(sender);
            let waits = self.waits();
            let waiting = waits != (None, false);
            if waiting || self.lanes.lock().active.is_empty() {
                return waiting && waits != waits_before;
            }
        }
    }

    /// Takes what may go now out of the lanes, in turns. False if there is nothing.
    fn fill(&self, batch: &mut Vec<(Gid, Datagram)>, now: Time) -> bool {
        let mut lanes = self.lanes.lock();
        let Lanes { lanes, active } = &mut *lanes;
        for _ in 0..active.len() {
            let Some(to) = active.pop_front() else { break };
            let Some(lane) = lanes.get_mut(&to) else { continue };
            while batch.len() < BATCH && !lane.waiting.is_empty() {
                if let Err(when) = lane.rate.admit(now) {
                    self.due.fetch_min(when.0, Ordering::SeqCst);
                    break;
                }
                let Some(datagram) = lane.waiting.pop_front() else { break };
                lane.rate.spend(datagram.bytes());
                batch.push((to, datagram));
            }
            lane.active = !lane.waiting.is_empty();
            if lane.active {
                active.push_back(to);
            }
        }
        !batch.is_empty()
    }

    /// Puts what was not sent back to the front of its lane.
    fn put_back(&self, batch: &mut Vec<(Gid, Datagram)>, sent: usize) {
        let mut lanes = self.lanes.lock();
        let Lanes { lanes, active } = &mut *lanes;
        for (to, datagram) in batch.drain(sent..).rev() {
            let Some(lane) = lanes.get_mut(&to) else { continue };
            lane.waiting.push_front(datagram);
            if !lane.active {
                lane.active = true;
                active.push_front(to);
            }
        }
        batch.clear();
    }

    /// Hands the batch to the kernel. How many of it are done with: fewer than all if the socket is full.
    fn send(&self, sender: &mut Sender, shared: &Shared) -> usize {
        let Sender { batch, keys, runs: cut, bytes, ends, buffers } = sender;
        let key = |(to, datagram): &(Gid, Datagram)| (*to, datagram.traffic_class, datagram.hop_limit);
        keys.clear();
        keys.extend(batch.iter().map(|entry| (key(entry), entry.1.bytes())));
        let mut done = 0;
        // Once more from where the kernel said that it cannot cut.
        'cut: loop {
            runs(&keys[done..], self.offloads(), cut);
            write(&batch[done..], cut, shared, bytes, ends);
            let parts: Vec<IoSlice<'_>> = cut
                .iter()
                .map(|run| {
                    let from = run.members.start.checked_sub(1).map_or(0, |before| ends[before]);
                    IoSlice::new(&bytes[from..ends[run.members.end - 1]])
                })
                .collect();
            let messages: Vec<Message<'_>> = cut
                .iter()
                .zip(&parts)
                .map(|(run, part)| {
                    let (to, datagram) = &batch[done + run.members.start];
                    Message {
                        destination: SocketAddr::new(crate::wire::ip_of(*to), ROCE_PORT),
                        parts: std::slice::from_ref(part),
                        segment: (run.members.len() > 1).then_some(run.segment as u16),
                        traffic_class: datagram.traffic_class | ECN_CAPABLE,
                        hop_limit: datagram.hop_limit,
                    }
                })
                .collect();
            let mut next = 0;
            while next < messages.len() {
                add(&shared.counters.send_calls, 1);
                match buffers.send(shared.socket.as_fd(), &messages[next..]) {
                    Ok(count) => {
                        let packets = cut[next..next + count].iter().map(|run| run.members.len()).sum();
                        add(&shared.counters.sent, packets);
                        next += count;
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        return done + cut[next].members.start;
                    }
                    Err(error) if messages[next].segment.is_some() && cannot_cut(&error) => {
                        tracing::info!(%error, "the kernel does not cut datagrams; sending them one by one");
                        self.offload.store(false, Ordering::Relaxed);
                        done += cut[next].members.start;
                        continue 'cut;
                    }
                    Err(error) => {
                        tracing::debug!(%error, to = %messages[next].destination, "not sent");
                        add(&shared.counters.refused, cut[next].members.len());
                        next += 1;
                    }
                }
            }
            return batch.len();
        }
    }
}

/// Writes datagrams one after the other, so that the kernel copies a run in one piece. In three a datagram, each beginning
/// anywhere in a cache line, that takes half as long again, which is more than this copy within the cache does.
fn write(
    batch: &[(Gid, Datagram)],
    cut: &[Run],
    shared: &Shared,
    bytes: &mut Vec<u8>,
    ends: &mut Vec<usize>,
) {
    bytes.clear();
    ends.clear();
    let source = gid_of(shared.address);
    for run in cut {
        for (index, (to, datagram)) in batch[run.members.clone()].iter().enumerate() {
            bytes.extend_from_slice(datagram.head.bytes());
            let payload = bytes.len()..bytes.len() + datagram.payload.len();
            bytes.extend_from_slice(&datagram.payload);
            let flow = Flow::between(source, *to, ROCE_PORT);
            let tail = |flow| Tail::of(&flow, index as u16, &datagram.head, &bytes[payload]);
            let tail = flow.map_or(Tail::EMPTY, tail);
            bytes.extend_from_slice(tail.bytes());
            ends.push(bytes.len());
        }
    }
}

/// Whether an error of a run means that this kernel, or this interface, does not do UDP_SEGMENT.
fn cannot_cut(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EIO | libc::EOPNOTSUPP | libc::ENOPROTOOPT))
}

impl Lane {
    fn new(line_rate: u64, now: Time) -> Self {
        Self { waiting: VecDeque::new(), rate: Rate::new(line_rate, now), notified_at: None, active: false }
    }
}
