//! The responder: does what the peer asks, in order, and says so (IBTA volume 1, 9.7.4 and 9.7.5).
//!
//! The key, the bounds and the rights of a whole message are checked with its first packet, before a byte lands. Answers
//! leave in the order of the requests: acknowledgements wait for the reads before them, and are coalesced.

use super::core::{Context, Dma, Next, PageAt, Route, Work};
use super::queue::Shared;
use crate::addr::RegionAddr;
use crate::hca::config::HcaConfig;
use crate::hca::fault::{FaultKind, FaultOutcome, FaultToken, FaultWait};
use crate::hca::key::Access;
use crate::hca::time::Time;
use crate::hca::translate::{Direction, Obstacle, Piece};
use crate::wire::{Aeth, Header, Key, NakCode, Packet, Payload, Psn, Reth, RnrTimer, Syndrome};
use std::collections::VecDeque;

/// A write of several packets that has begun.
#[derive(Clone, Copy)]
struct Message {
    key: Key,
    next: RegionAddr,
    left: u32,
}

/// A read that is being answered.
struct ReadJob {
    psn: Psn,
    key: Key,
    next: RegionAddr,
    left: u32,
    begun: bool,
}

/// What the peer is told besides acknowledgements.
#[derive(Clone, Copy)]
enum Reply {
    NotReady(Psn),
    Refuse(NakCode, Psn),
}

/// A page that was missing for the request with this sequence number.
struct Fault {
    psn: Psn,
    /// `None` once the page may be there: the request has not come again yet.
    wait: Option<FaultWait>,
    /// The highest number of what was dropped behind it since it was last asked for.
    passed: Psn,
}

pub(super) struct Responder {
    expected: Psn,
    messages: u32,
    message: Option<Message>,
    reads: VecDeque<ReadJob>,
    reply: Option<Reply>,
    /// The peer wants to hear how far we are.
    acknowledge: bool,
    /// The peer knows that it must go back: what comes out of order until then is dropped without a word.
    nak_sent: bool,
    fault: Option<Fault>,
    /// The last number of the reads that were dropped for the peer to ask again: until it has, nothing behind is
    /// acknowledged, or the peer would take their answers for lost.
    owed: Option<Psn>,
    /// A refusal that ends the connection is waiting to be sent.
    closing: bool,
    rnr_timer: RnrTimer,
}

impl Responder {
    pub(super) fn new(expected: Psn, config: &HcaConfig) -> Self {
        Self {
            expected,
            messages: 0,
            message: None,
            reads: VecDeque::new(),
            reply: None,
            acknowledge: false,
            nak_sent: false,
            fault: None,
            owed: None,
            closing: false,
            rnr_timer: config.rnr_timer,
        }
    }

    /// Sends what is to be answered.
    pub(super) fn next(&mut self, route: &Route, context: &mut Context<'_>) -> Next {
        if let Some(job) = self.reads.front() {
            let bytes = route.mtu.bytes().min(job.left);
            let aeth = self.aeth(Syndrome::Ack);
            let header = match (!job.begun, bytes == job.left) {
                (true, true) => Header::ReadResponseOnly(aeth),
                (true, false) => Header::ReadResponseFirst(aeth),
                (false, false) => Header::ReadResponseMiddle,
                (false, true) => Header::ReadResponseLast(aeth),
            };
            if bytes == 0 {
                context.send(route, job.psn, false, header, Payload::EMPTY);
                self.reads.pop_front();
                return Next::Again;
            }
            context.pieces.clear();
            context.pieces.push(Piece {
                key: job.key,
                address: job.next,
                now: bytes,
                rest: u64::from(job.left),
            });
            return Next::Dma(Dma {
                direction: Direction::Gather,
                need: Access::REMOTE_READ,
                payload: context.payload(bytes),
                work: Work::Respond { header, psn: job.psn },
            });
        }
        let (psn, syndrome) = match self.reply.take() {
            Some(Reply::NotReady(psn)) => {
                context.counters.rnr_naks_sent.add(1);
                (psn, Syndrome::RnrNak(self.rnr_timer))
            }
            Some(Reply::Refuse(code, psn)) => {
                context.counters.naks_sent.add(1);
                // It acknowledges what lies before it.
                self.acknowledge = false;
                (psn, Syndrome::Nak(code))
            }
            None if self.acknowledge && self.owed.is_none() => {
                self.acknowledge = false;
                (self.expected.previous(), Syndrome::Ack)
            }
            None => return Next::Nothing,
        };
        let header = Header::Acknowledge(self.aeth(syndrome));
        context.send(route, psn, false, header, Payload::EMPTY);
        if self.closing { Next::Close } else { Next::Again }
    }

