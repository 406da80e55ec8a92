//! Addresses, page sizes and ranges. A newtype for every kind of address, so that mixing them does not compile; the
//! conversions are the named functions of this file and hold the only address shifts of the workspace.

use std::fmt;

/// log2 of the page size that page lists, IOMMU entries and fault handling count in: 4 KiB.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a page of [`PAGE_SHIFT`].
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl $name {
            /// The address `bytes` further on, or `None` past the top of the address space.
            #[must_use]
            pub fn checked_add(self, bytes: u64) -> Option<Self> {
                self.0.checked_add(bytes).map(Self)
            }
            /// The address `bytes` further on. Wraps past the top: callers have checked the range.
            #[must_use]
            pub fn offset(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }
            /// Bytes from the start of the page that holds this address.
            #[must_use]
            pub fn page_offset(self) -> u64 {
                self.0 & (PAGE_SIZE - 1)
            }
            /// The start of the page that holds this address.
            #[must_use]
            pub fn page_start(self) -> Self {
                Self(self.0 & !(PAGE_SIZE - 1))
            }
            /// The number of the page that holds this address.
            #[must_use]
            pub fn page_number(self) -> u64 {
                self.0 >> PAGE_SHIFT
            }
            /// The start of page `number`.
            #[must_use]
            pub fn from_page_number(number: u64) -> Self {
                Self(number << PAGE_SHIFT)
            }
            /// Whether this address is a multiple of `align`, a power of two.
            #[must_use]
            pub fn is_aligned(self, align: u64) -> bool {
                debug_assert!(align.is_power_of_two());
                self.0 & (align - 1) == 0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address! {
    /// An address in a process's (or simulated process's) virtual address space.
    VirtAddr
}
address! {
    /// A host physical address: RAM, or the host's view of a PCI BAR. In a process address space frames are synthetic.
    PhysAddr
}
address! {
    /// An I/O virtual address: what an IOMMU domain translates.
    Iova
}
address! {
    /// The address a device puts on the bus: an IOVA behind an IOMMU, a physical address without one, or the bus
    /// address of a peer's BAR.
    DmaAddr
}
address! {
    /// An address in the space that a region's key covers. Equal to the virtual address unless the region says else.
    RegionAddr
}

impl Iova {
    /// What a device behind the IOMMU puts on the bus for this IOVA.
    #[must_use]
    pub fn to_dma(self) -> DmaAddr {
        DmaAddr(self.0)
    }
}

impl DmaAddr {
    /// The IOVA that an IOMMU sees when a device puts this address on the bus.
    #[must_use]
    pub fn to_iova(self) -> Iova {
        Iova(self.0)
    }
    /// The physical address that a device without an IOMMU reaches with this bus address.
    #[must_use]
    pub fn to_phys_identity(self) -> PhysAddr {
        PhysAddr(self.0)
    }
}

impl PhysAddr {
    /// What a device without an IOMMU puts on the bus for this physical address.
    #[must_use]
    pub fn to_dma_identity(self) -> DmaAddr {
        DmaAddr(self.0)
    }
}

/// Pages of [`PAGE_SIZE`] needed to cover `bytes` bytes from the start of a page.
#[must_use]
pub fn pages_for(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE_SIZE)
}

/// Bytes in `pages` pages of [`PAGE_SIZE`].
#[must_use]
pub fn page_bytes(pages: u64) -> u64 {
    pages << PAGE_SHIFT
}

/// A half-open range of virtual addresses. It may end exactly at the top of the 64-bit address space, never beyond.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct VirtRange {
    start: VirtAddr,
    len: u64,
}

