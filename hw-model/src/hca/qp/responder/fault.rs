//! A page is missing (IBTA volume 1, 9.7.5.2.8, is what hardware makes of it).
//!
//! Two policies ([`FaultPolicy`]). As real devices do: the peer is told to come again (RNR NAK) while software brings the
//! page in, and what comes meanwhile is dropped. Or as rdma_rxe does: the queue pair keeps what comes and goes on when the
//! page is there. An unreliable service cannot tell its peer anything: there the message is lost, or waits.

use super::{Message, Reply, Responder};
use crate::hca::config::FaultPolicy;
use crate::hca::fault::{FaultKind, FaultOutcome, FaultToken, FaultWait};
use crate::hca::key::KeyViolation;
use crate::hca::qp::queue::Shared;
use crate::hca::qp::work::{Context, Dma, Next, PageAt, Route, Work};
use crate::hca::request::Status;
use crate::hca::time::Time;
use crate::hca::translate::Obstacle;
use crate::wire::{Gid, NakCode, Packet, Psn};
use std::collections::VecDeque;

/// A page that was missing for the request with this sequence number.
pub(super) struct Fault {
    psn: Psn,
    /// `None` once the page may be there: the request has not come again yet.
    wait: Option<FaultWait>,
    /// The highest number of what was dropped behind it since it was last asked for.
    passed: Psn,
}

/// A queue pair that waits with what has come, and what comes.
pub(super) struct Stall {
    /// `None` once the page may be there.
    pub(super) wait: Option<FaultWait>,
    /// The DMA that could not be done: a packet's, or a read response's.
    dma: Option<Dma>,
    behind: VecDeque<Packet>,
}

/// Packets that a waiting queue pair keeps. What comes beyond is dropped, and sent again by its peer.
const KEPT: usize = 1024;

impl Stall {
    /// Whether its page may be there, or cannot be had.
    pub(super) fn is_over(&self, now: Time) -> bool {
        match self.wait {
            Some(FaultWait::Asked(_)) => false,
            Some(FaultWait::Unasked { until }) => until <= now,
            Some(FaultWait::Denied) | None => true,
        }
    }

    /// Whether it is a read response that waits: no other answer can go before it.
    pub(super) fn holds_answers(&self) -> bool {
        self.dma.as_ref().is_some_and(|dma| matches!(dma.work, Work::Respond { .. }))
    }

    pub(super) fn keep(&mut self, mut packet: Packet, context: &Context<'_>) {
        if self.behind.len() < KEPT {
            packet.payload.take_in();
            self.behind.push_back(packet);
        } else {
            context.counters.packets_dropped.add(1);
        }
    }
}

impl Responder {
    pub(super) fn page_missing(
        &mut self,
        at: PageAt,
        route: Option<&Route>,
        shared: &Shared,
        context: &mut Context<'_>,
    ) -> Next {
        let wait = context.ask(shared, FaultKind::ByRemoteAccess, at, context.dma.direction, self.rnr_timer);
        if context.device.config.fault_policy == FaultPolicy::Wait {
            let behind = self.stall.take().map(|stall| stall.behind).unwrap_or_default();
            let mut dma = std::mem::take(context.dma);
            dma.payload.take_in();
            self.stall = Some(Box::new(Stall { wait: Some(wait), dma: Some(dma), behind }));
            return Next::Nothing;
        }
        let (Work::Place { psn, .. } | Work::Respond { psn, .. }) = context.dma.work else {
            unreachable!("work of the requester")
        };
        let Some(route) = route.filter(|_| shared.transport.is_reliable()) else {
            context.counters.packets_dropped.add(1);
            self.lose_message(shared, context);
            return Next::Again;
        };
        self.fault = Some(Fault { psn, wait: Some(wait), passed: psn });
        // The peer asks again for this one and all after it, a refused request too. Answers before it are sent first: the
        // peer takes no other, and asking again costs it one of its retries.
        self.drop_answers(psn, route);
        if let Some(Reply::Refuse(code, refused)) = self.reply.filter(|_| self.closing) {
            self.refused = Some((code, refused));
        }
        self.closing = false;
        self.not_ready(psn);
        Next::Again
    }

