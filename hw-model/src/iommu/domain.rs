//! One I/O address space: page table, IOTLB, fault log.

use super::config::{ConfigError, DomainConfig, DomainStats, Gather};
use super::cookie::Cookie;
use super::fault::{DmaAccess, FaultLog, IommuFault};
use super::iotlb::Iotlb;
use super::leaf::{FANOUT, Leaf, LeafSize, Prot};
use super::page_table::{LeafCounts, MapError, PageTable, UnmapError, Violation};
use super::queue::{FlushTicket, InvalidationQueue, QueueFull};
use crate::addr::{Iova, PhysAddr};
use crate::bus::DeviceId;
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use crate::sync::{Arc, OnceLock};

/// An I/O address space. Any number of devices can be attached to it; they share its IOTLB.
///
/// Everything here may be called from any thread. Calls of software ([`Domain::map`], [`Domain::unmap`]) that run at
/// once must be on disjoint ranges; translations by engines need no such care. Nothing but [`Domain::prepare`], and
/// mapping what was not prepared, allocates.
pub struct Domain {
    table: PageTable,
    iotlb: Option<Iotlb>,
    queue: InvalidationQueue,
    config: DomainConfig,
    /// Sizes of leaves ever mapped, one bit each: what the IOTLB has to look for.
    sizes: AtomicU32,
    faults: FaultLog,
    leaves_mapped: [AtomicU64; 3],
    leaves_unmapped: [AtomicU64; 3],
    violations: AtomicU64,
    first_violation: OnceLock<Violation>,
    stale_hits: AtomicU64,
    cookie: Cookie,
}

impl Domain {
    /// An empty domain.
    ///
    /// # Errors
    /// [`ConfigError`] if `config` is out of range.
    pub fn new(config: DomainConfig) -> Result<Arc<Self>, ConfigError> {
        config.check()?;
        let DomainConfig { width, granule_shift, .. } = config;
        Ok(Arc::new(Self {
            table: PageTable::new(granule_shift, width),
            iotlb: config.iotlb.map(|iotlb| Iotlb::new(iotlb, granule_shift)),
            queue: InvalidationQueue::new(config.queue),
            config,
            sizes: AtomicU32::new(1 << LeafSize::Page as u32),
            faults: FaultLog::new(config.fault_log),
            leaves_mapped: std::array::from_fn(|_| AtomicU64::new(0)),
            leaves_unmapped: std::array::from_fn(|_| AtomicU64::new(0)),
            violations: AtomicU64::new(0),
            first_violation: OnceLock::new(),
            stale_hits: AtomicU64::new(0),
            cookie: Cookie::default(),
        }))
    }

    /// What the domain was made with.
    #[must_use]
    pub fn config(&self) -> &DomainConfig {
        &self.config
    }

    /// Bytes in an IO page.
    #[must_use]
    pub fn granule(&self) -> u64 {
        1 << self.config.granule_shift
    }

    /// What the software that manages the domain keeps with it.
    #[must_use]
    pub fn cookie(&self) -> &Cookie {
        &self.cookie
    }

    /// Makes every table that mappings in the range can need, so that [`Domain::map`] there neither allocates nor fails
    /// for want of memory. Costs address space; a table takes memory when it is first used.
    ///
    /// # Errors
    /// [`MapError::BeyondWidth`], [`MapError::OutOfMemory`].
    pub fn prepare(&self, iova: Iova, len: u64) -> Result<(), MapError> {
        if !self.table.holds(iova, len) {
            return self.violated(MapError::BeyondWidth { iova, len, width: self.config.width });
        }
        self.table.prepare(iova, len)
    }

    /// Maps `len` bytes with the largest leaves that alignment and length allow. Nothing is flushed: sync once after a
    /// batch with [`Domain::sync_map`].
    ///
    /// What is mapped with large leaves can only be unmapped in whole leaves; who unmaps page by page uses
    /// [`Domain::map_pages`], or [`Domain::split`] before.
    ///
    /// # Errors
    /// [`MapError`]; nothing of the range is mapped then.
    pub fn map(&self, iova: Iova, phys: PhysAddr, len: u64, prot: Prot) -> Result<(), MapError> {
        self.map_up_to(iova, phys, len, prot, LeafSize::Huge)
    }

