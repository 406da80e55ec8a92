//! The requester: requests become packets, answers become completions (IBTA volume 1, 9.7.3 and 9.7.6).
//!
//! Requests are given their sequence numbers when they leave the posted queue, as many as they have packets (a read: as
//! its response has packets). `unacknowledged` is the oldest number not yet answered; the cursor is the next to send. To
//! go back is to move the cursor: data is read from memory again, nothing is kept.

mod answers;
mod job;
mod local;
mod send;

use super::QpState;
use super::attributes::QpAttributes;
use super::queue::{Shared, take_oldest};
use super::work::{Context, Next, Route};
use crate::hca::fault::{FaultOutcome, FaultToken, FaultWait};
use crate::hca::request::Status;
use crate::hca::time::{AckTimeout, Time};
use crate::wire::Psn;
use job::Job;
use std::collections::VecDeque;

/// An `rnr_retry` that never ends (9.7.5.2.8).
const FOR_EVER: u8 = 7;

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

/// How a requester treats a peer that is slow to answer.
#[derive(Clone, Copy)]
struct Pace {
    timeout: AckTimeout,
    retry_count: u8,
    rnr_retry: u8,
    reads: u8,
}

impl Pace {
    fn of(attributes: &QpAttributes) -> Self {
        let QpAttributes { timeout, retry_count, rnr_retry, reads, .. } = *attributes;
        Self { timeout, retry_count, rnr_retry, reads }
    }
}

pub(super) struct Requester {
    jobs: VecDeque<Job>,
    cursor_job: usize,
    cursor_packet: u32,
    /// Reads, atomics and flushes before the cursor that have not had all their answer.
    fetches: u32,
    /// The number that the next job begins with.
    allocate: Psn,
    unacknowledged: Psn,
    /// One past the highest number ever sent.
    highest: Psn,
    wait: Wait,
    ack_deadline: Option<Time>,
    retries_left: u8,
    rnr_left: u8,
    pace: Pace,
    /// Ends what has begun, and begins nothing (10.3.1.5).
    draining: bool,
    /// An event is due when all that has begun has ended.
    notify_drained: bool,
    /// A gap in read responses was answered by going back; further ones of the same burst say nothing new.
    recovering: bool,
    /// A read's data, lent by the peer, could not be fetched, and everything was asked again from there up to this number.
    /// Until all of it is answered, answers of the first time show gaps that mean nothing.
    called_in: Option<Psn>,
    /// The completion queue overran: the queue pair must go to the error state.
    pub(super) overran: bool,
}

impl Requester {
    pub(super) fn new(attributes: &QpAttributes) -> Self {
        let first = attributes.sq_psn;
        Self {
            jobs: VecDeque::new(),
            cursor_job: 0,
            cursor_packet: 0,
            fetches: 0,
            allocate: first,
            unacknowledged: first,
            highest: first,
            wait: Wait::Nothing,
            ack_deadline: None,
            retries_left: attributes.retry_count,
            rnr_left: attributes.rnr_retry,
            pace: Pace::of(attributes),
            draining: false,
            notify_drained: false,
            recovering: false,
            called_in: None,
            overran: false,
        }
    }

    /// Takes what software has set.
    pub(super) fn set(&mut self, attributes: &QpAttributes, notify_drained: bool) {
        self.pace = Pace::of(attributes);
        self.draining = attributes.state == QpState::SendQueueDrain;
        self.notify_drained = self.draining && (self.notify_drained || notify_drained);
    }

    /// The sequence number that the next request begins with.
    pub(super) fn next_psn(&self) -> Psn {
        self.allocate
    }

    /// Whether an event will be due that says so.
    pub(super) fn is_to_tell(&self) -> bool {
        self.notify_drained
    }

    /// Whether nothing is to be sent: all that has begun has been, and nothing more is posted.
    #[inline]
    pub(super) fn has_nothing_to_ask(&self, shared: &Shared) -> bool {
        let sent = self.cursor_job == self.jobs.len() && matches!(self.wait, Wait::Nothing);
        // Without a lock: what was posted before the doorbell that brought us here has been counted.
        sent && shared.outstanding() as usize <= self.jobs.len()
    }

    /// Whether an event is due that says so; asked once.
    pub(super) fn has_drained(&mut self) -> bool {
        let drained = self.notify_drained && self.is_drained();
        self.notify_drained &= !drained;
        drained
    }

    /// Whether all that has begun has ended.
    pub(super) fn is_drained(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Ends what lies before `psn`. False if a read before it has not had its data.
    fn advance(&mut self, psn: Psn, route: &Route, shared: &Shared, context: &mut Context<'_>) -> bool {
        let before = self.unacknowledged;
        let mut complete = true;
        while let Some(job) = self.jobs.front() {
            if job.is_local() && job.done {
                self.end_oldest(Status::Success, shared, context);
                continue;
            }
            if psn.since(job.first) <= 0 || job.is_local() {
                break;
            }
            if job.is_fetch() && !job.done {
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
            self.retries_left = self.pace.retry_count;
            self.rnr_left = self.pace.rnr_retry;
            self.recovering = false;
            self.called_in = self.called_in.filter(|end| self.unacknowledged.since(*end) < 0);
            if self.ack_deadline.is_some() {
                self.restart_timer(context);
            }
        }
        complete
    }

    /// Ends the oldest request. A request ends here, or in [`Requester::flush`].
    pub(super) fn end_oldest(&mut self, status: Status, shared: &Shared, context: &Context<'_>) {
        let Some(job) = self.jobs.front() else { return };
        if self.cursor_job > 0 {
            self.cursor_job -= 1;
            self.fetches -= u32::from(job.is_fetch());
        } else {
            self.cursor_packet = 0;
        }
        // Ended where it lies: it is large.
        self.overran |= shared.complete(&job.wqe, status, context.counters).is_err();
        take_oldest(&mut self.jobs);
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
        if psn.since(self.unacknowledged) < 0 {
            // It was being sent again and has been answered meanwhile: what is at the cursor now is another request.
            return;
        }
        self.seek(psn);
        if let Some(job) = self.jobs.get_mut(self.cursor_job) {
            job.failed = Some(status);
        }
    }

    /// Moves the cursor to `psn`, which is not before the oldest unanswered request.
    fn seek(&mut self, psn: Psn) {
        let job = self.jobs.iter().position(|job| !job.is_before(psn)).unwrap_or(self.jobs.len());
        self.cursor_job = job;
        self.cursor_packet = match self.jobs.get(job) {
            Some(job) if !job.is_fetch() => psn.since(job.first).max(0).unsigned_abs(),
            _ => 0,
        };
        self.fetches = self.jobs.iter().take(job).filter(|job| job.is_fetch() && !job.done).count() as u32;
    }

    /// The bytes of packet `psn` were lent and could not be fetched: sends again from there. Nothing was lost, so it costs no
    /// retry.
    pub(super) fn send_again(&mut self, psn: Psn, context: &Context<'_>) {
        let cursor = match self.jobs.get(self.cursor_job) {
            Some(job) => job.first.offset(self.cursor_packet),
            None => self.allocate,
        };
        if psn.since(self.unacknowledged) >= 0 && psn.since(cursor) < 0 {
            self.seek(psn);
            self.restart_timer(context);
        }
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

    /// Stops waiting.
    fn go_on(&mut self, context: &Context<'_>) {
        self.wait = Wait::Nothing;
        self.restart_timer(context);
    }

    fn restart_timer(&mut self, context: &Context<'_>) {
        let outstanding = self.highest.since(self.unacknowledged) > 0;
        let timeout = self.pace.timeout.nanoseconds();
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
