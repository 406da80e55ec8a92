//! The services where nothing is answered: unreliable connections and datagrams (IBTA volume 1, 9.8.2 and 9.8.3). What
//! cannot be done is dropped.

use super::place::Part;
use super::{Message, Responder};
use crate::hca::key::Access;
use crate::hca::qp::queue::Shared;
use crate::hca::qp::receive::GRH_BYTES;
use crate::hca::qp::work::{Context, Dma, Marks, Next, Route, Work};
use crate::hca::request::Status;
use crate::hca::translate::{Direction, Obstacle};
use crate::wire::{Packet, Service};

impl Responder {
    /// A packet of an unreliable connection. A message arrives whole or not at all: after a gap, what is left of it is
    /// dropped (9.8.2.2.3).
    pub(super) fn unreliable(
        &mut self,
        packet: &mut Packet,
        route: Option<&Route>,
        shared: &Shared,
        context: &mut Context<'_>,
    ) -> Next {
        let Some(route) = route else { return Next::Nothing };
        let position = packet.header.send_position().or(packet.header.write_position());
        let begins = position.is_some_and(|position| position.begins());
        if packet.psn != self.expected || begins {
            self.lose_message(shared, context);
        }
        self.expected = packet.psn.next();
        let bytes = packet.payload.len() as u32;
        let part = self.part(&packet.header, bytes, route.mtu.bytes());
        let Some(part) = part.filter(|part| !part.needs_receive || self.take_receive(shared, context)) else {
            context.counters.packets_dropped.add(1);
            self.lose_message(shared, context);
            return Next::Nothing;
        };
        if let Message::Send { filled } = part.message
            && self.receive.as_ref().is_none_or(|receive| bytes > receive.length - filled)
        {
            self.too_long(shared, context);
            return Next::Again;
        }
        let marks = Marks { ack_request: false, solicited: packet.solicited };
        if bytes == 0 {
            return self.placed_unreliable(part, &packet.header, 0, marks, shared, context);
        }
        self.dma(packet, part.message, marks, shared.pd, context)
    }

    /// A datagram: to the oldest receive, behind its global route header (9.8.3.2).
    pub(super) fn datagram(&mut self, packet: &Packet, shared: &Shared, context: &mut Context<'_>) -> Next {
        let Service::UnreliableDatagram(deth) = packet.service else { return Next::Nothing };
        let bytes = packet.payload.len() as u32 + GRH_BYTES;
        if !self.take_receive(shared, context) {
            context.counters.packets_dropped.add(1);
            return Next::Nothing;
        }
        let Some(receive) = self.receive.as_ref().filter(|receive| receive.length >= bytes) else {
            self.too_long(shared, context);
            return Next::Again;
        };
        receive.sges.pieces(0, bytes, context.pieces);
        let mut payload = context.payload(bytes);
        payload[..GRH_BYTES as usize].copy_from_slice(&packet.route_header());
        payload[GRH_BYTES as usize..].copy_from_slice(&packet.payload);
        let marks = Marks { ack_request: false, solicited: packet.solicited };
        let from = Some(deth.source_qp);
        let work = Work::Place { header: packet.header, psn: packet.psn, marks, from };
        let need = Access::LOCAL_WRITE;
        context.request(Dma { direction: Direction::Scatter, need, pd: shared.pd, payload, work })
    }

    /// A message longer than its receive: dropped; the receive waits for the next one (9.9.3, responder class D). One of a
    /// shared queue cannot be put back, and ends (class E).
    fn too_long(&mut self, shared: &Shared, context: &Context<'_>) {
        context.counters.packets_dropped.add(1);
        self.message = None;
        if shared.receives.shared.is_some() {
            self.end_receive(Status::LocalLengthError, shared, context);
        }
    }

    /// What is left of the message that has begun is dropped. Its receive waits for the next one, unless it is a shared
    /// queue's: that has been overtaken, and ends.
    pub(super) fn lose_message(&mut self, shared: &Shared, context: &Context<'_>) {
        if self.message.take().is_some() && shared.receives.shared.is_some() {
            self.end_receive(Status::RemoteAbortedError, shared, context);
        }
    }

    fn placed_unreliable(
        &mut self,
        part: Part,
        header: &crate::wire::Header,
        bytes: u32,
        marks: Marks,
        shared: &Shared,
        context: &Context<'_>,
    ) -> Next {
        let total = self.advance(part, bytes);
        if part.ends {
            self.received(header, total, marks, None, shared, context);
        }
        Next::Again
    }

    pub(super) fn finish_unreliable(
        &mut self,
        result: Result<(), Obstacle>,
        shared: &Shared,
        context: &mut Context<'_>,
    ) -> Next {
        let Work::Place { header, marks, from, .. } = context.dma.work else {
            unreachable!("nothing is answered")
        };
        let bytes = context.dma.payload.len() as u32;
        if let Err(obstacle) = result {
            if header.write_position().is_some() {
                // What the peer named it may not write: dropped, and the peer hears nothing (9.9.3, class D).
                context.counters.packets_dropped.add(1);
                self.lose_message(shared, context);
                return Next::Again;
            }
            let status = match obstacle {
                Obstacle::Refused(_) => Status::LocalQpOperationError,
                _ => Status::LocalProtectionError,
            };
            self.end_receive(status, shared, context);
            return Next::Close;
        }
        context.counters.bytes_placed.add(u64::from(bytes));
        if from.is_some() {
            self.received(&header, bytes, marks, from, shared, context);
            return Next::Again;
        }
        // A full packet is as long as the MTU; of others only the message matters here.
        match self.part(&header, bytes, bytes) {
            Some(part) => self.placed_unreliable(part, &header, bytes, marks, shared, context),
            None => Next::Again,
        }
    }
}
