//! What must be true of a region and its surroundings, as functions that say what is not.

use anypage::machine::Machine;
use hw_model::addr::{Iova, PAGE_SIZE, PhysAddr, VirtRange, page_bytes};
use hw_model::hca::{Entry, LiveObjects, Path};
use hw_model::iommu::{Domain, Prot};
use hw_model::sync::Arc;
use mr::Region;
use mr::device::model::ModelDevice;
use odp::page::{Backing, PageRun};
use odp::space::process::ProcessSpace;
use odp::space::{AddressSpace, UserRange};
use std::time::{Duration, Instant};

/// Longer than anything takes that ends at all.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// What a check says: what is wrong, if anything.
pub type Verdict = Result<(), String>;

/// A region, its IO page table and its memory, looked at together while nothing changes.
pub struct View {
    /// `None` without an IOMMU.
    pub linked_at: Option<(Arc<Domain>, Iova)>,
    pub entries: Vec<Entry>,
    /// What the region says of itself.
    pub present: u64,
    pub linked: u64,
    /// What the address space says now, by page of the region. `None`: not present.
    pub memory: Vec<Option<PageRun>>,
}

impl View {
    pub fn of(device: &ModelDevice, region: &dyn Region, memory: &UserRange) -> Self {
        let report = region.report();
        let entries = region.raw_entries().expect("the model shows its list");
        let linked_at = device.dma().domain().map(|domain| {
            (Arc::clone(domain), device.region_iova(region.key()).expect("a region behind an IOMMU has IOVA"))
        });
        Self {
            linked_at,
            entries: entries.into_iter().map(Entry::from_bits).collect(),
            present: report.present,
            linked: report.linked,
            memory: pages_of(&**memory.space(), memory.range().page_aligned()),
        }
    }

    fn slot(&self, index: usize) -> Option<(Iova, Option<(PhysAddr, Prot)>)> {
        let (domain, base) = self.linked_at.as_ref()?;
        let slot = base.offset(page_bytes(index as u64));
        Some((slot, domain.lookup(slot)))
    }

    /// Invariants 1, 7 and 10: an entry that the HCA can see is linked at its own slot to its own page, or its path needs no
    /// link and then the slot is a hole; so is the slot of every other entry.
    pub fn links(&self) -> Verdict {
        for (index, entry) in self.entries.iter().enumerate() {
            let slot = self.slot(index);
            let mapped = slot.and_then(|(_, mapped)| mapped);
            let says = |what: &str| Err(format!("page {index}: {what}; {entry:?}, slot {slot:?}"));
            if !entry.is_valid() {
                if entry.is_linked() {
                    return says("hidden, but still linked");
                }
                if mapped.is_some() {
                    return says("not present, but its slot leads somewhere");
                }
                continue;
            }
            if entry.path().is_linked() {
                let Some((iova, _)) = slot else { return says("a linked path without an IOMMU") };
                let Some((phys, prot)) = mapped else { return says("visible, but not linked") };
                if entry.address() != iova.to_dma() {
                    return says("visible at another page's slot");
                }
                if !entry.is_linked() || prot != Prot::READ | Prot::WRITE {
                    return says("linked in another way than it says");
                }
                if self.page(index).is_some_and(|page| page != phys) {
                    return says("linked to memory that is not its page");
                }
            } else {
                if mapped.is_some() || entry.is_linked() {
                    return says("its path needs no link, but its slot is taken");
                }
                let direct = self.page(index).map(PhysAddr::to_dma_identity);
                if entry.path() == Path::Direct && direct.is_some_and(|page| page != entry.address()) {
                    return says("leads to memory that is not its page");
                }
            }
        }
        Ok(())
    }

    fn page(&self, index: usize) -> Option<PhysAddr> {
        self.memory[index].map(|page| page.phys)
    }

    /// Invariant 9: the counts are those of the entries and of the IO page table.
    pub fn counts(&self) -> Verdict {
        let present = self.entries.iter().filter(|entry| entry.is_valid()).count() as u64;
        let noted = self.entries.iter().filter(|entry| entry.is_linked()).count() as u64;
        let mapped =
            (0..self.entries.len()).filter(|index| self.slot(*index).is_some_and(|(_, to)| to.is_some()));
        let mapped = mapped.count() as u64;
        if (present, noted, mapped) == (self.present, self.linked, self.linked) {
            return Ok(());
        }
        let Self { present: said, linked, .. } = self;
        Err(format!(
            "{said} present and {linked} linked by its own count; {present} visible, {noted} noted as linked, {mapped} mapped"
        ))
    }

