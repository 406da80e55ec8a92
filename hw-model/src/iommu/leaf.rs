//! One word of an IO page table: what it says, and the sizes it can stand for.

use crate::addr::{Iova, PhysAddr};

bitflags::bitflags! {
    /// What a mapping allows, and what it leads to.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Prot: u64 {
        /// The device may read.
        const READ = 1;
        /// The device may write.
        const WRITE = 1 << 1;
        /// The physical address is a BAR, not memory (`IOMMU_MMIO`). Kept for reports; the address decides the way.
        const MMIO = 1 << 2;
        /// Read and write.
        const READ_WRITE = 1 | 1 << 1;
    }
}

/// Permission bits: a word with one of them is a live leaf.
pub(super) const LIVE: u64 = Prot::READ_WRITE.bits();
/// Look in the level below.
pub(super) const TABLE: u64 = 1 << 3;
/// All that is not address.
pub(super) const FLAGS: u64 = (1 << MIN_GRANULE_SHIFT) - 1;
/// log2 of entries a table.
pub(super) const FANOUT_SHIFT: u32 = 9;
/// Entries a table.
pub(super) const FANOUT: usize = 1 << FANOUT_SHIFT;
/// Bits of a word below the smallest address: flags live there.
pub(super) const MIN_GRANULE_SHIFT: u32 = 11;
pub(super) const MAX_GRANULE_SHIFT: u32 = 16;
/// Bits of the largest domain.
pub(super) const MAX_WIDTH: u32 = 48;

/// The three sizes of leaves. The names are those of a 4 KiB granule; the sizes follow the granule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum LeafSize {
    /// One granule.
    Page = 0,
    /// 512 granules (2 MiB of 4 KiB).
    Large = 1,
    /// 512 x 512 granules (1 GiB of 4 KiB).
    Huge = 2,
}

impl LeafSize {
    /// Smallest first.
    pub const ALL: [Self; 3] = [Self::Page, Self::Large, Self::Huge];

    /// log2 of the leaf's bytes for a granule of `granule_shift`.
    #[must_use]
    pub fn shift(self, granule_shift: u32) -> u32 {
        granule_shift + FANOUT_SHIFT * self as u32
    }
}

/// A word as a walk found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Leaf {
    pub(super) word: u64,
    pub(super) size: LeafSize,
}

impl Leaf {
    pub(super) const ABSENT: Self = Self { word: 0, size: LeafSize::Page };

    pub(super) fn from_raw(word: u64, size: LeafSize) -> Self {
        Self { word, size }
    }
    pub(super) fn word(self) -> u64 {
        self.word
    }
    pub(super) fn size(self) -> LeafSize {
        self.size
    }
    pub(super) fn is_live(self) -> bool {
        self.word & LIVE != 0
    }
    pub(super) fn prot(self) -> Prot {
        Prot::from_bits_truncate(self.word)
    }
    /// The physical address of the leaf's first byte.
    pub(super) fn base(self) -> PhysAddr {
        PhysAddr(self.word & !FLAGS)
    }
    /// The address an unmapped word still holds.
    pub(super) fn last_mapped(self) -> Option<PhysAddr> {
        (self.word != 0).then(|| self.base())
    }
    /// The physical address of `iova`, which lies in this leaf.
    pub(super) fn translate(self, iova: Iova, granule_shift: u32) -> PhysAddr {
        self.base().offset(iova.0 & ((1 << self.size.shift(granule_shift)) - 1))
    }
}
