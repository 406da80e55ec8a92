//! The responder: does what the peer asks, in order, and says so (IBTA volume 1, 9.7.4 and 9.7.5).
//!
//! The key, the bounds and the rights of a whole message are checked with its first packet, before a byte lands. Answers
//! leave in the order of the requests: acknowledgements wait for the reads before them, and are coalesced.
//!
//! `place` has sends and writes, `fetch` what is answered with more than an acknowledgement, `answers` what is sent,
//! `fault` what happens when a page is missing, `extended` whose queue a request is for, `unreliable` the services where nothing is answered.

mod answers;
mod extended;
mod fault;
mod fetch;
mod place;
mod receive;
mod unreliable;

use super::Transport;
use super::attributes::QpAttributes;
use super::extended::ExtendedQueue;
use super::queue::Shared;
use super::receive::RecvWqe;
use super::work::{Context, Next, Route, Work};
use crate::addr::RegionAddr;
use crate::hca::fault::FaultWait;
use crate::hca::key::{Access, Caller};
use crate::hca::request::Status;
use crate::hca::translate::Obstacle;
use crate::sync::Arc;
use crate::wire::{Key, NakCode, Packet, Psn, RnrTimer};
use answers::{Answer, Done};
use fault::{Fault, Stall};
use std::collections::VecDeque;

/// A message of several packets that has begun.
#[derive(Clone, Copy)]
enum Message {
    /// So many bytes of a send are in the receive that it goes into.
    Send { filled: u32 },
    /// An RDMA write.
    Write { key: Key, next: RegionAddr, left: u32, length: u32 },
}

/// What the peer is told besides acknowledgements.
#[derive(Clone, Copy)]
enum Reply {
    NotReady(Psn),
    Refuse(NakCode, Psn),
}

pub(super) struct Responder {
    expected: Psn,
    messages: u32,
    message: Option<Message>,
    /// The receive that the message goes into, or completes.
    receive: Option<RecvWqe>,
    /// Of an extended target: the queue that the message is for.
    target: Option<Arc<ExtendedQueue>>,
    /// What is to be answered with more than an acknowledgement, oldest first.
    answers: VecDeque<Answer>,
    /// What atomics and flushes came to, for a peer that did not hear it (9.7.5.1.5: as many as it may have under way).
    done: VecDeque<(Psn, Done)>,
    reply: Option<Reply>,
    /// The peer wants to hear how far we are.
    acknowledge: bool,
    /// The peer knows that it must go back: what comes out of order until then is dropped without a word.
    nak_sent: bool,
    fault: Option<Fault>,
    stall: Option<Box<Stall>>,
    /// The last number of the answers that were dropped for the peer to ask again: until it has, nothing behind is
    /// acknowledged, or the peer would take their answers for lost.
    owed: Option<Psn>,
    /// A refusal that ends the connection is waiting to be sent.
    closing: bool,
    /// A refusal that was taken back because a page was missing for an answer before it. It stands: the receive that the
    /// request was to complete has ended with it.
    refused: Option<(NakCode, Psn)>,
    /// The completion queue overran: the queue pair must go to the error state.
    overran: bool,
    rnr_timer: RnrTimer,
    /// Reads and atomics that the peer may have under way.
    depth: u8,
    access: Access,
    pkey_index: u16,
}

impl Responder {
    pub(super) fn new(attributes: &QpAttributes) -> Self {
        Self {
            expected: attributes.rq_psn,
            messages: 0,
            message: None,
            receive: None,
            target: None,
            answers: VecDeque::new(),
            done: VecDeque::new(),
            reply: None,
            acknowledge: false,
            nak_sent: false,
            fault: None,
            stall: None,
            owed: None,
            closing: false,
            refused: None,
            overran: false,
            rnr_timer: attributes.min_rnr_timer,
            depth: attributes.dest_reads,
            access: attributes.access,
            pkey_index: attributes.pkey_index,
        }
    }

    /// Takes what software has set.
    pub(super) fn set(&mut self, attributes: &QpAttributes) {
        self.rnr_timer = attributes.min_rnr_timer;
        self.depth = attributes.dest_reads;
        self.access = attributes.access;
        self.pkey_index = attributes.pkey_index;
    }

    /// Whether nothing is to be sent, and nothing waits to go on.
    #[inline]
    pub(super) fn has_nothing_to_say(&self) -> bool {
        let answers = !self.answers.is_empty() || self.reply.is_some() || self.acknowledge;
        !answers && self.stall.is_none()
    }

    /// The number of the next new request.
    pub(super) fn expected(&self) -> Psn {
        self.expected
    }

    pub(super) fn overran(&self) -> bool {
        self.overran
    }

    /// Takes a request packet.
    pub(super) fn receive(
        &mut self,
        packet: &mut Packet,
        route: Option<&Route>,
        shared: &Shared,
        context: &mut Context<'_>,
    ) -> Next {
        if let Some(stall) = &mut self.stall {
            stall.keep(packet.take(), context);
            return Next::Nothing;
        }
        match (route, shared.transport) {
            (_, Transport::UnreliableDatagram) => self.datagram(packet, shared, context),
            (_, Transport::UnreliableConnection) => self.unreliable(packet, route, shared, context),
            (Some(route), _) => self.reliable(packet, route, shared, context),
            (None, _) => Next::Nothing,
        }
    }