    /// As [`Domain::map`], in leaves of one IO page each.
    ///
    /// # Errors
    /// [`MapError`]; nothing of the range is mapped then.
    pub fn map_pages(&self, iova: Iova, phys: PhysAddr, len: u64, prot: Prot) -> Result<(), MapError> {
        self.map_up_to(iova, phys, len, prot, LeafSize::Page)
    }

    /// As [`Domain::map`], with leaves of at most `largest`.
    ///
    /// # Errors
    /// [`MapError`]; nothing of the range is mapped then.
    pub fn map_up_to(
        &self,
        iova: Iova,
        phys: PhysAddr,
        len: u64,
        prot: Prot,
        largest: LeafSize,
    ) -> Result<(), MapError> {
        // What a failing call had mapped for a moment may be in the IOTLB.
        match self.table.map(iova, phys, len, prot, largest, |done| self.invalidate(iova, done)) {
            Ok(counts) => {
                self.note_sizes(counts);
                count(&self.leaves_mapped, counts);
                Ok(())
            }
            Err(error) => self.refused(error),
        }
    }

    /// Maps one IO page for each address of `frames`, in order, at consecutive IOVAs: one walk a table instead of one a
    /// page. As many [`Domain::map`] calls of one IO page otherwise.
    ///
    /// # Errors
    /// [`MapError`]; nothing is mapped then.
    pub fn map_scattered(
        &self,
        iova: Iova,
        frames: impl IntoIterator<Item = PhysAddr>,
        prot: Prot,
    ) -> Result<(), MapError> {
        match self.table.map_scattered(iova, frames, prot, |done| self.invalidate(iova, done)) {
            Ok(pages) => {
                count(&self.leaves_mapped, [pages, 0, 0]);
                Ok(())
            }
            Err(error) => self.refused(error),
        }
    }

    /// Lets the IOTLB know which sizes of leaves to look for.
    #[inline]
    fn note_sizes(&self, [_, large, huge]: LeafCounts) {
        let sizes =
            u32::from(large > 0) << LeafSize::Large as u32 | u32::from(huge > 0) << LeafSize::Huge as u32;
        if self.sizes.load(Ordering::Relaxed) & sizes != sizes {
            self.sizes.fetch_or(sizes, Ordering::AcqRel);
        }
    }

    #[cold]
    fn refused(&self, error: MapError) -> Result<(), MapError> {
        match error {
            MapError::OutOfMemory { .. } => Err(error),
            _ => self.violated(error),
        }
    }

    /// Has pages lead where the large leaves lead that the ends of the range cut, so that it can be unmapped by itself: 512
    /// leaves for one. Devices see no difference and nothing is to be flushed: what the IOTLB has of the whole leaf is right
    /// until a part of it is unmapped, and is dropped with that.
    pub fn split(&self, iova: Iova, len: u64) {
        let bytes = 1 << LeafSize::Large.shift(self.config.granule_shift);
        for edge in [iova.0, iova.0.saturating_add(len)] {
            if edge & (bytes - 1) != 0 && self.table.split(Iova(edge)) {
                count(&self.leaves_mapped, [FANOUT as u64, 0, 0]);
                count(&self.leaves_unmapped, [0, 1, 0]);
            }
        }
    }

    /// Unmaps `len` bytes, which must consist of whole leaves, every one of them mapped. Flush what it gives before the
    /// pages are released or the IOVA is used again.
    ///
    /// # Errors
    /// [`UnmapError`]; nothing was unmapped then.
    pub fn unmap(&self, iova: Iova, len: u64) -> Result<Gather, UnmapError> {
        match self.table.unmap(iova, len) {
            Ok(counts) => {
                count(&self.leaves_unmapped, counts);
                Ok(Gather { start: iova.0, len })
            }
            Err(error) => self.violated(error),
        }
    }

    fn violated<T, E: std::fmt::Display + Copy + Into<Violation>>(&self, error: E) -> Result<T, E> {
        self.violations.fetch_add(1, Ordering::Relaxed);
        let _ = self.first_violation.set(error.into());
        tracing::debug!(%error, "IOMMU contract broken by software");
        Err(error)
    }

