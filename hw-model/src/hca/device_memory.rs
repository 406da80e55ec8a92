//! Device memory: memory in the HCA, for small things that many peers meet at (`ibv_alloc_dm`; no part of the
//! specification, as memory's place is nobody's business there).
//!
//! It lies behind a BAR of the device's own, so that its regions are page lists like any other, reached by bus address: the
//! engines know nothing of it. The BAR is put on the bus when it is first needed. Its last page is no memory: it reads as
//! zeroes and swallows what is written, for the null key.
//!
//! What is given back is given out again only when the bursts that may still write to it have ended; nobody waits for that.

use super::device::Hca;
use super::key::{Access, CreateKeyError, KeySpec, NullKeySpec};
use super::page_list::{Backing, Entry, OutOfMemory, PageList, Path};
use super::pd::Pd;
use super::points;
use crate::addr::{PAGE_SIZE, RegionAddr};
use crate::bus::{AtomicOp, Bar, BarError, BarStorage, Drain, RamStorage, StorageError};
use crate::sync::Arc;
use crate::wire::Key;
use std::collections::BTreeMap;

/// Bytes that allocations are multiples of.
const GRANULE: u64 = 64;

/// A piece of device memory, zero at first. Regions over it hold it.
pub struct DeviceMemory {
    hca: Arc<Hca>,
    bar: Arc<Bar>,
    offset: u64,
    length: u64,
}

/// A region over device memory. Dropping it takes its key back.
pub struct DeviceRegion {
    memory: Arc<DeviceMemory>,
    key: Key,
    length: u64,
}

/// Why there is no device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AllocDeviceMemoryError {
    /// No byte, or more than there are.
    #[error("device memory of 1 to {max} bytes can be had, {length} were asked for")]
    Length {
        /// Asked for.
        length: u64,
        /// The device's limit.
        max: u64,
    },
    /// Alignment to more than a page.
    #[error("device memory is aligned to 2^12 bytes at most, 2^{shift} were asked for")]
    Alignment {
        /// Asked for.
        shift: u32,
    },
    /// What is free is too little, or in too small pieces.
    #[error("no {length} bytes of device memory together are free, {free} are in all")]
    Full {
        /// Asked for.
        length: u64,
        /// Free bytes.
        free: u64,
    },
    /// The bus has no room for the device's BAR.
    #[error("the bus has no room for the device's memory")]
    Bus(#[from] BarError),
    /// The device cannot address its own BAR.
    #[error("the BAR lies beyond the {bits} address bits of the device")]
    BeyondMask {
        /// Address bits.
        bits: u32,
    },
}

/// Why bytes of device memory are not reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{length} bytes at {offset} pass the {size} bytes of the device memory")]
pub struct OutsideDeviceMemory {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Bytes of the allocation.
    pub size: u64,
}

