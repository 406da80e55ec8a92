//! The protocol state of one queue pair, owned by its engine.

use super::queue::{Overran, Shared};
use super::requester::Requester;
use super::responder::Responder;
use super::{IllegalTransition, QpAddress, QpState, Transition};
use crate::hca::config::HcaConfig;
use crate::hca::device::Device;
use crate::hca::fault::{FaultAccess, FaultKind, FaultOutcome, FaultToken, FaultWait, PageFault};
use crate::hca::key::Access;
use crate::hca::points;
use crate::hca::request::Status;
use crate::hca::stats::Counters;
use crate::hca::time::Time;
use crate::hca::translate::{Direction, Obstacle, Piece};
use crate::sync::Arc;
use crate::wire::{Header, Packet, Payload, Psn};

/// What a queue pair's protocol works with for the length of one call.
pub(in crate::hca) struct Context<'a> {
    pub(in crate::hca) now: Time,
    pub(in crate::hca) device: &'a Device,
    pub(in crate::hca) counters: &'a Counters,
    /// Filled with what a [`Dma`] moves.
    pub(in crate::hca) pieces: &'a mut Vec<Piece>,
}

/// What a queue pair wants next.
pub(in crate::hca) enum Next {
    /// Nothing, until a packet, a post, an answer or its deadline.
    Nothing,
    /// It has done something that needed no DMA, and may want more.
    Again,
    /// Bytes are to be moved; their places are in [`Context::pieces`].
    Dma(Dma),
    /// The oldest request fails, and with it the queue pair.
    Fail(Status),
    /// The queue pair goes to the error state.
    Close,
}

/// A DMA of one packet's payload, and what comes after.
pub(in crate::hca) struct Dma {
    pub(in crate::hca) direction: Direction,
    pub(in crate::hca) need: Access,
    pub(in crate::hca) payload: Payload,
    pub(in crate::hca) work: Work,
}

/// What a DMA is a part of.
#[derive(Clone, Copy, Debug)]
pub(in crate::hca) enum Work {
    /// Requester: gather the payload of a request packet, then send it.
    Request { header: Header, psn: Psn, ack_request: bool },
    /// Requester: scatter a read response.
    Land { psn: Psn },
    /// Responder: scatter a write request.
    Place { header: Header, psn: Psn, ack_request: bool },
    /// Responder: gather a read response, then send it.
    Respond { header: Header, psn: Psn },
}

/// Where packets of a connected queue pair go, and how large they are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Route {
    pub(super) peer: QpAddress,
    pub(super) mtu: crate::hca::config::PathMtu,
}

/// The protocol state of one queue pair.
pub(in crate::hca) struct Core {
    pub(in crate::hca) shared: Arc<Shared>,
    state: QpState,
    first_psn: Psn,
    route: Option<Route>,
    requester: Requester,
    responder: Responder,
    responder_next: bool,
    /// Changes whenever what is under way is void: a DMA that began before does not finish into what came after.
    pub(in crate::hca) incarnation: u64,
    /// In the engine's list of queue pairs to serve.
    pub(in crate::hca) queued: bool,
    /// The entry in the engine's timer heap that counts.
    pub(in crate::hca) timer: Option<Time>,
}

impl Context<'_> {
    /// Sends one packet to the queue pair's peer.
    pub(super) fn send(&self, route: &Route, psn: Psn, ack_request: bool, header: Header, payload: Payload) {
        self.counters.packets_sent.add(1);
        self.counters.bytes_sent.add(payload.len() as u64);
        let packet = Packet::reliable(self.device.gid, (route.peer.gid, route.peer.qpn), psn, header);
        self.device.link.send(Packet { ack_request, payload, ..packet });
    }

    /// A payload buffer.
    pub(super) fn payload(&self, bytes: u32) -> Payload {
        self.device.pool.take(bytes as usize)
    }

    /// Asks software for a page.
    pub(super) fn ask(
        &self,
        shared: &Shared,
        kind: FaultKind,
        at: PageAt,
        direction: Direction,
    ) -> FaultWait {
        let token = FaultToken { qpn: shared.qpn, side: kind, serial: 0 };
        let access = match direction {
            Direction::Gather => FaultAccess::Read,
            Direction::Scatter => FaultAccess::Write,
        };
        let PageAt { key, address, rest } = at;
        let fault = PageFault { token, qpn: shared.qpn, key, kind, address, length: rest, access };
        let refused = self.device.points.meet(points::FAULT_EVENT).fails();
        let posted = if refused { None } else { self.device.faults.post(fault).ok() };
        match posted {
            Some(token) => {
                match kind {
                    FaultKind::ByWorkRequest => self.counters.faults_by_work_request.add(1),
                    FaultKind::ByRemoteAccess => self.counters.faults_by_remote_access.add(1),
                }
                FaultWait::Asked(token)
            }
            None => {
                self.counters.fault_queue_full.add(1);
                FaultWait::Unasked { until: self.now.after(self.device.config.rnr_timer.nanoseconds()) }
            }
        }
    }
}

/// A page that is missing, and how much of the message lies behind it.
#[derive(Clone, Copy, Debug)]
pub(super) struct PageAt {
    pub(super) key: crate::wire::Key,
    pub(super) address: crate::addr::RegionAddr,
    pub(super) rest: u64,
}

impl Core {
    pub(super) fn new(shared: Arc<Shared>, first_psn: Psn, config: &HcaConfig) -> Self {
        Self {
            shared,
            state: QpState::Reset,
            first_psn,
            route: None,
            requester: Requester::new(first_psn, config),
            responder: Responder::new(Psn::default(), config),
            responder_next: false,
            incarnation: 0,
            queued: false,
            timer: None,
        }
    }

