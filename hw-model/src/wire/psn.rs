//! Packet sequence numbers: 24 bits that wrap (IBTA volume 1, 9.7.1).

use std::fmt;

const BITS: u32 = 24;
const MASK: u32 = (1 << BITS) - 1;

/// A packet sequence number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Psn(u32);

impl Psn {
    /// Sequence numbers that can be told apart as earlier and later: half of the space.
    pub const WINDOW: u32 = 1 << (BITS - 1);

    /// The low 24 bits of `value`.
    #[must_use]
    pub const fn new(value: u32) -> Self {
        Self(value & MASK)
    }
    /// The number, below 2^24.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
    /// The number `packets` further on.
    #[must_use]
    pub const fn offset(self, packets: u32) -> Self {
        Self::new(self.0.wrapping_add(packets))
    }
    /// The number after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        self.offset(1)
    }
    /// The number before this one.
    #[must_use]
    pub const fn previous(self) -> Self {
        Self::new(self.0.wrapping_sub(1))
    }
    /// Packets from `earlier` to this one: negative if this one is the earlier, in a window of 2^23 either way.
    #[must_use]
    pub const fn since(self, earlier: Self) -> i32 {
        // Moving the 24 bits to the top lets the sign bit of the difference decide.
        let top = 32 - BITS;
        (self.0.wrapping_sub(earlier.0) << top).cast_signed() >> top
    }
}

impl fmt::Debug for Psn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Psn({:#08x})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_survives_the_wrap() {
        let last = Psn::new(MASK);
        assert_eq!(last.next(), Psn::new(0));
        assert_eq!(Psn::new(0).previous(), last);
        assert_eq!(Psn::new(3).since(last), 4);
        assert_eq!(last.since(Psn::new(3)), -4);
        assert_eq!(Psn::new(0).offset(Psn::WINDOW - 1).since(Psn::new(0)), (1 << 23) - 1);
    }
}