    /// Invalidates what was unmapped: one command, whatever was merged into `gather`; none if it is empty
    /// (`iommu_iotlb_sync`). When this returns, no translation that begins later uses what was unmapped.
    pub fn flush(&self, gather: Gather) {
        if !gather.is_empty() {
            self.invalidate(Iova(gather.start), gather.len);
        }
    }

    /// Makes mappings of the range sure to be seen (`iotlb_sync_map`): drops what the IOTLB remembers as not present. One
    /// command, and none where the IOTLB does not remember such things.
    pub fn sync_map(&self, iova: Iova, len: u64) {
        if self.config.iotlb.is_some_and(|iotlb| iotlb.caches_not_present) && len > 0 {
            self.invalidate(iova, len);
        }
    }

    /// Invalidates everything: one command.
    pub fn flush_all(&self) {
        self.invalidate(Iova(0), 1 << self.config.width);
    }

    /// As [`Domain::flush`], without waiting: the invalidation is queued, and executed when [`Domain::run_queue`] gets to
    /// it. For simulated worlds, in which the IOMMU takes its time.
    ///
    /// # Errors
    /// [`QueueFull`]; nothing was queued.
    pub fn submit_flush(&self, gather: Gather) -> Result<FlushTicket, QueueFull> {
        self.queue.submit(Iova(gather.start), gather.len)
    }

    /// Whether a flush that was submitted is done: what it covers may be released.
    #[must_use]
    pub fn is_flushed(&self, ticket: FlushTicket) -> bool {
        self.queue.is_done(ticket)
    }

    /// Lets the IOMMU execute up to `limit` descriptors of its queue. Gives how many there were to execute.
    pub fn run_queue(&self, limit: usize) -> usize {
        self.queue.run(limit, |iova, len| self.execute(iova, len))
    }

    fn invalidate(&self, iova: Iova, len: u64) {
        self.queue.submit_and_wait(iova, len, |iova, len| self.execute(iova, len));
    }

    fn execute(&self, iova: Iova, len: u64) {
        if let Some(iotlb) = &self.iotlb {
            iotlb.invalidate(iova, len, self.sizes.load(Ordering::Acquire));
        }
    }

    /// Where the table says `iova` leads, whatever the IOTLB has (`iommu_iova_to_phys`).
    #[must_use]
    pub fn iova_to_phys(&self, iova: Iova) -> Option<PhysAddr> {
        self.lookup(iova).map(|(phys, _)| phys)
    }

    /// As [`Domain::iova_to_phys`], with what the mapping allows.
    #[must_use]
    pub fn lookup(&self, iova: Iova) -> Option<(PhysAddr, Prot)> {
        if !self.table.holds(iova, 1) {
            return None;
        }
        let leaf = self.table.walk(iova);
        leaf.is_live().then(|| (leaf.translate(iova, self.config.granule_shift), leaf.prot()))
    }

    /// Size of the leaf that maps `iova`.
    #[must_use]
    pub fn leaf_at(&self, iova: Iova) -> Option<LeafSize> {
        let leaf = self.table.holds(iova, 1).then(|| self.table.walk(iova))?;
        leaf.is_live().then(|| leaf.size())
    }

    /// Translates for a DMA. The answer holds up to the end of the IO page.
    ///
    /// # Errors
    /// [`IommuFault`]; it has been logged.
    #[inline]
    pub fn translate(&self, device: DeviceId, iova: Iova, access: DmaAccess) -> Result<PhysAddr, IommuFault> {
        Ok(self.leaf(device, iova, access)?.translate(iova, self.config.granule_shift))
    }

    /// As [`Domain::translate`], with the number of bytes for which the answer holds: to the end of the leaf.
    #[inline]
    pub(crate) fn translate_stretch(
        &self,
        device: DeviceId,
        iova: Iova,
        access: DmaAccess,
    ) -> Result<(PhysAddr, u64), IommuFault> {
        let leaf = self.leaf(device, iova, access)?;
        let shift = self.config.granule_shift;
        let bytes = 1 << leaf.size().shift(shift);
        Ok((leaf.translate(iova, shift), bytes - (iova.0 & (bytes - 1))))
    }