    /// A request that ends before `end` is here. Requests come in order: what is owed was asked again with it or before it,
    /// or was not needed any more.
    fn settle_owed(&mut self, end: Psn) {
        self.owed = self.owed.filter(|owed| end.since(*owed) <= 0);
    }

    /// Forgets the reads from `psn` on: the peer asks for them again.
    fn drop_reads(&mut self, psn: Psn, route: &Route) {
        let last = self.reads.back().map(|job| job.last(route)).filter(|last| last.since(psn) >= 0);
        self.reads.retain(|job| job.psn.since(psn) < 0 && !job.covers(psn, route));
        self.owed = match (self.owed, last) {
            (Some(owed), Some(last)) if last.since(owed) < 0 => Some(owed),
            (owed, last) => last.or(owed),
        };
    }

    fn aeth(&self, syndrome: Syndrome) -> Aeth {
        Aeth { syndrome, msn: self.messages & 0xff_ffff }
    }

    /// Takes a request packet.
    pub(super) fn receive(
        &mut self,
        packet: Packet,
        route: &Route,
        shared: &Shared,
        context: &mut Context<'_>,
    ) -> Next {
        let psn = packet.psn;
        let ahead = psn.since(self.expected);
        if self.closing || ahead > 0 {
            context.counters.packets_dropped.add(1);
            if !self.closing && !self.nak_sent {
                // One NAK a gap (9.7.4).
                self.nak_sent = true;
                self.reply = Some(Reply::Refuse(NakCode::SequenceError, self.expected));
            }
            return Next::Again;
        }
        let read = match packet.header {
            Header::ReadRequest(reth) => Some(reth),
            _ => None,
        };
        let packets = read.map_or(1, |reth| route.mtu.packets(reth.length));
        if let Some(gate) = self.fault_gate(psn, packets, context.now) {
            return gate;
        }
        self.settle_owed(psn.offset(packets));
        if ahead < 0 && read.is_none() {
            // A write that was done before: say again how far we are (9.7.5).
            context.counters.duplicates.add(1);
            self.acknowledge = true;
            return Next::Again;
        }
        match (packet.header, read) {
            (_, Some(reth)) => self.read(psn, reth, ahead < 0, route, shared, context),
            _ => self.write(packet, route, shared, context),
        }
    }

    /// While a page is asked for, the request that needs it is told to come again, and those after it are dropped: the peer
    /// sends them again after it. That goes on until it has come again: were a later request, still on its way, refused
    /// before, the peer would not take the refusal of one whose predecessor has no answer. A read before it, asked again, is
    /// answered, for the same reason.
    fn fault_gate(&mut self, psn: Psn, packets: u32, now: Time) -> Option<Next> {
        let fault = self.fault.as_mut()?;
        if psn.offset(packets).since(fault.psn) <= 0 {
            return None;
        }
        if psn.since(fault.psn) > 0 {
            if psn.since(fault.passed) <= 0 {
                // The peer went back, but not as far as here: it has had its answer, to an earlier asking.
                self.fault = None;
                return None;
            }
            fault.passed = psn.offset(packets - 1);
            self.nak_sent = true;
            return Some(Next::Again);
        }
        fault.passed = fault.psn;
        match fault.wait {
            Some(FaultWait::Denied) => self.refuse(NakCode::RemoteAccess, psn),
            Some(FaultWait::Unasked { until }) if until > now => self.not_ready(psn),
            Some(FaultWait::Asked(_)) => self.not_ready(psn),
            Some(FaultWait::Unasked { .. }) | None => {
                self.fault = None;
                return None;
            }
        }
        Some(Next::Again)
    }

