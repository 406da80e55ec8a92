//! What a responder sends: read responses, atomic acknowledgements, acknowledgements, in the order of the requests (IBTA
//! volume 1, 9.7.5.1).

use super::{Reply, Responder};
use crate::addr::RegionAddr;
use crate::hca::events::AsyncEvent;
use crate::hca::key::Access;
use crate::hca::pd::Pd;
use crate::hca::qp::queue::Shared;
use crate::hca::qp::work::{Context, Dma, Marks, Next, Route, Work};
use crate::hca::translate::{Direction, Piece};
use crate::wire::{Aeth, Header, Key, NakCode, Payload, Psn, Reth, Syndrome};

/// An answer that is more than an acknowledgement.
#[derive(Clone, Copy)]
pub(super) enum Answer {
    Read(ReadJob),
    Done(Psn, Done),
}

/// What an atomic, an atomic write or a flush came to.
#[derive(Clone, Copy)]
pub(super) enum Done {
    /// The word as it was.
    Word(u64),
    /// Only that it is done: a read response without data says so (A19.4).
    Nothing,
}

/// A read that is being answered.
#[derive(Clone, Copy)]
pub(super) struct ReadJob {
    psn: Psn,
    pd: Pd,
    key: Key,
    next: RegionAddr,
    left: u32,
    begun: bool,
}

impl ReadJob {
    pub(super) fn new(psn: Psn, reth: &Reth, pd: Pd) -> Self {
        Self { psn, pd, key: reth.key, next: reth.address, left: reth.length, begun: false }
    }
}

impl Answer {
    /// The number of the first response still to be sent.
    pub(super) fn psn(&self) -> Psn {
        match self {
            Self::Read(job) => job.psn,
            Self::Done(psn, _) => *psn,
        }
    }
    /// The number of the last one.
    fn last(&self, route: &Route) -> Psn {
        match self {
            Self::Read(job) => job.psn.offset(route.mtu.packets(job.left)).previous(),
            Self::Done(psn, _) => *psn,
        }
    }
    /// Whether the response with this number is still to be sent.
    fn covers(&self, psn: Psn, route: &Route) -> bool {
        psn.since(self.psn()) >= 0 && psn.since(self.last(route)) <= 0
    }
}

/// Software hears of a refusal that no completion of its own tells of (11.6.3.3).
fn tell(code: NakCode, shared: &Shared, context: &Context<'_>) {
    let event = match code {
        NakCode::InvalidRequest => AsyncEvent::QpRequestError(shared.qpn),
        NakCode::RemoteAccess => AsyncEvent::QpAccessError(shared.qpn),
        NakCode::SequenceError | NakCode::RemoteOperational => return,
    };
    context.device.events.post(event);
}

impl Responder {
    /// Sends what is to be answered, or goes on with a packet that waited for its page.
    pub(in crate::hca::qp) fn next(
        &mut self,
        route: Option<&Route>,
        shared: &Shared,
        context: &mut Context<'_>,
    ) -> Next {
        match &self.stall {
            Some(stall) if stall.is_over(context.now) => return self.go_on(route, shared, context),
            Some(stall) if stall.holds_answers() => return Next::Nothing,
            _ => {}
        }
        let Some(route) = route else { return Next::Nothing };
        if let Some(answer) = self.answers.front() {
            return match *answer {
                Answer::Read(job) => self.respond(job, route, context),
                Answer::Done(psn, done) => {
                    let aeth = self.aeth(Syndrome::Ack);
                    let header = match done {
                        Done::Word(word) => Header::AtomicAcknowledge(aeth, word),
                        Done::Nothing => Header::ReadResponseOnly(aeth),
                    };
                    context.send(route, psn, Marks::default(), header, Payload::EMPTY);
                    self.answers.pop_front();
                    Next::Again
                }
            };
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
                tell(code, shared, context);
                (psn, Syndrome::Nak(code))
            }
            None if self.acknowledge && self.owed.is_none() => {
                self.acknowledge = false;
                (self.expected.previous(), Syndrome::Ack)
            }
            None => return Next::Nothing,
        };
        let header = Header::Acknowledge(self.aeth(syndrome));
        context.send(route, psn, Marks::default(), header, Payload::EMPTY);
        if self.closing { Next::Close } else { Next::Again }
    }

    /// The next packet of a read response.
    fn respond(&mut self, job: ReadJob, route: &Route, context: &mut Context<'_>) -> Next {
        let bytes = route.mtu.bytes().min(job.left);
        let aeth = self.aeth(Syndrome::Ack);
        let header = match (!job.begun, bytes == job.left) {
            (true, true) => Header::ReadResponseOnly(aeth),
            (true, false) => Header::ReadResponseFirst(aeth),
            (false, false) => Header::ReadResponseMiddle,
            (false, true) => Header::ReadResponseLast(aeth),
        };
        if bytes == 0 {
            context.send(route, job.psn, Marks::default(), header, Payload::EMPTY);
            self.answers.pop_front();
            return Next::Again;
        }
        context.pieces.clear();
        context.pieces.push(Piece { key: job.key, address: job.next, now: bytes, rest: u64::from(job.left) });
        context.request(Dma {
            direction: Direction::Gather,
            need: Access::REMOTE_READ,
            pd: job.pd,
            payload: context.payload_to(route, bytes),
            work: Work::Respond { header, psn: job.psn },
        })
    }

    /// `bytes` of the oldest read have been sent.
    pub(super) fn responded(&mut self, bytes: u32) {
        let Some(Answer::Read(job)) = self.answers.front_mut() else { return };
        job.psn = job.psn.next();
        job.next = job.next.offset(u64::from(bytes));
        job.left -= bytes;
        job.begun = true;
        if job.left == 0 {
            self.answers.pop_front();
        }
    }

    /// A request that ends before `end` is here. Requests come in order: what is owed was asked again with it or before it,
    /// or was not needed any more.
    pub(super) fn settle_owed(&mut self, end: Psn) {
        self.owed = self.owed.filter(|owed| end.since(*owed) <= 0);
    }

    /// Forgets the answers from `psn` on: the peer asks for them again.
    pub(super) fn drop_answers(&mut self, psn: Psn, route: &Route) {
        let last = self.answers.back().map(|job| job.last(route)).filter(|last| last.since(psn) >= 0);
        self.answers.retain(|job| job.psn().since(psn) < 0 && !job.covers(psn, route));
        self.owed = match (self.owed, last) {
            (Some(owed), Some(last)) if last.since(owed) < 0 => Some(owed),
            (owed, last) => last.or(owed),
        };
    }

    fn aeth(&self, syndrome: Syndrome) -> Aeth {
        Aeth { syndrome, msn: self.messages & 0xff_ffff }
    }
}
