//! PCI BARs: memory of a device, in a window of the physical address space.

use super::{AtomicOp, DeviceId, MemoryError, ProviderId};
use crate::addr::{DmaAddr, PhysAddr};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Arc, zeroed_words};

/// What answers behind a BAR, by offset into it. [`RamStorage`] is one; memory that the CPU maps as well is another.
///
/// Copies run in increasing address order; the last byte is placed last.
pub trait BarStorage: Send + Sync {
    /// Bytes it holds.
    fn size(&self) -> u64;

    /// Copies `out.len()` bytes from `offset`.
    ///
    /// # Errors
    /// See [`StorageError`].
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), StorageError>;

    /// Copies `data` to `offset`.
    ///
    /// # Errors
    /// See [`StorageError`]; a prefix may have been placed then.
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), StorageError>;

    /// Performs `op` on the aligned 64-bit word at `offset` and gives the value before it.
    ///
    /// # Errors
    /// See [`StorageError`].
    fn atomic(&self, offset: u64, op: AtomicOp) -> Result<u64, StorageError>;
}

/// Why storage did not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StorageError {
    /// Beyond its end.
    #[error("offset {offset:#x} is beyond the storage's {size:#x} bytes")]
    OutOfRange {
        /// First offset that is beyond.
        offset: u64,
        /// Bytes of the storage.
        size: u64,
    },
    /// The memory behind it went away.
    #[error("the storage at offset {offset:#x} vanished")]
    Vanished {
        /// First offset that could not be reached.
        offset: u64,
    },
    /// An atomic on a word that is not naturally aligned.
    #[error("atomic at offset {offset:#x} is not 8-byte aligned")]
    Misaligned {
        /// The offset used.
        offset: u64,
    },
}

impl StorageError {
    /// The same in terms of the window that begins at `base`.
    pub(crate) fn at(self, base: PhysAddr) -> MemoryError {
        match self {
            Self::OutOfRange { offset, .. } => MemoryError::Unbacked { at: base.offset(offset) },
            Self::Vanished { offset } => MemoryError::Vanished { at: base.offset(offset) },
            Self::Misaligned { offset } => MemoryError::Misaligned { at: base.offset(offset) },
        }
    }
}

/// Device memory in plain words. Zero at first; what is never written takes no memory.
pub struct RamStorage {
    words: Box<[AtomicU64]>,
}

impl RamStorage {
    /// `size` bytes, rounded up to 8; `None` if the host has no memory for them.
    #[must_use]
    pub fn new(size: u64) -> Option<Arc<Self>> {
        let words = zeroed_words(usize::try_from(size.div_ceil(8)).ok()?)?;
        Some(Arc::new(Self { words }))
    }

    fn check(&self, offset: u64, len: usize) -> Result<(), StorageError> {
        let size = self.size();
        match offset.checked_add(len as u64) {
            Some(end) if end <= size => Ok(()),
            _ => Err(StorageError::OutOfRange { offset: offset.max(size), size }),
        }
    }
}

/// The part of the word at `offset` that a copy of `left` more bytes covers: word index, first byte, number of bytes.
fn part_of_word(offset: u64, left: usize) -> (usize, usize, usize) {
    let first = (offset % 8) as usize;
    ((offset / 8) as usize, first, left.min(8 - first))
}

impl BarStorage for RamStorage {
    fn size(&self) -> u64 {
        self.words.len() as u64 * 8
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), StorageError> {
        self.check(offset, out.len())?;
        let mut done = 0;
        while done < out.len() {
            let (word, first, count) = part_of_word(offset + done as u64, out.len() - done);
            let bytes = self.words[word].load(Ordering::Acquire).to_le_bytes();
            out[done..done + count].copy_from_slice(&bytes[first..first + count]);
            done += count;
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), StorageError> {
        self.check(offset, data.len())?;
        let mut done = 0;
        while done < data.len() {
            let (word, first, count) = part_of_word(offset + done as u64, data.len() - done);
            let new = &data[done..done + count];
            if let Ok(whole) = <[u8; 8]>::try_from(new) {
                self.words[word].store(u64::from_le_bytes(whole), Ordering::Release);
            } else {
                // Bytes beside the written ones may be changing: they are put back only if they are what was read.
                let place = |old: u64| {
                    let mut bytes = old.to_le_bytes();
                    bytes[first..first + count].copy_from_slice(new);
                    Some(u64::from_le_bytes(bytes))
                };
                let placed = self.words[word].fetch_update(Ordering::AcqRel, Ordering::Acquire, place);
                debug_assert!(placed.is_ok(), "the closure always gives a value");
            }
            done += count;
        }
        Ok(())
    }

    fn atomic(&self, offset: u64, op: AtomicOp) -> Result<u64, StorageError> {
        if !offset.is_multiple_of(8) {
            return Err(StorageError::Misaligned { offset });
        }
        self.check(offset, 8)?;
        let word = &self.words[(offset / 8) as usize];
        Ok(match op {
            AtomicOp::FetchAdd(add) => word.fetch_add(add, Ordering::AcqRel),
            AtomicOp::CompareSwap { compare, swap } => {
                match word.compare_exchange(compare, swap, Ordering::AcqRel, Ordering::Acquire) {
                    Ok(before) | Err(before) => before,
                }
            }
        })
    }
}

impl std::fmt::Debug for RamStorage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RamStorage").field("size", &self.size()).finish()
    }
}

/// A BAR on the bus: one provider of peer-to-peer memory.
pub struct Bar {
    pub(super) provider: ProviderId,
    pub(super) device: DeviceId,
    pub(super) base: PhysAddr,
    pub(super) bus_base: DmaAddr,
    pub(super) size: u64,
    pub(super) storage: Arc<dyn BarStorage>,
    pub(super) by_bus_address: AtomicU64,
    pub(super) through_host_bridge: AtomicU64,
}

impl Bar {
    /// What its pages are known by.
    #[must_use]
    pub fn provider(&self) -> ProviderId {
        self.provider
    }
    /// Whose BAR it is.
    #[must_use]
    pub fn device(&self) -> DeviceId {
        self.device
    }
    /// Its first byte as the host addresses it.
    #[must_use]
    pub fn base(&self) -> PhysAddr {
        self.base
    }
    /// Its first byte as a peer below the same switch addresses it.
    #[must_use]
    pub fn bus_base(&self) -> DmaAddr {
        self.bus_base
    }
    /// Bytes of the window.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }
    /// What answers behind it. A driver on the host reads and writes it here.
    #[must_use]
    pub fn storage(&self) -> &Arc<dyn BarStorage> {
        &self.storage
    }
    /// The bus address of a physical address of this BAR (`pci_p2pdma_bus_addr_map`); `None` outside it.
    #[must_use]
    pub fn to_bus(&self, phys: PhysAddr) -> Option<DmaAddr> {
        let offset = phys.0.checked_sub(self.base.0).filter(|offset| *offset < self.size)?;
        Some(self.bus_base.offset(offset))
    }
    /// Bursts that came by bus address.
    #[must_use]
    pub fn bursts_by_bus_address(&self) -> u64 {
        self.by_bus_address.load(Ordering::Relaxed)
    }
    /// Bursts that came through the host bridge.
    #[must_use]
    pub fn bursts_through_host_bridge(&self) -> u64 {
        self.through_host_bridge.load(Ordering::Relaxed)
    }
}

impl std::fmt::Debug for Bar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bar")
            .field("provider", &self.provider)
            .field("device", &self.device)
            .field("base", &self.base)
            .field("bus_base", &self.bus_base)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
