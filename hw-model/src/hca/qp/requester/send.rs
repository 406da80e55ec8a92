//! From requests to packets (IBTA volume 1, 9.7.3).

use super::job::Job;
use super::{Requester, Wait};
use crate::hca::fault::{FaultKind, FaultWait};
use crate::hca::key::Access;
use crate::hca::qp::Transport;
use crate::hca::qp::attributes::QpAttributes;
use crate::hca::qp::list::Data;
use crate::hca::qp::queue::Shared;
use crate::hca::qp::work::{Context, Dma, Marks, Next, PageAt, Route, Work};
use crate::hca::request::{Destination, Status};
use crate::hca::translate::{Direction, Obstacle};
use crate::wire::{Deth, Header, Payload, Position, Psn, Service};

impl Requester {
    pub(in crate::hca::qp) fn next(
        &mut self,
        route: Option<&Route>,
        attributes: &QpAttributes,
        shared: &Shared,
        context: &mut Context<'_>,
    ) -> Next {
        match &self.wait {
            Wait::Nothing => {}
            Wait::Rnr { .. } | Wait::Page { wait: FaultWait::Asked(_) | FaultWait::Unasked { .. }, .. } => {
                return Next::Nothing;
            }
            Wait::Page { wait: FaultWait::Denied, psn, .. } => {
                let psn = *psn;
                self.go_on(context);
                self.fail_at(psn, Status::LocalProtectionError);
            }
        }
        if self.cursor_job == self.jobs.len() && !self.activate(attributes, shared) {
            return Next::Nothing;
        }
        let job = &self.jobs[self.cursor_job];
        if let Some(status) = job.failed {
            return if self.cursor_job == 0 { Next::Fail(status) } else { Next::Nothing };
        }
        if job.wqe.fence && self.fetches > 0 {
            return Next::Nothing;
        }
        if job.is_local() {
            return self.next_local(shared, context);
        }
        let mut own = None;
        let Some(route) = route_of(job, route, attributes, shared, &mut own) else { return Next::Nothing };
        if job.is_fetch() {
            self.next_fetch(route, shared, context)
        } else {
            self.next_data(route, shared, context)
        }
    }

    /// Gives the oldest posted request its sequence numbers. False if there is none, or no numbers.
    fn activate(&mut self, attributes: &QpAttributes, shared: &Shared) -> bool {
        if self.draining {
            return false;
        }
        // What is outstanding must stay below half of the number space, or old and new could not be told apart; the
        // longest message takes a quarter.
        let outstanding = self.allocate.since(self.unacknowledged).unsigned_abs();
        if outstanding >= Psn::WINDOW / 2 {
            return false;
        }
        let Some(wqe) = shared.take() else { return false };
        let mtu = attributes.path_mtu;
        let packets = match wqe.operation {
            operation if operation.is_local() => 0,
            _ => mtu.packets(wqe.length),
        };
        let mut failed = None;
        if shared.transport == Transport::UnreliableDatagram && wqe.length > mtu.bytes() {
            // A datagram is one packet (9.8.3).
            failed = Some(Status::LocalLengthError);
        }
        if wqe.operation.is_fetch() && attributes.reads == 0 {
            failed = Some(Status::LocalQpOperationError);
        }
        let first = self.allocate;
        self.allocate = first.offset(packets);
        self.jobs.push_back(Job { wqe, first, packets, received: 0, done: false, failed });
        true
    }

    /// The next packet of a send or a write.
    fn next_data(&mut self, route: &Route, shared: &Shared, context: &mut Context<'_>) -> Next {
        let job = &self.jobs[self.cursor_job];
        let psn = job.first.offset(self.cursor_packet);
        let position = Position::of(self.cursor_packet, job.packets);
        let mut marks = Marks { ack_request: false, solicited: job.wqe.solicited && position.ends() };
        if shared.transport.is_reliable() {
            let window = (context.device.config.window_bytes / route.mtu.bytes()).clamp(4, 1024);
            let ahead = psn.since(self.unacknowledged).unsigned_abs();
            if ahead >= window {
                return Next::Nothing;
            }
            marks.ack_request =
                position.ends() || ahead + 1 == window || (self.cursor_packet + 1).is_multiple_of(window / 2);
        }
        let offset = self.cursor_packet * route.mtu.bytes();
        let bytes = route.mtu.bytes().min(job.wqe.length - offset);
        let header = job.header(position);
        self.send_from((psn, marks, header), (offset, bytes), route, shared, context)
    }

    /// A request whose answer is more than an acknowledgement.
    fn next_fetch(&mut self, route: &Route, shared: &Shared, context: &mut Context<'_>) -> Next {
        let job = &self.jobs[self.cursor_job];
        if self.fetches >= u32::from(self.pace.reads) {
            return Next::Nothing;
        }
        let marks = Marks { ack_request: true, solicited: false };
        let (psn, end) = (job.awaited(route), job.end());
        let header = job.header(Position::Only);
        if matches!(header, Header::AtomicWrite(_)) {
            let length = job.wqe.length;
            return self.gather((psn, marks, header), (0, length), route, shared, context);
        }
        context.send(route, psn, marks, header, Payload::EMPTY);
        self.cursor_packet = job.packets - 1;
        self.sent(end, context);
        Next::Again
    }

    fn send_from(
        &mut self,
        packet: (Psn, Marks, Header),
        (offset, bytes): (u32, u32),
        route: &Route,
        shared: &Shared,
        context: &mut Context<'_>,
    ) -> Next {
        let next = self.gather(packet, (offset, bytes), route, shared, context);
        if matches!(next, Next::Again) {
            self.end_unanswered(shared, context);
        }
        next
    }

