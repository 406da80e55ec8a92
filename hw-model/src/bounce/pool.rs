//! The pool of slots, and what lies in them.

use crate::addr::{PAGE_SIZE, PhysAddr};
use crate::bus::{BarStorage, Busy, HostMemory, MemoryError, RamStorage, StorageError};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Arc, Mutex, zeroed_words};

/// Bytes of a slot (`IO_TLB_SIZE`).
pub const SLOT_SIZE: u64 = 1 << 11;
/// Slots that can be contiguous at most (`IO_TLB_SEGSIZE`): the bits of a [`u128`].
const SEGMENT_SLOTS: u32 = u128::BITS;
/// Bytes of a segment, the most that one buffer can have, its padding included: 256 KiB.
pub const SEGMENT_SIZE: u64 = SLOT_SIZE * SEGMENT_SLOTS as u64;
/// How a parked buffer is one word, never 0: its length, the padding before its data, its slots.
const LEN_MASK: u64 = (1 << PADDING_SHIFT) - 1;
const PADDING_SHIFT: u32 = 20;
const PADDING_MASK: u64 = (1 << (SLOTS_SHIFT - PADDING_SHIFT)) - 1;
const SLOTS_SHIFT: u32 = 40;
/// Bytes copied at a time.
const CHUNK: usize = PAGE_SIZE as usize;

/// Where a pool is and how large.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BounceConfig {
    /// Physical address, a multiple of [`SEGMENT_SIZE`]. Every device must reach it: it belongs below 4 GiB.
    pub base: PhysAddr,
    /// Bytes, rounded up to [`SEGMENT_SIZE`]. Takes memory as it is used.
    pub size: u64,
}

impl Default for BounceConfig {
    /// 64 MiB (`IO_TLB_DEFAULT_SIZE`) at 3.5 GiB, where PCs have no RAM of their own.
    fn default() -> Self {
        Self { base: PhysAddr(0xe000_0000), size: 64 << 20 }
    }
}

/// What is to bounce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BounceRequest {
    /// The data's own place.
    pub origin: PhysAddr,
    /// Bytes of data.
    pub len: u64,
    /// Bytes of an IO page, a power of two; 1 if nothing translates. The buffer lies in its IO page as the data does in
    /// its own, and nothing else is in the IO pages that the device gets to see.
    pub granule: u64,
    /// Whether the device may see what was in the padding before. If not, it is zeroed.
    pub trusted: bool,
}

/// A buffer in the pool. Give it back with [`BouncePool::unmap`] or [`BouncePool::discard`], or
/// [`BouncePool::park`] it.
#[must_use = "its slots stay taken until it is given back"]
#[derive(Debug, PartialEq, Eq)]
pub struct Bounce {
    origin: PhysAddr,
    len: u64,
    /// Offset of the data from the start of the pool.
    offset: u64,
    phys: PhysAddr,
    segment: u32,
    first: u8,
    slots: u8,
}

impl Bounce {
    /// Where the device finds the data.
    #[must_use]
    pub fn phys(&self) -> PhysAddr {
        self.phys
    }
    /// Where the data's own place is.
    #[must_use]
    pub fn origin(&self) -> PhysAddr {
        self.origin
    }
    /// Bytes of data.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "nothing bounces empty")]
    pub fn len(&self) -> u64 {
        self.len
    }
}

/// Why something did not bounce.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BounceError {
    /// Nothing to bounce, or more than fits into a segment with its padding.
    #[error("{len:#x} bytes cannot bounce; with {padding:#x} bytes of padding 1 to {most:#x} are possible")]
    Size {
        /// Bytes asked for.
        len: u64,
        /// Bytes before the data, so that it lies in its IO page as before.
        padding: u64,
        /// The most that is possible with that padding.
        most: u64,
    },
    /// No run of free slots is long enough. A larger pool, or fewer buffers at a time.
    #[error(
        "bounce pool full: {wanted} contiguous slots of {SLOT_SIZE} bytes wanted, {free} of {slots} are free, \
         {longest} of them contiguous"
    )]
    Full {
        /// Slots needed.
        wanted: u32,
        /// Slots free.
        free: u64,
        /// Slots of the pool.
        slots: u64,
        /// Longest run of free slots.
        longest: u32,
    },
    /// A range outside the buffer.
    #[error("{len:#x} bytes at offset {offset:#x} are not in a bounce buffer of {size:#x} bytes")]
    OutOfRange {
        /// Offset asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Bytes of the buffer.
        size: u64,
    },
    /// The data's own place could not be read or written.
    #[error("copy of bounced data: {0}")]
    Memory(#[from] MemoryError),
}

