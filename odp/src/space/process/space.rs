//! The space itself.

use super::bell::Bell;
use super::bracketed::Bracketed;
use super::capabilities::{Capabilities, OpenError, Options, Tools};
use super::exact::Attached;
use super::fork::{Birth, NotInChildren};
use super::frames;
use super::mappings::{Mapping, Mappings};
use super::memory::ProcessMemory;
use super::monitor::{Events, Monitor, Watched};
use super::pin::Locks;
use super::polled::Polled;
use super::scan::Scanner;
use super::segments::Segments;
use super::walk::{Surroundings, Walker};
use super::watch::Watches;
use crate::notifier::Notifiers;
use crate::page::PageRun;
use crate::space::{
    Access, AddressSpace, FaultError, PagePin, PinError, PinKind, Rung, Watch, WatchError, points,
};
use hw_model::addr::{PAGE_SHIFT, PAGE_SIZE, PhysAddr, VirtAddr, VirtRange};
use hw_model::bus::{DmaEpoch, HostMemory, MemoryError};
use hw_model::fault_plan::{Point, Points};
use hw_model::sync::atomic::{AtomicU64, Ordering};
use hw_model::sync::{Arc, Mutex, Weak};
use std::fmt;

/// The memory of this process, as an address space that devices reach pages of.
///
/// One a process is the intent. A second one works, on memory that the first does not watch: the kernel reports changes
/// of a mapping to one userfaultfd only, so what both watch is on the poll rung in the one that came later.
pub struct ProcessSpace {
    capabilities: Capabilities,
    points: Points,
    notifiers: Arc<Notifiers>,
    pub(super) memory: Arc<ProcessMemory>,
    mappings: Arc<Mappings>,
    walker: Walker,
    polled: Arc<Polled>,
    watches: Watches,
    pub(super) segments: Segments,
    events: Arc<Events>,
    watching: AtomicU64,
    locks: Arc<Locks>,
    /// For watches, which keep the space alive.
    me: Weak<Self>,
    birth: Birth,
    /// On the exact rung.
    attached: Mutex<Option<Attached>>,
    monitor: Monitor,
}

/// What has happened in a space since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessStats {
    /// Removals the kernel reported (MADV_DONTNEED, MADV_REMOVE, MADV_FREE).
    pub removed: u64,
    /// Unmaps it reported (munmap, and mmap or mremap onto something).
    pub unmapped: u64,
    /// Moves it reported (mremap).
    pub moved: u64,
    /// Changes of what mappings allow (mprotect), which only the exact rung sees.
    pub protected: u64,
    /// Pages invalidated because a copy found them gone or changed, with no event from the kernel.
    pub suspected: u64,
    /// Copies that found memory gone.
    pub vanished: u64,
    /// DMA refused because it came through a retired frame: stale translations.
    pub retired_uses: u64,
    /// Registrations that the kernel was asked for.
    pub registrations: u64,
    /// Watches alive.
    pub watches: u64,
}

/// A range on a weaker rung than the space offers, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weakness {
    /// The range.
    pub range: VirtRange,
    /// The rung that it is on.
    pub rung: Rung,
    /// What the kernel said.
    pub reason: String,
}

impl ProcessSpace {
    /// Probes what this process may do, and starts the thread that learns of changes.
    ///
    /// # Errors
    /// See [`OpenError`]. What can be done without is not an error but a weaker rung; see
    /// [`ProcessSpace::capabilities`].
    pub fn open(options: Options) -> Result<Arc<Self>, OpenError> {
        Self::with_points(options, Points::OFF)
    }

    /// As [`ProcessSpace::open`], with what happens at its fault points ([`points`]).
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn with_points(options: Options, points: Points) -> Result<Arc<Self>, OpenError> {
        let birth = Birth::now();
        let tools = Tools::probe(&options)?;
        let capabilities = tools.capabilities;
        let userfault = tools.userfault.map(|fd| Arc::new(NotInChildren::new(fd)));
        let thread = |reason| OpenError::Thread { reason };
        let bell = Arc::new(Bell::new().map_err(thread)?);
        let mappings = Arc::new(tools.mappings);
        let polled = Arc::new(Polled::new(Arc::clone(&mappings)));
        let epoch = DmaEpoch::new();
        let notifiers = Notifiers::new(Arc::clone(&epoch));
        let memory =
            Arc::new(ProcessMemory::new(epoch, tools.copier, Arc::clone(&polled), Arc::clone(&bell)));
        let events = Arc::new(Events::default());
        let monitor = Monitor::start(Watched {
            userfault: userfault.clone(),
            bell,
            memory: Arc::clone(&memory),
            notifiers: Arc::clone(&notifiers),
            events: Arc::clone(&events),
        })
        .map_err(thread)?;
        let attached = match options.exact.filter(|_| capabilities.rung == Rung::Exact) {
            Some(exact) => {
                let (memory, notifiers) = (Arc::clone(&memory), Arc::clone(&notifiers));
                let (mappings, events) = (Arc::clone(&mappings), Arc::clone(&events));
                let bracketed = Bracketed { memory, notifiers, mappings, events };
                Some(exact.attach(Arc::new(bracketed)).ok_or(OpenError::Crowded)?)
            }
            None => None,
        };
        let scanner = Scanner::new(tools.pagemap, capabilities.pagemap_scan.is_yes());
        Ok(Arc::new_cyclic(|me| Self {
            capabilities,
            points,
            notifiers,
            memory,
            walker: Walker::new(scanner, Arc::clone(&mappings)),
            watches: Watches::new(
                userfault,
                capabilities.rung == Rung::Exact,
                Arc::clone(&mappings),
                Arc::clone(&polled),
            ),
            locks: Locks::new(Arc::clone(&mappings), birth),
            mappings,
            polled,
            segments: Segments::default(),
            events,
            watching: AtomicU64::new(0),
            me: me.clone(),
            birth,
            attached: Mutex::new(attached),
            monitor,
        }))
    }

