//! Splitting a large leaf, so that one page of it can be unmapped and the others stay.

use super::PageTable;
use crate::addr::Iova;
use crate::iommu::leaf::{LIVE, LeafSize, TABLE};
use crate::sync::atomic::{AtomicU64, Ordering};

impl PageTable {
    /// Has leaves of one IO page lead where the large leaf at `iova` leads, if there is one; whether there was. A walk finds the
    /// same place before, between and after, and nothing is allocated: what a word once led to is kept.
    pub(in crate::iommu) fn split(&self, iova: Iova) -> bool {
        let slot = (iova.0 >> Self::root_shift(self.granule_shift)) as usize;
        let Some(upper) = self.root.get(slot).and_then(|upper| upper.get()) else { return false };
        let index = self.index(iova.0, LeafSize::Huge);
        if upper.words[index].load(Ordering::Acquire) & TABLE == 0 {
            return false;
        }
        let Some(middle) = upper.below[index].get() else { return false };
        let index = self.index(iova.0, LeafSize::Large);
        let word: &AtomicU64 = &middle.words[index];
        let _filling = middle.filling.lock();
        let mut leaf = word.load(Ordering::Relaxed);
        if leaf & TABLE != 0 || leaf & LIVE == 0 {
            return false;
        }
        for page in middle.table(index) {
            page.store(leaf, Ordering::Relaxed);
            leaf += self.bytes(LeafSize::Page);
        }
        word.store(TABLE, Ordering::Release);
        true
    }
}