/// What a pool has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BounceStats {
    /// Slots of the pool.
    pub slots: u64,
    /// Slots taken at the moment.
    pub used: u64,
    /// The most that were ever taken.
    pub high_water: u64,
    /// Buffers handed out.
    pub mapped: u64,
    /// Requests for which no run was free.
    pub refused: u64,
    /// Bytes copied towards devices.
    pub bytes_to_device: u64,
    /// Bytes copied back.
    pub bytes_to_cpu: u64,
}

/// The bounce pool of one host.
///
/// Copies are made by software, through [`HostMemory`]: whoever asks for one is inside an epoch of that memory and shows
/// the burst. Lock order: `slots` alone, never held over a copy.
pub struct BouncePool {
    base: PhysAddr,
    storage: Arc<RamStorage>,
    /// Two words a slot, used where a parked buffer begins: what it is ([`LEN_MASK`]), and the data's own place.
    parked: Box<[AtomicU64]>,
    slots: Mutex<Slots>,
    mapped: AtomicU64,
    refused: AtomicU64,
    bytes_to_device: AtomicU64,
    bytes_to_cpu: AtomicU64,
}

struct Slots {
    /// One bit a slot, one word a segment; set is free.
    free: Vec<u128>,
    /// Where the last search ended.
    next: usize,
    used: u64,
    high_water: u64,
}

impl BouncePool {
    /// An empty pool; `None` if the host has no memory for it.
    ///
    /// # Panics
    /// If the base is not a multiple of [`SEGMENT_SIZE`], or the pool is empty or passes the top of the address space.
    #[must_use]
    pub fn new(config: BounceConfig) -> Option<Arc<Self>> {
        let BounceConfig { base, size } = config;
        assert!(base.is_aligned(SEGMENT_SIZE) && size > 0, "a pool of whole segments: {config:?}");
        let segments = size.div_ceil(SEGMENT_SIZE);
        let size = segments.checked_mul(SEGMENT_SIZE)?;
        assert!(base.checked_add(size).is_some(), "a pool within the address space: {config:?}");
        let free = vec![u128::MAX; usize::try_from(segments).ok()?];
        let parked = zeroed_words(usize::try_from(2 * size / SLOT_SIZE).ok()?)?;
        Some(Arc::new(Self {
            base,
            storage: RamStorage::new(size)?,
            parked,
            slots: Mutex::new(Slots { free, next: 0, used: 0, high_water: 0 }),
            mapped: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            bytes_to_device: AtomicU64::new(0),
            bytes_to_cpu: AtomicU64::new(0),
        }))
    }

    /// First physical address.
    #[must_use]
    pub fn base(&self) -> PhysAddr {
        self.base
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.storage.size()
    }

    /// What the bus reaches at [`BouncePool::base`].
    pub(crate) fn storage(&self) -> &RamStorage {
        &self.storage
    }

    /// Takes slots for the data and copies it there, whichever way it will go later: what the device does not write must
    /// come back as it was (`swiotlb_tbl_map_single`).
    ///
    /// # Errors
    /// See [`BounceError`]; nothing stays taken then.
    pub fn map(
        &self,
        request: BounceRequest,
        memory: &dyn HostMemory,
        burst: &Busy<'_>,
    ) -> Result<Bounce, BounceError> {
        let BounceRequest { origin, len, granule, trusted } = request;
        debug_assert!(granule.is_power_of_two());
        let padding = origin.0 & (granule - 1);
        let most = SEGMENT_SIZE.saturating_sub(padding);
        if len == 0 || len > most {
            return Err(BounceError::Size { len, padding, most });
        }
        // Whole IO pages: nothing of another buffer is in what the device gets to see.
        let covered = (padding + len).next_multiple_of(granule.max(SLOT_SIZE));
        let wanted = (covered / SLOT_SIZE) as u32;
        let align = (granule / SLOT_SIZE).max(1) as u32;
        if wanted > SEGMENT_SLOTS || align > SEGMENT_SLOTS {
            return Err(BounceError::Size { len, padding, most });
        }
        let taken = self.slots.lock().take(wanted, align);
        let (segment, first) = taken.inspect_err(|_| {
            self.refused.fetch_add(1, Ordering::Relaxed);
        })?;
        let start = u64::from(segment) * SEGMENT_SIZE + u64::from(first) * SLOT_SIZE;
        let offset = start + padding;
        let slots = wanted as u8;
        let bounce = Bounce {
            origin,
            len,
            offset,
            phys: self.base.offset(offset),
            segment,
            first: first as u8,
            slots,
        };
        if !trusted {
            self.zero(start, offset);
            self.zero(offset + len, start + covered);
        }
        if let Err(error) = self.sync_for_device(&bounce, 0, len, memory, burst) {
            self.discard(bounce);
            return Err(error);
        }
        self.mapped.fetch_add(1, Ordering::Relaxed);
        Ok(bounce)
    }