    fn write(&mut self, packet: Packet, route: &Route, shared: &Shared, context: &mut Context<'_>) -> Next {
        let Packet { psn, header, payload, ack_request, .. } = packet;
        let bytes = payload.len() as u32;
        let Some(message) = self.write_message(&header, bytes, route, shared) else {
            self.refuse(NakCode::InvalidRequest, psn);
            return Next::Again;
        };
        if bytes == 0 {
            // Without data the key is not looked at (9.4.3).
            self.placed(message, 0, ack_request);
            return Next::Again;
        }
        context.pieces.clear();
        let Message { key, next, left } = message;
        context.pieces.push(Piece { key, address: next, now: bytes, rest: u64::from(left) });
        let work = Work::Place { header, psn, ack_request };
        Next::Dma(Dma { direction: Direction::Scatter, need: Access::REMOTE_WRITE, payload, work })
    }

    /// What is left of the message that a write packet belongs to, if its opcode and length are in order (9.7.4.1).
    fn write_message(&self, header: &Header, bytes: u32, route: &Route, shared: &Shared) -> Option<Message> {
        if !shared.access.contains(Access::REMOTE_WRITE) {
            return None;
        }
        let mtu = route.mtu.bytes();
        let begin = |reth: &Reth| Message { key: reth.key, next: reth.address, left: reth.length };
        let (message, in_order) = match (header, self.message) {
            (Header::WriteOnly(reth), None) => (begin(reth), bytes == reth.length && bytes <= mtu),
            (Header::WriteFirst(reth), None) => (begin(reth), bytes == mtu && reth.length > mtu),
            (Header::WriteMiddle, Some(open)) => (open, bytes == mtu && open.left > mtu),
            (Header::WriteLast, Some(open)) => (open, bytes > 0 && bytes == open.left && bytes <= mtu),
            _ => return None,
        };
        in_order.then_some(message)
    }

    /// `bytes` of `message` are in their place.
    fn placed(&mut self, message: Message, bytes: u32, ack_request: bool) {
        let left = message.left - bytes;
        self.message =
            (left > 0).then(|| Message { next: message.next.offset(u64::from(bytes)), left, ..message });
        self.executed(1, left == 0);
        self.acknowledge |= ack_request;
    }

    /// A request of so many sequence numbers was executed.
    fn executed(&mut self, packets: u32, ends_message: bool) {
        self.expected = self.expected.offset(packets);
        self.messages = self.messages.wrapping_add(u32::from(ends_message));
        self.nak_sent = false;
        // The packet that was missed has come after all.
        if matches!(self.reply, Some(Reply::Refuse(NakCode::SequenceError, _))) {
            self.reply = None;
        }
    }

    /// A read, new or seen before. One seen before is executed again, and so are those after it (9.7.5).
    fn read(
        &mut self,
        psn: Psn,
        reth: Reth,
        duplicate: bool,
        route: &Route,
        shared: &Shared,
        context: &mut Context<'_>,
    ) -> Next {
        let packets = route.mtu.packets(reth.length);
        let limits = &context.device.config.limits;
        if duplicate {
            context.counters.duplicates.add(1);
            if psn.offset(packets).since(self.expected) > 0 {
                // It reaches beyond what was asked before: forged, or not a repetition.
                context.counters.packets_dropped.add(1);
                return Next::Again;
            }
            self.drop_reads(psn, route);
            self.settle_owed(psn.offset(packets));
        }
        let full = self.reads.len() >= limits.reads as usize;
        if duplicate && full {
            context.counters.packets_dropped.add(1);
            return Next::Again;
        }
        let out_of_order = !duplicate && (full || self.message.is_some());
        let allowed = shared.access.contains(Access::REMOTE_READ) && reth.length <= limits.message_bytes;
        if out_of_order || !allowed {
            self.refuse(NakCode::InvalidRequest, psn);
            return Next::Again;
        }
        // The whole range before the first response; without data the key is not looked at (9.4.4).
        let authorized = reth.length == 0
            || context
                .device
                .keys
                .with(reth.key, |spec| {
                    spec.authorize(shared.caller(), Access::REMOTE_READ, reth.address, u64::from(reth.length))
                })
                .is_ok_and(|checked| checked.is_ok());
        if !authorized {
            self.refuse(NakCode::RemoteAccess, psn);
            return Next::Again;
        }
        self.reads.push_back(ReadJob {
            psn,
            key: reth.key,
            next: reth.address,
            left: reth.length,
            begun: false,
        });
        if !duplicate {
            self.executed(packets, true);
        }
        Next::Again
    }

