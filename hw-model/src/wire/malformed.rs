//! Why a packet was not taken, and how many for each reason.

use crate::sync::atomic::{AtomicU64, Ordering};
use std::fmt;

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident, $counter:literal => $text:literal),* $(,)?) => {
        /// Why bytes are no packet that we take. Whoever sent them hears nothing: a peer that meant well asks again.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
        #[non_exhaustive]
        pub enum Malformed {
            $($(#[$doc])* #[error($text)] $name,)*
        }

        impl Malformed {
            /// Every reason, in order.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// What packets dropped for this reason are counted as.
            #[must_use]
            pub fn counter(self) -> &'static str {
                match self {
                    $(Self::$name => concat!("malformed_", $counter),)*
                }
            }
        }
    };
}

reasons! {
    /// Ends before its headers do.
    Truncated, "truncated" => "it ends before its headers do",
    /// Not IPv4 without options and not IPv6 with UDP next, or with a wrong checksum or length.
    Network, "network" => "its IP or UDP header is not one of RoCEv2",
    /// A fragment: RoCEv2 has none.
    Fragment, "fragment" => "it is a fragment",
    /// The invariant CRC is wrong.
    Icrc, "icrc" => "its invariant CRC is wrong",
    /// Not version 0 of the transport headers.
    Version, "version" => "its transport header has another version",
    /// No such opcode, or not over this service.
    Opcode, "opcode" => "there is no such opcode",
    /// A reserved code in a header: syndrome, flush level.
    Reserved, "reserved" => "a header holds a reserved code",
    /// Not a multiple of four bytes, or more padding than data.
    Padding, "padding" => "its padding is wrong",
    /// More data than its opcode may carry, less than it must, or not a full path MTU where there must be one.
    Length, "length" => "it has more or less data than its opcode asks for",
    /// More data than the link carries.
    TooLong, "too_long" => "it has more data than the link carries",
}

/// Packets dropped, by reason. Counters only go up.
#[derive(Default)]
pub struct MalformedCounts([AtomicU64; Malformed::ALL.len()]);

impl MalformedCounts {
    /// One more.
    pub fn add(&self, reason: Malformed) {
        self.0[reason as usize].fetch_add(1, Ordering::Relaxed);
    }
    /// How many for this reason.
    #[must_use]
    pub fn of(&self, reason: Malformed) -> u64 {
        self.0[reason as usize].load(Ordering::Relaxed)
    }
    /// How many for each reason, with a name for a counter.
    #[must_use]
    pub fn named(&self) -> Vec<(&'static str, u64)> {
        Malformed::ALL.iter().map(|reason| (reason.counter(), self.of(*reason))).collect()
    }
    /// How many in all.
    #[must_use]
    pub fn total(&self) -> u64 {
        Malformed::ALL.iter().map(|reason| self.of(*reason)).sum()
    }
}

impl fmt::Debug for MalformedCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = Malformed::ALL.iter().map(|reason| (reason, self.of(*reason)));
        f.debug_map().entries(counts.filter(|(_, count)| *count > 0)).finish()
    }
}