    fn zero(&self, from: u64, to: u64) {
        let zeroes = [0; SLOT_SIZE as usize];
        let mut at = from;
        while at < to {
            let len = (to - at).min(SLOT_SIZE);
            self.storage.write(at, &zeroes[..len as usize]).expect("slots lie in the pool");
            at += len;
        }
    }

    /// Copies what the CPU wrote to where the device reads it (`dma_sync_single_for_device`).
    ///
    /// # Errors
    /// [`BounceError::OutOfRange`], [`BounceError::Memory`].
    pub fn sync_for_device(
        &self,
        bounce: &Bounce,
        offset: u64,
        len: u64,
        memory: &dyn HostMemory,
        _burst: &Busy<'_>,
    ) -> Result<(), BounceError> {
        Self::check(bounce, offset, len)?;
        pieces(bounce.origin.offset(offset), len, |phys, done, buffer| {
            memory.read(phys, buffer)?;
            self.storage.write(bounce.offset + offset + done, buffer).map_err(|error| self.own(error))
        })?;
        self.bytes_to_device.fetch_add(len, Ordering::Relaxed);
        Ok(())
    }

    /// Copies what the device wrote to where the CPU reads it (`dma_sync_single_for_cpu`).
    ///
    /// # Errors
    /// [`BounceError::OutOfRange`], [`BounceError::Memory`].
    pub fn sync_for_cpu(
        &self,
        bounce: &Bounce,
        offset: u64,
        len: u64,
        memory: &dyn HostMemory,
        _burst: &Busy<'_>,
    ) -> Result<(), BounceError> {
        Self::check(bounce, offset, len)?;
        pieces(bounce.origin.offset(offset), len, |phys, done, buffer| {
            self.storage.read(bounce.offset + offset + done, buffer).map_err(|error| self.own(error))?;
            Ok(memory.write(phys, buffer)?)
        })?;
        self.bytes_to_cpu.fetch_add(len, Ordering::Relaxed);
        Ok(())
    }

    fn check(bounce: &Bounce, offset: u64, len: u64) -> Result<(), BounceError> {
        match offset.checked_add(len) {
            Some(end) if end <= bounce.len => Ok(()),
            _ => Err(BounceError::OutOfRange { offset, len, size: bounce.len }),
        }
    }

    fn own(&self, error: StorageError) -> BounceError {
        BounceError::Memory(error.at(self.base))
    }

    /// Copies everything back and gives the slots up (`swiotlb_tbl_unmap_single`). The device must have been stopped.
    ///
    /// # Errors
    /// [`BounceError::Memory`] if the data's own place is gone; the slots are given up all the same.
    pub fn unmap(
        &self,
        bounce: Bounce,
        memory: &dyn HostMemory,
        burst: &Busy<'_>,
    ) -> Result<(), BounceError> {
        let copied = self.sync_for_cpu(&bounce, 0, bounce.len, memory, burst);
        self.discard(bounce);
        copied
    }

    /// Gives the slots up without copying back: the device only read, or the data's own place is gone. Cannot fail, does
    /// not allocate.
    ///
    /// # Panics
    /// If the buffer is of another pool and this one knows it.
    pub fn discard(&self, bounce: Bounce) {
        assert_eq!(bounce.phys, self.base.offset(bounce.offset), "a buffer of another pool");
        self.slots.lock().give(&bounce);
    }

    /// Leaves a buffer in the pool, to be found again by the address of its first slot, which it gives: that is where an
    /// IO page that leads to the buffer leads. Allocates nothing; whoever keeps that address keeps nothing else
    /// (`io_tlb_slot::orig_addr`).
    pub fn park(&self, bounce: Bounce) -> PhysAddr {
        let slot = bounce.segment * SEGMENT_SLOTS + u32::from(bounce.first);
        let start = self.base.offset(u64::from(slot) * SLOT_SIZE);
        let padding = bounce.phys.0 - start.0;
        let word = bounce.len | padding << PADDING_SHIFT | u64::from(bounce.slots) << SLOTS_SHIFT;
        let at = 2 * slot as usize;
        self.parked[at + 1].store(bounce.origin.0, Ordering::Relaxed);
        // Last: who finds this word finds the other.
        self.parked[at].store(word, Ordering::Release);
        start
    }

    /// Whether `phys` is an address of the pool.
    #[must_use]
    pub fn holds(&self, phys: PhysAddr) -> bool {
        phys.0.wrapping_sub(self.base.0) < self.size()
    }

    fn slot_at(&self, start: PhysAddr) -> Option<usize> {
        let is_slot = self.holds(start) && start.is_aligned(SLOT_SIZE);
        is_slot.then(|| ((start.0 - self.base.0) / SLOT_SIZE) as usize)
    }

