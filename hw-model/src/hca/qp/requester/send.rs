//! From requests to packets (IBTA volume 1, 9.7.3).

use super::job::Job;
use super::{Requester, Wait};
use crate::hca::fault::{FaultKind, FaultWait};
use crate::hca::key::Access;
use crate::hca::qp::core::{Context, Dma, Next, PageAt, Route, Work};
use crate::hca::qp::queue::Shared;
use crate::hca::request::{Operation, Status};
use crate::hca::translate::{Direction, Obstacle};
use crate::wire::{Header, Payload, Psn, Reth};

impl Requester {
    pub(in crate::hca::qp) fn next(
        &mut self,
        route: &Route,
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
        if self.cursor_job == self.jobs.len() && !self.activate(route, shared) {
            return Next::Nothing;
        }
        let job = &self.jobs[self.cursor_job];
        if let Some(status) = job.failed {
            return if self.cursor_job == 0 { Next::Fail(status) } else { Next::Nothing };
        }
        if job.wqe.fence && self.reads > 0 {
            return Next::Nothing;
        }
        match job.wqe.operation {
            Operation::Write(_) => self.next_write(route, context),
            Operation::Read(_) => self.next_read(route, context),
            _ => self.next_local(shared, context),
        }
    }

    /// Gives the oldest posted request its sequence numbers. False if there is none, or no numbers.
    fn activate(&mut self, route: &Route, shared: &Shared) -> bool {
        // What is outstanding must stay below half of the number space, or old and new could not be told apart; the
        // longest message takes a quarter.
        let outstanding = self.allocate.since(self.unacknowledged).unsigned_abs();
        if outstanding >= Psn::WINDOW / 2 {
            return false;
        }
        // Without a lock: what was posted before the doorbell that brought us here has been counted.
        if shared.outstanding() as usize <= self.jobs.len() {
            return false;
        }
        let Some(wqe) = shared.take() else { return false };
        let packets = if wqe.operation.is_local() { 0 } else { route.mtu.packets(wqe.length) };
        let first = self.allocate;
        self.allocate = first.offset(packets);
        self.jobs.push_back(Job { wqe, first, packets, received: 0, done: false, failed: None });
        true
    }

    fn next_write(&mut self, route: &Route, context: &mut Context<'_>) -> Next {
        let job = &self.jobs[self.cursor_job];
        let Operation::Write(remote) = job.wqe.operation else { return Next::Nothing };
        let window = (context.device.config.window_bytes / route.mtu.bytes()).clamp(4, 1024);
        let psn = job.first.offset(self.cursor_packet);
        let ahead = psn.since(self.unacknowledged).unsigned_abs();
        if ahead >= window {
            return Next::Nothing;
        }
        let offset = self.cursor_packet * route.mtu.bytes();
        let bytes = route.mtu.bytes().min(job.wqe.length - offset);
        let first = self.cursor_packet == 0;
        let last = self.cursor_packet + 1 == job.packets;
        let reth = Reth { address: remote.address, key: remote.key, length: job.wqe.length };
        let header = match (first, last) {
            (true, true) => Header::WriteOnly(reth),
            (true, false) => Header::WriteFirst(reth),
            (false, false) => Header::WriteMiddle,
            (false, true) => Header::WriteLast,
        };
        let ack_request = last || ahead + 1 == window || (self.cursor_packet + 1).is_multiple_of(window / 2);
        if bytes == 0 {
            context.send(route, psn, ack_request, header, Payload::EMPTY);
            self.sent(psn.next(), context);
            return Next::Again;
        }
        job.pieces(offset, bytes, context.pieces);
        Next::Dma(Dma {
            direction: Direction::Gather,
            need: Access::empty(),
            payload: context.payload(bytes),
            work: Work::Request { header, psn, ack_request },
        })
    }

    fn next_read(&mut self, route: &Route, context: &mut Context<'_>) -> Next {
        let job = &self.jobs[self.cursor_job];
        let Operation::Read(remote) = job.wqe.operation else { return Next::Nothing };
        if self.reads >= context.device.config.limits.reads {
            return Next::Nothing;
        }
        // After a loss only what is missing is asked for again.
        let reth = Reth {
            address: remote.address.offset(u64::from(job.received)),
            key: remote.key,
            length: job.wqe.length - job.received,
        };
        let (psn, end) = (job.awaited(route), job.end());
        context.send(route, psn, true, Header::ReadRequest(reth), Payload::EMPTY);
        self.reads += 1;
        self.cursor_packet = job.packets - 1;
        self.sent(end, context);
        Next::Again
    }

    /// The packet at the cursor has gone out; `end` is one past its numbers.
    fn sent(&mut self, end: Psn, context: &Context<'_>) {
        self.cursor_packet += 1;
        if self.cursor_packet == self.jobs[self.cursor_job].packets {
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

    pub(in crate::hca::qp) fn finish(
        &mut self,
        dma: Dma,
        result: Result<(), Obstacle>,
        route: &Route,
        shared: &Shared,
        context: &mut Context<'_>,
    ) -> Next {
        let (psn, landing) = match dma.work {
            Work::Request { psn, .. } => (psn, false),
            Work::Land { psn } => (psn, true),
            Work::Place { .. } | Work::Respond { .. } => unreachable!("work of the responder"),
        };
        match (result, dma.work) {
            (Ok(()), Work::Request { header, psn, ack_request }) => {
                context.send(route, psn, ack_request, header, dma.payload);
                self.sent(psn.next(), context);
            }
            (Ok(()), _) => {
                context.counters.bytes_placed.add(dma.payload.len() as u64);
                self.landed(psn, dma.payload.len() as u32, route, shared, context);
            }
            (Err(Obstacle::Page { key, address, rest }), _) => {
                let at = PageAt { key, address, rest };
                let wait = context.ask(shared, FaultKind::ByWorkRequest, at, dma.direction);
                self.wait = Wait::Page { wait, psn, landing };
                // The timer stands still while software brings the page in.
                self.ack_deadline = None;
                if landing {
                    // The data is dropped, and what follows it; the read is sent again for what is missing.
                    self.recovering = true;
                    self.seek(psn);
                }
            }
            (Err(Obstacle::Key(_)), _) => self.fail_at(psn, Status::LocalProtectionError),
            (Err(Obstacle::Refused(_)), _) => self.fail_at(psn, Status::LocalQpOperationError),
        }
        Next::Again
    }
}