    pub(super) fn finish(
        &mut self,
        dma: Dma,
        result: Result<(), Obstacle>,
        route: &Route,
        shared: &Shared,
        context: &mut Context<'_>,
    ) -> Next {
        let bytes = dma.payload.len() as u32;
        let psn = match dma.work {
            Work::Place { psn, .. } | Work::Respond { psn, .. } => psn,
            Work::Request { .. } | Work::Land { .. } => unreachable!("work of the requester"),
        };
        match (result, dma.work) {
            (Ok(()), Work::Place { header, ack_request, .. }) => {
                context.counters.bytes_placed.add(u64::from(bytes));
                if let Some(message) = self.write_message(&header, bytes, route, shared) {
                    self.placed(message, bytes, ack_request);
                }
            }
            (Ok(()), Work::Respond { header, .. }) => {
                context.send(route, psn, false, header, dma.payload);
                self.responded(bytes);
            }
            (Ok(()), _) => {}
            (Err(Obstacle::Page { key, address, rest }), _) => {
                let at = PageAt { key, address, rest };
                let wait = context.ask(shared, FaultKind::ByRemoteAccess, at, dma.direction);
                self.fault = Some(Fault { psn, wait: Some(wait), passed: psn });
                // The peer asks again for this one and all after it, a refused request too. Reads before it are answered
                // first: the peer takes no other answer, and asking again costs it one of its retries.
                self.drop_reads(psn, route);
                self.closing = false;
                self.not_ready(psn);
            }
            (Err(Obstacle::Key(_)), _) => self.refuse(NakCode::RemoteAccess, psn),
            (Err(Obstacle::Refused(_)), _) => self.refuse(NakCode::RemoteOperational, psn),
        }
        Next::Again
    }

    /// `bytes` of the oldest read have been sent.
    fn responded(&mut self, bytes: u32) {
        let Some(job) = self.reads.front_mut() else { return };
        job.psn = job.psn.next();
        job.next = job.next.offset(u64::from(bytes));
        job.left -= bytes;
        job.begun = true;
        if job.left == 0 {
            self.reads.pop_front();
        }
    }

    fn not_ready(&mut self, psn: Psn) {
        self.nak_sent = true;
        self.reply = Some(Reply::NotReady(psn));
    }

    /// Refuses for good: the connection ends when the peer has been told (9.9.3).
    fn refuse(&mut self, code: NakCode, psn: Psn) {
        self.closing = true;
        // Reads after the refused request are not answered; those before it are.
        self.reads.retain(|job| job.psn.since(psn) < 0);
        self.reply = Some(Reply::Refuse(code, psn));
    }

    pub(super) fn answer(&mut self, token: FaultToken, outcome: FaultOutcome) -> bool {
        let Some(fault) = &mut self.fault else { return false };
        if !matches!(fault.wait, Some(FaultWait::Asked(asked)) if asked == token) {
            return false;
        }
        fault.wait = match outcome {
            FaultOutcome::Resolved => None,
            FaultOutcome::Failed => Some(FaultWait::Denied),
        };
        true
    }
}

impl ReadJob {
    /// The number of the last response still to be sent for this read.
    fn last(&self, route: &Route) -> Psn {
        self.psn.offset(route.mtu.packets(self.left)).previous()
    }
    /// Whether the response with this number is still to be sent for this read.
    fn covers(&self, psn: Psn, route: &Route) -> bool {
        psn.since(self.psn) >= 0 && psn.since(self.last(route)) <= 0
    }
}
