//! Headers of RC packets, as meaning: what cannot be on the wire cannot be built.

use super::{Payload, Psn};
use crate::addr::RegionAddr;
use std::fmt;

/// A queue pair number: 24 bits. 0 and 1 are the management queue pairs and are never given to a user.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Qpn(pub u32);

impl fmt::Debug for Qpn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Qpn({:#x})", self.0)
    }
}

/// A memory key: the local and the remote key of a region are the same number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(pub u32);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({:#010x})", self.0)
    }
}

/// The address of a port on its link: a GID, or for RoCEv2 the IPv6 (or mapped IPv4) address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gid(pub u128);

impl fmt::Debug for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gid({})", std::net::Ipv6Addr::from(self.0))
    }
}

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

/// The five-bit receiver-not-ready time code (9.7.5.2.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RnrTimer(u8);

/// Times of the codes in units of 10 microseconds.
const RNR_UNITS: [u32; 32] = [
    65536, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048,
    3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152,
];

impl RnrTimer {
    /// The shortest time: 10 microseconds.
    pub const SHORTEST: Self = Self(1);

    /// The time with this code; `None` if it has more than five bits.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        if code < 32 { Some(Self(code)) } else { None }
    }
    /// The code.
    #[must_use]
    pub const fn code(self) -> u8 {
        self.0
    }
    /// The time in nanoseconds. Code 0 is the longest, 655 ms.
    #[must_use]
    pub const fn nanoseconds(self) -> u64 {
        RNR_UNITS[self.0 as usize] as u64 * 10_000
    }
}

/// What a packet is: the opcode of the base transport header (9.2, table 38) with the extended headers it demands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Header {
    /// First of several packets of an RDMA write.
    WriteFirst(Reth),
    /// Neither first nor last.
    WriteMiddle,
    /// Last of several.
    WriteLast,
    /// A whole RDMA write.
    WriteOnly(Reth),
    /// An RDMA read: the responses use as many PSNs as they are packets.
    ReadRequest(Reth),
    /// First of several packets of a read response.
    ReadResponseFirst(Aeth),
    /// Neither first nor last. Has no AETH.
    ReadResponseMiddle,
    /// Last of several.
    ReadResponseLast(Aeth),
    /// A whole read response.
    ReadResponseOnly(Aeth),
    /// ACK or NAK.
    Acknowledge(Aeth),
}

impl Header {
    /// Whether a responder sends this.
    #[must_use]
    pub fn is_response(&self) -> bool {
        matches!(
            self,
            Self::ReadResponseFirst(_)
                | Self::ReadResponseMiddle
                | Self::ReadResponseLast(_)
                | Self::ReadResponseOnly(_)
                | Self::Acknowledge(_)
        )
    }
}

/// One packet of a reliable connection.
#[derive(Clone, Debug)]
pub struct Packet {
    /// Port that sent it.
    pub source: Gid,
    /// Port it goes to.
    pub destination: Gid,
    /// Queue pair it goes to.
    pub destination_qp: Qpn,
    /// Sequence number. Of an acknowledgement: of the request it speaks of.
    pub psn: Psn,
    /// The requester wants an acknowledgement of this packet (9.7.3, the AckReq bit).
    pub ack_request: bool,
    /// Opcode and extended headers.
    pub header: Header,
    /// Data, at most the path MTU.
    pub payload: Payload,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn receiver_not_ready_times_are_those_of_the_specification() {
        let time = |code| RnrTimer::from_code(code).map(RnrTimer::nanoseconds);
        assert_eq!(time(0), Some(655_360_000));
        assert_eq!(time(1), Some(10_000));
        assert_eq!(time(14), Some(1_280_000));
        assert_eq!(time(31), Some(491_520_000));
        assert_eq!(time(32), None);
    }
}
