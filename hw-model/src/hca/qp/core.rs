//! The protocol state of one queue pair, owned by its engine.

use super::attributes::{ModifyQpError, QpAttributes, QpChange};
use super::queue::{Overran, Shared};
use super::requester::Requester;
use super::responder::Responder;
use super::work::{Context, Next, Route, Work};
use super::{QpState, Transport};
use crate::hca::attributes::PKeyTable;
use crate::hca::config::HcaConfig;
use crate::hca::events::AsyncEvent;
use crate::hca::fault::{FaultKind, FaultOutcome, FaultToken};
use crate::hca::key::Access;
use crate::hca::loan::{GivenBack, Lender};
use crate::hca::request::Status;
use crate::hca::time::Time;
use crate::hca::translate::Obstacle;
use crate::link::LoanTerms;
use crate::sync::Arc;
use crate::wire::{Packet, Service};

/// The protocol state of one queue pair.
pub(in crate::hca) struct Core {
    pub(in crate::hca) shared: Arc<Shared>,
    attributes: QpAttributes,
    /// Of a connected queue pair that knows its peer.
    route: Option<Route>,
    requester: Requester,
    responder: Responder,
    responder_next: bool,
    /// A packet came before the queue pair was ready to send, and software was told.
    established: bool,
    /// To those who have the bytes of its packets to fetch. Its incarnation changes whenever what is under way is void: a
    /// DMA that began before does not finish into what came after.
    pub(in crate::hca) lender: Arc<Lender>,
    /// The lender's, which nobody else changes: looked at for each DMA, without a miss of the cache for that.
    incarnation: u64,
    /// The peer's engine can fetch the bytes of packets from where they are.
    peer_borrows: bool,
    /// Loans may be out.
    has_lent: bool,
    /// The next packet carries its bytes: what was lent could not be had.
    carry_next: bool,
    /// In the engine's list of queue pairs to serve.
    pub(in crate::hca) queued: bool,
    /// The entry in the engine's timer heap that counts.
    pub(in crate::hca) timer: Option<Time>,
}

impl Core {
    pub(super) fn new(shared: Arc<Shared>, lender: Arc<Lender>, access: Access, config: &HcaConfig) -> Self {
        let attributes = QpAttributes::new(access, config);
        Self {
            shared,
            requester: Requester::new(&attributes),
            responder: Responder::new(&attributes),
            attributes,
            route: None,
            responder_next: false,
            established: false,
            lender,
            incarnation: 0,
            peer_borrows: false,
            has_lent: false,
            carry_next: false,
            queued: false,
            timer: None,
        }
    }

    /// What it is set to.
    pub(in crate::hca) fn attributes(&self) -> QpAttributes {
        let state = self.attributes.state;
        let mut attributes = self.attributes;
        if state.receives() {
            attributes.rq_psn = self.responder.expected();
        }
        if state.sends() {
            attributes.sq_psn = self.requester.next_psn();
        }
        attributes.draining = state == QpState::SendQueueDrain && !self.requester.is_drained();
        attributes
    }

    /// Changes the attributes, and the state with them.
    pub(in crate::hca) fn apply(
        &mut self,
        change: &QpChange,
        context: &mut Context<'_>,
    ) -> Result<(), ModifyQpError> {
        let before = self.attributes.state;
        let mut after = self.attributes.after(change, self.shared.transport, &context.device.config)?;
        after.renew_pkey(&context.device.condition.pkeys());
        match after.state {
            QpState::Error => {
                self.enter_error(context);
                return Ok(());
            }
            QpState::Reset => {
                self.enter_error(context);
                self.route = None;
                self.attributes = QpAttributes::new(after.access, &context.device.config);
            }
            _ => self.attributes = after,
        }
        if after.state.receives() {
            self.route = self.route_to_peer();
            let epoch = context.device.port.epoch();
            let terms = LoanTerms { epoch, whole_bursts: !context.device.config.micro_steps };
            // Where nothing is answered, a request ends before its bytes have been fetched.
            self.peer_borrows = self.shared.transport.is_reliable()
                && (self.route.as_ref())
                    .is_some_and(|route| context.device.link.takes_loans(route.gid, &terms));
        }
        match (before, after.state) {
            (QpState::Init, QpState::ReadyToReceive) => {
                self.responder = Responder::new(&after);
                self.established = false;
            }
            (QpState::ReadyToReceive, QpState::ReadyToSend) => self.requester = Requester::new(&after),
            _ => {}
        }
        self.requester.set(&after, change.notify_drained == Some(true));
        self.responder.set(&after);
        self.set_state(after.state);
        self.tell_if_drained(context);
        if after.state == QpState::Reset {
            // What was posted while the queue pair passed through the error state.
            self.flush(context);
        }
        Ok(())
    }

    /// The table of partition keys is another.
    pub(in crate::hca) fn renew_pkey(&mut self, table: &PKeyTable) {
        self.attributes.renew_pkey(table);
        if let Some(route) = &mut self.route {
            route.pkey = self.attributes.pkey;
        }
    }

