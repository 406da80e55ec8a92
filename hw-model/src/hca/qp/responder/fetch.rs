//! Requests that are answered with more than an acknowledgement: RDMA reads, atomics, atomic writes and flushes (IBTA
//! volume 1, 9.4.4, 9.4.5, 9.7.5.1.5; A19.4).
//!
//! Atomics, atomic writes and flushes are carried out when they arrive, once: what they came to is kept for a peer that
//! asks again. A read is carried out as it is answered, and again if it is asked for again.

use super::Responder;
use super::answers::{Answer, Done, ReadJob};
use crate::addr::RegionAddr;
use crate::bus::AtomicOp;
use crate::hca::key::{Access, Caller, KeyViolation};
use crate::hca::pd::Pd;
use crate::hca::qp::queue::{Shared, WORD};
use crate::hca::qp::work::{Context, Dma, Marks, Next, Route, Work};
use crate::hca::translate::{Direction, Piece};
use crate::wire::{Feth, Header, Key, NakCode, Packet, Payload, Placement, Psn, Reth, Selectivity};

/// A request that is answered with more than an acknowledgement.
#[derive(Clone, Copy)]
pub(super) enum Fetch {
    Read(Reth),
    Atomic { key: Key, address: RegionAddr, op: AtomicOp },
    Write(Reth),
    Flush(Feth, Reth),
}

impl Fetch {
    pub(super) fn of(header: &Header) -> Option<Self> {
        match *header {
            Header::ReadRequest(reth) => Some(Self::Read(reth)),
            Header::CompareSwap(eth) => {
                let op = AtomicOp::CompareSwap { compare: eth.compare, swap: eth.swap_or_add };
                Some(Self::Atomic { key: eth.key, address: eth.address, op })
            }
            Header::FetchAdd(eth) => {
                let op = AtomicOp::FetchAdd(eth.swap_or_add);
                Some(Self::Atomic { key: eth.key, address: eth.address, op })
            }
            Header::AtomicWrite(reth) => Some(Self::Write(reth)),
            Header::Flush(feth, reth) => Some(Self::Flush(feth, reth)),
            _ => None,
        }
    }

    /// Sequence numbers that its answer takes.
    pub(super) fn packets(&self, route: &Route) -> u32 {
        match self {
            Self::Read(reth) => route.mtu.packets(reth.length),
            _ => 1,
        }
    }

    /// What the queue pair must allow (10.6.3.1, A19.4.1).
    fn right(&self) -> Access {
        match self {
            Self::Read(_) => Access::REMOTE_READ,
            Self::Atomic { .. } => Access::REMOTE_ATOMIC,
            Self::Write(_) => Access::REMOTE_WRITE,
            Self::Flush(feth, _) => {
                let global = feth.placement.contains(Placement::GLOBAL);
                let persistent = feth.placement.contains(Placement::PERSISTENT);
                let mut right = Access::empty();
                right.set(Access::FLUSH_GLOBAL, global);
                right.set(Access::FLUSH_PERSISTENT, persistent);
                right
            }
        }
    }

    /// Whether a responder can carry it out at all: words are aligned (9.4.5), and a flush says how far.
    fn is_sound(&self, payload: usize, most: u32) -> bool {
        match self {
            Self::Read(reth) => reth.length <= most,
            Self::Atomic { address, .. } => address.0.is_multiple_of(u64::from(WORD)),
            Self::Write(reth) => {
                reth.address.0.is_multiple_of(u64::from(WORD))
                    && reth.length == WORD
                    && payload == WORD as usize
            }
            Self::Flush(feth, _) => !feth.placement.is_empty(),
        }
    }
}

impl Responder {
    /// A new one.
    pub(super) fn fetch(
        &mut self,
        packet: &mut Packet,
        fetch: Fetch,
        route: &Route,
        shared: &Shared,
        context: &mut Context<'_>,
    ) -> Next {
        let (psn, caller) = (packet.psn, self.caller(shared));
        let most = context.device.config.limits.message_bytes;
        let in_order = self.message.is_none() && self.answers.len() < usize::from(self.depth);
        let allowed = self.access.contains(fetch.right()) && fetch.is_sound(packet.payload.len(), most);
        if !in_order || !allowed {
            self.refuse(NakCode::InvalidRequest, psn);
            return Next::Again;
        }
        match fetch {
            Fetch::Read(reth) => {
                if !may_read(&reth, caller, context) {
                    self.refuse(NakCode::RemoteAccess, psn);
                    return Next::Again;
                }
                self.answers.push_back(Answer::Read(ReadJob::new(psn, &reth, caller.pd)));
                self.executed(fetch.packets(route), true);
                Next::Again
            }
            Fetch::Flush(feth, reth) => {
                if !may_flush(feth, &reth, fetch.right(), caller, context) {
                    self.refuse(NakCode::RemoteAccess, psn);
                    return Next::Again;
                }
                // What was written before has been placed, in memory that all see: requests are carried out in order.
                self.remember(psn, Done::Nothing);
                self.executed(1, true);
                Next::Again
            }
            Fetch::Atomic { key, address, op } => {
                let payload = context.payload(WORD);
                self.word(
                    packet,
                    (key, address),
                    (Direction::Atomic(op), Access::REMOTE_ATOMIC),
                    (payload, caller.pd),
                    context,
                )
            }
            Fetch::Write(reth) => {
                let payload = std::mem::take(&mut packet.payload);
                let way = (Direction::Scatter, Access::REMOTE_WRITE);
                self.word(packet, (reth.key, reth.address), way, (payload, caller.pd), context)
            }
        }
    }

