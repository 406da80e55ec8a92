//! Physical addresses of memory that this process has no physical addresses of.
//!
//! ```text
//!  63 | 62                 47 | 46                              12 | 11      0
//!   1 |      generation       |        virtual page number         |  offset
//! ```
//!
//! A frame is a virtual page and its generation. An invalidation retires the page's frame by moving its generation on, so
//! that a translation made before it is recognised and refused. After 65,536 retirements of one page a generation comes
//! round again; a translation that stale would be taken for a fresh one.
//!
//! Generations are kept in a sparse three-level table. A leaf is allocated when one of its pages is reported, never while
//! invalidating: what was never reported has no frame to retire.

use hw_model::addr::{PAGE_SHIFT, PAGE_SIZE, PhysAddr, VirtAddr, VirtRange};
use hw_model::sync::OnceLock;
use hw_model::sync::atomic::{AtomicU16, Ordering};
use zerocopy::FromZeros;

/// Addresses a frame can stand for: the lower half of a 48-bit address space.
pub(super) const USER_BITS: u32 = 47;
const SYNTHETIC: u64 = 1 << 63;
const GENERATION_MASK: u64 = 0xffff;

/// The physical address of `at` in its page's generation.
pub(super) fn encode(at: VirtAddr, generation: u16) -> PhysAddr {
    debug_assert!(at.0 >> USER_BITS == 0, "not a user address");
    PhysAddr(SYNTHETIC | u64::from(generation) << USER_BITS | at.0)
}

/// The virtual address and generation of a synthetic physical address.
pub(super) fn decode(phys: PhysAddr) -> Option<(VirtAddr, u16)> {
    let generation = (phys.0 >> USER_BITS & GENERATION_MASK) as u16;
    (phys.0 & SYNTHETIC != 0).then_some((VirtAddr(phys.0 & ((1 << USER_BITS) - 1)), generation))
}

/// Pages in a huge page, and its bytes.
const HUGE_PAGES: usize = 512;
const HUGE_PAGE: u64 = PAGE_SIZE * HUGE_PAGES as u64;

/// Generations in a leaf: 16 MiB of address space in 8 KiB.
const LEAF: usize = 1 << LEAF_BITS;
const LEAF_BITS: u32 = 12;
const MIDDLE_BITS: u32 = 12;
const ROOT_BITS: u32 = USER_BITS - PAGE_SHIFT - LEAF_BITS - MIDDLE_BITS;

type Leaf = [AtomicU16; LEAF];
type Middle = Box<[OnceLock<Box<Leaf>>]>;

/// The generation of every page that was ever reported.
pub(super) struct Generations {
    root: Box<[OnceLock<Middle>]>,
}

struct Place {
    root: usize,
    middle: usize,
    leaf: usize,
}

fn place(page: u64) -> Place {
    Place {
        root: (page >> (LEAF_BITS + MIDDLE_BITS)) as usize,
        middle: (page >> LEAF_BITS) as usize & ((1 << MIDDLE_BITS) - 1),
        leaf: page as usize & (LEAF - 1),
    }
}

impl Generations {
    pub(super) fn new() -> Self {
        Self { root: (0..1 << ROOT_BITS).map(|_| OnceLock::new()).collect() }
    }

    fn leaf(&self, page: u64) -> Option<&Leaf> {
        let at = place(page);
        self.root.get(at.root)?.get()?[at.middle].get().map(|leaf| &**leaf)
    }

    fn leaf_or_new(&self, page: u64) -> &Leaf {
        let at = place(page);
        let middle =
            self.root[at.root].get_or_init(|| (0..1 << MIDDLE_BITS).map(|_| OnceLock::new()).collect());
        middle[at.middle].get_or_init(|| {
            Leaf::new_box_zeroed().unwrap_or_else(|_| std::alloc::handle_alloc_error(size_of_leaf()))
        })
    }

    /// The generation of the page that holds `at`; `None` if no page near it was ever reported.
    pub(super) fn current(&self, at: VirtAddr) -> Option<u16> {
        let page = at.page_number();
        Some(self.leaf(page)?[place(page).leaf].load(Ordering::Acquire))
    }

    /// Calls `run` with (start, pages, generation) of each run of equal generations in `range`, in ascending order. From
    /// here on its pages count as reported.
    pub(super) fn runs(&self, range: VirtRange, mut run: impl FnMut(VirtAddr, u64, u16)) {
        let (mut page, end) = (range.start().page_number(), range.start().page_number() + range.page_count());
        while page < end {
            let leaf = self.leaf_or_new(page);
            let from = place(page).leaf;
            let until = LEAF.min(from + (end - page) as usize);
            let mut start = from;
            while start < until {
                let generation = leaf[start].load(Ordering::Acquire);
                let len = leaf[start..until]
                    .iter()
                    .take_while(|other| other.load(Ordering::Acquire) == generation)
                    .count()
                    .max(1);
                run(VirtAddr::from_page_number(page + (start - from) as u64), len as u64, generation);
                start += len;
            }
            page += (until - from) as u64;
        }
    }

    fn of_huge(&self, page: VirtRange) -> &[AtomicU16] {
        let first = page.start().page_number();
        &self.leaf_or_new(first)[place(first).leaf..][..HUGE_PAGES]
    }

    /// Whether the pages of the huge page `page` are of one generation.
    pub(super) fn is_level(&self, page: VirtRange) -> bool {
        let pages = self.of_huge(page);
        let first = pages[0].load(Ordering::Acquire);
        pages.iter().all(|generation| generation.load(Ordering::Acquire) == first)
    }

