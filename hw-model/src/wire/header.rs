//! Opcodes with the extended headers that they demand: what cannot be on the wire cannot be built.

use super::{Aeth, AtomicEth, Feth, Immediate, Key, Reth, Service};

/// What a packet is: the operation of the base transport header (the lower five bits of the opcode, 9.2.1, table 38), with
/// the extended headers it demands, in their order on the wire. Which service carries it is [`Packet::service`].
///
/// [`Packet::service`]: super::Packet::service
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Header {
    /// First of several packets of a message that the peer has posted a receive for.
    SendFirst,
    /// Neither first nor last.
    SendMiddle,
    /// Last of several.
    SendLast,
    /// Last of several, with immediate data.
    SendLastImmediate(Immediate),
    /// Last of several; the responder invalidates the key (9.4.1.1).
    SendLastInvalidate(Key),
    /// A whole message.
    SendOnly,
    /// A whole message, with immediate data.
    SendOnlyImmediate(Immediate),
    /// A whole message; the responder invalidates the key (9.4.1.1).
    SendOnlyInvalidate(Key),
    /// First of several packets of an RDMA write.
    WriteFirst(Reth),
    /// Neither first nor last.
    WriteMiddle,
    /// Last of several.
    WriteLast,
    /// Last of several, with immediate data.
    WriteLastImmediate(Immediate),
    /// A whole RDMA write.
    WriteOnly(Reth),
    /// A whole RDMA write, with immediate data.
    WriteOnlyImmediate(Reth, Immediate),
    /// An RDMA read: the responses use as many PSNs as they are packets.
    ReadRequest(Reth),
    /// First of several packets of a read response.
    ReadResponseFirst(Aeth),
    /// Neither first nor last. Has no AETH.
    ReadResponseMiddle,
    /// Last of several.
    ReadResponseLast(Aeth),
    /// A whole read response. The answer to a flush is one too, without data (A19.4.1).
    ReadResponseOnly(Aeth),
    /// ACK or NAK.
    Acknowledge(Aeth),
    /// The answer to an atomic: the word as it was (9.3.5.3, AtomicAckETH).
    AtomicAcknowledge(Aeth, u64),
    /// Compare and swap (9.4.5).
    CompareSwap(AtomicEth),
    /// Fetch and add (9.4.5).
    FetchAdd(AtomicEth),
    /// Flush (A19.4.1).
    Flush(Feth, Reth),
    /// Atomic write of the 8 bytes of the payload (A19.4.2).
    AtomicWrite(Reth),
}

/// Where in its message a request packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Position {
    /// First of several.
    First,
    /// Neither first nor last.
    Middle,
    /// Last of several.
    Last,
    /// The whole message.
    Only,
}

impl Position {
    /// Whether a message begins with it.
    #[must_use]
    pub const fn begins(self) -> bool {
        matches!(self, Self::First | Self::Only)
    }
    /// Whether a message ends with it.
    #[must_use]
    pub const fn ends(self) -> bool {
        matches!(self, Self::Last | Self::Only)
    }
    /// That of packet number `index` of `count`.
    #[must_use]
    pub const fn of(index: u32, count: u32) -> Self {
        match (index == 0, index + 1 == count) {
            (true, true) => Self::Only,
            (true, false) => Self::First,
            (false, false) => Self::Middle,
            (false, true) => Self::Last,
        }
    }
}

impl Header {
    /// Whether a responder sends this.
    #[must_use]
    pub const fn is_response(&self) -> bool {
        matches!(
            self,
            Self::ReadResponseFirst(_)
                | Self::ReadResponseMiddle
                | Self::ReadResponseLast(_)
                | Self::ReadResponseOnly(_)
                | Self::Acknowledge(_)
                | Self::AtomicAcknowledge(..)
        )
    }

    /// Where in a send it is; `None` if it is no send.
    #[must_use]
    pub const fn send_position(&self) -> Option<Position> {
        match self {
            Self::SendFirst => Some(Position::First),
            Self::SendMiddle => Some(Position::Middle),
            Self::SendLast | Self::SendLastImmediate(_) | Self::SendLastInvalidate(_) => Some(Position::Last),
            Self::SendOnly | Self::SendOnlyImmediate(_) | Self::SendOnlyInvalidate(_) => Some(Position::Only),
            _ => None,
        }
    }

