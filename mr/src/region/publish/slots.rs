//! Which words of the page list the pages of a segment go to.
//!
//! A huge word serves where a segment fills all of a huge page, which in a region on demand is one of the processor's, too,
//! the device reaches it at an address that is one's, and none of its pages is there by itself. Where a part of one that is there comes back, or changes, 512 words of 4 KiB take
//! its place; the links stay as they are.

use super::super::core::Core;
use super::{PublishError, pages_of};
use crate::dma::Segment;
use hw_model::addr::page_bytes;
use hw_model::hca::{Backing, HUGE_PAGES, Path, Slot};
use hw_model::iommu::LeafSize;

/// The slots of a segment, in order, but for pages that are part of a huge one and there as the segment would have them.
pub(super) struct Slots<'a> {
    core: &'a Core,
    segment: &'a Segment,
    next: u64,
    end: u64,
    /// Pages before this one are slots of their own.
    small_until: u64,
}

impl Core {
    /// The slots of `segment`, of which the caller holds the region's lock. The answer is the same until one of them changes.
    pub(super) fn slots<'a>(&'a self, segment: &'a Segment) -> Slots<'a> {
        let span = pages_of(segment);
        let small_until = if self.list.has_huge() { 0 } else { span.end };
        Slots { core: self, segment, next: span.start, end: span.end, small_until }
    }

    /// Whether the pages of `segment` can be kept.
    pub(super) fn check(&self, segment: &Segment) -> Result<(), PublishError> {
        if !self.list.is_huge() {
            return Ok(());
        }
        self.slots(segment).try_for_each(|slot| slot.map(drop))
    }

    /// Whether `segment`, which fills `slot`, may be kept as a huge page, and is reached at the address of one.
    fn is_huge(&self, segment: &Segment, slot: Slot) -> bool {
        if self.largest_unit(segment.backing) == LeafSize::Page {
            return false;
        }
        let at = page_bytes(slot.first());
        let address = match &self.mapping {
            Some(mapping) if segment.path.is_linked() => mapping.dma_address(at),
            _ => segment.unlinked_address(at),
        };
        segment.path != Path::Bounce && address.is_aligned(page_bytes(HUGE_PAGES))
    }
}

impl Slots<'_> {
    /// Looks at the huge page `slot`, of which the segment has pages from the next on. Gives it if that is what they go to.
    fn huge(&mut self, slot: Slot) -> Result<Option<Slot>, PublishError> {
        let Self { core, segment, next, .. } = *self;
        let list = &core.list;
        let (filled, whole) = (slot.first() == next && slot.end() <= self.end, list.is_whole(slot));
        let end = slot.end().min(self.end);
        if list.is_huge() && !(filled && segment.backing == Backing::Hugetlb) {
            return Err(PublishError::NotHuge { at: core.page_address(next) });
        }
        if filled && (whole || (core.is_huge(segment, slot) && list.may_be_huge(slot))) {
            self.next = slot.end();
            return Ok(Some(slot));
        }
        if whole {
            let there = list.load_slot(slot);
            if there.is_valid() && core.renewed(there, segment) == there {
                self.next = end;
                return Ok(None);
            }
            list.split(slot);
        }
        self.small_until = end;
        Ok(None)
    }
}

impl Iterator for Slots<'_> {
    type Item = Result<Slot, PublishError>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.next < self.end {
            if self.next >= self.small_until {
                match self.core.list.huge_slot(self.next).map(|slot| self.huge(slot)) {
                    Some(Ok(None)) => continue,
                    Some(Ok(Some(slot))) => return Some(Ok(slot)),
                    Some(Err(error)) => return Some(Err(error)),
                    None => {}
                }
            }
            let slot = Slot::page(self.next);
            self.next += 1;
            return Some(Ok(slot));
        }
        None
    }
}