    fn word(
        &self,
        packet: &Packet,
        (key, address): (Key, RegionAddr),
        (direction, need): (Direction, Access),
        (payload, pd): (Payload, Pd),
        context: &mut Context<'_>,
    ) -> Next {
        context.pieces.clear();
        context.pieces.push(Piece { key, address, now: WORD, rest: u64::from(WORD) });
        let marks = Marks { ack_request: packet.ack_request, solicited: false };
        let work = Work::Place { header: packet.header, psn: packet.psn, marks, from: None };
        context.request(Dma { direction, need, pd, payload, work })
    }

    /// A word was changed.
    pub(super) fn fetched(&mut self, psn: Psn, fetch: &Fetch, context: &Context<'_>) {
        let payload = &context.dma.payload[..];
        context.counters.bytes_placed.add(payload.len() as u64);
        let before = payload.try_into().map_or(0, u64::from_le_bytes);
        let done = match fetch {
            Fetch::Atomic { .. } => Done::Word(before),
            _ => Done::Nothing,
        };
        self.remember(psn, done);
        self.executed(1, true);
    }

    fn remember(&mut self, psn: Psn, done: Done) {
        if self.done.len() >= usize::from(self.depth) {
            self.done.pop_front();
        }
        self.done.push_back((psn, done));
        self.answers.push_back(Answer::Done(psn, done));
    }

    /// One that was seen before: a read is carried out again, of the rest it is said again what they came to (9.7.5.1.5).
    pub(super) fn fetch_again(
        &mut self,
        psn: Psn,
        fetch: Fetch,
        route: &Route,
        caller: Caller,
        context: &mut Context<'_>,
    ) -> Next {
        context.counters.duplicates.add(1);
        let end = psn.offset(fetch.packets(route));
        let answer = match fetch {
            Fetch::Read(reth) => Some(Answer::Read(ReadJob::new(psn, &reth, caller.pd))),
            _ => self
                .done
                .iter()
                .rev()
                .find(|(seen, _)| *seen == psn)
                .map(|&(_, done)| Answer::Done(psn, done)),
        };
        // What reaches beyond what was asked before, or is not known any more, is forged, or is no repetition.
        let Some(answer) = answer.filter(|_| end.since(self.expected) <= 0) else {
            context.counters.packets_dropped.add(1);
            return Next::Again;
        };
        self.drop_answers(psn, route);
        self.settle_owed(end);
        if self.answers.len() >= usize::from(self.depth) {
            context.counters.packets_dropped.add(1);
            return Next::Again;
        }
        if let Fetch::Read(reth) = fetch {
            let most = context.device.config.limits.message_bytes;
            if !self.access.contains(Access::REMOTE_READ) || reth.length > most {
                self.refuse(NakCode::InvalidRequest, psn);
                return Next::Again;
            }
            if !may_read(&reth, caller, context) {
                self.refuse(NakCode::RemoteAccess, psn);
                return Next::Again;
            }
        }
        self.answers.push_back(answer);
        Next::Again
    }
}

/// The whole range of a read before its first response; without data the key is not looked at (9.4.4).
fn may_read(reth: &Reth, caller: Caller, context: &Context<'_>) -> bool {
    reth.length == 0 || authorize(reth, Access::REMOTE_READ, caller, context).is_ok()
}

fn may_flush(feth: Feth, reth: &Reth, right: Access, caller: Caller, context: &Context<'_>) -> bool {
    match authorize(reth, right, caller, context) {
        Ok(()) => true,
        // Which bytes does not matter where the whole region is meant.
        Err(KeyViolation::OutOfBounds) => feth.selectivity == Selectivity::Region,
        Err(_) => false,
    }
}

fn authorize(reth: &Reth, need: Access, caller: Caller, context: &Context<'_>) -> Result<(), KeyViolation> {
    let length = u64::from(reth.length);
    let checked =
        context.device.keys.with(reth.key, |target| target.authorize(caller, need, reth.address, length));
    checked?.map(|_| ())
}