    /// Where in an RDMA write it is; `None` if it is no RDMA write.
    #[must_use]
    pub const fn write_position(&self) -> Option<Position> {
        match self {
            Self::WriteFirst(_) => Some(Position::First),
            Self::WriteMiddle => Some(Position::Middle),
            Self::WriteLast | Self::WriteLastImmediate(_) => Some(Position::Last),
            Self::WriteOnly(_) | Self::WriteOnlyImmediate(..) => Some(Position::Only),
            _ => None,
        }
    }

    /// Its RDMA extended transport header.
    #[must_use]
    pub const fn reth(&self) -> Option<Reth> {
        match self {
            Self::WriteFirst(reth)
            | Self::WriteOnly(reth)
            | Self::WriteOnlyImmediate(reth, _)
            | Self::ReadRequest(reth)
            | Self::Flush(_, reth)
            | Self::AtomicWrite(reth) => Some(*reth),
            _ => None,
        }
    }

    /// Its ACK extended transport header.
    #[must_use]
    pub const fn aeth(&self) -> Option<Aeth> {
        match self {
            Self::ReadResponseFirst(aeth)
            | Self::ReadResponseLast(aeth)
            | Self::ReadResponseOnly(aeth)
            | Self::Acknowledge(aeth)
            | Self::AtomicAcknowledge(aeth, _) => Some(*aeth),
            _ => None,
        }
    }

    /// Its immediate data.
    #[must_use]
    pub const fn immediate(&self) -> Option<Immediate> {
        match self {
            Self::SendLastImmediate(immediate)
            | Self::SendOnlyImmediate(immediate)
            | Self::WriteLastImmediate(immediate)
            | Self::WriteOnlyImmediate(_, immediate) => Some(*immediate),
            _ => None,
        }
    }

    /// The key that it has the responder invalidate.
    #[must_use]
    pub const fn invalidates(&self) -> Option<Key> {
        match self {
            Self::SendLastInvalidate(key) | Self::SendOnlyInvalidate(key) => Some(*key),
            _ => None,
        }
    }

    /// Whether `service` has such an operation (9.2.1, table 38): UC has sends and writes, UD single sends, and neither
    /// has invalidation.
    #[must_use]
    pub const fn is_of(&self, service: Service) -> bool {
        match service {
            Service::ReliableConnection => true,
            // XRCETH is in requests, and in no response (A14.3.1).
            Service::ExtendedConnection(queue) => queue.is_some() != self.is_response(),
            Service::UnreliableConnection => {
                let moves = self.send_position().is_some() || self.write_position().is_some();
                moves && self.invalidates().is_none()
            }
            Service::UnreliableDatagram(_) => matches!(self, Self::SendOnly | Self::SendOnlyImmediate(_)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Deth, QKey, Qpn, Srqn};

    #[test]
    fn each_service_has_the_operations_of_the_opcode_table() {
        let datagram = Service::UnreliableDatagram(Deth { qkey: QKey(1), source_qp: Qpn(2) });
        let (uc, rc) = (Service::UnreliableConnection, Service::ReliableConnection);
        let asked = Service::ExtendedConnection(Some(Srqn(3)));
        let answered = Service::ExtendedConnection(None);
        let of = |header: Header| [rc, uc, datagram, asked, answered].map(|service| header.is_of(service));
        assert_eq!(of(Header::SendOnly), [true, true, true, true, false]);
        assert_eq!(of(Header::SendFirst), [true, true, false, true, false]);
        assert_eq!(of(Header::SendOnlyInvalidate(Key(1))), [true, false, false, true, false]);
        assert_eq!(of(Header::WriteMiddle), [true, true, false, true, false]);
        assert_eq!(of(Header::ReadResponseMiddle), [true, false, false, false, true]);
    }

    #[test]
    fn a_message_of_one_packet_is_first_and_last_at_once() {
        assert_eq!(Position::of(0, 1), Position::Only);
        assert_eq!(
            [0, 1, 2].map(|n| Position::of(n, 3)),
            [Position::First, Position::Middle, Position::Last]
        );
    }
}
