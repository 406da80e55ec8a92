//! The requester: requests become packets, answers become completions (IBTA volume 1, 9.7.3 and 9.7.6).
//!
//! Requests are given their sequence numbers when they leave the posted queue, as many as they have packets (a read: as
//! its response has packets). `unacknowledged` is the oldest number not yet answered; the cursor is the next to send. To
//! go back is to move the cursor: data is read from memory again, nothing is kept.

use super::core::{Context, Dma, Next, PageAt, Route, Work};
use super::queue::{Shared, Wqe};
use crate::hca::config::HcaConfig;
use crate::hca::fault::{FaultKind, FaultOutcome, FaultToken, FaultWait};
use crate::hca::key::Access;
use crate::hca::request::{Operation, Status};
use crate::hca::time::Time;
use crate::hca::translate::{Direction, Obstacle, Piece};
use crate::wire::{Aeth, Header, NakCode, Packet, Psn, Reth, RnrTimer, Syndrome};
use std::collections::VecDeque;

/// An `rnr_retry` that never ends (9.7.5.2.8).
const FOR_EVER: u8 = 7;

/// A request that has its sequence numbers.
struct Job {
    wqe: Wqe,
    first: Psn,
    packets: u32,
    /// Of a read: bytes that have arrived.
    received: u32,
    /// Of a read: all has arrived.
    done: bool,
    /// It failed on this side. Its completion waits for those before it.
    failed: Option<Status>,
}

enum Wait {
    Nothing,
    /// The peer was not ready.
    Rnr {
        until: Time,
    },
    /// A page is missing: of the data to send at the cursor, or (`landing`) of the place for a read's data.
    Page {
        wait: FaultWait,
        psn: Psn,
        landing: bool,
    },
}

pub(super) struct Requester {
    jobs: VecDeque<Job>,
    cursor_job: usize,
    cursor_packet: u32,
    /// Reads before the cursor that have not had all their data.
    reads: u32,
    /// The number that the next job begins with.
    allocate: Psn,
    unacknowledged: Psn,
    /// One past the highest number ever sent.
    highest: Psn,
    wait: Wait,
    ack_deadline: Option<Time>,
    retries_left: u8,
    rnr_left: u8,
    /// A gap in read responses was answered by going back; further ones of the same burst say nothing new.
    recovering: bool,
    /// The completion queue overran: the queue pair must go to the error state.
    pub(super) overran: bool,
}

impl Job {
    fn end(&self) -> Psn {
        self.first.offset(self.packets)
    }
    fn is_read(&self) -> bool {
        matches!(self.wqe.operation, Operation::Read(_))
    }
    /// The sequence number of the next response that a read waits for.
    fn awaited(&self, route: &Route) -> Psn {
        self.first.offset(self.received / route.mtu.bytes())
    }
    /// The parts of local memory that hold `now` bytes at `offset` of the message.
    fn pieces(&self, mut offset: u32, mut now: u32, out: &mut Vec<Piece>) {
        out.clear();
        for sge in self.wqe.sges() {
            if now == 0 {
                return;
            }
            if offset >= sge.length {
                offset -= sge.length;
                continue;
            }
            let rest = sge.length - offset;
            let part = rest.min(now);
            let address = sge.address.offset(u64::from(offset));
            out.push(Piece { key: sge.key, address, now: part, rest: u64::from(rest) });
            offset = 0;
            now -= part;
        }
    }
}

impl Requester {
    pub(super) fn new(first: Psn, config: &HcaConfig) -> Self {
        Self {
            jobs: VecDeque::new(),
            cursor_job: 0,
            cursor_packet: 0,
            reads: 0,
            allocate: first,
            unacknowledged: first,
            highest: first,
            wait: Wait::Nothing,
            ack_deadline: None,
            retries_left: config.retry_count,
            rnr_left: config.rnr_retry,
            recovering: false,
            overran: false,
        }
    }