/// Why device memory was not registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegisterDeviceMemoryError {
    /// Not in it.
    #[error(transparent)]
    Outside(#[from] OutsideDeviceMemory),
    /// The device gave no key.
    #[error(transparent)]
    Key(#[from] CreateKeyError),
    /// The host gave no page list.
    #[error(transparent)]
    List(#[from] OutOfMemory),
}

/// Why there is no null key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CreateNullKeyError {
    /// The device gave no key.
    #[error(transparent)]
    Key(#[from] CreateKeyError),
    /// The bus has no room for the page that it leads to.
    #[error(transparent)]
    Bus(#[from] AllocDeviceMemoryError),
}

/// The device's BAR, and what of it is free.
pub(super) struct Internal {
    bar: Arc<Bar>,
    /// Free pieces: offset to length.
    free: BTreeMap<u64, u64>,
    /// Allocations that are in use. There is always room in `retired` for them, as giving back does not allocate.
    used: usize,
    /// Given back, and the bursts that may still be at it.
    retired: Vec<(Drain, u64, u64)>,
}

/// Memory, and a last page that is none.
struct Storage {
    ram: Arc<RamStorage>,
    size: u64,
}

impl Storage {
    /// Whether it is the last page.
    fn is_null(&self, offset: u64) -> bool {
        offset >= self.size - PAGE_SIZE
    }
}

impl BarStorage for Storage {
    fn size(&self) -> u64 {
        self.size
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), StorageError> {
        if self.is_null(offset) {
            out.fill(0);
            return Ok(());
        }
        self.ram.read(offset, out)
    }
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), StorageError> {
        if self.is_null(offset) { Ok(()) } else { self.ram.write(offset, data) }
    }
    fn atomic(&self, offset: u64, op: AtomicOp) -> Result<u64, StorageError> {
        if self.is_null(offset) { Ok(0) } else { self.ram.atomic(offset, op) }
    }
}

impl Internal {
    fn new(hca: &Hca) -> Result<Self, AllocDeviceMemoryError> {
        let length = hca.config().limits.device_memory / GRANULE * GRANULE;
        let size = length.checked_next_multiple_of(PAGE_SIZE).and_then(|bytes| bytes.checked_add(PAGE_SIZE));
        let size =
            size.and_then(u64::checked_next_power_of_two).ok_or(BarError::OutOfMemory { size: length })?;
        let ram = RamStorage::new(size).ok_or(BarError::OutOfMemory { size })?;
        let port = hca.port();
        let bar = port.bus().add_bar(port.device(), Arc::new(Storage { ram, size }))?;
        let limits = port.limits();
        if bar.bus_base().offset(size - 1).0 & !limits.mask() != 0 {
            return Err(AllocDeviceMemoryError::BeyondMask { bits: limits.mask_bits });
        }
        let free = if length > 0 { BTreeMap::from([(0, length)]) } else { BTreeMap::new() };
        Ok(Self { bar, free, used: 0, retired: Vec::new() })
    }

    fn free_bytes(&self) -> u64 {
        self.free.values().sum()
    }

    /// The first free piece that holds so much, so aligned.
    fn take(&mut self, length: u64, align: u64) -> Option<u64> {
        let fits = |(start, bytes): (&u64, &u64)| {
            let at = start.next_multiple_of(align);
            (at + length <= start + bytes).then_some((*start, *bytes, at))
        };
        let (start, bytes, at) = self.free.iter().find_map(fits)?;
        self.free.remove(&start);
        if at > start {
            self.free.insert(start, at - start);
        }
        if at + length < start + bytes {
            self.free.insert(at + length, start + bytes - at - length);
        }
        Some(at)
    }

    fn give_back(&mut self, mut offset: u64, mut length: u64) {
        if let Some((&before, &bytes)) = self.free.range(..offset).next_back()
            && before + bytes == offset
        {
            self.free.remove(&before);
            (offset, length) = (before, bytes + length);
        }
        if let Some(bytes) = self.free.remove(&(offset + length)) {
            length += bytes;
        }
        self.free.insert(offset, length);
    }
}

impl Hca {
    fn with_internal<R>(
        &self,
        run: impl FnOnce(&mut Internal) -> Result<R, AllocDeviceMemoryError>,
    ) -> Result<R, AllocDeviceMemoryError> {
        let mut internal = self.internal.lock();
        if internal.is_none() {
            *internal = Some(Internal::new(self)?);
        }
        run(internal.as_mut().expect("made above"))
    }

    /// `length` bytes of device memory, aligned to 2^`align_shift` bytes.
    ///
    /// # Errors
    /// See [`AllocDeviceMemoryError`].
    pub fn alloc_device_memory(
        self: &Arc<Self>,
        length: u64,
        align_shift: u32,
    ) -> Result<Arc<DeviceMemory>, AllocDeviceMemoryError> {
        let max = self.config().limits.device_memory / GRANULE * GRANULE;
        if length == 0 || length > max {
            return Err(AllocDeviceMemoryError::Length { length, max });
        }
        if align_shift > PAGE_SIZE.trailing_zeros() {
            return Err(AllocDeviceMemoryError::Alignment { shift: align_shift });
        }
        if self.device.points.meet(points::ALLOC_DEVICE_MEMORY).fails() {
            return Err(AllocDeviceMemoryError::Full { length, free: 0 });
        }
        let epoch = self.port().epoch();
        let (bar, offset) = self.with_internal(|internal| {
            let mut over = Vec::new();
            internal.retired.retain_mut(|(drain, offset, bytes)| {
                let done = drain.poll(epoch);
                if done {
                    over.push((*offset, *bytes));
                }
                !done
            });
            over.into_iter().for_each(|(offset, bytes)| internal.give_back(offset, bytes));
            let whole = length.next_multiple_of(GRANULE);
            let offset = internal.take(whole, GRANULE.max(1 << align_shift));
            let full = AllocDeviceMemoryError::Full { length, free: internal.free_bytes() };
            let offset = offset.ok_or(full)?;
            internal.used += 1;
            internal.retired.reserve(internal.used);
            Ok((Arc::clone(&internal.bar), offset))
        })?;
        let memory = DeviceMemory { hca: Arc::clone(self), bar, offset, length };
        // What somebody had there before is not for who has it now.
        memory.clear();
        Ok(Arc::new(memory))
    }

    /// Bytes of device memory that are in use or not yet free again.
    pub(super) fn device_memory_in_use(&self) -> u64 {
        let internal = self.internal.lock();
        internal.as_ref().map_or(0, |internal| {
            let retired: u64 = internal.retired.iter().map(|(_, _, bytes)| bytes).sum();
            self.config().limits.device_memory / GRANULE * GRANULE - internal.free_bytes() - retired
        })
    }

    /// A new null key: a local key whose memory, at every address, reads as zeroes and forgets what is written to it
    /// (`ibv_alloc_null_mr`). [`Hca::destroy_null_key`] takes it back.
    ///
    /// # Errors
    /// See [`CreateNullKeyError`].
    pub fn create_null_key(&self, pd: Pd) -> Result<Key, CreateNullKeyError> {
        let page = self.with_internal(|internal| {
            let bar = &internal.bar;
            Ok(bar.bus_base().offset(bar.size() - PAGE_SIZE))
        })?;
        Ok(self.new_key(pd, |keys| keys.create(NullKeySpec { pd, page }))?)
    }
}

impl DeviceMemory {
    /// Bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.length
    }
    /// Whether it has none: never.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }
    /// The device whose memory it is.
    #[must_use]
    pub fn hca(&self) -> &Arc<Hca> {
        &self.hca
    }

    fn check(&self, offset: u64, length: u64) -> Result<(), OutsideDeviceMemory> {
        let size = self.length;
        let inside = offset.checked_add(length).is_some_and(|end| end <= size);
        if inside { Ok(()) } else { Err(OutsideDeviceMemory { offset, length, size }) }
    }

    /// Copies `data` to `offset` (`ibv_memcpy_to_dm`).
    ///
    /// # Errors
    /// [`OutsideDeviceMemory`]; nothing was copied.
    pub fn copy_to(&self, offset: u64, data: &[u8]) -> Result<(), OutsideDeviceMemory> {
        self.check(offset, data.len() as u64)?;
        let written = self.bar.storage().write(self.offset + offset, data);
        debug_assert!(written.is_ok(), "{written:?}");
        Ok(())
    }

    /// Copies from `offset` (`ibv_memcpy_from_dm`).
    ///
    /// # Errors
    /// [`OutsideDeviceMemory`]; nothing was copied.
    pub fn copy_from(&self, offset: u64, out: &mut [u8]) -> Result<(), OutsideDeviceMemory> {
        self.check(offset, out.len() as u64)?;
        let read = self.bar.storage().read(self.offset + offset, out);
        debug_assert!(read.is_ok(), "{read:?}");
        Ok(())
    }

    fn clear(&self) {
        let zeroes = [0; PAGE_SIZE as usize];
        let mut done = 0;
        while done < self.length {
            let count = (self.length - done).min(PAGE_SIZE);
            let cleared = self.copy_to(done, &zeroes[..count as usize]);
            debug_assert!(cleared.is_ok(), "{cleared:?}");
            done += count;
        }
    }

    /// Registers `length` bytes from `offset`. Their addresses count from 0 (`ibv_reg_dm_mr` takes nothing else).
    ///
    /// # Errors
    /// See [`RegisterDeviceMemoryError`].
    pub fn register(
        self: &Arc<Self>,
        pd: Pd,
        access: Access,
        offset: u64,
        length: u64,
    ) -> Result<Arc<DeviceRegion>, RegisterDeviceMemoryError> {
        self.check(offset, length)?;
        let first = self.bar.bus_base().offset(self.offset + offset);
        let first_page_offset = first.page_offset();
        let page = first.offset(first_page_offset.wrapping_neg());
        let count = (first_page_offset + length).div_ceil(PAGE_SIZE);
        let pages = Arc::new(PageList::new(count)?);
        for index in 0..count {
            let entry = Entry::present(
                page.offset(index * PAGE_SIZE),
                Path::BusAddress,
                Backing::DeviceCoherent,
                true,
            );
            pages.store(index, entry);
        }
        let spec = KeySpec { pd, access, address: RegionAddr(0), length, first_page_offset, pages };
        let key = self.hca.create_key(spec)?;
        Ok(Arc::new(DeviceRegion { memory: Arc::clone(self), key, length }))
    }
}

impl DeviceRegion {
    /// Its key, local and remote.
    #[must_use]
    pub fn key(&self) -> Key {
        self.key
    }
    /// Its bytes, from address 0 on.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.length
    }
    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }
    /// The memory that it covers a part of.
    #[must_use]
    pub fn memory(&self) -> &Arc<DeviceMemory> {
        &self.memory
    }
}

impl Drop for DeviceRegion {
    fn drop(&mut self) {
        let known = self.memory.hca.revoke_key(self.key);
        debug_assert!(known.is_ok(), "a region's key is destroyed once, by the region");
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        let drain = self.hca.port().epoch().drain();
        if let Some(internal) = &mut *self.hca.internal.lock() {
            internal.used -= 1;
            internal.retired.push((drain, self.offset, self.length.next_multiple_of(GRANULE)));
        }
    }
}

impl std::fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeviceMemory")
            .field("offset", &self.offset)
            .field("length", &self.length)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for DeviceRegion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeviceRegion")
            .field("key", &self.key)
            .field("length", &self.length)
            .finish_non_exhaustive()
    }
}
