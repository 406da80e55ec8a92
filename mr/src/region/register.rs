//! Bringing a region to life, up to the point where a key can be made for it.

use super::bringing::Bringing;
use super::core::{Core, Mode, Snapshot, State};
use super::counters::Counters;
use super::emptied::Emptied;
use super::publish::PublishError;
use super::teardown::Teardown;
use crate::dma::{DmaDevice, IovaError, Mapping};
use crate::points;
use hw_model::addr::{VirtRange, page_bytes};
use hw_model::hca::{HUGE_PAGES, OutOfMemory, PageList};
use hw_model::sync::atomic::AtomicU64;
use hw_model::sync::{Arc, Mutex};
use odp::fault::{FaultFailure, Want};
use odp::notifier::Interval;
use odp::space::{Access, AddressSpace, PagePin, PinError, PinKind, UserRange, Watch, WatchError};

/// log2 of the bytes of a huge page.
const HUGE_SHIFT: u32 = 21;

/// Why a range could not be mapped for a device. Nothing is left behind.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapRegionError {
    /// A region holds at least one byte.
    #[error("a region of 0 bytes; the smallest is 1")]
    Empty,
    /// Longer than the device allows.
    #[error("{len} bytes is more than a region of this device may hold ({limit} bytes)")]
    TooLong {
        /// Bytes asked for.
        len: u64,
        /// Most bytes of a region.
        limit: u64,
    },
    /// The region is to be kept in huge pages, and the memory is not hugetlb throughout.
    #[error("{range} is not hugetlb memory throughout; register it without the hugetlb access")]
    NotHuge {
        /// The range.
        range: VirtRange,
    },
    /// No IOVA was left in which the huge pages of the region lie as huge pages.
    #[error("no room of whole huge pages for {pages} is left in the device's address space")]
    NoHugeIova {
        /// The pages.
        pages: VirtRange,
    },
    /// The address space cannot report changes of the range.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// The pages cannot be kept in memory as asked.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// No memory for the page list.
    #[error(transparent)]
    PageList(#[from] OutOfMemory),
    /// No IOVA.
    #[error(transparent)]
    Iova(#[from] IovaError),
    /// The region is being deregistered.
    #[error("the region is being deregistered")]
    Closing,
    /// A page that must be present cannot be had or reached.
    #[error("a page of the region cannot be had")]
    Pages(#[from] FaultFailure<PublishError>),
}

/// How a region is kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct How {
    pub(crate) mode: Mode,
    pub(crate) pin: PinKind,
    pub(crate) snapshot: Snapshot,
    /// Whether any right of it writes memory.
    pub(crate) writable: bool,
    /// Whether its memory is hugetlb; see [`crate::RegisterOptions::hugetlb`].
    pub(crate) hugetlb: bool,
}

impl How {
    fn whole(self, range: VirtRange) -> VirtRange {
        if self.hugetlb { range.aligned_to(1 << HUGE_SHIFT) } else { range.page_aligned() }
    }

    fn page_list(self, pages: VirtRange) -> Result<PageList, OutOfMemory> {
        let (first, count) = (pages.start().page_number(), pages.page_count());
        match self.hugetlb {
            true => PageList::huge(count),
            false => PageList::mixed(count, first.next_multiple_of(HUGE_PAGES) - first),
        }
    }
}

/// What a region is made of.
struct Parts<'a> {
    space: &'a Arc<dyn AddressSpace>,
    /// The whole pages that hold it.
    pages: VirtRange,
    how: How,
    counters: Arc<Counters>,
    emptied: Option<Arc<Emptied>>,
}

/// A region without a key: mapped, watched, told of changes.
pub(crate) struct Mapped {
    pub(crate) core: Arc<Core>,
    pub(crate) interval: Interval,
    pub(crate) watch: Watch,
    /// What keeps its pages in memory.
    pub(crate) pin: PagePin,
}

impl Mapped {
    /// Maps the pages that hold `memory`. Whatever fails, nothing is left behind (invariant 12).
    pub(crate) fn new(device: &Arc<DmaDevice>, memory: &UserRange, how: How) -> Result<Self, MapRegionError> {
        let mapped = Self::unpopulated(device, memory, how)?;
        match mapped.populate() {
            Ok(()) => Ok(mapped),
            Err(error) => {
                Teardown::begin(mapped).wait();
                Err(error.into())
            }
        }
    }

