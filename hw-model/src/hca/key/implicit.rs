//! Implicit keys: one key over a whole address space, of which only the parts in use have page lists.
//!
//! The key's range is cut into slots of 1 GiB. A slot holds the key of a region with the slot's page list, or the null key:
//! what is met there is a page fault of the implicit key, and software makes a region for the slot. As mlx5 does it
//! (drivers/infiniband/hw/mlx5/odp.c: indirect entries of 1 GiB, unused ones lead to a null key).
//!
//! The implicit key is checked like any other. Those in its slots are used as local keys, and a slot whose key is gone is as
//! good as unused: software takes a slot's region away when it is empty, beside look-ups.

use super::{Access, CreateKeyError, KeyViolation, check_access, check_span, within};
use crate::addr::RegionAddr;
use crate::hca::pd::Pd;
use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::{Arc, OnceLock};
use crate::wire::Key;

/// log2 of the bytes of a slot.
pub const SLOT_SHIFT: u32 = 30;
/// Bytes of a slot.
pub const SLOT_BYTES: u64 = 1 << SLOT_SHIFT;
/// Slots that are made room for at a time.
const CHUNK: usize = 512;
/// What unused slots hold. No key is 0.
const NULL: u32 = 0;

/// The slots of an implicit key: 4 bytes each, in chunks that are made when one of their slots is first used.
#[derive(Debug)]
pub struct ImplicitTable {
    chunks: Box<[OnceLock<Box<[AtomicU32]>>]>,
    slots: u64,
}

impl ImplicitTable {
    /// A table of `slots` unused slots.
    #[must_use]
    pub fn new(slots: u64) -> Self {
        let chunks = (0..(slots as usize).div_ceil(CHUNK)).map(|_| OnceLock::new()).collect();
        Self { chunks, slots }
    }

    /// Slots.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.slots
    }

    /// Whether there is no slot.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots == 0
    }

    /// The key in `slot`; `None` if it is unused.
    #[must_use]
    pub fn load(&self, slot: u64) -> Option<Key> {
        let chunk = self.chunks.get(slot as usize / CHUNK)?.get()?;
        let word = chunk[slot as usize % CHUNK].load(Ordering::Acquire);
        (word != NULL).then_some(Key(word))
    }

    /// Puts a key into `slot`, or none. May allocate.
    ///
    /// # Panics
    /// If there is no such slot.
    pub fn store(&self, slot: u64, key: Option<Key>) {
        assert!(slot < self.slots, "slot {slot} of {}", self.slots);
        let chunk = &self.chunks[slot as usize / CHUNK];
        let chunk = chunk.get_or_init(|| (0..CHUNK).map(|_| AtomicU32::new(NULL)).collect());
        chunk[slot as usize % CHUNK].store(key.map_or(NULL, |key| key.0), Ordering::Release);
    }

    /// Bytes of memory that it takes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let made = self.chunks.iter().filter(|chunk| chunk.get().is_some()).count();
        (std::mem::size_of_val(&*self.chunks) + made * CHUNK * size_of::<AtomicU32>()) as u64
    }
}

/// What a new implicit key covers.
#[derive(Clone, Debug)]
pub struct ImplicitKeySpec {
    /// Who may use it.
    pub pd: Pd,
    /// For what.
    pub access: Access,
    /// The address of the first byte, as requests name it.
    pub address: RegionAddr,
    /// Bytes. The slots cover them, from the slot boundary at or below `address` on.
    pub length: u64,
    /// The slots.
    pub table: Arc<ImplicitTable>,
}

impl ImplicitKeySpec {
    pub(super) fn check(&self) -> Result<(), CreateKeyError> {
        check_span(self.address, self.length)?;
        let offset = self.address.0 & (SLOT_BYTES - 1);
        let bytes = offset.checked_add(self.length);
        let past = CreateKeyError::PastTop { address: self.address, length: self.length };
        let needed = bytes.ok_or(past)?.div_ceil(SLOT_BYTES);
        if self.table.len() < needed {
            return Err(CreateKeyError::ListTooShort { entries: self.table.len(), needed });
        }
        check_access(self.access)
    }

    /// As [`KeySpec::authorize`](super::KeySpec::authorize): the offset of the first byte in the slots.
    pub(in crate::hca) fn authorize(
        &self,
        pd: Pd,
        need: Access,
        address: RegionAddr,
        length: u64,
    ) -> Result<u64, KeyViolation> {
        let into =
            within((self.pd, self.access), (self.address, self.length), (pd, need), (address, length))?;
        Ok((self.address.0 & (SLOT_BYTES - 1)) + into)
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn a_table_for_half_an_address_space_takes_a_few_kib_until_it_is_used() {
        let table = ImplicitTable::new(1 << 17);
        assert!(table.bytes() <= 8 << 10, "{} bytes", table.bytes());
        assert_eq!((table.load(0), table.load(1 << 16), table.load(1 << 17)), (None, None, None));
        table.store(1 << 16, Some(Key(7)));
        assert_eq!((table.load(1 << 16), table.load((1 << 16) + 1)), (Some(Key(7)), None));
        assert!(table.bytes() <= 16 << 10, "{} bytes", table.bytes());
        table.store(1 << 16, None);
        assert_eq!(table.load(1 << 16), None);
    }
}
