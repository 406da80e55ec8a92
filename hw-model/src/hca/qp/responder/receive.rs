//! Receives: taken when a message needs one, ended with it (IBTA volume 1, 10.8.2, 11.4.2.1).

use super::{Message, Responder};
use crate::hca::events::AsyncEvent;
use crate::hca::qp::queue::{Shared, attached};
use crate::hca::qp::receive::Taken;
use crate::hca::qp::work::{Context, Marks};
use crate::hca::request::{Completion, DatagramSource, OperationCode, Status};
use crate::wire::{Header, Qpn};

impl Responder {
    /// Whether there is a receive for the message: the one that it has, or the oldest that is posted.
    pub(super) fn take_receive(&mut self, shared: &Shared, context: &Context<'_>) -> bool {
        if self.receive.is_some() {
            return true;
        }
        let receiving = self.receiving(shared);
        let shared_queue = receiving.shared;
        self.receive = match receiving.take() {
            Taken::Nothing => None,
            Taken::Receive(wqe) => Some(wqe),
            Taken::Last(wqe) => {
                if let Some(number) = shared_queue {
                    context.device.events.post(AsyncEvent::SrqLimitReached(number));
                }
                Some(wqe)
            }
        };
        self.receive.is_some()
    }

    /// Ends the receive, if there is one, for another reason than success.
    pub(super) fn end_receive(&mut self, status: Status, shared: &Shared, context: &Context<'_>) {
        if let Some(wqe) = self.receive.take() {
            let completion = Completion::new(wqe.id, status, OperationCode::Receive, shared.qpn, 0);
            let full = self.receiving(shared).complete(&wqe, completion, context.counters);
            self.overran |= full.is_err();
        }
    }

    /// Ends the receive of a message that has arrived whole. False if the key that it invalidates was not its to
    /// invalidate.
    pub(super) fn received(
        &mut self,
        header: &Header,
        bytes: u32,
        marks: Marks,
        from: Option<Qpn>,
        shared: &Shared,
        context: &Context<'_>,
    ) -> bool {
        let operation = match header.write_position() {
            Some(_) => OperationCode::ReceiveWrite,
            None => OperationCode::Receive,
        };
        let (keys, caller) = (&context.device.keys, self.caller(shared));
        let invalidated = header.invalidates().map_or(Ok(()), |key| keys.invalidate(caller, key));
        if let Err(error) = invalidated {
            tracing::debug!(qpn = shared.qpn.0, %error, "send with invalidate refused");
            // The message was received, and its sender is told so; this end has failed (9.9.3, responder class J).
            self.end_receive(Status::RemoteInvalidRequestError, shared, context);
            return false;
        }
        let Some(wqe) = self.receive.take() else { return true };
        let mut completion = Completion::new(wqe.id, Status::Success, operation, shared.qpn, bytes);
        completion.attached = attached(header);
        completion.solicited = marks.solicited;
        completion.datagram = from.map(|qpn| DatagramSource { qpn, pkey_index: self.pkey_index });
        let full = self.receiving(shared).complete(&wqe, completion, context.counters);
        self.overran |= full.is_err();
        true
    }

    /// Ends everything: the queue pair is in the error state.
    pub(in crate::hca::qp) fn flush(&mut self, shared: &Shared, context: &Context<'_>) {
        self.end_receive(Status::FlushError, shared, context);
        self.message = None::<Message>;
        if shared.receives.own().is_some() {
            while let Taken::Receive(wqe) | Taken::Last(wqe) = shared.receives.take() {
                self.receive = Some(wqe);
                self.end_receive(Status::FlushError, shared, context);
            }
        }
        self.overran = false;
    }
}
