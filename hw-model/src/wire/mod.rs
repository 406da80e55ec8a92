//! What packets mean: headers, sequence numbers, payload buffers. Representation only; bytes on a wire come with the
//! UDP link.
//!
//! Source: InfiniBand Architecture Specification volume 1, chapter 9 (9.2 and 9.3 for the headers), annexes A14 (XRC),
//! A17 (RoCEv2) and A19 (flush, atomic write).

mod extended;
mod header;
mod number;
mod packet;
mod payload;
mod psn;

pub use extended::{Aeth, AtomicEth, Deth, Feth, NakCode, Placement, Reth, Selectivity, Service, Syndrome};
pub use header::{Header, Position};
pub use number::{Gid, Immediate, Key, PKey, QKey, Qpn, RnrTimer, Srqn};
pub use packet::{GlobalRoute, Packet};
pub use payload::{Payload, PayloadPool};
pub use psn::Psn;