    /// Changes the state.
    pub(in crate::hca) fn apply(
        &mut self,
        transition: &Transition,
        context: &mut Context<'_>,
    ) -> Result<(), IllegalTransition> {
        let state = self.state.after(transition)?;
        let config = &context.device.config;
        match transition {
            Transition::Init => {}
            Transition::ReadyToReceive { peer } => {
                self.responder = Responder::new(peer.psn, config);
                self.route = Some(Route { peer: *peer, mtu: config.path_mtu });
            }
            Transition::ReadyToSend => {
                if self.state != QpState::ReadyToSend {
                    self.requester = Requester::new(self.first_psn, config);
                }
            }
            Transition::Error => {
                self.enter_error(context);
                return Ok(());
            }
            Transition::Reset => {
                self.enter_error(context);
                self.route = None;
            }
        }
        self.set_state(state);
        if state == QpState::Reset {
            // What was posted while the queue pair passed through the error state.
            self.flush(context);
        }
        Ok(())
    }

    fn set_state(&mut self, state: QpState) {
        self.state = state;
        self.shared.set_state(state);
    }

    /// Stops everything; what was posted is flushed (10.3.1).
    pub(in crate::hca) fn enter_error(&mut self, context: &mut Context<'_>) {
        self.incarnation += 1;
        self.set_state(QpState::Error);
        self.responder = Responder::new(Psn::default(), &context.device.config);
        self.flush(context);
    }

    fn flush(&mut self, context: &Context<'_>) {
        self.requester.flush(&self.shared, context);
        while let Some(wqe) = self.shared.take() {
            // The queue pair is in the error state already; there is nothing more that an overrun could do to it.
            let _: Result<(), Overran> = self.shared.complete(&wqe, Status::FlushError, context.counters);
        }
    }

    /// Does what can be done without DMA up to the next DMA.
    pub(in crate::hca) fn next(&mut self, context: &mut Context<'_>) -> Next {
        let next = match (self.state, &self.route) {
            (QpState::Error, _) => {
                self.flush(context);
                return Next::Nothing;
            }
            (QpState::ReadyToReceive, Some(route)) => self.responder.next(route, context),
            (QpState::ReadyToSend, Some(route)) => {
                // In turns, so that neither a long read by the peer nor a long write to it starves the other way.
                self.responder_next = !self.responder_next;
                let first = if self.responder_next {
                    self.responder.next(route, context)
                } else {
                    self.requester.next(route, &self.shared, context)
                };
                match first {
                    Next::Nothing if self.responder_next => self.requester.next(route, &self.shared, context),
                    Next::Nothing => self.responder.next(route, context),
                    other => other,
                }
            }
            _ => return Next::Nothing,
        };
        self.settle(next, context)
    }

    /// Takes a packet from the link.
    pub(in crate::hca) fn receive(&mut self, packet: Packet, context: &mut Context<'_>) -> Next {
        let expected_source = self.route.as_ref().map(|route| route.peer.gid);
        if !self.state.receives() || expected_source != Some(packet.source) {
            context.counters.packets_dropped.add(1);
            return Next::Nothing;
        }
        let Some(route) = &self.route else { return Next::Nothing };
        context.counters.packets_received.add(1);
        if packet.route.met_congestion() {
            context.device.link.congested(route.peer.gid, route.peer.qpn);
        }
        let next = if !packet.header.is_response() {
            self.responder.receive(packet, route, &self.shared, context)
        } else if self.state == QpState::ReadyToSend {
            self.requester.receive(packet, route, &self.shared, context)
        } else {
            context.counters.packets_dropped.add(1);
            Next::Nothing
        };
        self.settle(next, context)
    }

    /// Takes the result of a DMA that [`Core::next`] or [`Core::receive`] asked for.
    pub(in crate::hca) fn finish(
        &mut self,
        dma: Dma,
        result: Result<(), Obstacle>,
        context: &mut Context<'_>,
    ) -> Next {
        if let Err(Obstacle::Refused(error)) = &result {
            context.counters.dma_refused.add(1);
            tracing::warn!(qpn = self.shared.qpn.0, %error, work = ?dma.work, "DMA refused");
        }
        if let (Err(Obstacle::Key(error)), qpn) = (&result, self.shared.qpn) {
            tracing::debug!(qpn = qpn.0, %error, work = ?dma.work, "key violation");
        }
        let Some(route) = &self.route else { return Next::Nothing };
        let next = match dma.work {
            Work::Request { .. } | Work::Land { .. } => {
                self.requester.finish(dma, result, route, &self.shared, context)
            }
            Work::Place { .. } | Work::Respond { .. } => {
                self.responder.finish(dma, result, route, &self.shared, context)
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
        }
    }

    /// When the queue pair wants to be called even if nothing else happens.
    pub(in crate::hca) fn deadline(&self) -> Option<Time> {
        if self.state == QpState::ReadyToSend { self.requester.deadline() } else { None }
    }

    /// Its deadline may have come.
    pub(in crate::hca) fn on_time(&mut self, context: &mut Context<'_>) {
        if self.state == QpState::ReadyToSend {
            let next = self.requester.on_time(context);
            self.settle(next, context);
        }
    }

    /// Carries out what ends a queue pair.
    fn settle(&mut self, next: Next, context: &mut Context<'_>) -> Next {
        let next = match next {
            Next::Fail(status) => {
                tracing::debug!(qpn = self.shared.qpn.0, ?status, "request failed");
                self.requester.end_oldest(status, &self.shared, context);
                Next::Close
            }
            other => other,
        };
        if matches!(next, Next::Close) || self.requester.overran {
            self.enter_error(context);
            return Next::Nothing;
        }
        next
    }
}
