//! A ring of bytes in memory that two processes share: one writes records, the other reads them.
//!
//! What this file keeps: a [`Ring`] owns its mapping until it is dropped, and the file behind it is sealed against shrinking
//! before it is mapped, so every address of the mapping stays memory. The other process may change any byte at any time:
//! nothing in the mapping is ever a Rust reference but the atomics at its beginning, bytes are copied in and out, each number is
//! read once and checked before use, and positions that are ours are kept in private memory and only published. Who copies by an
//! address of the mapping ([`OutsideMemory::address`]) holds what keeps it mapped.
#![allow(unsafe_code)]

use super::ring_bell;
use crate::bus::OutsideMemory;
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use crate::sync::{Arc, Mutex};
use crate::wire::{Lot, Payload};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use std::collections::VecDeque;
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
/// Bytes before the payload of a record: lengths of its head and of its payload, and the head. So payloads begin with cache
/// lines, and one can be written before its head is known.
const RECORD: usize = 64;
/// The lengths.
const LENGTHS: usize = 8;
/// The longest head of a packet.
pub(super) const MAX_HEAD: usize = RECORD - LENGTHS;
/// Skipped records passed at a time: a writer may write nothing else.
const SKIPS: usize = 64;
/// In place of the length of a head: nothing is in this record.
const SKIPPED: u32 = u32::MAX;
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
// SAFETY: what threads of this process do at once to one mapping is what two processes do to it: atomics and copies.
unsafe impl Sync for Ring {}

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

    /// Where this process has the byte at position `at`.
    fn address(&self, at: usize) -> usize {
        self.base.as_ptr().expose_provenance() + DATA + (at & (self.capacity - 1))
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

fn record_bytes(payload: usize) -> usize {
    (RECORD + payload).next_multiple_of(RECORD)
}

/// The writing end.
pub(super) struct Writer(Arc<Writing>);

/// What is written, until the reader is shown it.
struct Writing {
    ring: Ring,
    written: Mutex<Written>,
    /// The bell that the reader sleeps at.
    reader_bell: OwnedFd,
}

/// Records are shown to the reader in their order, in whichever order they are finished.
#[derive(Default)]
struct Written {
    /// Where the next record will begin.
    tail: u64,
    /// Where the oldest begins that the reader has not read, as far as is known.
    head: u64,
    /// Those that are not shown: where each ends, and whether it is finished.
    records: VecDeque<(u64, bool)>,
}

impl Writing {
    /// Makes a record of so many bytes. Where it begins; `None` if there is no room.
    fn make(&self, written: &mut Written, bytes: usize) -> Result<Option<u64>, Broken> {
        if !self.has_room(written, bytes)? {
            self.ring.shared().full.0.store(1, Ordering::SeqCst);
            // It may have read in between, and have seen nobody wait.
            if !self.has_room(written, bytes)? {
                return Ok(None);
            }
            self.ring.shared().full.0.store(0, Ordering::SeqCst);
        }
        let at = written.tail;
        written.tail += bytes as u64;
        written.records.push_back((written.tail, false));
        Ok(Some(at))
    }

    fn has_room(&self, written: &mut Written, bytes: usize) -> Result<bool, Broken> {
        let fits = |head: u64| self.ring.capacity as u64 - (written.tail - head) >= bytes as u64;
        if fits(written.head) {
            return Ok(true);
        }
        let head = self.ring.shared().head.0.load(Ordering::Acquire);
        // It only goes forward, and never past what was written.
        if head < written.head || head > written.tail {
            return Err(Broken);
        }
        let fits = fits(head);
        written.head = head;
        Ok(fits)
    }

    fn write_head(&self, at: u64, head: u32, payload: usize, bytes: &[u8]) {
        let mut front = [0; RECORD];
        front[..4].copy_from_slice(&head.to_ne_bytes());
        front[4..LENGTHS].copy_from_slice(&(payload as u32).to_ne_bytes());
        front[LENGTHS..LENGTHS + bytes.len()].copy_from_slice(bytes);
        self.ring.copy_in(at, &front);
    }

    /// The record that ends at `end` is finished.
    fn finish(&self, written: &mut Written, end: u64) {
        if let Ok(index) = written.records.binary_search_by_key(&end, |record| record.0) {
            written.records[index].1 = true;
        }
        let mut shown = None;
        while let Some((end, true)) = written.records.front().copied() {
            written.records.pop_front();
            shown = Some(end);
        }
        if let Some(shown) = shown {
            self.ring.shared().tail.0.store(shown, Ordering::Release);
        }
    }

    /// Whether the reader sleeps: it is to be woken, once.
    fn must_wake(&self) -> bool {
        // What was published before is seen by a reader that has not announced its sleep yet.
        fence(Ordering::SeqCst);
        let asleep = &self.ring.shared().asleep.0;
        asleep.load(Ordering::Relaxed) != 0 && asleep.swap(0, Ordering::SeqCst) != 0
    }
}

impl OutsideMemory for Writing {
    fn address(&self, at: usize) -> usize {
        self.ring.address(at)
    }
    fn copy_out(&self, at: usize, out: &mut [u8]) {
        self.ring.copy_out(at as u64, out);
    }
    fn copy_in(&self, at: usize, bytes: &[u8]) {
        self.ring.copy_in(at as u64, bytes);
    }
}

impl Lot for Writing {
    fn send(&self, at: usize, len: usize, number: u64, head: &[u8]) -> bool {
        self.write_head((at - RECORD) as u64, head.len() as u32, len, head);
        self.finish(&mut self.written.lock(), number);
        true
    }
    fn give_back(&self, at: usize, len: usize, number: u64) {
        self.write_head((at - RECORD) as u64, SKIPPED, len, &[]);
        self.finish(&mut self.written.lock(), number);
        // What was written behind it is seen only now.
        if self.must_wake() {
            ring_bell(&self.reader_bell);
        }
    }
}

impl Writer {
    /// A new ring, with the file that the reader opens, who sleeps at `reader_bell`.
    pub(super) fn create(capacity: usize, reader_bell: OwnedFd) -> io::Result<(Self, OwnedFd)> {
        let capacity = capacity.clamp(*SIZES.start(), *SIZES.end()).next_power_of_two();
        let fd = rustix::fs::memfd_create("anypage-ring", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, (DATA + capacity) as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let ring = Ring::map(&fd, capacity)?;
        Ok((Self(Arc::new(Writing { ring, written: Mutex::default(), reader_bell })), fd))
    }

    /// Adds a record. False if there is no room for it: the reader rings when there is.
    pub(super) fn push(&self, head: &[u8], payload: &[u8]) -> Result<bool, Broken> {
        let writing = &*self.0;
        let mut written = writing.written.lock();
        let Some(at) = writing.make(&mut written, record_bytes(payload.len()))? else { return Ok(false) };
        writing.write_head(at, head.len() as u32, payload.len(), head);
        writing.ring.copy_in(at + RECORD as u64, payload);
        let end = written.tail;
        writing.finish(&mut written, end);
        Ok(true)
    }

    /// Room for a payload of `len` bytes in one piece, which becomes a record when it is sent and nothing when it is dropped.
    /// `None`: there is no room. What is pushed meanwhile is seen after it.
    pub(super) fn room(&self, len: usize) -> Result<Option<Payload>, Broken> {
        let writing = &*self.0;
        let mut written = writing.written.lock();
        let before_end = writing.ring.capacity - (written.tail as usize & (writing.ring.capacity - 1));
        let over = before_end < record_bytes(len);
        // One who asks for room can do without, and need not be woken.
        let wanted = record_bytes(len) + if over { before_end } else { 0 };
        if !writing.has_room(&mut written, wanted)? {
            return Ok(None);
        }
        if over && let Some(at) = writing.make(&mut written, before_end)? {
            writing.write_head(at, SKIPPED, before_end - RECORD, &[]);
            let end = written.tail;
            writing.finish(&mut written, end);
        }
        let at = writing.make(&mut written, record_bytes(len))?;
        let end = written.tail;
        Ok(at.map(|at| {
            let place = (at as usize + RECORD, len);
            Payload::left(Arc::clone(&self.0) as _, place, end)
        }))
    }

    /// Whether the reader sleeps: it is to be woken, once.
    pub(super) fn must_wake(&self) -> bool {
        self.0.must_wake()
    }
}

/// The reading end.
pub(super) struct Reader {
    reading: Arc<Reading>,
    /// Where the next record to read begins.
    head: u64,
}

/// What has been read, until it is done with.
struct Reading {
    ring: Ring,
    held: Mutex<Held>,
    /// The bell that the writer sleeps at.
    writer_bell: OwnedFd,
}

/// The places of records are given back in their order, in whichever order they are done with.
#[derive(Default)]
struct Held {
    /// Given back up to here, and told to the writer.
    head: u64,
    /// What is not: where each ends, and whether it is done with.
    records: VecDeque<(u64, bool)>,
}

impl Reading {
    /// The record that ends at `end` is done with.
    fn done(&self, end: u64) {
        let mut held = self.held.lock();
        match held.records.binary_search_by_key(&end, |record| record.0) {
            Ok(index) => held.records[index].1 = true,
            // It was never left here.
            Err(_) => held.records.push_back((end, true)),
        }
        let before = held.head;
        while let Some((end, true)) = held.records.front().copied() {
            held.records.pop_front();
            held.head = end;
        }
        if held.head != before {
            self.ring.shared().head.0.store(held.head, Ordering::Release);
        }
    }

    /// Whether the writer waits for room: it is to be woken, once.
    fn must_wake(&self) -> bool {
        fence(Ordering::SeqCst);
        let full = &self.ring.shared().full.0;
        full.load(Ordering::Relaxed) != 0 && full.swap(0, Ordering::SeqCst) != 0
    }
}

impl OutsideMemory for Reading {
    fn address(&self, at: usize) -> usize {
        self.ring.address(at)
    }
    fn copy_out(&self, at: usize, out: &mut [u8]) {
        self.ring.copy_out(at as u64, out);
    }
    fn copy_in(&self, at: usize, bytes: &[u8]) {
        self.ring.copy_in(at as u64, bytes);
    }
}

impl Lot for Reading {
    fn give_back(&self, _at: usize, _len: usize, number: u64) {
        self.done(number);
        if self.must_wake() {
            ring_bell(&self.writer_bell);
        }
    }
}

/// What stands in front of a payload.
struct Front {
    head: [u8; MAX_HEAD],
    /// `None` of a record that was skipped.
    head_length: Option<usize>,
    payload: usize,
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
    /// The ring in a file that somebody gave us, with the bell that its writer sleeps at.
    pub(super) fn open(fd: &OwnedFd, writer_bell: OwnedFd) -> io::Result<Self> {
        let refused = |why| io::Error::new(io::ErrorKind::InvalidData, why);
        if !rustix::fs::fcntl_get_seals(fd.as_fd())?.contains(SealFlags::SHRINK) {
            return Err(refused("the file can be cut short"));
        }
        let bytes = usize::try_from(rustix::fs::fstat(fd)?.st_size).unwrap_or_default();
        let capacity = bytes.saturating_sub(DATA);
        if !SIZES.contains(&capacity) || !capacity.is_power_of_two() {
            return Err(refused("the file has another size"));
        }
        let reading = Reading { ring: Ring::map(fd, capacity)?, held: Mutex::default(), writer_bell };
        Ok(Self { reading: Arc::new(reading), head: 0 })
    }

    /// The oldest record. Of those that were skipped it passes some, and comes to the others the next time.
    pub(super) fn next(&mut self) -> Result<Option<Record<'_>>, Broken> {
        for _ in 0..SKIPS {
            match self.look()? {
                Some(Front { head, head_length: Some(head_length), payload }) => {
                    return Ok(Some(Record { reader: self, head, head_length, payload }));
                }
                Some(Front { head_length: None, payload, .. }) => self.pass(payload),
                None => break,
            }
        }
        Ok(None)
    }

    /// What stands in front of the oldest record.
    fn look(&self) -> Result<Option<Front>, Broken> {
        let tail = self.reading.ring.shared().tail.0.load(Ordering::Acquire);
        let there = tail.wrapping_sub(self.head);
        if there == 0 {
            return Ok(None);
        }
        if there > self.reading.ring.capacity as u64 || there < RECORD as u64 {
            return Err(Broken);
        }
        let mut front = [0; RECORD];
        self.reading.ring.copy_out(self.head, &mut front);
        let (lengths, head) = front.split_at(LENGTHS);
        let [head_length, payload] = [&lengths[..4], &lengths[4..]]
            .map(|bytes| u32::from_ne_bytes(bytes.try_into().unwrap_or_default()));
        let payload = payload as usize;
        if payload > self.reading.ring.capacity || record_bytes(payload) as u64 > there {
            return Err(Broken);
        }
        if head_length == SKIPPED {
            return Ok(Some(Front { head: [0; MAX_HEAD], head_length: None, payload }));
        }
        let head_length = head_length as usize;
        if head_length > MAX_HEAD || payload > MAX_PAYLOAD {
            return Err(Broken);
        }
        let head = head.try_into().unwrap_or([0; MAX_HEAD]);
        Ok(Some(Front { head, head_length: Some(head_length), payload }))
    }

    /// The oldest record, with so much payload, is done with.
    fn pass(&mut self, payload: usize) {
        self.head += record_bytes(payload) as u64;
        self.reading.done(self.head);
    }

    /// Announces that the reader goes to sleep, or that it does not. Whether there is something to read all the same.
    pub(super) fn set_asleep(&self, asleep: bool) -> bool {
        self.reading.ring.shared().asleep.0.store(u32::from(asleep), Ordering::SeqCst);
        self.reading.ring.shared().tail.0.load(Ordering::SeqCst) != self.head
    }

    /// Whether there is something to read.
    pub(super) fn has_more(&self) -> bool {
        self.reading.ring.shared().tail.0.load(Ordering::Acquire) != self.head
    }

    /// Wakes the writer if it waits for room. True if it did.
    pub(super) fn wake_writer(&self) -> bool {
        let waits = self.reading.must_wake();
        if waits {
            ring_bell(&self.reading.writer_bell);
        }
        waits
    }
}

impl Record<'_> {
    /// The head of the packet.
    pub(super) fn head(&self) -> &[u8] {
        &self.head[..self.head_length]
    }

    /// Where its payload begins.
    fn at(&self) -> u64 {
        self.reader.head + RECORD as u64
    }

    /// Copies the payload out and gives the place of the record back. `payload` has as many bytes.
    pub(super) fn take(self, payload: &mut [u8]) {
        self.reader.reading.ring.copy_out(self.at(), payload);
        self.skip();
    }

    /// The payload where it is. The place of the record is given back when it is dropped. `None`: it is to be taken, since it
    /// lies in two pieces, or because so much was left already that the writer would soon wait.
    pub(super) fn leave(&mut self) -> Option<Payload> {
        let (at, reading) = (self.at(), &self.reader.reading);
        let [_, (_, over)] = reading.ring.pieces(at, self.payload);
        let mut held = reading.held.lock();
        if over > 0 || self.reader.head - held.head > reading.ring.capacity as u64 * 3 / 4 {
            return None;
        }
        let end = self.end();
        held.records.push_back((end, false));
        drop(held);
        let payload = Payload::left(Arc::clone(reading) as _, (at as usize, self.payload), end);
        self.reader.head = end;
        Some(payload)
    }

    fn end(&self) -> u64 {
        self.reader.head + record_bytes(self.payload) as u64
    }

    /// Gives the place of the record back.
    pub(super) fn skip(self) {
        self.reader.pass(self.payload);
    }
}

#[cfg(test)]
mod tests;
