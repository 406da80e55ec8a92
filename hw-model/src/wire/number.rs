//! The numbers of packets: queue pairs, keys, addresses, immediate data, times.

use std::fmt;

/// A queue pair number: 24 bits. 0 and 1 are the management queue pairs and are never given to a user.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Qpn(pub u32);

impl Qpn {
    /// To whom datagrams of a multicast group are addressed (10.5.2.1).
    pub const MULTICAST: Self = Self(0xff_ffff);
}

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

impl Gid {
    /// Whether it is a group's: of InfiniBand and IPv6 those that begin with ff (4.1.1), of IPv4 224.0.0.0/4.
    #[must_use]
    pub fn is_multicast(self) -> bool {
        let address = std::net::Ipv6Addr::from(self.0);
        address.to_ipv4_mapped().map_or(address.is_multicast(), |address| address.is_multicast())
    }
}

impl fmt::Debug for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gid({})", std::net::Ipv6Addr::from(self.0))
    }
}

/// A shared receive queue number: 24 bits. On the wire only for the extended reliable connection (A14.3.1).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Srqn(pub u32);

impl fmt::Debug for Srqn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Srqn({:#x})", self.0)
    }
}

/// A queue key (10.2.5): who may send datagrams to a queue pair.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct QKey(pub u32);

impl QKey {
    /// Whether it is a privileged one: named in a request, it stands for the queue key of the sending queue pair (10.2.5).
    #[must_use]
    pub const fn is_controlled(self) -> bool {
        self.0 & 0x8000_0000 != 0
    }
}

impl fmt::Debug for QKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "QKey({:#010x})", self.0)
    }
}

/// A partition key (10.9): 15 bits of a partition, and the top bit set for a full member.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PKey(pub u16);

impl PKey {
    /// Full member of the default partition: what RoCE devices use (A16.4.2).
    pub const DEFAULT: Self = Self(0xffff);

    /// Whether a packet with `self` reaches a queue pair with `other`: the same partition, and not two limited members.
    #[must_use]
    pub const fn matches(self, other: Self) -> bool {
        let same = (self.0 ^ other.0) & 0x7fff == 0 && self.0 & 0x7fff != 0;
        same && (self.0 | other.0) & 0x8000 != 0
    }
}

impl Default for PKey {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl fmt::Debug for PKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PKey({:#06x})", self.0)
    }
}

/// Immediate data (9.2.5): 32 bits that a message carries beside its bytes. The number that was sent; its bytes go over
/// the wire in network order, and verbs programs see them so.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Immediate(pub u32);

impl fmt::Debug for Immediate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Immediate({:#010x})", self.0)
    }
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

    #[test]
    fn limited_members_of_a_partition_reach_full_ones_only() {
        let (full, limited) = (PKey(0x8123), PKey(0x0123));
        assert!(full.matches(full) && full.matches(limited) && limited.matches(full));
        assert!(!limited.matches(limited), "two limited members");
        assert!(!full.matches(PKey(0x8124)), "another partition");
        assert!(!PKey(0x8000).matches(PKey(0x8000)), "no partition at all");
    }
}
