//! Which part of a range bounces for a device that is not trusted with whole IO pages.

use crate::addr::PhysAddr;

/// A part of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First byte.
    pub phys: PhysAddr,
    /// Bytes, at least 1.
    pub len: u64,
}

/// A range by IO pages (`iommu_dma_iova_link_swiotlb` in drivers/iommu/dma-iommu.c): what shares its IO page with other
/// data at either end bounces, the whole IO pages between do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    /// From a start inside an IO page to the end of that page, or of the range.
    pub head: Option<Piece>,
    /// Whole IO pages.
    pub middle: Option<Piece>,
    /// From the start of the last IO page to an end inside it.
    pub tail: Option<Piece>,
}

impl Split {
    /// `len` bytes at `phys` for IO pages of `granule` bytes, a power of two. The range does not wrap.
    #[must_use]
    pub fn new(phys: PhysAddr, len: u64, granule: u64) -> Self {
        debug_assert!(granule.is_power_of_two());
        let inside = phys.0 & (granule - 1);
        let head = if inside == 0 { 0 } else { len.min(granule - inside) };
        let tail = (len - head) & (granule - 1);
        let middle = len - head - tail;
        let piece = |offset: u64, len: u64| (len > 0).then(|| Piece { phys: phys.offset(offset), len });
        Self { head: piece(0, head), middle: piece(head, middle), tail: piece(head + middle, tail) }
    }

    /// Whether nothing of it bounces.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.head.is_none() && self.tail.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The pieces are the range, in order; the middle is whole IO pages, the others lie in one IO page each and do
        /// not fill it.
        #[test]
        fn pieces_make_up_the_range(start in 0..20_000_u64, len in 0..20_000_u64, shift in 11..17_u32) {
            let granule = 1 << shift;
            let split = Split::new(PhysAddr(start), len, granule);
            let mut at = start;
            for piece in [split.head, split.middle, split.tail].into_iter().flatten() {
                prop_assert_eq!(piece.phys.0, at);
                at += piece.len;
            }
            prop_assert_eq!(at, start + len);
            if let Some(middle) = split.middle {
                prop_assert!(middle.phys.is_aligned(granule) && middle.len.is_multiple_of(granule));
            }
            for end in [split.head, split.tail].into_iter().flatten() {
                prop_assert!(end.len < granule);
                prop_assert_eq!(end.phys.0 / granule, (end.phys.0 + end.len - 1) / granule);
            }
            prop_assert_eq!(split.is_direct(), start.is_multiple_of(granule) && len.is_multiple_of(granule) || len == 0);
        }
    }
}