impl VirtRange {
    /// The range of `len` bytes at `start`, or `None` if it would pass the top of the address space.
    #[must_use]
    pub fn new(start: VirtAddr, len: u64) -> Option<Self> {
        if len > 0 {
            start.0.checked_add(len - 1)?;
        }
        Some(Self { start, len })
    }
    /// First address.
    #[must_use]
    pub fn start(self) -> VirtAddr {
        self.start
    }
    /// Length in bytes.
    #[must_use]
    pub fn len(self) -> u64 {
        self.len
    }
    /// Whether the range holds no byte.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.len == 0
    }
    /// Last address, inclusive. An empty range has none.
    #[must_use]
    pub fn last(self) -> Option<VirtAddr> {
        (self.len > 0).then(|| VirtAddr(self.start.0 + (self.len - 1)))
    }
    /// One past the last address. Wraps to 0 for a range that ends at the top.
    #[must_use]
    pub fn end(self) -> VirtAddr {
        self.start.offset(self.len)
    }
    /// Whether the two ranges share a byte.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        match (self.last(), other.last()) {
            (Some(a), Some(b)) => self.start <= b && other.start <= a,
            _ => false,
        }
    }
    /// The bytes both ranges hold, or `None` if there are none.
    #[must_use]
    pub fn intersection(self, other: Self) -> Option<Self> {
        if !self.overlaps(other) {
            return None;
        }
        let start = self.start.max(other.start);
        let last = self.last()?.min(other.last()?);
        Some(Self { start, len: last.0 - start.0 + 1 })
    }
    /// Both ranges and what lies between them.
    #[must_use]
    pub fn hull(self, other: Self) -> Self {
        let (Some(a), Some(b)) = (self.last(), other.last()) else {
            return if self.is_empty() { other } else { self };
        };
        let start = self.start.min(other.start);
        Self { start, len: (a.max(b).0 - start.0).saturating_add(1) }
    }
    /// Whether every byte of `other` is in this range. An empty range is in every range.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        match (self.last(), other.last()) {
            (_, None) => true,
            (Some(a), Some(b)) => self.start <= other.start && b <= a,
            (None, Some(_)) => false,
        }
    }
    /// The whole pages that hold this range.
    #[must_use]
    pub fn page_aligned(self) -> Self {
        self.aligned_to(PAGE_SIZE)
    }
    /// The whole pages of `page` bytes, a power of two, that hold this range.
    #[must_use]
    pub fn aligned_to(self, page: u64) -> Self {
        debug_assert!(page.is_power_of_two());
        let start = VirtAddr(self.start.0 & !(page - 1));
        let Some(last) = self.last() else { return Self { start, len: 0 } };
        Self { start, len: ((last.0 & !(page - 1)) - start.0).saturating_add(page) }
    }
    /// Pages of [`PAGE_SIZE`] that hold this range.
    #[must_use]
    pub fn page_count(self) -> u64 {
        self.last().map_or(0, |last| last.page_number() - self.start.page_number() + 1)
    }
}

impl fmt::Debug for VirtRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}
impl fmt::Display for VirtRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, +{:#x})", self.start.0, self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, len: u64) -> VirtRange {
        VirtRange::new(VirtAddr(start), len).expect("fits")
    }

    #[test]
    fn a_range_may_end_at_the_top_of_the_address_space_and_not_beyond() {
        let top = range(u64::MAX - 4095, 4096);
        assert_eq!(top.last(), Some(VirtAddr(u64::MAX)));
        assert_eq!(top.page_count(), 1);
        assert_eq!(top.page_aligned(), top);
        assert!(VirtRange::new(VirtAddr(u64::MAX - 4095), 4097).is_none());
        assert!(top.overlaps(range(u64::MAX, 1)));
        assert_eq!(top.intersection(range(u64::MAX, 1)), Some(range(u64::MAX, 1)));
    }

    #[test]
    fn an_empty_range_overlaps_nothing_and_is_in_everything() {
        assert!(!range(8192, 0).overlaps(range(0, 1 << 20)));
        assert!(range(0, 4096).contains(range(8192, 0)));
        assert_eq!(range(5, 0).page_count(), 0);
    }

    #[test]
    fn page_alignment_covers_partial_pages() {
        assert_eq!(range(4095, 2).page_aligned(), range(0, 8192));
        assert_eq!(range(4095, 2).page_count(), 2);
        assert_eq!(range(1, 4095).page_count(), 1);
    }
}
