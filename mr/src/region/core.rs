//! What a registered region is made of, and the lock that keeps it true.
//!
//! One lock a region, `Core::state`. It is the owner's lock of the notifier protocol: publishing pages and hiding them
//! both happen under it, the sequence is raised under it, and a publisher checks the sequence under it. While it is held
//! nothing is allocated or freed, nothing waits for the device, and no callback runs. Lock order: `Core::state`, then
//! the IOMMU's own locks.
//!
//! The page list is the only per-page state: 8 bytes a page. There are words for huge pages as well, and a region of
//! hugetlb memory that says so has no others; every index is that of a page of 4 KiB.

use crate::dma::{DmaDevice, Mapping};
use crate::region::counters::Counters;
use crate::region::emptied::Emptied;
use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange, page_bytes};
use hw_model::hca::PageList;
use hw_model::sync::atomic::AtomicU64;
use hw_model::sync::{Arc, Mutex};
use odp::space::AddressSpace;

/// How the pages of a region are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Every page is present from registration on. Where the region may be written, what a write would have to replace, the
    /// page of zeroes or that of a file under a private mapping, was populated for writing; a page that fork(2) left shared
    /// with a child stays so, and the first write copies it. Runs that allow it are linked in large units. A process cannot hold a kernel's long-term pin by itself: if the pages are
    /// taken away all the same, the next access faults them in again, or fails if nothing is mapped any more.
    Pinned,
    /// What is present at registration is mapped; the rest is faulted in when the device meets it. Huge pages of the
    /// processor are linked as such, and go as a whole.
    OnDemand,
    /// On demand over everything that is or will be mapped in the range, the whole address space perhaps: nothing is mapped
    /// or watched before a device uses it, and what has become empty is given back (`IBV_ACCESS_ON_DEMAND` over
    /// `[0, SIZE_MAX]`).
    Implicit,
}

/// What an on-demand region begins with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Snapshot {
    /// What is resident: its pages are looked for and linked, so that a device that uses them meets no fault (as
    /// `mlx5_ib_init_odp_mr` and `rxe_odp_init_pages` do). What it costs follows what is resident; a fault on each page
    /// instead would cost a hundred times as much.
    #[default]
    Resident,
    /// Nothing: registration reserves and watches, and takes the same time whatever is resident. For memory of which a device
    /// will use little, and for who says with advice what it will use.
    Nothing,
}

pub(crate) struct Core {
    pub(crate) space: Arc<dyn AddressSpace>,
    pub(crate) device: Arc<DmaDevice>,
    /// The whole pages that hold the region.
    pub(crate) pages: VirtRange,
    pub(crate) list: Arc<PageList>,
    /// `None` on a device without a translating IOMMU.
    pub(crate) mapping: Option<Mapping>,
    pub(crate) mode: Mode,
    pub(crate) snapshot: Snapshot,
    /// Whether any access right of the region writes memory.
    pub(crate) writable: bool,
    pub(crate) state: Mutex<State>,
    pub(crate) counters: Arc<Counters>,
    /// Events of the device that were posted before pages were last published for one of them: what they ask for may be
    /// there already.
    pub(crate) answered: AtomicU64,
    /// Whom to tell when an invalidation leaves nothing; `None` for a region that stays all the same.
    pub(crate) emptied: Option<Arc<Emptied>>,
}

/// Guarded by `Core::state`.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Deregistration has begun: nothing is published any more.
    pub(crate) closing: bool,
    /// Nothing is published any more, though the key is there still; see [`crate::device::Seal`].
    pub(crate) sealed: bool,
    /// Entries that are valid. Invariant 9: this is the number of pages mapped.
    pub(crate) present: u64,
    /// Entries that occupy an IOVA slot.
    pub(crate) linked: u64,
    /// What a walk over the list has to look at.
    pub(crate) touched: Touched,
}

/// First and last page that was ever published: every other entry is empty.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Touched(Option<(u64, u64)>);

impl Touched {
    /// The part of `[first, first + count)` that can hold anything.
    pub(crate) fn part_of(self, first: u64, count: u64) -> std::ops::Range<u64> {
        let Some((low, high)) = self.0 else { return 0..0 };
        first.max(low)..(first + count).min(high + 1)
    }
}

impl State {
    pub(crate) fn is_empty(&self) -> bool {
        (self.present, self.linked) == (0, 0)
    }

    /// See [`Touched::part_of`].
    pub(crate) fn clamp(&self, first: u64, count: u64) -> std::ops::Range<u64> {
        self.touched.part_of(first, count)
    }

    pub(crate) fn touch(&mut self, page: u64) {
        let (low, high) = self.touched.0.unwrap_or((page, page));
        self.touched.0 = Some((low.min(page), high.max(page)));
    }
}

impl Core {
    /// Whether nothing is present and nothing linked.
    pub(crate) fn is_empty(&self) -> bool {
        self.state.lock().is_empty()
    }

    /// Lets nothing be published any more, if nothing is there. Whether that is so.
    pub(crate) fn close_if_empty(&self) -> bool {
        let mut state = self.state.lock();
        state.closing |= state.is_empty();
        state.closing
    }

    /// The pages that were ever published: from the first to the last.
    pub(crate) fn touched(&self) -> std::ops::Range<u64> {
        self.state.lock().clamp(0, self.list.len())
    }

    /// The whole pages of `range` in the size that the region is kept in.
    pub(crate) fn whole(&self, range: VirtRange) -> VirtRange {
        range.aligned_to(self.list.entry_bytes())
    }

    /// Index in the page list of the page that holds `at`, which lies in the region.
    pub(crate) fn page_index(&self, at: VirtAddr) -> u64 {
        debug_assert!(self.pages.contains(VirtRange::new(at, 1).expect("an address of the region")));
        at.page_number() - self.pages.start().page_number()
    }

    /// Where `at`, an address of the region, lies behind the start of its first page.
    pub(crate) fn offset_of(&self, at: VirtAddr) -> u64 {
        at.0 - self.pages.start().0
    }

    /// Virtual address of page `index`.
    pub(crate) fn page_address(&self, index: u64) -> VirtAddr {
        self.pages.start().offset(page_bytes(index))
    }

    /// The pages of `range` that belong to the region, as indices.
    pub(crate) fn page_span(&self, range: VirtRange) -> std::ops::Range<u64> {
        let Some(part) = self.pages.intersection(range.page_aligned()) else { return 0..0 };
        let first = self.page_index(part.start());
        first..first + part.len() / PAGE_SIZE
    }
}
