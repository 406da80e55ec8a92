//! The radix page table of a domain.
//!
//! Nine bits a level above the granule (the IO page): with a granule of 4 KiB, leaves of 4 KiB, 2 MiB and 1 GiB, and a
//! root that reaches 48 bits. Engines walk it without a lock while software maps and unmaps; software calls on disjoint
//! ranges may run at once.
//!
//! ```text
//! root (OnceLock a slot) -> Upper: 512 words, one a 1 GiB entry, each with a slot for a
//!                           Middle: 512 words, one a 2 MiB entry, with one array of 512 x 512 leaf words
//! ```
//!
//! A word is empty, a leaf (address and permissions) or TABLE: look in the level below. The memory of a level below is
//! made once and kept, so a walk can never meet freed memory; what changes is whether the word points there. The leaf
//! words of a GiB are one lazily zeroed allocation: a GiB of IOVA that is prepared but never mapped costs address space,
//! not memory. The levels below are not given back before the domain is: IOVA is reused, so their size follows the peak.
//!
//! Unmapping leaves the address in the word and takes the permissions away. Such a word counts as empty everywhere; the
//! fault log uses it to say where a late DMA would have gone.
use super::leaf::{FANOUT, FANOUT_SHIFT, Leaf, LeafSize, TABLE};
use crate::addr::Iova;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, OnceLock, zeroed_words};

mod map;
mod split;
mod unmap;

pub use map::MapError;
pub use unmap::UnmapError;

/// A call of software's that broke the contract, and was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// It was to map.
    #[error(transparent)]
    Map(#[from] MapError),
    /// It was to unmap.
    #[error(transparent)]
    Unmap(#[from] UnmapError),
}

pub(super) struct PageTable {
    root: Box<[OnceLock<Box<Upper>>]>,
    granule_shift: u32,
    width: u32,
    tables: AtomicU64,
}

struct Upper {
    words: Box<[AtomicU64]>,
    below: Box<[OnceLock<Box<Middle>>]>,
}

struct Middle {
    words: Box<[AtomicU64]>,
    /// Held while a word of `words` turns from empty into something. One lock for a run of large leaves is cheaper than one
    /// locked instruction a leaf; walks do not take it.
    filling: Mutex<()>,
    /// 512 words for each of `words`.
    leaves: Box<[AtomicU64]>,
}

impl Middle {
    /// The leaf words below entry `index`.
    fn table(&self, index: usize) -> &[AtomicU64] {
        &self.leaves[index * FANOUT..(index + 1) * FANOUT]
    }
}

/// Leaves by size, in the order of [`LeafSize::ALL`].
pub(super) type LeafCounts = [u64; LeafSize::ALL.len()];

impl PageTable {
    /// `granule_shift` and `width` have been checked by the domain.
    pub(super) fn new(granule_shift: u32, width: u32) -> Self {
        let roots = 1_usize << width.saturating_sub(Self::root_shift(granule_shift));
        Self {
            root: (0..roots).map(|_| OnceLock::new()).collect(),
            granule_shift,
            width,
            tables: AtomicU64::new(1),
        }
    }

    fn root_shift(granule_shift: u32) -> u32 {
        LeafSize::Huge.shift(granule_shift) + FANOUT_SHIFT
    }

    fn index(&self, iova: u64, size: LeafSize) -> usize {
        (iova >> size.shift(self.granule_shift)) as usize & (FANOUT - 1)
    }

    fn bytes(&self, size: LeafSize) -> u64 {
        1 << size.shift(self.granule_shift)
    }

    /// Tables that exist, in modelled tables of 512 words.
    pub(super) fn table_count(&self) -> u64 {
        self.tables.load(Ordering::Relaxed)
    }

    /// Whether the range lies within the width of the domain.
    pub(super) fn holds(&self, iova: Iova, len: u64) -> bool {
        iova.0.checked_add(len).is_some_and(|end| end <= 1 << self.width)
    }

    /// The word that `iova` leads to: a live leaf, or the word where the walk ended.
    pub(super) fn walk(&self, iova: Iova) -> Leaf {
        let slot = (iova.0 >> Self::root_shift(self.granule_shift)) as usize;
        let Some(upper) = self.root.get(slot).and_then(OnceLock::get) else { return Leaf::ABSENT };
        let index = self.index(iova.0, LeafSize::Huge);
        let word = upper.words[index].load(Ordering::Acquire);
        if word & TABLE == 0 {
            return Leaf { word, size: LeafSize::Huge };
        }
        let Some(middle) = upper.below[index].get() else { return Leaf::ABSENT };
        let index = self.index(iova.0, LeafSize::Large);
        let word = middle.words[index].load(Ordering::Acquire);
        if word & TABLE == 0 {
            return Leaf { word, size: LeafSize::Large };
        }
        let word = middle.table(index)[self.index(iova.0, LeafSize::Page)].load(Ordering::Acquire);
        Leaf { word, size: LeafSize::Page }
    }

    /// Makes the tables that mappings in the range can need, down to the smallest leaf.
    pub(super) fn prepare(&self, iova: Iova, len: u64) -> Result<(), MapError> {
        let span = self.bytes(LeafSize::Huge);
        let mut at = iova.0 & !(span - 1);
        while at < iova.0 + len {
            self.middle(Iova(at))?;
            at += span;
        }
        Ok(())
    }

    fn upper(&self, iova: Iova) -> Result<&Upper, MapError> {
        let slot = &self.root[(iova.0 >> Self::root_shift(self.granule_shift)) as usize];
        if let Some(upper) = slot.get() {
            return Ok(upper);
        }
        let words = zeroed_words(FANOUT).ok_or(MapError::OutOfMemory { iova })?;
        let below = (0..FANOUT).map(|_| OnceLock::new()).collect();
        // Losing the race to another caller is as good as winning it.
        if slot.set(Box::new(Upper { words, below })).is_ok() {
            self.tables.fetch_add(1, Ordering::Relaxed);
        }
        slot.get().map(Box::as_ref).ok_or(MapError::OutOfMemory { iova })
    }

    fn middle(&self, iova: Iova) -> Result<(&Upper, &Middle), MapError> {
        let upper = self.upper(iova)?;
        let slot = &upper.below[self.index(iova.0, LeafSize::Huge)];
        if let Some(middle) = slot.get() {
            return Ok((upper, middle));
        }
        let words = zeroed_words(FANOUT).ok_or(MapError::OutOfMemory { iova })?;
        let leaves = zeroed_words(FANOUT * FANOUT).ok_or(MapError::OutOfMemory { iova })?;
        if slot.set(Box::new(Middle { words, filling: Mutex::new(()), leaves })).is_ok() {
            self.tables.fetch_add(1 + FANOUT as u64, Ordering::Relaxed);
        }
        slot.get().map(|middle| (upper, middle.as_ref())).ok_or(MapError::OutOfMemory { iova })
    }
}
