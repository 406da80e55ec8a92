//! Memory of an encrypted guest that devices cannot read.
//!
//! In a guest with encrypted memory (AMD SEV, Intel TDX, Arm CCA) pages are private unless the guest shares them with the
//! host (`set_memory_decrypted`). The CPU of the guest reads both; a device's DMA to a private page is stopped on its way
//! to memory. So private pages bounce, or are shared first and handed over as a DMABUF.

use crate::addr::{PAGE_SIZE, PhysAddr};
use crate::sync::RwLock;
use crate::sync::atomic::{AtomicU64, Ordering};
use std::collections::BTreeMap;

/// Which pages of a host memory are private. Kept by the memory, asked by the bus for every DMA.
#[derive(Debug, Default)]
pub struct PrivatePages {
    /// First page number to one past the last; never adjacent, never overlapping.
    ranges: RwLock<BTreeMap<u64, u64>>,
    refused: AtomicU64,
}

impl PrivatePages {
    /// All memory shared.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes the pages that hold `len` bytes at `start` private. DMA to them must have been stopped before.
    pub fn make_private(&self, start: PhysAddr, len: u64) {
        let (mut first, mut end) = pages(start, len);
        if first == end {
            return;
        }
        let mut ranges = self.ranges.write();
        // Ranges that touch this one become part of it.
        while let Some((&from, &to)) = ranges.range(..=end).next_back().filter(|(_, to)| **to >= first) {
            ranges.remove(&from);
            (first, end) = (first.min(from), end.max(to));
        }
        ranges.insert(first, end);
    }

    /// Shares the pages that hold `len` bytes at `start` with devices.
    pub fn share(&self, start: PhysAddr, len: u64) {
        let (first, end) = pages(start, len);
        if first == end {
            return;
        }
        let mut ranges = self.ranges.write();
        while let Some((&from, &to)) = ranges.range(..end).next_back().filter(|(_, to)| **to > first) {
            ranges.remove(&from);
            if to > end {
                ranges.insert(end, to);
            }
            if from < first {
                ranges.insert(from, first);
            }
        }
    }

    /// Whether the page that holds `phys` is private.
    #[must_use]
    pub fn is_private(&self, phys: PhysAddr) -> bool {
        let page = phys.page_number();
        self.ranges.read().range(..=page).next_back().is_some_and(|(_, end)| page < *end)
    }

    /// Bytes that are private.
    #[must_use]
    pub fn private_bytes(&self) -> u64 {
        self.ranges.read().iter().map(|(first, end)| (end - first) * PAGE_SIZE).sum()
    }

    /// DMAs that were stopped.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    pub(super) fn count_refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }
}

fn pages(start: PhysAddr, len: u64) -> (u64, u64) {
    let first = start.page_number();
    let end = if len == 0 { first } else { start.offset(len - 1).page_number() + 1 };
    (first, end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Private is what was made private last, whatever overlaps.
        #[test]
        fn it_is_a_set_of_pages(calls in prop::collection::vec((any::<bool>(), 0..64_u64, 0..20_u64), 1..60)) {
            let pages = PrivatePages::new();
            let mut model = [false; 96];
            for (private, first, count) in calls {
                let (start, len) = (PhysAddr::from_page_number(first), count * PAGE_SIZE);
                if private { pages.make_private(start, len) } else { pages.share(start, len) }
                model[first as usize..(first + count) as usize].fill(private);
                for (page, private) in model.iter().enumerate() {
                    let last_byte = PhysAddr::from_page_number(page as u64).offset(PAGE_SIZE - 1);
                    prop_assert_eq!(pages.is_private(last_byte), *private, "page {}", page);
                }
                let count = model.iter().filter(|private| **private).count() as u64;
                prop_assert_eq!(pages.private_bytes(), count * PAGE_SIZE);
            }
        }
    }

    #[test]
    fn part_of_a_page_is_the_page() {
        let pages = PrivatePages::new();
        pages.make_private(PhysAddr(0x1fff), 2);
        assert!(pages.is_private(PhysAddr(0x1000)) && pages.is_private(PhysAddr(0x2fff)));
        pages.share(PhysAddr(0x2000), 1);
        assert!(!pages.is_private(PhysAddr(0x2fff)));
        assert_eq!(pages.private_bytes(), PAGE_SIZE);
    }
}
