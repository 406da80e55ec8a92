//! A ring of bytes in memory that two processes share: one writes records, the other reads them.
//!
//! What this file keeps: a [`Ring`] owns its mapping until it is dropped, and the file behind it is sealed against shrinking
//! before it is mapped, so every address of the mapping stays memory. The other process may change any byte at any time:
//! nothing in the mapping is ever a Rust reference but the atomics at its beginning, bytes are copied in and out, each number is
//! read once and checked before use, and positions that are ours are kept in private memory and only published.
#![allow(unsafe_code)]

use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::{self, NonNull};

/// What the two processes tell each other, each word in a cache line of its own.
#[repr(C)]
struct Shared {
    /// Where the next record will begin.
    tail: Line<AtomicU64>,
    /// Where the oldest record begins that has not been read.
    head: Line<AtomicU64>,
    /// The reader sleeps: ring its bell.
    asleep: Line<AtomicU32>,
    /// The writer waits for room: ring its bell.
    full: Line<AtomicU32>,
}

#[repr(C, align(64))]
struct Line<T>(T);

/// Bytes before the records.
const DATA: usize = 4096;
/// Bytes before the content of a record: length of its head and of its payload.
const RECORD: usize = 8;
/// The longest head of a packet.
pub(super) const MAX_HEAD: usize = 64;
/// The longest payload.
pub(super) const MAX_PAYLOAD: usize = 64 << 10;
/// Rings that are accepted, in bytes.
const SIZES: std::ops::RangeInclusive<usize> = 256 << 10..=64 << 20;

const _: () = assert!(size_of::<Shared>() <= DATA);

/// The mapping.
struct Ring {
    base: NonNull<u8>,
    /// Bytes of records: a power of two.
    capacity: usize,
}

// SAFETY: the mapping belongs to the value and is not tied to a thread; what is in it is reached by atomics and copies.
unsafe impl Send for Ring {}

/// The other process wrote something that no honest one would.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the ring holds nonsense")]
pub(super) struct Broken;

impl Ring {
    fn map(fd: &OwnedFd, capacity: usize) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing; the file has this length and keeps it.
        let base = unsafe {
            rustix::mm::mmap(ptr::null_mut(), DATA + capacity, protection, MapFlags::SHARED, fd, 0)?
        };
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, capacity })
    }

    fn shared(&self) -> &Shared {
        // SAFETY: the mapping begins with a page that is large enough and aligned for it, lives as long as `self`, and is
        // made of atomics, of which every value is valid.
        unsafe { self.base.cast::<Shared>().as_ref() }
    }

    /// The pieces of the ring that hold `length` bytes from position `at`.
    fn pieces(&self, at: u64, length: usize) -> [(usize, usize); 2] {
        debug_assert!(length <= self.capacity);
        let from = (at as usize) & (self.capacity - 1);
        let first = length.min(self.capacity - from);
        [(DATA + from, first), (DATA, length - first)]
    }

    fn copy_in(&self, at: u64, bytes: &[u8]) {
        let mut done = 0;
        for (offset, length) in self.pieces(at, bytes.len()) {
            let piece = &bytes[done..done + length];
            // SAFETY: `pieces` stays within the mapping, of which this is a place.
            let to = unsafe { self.base.add(offset) };
            // SAFETY: so many bytes are at both ends, and private memory does not overlap the mapping.
            unsafe { ptr::copy_nonoverlapping(piece.as_ptr(), to.as_ptr(), length) };
            done += length;
        }
    }

    fn copy_out(&self, at: u64, bytes: &mut [u8]) {
        let mut done = 0;
        for (offset, length) in self.pieces(at, bytes.len()) {
            let piece = &mut bytes[done..done + length];
            // SAFETY: as in `copy_in`.
            let from = unsafe { self.base.add(offset) };
            // SAFETY: as in `copy_in`. What the other process changes meanwhile comes out as some bytes, and bytes are
            // checked after the copy.
            unsafe { ptr::copy_nonoverlapping(from.as_ptr(), piece.as_mut_ptr(), length) };
            done += length;
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, of this length, and nothing refers to it any more.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), DATA + self.capacity) };
        debug_assert!(unmapped.is_ok());
    }
}

fn record_bytes(head: usize, payload: usize) -> usize {
    (RECORD + head + payload).next_multiple_of(8)
}

/// The writing end.
pub(super) struct Writer {
    ring: Ring,
    tail: u64,
    /// As far as is known.
    head: u64,
}

