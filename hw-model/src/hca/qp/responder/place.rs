//! Sends and RDMA writes over a reliable connection: bytes to their place, packet by packet (IBTA volume 1, 9.7.4.1.4 for
//! the order of opcodes, 9.7.4.1.6 for lengths).

use super::{Message, Responder};
use crate::hca::key::Access;
use crate::hca::pd::Pd;
use crate::hca::qp::queue::Shared;
use crate::hca::qp::work::{Context, Dma, Marks, Next, Route, Work};
use crate::hca::request::Status;
use crate::hca::translate::{Direction, Piece};
use crate::wire::{Header, NakCode, Packet, Position};

/// What a packet means for the message that it belongs to.
#[derive(Clone, Copy)]
pub(super) struct Part {
    /// The message before its bytes.
    pub(super) message: Message,
    pub(super) ends: bool,
    /// It begins or completes a receive.
    pub(super) needs_receive: bool,
}

impl Responder {
    /// The next packet of a send or a write.
    pub(super) fn place(
        &mut self,
        packet: &mut Packet,
        route: &Route,
        shared: &Shared,
        context: &mut Context<'_>,
    ) -> Next {
        let psn = packet.psn;
        let bytes = packet.payload.len() as u32;
        let Some(part) = self.part(&packet.header, bytes, route.mtu.bytes()) else {
            self.refuse(NakCode::InvalidRequest, psn);
            return Next::Again;
        };
        if part.needs_receive && !self.take_receive(shared, context) {
            self.not_ready(psn);
            return Next::Again;
        }
        let marks = Marks { ack_request: packet.ack_request, solicited: packet.solicited };
        if let Message::Send { filled } = part.message
            && self.receive.as_ref().is_none_or(|receive| bytes > receive.length - filled)
        {
            // A message longer than the receive (9.7.5.2.4; 11.6.2, local length error).
            self.end_receive(Status::LocalLengthError, shared, context);
            self.refuse(NakCode::InvalidRequest, psn);
            return Next::Again;
        }
        if bytes == 0 {
            // Without data no key is looked at (9.4.3).
            self.placed(&packet.header, 0, marks, route, shared, context);
            return Next::Again;
        }
        self.dma(packet, part.message, marks, self.pd(shared), context)
    }

    /// The DMA that brings the payload of a packet to its place.
    pub(super) fn dma(
        &self,
        packet: &mut Packet,
        message: Message,
        marks: Marks,
        pd: Pd,
        context: &mut Context<'_>,
    ) -> Next {
        let Packet { psn, header, .. } = *packet;
        let payload = std::mem::take(&mut packet.payload);
        let now = payload.len() as u32;
        let need = match message {
            Message::Send { filled } => {
                let Some(receive) = &self.receive else { return Next::Nothing };
                receive.sges.pieces(filled, now, context.pieces);
                Access::LOCAL_WRITE
            }
            Message::Write { key, next, left, .. } => {
                context.pieces.clear();
                context.pieces.push(Piece { key, address: next, now, rest: u64::from(left) });
                Access::REMOTE_WRITE
            }
        };
        let work = Work::Place { header, psn, marks, from: None };
        context.request(Dma { direction: Direction::Scatter, need, pd, payload, work })
    }

    /// The message that a packet of `bytes` bytes belongs to, if its opcode and its length are in order.
    pub(super) fn part(&self, header: &Header, bytes: u32, mtu: u32) -> Option<Part> {
        let (position, message) = match (header.send_position(), header.write_position()) {
            (Some(position), _) => (position, self.send_message(position)?),
            (None, Some(position)) => (position, self.write_message(header, position)?),
            (None, None) => return None,
        };
        let full = match position {
            Position::First | Position::Middle => bytes == mtu,
            Position::Last => bytes > 0 && bytes <= mtu,
            Position::Only => bytes <= mtu,
        };
        let fits = match message {
            Message::Send { .. } => true,
            Message::Write { left, .. } if position.ends() => bytes == left,
            Message::Write { left, .. } => bytes < left,
        };
        let needs_receive = match message {
            Message::Send { .. } => position.begins(),
            Message::Write { .. } => header.immediate().is_some(),
        };
        (full && fits).then_some(Part { message, ends: position.ends(), needs_receive })
    }

    fn send_message(&self, position: Position) -> Option<Message> {
        match (position.begins(), self.message) {
            (true, None) => Some(Message::Send { filled: 0 }),
            (false, Some(message @ Message::Send { .. })) => Some(message),
            _ => None,
        }
    }

    fn write_message(&self, header: &Header, position: Position) -> Option<Message> {
        if !self.access.contains(Access::REMOTE_WRITE) {
            return None;
        }
        match (position.begins(), self.message, header.reth()) {
            (true, None, Some(reth)) => {
                let (key, next, length) = (reth.key, reth.address, reth.length);
                Some(Message::Write { key, next, left: length, length })
            }
            (false, Some(message @ Message::Write { .. }), _) => Some(message),
            _ => None,
        }
    }

    /// `bytes` of a packet with `header` are in their place.
    pub(super) fn placed(
        &mut self,
        header: &Header,
        bytes: u32,
        marks: Marks,
        route: &Route,
        shared: &Shared,
        context: &Context<'_>,
    ) {
        let Some(part) = self.part(header, bytes, route.mtu.bytes()) else { return };
        let total = self.advance(part, bytes);
        self.executed(1, part.ends);
        self.acknowledge |= marks.ack_request;
        if part.ends && !self.received(header, total, marks, None, shared, context) {
            self.closing = true;
            self.acknowledge = true;
        }
    }

    /// Moves the message on by `bytes`. Gives the bytes of the message until now.
    pub(super) fn advance(&mut self, part: Part, bytes: u32) -> u32 {
        let (message, total) = match part.message {
            Message::Send { filled } => (Message::Send { filled: filled + bytes }, filled + bytes),
            Message::Write { key, next, left, length } => {
                let left = left - bytes;
                (Message::Write { key, next: next.offset(u64::from(bytes)), left, length }, length - left)
            }
        };
        self.message = (!part.ends).then_some(message);
        total
    }
}