    /// What was probed, and what is in use.
    #[must_use]
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// What has happened so far.
    #[must_use]
    pub fn stats(&self) -> ProcessStats {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ProcessStats {
            removed: count(&self.events.removed),
            unmapped: count(&self.events.unmapped),
            moved: count(&self.events.moved),
            protected: count(&self.events.protected),
            suspected: count(&self.events.suspected),
            vanished: self.memory.vanished(),
            retired_uses: self.memory.retired_uses(),
            registrations: self.watches.registrations(),
            watches: count(&self.watching),
        }
    }

    /// The parts of `range` that are watched, but not as well as [`Capabilities::rung`] says, and why.
    #[must_use]
    pub fn weaknesses(&self, range: VirtRange) -> Vec<Weakness> {
        let weakness = |record: super::polled::Record| Weakness {
            range: record.range,
            rung: Rung::Poll,
            reason: record.reason.to_string(),
        };
        self.polled.overlapping(range).into_iter().map(weakness).collect()
    }

    /// Lends `use_it` the address at which this process reaches `len` bytes at physical address `at`: for a kernel that
    /// takes addresses of this process and pins what it finds there (VFIO). Memory that we own stays mapped meanwhile; of
    /// other memory the generation is looked at before, and a change that comes between is reported as any other.
    ///
    /// `use_it` must not give memory of this space back.
    ///
    /// # Errors
    /// [`MemoryError::Retired`], [`MemoryError::Unbacked`] or [`MemoryError::Vanished`] if it is no longer there.
    pub fn with_address<T>(
        &self,
        at: PhysAddr,
        len: u64,
        use_it: impl FnOnce(VirtAddr) -> T,
    ) -> Result<T, MemoryError> {
        self.memory.with_address(at, len, use_it)
    }

    fn around(&self) -> Surroundings<'_> {
        Surroundings {
            watches: &self.watches,
            segments: &self.segments,
            generations: &self.memory.generations,
            settle: self,
            changes: self.events.mapping_changes(),
        }
    }

    /// Whether the pages of `range` can be asked for here.
    fn check(&self, range: VirtRange) -> Result<(), FaultError> {
        let user = frames::user_space();
        let whole = range.start().is_aligned(PAGE_SIZE) && range.len().is_multiple_of(PAGE_SIZE);
        if whole && user.contains(range) && self.birth.is_here() {
            return Ok(());
        }
        let at = range.start();
        Err(FaultError::NoMapping { at: if user.contains(range) { at } else { at.max(user.end()) } })
    }

    /// Whether `range` can be watched here, as far as that can be said without a look at it. For the watch, the space.
    fn check_watch(&self, range: VirtRange) -> Result<Arc<Self>, WatchError> {
        if !self.birth.is_here() {
            let reason = "the space was opened before this process was forked".to_owned();
            return Err(WatchError::Refused { range, reason });
        }
        let whole = range.start().is_aligned(PAGE_SIZE) && range.len().is_multiple_of(PAGE_SIZE);
        if !whole || range.is_empty() || !frames::user_space().contains(range) {
            return Err(WatchError::BadRange { range });
        }
        if self.points.meet(points::WATCH).fails() {
            return Err(WatchError::Refused { range, reason: "fault injection".to_owned() });
        }
        Ok(self.me.upgrade().expect("borrowed from an Arc"))
    }

    fn meet(&self, point: Point, range: VirtRange) -> Result<(), FaultError> {
        match self.points.meet(point).fails() {
            true => Err(FaultError::OutOfMemory { at: range.start() }),
            false => Ok(()),
        }
    }

    /// The parts of `mapping` in `range` that are nobody's segment.
    fn unowned(&self, range: VirtRange, mapping: &Mapping) -> Vec<VirtRange> {
        let mut parts: Vec<_> = mapping.range.intersection(range).into_iter().collect();
        for segment in self.segments.overlapping(mapping.range) {
            let cut =
                |part| <[_; 2]>::from(super::polled::without(part, segment.range())).into_iter().flatten();
            parts = parts.into_iter().flat_map(cut).collect();
        }
        parts
    }
}

