//! Payload buffers, pooled: in a steady state no packet allocates.
//!
//! The pool is last in, first out, so that a buffer that was just sent and received is reused while it is in the cache.

use crate::sync::{Arc, Mutex};
use std::fmt;
use std::ops::{Deref, DerefMut};

/// Buffers of one size, kept for reuse.
pub struct PayloadPool {
    free: Mutex<Vec<Box<[u8]>>>,
    buffer_bytes: usize,
    keep: usize,
}

impl PayloadPool {
    /// A pool of buffers of `buffer_bytes`, of which `keep` idle ones are kept.
    #[must_use]
    pub fn new(buffer_bytes: usize, keep: usize) -> Arc<Self> {
        Arc::new(Self { free: Mutex::new(Vec::with_capacity(keep)), buffer_bytes, keep })
    }

    /// A payload of `len` bytes whose content is unspecified (never uninitialised).
    ///
    /// # Panics
    /// If `len` is more than a buffer holds.
    #[must_use]
    pub fn take(self: &Arc<Self>, len: usize) -> Payload {
        assert!(len <= self.buffer_bytes, "payload of {len} bytes from buffers of {}", self.buffer_bytes);
        if len == 0 {
            return Payload::EMPTY;
        }
        let reused = self.free.lock().pop();
        let bytes = reused.unwrap_or_else(|| vec![0; self.buffer_bytes].into_boxed_slice());
        Payload { buffer: Some(Buffer { bytes, pool: Arc::clone(self) }), len }
    }

    /// The most that a payload of this pool holds.
    #[must_use]
    pub fn buffer_bytes(&self) -> usize {
        self.buffer_bytes
    }

    /// Idle buffers.
    #[must_use]
    pub fn idle(&self) -> usize {
        self.free.lock().len()
    }
}

impl fmt::Debug for PayloadPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PayloadPool")
            .field("buffer_bytes", &self.buffer_bytes)
            .field("keep", &self.keep)
            .finish()
    }
}

struct Buffer {
    bytes: Box<[u8]>,
    pool: Arc<PayloadPool>,
}

/// The data of one packet. Goes back to its pool on drop.
pub struct Payload {
    buffer: Option<Buffer>,
    len: usize,
}

impl Payload {
    /// No data.
    pub const EMPTY: Self = Self { buffer: None, len: 0 };
}

impl Deref for Payload {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.buffer.as_ref().map_or(&[], |buffer| &buffer.bytes[..self.len])
    }
}

impl DerefMut for Payload {
    fn deref_mut(&mut self) -> &mut [u8] {
        let len = self.len;
        self.buffer.as_mut().map_or(&mut [], |buffer| &mut buffer.bytes[..len])
    }
}

impl Drop for Payload {
    fn drop(&mut self) {
        if let Some(Buffer { bytes, pool }) = self.buffer.take() {
            let mut free = pool.free.lock();
            if free.len() < pool.keep {
                free.push(bytes);
            }
        }
    }
}

impl Clone for Payload {
    fn clone(&self) -> Self {
        let Some(buffer) = &self.buffer else { return Self::EMPTY };
        let mut copy = buffer.pool.take(self.len);
        copy.copy_from_slice(self);
        copy
    }
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Payload({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_payload_is_the_next_one_taken() {
        let pool = PayloadPool::new(64, 2);
        let mut first = pool.take(3);
        first.copy_from_slice(&[1, 2, 3]);
        let copy = first.clone();
        assert_eq!(&copy[..], &[1, 2, 3]);
        drop(first);
        assert_eq!(pool.idle(), 1, "the buffer would be allocated again for every packet");
        let again = pool.take(64);
        assert_eq!((pool.idle(), again.len()), (0, 64));
        drop((again, copy, pool.take(5)));
        assert_eq!(pool.idle(), 2, "no more than `keep` stay");
    }

    #[test]
    fn an_empty_payload_takes_no_buffer() {
        let pool = PayloadPool::new(64, 2);
        assert!(pool.take(0).is_empty());
        assert_eq!(pool.idle(), 0);
    }
}
