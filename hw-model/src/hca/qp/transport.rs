//! The transport services that a queue pair can have (IBTA volume 1, 9.1; annex A14 for XRC).

use crate::hca::request::{Destination, Operation};

/// The service of a queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Transport {
    /// RC: one peer; everything arrives once and in order.
    ReliableConnection,
    /// UC: one peer; a message arrives whole or not at all.
    UnreliableConnection,
    /// UD: any peer; messages of one packet.
    UnreliableDatagram,
    /// XRC, the end that sends: as RC, and each request names the peer's receive queue.
    ExtendedInitiator,
    /// XRC, the end that receives, into the shared queues of its host.
    ExtendedTarget,
}

impl Transport {
    /// Every service.
    pub const ALL: [Self; 5] = [
        Self::ReliableConnection,
        Self::UnreliableConnection,
        Self::UnreliableDatagram,
        Self::ExtendedInitiator,
        Self::ExtendedTarget,
    ];

    /// Whether requests are answered.
    #[must_use]
    pub const fn is_reliable(self) -> bool {
        matches!(self, Self::ReliableConnection | Self::ExtendedInitiator | Self::ExtendedTarget)
    }

    /// Whether a queue pair of it has a receive queue.
    #[must_use]
    pub const fn receives(self) -> bool {
        !matches!(self, Self::ExtendedInitiator | Self::ExtendedTarget)
    }

    /// Whether it has the operation (9.1, table 37; A14.2 for XRC; A19 has atomic write and flush for RC).
    #[must_use]
    pub const fn has(self, operation: &Operation) -> bool {
        use Operation::{
            AtomicWrite, Bind, Flush, Invalidate, Register, Send, SendImmediate, SendInvalidate, Write,
            WriteImmediate,
        };
        match self {
            Self::ReliableConnection => true,
            Self::ExtendedInitiator => !matches!(operation, AtomicWrite(_) | Flush { .. }),
            Self::ExtendedTarget => false,
            Self::UnreliableConnection => {
                let local = matches!(operation, Bind(_) | Register { .. } | Invalidate { .. });
                let sends = matches!(operation, Send | SendImmediate(_) | Write(_) | WriteImmediate(..));
                local || (sends && !matches!(operation, SendInvalidate(_)))
            }
            Self::UnreliableDatagram => matches!(operation, Send | SendImmediate(_)),
        }
    }

    /// Whether its requests go to such a destination.
    pub(super) const fn reaches(self, destination: &Destination) -> bool {
        match destination {
            Destination::Connected => matches!(self, Self::ReliableConnection | Self::UnreliableConnection),
            Destination::Datagram { .. } => matches!(self, Self::UnreliableDatagram),
            Destination::SharedQueue(_) => matches!(self, Self::ExtendedInitiator),
        }
    }
}