    /// The way to the peer of a connected queue pair.
    fn route_to_peer(&self) -> Option<Route> {
        let set = &self.attributes;
        let path = set.path?;
        let service = match self.shared.transport {
            Transport::ReliableConnection => Service::ReliableConnection,
            Transport::UnreliableConnection => Service::UnreliableConnection,
            // A request puts its queue in.
            Transport::ExtendedInitiator | Transport::ExtendedTarget => Service::ExtendedConnection(None),
            Transport::UnreliableDatagram => return None,
        };
        Some(Route {
            gid: path.gid,
            qpn: set.dest_qpn,
            global: path.route,
            mtu: set.path_mtu,
            pkey: set.pkey,
            service,
        })
    }

    /// Says that a send queue that was asked to drain has drained (10.3.1.5).
    fn tell_if_drained(&mut self, context: &Context<'_>) {
        if self.requester.has_drained() {
            context.device.events.post(AsyncEvent::SendQueueDrained(self.shared.qpn));
        }
    }

    fn set_state(&mut self, state: QpState) {
        self.attributes.state = state;
        self.shared.set_state(state);
    }

    /// Stops everything; what was posted is flushed (10.3.1).
    pub(in crate::hca) fn enter_error(&mut self, context: &mut Context<'_>) {
        self.call_in_loans();
        let was_in_error = self.attributes.state == QpState::Error;
        self.set_state(QpState::Error);
        if self.shared.receives.shared.is_some() && !was_in_error {
            // It takes no receive of the shared queue any more (11.6.3.2).
            context.device.events.post(AsyncEvent::LastWqeReached(self.shared.qpn));
        }
        self.flush(context);
        self.responder = Responder::new(&self.attributes);
    }

    /// A request of an unreliable service failed: its send queue stops, and the receive queue goes on (10.3.1.6).
    fn enter_send_error(&mut self, context: &Context<'_>) {
        self.set_state(QpState::SendQueueError);
        self.flush_sends(context);
    }

    pub(in crate::hca) fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Whether the bytes of a packet are to be fetched by the peer. Asked once a packet.
    pub(in crate::hca) fn lends(&mut self, work: &Work) -> bool {
        let sends = matches!(work, Work::Request { .. } | Work::Respond { .. });
        let lends = sends && self.peer_borrows && !self.carry_next;
        self.carry_next &= !sends;
        self.has_lent |= lends;
        lends
    }

    /// A packet's bytes could not be fetched.
    pub(in crate::hca) fn take_back(&mut self, given_back: GivenBack, context: &mut Context<'_>) {
        if given_back.incarnation != self.incarnation() {
            return;
        }
        self.carry_next = true;
        if let Some(psn) = given_back.request {
            self.requester.send_again(psn, context);
        }
    }

    /// What was lent belongs to the program again once a request has ended: before it ends but for success, nobody may have
    /// the right to read it any more.
    fn call_in_loans(&mut self) {
        self.incarnation = self.lender.call_in(std::mem::take(&mut self.has_lent));
    }

    fn flush(&mut self, context: &Context<'_>) {
        self.flush_sends(context);
        self.responder.flush(&self.shared, context);
    }

    fn flush_sends(&mut self, context: &Context<'_>) {
        self.requester.flush(&self.shared, context);
        while let Some(wqe) = self.shared.take() {
            // The queue pair is in an error state already; there is nothing more that an overrun could do to it.
            let _: Result<(), Overran> = self.shared.complete(&wqe, Status::FlushError, context.counters);
        }
    }

    /// Does what can be done without DMA up to the next DMA.
    pub(in crate::hca) fn next(&mut self, context: &mut Context<'_>) -> Next {
        let state = self.attributes.state;
        match state {
            QpState::Error => {
                self.flush(context);
                return Next::Nothing;
            }
            QpState::SendQueueError => self.flush_sends(context),
            _ if !state.receives() => return Next::Nothing,
            _ => {}
        }
        // In turns, so that neither a long read by the peer nor a long write to it starves the other way.
        self.responder_next = !self.responder_next || !state.sends();
        let mut next = self.turn(context);
        if matches!(next, Next::Nothing) && state.sends() {
            self.responder_next = !self.responder_next;
            next = self.turn(context);
            self.responder_next = !self.responder_next;
        }
        self.settle(next, context)
    }

    fn turn(&mut self, context: &mut Context<'_>) -> Next {
        if self.responder_next {
            if self.responder.has_nothing_to_say() {
                return Next::Nothing;
            }
            self.responder.next(self.route.as_ref(), &self.shared, context)
        } else {
            if self.requester.has_nothing_to_ask(&self.shared) {
                return Next::Nothing;
            }
            self.requester.next(self.route.as_ref(), &self.attributes, &self.shared, context)
        }
    }

