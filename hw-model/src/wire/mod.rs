//! Packets, as meaning and as bytes, apart.
//!
//! [`Packet`] is what a packet means: the transport knows nothing else. `layout` is how headers lie on the wire, and only
//! `encode` and `parse` know both. Links inside a process hand packets over as they are; others write them ([`encode`]) and
//! read them ([`check_icrc`], then [`parse`]).
//!
//! Source: InfiniBand Architecture Specification volume 1, chapter 9 (9.2 and 9.3 for the headers), annexes A14 (XRC),
//! A17 (RoCEv2) and A19 (flush, atomic write).

mod encode;
mod extended;
mod header;
mod icrc;
mod layout;
mod malformed;
mod number;
mod opcode;
mod packet;
mod parse;
mod payload;
mod psn;

pub use encode::{Head, Tail, encode, encode_datagram};
pub use extended::{Aeth, AtomicEth, Deth, Feth, NakCode, Placement, Reth, Selectivity, Service, Syndrome};
pub use header::{Header, Position};
pub use icrc::{Flow, gid_of, ip_of};
pub use malformed::{Malformed, MalformedCounts};
pub use number::{Gid, Immediate, Key, PKey, QKey, Qpn, RnrTimer, Srqn};
pub use packet::{GlobalRoute, Packet};
pub use parse::{Checked, Content, Datagram, Identification, check_icrc, parse, parse_datagram, parse_parts};
pub use payload::{Lot, Payload, PayloadPool, WholeBuffer};
pub use psn::Psn;

/// The UDP port that RoCEv2 goes to (A17.3.2).
pub const ROCE_PORT: u16 = 4791;