    pub(super) fn next(&mut self, route: &Route, shared: &Shared, context: &mut Context<'_>) -> Next {
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
        let packets = route.mtu.packets(wqe.length);
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
            context.send(route, psn, ack_request, header, crate::wire::Payload::EMPTY);
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
        context.send(route, psn, true, Header::ReadRequest(reth), crate::wire::Payload::EMPTY);
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

    pub(super) fn finish(
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

    pub(super) fn receive(
        &mut self,
        packet: Packet,
        route: &Route,
        shared: &Shared,
        context: &mut Context<'_>,
    ) -> Next {
        // An answer to what was never sent, or was answered before, is a ghost (9.7.6).
        let psn = packet.psn;
        if psn.since(self.unacknowledged) < 0 || psn.since(self.highest) >= 0 {
            context.counters.packets_dropped.add(1);
            return Next::Nothing;
        }
        match packet.header {
            Header::Acknowledge(Aeth { syndrome, .. }) => {
                self.acknowledge(psn, syndrome, route, shared, context)
            }
            Header::ReadResponseFirst(_) | Header::ReadResponseMiddle => {
                self.read_response(packet, false, route, shared, context)
            }
            Header::ReadResponseLast(_) | Header::ReadResponseOnly(_) => {
                self.read_response(packet, true, route, shared, context)
            }
            _ => Next::Nothing,
        }
    }

    fn acknowledge(
        &mut self,
        psn: Psn,
        syndrome: Syndrome,
        route: &Route,
        shared: &Shared,
        context: &mut Context<'_>,
    ) -> Next {
        let (answered, negative) = match syndrome {
            Syndrome::Ack => (psn.next(), None),
            Syndrome::RnrNak(_) | Syndrome::Nak(_) => (psn, Some(syndrome)),
        };
        if !self.advance(answered, route, shared, context) {
            // A read before it has not had its data: its responses were lost (9.7.6).
            return self.recover(context);
        }
        match negative {
            None | Some(Syndrome::Ack) => Next::Again,
            Some(Syndrome::RnrNak(timer)) => self.not_ready(psn, timer, context),
            Some(Syndrome::Nak(code)) => {
                context.counters.naks_received.add(1);
                match code {
                    NakCode::SequenceError => self.go_back(context),
                    NakCode::InvalidRequest => Next::Fail(Status::RemoteInvalidRequestError),
                    NakCode::RemoteAccess => Next::Fail(Status::RemoteAccessError),
                    NakCode::RemoteOperational => Next::Fail(Status::RemoteOperationError),
                }
            }
        }
    }

    fn not_ready(&mut self, psn: Psn, timer: RnrTimer, context: &mut Context<'_>) -> Next {
        context.counters.rnr_naks_received.add(1);
        if matches!(self.wait, Wait::Rnr { .. }) {
            return Next::Nothing;
        }
        if self.rnr_left == 0 {
            return Next::Fail(Status::RnrRetryExceeded);
        }
        if self.rnr_left != FOR_EVER {
            self.rnr_left -= 1;
        }
        self.wait = Wait::Rnr { until: context.now.after(timer.nanoseconds()) };
        self.ack_deadline = None;
        self.seek(psn);
        Next::Nothing
    }

    fn read_response(
        &mut self,
        packet: Packet,
        last: bool,
        route: &Route,
        shared: &Shared,
        context: &mut Context<'_>,
    ) -> Next {
        let Some(job) = self.jobs.iter().find(|job| job.is_read() && !job.done) else { return Next::Nothing };
        let (first, awaited) = (job.first, job.awaited(route));
        match packet.psn.since(awaited) {
            ..0 => return Next::Nothing,
            0 => {}
            1.. => return self.recover(context),
        }
        if matches!(self.wait, Wait::Page { landing: true, .. }) {
            return Next::Nothing;
        }
        // A response answers the writes before it too.
        self.advance(first, route, shared, context);
        let Some(job) = self.jobs.front() else { return Next::Nothing };
        let bytes = route.mtu.bytes().min(job.wqe.length - job.received);
        if packet.payload.len() != bytes as usize || last != (job.received + bytes == job.wqe.length) {
            return Next::Fail(Status::BadResponseError);
        }
        if bytes == 0 {
            self.landed(packet.psn, 0, route, shared, context);
            return Next::Again;
        }
        job.pieces(job.received, bytes, context.pieces);
        Next::Dma(Dma {
            direction: Direction::Scatter,
            need: Access::LOCAL_WRITE,
            payload: packet.payload,
            work: Work::Land { psn: packet.psn },
        })
    }

    /// The response `psn` of the oldest request, a read, is in its place.
    fn landed(&mut self, psn: Psn, bytes: u32, route: &Route, shared: &Shared, context: &mut Context<'_>) {
        if let Some(job) = self.jobs.front_mut() {
            job.received += bytes;
            job.done = job.received == job.wqe.length;
        }
        self.advance(psn.next(), route, shared, context);
    }

    /// Ends what lies before `psn`. False if a read before it has not had its data.
    fn advance(&mut self, psn: Psn, route: &Route, shared: &Shared, context: &mut Context<'_>) -> bool {
        let before = self.unacknowledged;
        let mut complete = true;
        while let Some(job) = self.jobs.front() {
            if psn.since(job.first) <= 0 {
                break;
            }
            if job.is_read() && !job.done {
                self.unacknowledged = job.awaited(route);
                complete = psn.since(self.unacknowledged) <= 0;
                break;
            }
            if psn.since(job.end()) < 0 {
                self.unacknowledged = psn;
                if self.cursor_job == 0 {
                    self.cursor_packet = self.cursor_packet.max(psn.since(job.first).unsigned_abs());
                }
                break;
            }
            self.unacknowledged = job.end();
            self.end_oldest(Status::Success, shared, context);
        }
        if self.unacknowledged != before {
            self.retries_left = context.device.config.retry_count;
            self.rnr_left = context.device.config.rnr_retry;
            self.recovering = false;
            if self.ack_deadline.is_some() {
                self.restart_timer(context);
            }
        }
        complete
    }

    /// Ends the oldest request. A request ends here, or in [`Requester::flush`].
    fn end_oldest(&mut self, status: Status, shared: &Shared, context: &Context<'_>) {
        let Some(job) = self.jobs.pop_front() else { return };
        if self.cursor_job > 0 {
            self.cursor_job -= 1;
            self.reads -= u32::from(job.is_read());
        } else {
            self.cursor_packet = 0;
        }
        self.overran |= shared.complete(&job.wqe, status, context.counters).is_err();
    }

    pub(super) fn fail_oldest(&mut self, status: Status, shared: &Shared, context: &Context<'_>) {
        self.end_oldest(status, shared, context);
    }

    /// Ends everything.
    pub(super) fn flush(&mut self, shared: &Shared, context: &Context<'_>) {
        self.wait = Wait::Nothing;
        self.ack_deadline = None;
        while !self.jobs.is_empty() {
            self.end_oldest(Status::FlushError, shared, context);
        }
        self.overran = false;
    }

    /// Marks the request that `psn` belongs to as failed on this side, and sends nothing more of it.
    fn fail_at(&mut self, psn: Psn, status: Status) {
        self.seek(psn);
        if let Some(job) = self.jobs.get_mut(self.cursor_job) {
            job.failed = Some(status);
        }
    }

    /// Moves the cursor to `psn`, which is not before the oldest unanswered request.
    fn seek(&mut self, psn: Psn) {
        let job = self.jobs.iter().position(|job| psn.since(job.end()) < 0).unwrap_or(self.jobs.len());
        self.cursor_job = job;
        self.cursor_packet = match self.jobs.get(job) {
            Some(job) if !job.is_read() => psn.since(job.first).max(0).unsigned_abs(),
            _ => 0,
        };
        self.reads = self.jobs.iter().take(job).filter(|job| job.is_read() && !job.done).count() as u32;
    }

    /// Sends again from the oldest unanswered packet, if it may (9.7.6: one retry counter for loss and timeout).
    fn go_back(&mut self, context: &mut Context<'_>) -> Next {
        if self.retries_left == 0 {
            return Next::Fail(Status::RetryExceeded);
        }
        self.retries_left -= 1;
        context.counters.retries.add(1);
        self.ack_deadline = None;
        self.seek(self.unacknowledged);
        Next::Again
    }

    /// Answers a gap in read responses, once for all the packets that show the same gap.
    fn recover(&mut self, context: &mut Context<'_>) -> Next {
        let will_go_back = matches!(self.wait, Wait::Rnr { .. } | Wait::Page { landing: true, .. });
        if self.recovering || will_go_back {
            return Next::Nothing;
        }
        self.recovering = true;
        self.go_back(context)
    }

    /// Stops waiting.
    fn go_on(&mut self, context: &Context<'_>) {
        self.wait = Wait::Nothing;
        self.restart_timer(context);
    }

    fn restart_timer(&mut self, context: &Context<'_>) {
        let outstanding = self.highest.since(self.unacknowledged) > 0;
        let timeout = context.device.config.ack_timeout.nanoseconds();
        self.ack_deadline = timeout.filter(|_| outstanding).map(|timeout| context.now.after(timeout));
    }

    pub(super) fn deadline(&self) -> Option<Time> {
        match &self.wait {
            Wait::Rnr { until } | Wait::Page { wait: FaultWait::Unasked { until }, .. } => Some(*until),
            Wait::Nothing | Wait::Page { .. } => self.ack_deadline,
        }
    }

    pub(super) fn on_time(&mut self, context: &mut Context<'_>) -> Next {
        if let Wait::Rnr { until } | Wait::Page { wait: FaultWait::Unasked { until }, .. } = self.wait
            && until <= context.now
        {
            self.go_on(context);
            return Next::Again;
        }
        match self.ack_deadline {
            Some(deadline) if deadline <= context.now => {
                context.counters.timeouts.add(1);
                self.recovering = false;
                self.go_back(context)
            }
            _ => Next::Nothing,
        }
    }

    pub(super) fn answer(&mut self, token: FaultToken, outcome: FaultOutcome, context: &Context<'_>) -> bool {
        let Wait::Page { wait, .. } = &mut self.wait else { return false };
        if !matches!(wait, FaultWait::Asked(asked) if *asked == token) {
            return false;
        }
        match outcome {
            FaultOutcome::Resolved => self.go_on(context),
            FaultOutcome::Failed => *wait = FaultWait::Denied,
        }
        true
    }
}