    /// Invariant 6: kind, permission and place are those of the page that is there. Huge pages split and merge without a
    /// word to this process, so the two kinds of anonymous page count as one.
    pub fn as_reported(&self) -> Verdict {
        let plain = |backing| if backing == Backing::TransparentHuge { Backing::Anonymous } else { backing };
        for (index, entry) in self.entries.iter().enumerate().filter(|(_, entry)| entry.is_valid()) {
            let Some(page) = self.memory[index] else {
                return Err(format!("page {index} is not there: {entry:?}"));
            };
            if plain(entry.backing()) != plain(page.backing) || (entry.is_writable() && !page.writable) {
                return Err(format!("page {index} is {page:?}, its entry says {entry:?}"));
            }
        }
        Ok(())
    }

    /// All of them.
    pub fn check(&self) -> Verdict {
        self.links()?;
        self.counts()?;
        self.as_reported()
    }
}

/// What `space` has of each page of `range`.
pub fn pages_of(space: &dyn AddressSpace, range: VirtRange) -> Vec<Option<PageRun>> {
    let mut runs = Vec::new();
    space.snapshot(range, &mut runs).expect("mapped");
    let mut pages = vec![None; (range.len() / PAGE_SIZE) as usize];
    for run in runs {
        for page in 0..run.pages {
            let (start, phys) = (run.start.offset(page_bytes(page)), run.phys.offset(page_bytes(page)));
            pages[((start.0 - range.start().0) / PAGE_SIZE) as usize] =
                Some(PageRun { start, phys, pages: 1, ..run });
        }
    }
    pages
}

/// Everything that can leak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    near: DeviceCounts,
    far: DeviceCounts,
    intervals: u64,
    invalidations_running: u64,
    watches: u64,
    engines: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct DeviceCounts {
    iova_ranges: u64,
    iova_bytes: u64,
    mapped_bytes: u64,
    objects: LiveObjects,
}

impl DeviceCounts {
    fn of(device: &ModelDevice) -> Self {
        let iova = device.dma().iova_stats();
        Self {
            iova_ranges: iova.live_ranges,
            iova_bytes: iova.live_bytes,
            mapped_bytes: device.dma().domain().map_or(0, |domain| domain.stats().mapped_bytes),
            objects: device.hca().live_objects(),
        }
    }
}

impl Counts {
    /// The counts of a space at rest: pages that were dropped a moment ago are unlinked by another thread, and an
    /// invalidation that still runs would be taken for the ordinary state. One that never ends shows in the counts.
    pub fn of(machine: &Machine, space: &ProcessSpace) -> Self {
        until(|| space.notifiers().stats().running == 0);
        let notifiers = space.notifiers().stats();
        Self {
            near: DeviceCounts::of(&machine.near),
            far: DeviceCounts::of(&machine.far),
            intervals: notifiers.intervals,
            invalidations_running: notifiers.running,
            watches: space.stats().watches,
            engines: space.memory().epoch().slot_count(),
        }
    }

    /// Whether the counts are these, now or as soon as what other threads are still doing has ended.
    pub fn are_back(&self, machine: &Machine, space: &ProcessSpace) -> Verdict {
        match within(PATIENCE, || Self::of(machine, space) == *self) {
            true => Ok(()),
            false => Err(format!("leaked: {self:?} before, {:?} after", Self::of(machine, space))),
        }
    }
}

/// Whether the IOMMUs and the memory saw nothing that a correct protocol never does.
pub fn protocol_kept(machine: &Machine, space: &ProcessSpace) -> Verdict {
    let retired = space.stats().retired_uses;
    if retired > 0 {
        return Err(format!("{retired} accesses through retired frames"));
    }
    for device in [&machine.near, &machine.far] {
        let refused = device.hca().stats().dma_refused;
        let domain = device.dma().domain();
        let broken = domain.map_or((0, 0), |domain| {
            let stats = domain.stats();
            (stats.violations, stats.faults)
        });
        if (refused, broken) != (0, (0, 0)) {
            let first = domain.and_then(|domain| domain.first_violation());
            return Err(format!(
                "{device:?}: {refused} DMAs refused, (violations, IOMMU faults) {broken:?}, the first violation {first:?}"
            ));
        }
    }
    Ok(())
}

/// Waits for `condition`; false if it does not come true in a time in which anything would.
pub fn until(condition: impl FnMut() -> bool) -> bool {
    within(PATIENCE, condition)
}

/// The same with another patience.
pub fn within(patience: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + patience;
    while !condition() {
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    true
}

/// Invariant 16: whether each of `posted` is among `ended` exactly once, and nothing else is.
pub fn ended_once(posted: &[u64], ended: &[u64]) -> Verdict {
    let sorted = |ids: &[u64]| {
        let mut ids = ids.to_vec();
        ids.sort_unstable();
        ids
    };
    if sorted(posted) == sorted(ended) { Ok(()) } else { Err(format!("posted {posted:?}, ended {ended:?}")) }
}
