//! Payload buffers, pooled: in a steady state no packet allocates.
//!
//! The pool is last in, first out, so that a buffer that was just sent and received is reused while it is in the cache.
//!
//! Between two HCAs of one process a payload can be a [`Loan`]: not the bytes, but where the receiving engine finds them.
//! Only links that say so ([`Link::takes_loans`](crate::link::Link::takes_loans)) are given such packets. And what comes through
//! memory that two processes share can stay there until it is copied to its place ([`Lot`]): only receivers that say so
//! ([`Ingress::takes_lots`](crate::link::Ingress::takes_lots)) are given that.

use crate::bus::{Outside, OutsideMemory};
use crate::hca::Loan;
use crate::sync::{Arc, Mutex};
use std::fmt;
use std::ops::{Deref, DerefMut, Range};

/// So many bytes lie in the packet itself: no more than a loan takes anyway, and taking a buffer costs more than copying
/// them.
const SMALL: usize = 64;

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
        if len <= SMALL {
            return Payload { content: Content::Small([0; SMALL]), len };
        }
        Payload { content: Content::Bytes(self.buffer()), len }
    }

    /// A whole buffer, for several payloads.
    #[must_use]
    pub fn take_whole(self: &Arc<Self>) -> WholeBuffer {
        WholeBuffer(Arc::new(self.buffer()))
    }

    fn buffer(self: &Arc<Self>) -> Buffer {
        let reused = self.free.lock().pop();
        let bytes = reused.unwrap_or_else(|| vec![0; self.buffer_bytes].into_boxed_slice());
        Buffer { bytes, pool: Arc::clone(self) }
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

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut free = self.pool.free.lock();
        if free.len() < self.pool.keep {
            free.push(std::mem::take(&mut self.bytes));
        }
    }
}

/// A buffer that payloads can be parts of: what arrived together is not copied apart.
pub struct WholeBuffer(Arc<Buffer>);

impl WholeBuffer {
    /// The bytes, to be written: `None` while a payload is a part of them.
    #[must_use]
    pub fn bytes_mut(&mut self) -> Option<&mut [u8]> {
        Arc::get_mut(&mut self.0).map(|buffer| &mut *buffer.bytes)
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0.bytes
    }

    /// The payload that `range` of the bytes is.
    ///
    /// # Panics
    /// If the buffer is shorter.
    #[must_use]
    pub fn part(&self, range: Range<usize>) -> Payload {
        let len = self.0.bytes[range.clone()].len();
        if len == 0 {
            return Payload::EMPTY;
        }
        Payload { content: Content::Part { whole: Arc::clone(&self.0), from: range.start }, len }
    }
}

impl fmt::Debug for WholeBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WholeBuffer({} bytes)", self.0.bytes.len())
    }
}

/// Memory shared with another process that payloads are left in until they are done with, or written to before they are sent.
pub trait Lot: OutsideMemory {
    /// Sends the payload of `len` bytes from `at` on that has this number, behind `head`. False if it is one that was received.
    fn send(&self, at: usize, len: usize, number: u64, head: &[u8]) -> bool {
        let _ = (at, len, number, head);
        false
    }

    /// The payload with this number is done with: its place may be written to.
    fn give_back(&self, at: usize, len: usize, number: u64);
}

/// A payload in such memory.
struct Left {
    lot: Arc<dyn Lot>,
    at: usize,
    len: usize,
    number: u64,
    sent: bool,
}

impl Drop for Left {
    fn drop(&mut self) {
        if !self.sent {
            self.lot.give_back(self.at, self.len, self.number);
        }
    }
}

enum Content {
    Nothing,
    Small([u8; SMALL]),
    Bytes(Buffer),
    /// Never written to: others are parts of the same.
    Part {
        whole: Arc<Buffer>,
        from: usize,
    },
    Lent(Loan),
    Left(Left),
}

/// The data of one packet. A buffer goes back to its pool on drop.
pub struct Payload {
    content: Content,
    len: usize,
}

impl Payload {
    /// No data.
    pub const EMPTY: Self = Self { content: Content::Nothing, len: 0 };

    /// `len` bytes that the receiver fetches.
    pub(crate) fn lent(loan: Loan, len: usize) -> Self {
        Self { content: Content::Lent(loan), len }
    }

    /// Where the bytes are, if they are not here.
    pub(crate) fn loan(&self) -> Option<&Loan> {
        match &self.content {
            Content::Lent(loan) => Some(loan),
            _ => None,
        }
    }

    /// `len` bytes from byte `at` of `lot` on, which is told `number` when they are done with.
    #[must_use]
    pub fn left(lot: Arc<dyn Lot>, (at, len): (usize, usize), number: u64) -> Self {
        Self { content: Content::Left(Left { lot, at, len, number, sent: false }), len }
    }

