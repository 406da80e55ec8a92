//! Unmapping: only whole leaves, only live ones, all of a range or nothing.

use super::{LeafCounts, PageTable};
use crate::addr::Iova;
use crate::iommu::leaf::{FANOUT, FLAGS, LIVE, LeafSize, TABLE};
use crate::sync::atomic::{AtomicU64, Ordering};

/// Why an unmapping was refused. Nothing was unmapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnmapError {
    /// The range is empty or not in whole IO pages.
    #[error("unmapping {iova} of {len:#x} bytes is not in whole IO pages of {granule:#x} bytes")]
    Misaligned {
        /// First IOVA.
        iova: Iova,
        /// Bytes.
        len: u64,
        /// Bytes in an IO page.
        granule: u64,
    },
    /// The range passes the width of the domain.
    #[error("unmapping {iova} of {len:#x} bytes passes the domain's {width} bits")]
    BeyondWidth {
        /// First IOVA.
        iova: Iova,
        /// Bytes.
        len: u64,
        /// Width of the domain in bits.
        width: u32,
    },
    /// Nothing is mapped at part of the range.
    #[error("nothing is mapped at {iova}")]
    Hole {
        /// First IOVA of the hole.
        iova: Iova,
    },
    /// The range holds a part of a larger leaf. A real IOMMU would drop the whole leaf.
    #[error("{leaf} of {leaf_len:#x} bytes was mapped as one leaf; a part of it cannot be unmapped")]
    PartOfLeaf {
        /// First IOVA of the leaf.
        leaf: Iova,
        /// Bytes of the leaf.
        leaf_len: u64,
    },
}

/// A stretch of words of one leaf size that an operation covers.
pub(super) struct Stretch<'a> {
    size: LeafSize,
    iova: Iova,
    words: &'a [AtomicU64],
    /// The word above, where the stretch is all that is below it.
    above: Option<&'a AtomicU64>,
}

impl PageTable {
    /// Unmaps the range, which must consist of whole live leaves. Gives how many of each size.
    pub(in crate::iommu) fn unmap(&self, iova: Iova, len: u64) -> Result<LeafCounts, UnmapError> {
        let granule = self.bytes(LeafSize::Page);
        if len == 0 || (iova.0 | len) & (granule - 1) != 0 {
            return Err(UnmapError::Misaligned { iova, len, granule });
        }
        if !self.holds(iova, len) {
            return Err(UnmapError::BeyondWidth { iova, len, width: self.width });
        }
        self.visit(iova, len, |stretch| self.check_live(&stretch))?;
        let mut counts = LeafCounts::default();
        self.visit(iova, len, |stretch| {
            Self::clear(&stretch);
            counts[stretch.size as usize] += stretch.words.len() as u64;
            Ok(())
        })?;
        self.forget_empty_upper(iova, len);
        Ok(counts)
    }

    fn check_live(&self, stretch: &Stretch<'_>) -> Result<(), UnmapError> {
        for (index, word) in stretch.words.iter().enumerate() {
            if word.load(Ordering::Relaxed) & LIVE == 0 {
                let step = self.bytes(stretch.size);
                return Err(UnmapError::Hole { iova: stretch.iova.offset(index as u64 * step) });
            }
        }
        Ok(())
    }

    pub(super) fn clear(stretch: &Stretch<'_>) {
        for word in stretch.words {
            let leaf = word.load(Ordering::Relaxed);
            word.store(leaf & !FLAGS, Ordering::Release);
        }
        if let Some(above) = stretch.above {
            above.store(0, Ordering::Release);
        }
    }

    /// Words for 1 GiB entries that the range covers whole lead nowhere any more: a huge leaf fits again without a
    /// search below.
    fn forget_empty_upper(&self, iova: Iova, len: u64) {
        let span = self.bytes(LeafSize::Huge);
        let mut at = iova.0.next_multiple_of(span);
        while at + span <= iova.0 + len {
            if let Some(upper) = self.root[(at >> Self::root_shift(self.granule_shift)) as usize].get() {
                let word = &upper.words[self.index(at, LeafSize::Huge)];
                if word.load(Ordering::Relaxed) & TABLE != 0 {
                    word.store(0, Ordering::Release);
                }
            }
            at += span;
        }
    }

    /// Calls `each` for every stretch of words that the range covers, in ascending order. Stops at a hole, and at a leaf
    /// that the range holds only a part of.
    pub(super) fn visit(
        &self,
        iova: Iova,
        len: u64,
        mut each: impl FnMut(Stretch<'_>) -> Result<(), UnmapError>,
    ) -> Result<(), UnmapError> {
        let end = iova.0 + len;
        let mut at = iova.0;
        while at < end {
            let hole = UnmapError::Hole { iova: Iova(at) };
            let slot = &self.root[(at >> Self::root_shift(self.granule_shift)) as usize];
            let upper = slot.get().ok_or(hole)?;
            let index = self.index(at, LeafSize::Huge);
            let word = &upper.words[index];
            let now = word.load(Ordering::Acquire);
            if now & TABLE == 0 {
                at = self.visit_leaf(at, end, word, now, LeafSize::Huge, &mut each)?;
                continue;
            }
            let middle = upper.below[index].get().ok_or(hole)?;
            let index = self.index(at, LeafSize::Large);
            let word = &middle.words[index];
            let now = word.load(Ordering::Acquire);
            if now & TABLE == 0 {
                at = self.visit_leaf(at, end, word, now, LeafSize::Large, &mut each)?;
                continue;
            }
            let first = self.index(at, LeafSize::Page);
            let count = ((end - at) >> self.granule_shift).min((FANOUT - first) as u64) as usize;
            let above = (count == FANOUT).then_some(word);
            let words = &middle.table(index)[first..first + count];
            each(Stretch { size: LeafSize::Page, iova: Iova(at), words, above })?;
            at += (count as u64) << self.granule_shift;
        }
        Ok(())
    }

    fn visit_leaf(
        &self,
        at: u64,
        end: u64,
        word: &AtomicU64,
        now: u64,
        size: LeafSize,
        each: &mut impl FnMut(Stretch<'_>) -> Result<(), UnmapError>,
    ) -> Result<u64, UnmapError> {
        let bytes = self.bytes(size);
        if now & LIVE == 0 {
            return Err(UnmapError::Hole { iova: Iova(at) });
        }
        if at & (bytes - 1) != 0 || end - at < bytes {
            return Err(UnmapError::PartOfLeaf { leaf: Iova(at & !(bytes - 1)), leaf_len: bytes });
        }
        each(Stretch { size, iova: Iova(at), words: std::slice::from_ref(word), above: None })?;
        Ok(at + bytes)
    }
}
