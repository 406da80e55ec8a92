//! Indirect keys: a key whose memory is that of other keys, piece after piece, with gaps between them.
//!
//! An entry is key, address and length (mlx5 calls it KLM), so pieces of any size and place are one range of addresses
//! to the peer: what `IB_MR_TYPE_SG_GAPS` is for (include/rdma/ib_verbs.h). Where every entry has one length (KSM), the
//! entry is computed instead of searched.
//!
//! An indirect key is itself checked like any other. The keys it names are used as local keys: same protection domain,
//! `LOCAL_WRITE` to write, their own bounds. They cannot be indirect: a look-up takes two steps and no more.

use super::{Access, CreateKeyError, KeyViolation, check_access, check_span, within};
use crate::addr::{DmaAddr, RegionAddr};
use crate::hca::pd::Pd;
use crate::wire::Key;

/// Bytes of the shortest entry that has entries on both sides. It bounds the pieces of one packet.
pub const MIN_INDIRECT_ENTRY: u64 = 64;

/// Where the bytes of an indirect entry are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IndirectTarget {
    /// In the region of another key of the same protection domain.
    Key {
        /// That key. Not an indirect one.
        key: Key,
        /// First address in its region.
        address: RegionAddr,
    },
    /// On the bus, by DMA address: what the reserved L_Key is for (IBTA volume 1, 10.6.3.3), which only the software that
    /// maps memory for the device may use. It is a variant and not a number, so that no number on the wire stands for it.
    Dma(DmaAddr),
}

/// One piece of an indirect key's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndirectEntry {
    /// Where.
    pub target: IndirectTarget,
    /// Bytes, at least 1.
    pub length: u64,
}

/// The pieces of an indirect key, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndirectList {
    entries: Box<[IndirectEntry]>,
    lookup: Lookup,
    bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Lookup {
    /// All but the last entry have 2^n bytes.
    Fixed(u32),
    /// The offset of each entry.
    Search(Box<[u64]>),
}

/// Why pieces cannot be the memory of an indirect key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IndirectListError {
    /// There is no byte.
    #[error("an indirect key over nothing")]
    Empty,
    /// An entry that is too short for its place.
    #[error("entry {entry} has {length} bytes, at least {least} are needed there")]
    TooShort {
        /// Its number.
        entry: usize,
        /// Its bytes.
        length: u64,
        /// 1 for the first and the last, else [`MIN_INDIRECT_ENTRY`].
        least: u64,
    },
    /// More bytes than addresses.
    #[error("the entries up to {entry} have more than 2^64 bytes")]
    TooLong {
        /// The entry with which they have.
        entry: usize,
    },
}

impl IndirectList {
    /// The list of these entries.
    ///
    /// # Errors
    /// See [`IndirectListError`].
    pub fn new(entries: Vec<IndirectEntry>) -> Result<Self, IndirectListError> {
        let last = entries.len().checked_sub(1).ok_or(IndirectListError::Empty)?;
        let mut starts = Vec::with_capacity(entries.len());
        let mut end = 0_u64;
        for (entry, IndirectEntry { length, .. }) in entries.iter().enumerate() {
            let least = if entry == 0 || entry == last { 1 } else { MIN_INDIRECT_ENTRY };
            if *length < least {
                return Err(IndirectListError::TooShort { entry, length: *length, least });
            }
            starts.push(end);
            end = end.checked_add(*length).ok_or(IndirectListError::TooLong { entry })?;
        }
        let size = entries[0].length;
        let fixed = size.is_power_of_two()
            && entries[..last].iter().all(|entry| entry.length == size)
            && entries[last].length <= size;
        let lookup = if fixed {
            Lookup::Fixed(size.trailing_zeros())
        } else {
            Lookup::Search(starts.into_boxed_slice())
        };
        Ok(Self { entries: entries.into_boxed_slice(), lookup, bytes: end })
    }

    /// The entries.
    #[must_use]
    pub fn entries(&self) -> &[IndirectEntry] {
        &self.entries
    }

    /// Whether the device computes the entry of an address, as all but the last have the same power of two bytes.
    #[must_use]
    pub fn is_fixed_size(&self) -> bool {
        matches!(self.lookup, Lookup::Fixed(_))
    }

    /// Bytes of all entries.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The entry that holds byte `at`, and the byte's offset in it. `at` is less than [`IndirectList::bytes`].
    pub(in crate::hca) fn locate(&self, at: u64) -> (&IndirectEntry, u64) {
        let (index, start) = match &self.lookup {
            Lookup::Fixed(shift) => ((at >> shift) as usize, at >> shift << shift),
            Lookup::Search(starts) => {
                let index = starts.partition_point(|start| *start <= at) - 1;
                (index, starts[index])
            }
        };
        (&self.entries[index], at - start)
    }
}

/// What a new indirect key covers: all bytes of its list.
#[derive(Clone, Debug)]
pub struct IndirectKeySpec {
    /// Who may use it.
    pub pd: Pd,
    /// For what.
    pub access: Access,
    /// The address of the first byte, as requests name it.
    pub address: RegionAddr,
    /// The pieces.
    pub list: IndirectList,
}

impl IndirectKeySpec {
    pub(super) fn check(&self) -> Result<(), CreateKeyError> {
        check_span(self.address, self.list.bytes())?;
        check_access(self.access)
    }

    /// As [`KeySpec::authorize`](super::KeySpec::authorize): the offset of the first byte in the list.
    pub(in crate::hca) fn authorize(
        &self,
        pd: Pd,
        need: Access,
        address: RegionAddr,
        length: u64,
    ) -> Result<u64, KeyViolation> {
        within((self.pd, self.access), (self.address, self.list.bytes()), (pd, need), (address, length))
    }
}