impl Writer {
    /// A new ring, with the file that the reader opens.
    pub(super) fn create(capacity: usize) -> io::Result<(Self, OwnedFd)> {
        let capacity = capacity.clamp(*SIZES.start(), *SIZES.end()).next_power_of_two();
        let fd = rustix::fs::memfd_create("anypage-ring", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, (DATA + capacity) as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok((Self { ring: Ring::map(&fd, capacity)?, tail: 0, head: 0 }, fd))
    }

    /// Adds a record. False if there is no room for it: the reader rings when there is.
    pub(super) fn push(&mut self, head: &[u8], payload: &[u8]) -> Result<bool, Broken> {
        let bytes = record_bytes(head.len(), payload.len());
        if !self.has_room(bytes)? {
            self.ring.shared().full.0.store(1, Ordering::SeqCst);
            // It may have read in between, and have seen nobody wait.
            if !self.has_room(bytes)? {
                return Ok(false);
            }
            self.ring.shared().full.0.store(0, Ordering::SeqCst);
        }
        let mut lengths = [0; RECORD];
        lengths[..4].copy_from_slice(&(head.len() as u32).to_ne_bytes());
        lengths[4..].copy_from_slice(&(payload.len() as u32).to_ne_bytes());
        self.ring.copy_in(self.tail, &lengths);
        self.ring.copy_in(self.tail + RECORD as u64, head);
        self.ring.copy_in(self.tail + (RECORD + head.len()) as u64, payload);
        self.tail += bytes as u64;
        self.ring.shared().tail.0.store(self.tail, Ordering::Release);
        Ok(true)
    }

    fn has_room(&mut self, bytes: usize) -> Result<bool, Broken> {
        let fits = |head: u64, tail: u64, capacity: usize| capacity as u64 - (tail - head) >= bytes as u64;
        if fits(self.head, self.tail, self.ring.capacity) {
            return Ok(true);
        }
        let head = self.ring.shared().head.0.load(Ordering::Acquire);
        // It only goes forward, and never past what was written.
        if head < self.head || head > self.tail {
            return Err(Broken);
        }
        self.head = head;
        Ok(fits(head, self.tail, self.ring.capacity))
    }

    /// Whether the reader sleeps: it is to be woken, once.
    pub(super) fn must_wake(&self) -> bool {
        // What was published before is seen by a reader that has not announced its sleep yet.
        fence(Ordering::SeqCst);
        let asleep = &self.ring.shared().asleep.0;
        asleep.load(Ordering::Relaxed) != 0 && asleep.swap(0, Ordering::SeqCst) != 0
    }
}

/// The reading end.
pub(super) struct Reader {
    ring: Ring,
    head: u64,
}

/// A record whose head has been read.
pub(super) struct Record<'a> {
    reader: &'a mut Reader,
    head: [u8; MAX_HEAD],
    head_length: usize,
    /// Bytes of its payload.
    pub(super) payload: usize,
}

impl Reader {
    /// The ring in a file that somebody gave us.
    pub(super) fn open(fd: &OwnedFd) -> io::Result<Self> {
        let refused = |why| io::Error::new(io::ErrorKind::InvalidData, why);
        if !rustix::fs::fcntl_get_seals(fd.as_fd())?.contains(SealFlags::SHRINK) {
            return Err(refused("the file can be cut short"));
        }
        let bytes = usize::try_from(rustix::fs::fstat(fd)?.st_size).unwrap_or_default();
        let capacity = bytes.saturating_sub(DATA);
        if !SIZES.contains(&capacity) || !capacity.is_power_of_two() {
            return Err(refused("the file has another size"));
        }
        Ok(Self { ring: Ring::map(fd, capacity)?, head: 0 })
    }

    /// The oldest record.
    pub(super) fn next(&mut self) -> Result<Option<Record<'_>>, Broken> {
        let tail = self.ring.shared().tail.0.load(Ordering::Acquire);
        let there = tail.wrapping_sub(self.head);
        if there == 0 {
            return Ok(None);
        }
        if there > self.ring.capacity as u64 || there < RECORD as u64 {
            return Err(Broken);
        }
        let mut lengths = [0; RECORD];
        self.ring.copy_out(self.head, &mut lengths);
        let [head_length, payload] = [&lengths[..4], &lengths[4..]]
            .map(|bytes| u32::from_ne_bytes(bytes.try_into().unwrap_or_default()) as usize);
        if head_length > MAX_HEAD
            || payload > MAX_PAYLOAD
            || record_bytes(head_length, payload) as u64 > there
        {
            return Err(Broken);
        }
        let mut head = [0; MAX_HEAD];
        self.ring.copy_out(self.head + RECORD as u64, &mut head[..head_length]);
        Ok(Some(Record { reader: self, head, head_length, payload }))
    }

    /// Announces that the reader goes to sleep, or that it does not. Whether there is something to read all the same.
    pub(super) fn set_asleep(&self, asleep: bool) -> bool {
        self.ring.shared().asleep.0.store(u32::from(asleep), Ordering::SeqCst);
        self.ring.shared().tail.0.load(Ordering::SeqCst) != self.head
    }

    /// Whether there is something to read.
    pub(super) fn has_more(&self) -> bool {
        self.ring.shared().tail.0.load(Ordering::Acquire) != self.head
    }

    /// Whether the writer waits for room: it is to be woken, once.
    pub(super) fn must_wake(&self) -> bool {
        fence(Ordering::SeqCst);
        let full = &self.ring.shared().full.0;
        full.load(Ordering::Relaxed) != 0 && full.swap(0, Ordering::SeqCst) != 0
    }
}

impl Record<'_> {
    /// The head of the packet.
    pub(super) fn head(&self) -> &[u8] {
        &self.head[..self.head_length]
    }

    /// Copies the payload out and gives the place of the record back. `payload` has as many bytes.
    pub(super) fn take(self, payload: &mut [u8]) {
        let at = self.reader.head + (RECORD + self.head_length) as u64;
        self.reader.ring.copy_out(at, payload);
        self.skip();
    }

    /// Gives the place of the record back.
    pub(super) fn skip(self) {
        self.reader.head += record_bytes(self.head_length, self.payload) as u64;
        self.reader.ring.shared().head.0.store(self.reader.head, Ordering::Release);
    }
}

#[cfg(test)]
mod tests;
