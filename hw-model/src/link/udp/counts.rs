//! What a UDP link counted.

use crate::sync::atomic::{AtomicU64, Ordering};
use crate::wire::MalformedCounts;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What a [`UdpLink`](super::UdpLink) has counted since it was opened.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct UdpCounts {
            $($(#[$doc])* pub $name: u64,)*
            /// Datagrams dropped because they were no packets of RoCEv2; [`UdpLink`](super::UdpLink)'s log says why.
            pub malformed: u64,
        }

        impl UdpCounts {
            /// All but the malformed, with their names.
            pub(super) fn named(&self) -> Vec<(&'static str, u64)> {
                vec![$((concat!("udp_", stringify!($name)), self.$name),)*]
            }
        }

        #[derive(Default)]
        pub(super) struct Counters {
            $(pub(super) $name: AtomicU64,)*
            pub(super) malformed: MalformedCounts,
        }

        impl Counters {
            pub(super) fn read(&self) -> UdpCounts {
                UdpCounts {
                    $($name: self.$name.load(Ordering::Relaxed),)*
                    malformed: self.malformed.total(),
                }
            }
        }
    };
}

counters! {
    /// Packets that the kernel took.
    sent,
    /// System calls that this needed.
    send_calls,
    /// Packets dropped because the kernel refused them: no route, or larger than the path carries.
    refused,
    /// Packets dropped because the lane of their peer was full, or has another family of addresses.
    dropped,
    /// Packets received that were well formed.
    received,
    /// System calls that received something.
    receive_calls,
    /// Of the packets received, those whose ICRC was checked but for the 16 bits of the IPv4 identification.
    checked_in_part,
    /// Congestion notifications sent.
    notifications_sent,
    /// Congestion notifications received.
    notifications_received,
}

/// One more, or some more.
pub(super) fn add(counter: &AtomicU64, count: usize) {
    counter.fetch_add(count as u64, Ordering::Relaxed);
}
