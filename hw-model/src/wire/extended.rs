//! Extended transport headers (IBTA volume 1, 9.3; A14.3 for XRC; A19.3 for flush), as meaning.

use super::{Key, QKey, Qpn, RnrTimer, Srqn};
use crate::addr::RegionAddr;

/// RDMA extended transport header (9.3.3): where, by which key, how much. The length is that of the whole message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reth {
    /// First address in the region that `key` names.
    pub address: RegionAddr,
    /// The remote key.
    pub key: Key,
    /// Bytes of the whole message.
    pub length: u32,
}

/// ACK extended transport header (9.3.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Aeth {
    /// What happened.
    pub syndrome: Syndrome,
    /// Messages that the responder has completed, modulo 2^24.
    pub msn: u32,
}

/// The syndrome of an [`Aeth`] (9.7.5.2). Flow-control credits are not used: the code for "no credits" is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Syndrome {
    /// Everything up to this PSN has been done.
    Ack,
    /// Receiver not ready: ask again after this time.
    RnrNak(RnrTimer),
    /// Refused.
    Nak(NakCode),
}

/// Why a responder refused (9.7.5.2.1 to 9.7.5.2.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NakCode {
    /// A packet is missing: send again from this PSN.
    SequenceError,
    /// The request is not one that this responder can execute: opcode, length, or order of opcodes.
    InvalidRequest,
    /// The key does not allow this access.
    RemoteAccess,
    /// The responder could not execute a request that was allowed.
    RemoteOperational,
}

/// Atomic extended transport header (9.3.4): where, by which key, and the operands of [`Header::CompareSwap`] and
/// [`Header::FetchAdd`].
///
/// [`Header::CompareSwap`]: super::Header::CompareSwap
/// [`Header::FetchAdd`]: super::Header::FetchAdd
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AtomicEth {
    /// Address of a word of 8 bytes in the region that `key` names.
    pub address: RegionAddr,
    /// The remote key.
    pub key: Key,
    /// What to store if the word equals `compare`; of a fetch-and-add, what to add.
    pub swap_or_add: u64,
    /// What to compare with. A fetch-and-add does not look at it.
    pub compare: u64,
}

/// Flush extended transport header (A19.3.1): how far the bytes must have come, and which bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Feth {
    /// How far.
    pub placement: Placement,
    /// Which bytes.
    pub selectivity: Selectivity,
}

bitflags::bitflags! {
    /// How far a flush brings bytes (A19.3.1, placement type).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Placement: u8 {
        /// Seen by every processor and device of the host.
        const GLOBAL = 1;
        /// Kept over a loss of power.
        const PERSISTENT = 1 << 1;
    }
}

/// Which bytes a flush is about (A19.3.1, selectivity level).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Selectivity {
    /// Those that the RETH names.
    Range,
    /// All of the region that the RETH's key names.
    Region,
}

/// Datagram extended transport header (9.3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deth {
    /// The queue key that the receiver compares with its own.
    pub qkey: QKey,
    /// The queue pair that sent it.
    pub source_qp: Qpn,
}

/// What carries a packet: the upper three bits of the opcode (9.2.1), with the header that the service adds to each packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// RC.
    ReliableConnection,
    /// UC.
    UnreliableConnection,
    /// UD.
    UnreliableDatagram(Deth),
    /// XRC (annex A14): requests name the receive queue (XRCETH), responses do not.
    ExtendedConnection(Option<Srqn>),
}
