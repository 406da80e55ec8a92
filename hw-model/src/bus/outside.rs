//! Memory that another process has mapped as well, as the other end of a DMA: what lies there may change at any moment, so it
//! is never a Rust reference, and bytes go to their place, or come from it, in one copy.

use std::ops::Range;

/// A mapping that others write to.
pub trait OutsideMemory: Send + Sync {
    /// Where this process has byte `at` of it, for whoever copies by address. It stays memory as long as `self` lives.
    fn address(&self, at: usize) -> usize;

    /// Copies from byte `at` on.
    ///
    /// # Panics
    /// If there are fewer bytes.
    fn copy_out(&self, at: usize, out: &mut [u8]);

    /// Copies to byte `at` and those after it.
    ///
    /// # Panics
    /// If there are fewer bytes.
    fn copy_in(&self, at: usize, bytes: &[u8]);
}

/// A part of it.
#[derive(Clone, Copy)]
pub struct Outside<'a> {
    memory: &'a dyn OutsideMemory,
    at: usize,
    len: usize,
}

impl<'a> Outside<'a> {
    /// `len` bytes from `at` on.
    #[must_use]
    pub fn new(memory: &'a dyn OutsideMemory, at: usize, len: usize) -> Self {
        Self { memory, at, len }
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part of the part.
    ///
    /// # Panics
    /// If it is not inside.
    #[must_use]
    pub fn part(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} bytes", self.len);
        Self { at: self.at + range.start, len: range.len(), ..*self }
    }

    /// Where this process has it.
    #[must_use]
    pub fn address(&self) -> usize {
        self.memory.address(self.at)
    }

    /// Copies all of it.
    ///
    /// # Panics
    /// If `out` is longer than the memory goes on.
    pub fn copy_out(&self, out: &mut [u8]) {
        self.memory.copy_out(self.at, out);
    }

    /// Fills it.
    ///
    /// # Panics
    /// If there are more bytes than the memory goes on.
    pub fn copy_in(&self, bytes: &[u8]) {
        self.memory.copy_in(self.at, bytes);
    }
}

impl std::fmt::Debug for Outside<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Outside({} bytes)", self.len)
    }
}