    /// Sends it from where it is, behind `head`. False if that cannot be: its bytes are to be copied.
    pub(crate) fn send(&mut self, head: &[u8]) -> bool {
        match &mut self.content {
            Content::Left(left) => {
                left.sent = left.lot.send(left.at, left.len, left.number, head);
                left.sent
            }
            _ => false,
        }
    }

    /// Where the bytes are, if they are in memory shared with another process.
    pub(crate) fn outside(&self) -> Option<Outside<'_>> {
        match &self.content {
            Content::Left(left) => Some(Outside::new(&*left.lot, left.at, self.len)),
            _ => None,
        }
    }

    /// Takes the bytes out of memory shared with another process, which gets no place back before that: for a payload that
    /// has to wait, as others would wait behind it.
    pub(crate) fn take_in(&mut self) {
        if matches!(self.content, Content::Left(_)) {
            *self = self.clone();
        }
    }

    /// Number of bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

const LENT: &str = "a link that looks at the bytes of packets takes no loans and no lots";

impl Deref for Payload {
    type Target = [u8];
    /// # Panics
    /// If the bytes are lent, or left in shared memory.
    fn deref(&self) -> &[u8] {
        match &self.content {
            Content::Nothing => &[],
            Content::Small(bytes) => &bytes[..self.len],
            Content::Bytes(buffer) => &buffer.bytes[..self.len],
            Content::Part { whole, from } => &whole.bytes[*from..*from + self.len],
            Content::Lent(_) | Content::Left(_) => panic!("{LENT}"),
        }
    }
}

impl DerefMut for Payload {
    fn deref_mut(&mut self) -> &mut [u8] {
        if let Content::Part { .. } = self.content {
            *self = self.clone();
        }
        match &mut self.content {
            Content::Nothing | Content::Part { .. } => &mut [],
            Content::Small(bytes) => &mut bytes[..self.len],
            Content::Bytes(buffer) => &mut buffer.bytes[..self.len],
            Content::Lent(_) | Content::Left(_) => panic!("{LENT}"),
        }
    }
}

impl Clone for Payload {
    fn clone(&self) -> Self {
        match &self.content {
            Content::Nothing => Self::EMPTY,
            Content::Small(bytes) => Self { content: Content::Small(*bytes), len: self.len },
            Content::Bytes(buffer) => {
                let mut copy = buffer.pool.take(self.len);
                copy.copy_from_slice(self);
                copy
            }
            Content::Part { whole, .. } => {
                let mut copy = whole.pool.take(self.len);
                copy.copy_from_slice(self);
                copy
            }
            Content::Lent(loan) => Self::lent(loan.clone(), self.len),
            Content::Left(left) => {
                let mut copy = PayloadPool::new(self.len, 0).take(self.len);
                left.lot.copy_out(left.at, &mut copy);
                copy
            }
        }
    }
}

impl Default for Payload {
    fn default() -> Self {
        Self::EMPTY
    }
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lent = match self.content {
            Content::Lent(_) => ", lent",
            Content::Left(_) => ", left",
            _ => "",
        };
        write!(f, "Payload({} bytes{lent})", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_payload_is_the_next_one_taken() {
        let pool = PayloadPool::new(256, 2);
        let mut first = pool.take(100);
        first.fill(7);
        let copy = first.clone();
        assert_eq!(&copy[..], &[7; 100]);
        drop(first);
        assert_eq!(pool.idle(), 1, "the buffer would be allocated again for every packet");
        let again = pool.take(256);
        assert_eq!((pool.idle(), again.len()), (0, 256));
        drop((again, copy, pool.take(65)));
        assert_eq!(pool.idle(), 2, "no more than `keep` stay");
    }

    #[test]
    fn a_part_of_a_buffer_keeps_the_buffer_and_is_written_to_as_a_copy() {
        let pool = PayloadPool::new(256, 2);
        let mut whole = pool.take_whole();
        whole.bytes_mut().expect("nobody else has it").fill(5);
        let (mut first, second) = (whole.part(1..101), whole.part(101..256));
        assert!(whole.bytes_mut().is_none(), "what arrives next would change what has arrived");
        first[0] = 9;
        assert_eq!((first[0], first[99], second[0]), (9, 5, 5));
        assert_eq!(whole.bytes()[1], 5, "one payload would change another");
        drop(second);
        assert!(whole.bytes_mut().is_some());
        drop((first, whole));
        assert_eq!(pool.idle(), 2);
    }

    #[test]
    fn a_small_payload_takes_no_buffer() {
        let pool = PayloadPool::new(256, 2);
        for len in [0, 1, 64] {
            let mut payload = pool.take(len);
            payload.fill(7);
            let copy = payload.clone();
            assert_eq!((&payload[..], &copy[..]), (&[7; 64][..len], &[7; 64][..len]));
        }
        assert_eq!(pool.idle(), 0);
    }
}
