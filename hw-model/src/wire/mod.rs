//! What RC packets mean: headers, sequence numbers, payload buffers. Representation only; bytes on a wire come with the
//! UDP link.
//!
//! Source: InfiniBand Architecture Specification volume 1, chapter 9 (9.2 and 9.3 for the headers).

mod header;
mod payload;
mod psn;

pub use header::{Aeth, Gid, Header, Key, NakCode, Packet, Qpn, Reth, RnrTimer, Syndrome};
pub use payload::{Payload, PayloadPool};
pub use psn::Psn;
