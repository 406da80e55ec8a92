//! Lines of memory that are about to be needed, asked for early: several misses of the cache at a time cost little more
//! than one. These are hints: what they name may be gone.
//!
//! Unsafe island. Invariant: the one instruction here is PREFETCHT0, which changes nothing that a program can see and faults
//! at no address (AMD64 Architecture Programmer's Manual volume 3, PREFETCHlevel).
#![allow(unsafe_code)]

/// Bytes of a line.
const LINE: usize = 64;

/// Where something lies that may be needed. Nothing is read there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    address: usize,
    bytes: usize,
}

impl Place {
    /// All of `value`.
    pub(crate) fn of<T>(value: &T) -> Self {
        Self::at(std::ptr::from_ref(value).addr(), size_of::<T>())
    }

    /// `bytes` bytes at `address`.
    pub(crate) fn at(address: usize, bytes: usize) -> Self {
        Self { address, bytes }
    }

    /// Its address.
    pub(crate) fn address(self) -> usize {
        self.address
    }

    /// Asks for its lines.
    #[inline]
    pub(crate) fn expect(self) {
        let end = self.address + self.bytes;
        let mut at = self.address & !(LINE - 1);
        while at < end {
            line(at);
            at += LINE;
        }
    }
}

/// Asks for the lines of `value`.
#[inline]
pub(crate) fn expect<T>(value: &T) {
    Place::of(value).expect();
}

/// Asks for the line at `address`, whatever is there.
#[inline]
pub(crate) fn line(address: usize) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: the instruction takes any address, and every x86-64 has it.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::without_provenance(address)) };
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = address;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_may_name_anything() {
        expect(&[0_u8; 1000]);
        for place in [Place::at(0, 0), Place::at(0, 1), Place::at(1 << 62, 129)] {
            place.expect();
        }
        line(usize::MAX);
    }
}
