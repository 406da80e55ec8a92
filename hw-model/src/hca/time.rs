//! Time as the engines see it: an argument, never a clock.

/// Nanoseconds since an origin that the driver chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Time(pub u64);

impl Time {
    /// `nanoseconds` later.
    #[must_use]
    pub fn after(self, nanoseconds: u64) -> Self {
        Self(self.0.saturating_add(nanoseconds))
    }
}

/// The five-bit local acknowledge timeout: 4.096 us times two to the code; code 0 waits for ever (IBTA volume 1,
/// 9.7.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AckTimeout(u8);

impl AckTimeout {
    /// The timeout with this code; `None` if it has more than five bits.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        if code < 32 { Some(Self(code)) } else { None }
    }
    /// The code.
    #[must_use]
    pub const fn code(self) -> u8 {
        self.0
    }
    /// The time in nanoseconds, or `None` for ever.
    #[must_use]
    pub const fn nanoseconds(self) -> Option<u64> {
        if self.0 == 0 { None } else { Some(4096 << self.0) }
    }
}