    /// While a page is asked for, the request that needs it is told to come again, and those after it are dropped: the peer
    /// sends them again after it. That goes on until it has come again: were a later request, still on its way, refused
    /// before, the peer would not take the refusal of one whose predecessor has no answer. A read before it, asked again, is
    /// answered, for the same reason.
    pub(super) fn fault_gate(
        &mut self,
        psn: Psn,
        packets: u32,
        shared: &Shared,
        context: &Context<'_>,
    ) -> Option<Next> {
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
            Some(FaultWait::Denied) => self.deny(psn, shared, context),
            Some(FaultWait::Unasked { until }) if until > context.now => self.not_ready(psn),
            Some(FaultWait::Asked(_)) => self.not_ready(psn),
            Some(FaultWait::Unasked { .. }) | None => {
                self.fault = None;
                return None;
            }
        }
        Some(Next::Again)
    }

    /// The pages cannot be had: of a receive they are ours to have, of anything else the peer named them.
    fn deny(&mut self, psn: Psn, shared: &Shared, context: &Context<'_>) {
        let sends = matches!(self.message, Some(Message::Send { .. }))
            || (self.message.is_none() && self.receive.is_some());
        let (code, status) = match sends {
            true => (NakCode::RemoteOperational, Status::LocalProtectionError),
            false => (NakCode::RemoteAccess, Status::LocalAccessError),
        };
        self.end_receive(status, shared, context);
        self.refuse(code, psn);
    }

    /// A queue pair that has waited goes on: with what it could not do, then with what came behind it.
    pub(super) fn go_on(
        &mut self,
        route: Option<&Route>,
        shared: &Shared,
        context: &mut Context<'_>,
    ) -> Next {
        let Some(stall) = self.stall.take() else { return Next::Nothing };
        let Stall { wait, dma, mut behind } = *stall;
        let next = match dma {
            Some(dma) if matches!(wait, Some(FaultWait::Denied)) => {
                let denied = Err(Obstacle::Key(KeyViolation::NotAllowed));
                *context.dma = dma;
                self.finish(denied, route, shared, context)
            }
            Some(dma) => self.try_again(dma, route, shared, context),
            None => match behind.pop_front() {
                Some(mut packet) => self.receive(&mut packet, route, shared, context),
                None => Next::Again,
            },
        };
        if !behind.is_empty() {
            self.stall = Some(Box::new(Stall { wait: None, dma: None, behind }));
        }
        if matches!(next, Next::Nothing) { Next::Again } else { next }
    }

    /// The DMA that a page was missing for.
    fn try_again(
        &mut self,
        dma: Dma,
        route: Option<&Route>,
        shared: &Shared,
        context: &mut Context<'_>,
    ) -> Next {
        let Work::Place { header, psn, marks, from } = dma.work else {
            // A read response: it is still the oldest answer.
            return Next::Again;
        };
        if from.is_some() {
            let Some(receive) = &self.receive else { return Next::Again };
            receive.sges.pieces(0, dma.payload.len() as u32, context.pieces);
            return context.request(dma);
        }
        let nobody = (Gid(0), shared.qpn);
        let packet = Packet::reliable(Gid(0), nobody, psn, header);
        let (ack_request, solicited) = (marks.ack_request, marks.solicited);
        let service = self.service();
        let mut packet = Packet { ack_request, solicited, service, payload: dma.payload, ..packet };
        if !shared.transport.is_reliable() {
            // It has been taken for expected before.
            self.expected = psn;
        }
        self.receive(&mut packet, route, shared, context)
    }

    pub(in crate::hca::qp) fn answer(&mut self, token: FaultToken, outcome: FaultOutcome) -> bool {
        let stalled = self.stall.as_mut().map(|stall| &mut stall.wait);
        let Some(wait) = stalled.or(self.fault.as_mut().map(|fault| &mut fault.wait)) else { return false };
        if !matches!(wait, Some(FaultWait::Asked(asked)) if *asked == token) {
            return false;
        }
        *wait = match outcome {
            FaultOutcome::Resolved => None,
            FaultOutcome::Failed => Some(FaultWait::Denied),
        };
        true
    }
}
