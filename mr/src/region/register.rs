//! Bringing a region to life, up to the point where a key can be made for it.

use super::bringing::Bringing;
use super::core::{Core, Mode, State};
use super::counters::Counters;
use super::emptied::Emptied;
use super::publish::PublishError;
use super::teardown::Teardown;
use crate::dma::{DmaDevice, IovaError, Mapping};
use crate::points;
use hw_model::addr::{VirtRange, page_bytes};
use hw_model::hca::{OutOfMemory, PageList};
use hw_model::sync::atomic::AtomicU64;
use hw_model::sync::{Arc, Mutex};
use odp::fault::{FaultFailure, Want};
use odp::notifier::Interval;
use odp::space::{Access, AddressSpace, PagePin, PinError, PinKind, UserRange, Watch, WatchError};

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

/// What a region is made of.
struct Parts<'a> {
    space: &'a Arc<dyn AddressSpace>,
    range: VirtRange,
    mode: Mode,
    writable: bool,
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
    pub(crate) fn new(
        device: &Arc<DmaDevice>,
        memory: &UserRange,
        (mode, pin): (Mode, PinKind),
        writable: bool,
    ) -> Result<Self, MapRegionError> {
        let mapped = Self::unpopulated(device, memory, (mode, pin), writable)?;
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
        (mode, pin): (Mode, PinKind),
        writable: bool,
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
        let watch = space.watch(range.page_aligned())?;
        // Before pages are brought in: they come locked, and what pinning moves has moved.
        let pin = space.pin_pages(range.page_aligned(), pin)?;
        let parts = Parts { space, range, mode, writable, counters: Arc::default(), emptied: None };
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
        let (mode, emptied) = (Mode::OnDemand, Some(emptied));
        let parts = Parts { space, range, mode, writable, counters, emptied };
        Self::watched(device, parts, (watch, PagePin::populated()))
    }

    fn watched(
        device: &Arc<DmaDevice>,
        parts: Parts<'_>,
        (watch, pin): (Watch, PagePin),
    ) -> Result<Self, MapRegionError> {
        let Parts { space, range, mode, writable, counters, emptied } = parts;
        let pages = range.page_aligned();
        if device.points().meet(points::PAGE_LIST).fails() {
            return Err(OutOfMemory { entries: pages.page_count() }.into());
        }
        let list = Arc::new(PageList::new(pages.page_count())?);
        let mapping = Mapping::try_alloc(device, page_bytes(pages.page_count()), pages.start().0)?;
        let core = Arc::new(Core {
            space: Arc::clone(space),
            device: Arc::clone(device),
            pages,
            list,
            mapping,
            mode,
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

    /// Pinned regions have every page from the start; on-demand regions what is there already.
    fn wanted(&self) -> Want {
        match (self.core.mode, self.core.writable) {
            (Mode::Pinned, true) => Want::Fault(Access::Write),
            (Mode::Pinned, false) => Want::Fault(Access::Read),
            (Mode::OnDemand | Mode::Implicit, _) => Want::Snapshot,
        }
    }

    /// The pages it begins with, brought in step by step.
    pub(crate) fn populating(&self) -> Bringing {
        Bringing::new(&self.core, self.interval.sequence(), self.core.pages, self.wanted())
    }

    fn populate(&self) -> Result<(), FaultFailure<PublishError>> {
        let want = self.wanted();
        self.core.bring(&self.interval.sequence(), self.core.pages, want).map(drop)
    }
}