    /// Sends a packet with `bytes` of the message from `offset` on, or asks for the DMA that brings them.
    fn gather(
        &mut self,
        (psn, marks, header): (Psn, Marks, Header),
        (offset, bytes): (u32, u32),
        route: &Route,
        shared: &Shared,
        context: &mut Context<'_>,
    ) -> Next {
        let payload = match &self.jobs[self.cursor_job].wqe.data {
            _ if bytes == 0 => Payload::EMPTY,
            Data::Taken(data) => context.payload_of(&data[offset as usize..(offset + bytes) as usize]),
            Data::List(list) => {
                list.pieces(offset, bytes, context.pieces);
                let payload = match route.service {
                    // Its receiver puts a header in front of it.
                    Service::UnreliableDatagram(_) => context.payload(bytes),
                    _ => context.payload_to(route, bytes),
                };
                let work = Work::Request { header, psn, marks };
                return context.request(Dma {
                    direction: Direction::Gather,
                    need: Access::empty(),
                    pd: shared.pd,
                    payload,
                    work,
                });
            }
        };
        context.send(route, psn, marks, header, payload);
        self.sent(psn.next(), context);
        Next::Again
    }

    /// The packet at the cursor has gone out; `end` is one past its numbers.
    fn sent(&mut self, end: Psn, context: &Context<'_>) {
        self.cursor_packet += 1;
        let job = &self.jobs[self.cursor_job];
        if self.cursor_packet == job.packets {
            self.fetches += u32::from(job.is_fetch());
            self.cursor_job += 1;
            self.cursor_packet = 0;
        }
        if end.since(self.highest) > 0 {
            self.highest = end;
        }
        if self.ack_deadline.is_none() {
            self.restart_timer(context);
        }
    }

    /// Nobody answers over an unreliable service: a request has ended when it has been sent (9.8.2.2.1, 9.8.3.2).
    fn end_unanswered(&mut self, shared: &Shared, context: &Context<'_>) {
        if shared.transport.is_reliable() {
            return;
        }
        self.unacknowledged = self.highest;
        self.ack_deadline = None;
        while self.cursor_job > 0 {
            self.end_oldest(Status::Success, shared, context);
        }
    }

    pub(in crate::hca::qp) fn finish(
        &mut self,
        result: Result<(), Obstacle>,
        (route, attributes): (Option<&Route>, &QpAttributes),
        shared: &Shared,
        context: &mut Context<'_>,
    ) -> Next {
        let (psn, landing) = match context.dma.work {
            Work::Request { psn, .. } => (psn, false),
            Work::Land { psn } => (psn, true),
            Work::Place { .. } | Work::Respond { .. } => unreachable!("work of the responder"),
        };
        let job = self.jobs.get(self.cursor_job);
        match (result, context.dma.work) {
            (Ok(()), Work::Request { header, psn, marks }) => {
                let mut own = None;
                if let Some(route) = job.and_then(|job| route_of(job, route, attributes, shared, &mut own)) {
                    let payload = std::mem::take(&mut context.dma.payload);
                    context.send(route, psn, marks, header, payload);
                    self.sent(psn.next(), context);
                    self.end_unanswered(shared, context);
                }
            }
            (Ok(()), _) => {
                let bytes = context.dma.payload.len() as u32;
                context.counters.bytes_placed.add(u64::from(bytes));
                if let Some(route) = route {
                    self.landed(psn, bytes, route, shared, context);
                }
            }
            (Err(Obstacle::Page { key, address, rest }), _) => {
                let at = PageAt { key, address, rest };
                let retry = context.device.config.rnr_timer;
                let wait = context.ask(shared, FaultKind::ByWorkRequest, at, context.dma.direction, retry);
                self.wait = Wait::Page { wait, psn, landing };
                // The timer stands still while software brings the page in.
                self.ack_deadline = None;
                if landing {
                    // The data is dropped, and what follows it; the request is sent again for what is missing.
                    self.recovering = true;
                    self.seek(psn);
                }
            }
            (Err(Obstacle::CalledIn), _) => {
                // The data is dropped, and what follows it; the read is sent again for what is missing.
                self.recovering = true;
                self.called_in = Some(self.highest);
                self.seek(psn);
                self.restart_timer(context);
            }
            (Err(Obstacle::Key(_) | Obstacle::Misaligned), _) => {
                self.fail_at(psn, Status::LocalProtectionError);
            }
            (Err(Obstacle::Refused(_)), _) => self.fail_at(psn, Status::LocalQpOperationError),
        }
        Next::Again
    }
}

/// The way of a request: the connection's, with the shared queue it names, or that of its address, which is put in `own`.
fn route_of<'a>(
    job: &Job,
    route: Option<&'a Route>,
    attributes: &QpAttributes,
    shared: &Shared,
    own: &'a mut Option<Route>,
) -> Option<&'a Route> {
    *own = match job.wqe.destination {
        Destination::Connected => return route,
        Destination::SharedQueue(number) => {
            route.map(|route| Route { service: Service::ExtendedConnection(Some(number)), ..*route })
        }
        Destination::Datagram { to, qpn, qkey } => {
            // A controlled key in a request stands for the queue pair's own (10.2.5).
            let qkey = if qkey.is_controlled() { attributes.qkey } else { qkey };
            Some(Route {
                gid: to.gid,
                qpn,
                global: to.route,
                mtu: attributes.path_mtu,
                pkey: attributes.pkey,
                service: Service::UnreliableDatagram(Deth { qkey, source_qp: shared.qpn }),
            })
        }
    };
    own.as_ref()
}