    /// The same with no page present yet: watched and told of changes, for [`Mapped::populating`].
    pub(crate) fn unpopulated(
        device: &Arc<DmaDevice>,
        memory: &UserRange,
        how: How,
    ) -> Result<Self, MapRegionError> {
        let range = memory.range();
        if range.is_empty() {
            return Err(MapRegionError::Empty);
        }
        let limit = device.max_region();
        if range.len() > limit {
            return Err(MapRegionError::TooLong { len: range.len(), limit });
        }
        let space = memory.space();
        let pages = how.whole(range);
        if how.hugetlb && space.page_shift(pages) < HUGE_SHIFT {
            return Err(MapRegionError::NotHuge { range });
        }
        let watch = space.watch(pages)?;
        // Before pages are brought in: they come locked, and what pinning moves has moved.
        let pin = space.pin_pages(pages, how.pin)?;
        let parts = Parts { space, pages, how, counters: Arc::default(), emptied: None };
        Self::watched(device, parts, (watch, pin))
    }

    /// On demand over a part of an implicit region, whose counters it shares: what is mapped there may come later.
    pub(crate) fn part(
        device: &Arc<DmaDevice>,
        space: &Arc<dyn AddressSpace>,
        range: VirtRange,
        writable: bool,
        (counters, emptied): (Arc<Counters>, Arc<Emptied>),
    ) -> Result<Self, MapRegionError> {
        let watch = space.watch_sparse(range.page_aligned())?;
        let (mode, snapshot) = (Mode::OnDemand, Snapshot::Nothing);
        let how = How { mode, pin: PinKind::Populated, snapshot, writable, hugetlb: false };
        let parts = Parts { space, pages: range.page_aligned(), how, counters, emptied: Some(emptied) };
        Self::watched(device, parts, (watch, PagePin::populated()))
    }

    fn watched(
        device: &Arc<DmaDevice>,
        parts: Parts<'_>,
        (watch, pin): (Watch, PagePin),
    ) -> Result<Self, MapRegionError> {
        let Parts { space, pages, how, counters, emptied } = parts;
        let How { mode, snapshot, writable, .. } = how;
        if device.points().meet(points::PAGE_LIST).fails() {
            return Err(OutOfMemory { entries: pages.page_count() }.into());
        }
        let list = Arc::new(how.page_list(pages)?);
        let mapping = Mapping::try_alloc(device, page_bytes(pages.page_count()), pages.start().0)?;
        if let Some(mapping) = mapping.as_ref().filter(|_| how.hugetlb)
            && !mapping.iova().is_aligned(1 << HUGE_SHIFT)
        {
            return Err(MapRegionError::NoHugeIova { pages });
        }
        let core = Arc::new(Core {
            space: Arc::clone(space),
            device: Arc::clone(device),
            pages,
            list,
            mapping,
            mode,
            snapshot,
            writable,
            state: Mutex::new(State::default()),
            counters,
            answered: AtomicU64::new(0),
            emptied,
        });
        let owner: Arc<dyn odp::notifier::Notify> = Arc::clone(&core) as _;
        let interval = core.space.notifiers().register(pages, owner);
        Ok(Self { core, interval, watch, pin })
    }

    /// What it begins with, and of which pages: pinned regions have every page from the start.
    fn wanted(&self) -> (VirtRange, Want) {
        let core = &self.core;
        match (core.mode, core.snapshot) {
            (Mode::Pinned, _) if core.writable => (core.pages, Want::Fault(Access::Write)),
            (Mode::Pinned, _) => (core.pages, Want::Fault(Access::Read)),
            (Mode::OnDemand | Mode::Implicit, Snapshot::Resident) => (core.pages, Want::Snapshot),
            (Mode::OnDemand | Mode::Implicit, Snapshot::Nothing) => {
                (VirtRange::new(core.pages.start(), 0).expect("an empty range"), Want::Snapshot)
            }
        }
    }

    /// The pages it begins with, brought in step by step.
    pub(crate) fn populating(&self) -> Bringing {
        let (range, want) = self.wanted();
        Bringing::new(&self.core, self.interval.sequence(), range, want)
    }

    fn populate(&self) -> Result<(), FaultFailure<PublishError>> {
        let (range, want) = self.wanted();
        self.core.bring(&self.interval.sequence(), range, want).map(drop)
    }
}