    /// Takes a packet from the link.
    pub(in crate::hca) fn receive(&mut self, packet: &mut Packet, context: &mut Context<'_>) -> Next {
        let down = context.device.condition.is_down();
        if down || !self.attributes.state.receives() || !self.is_for_us(packet) {
            context.counters.packets_dropped.add(1);
            return Next::Nothing;
        }
        context.counters.packets_received.add(1);
        if self.attributes.state == QpState::ReadyToReceive && !self.established {
            self.established = true;
            context.device.events.post(AsyncEvent::CommunicationEstablished(self.shared.qpn));
        }
        if let Some(route) = self.route.as_ref().filter(|_| packet.route.met_congestion()) {
            context.device.link.congested(route.gid, route.qpn);
        }
        let next = match (&self.route, packet.header.is_response()) {
            (Some(route), true) if self.attributes.state.sends() => {
                self.requester.receive(packet, route, &self.shared, context)
            }
            (_, true) => {
                context.counters.packets_dropped.add(1);
                Next::Nothing
            }
            (route, false) => self.responder.receive(packet, route.as_ref(), &self.shared, context),
        };
        self.settle(next, context)
    }

    /// Whether its service, its partition and its peer or queue key are ours (9.6.1): if not, it is dropped silently.
    fn is_for_us(&self, packet: &Packet) -> bool {
        let set = &self.attributes;
        let service = match (self.shared.transport, packet.service) {
            (Transport::ReliableConnection, Service::ReliableConnection)
            | (Transport::UnreliableConnection, Service::UnreliableConnection) => true,
            (Transport::ExtendedInitiator, Service::ExtendedConnection(_)) => packet.header.is_response(),
            (Transport::ExtendedTarget, Service::ExtendedConnection(_)) => !packet.header.is_response(),
            (Transport::UnreliableDatagram, Service::UnreliableDatagram(deth)) => deth.qkey == set.qkey,
            _ => false,
        };
        let peer = self.route.as_ref().is_none_or(|route| route.gid == packet.source);
        let connected = self.route.is_some() || self.shared.transport == Transport::UnreliableDatagram;
        let partition = packet.pkey.matches(set.pkey);
        service && peer && connected && partition && packet.header.is_of(packet.service)
    }

    /// Takes the result of a DMA that [`Core::next`] or [`Core::receive`] asked for.
    pub(in crate::hca) fn finish(&mut self, result: Result<(), Obstacle>, context: &mut Context<'_>) -> Next {
        if let Err(Obstacle::Refused(error)) = &result {
            context.counters.dma_refused.add(1);
            tracing::warn!(qpn = self.shared.qpn.0, %error, work = ?context.dma.work, "DMA refused");
        }
        if let (Err(Obstacle::Key(error)), qpn) = (&result, self.shared.qpn) {
            tracing::debug!(qpn = qpn.0, %error, work = ?context.dma.work, "key violation");
        }
        let route = self.route.as_ref();
        let next = match context.dma.work {
            Work::Request { .. } | Work::Land { .. } => {
                self.requester.finish(result, (route, &self.attributes), &self.shared, context)
            }
            Work::Place { .. } | Work::Respond { .. } => {
                self.responder.finish(result, route, &self.shared, context)
            }
        };
        self.settle(next, context)
    }

    /// Takes software's answer to a page fault. False if nobody waits for it.
    pub(in crate::hca) fn answer(
        &mut self,
        token: FaultToken,
        outcome: FaultOutcome,
        context: &Context<'_>,
    ) -> bool {
        match token.side {
            FaultKind::ByWorkRequest => self.requester.answer(token, outcome, context),
            FaultKind::ByRemoteAccess => self.responder.answer(token, outcome),
            FaultKind::ByRange => unreachable!("told to each of those who wait"),
        }
    }

    /// When the queue pair wants to be called even if nothing else happens.
    pub(in crate::hca) fn deadline(&self) -> Option<Time> {
        let state = self.attributes.state;
        let requester = self.requester.deadline().filter(|_| state.sends());
        let responder = self.responder.deadline().filter(|_| state.receives());
        match (requester, responder) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// Its deadline may have come.
    pub(in crate::hca) fn on_time(&mut self, context: &mut Context<'_>) {
        if self.attributes.state.sends() {
            let next = self.requester.on_time(context);
            self.settle(next, context);
        }
    }

    /// Carries out what ends a queue pair, or its send queue.
    #[inline]
    fn settle(&mut self, next: Next, context: &mut Context<'_>) -> Next {
        let goes_on = matches!(next, Next::Nothing | Next::Again | Next::Dma);
        let overran = self.requester.overran || self.responder.overran();
        if goes_on && !overran && !self.requester.is_to_tell() {
            return next;
        }
        self.settle_end(next, context)
    }

    #[cold]
    fn settle_end(&mut self, next: Next, context: &mut Context<'_>) -> Next {
        let mut close = matches!(next, Next::Close);
        if let Next::Fail(status) = next {
            tracing::debug!(qpn = self.shared.qpn.0, ?status, "request failed");
            self.call_in_loans();
            self.requester.end_oldest(status, &self.shared, context);
            if self.shared.transport.is_reliable() {
                close = true;
            } else {
                self.enter_send_error(context);
            }
        }
        self.tell_if_drained(context);
        let overran = self.requester.overran || self.responder.overran();
        if overran {
            context.device.events.post(AsyncEvent::QpFatal(self.shared.qpn));
        }
        if close || overran {
            self.enter_error(context);
            return Next::Nothing;
        }
        match next {
            Next::Fail(_) => Next::Again,
            other => other,
        }
    }
}
