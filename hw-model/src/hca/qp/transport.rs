//! The transport services that a queue pair can have (IBTA volume 1, 9.1; annex A14 for XRC).

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
    /// XRC, the end that receives, into the shared queues of its domain.
    ExtendedTarget,
}