    /// A request over a reliable connection: in its turn, or a repetition (9.7.4.1.1).
    fn reliable(
        &mut self,
        packet: &mut Packet,
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
        let fetch = fetch::Fetch::of(&packet.header);
        let packets = fetch.as_ref().map_or(1, |fetch| fetch.packets(route));
        if let Some(gate) = self.fault_gate(psn, packets, shared, context) {
            return gate;
        }
        if let Some((code, refused)) = self.refused
            && refused == psn
        {
            self.refuse(code, psn);
            return Next::Again;
        }
        let pd = match self.aim(packet, ahead == 0, shared, context) {
            Ok(pd) => pd,
            Err(_) if ahead < 0 => {
                // It was answered when the queue was there.
                context.counters.packets_dropped.add(1);
                return Next::Again;
            }
            Err(code) => {
                self.refuse(code, psn);
                return Next::Again;
            }
        };
        self.settle_owed(psn.offset(packets));
        match fetch {
            None if ahead < 0 => {
                // A send or a write that was done before: say again how far we are (9.7.5.1.4).
                context.counters.duplicates.add(1);
                self.acknowledge = true;
                Next::Again
            }
            None => self.place(packet, route, shared, context),
            Some(fetch) if ahead < 0 => {
                self.fetch_again(psn, fetch, route, Caller { pd, qpn: shared.qpn }, context)
            }
            Some(fetch) => self.fetch(packet, fetch, route, shared, context),
        }
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

    pub(super) fn finish(
        &mut self,
        result: Result<(), Obstacle>,
        route: Option<&Route>,
        shared: &Shared,
        context: &mut Context<'_>,
    ) -> Next {
        if let Err(Obstacle::Page { key, address, rest }) = result {
            let at = super::work::PageAt { key, address, rest };
            return self.page_missing(at, route, shared, context);
        }
        if !shared.transport.is_reliable() {
            return self.finish_unreliable(result, shared, context);
        }
        let Some(route) = route else { return Next::Nothing };
        match (result, context.dma.work) {
            (Ok(()), Work::Place { header, marks, psn, .. }) => {
                match fetch::Fetch::of(&header) {
                    Some(fetch) => self.fetched(psn, &fetch, context),
                    None => {
                        let bytes = context.dma.payload.len() as u32;
                        context.counters.bytes_placed.add(u64::from(bytes));
                        self.placed(&header, bytes, marks, route, shared, context);
                    }
                }
                Next::Again
            }
            (Ok(()), Work::Respond { header, psn }) => {
                let payload = std::mem::take(&mut context.dma.payload);
                let bytes = payload.len() as u32;
                context.send(route, psn, super::work::Marks::default(), header, payload);
                self.responded(bytes);
                Next::Again
            }
            (Err(Obstacle::CalledIn), _) => {
                // The peer is told, and sends it and what is behind it again.
                self.nak_sent = true;
                Next::Again
            }
            (Err(obstacle), work) => {
                let (Work::Place { header, psn, .. } | Work::Respond { header, psn }) = work else {
                    unreachable!("work of the requester")
                };
                self.obstructed(&header, psn, &obstacle, shared, context)
            }
            (Ok(()), Work::Request { .. } | Work::Land { .. }) => unreachable!("work of the requester"),
        }
    }

    /// Something else than a missing page forbids a DMA: the peer is refused, and what it was to complete ends with why.
    fn obstructed(
        &mut self,
        header: &crate::wire::Header,
        psn: Psn,
        obstacle: &Obstacle,
        shared: &Shared,
        context: &mut Context<'_>,
    ) -> Next {
        // Of a send the memory is ours to answer for (9.7.5.2.6); of the rest it is the peer that named it (9.7.5.2.5).
        let ours = header.send_position().is_some();
        let (code, status) = match obstacle {
            Obstacle::Misaligned => (NakCode::InvalidRequest, Status::LocalAccessError),
            Obstacle::Refused(_) => (NakCode::RemoteOperational, Status::LocalQpOperationError),
            _ if ours => (NakCode::RemoteOperational, Status::LocalProtectionError),
            _ => (NakCode::RemoteAccess, Status::LocalAccessError),
        };
        self.end_receive(status, shared, context);
        self.refuse(code, psn);
        Next::Again
    }

    /// Refuses for good: the connection ends when the peer has been told (9.9.3).
    fn refuse(&mut self, code: NakCode, psn: Psn) {
        self.closing = true;
        // What was asked after the refused request is not answered; what was before it is.
        self.answers.retain(|answer| answer.psn().since(psn) < 0);
        self.reply = Some(Reply::Refuse(code, psn));
    }

    fn not_ready(&mut self, psn: Psn) {
        self.nak_sent = true;
        self.reply = Some(Reply::NotReady(psn));
    }

    /// When it wants to be called even if no packet comes.
    pub(super) fn deadline(&self) -> Option<crate::hca::time::Time> {
        match self.stall.as_ref()?.wait {
            Some(FaultWait::Unasked { until }) => Some(until),
            _ => None,
        }
    }
}