    /// Looks at the buffer that is parked at `start`, and leaves it there. `None` if none is. The caller sees to it that
    /// nobody takes it meanwhile.
    pub fn with_parked<T>(&self, start: PhysAddr, look: impl FnOnce(&Bounce) -> T) -> Option<T> {
        let slot = self.slot_at(start)?;
        let word = self.parked[2 * slot].load(Ordering::Acquire);
        (word != 0).then(|| look(&self.parked_at(slot, word)))
    }

    /// The buffer that was parked at `start`. It is parked no longer: of two who ask, one gets it. `None` if none is.
    #[must_use]
    pub fn unpark(&self, start: PhysAddr) -> Option<Bounce> {
        let slot = self.slot_at(start)?;
        let word = self.parked[2 * slot].swap(0, Ordering::Acquire);
        (word != 0).then(|| self.parked_at(slot, word))
    }

    /// The buffer that begins with `slot` and is what `word` says.
    fn parked_at(&self, slot: usize, word: u64) -> Bounce {
        let start = slot as u64 * SLOT_SIZE;
        let offset = start + (word >> PADDING_SHIFT & PADDING_MASK);
        Bounce {
            origin: PhysAddr(self.parked[2 * slot + 1].load(Ordering::Relaxed)),
            len: word & LEN_MASK,
            offset,
            phys: self.base.offset(offset),
            segment: (start / SEGMENT_SIZE) as u32,
            first: (slot as u32 % SEGMENT_SLOTS) as u8,
            slots: (word >> SLOTS_SHIFT) as u8,
        }
    }

    /// Counters as they are now.
    #[must_use]
    pub fn stats(&self) -> BounceStats {
        let slots = self.slots.lock();
        BounceStats {
            slots: slots.total(),
            used: slots.used,
            high_water: slots.high_water,
            mapped: self.mapped.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
            bytes_to_device: self.bytes_to_device.load(Ordering::Relaxed),
            bytes_to_cpu: self.bytes_to_cpu.load(Ordering::Relaxed),
        }
    }
}

/// Calls `copy` for stretches of the range that lie in one page each: address, bytes before it, buffer of its length.
fn pieces(
    phys: PhysAddr,
    len: u64,
    mut copy: impl FnMut(PhysAddr, u64, &mut [u8]) -> Result<(), BounceError>,
) -> Result<(), BounceError> {
    let mut buffer = [0; CHUNK];
    let mut done = 0;
    while done < len {
        let at = phys.offset(done);
        let count = (len - done).min(PAGE_SIZE - at.page_offset());
        copy(at, done, &mut buffer[..count as usize])?;
        done += count;
    }
    Ok(())
}

/// A bit at every place from which `wanted` bits of `free` are set.
fn runs(free: u128, wanted: u32) -> u128 {
    let mut starts = free;
    let mut known = 1;
    while known < wanted {
        let step = known.min(wanted - known);
        starts &= starts >> step;
        known += step;
    }
    starts
}

impl Slots {
    fn total(&self) -> u64 {
        self.free.len() as u64 * u64::from(SEGMENT_SLOTS)
    }

    fn mask(first: u32, slots: u32) -> u128 {
        (u128::MAX >> (SEGMENT_SLOTS - slots)) << first
    }

    /// Takes `wanted` contiguous slots whose first is a multiple of `align`, a power of two. Gives segment and slot.
    fn take(&mut self, wanted: u32, align: u32) -> Result<(u32, u32), BounceError> {
        // One bit every `align` bits.
        let aligned = (0..SEGMENT_SLOTS).step_by(align as usize).fold(0_u128, |mask, bit| mask | 1 << bit);
        for turn in 0..self.free.len() {
            let segment = (self.next + turn) % self.free.len();
            let starts = runs(self.free[segment], wanted) & aligned;
            if starts != 0 {
                let first = starts.trailing_zeros();
                self.free[segment] &= !Self::mask(first, wanted);
                self.next = segment;
                self.used += u64::from(wanted);
                self.high_water = self.high_water.max(self.used);
                return Ok((segment as u32, first));
            }
        }
        let longest = (1..=SEGMENT_SLOTS)
            .take_while(|wanted| self.free.iter().any(|free| runs(*free, *wanted) != 0))
            .last()
            .unwrap_or(0);
        Err(BounceError::Full { wanted, free: self.total() - self.used, slots: self.total(), longest })
    }

    fn give(&mut self, bounce: &Bounce) {
        let mask = Self::mask(u32::from(bounce.first), u32::from(bounce.slots));
        let free = &mut self.free[bounce.segment as usize];
        assert_eq!(*free & mask, 0, "slots given back that were not taken");
        *free |= mask;
        self.used -= u64::from(bounce.slots);
    }
}

impl std::fmt::Debug for BouncePool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BouncePool").field("base", &self.base).field("stats", &self.stats()).finish()
    }
}

#[cfg(test)]
mod tests;
