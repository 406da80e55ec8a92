//! From answers to completions (IBTA volume 1, 9.7.6).

use super::{FOR_EVER, Requester, Wait};
use crate::hca::key::Access;
use crate::hca::qp::list::Data;
use crate::hca::qp::queue::Shared;
use crate::hca::qp::work::{Context, Dma, Next, Route, Work};
use crate::hca::request::Status;
use crate::hca::translate::Direction;
use crate::wire::{Aeth, Header, NakCode, Packet, Psn, RnrTimer, Syndrome};

impl Requester {
    pub(in crate::hca::qp) fn receive(
        &mut self,
        packet: &mut Packet,
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
                self.response(packet, false, route, shared, context)
            }
            Header::ReadResponseLast(_) | Header::ReadResponseOnly(_) | Header::AtomicAcknowledge(..) => {
                self.response(packet, true, route, shared, context)
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
            if let Some(Syndrome::Nak(code)) = negative
                && let (Some(_), Some(status)) = (self.called_in, refusal(code))
            {
                // Its memory went, and the peer has closed: it will not answer what was asked again.
                context.counters.naks_received.add(1);
                return Next::Fail(status);
            }
            // A read before it has not had its data: its responses were lost (9.7.6).
            return self.recover(context);
        }
        match negative {
            None | Some(Syndrome::Ack) => Next::Again,
            Some(Syndrome::RnrNak(timer)) => self.not_ready(psn, timer, context),
            Some(Syndrome::Nak(code)) => {
                context.counters.naks_received.add(1);
                match refusal(code) {
                    None => self.go_back(context),
                    Some(status) => Next::Fail(status),
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
        // This goes back already. An acknowledgement that passed it on the way says nothing of a loss: asking twice would
        // cost a retry, and have the peer answer what may have lost its key by then.
        self.recovering = true;
        self.seek(psn);
        Next::Nothing
    }

    fn response(
        &mut self,
        packet: &mut Packet,
        last: bool,
        route: &Route,
        shared: &Shared,
        context: &mut Context<'_>,
    ) -> Next {
        let Some(job) = self.jobs.iter().find(|job| job.is_fetch() && !job.done) else {
            return Next::Nothing;
        };
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
        let word = match packet.header {
            Header::AtomicAcknowledge(_, word) => Some(word),
            _ => None,
        };
        if let Some(word) = word {
            packet.payload = context.payload_of(&word.to_le_bytes());
        }
        let whole = job.answer_bytes();
        let bytes = route.mtu.bytes().min(whole - job.received);
        let fits = packet.payload.len() == bytes as usize && last == (job.received + bytes == whole);
        if !fits || word.is_some() != job.wants_word() {
            return Next::Fail(Status::BadResponseError);
        }
        if bytes == 0 {
            self.landed(packet.psn, 0, route, shared, context);
            return Next::Again;
        }
        if let Data::List(list) = &job.wqe.data {
            list.pieces(job.received, bytes, context.pieces);
        }
        context.request(Dma {
            direction: Direction::Scatter,
            need: Access::LOCAL_WRITE,
            pd: shared.pd,
            payload: std::mem::take(&mut packet.payload),
            work: Work::Land { psn: packet.psn },
        })
    }

    /// The response `psn` of the oldest request, a read, is in its place.
    pub(super) fn landed(
        &mut self,
        psn: Psn,
        bytes: u32,
        route: &Route,
        shared: &Shared,
        context: &mut Context<'_>,
    ) {
        if let Some(job) = self.jobs.front_mut() {
            job.received += bytes;
            job.done = job.received == job.answer_bytes();
        }
        self.advance(psn.next(), route, shared, context);
    }

    /// Answers a gap in read responses, once for all the packets that show the same gap.
    pub(super) fn recover(&mut self, context: &mut Context<'_>) -> Next {
        let will_go_back = matches!(self.wait, Wait::Rnr { .. } | Wait::Page { landing: true, .. });
        if self.recovering || self.called_in.is_some() || will_go_back {
            return Next::Nothing;
        }
        self.recovering = true;
        self.go_back(context)
    }
}

/// How a request ends that was refused with `code`. `None`: it does not.
fn refusal(code: NakCode) -> Option<Status> {
    match code {
        NakCode::SequenceError => None,
        NakCode::InvalidRequest => Some(Status::RemoteInvalidRequestError),
        NakCode::RemoteAccess => Some(Status::RemoteAccessError),
        NakCode::RemoteOperational => Some(Status::RemoteOperationError),
    }
}