    /// Brings the pages of the huge page `page` to one generation, the latest of them, which retires the frames of the
    /// others. Allocates nothing after [`Generations::is_level`].
    pub(super) fn level(&self, page: VirtRange) {
        let pages = self.of_huge(page);
        let is_later = |a: u16, b: u16| (a.wrapping_sub(b) as i16) > 0;
        let latest = pages.iter().map(|generation| generation.load(Ordering::Acquire));
        let latest = latest.reduce(|a, b| if is_later(b, a) { b } else { a }).unwrap_or(0);
        for generation in pages {
            // Only forward: a frame that was retired stays retired.
            let raise = |now: u16| is_later(latest, now).then_some(latest);
            let _ = generation.fetch_update(Ordering::AcqRel, Ordering::Acquire, raise);
        }
    }

    /// Retires the frames of `range`. Does not allocate.
    pub(super) fn retire(&self, range: VirtRange) {
        let Some(range) = range.intersection(user_space()) else { return };
        let (mut page, end) = (range.start().page_number(), range.start().page_number() + range.page_count());
        while page < end {
            let at = place(page);
            let Some(middle) = self.root[at.root].get() else {
                page = ((at.root as u64) + 1) << (LEAF_BITS + MIDDLE_BITS);
                continue;
            };
            let until = LEAF.min(at.leaf + (end - page) as usize);
            if let Some(leaf) = middle[at.middle].get() {
                for generation in &leaf[at.leaf..until] {
                    generation.fetch_add(1, Ordering::AcqRel);
                }
            }
            page += (until - at.leaf) as u64;
        }
    }
}

fn size_of_leaf() -> std::alloc::Layout {
    std::alloc::Layout::new::<Leaf>()
}

/// The huge pages that hold `range`.
pub(super) fn huge_pages(range: VirtRange) -> impl Iterator<Item = VirtRange> {
    let whole = range.aligned_to(HUGE_PAGE);
    let page = move |at| VirtRange::new(whole.start().offset(at), HUGE_PAGE).expect("a page of user memory");
    (0..whole.len()).step_by(HUGE_PAGE as usize).map(page)
}

/// The addresses that a process can have pages at.
pub(super) fn user_space() -> VirtRange {
    VirtRange::new(VirtAddr(0), (1 << USER_BITS) - PAGE_SIZE).expect("half an address space")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(page: u64, pages: u64) -> VirtRange {
        VirtRange::new(VirtAddr(page * PAGE_SIZE), pages * PAGE_SIZE).expect("fits")
    }

    fn runs(table: &Generations, over: VirtRange) -> Vec<(u64, u64, u16)> {
        let mut out = Vec::new();
        table.runs(over, |start, pages, generation| out.push((start.page_number(), pages, generation)));
        out
    }

    #[test]
    fn a_physical_address_gives_back_page_generation_and_offset() {
        for (at, generation) in [(0x7fff_ffff_e123, 0xffff), (0x1000, 0), (0x5555_5555_5678, 7)] {
            assert_eq!(decode(encode(VirtAddr(at), generation)), Some((VirtAddr(at), generation)));
        }
        assert_eq!(decode(PhysAddr(1 << 62)), None, "owned memory is not synthetic");
    }

    #[test]
    fn retiring_moves_reported_pages_on_and_skips_the_rest() {
        let table = Generations::new();
        assert_eq!(table.current(VirtAddr(0x5000)), None);
        table.retire(range(0, 1 << 34));
        assert_eq!(table.current(VirtAddr(0x5000)), None, "retiring must not allocate");
        assert_eq!(runs(&table, range(4094, 6)), [(4094, 2, 0), (4096, 4, 0)]);
        table.retire(range(4095, 2));
        assert_eq!(runs(&table, range(4094, 6)), [(4094, 1, 0), (4095, 1, 1), (4096, 1, 1), (4097, 3, 0)]);
        table.retire(VirtRange::new(VirtAddr(0), u64::MAX).expect("fits"));
        assert_eq!(table.current(VirtAddr(4097 * PAGE_SIZE)), Some(1));
    }

    /// Regression: memory that had gone page by page left generations of its own to each page of the hugetlb page that
    /// took its place, which then was no huge page for any device.
    #[test]
    fn pages_of_a_huge_page_are_brought_to_one_generation_and_only_forward() {
        let table = Generations::new();
        let _ = runs(&table, range(512, 1024));
        for page in [513, 700, 700, 1023] {
            table.retire(range(page, 1));
        }
        let before: Vec<_> = (512..1024).map(|page| table.current(VirtAddr(page * PAGE_SIZE))).collect();
        let pages: Vec<_> = huge_pages(range(600, 1)).collect();
        assert_eq!(pages, [range(512, 512)]);
        assert!(!table.is_level(pages[0]));
        table.level(pages[0]);
        assert!(table.is_level(pages[0]));
        assert_eq!(runs(&table, range(512, 1024)), [(512, 512, 2), (1024, 512, 0)], "and nobody else's");
        assert!(before.iter().all(|before| *before <= Some(2)));
        // Past the turn, 0 is later than 65535.
        (0..0xfffd).for_each(|_| table.retire(range(512, 512)));
        table.retire(range(512, 1));
        assert_eq!(table.current(VirtAddr(512 * PAGE_SIZE)), Some(0));
        table.level(range(512, 512));
        assert_eq!(runs(&table, range(512, 512)), [(512, 512, 0)]);
    }

    #[test]
    fn retiring_a_range_over_many_leaves_reaches_each_page_once() {
        let table = Generations::new();
        let all = range((1 << 24) - 5000, 10_000);
        let _ = runs(&table, all);
        table.retire(all);
        for page in (1 << 24) - 5000..(1 << 24) + 5000 {
            assert_eq!(table.current(VirtAddr(page * PAGE_SIZE)), Some(1), "page {page:#x}");
        }
    }
}
