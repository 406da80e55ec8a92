//! Ranges of page numbers.

use hw_model::addr::{VirtAddr, VirtRange, page_bytes};

/// 4 KiB pages in a huge page of 2 MiB.
pub const HUGE_PAGES: u64 = 512;

/// Pages `first..end` of an address space or of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub first: u64,
    pub end: u64,
}

impl Span {
    pub fn new(first: u64, end: u64) -> Self {
        debug_assert!(first <= end);
        Self { first, end }
    }
    pub fn page(page: u64) -> Self {
        Self::new(page, page + 1)
    }
    /// The whole huge page that `page` lies in.
    pub fn huge(page: u64) -> Self {
        let head = huge_head(page);
        Self::new(head, head + HUGE_PAGES)
    }
    pub fn of(range: VirtRange) -> Self {
        let first = range.start().page_number();
        Self::new(first, first + range.page_count())
    }
    pub fn range(self) -> VirtRange {
        VirtRange::new(VirtAddr::from_page_number(self.first), page_bytes(self.len()))
            .expect("user pages lie in the address space")
    }
    pub fn len(self) -> u64 {
        self.end - self.first
    }
    pub fn is_empty(self) -> bool {
        self.first == self.end
    }
    pub fn contains(self, other: Self) -> bool {
        other.is_empty() || (self.first <= other.first && other.end <= self.end)
    }
    pub fn intersection(self, other: Self) -> Option<Self> {
        let (first, end) = (self.first.max(other.first), self.end.min(other.end));
        (first < end).then_some(Self { first, end })
    }
    pub fn hull(self, other: Self) -> Self {
        Self::new(self.first.min(other.first), self.end.max(other.end))
    }
    pub fn pages(self) -> std::ops::Range<u64> {
        self.first..self.end
    }
    /// Whether it consists of whole huge pages.
    pub fn is_huge_aligned(self) -> bool {
        self.first.is_multiple_of(HUGE_PAGES) && self.end.is_multiple_of(HUGE_PAGES)
    }
}

/// The first page of the huge page that `page` lies in.
pub(super) fn huge_head(page: u64) -> u64 {
    page - page % HUGE_PAGES
}