impl super::walk::Settle for ProcessSpace {
    fn settle(&self, range: VirtRange, mapping: &Mapping) {
        for record in self.polled.changed(range, mapping) {
            // Noted first: a burst in between then sees the new mapping under frames about to be retired.
            self.polled.insert(record.range, mapping, record.reason);
            let retire = || self.memory.generations.retire(record.range);
            self.notifiers.invalidate(record.range, retire);
        }
    }

    fn settle_huge(&self, range: VirtRange) {
        let generations = &self.memory.generations;
        for page in frames::huge_pages(range).filter(|page| !generations.is_level(*page)) {
            self.notifiers.invalidate(page, || generations.level(page));
        }
    }
}

impl AddressSpace for ProcessSpace {
    fn memory(&self) -> Arc<dyn HostMemory> {
        Arc::clone(&self.memory) as Arc<dyn HostMemory>
    }

    fn notifiers(&self) -> &Arc<Notifiers> {
        &self.notifiers
    }

    /// Maps that come later within `range`, in place of those that are there now, are watched from the first walk that
    /// reports a page of them.
    fn watch(&self, range: VirtRange) -> Result<Watch, WatchError> {
        let me = self.check_watch(range)?;
        let mut mappings = Vec::new();
        let refused = |error: rustix::io::Errno| WatchError::Refused { range, reason: error.to_string() };
        self.mappings.collect(range, &mut mappings).map_err(refused)?;
        let mut at = range.start();
        for mapping in &mappings {
            if mapping.range.start() > at {
                break;
            }
            at = mapping.range.end();
        }
        if at < range.end() {
            return Err(WatchError::NotMapped { range, at });
        }
        let mut extents = Vec::new();
        for mapping in &mappings {
            for part in self.unowned(range, mapping) {
                extents.push(self.watches.cover(part, mapping));
            }
        }
        self.watching.fetch_add(1, Ordering::Relaxed);
        Ok(Watch::new(range, move || {
            for extent in &extents {
                me.watches.uncover(*extent);
            }
            me.watching.fetch_sub(1, Ordering::Relaxed);
        }))
    }

    /// Nothing is registered with the kernel before a walk reports a page of it.
    fn watch_sparse(&self, range: VirtRange) -> Result<Watch, WatchError> {
        let me = self.check_watch(range)?;
        self.watches.cover_sparsely(range);
        self.watching.fetch_add(1, Ordering::Relaxed);
        Ok(Watch::new(range, move || {
            me.watches.uncover(range);
            me.watching.fetch_sub(1, Ordering::Relaxed);
        }))
    }

    fn mapped_alike(&self, range: VirtRange, within: VirtRange) -> VirtRange {
        self.mappings.alike(range, within)
    }

    fn pin_pages(&self, range: VirtRange, kind: PinKind) -> Result<PagePin, PinError> {
        self.check(range)?;
        if kind != PinKind::Populated && self.points.meet(points::PIN).fails() {
            return Err(PinError::Refused { kind, range, reason: "fault injection".to_owned() });
        }
        self.locks.pin(range, kind)
    }

    fn addresses(&self) -> VirtRange {
        frames::user_space()
    }

    fn page_shift(&self, range: VirtRange) -> u32 {
        let mut mappings = Vec::new();
        if self.mappings.collect(range, &mut mappings).is_err() {
            return PAGE_SHIFT;
        }
        let sizes = mappings.iter().map(|mapping| mapping.page_size.trailing_zeros());
        sizes.min().unwrap_or(PAGE_SHIFT)
    }

    fn snapshot(&self, range: VirtRange, out: &mut Vec<PageRun>) -> Result<(), FaultError> {
        self.check(range)?;
        self.meet(points::SNAPSHOT, range)?;
        self.walker.snapshot(self.around(), range, out)
    }

    fn fault(&self, range: VirtRange, access: Access, out: &mut Vec<PageRun>) -> Result<(), FaultError> {
        self.check(range)?;
        self.meet(points::FAULT, range)?;
        self.walker.fault(self.around(), range, access, out)
    }

    fn is_this_process(&self) -> bool {
        true
    }

    fn rung(&self, range: VirtRange) -> Rung {
        let mut rung = Rung::Exact;
        let mut at = range.start();
        for segment in self.segments.overlapping(range) {
            let owned = segment.range();
            if owned.start() > at {
                rung = self.capabilities.rung;
            }
            rung = rung.max(Rung::Owned);
            at = owned.end();
        }
        if at < range.end() {
            rung = rung.max(self.capabilities.rung);
        }
        if self.polled.overlapping(range).is_empty() { rung } else { Rung::Poll }
    }
}

impl Drop for ProcessSpace {
    fn drop(&mut self) {
        // First no more events, then the monitor, which reads those under way, then the descriptor, whose close releases
        // whoever came in between. Watches keep the space alive, so there are none; extents can only be left over from a
        // forgotten one.
        if self.birth.is_here() {
            self.watches.end_all();
            drop(self.attached.lock().take());
        }
        self.monitor.stop();
    }
}

impl fmt::Debug for ProcessSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProcessSpace")
            .field("rung", &self.capabilities.rung)
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}