    #[inline]
    fn leaf(&self, device: DeviceId, iova: Iova, access: DmaAccess) -> Result<Leaf, IommuFault> {
        if iova.0 >> self.config.width != 0 {
            return Err(self.fault(device, iova, access, IommuFault::BeyondWidth));
        }
        let leaf = match &self.iotlb {
            None => self.table.walk(iova),
            Some(iotlb) => match iotlb.lookup(iova, self.sizes.load(Ordering::Relaxed)) {
                Some(leaf) => {
                    if self.config.audit {
                        self.audit(leaf, iova);
                    }
                    leaf
                }
                None => iotlb.fill(iova, || self.table.walk(iova)),
            },
        };
        match refusal(leaf, access) {
            None => Ok(leaf),
            Some(reason) => Err(self.fault(device, iova, access, reason)),
        }
    }

    #[cold]
    fn audit(&self, cached: Leaf, iova: Iova) {
        let now = self.table.walk(iova);
        let leads = |leaf: Leaf| (leaf.translate(iova, self.config.granule_shift), leaf.prot());
        // A leaf that was split meanwhile leads where its pages lead.
        if cached.is_live() && (!now.is_live() || leads(now) != leads(cached)) {
            self.stale_hits.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(%iova, stale = %cached.base(), "a device used a translation that was unmapped");
        }
    }

    #[cold]
    fn fault(&self, device: DeviceId, iova: Iova, access: DmaAccess, reason: IommuFault) -> IommuFault {
        let table = match reason {
            IommuFault::BeyondWidth => Leaf::ABSENT,
            _ => self.table.walk(iova),
        };
        let unsynced = table.is_live() && refusal(table, access).is_none();
        let last_mapped = table.last_mapped().map(|_| table.translate(iova, self.config.granule_shift));
        self.faults.push(device, iova, access, reason, last_mapped, unsynced);
        reason
    }

    /// The log of DMAs that were stopped.
    #[must_use]
    pub fn faults(&self) -> &FaultLog {
        &self.faults
    }

    /// The first of [`DomainStats::violations`].
    #[must_use]
    pub fn first_violation(&self) -> Option<Violation> {
        self.first_violation.get().copied()
    }

    /// Counters as they are now.
    #[must_use]
    pub fn stats(&self) -> DomainStats {
        // Unmapped first: what is mapped meanwhile makes the difference larger, never negative.
        let leaves_unmapped = counts(&self.leaves_unmapped);
        let leaves_mapped = counts(&self.leaves_mapped);
        let bytes = |size: LeafSize| {
            let live = leaves_mapped[size as usize] - leaves_unmapped[size as usize];
            live << size.shift(self.config.granule_shift)
        };
        DomainStats {
            iotlb: self.iotlb.as_ref().map(Iotlb::stats).unwrap_or_default(),
            leaves_mapped,
            leaves_unmapped,
            violations: self.violations.load(Ordering::Relaxed),
            queue: self.queue.stats(),
            faults: self.faults.total(),
            stale_hits: self.stale_hits.load(Ordering::Relaxed),
            mapped_bytes: LeafSize::ALL.into_iter().map(bytes).sum(),
            tables: self.table.table_count(),
        }
    }
}

#[inline]
fn count(counters: &[AtomicU64; 3], counts: LeafCounts) {
    for (counter, count) in counters.iter().zip(counts) {
        if count > 0 {
            counter.fetch_add(count, Ordering::Release);
        }
    }
}

fn counts(counters: &[AtomicU64; 3]) -> LeafCounts {
    std::array::from_fn(|size| counters[size].load(Ordering::Acquire))
}

/// Why `leaf` does not allow `access`.
fn refusal(leaf: Leaf, access: DmaAccess) -> Option<IommuFault> {
    let prot = leaf.prot();
    let (read, write) = match access {
        DmaAccess::Read => (true, false),
        DmaAccess::Write => (false, true),
        DmaAccess::Atomic => (true, true),
    };
    if !leaf.is_live() {
        Some(IommuFault::NotPresent)
    } else if read && !prot.contains(Prot::READ) {
        Some(IommuFault::NoRead)
    } else if write && !prot.contains(Prot::WRITE) {
        Some(IommuFault::NoWrite)
    } else {
        None
    }
}

impl std::fmt::Debug for Domain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Domain").field("config", &self.config).field("stats", &self.stats()).finish()
    }
}

#[cfg(test)]
mod tests;
