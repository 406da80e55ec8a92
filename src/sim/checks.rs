//! What must hold after every step, and when everything is over.

use super::Broken;
use super::reregs::Changing;
use super::world::{Place, Slot, World};
use hw_model::addr::{PAGE_SIZE, PhysAddr, VirtAddr, VirtRange};
use hw_model::hca::{Entry, Path};
use mr::Region;
use odp::page::PageRun;
use odp::space::{AddressSpace, FaultError};
use std::collections::BTreeMap;

/// A region that is checked after every step, one at a time, has at most so many pages; larger ones are checked with
/// everything.
const SMALL: u64 = 64;

fn broken<T>(rule: &'static str, detail: String) -> Result<T, Broken> {
    Err(Broken { rule, detail })
}

/// What is present in `range`, by page: its frame, and whether it may be written.
fn present(space: &dyn AddressSpace, range: VirtRange) -> BTreeMap<u64, (PhysAddr, bool)> {
    let mut found = BTreeMap::new();
    let mut left = range;
    loop {
        let mut runs: Vec<PageRun> = Vec::new();
        let outcome = space.snapshot(left, &mut runs);
        for run in runs {
            for n in 0..run.pages {
                let frame = (run.phys.offset(n * PAGE_SIZE), run.writable);
                found.insert(run.start.page_number() + n, frame);
            }
        }
        // A walk ends at the first hole; what lies behind is looked at by another.
        let Err(FaultError::NoMapping { at }) = outcome else { return found };
        let next = at.page_start().offset(PAGE_SIZE);
        let Some(len) = left.end().0.checked_sub(next.0).filter(|len| *len > 0) else { return found };
        let Some(rest) = VirtRange::new(next, len) else { return found };
        left = rest;
    }
}

impl World {
    /// One region, in turn.
    pub(super) fn check_next(&mut self) -> Result<(), Broken> {
        self.checked += 1;
        match self.checked.checked_rem(self.regions.len()) {
            Some(index) if self.regions[index].place.kept().len() <= SMALL * PAGE_SIZE => {
                self.check_region(&self.regions[index])
            }
            _ => Ok(()),
        }
    }

    /// All regions, devices and processes.
    pub(super) fn check_everything(&mut self) -> Result<(), Broken> {
        self.regions.iter().try_for_each(|slot| self.check_region(slot))?;
        self.wholes.iter().try_for_each(|whole| self.check_implicit(whole))?;
        (0..self.devices.len()).try_for_each(|device| self.check_device(device))?;
        (0..self.devices.len()).try_for_each(|device| self.check_counts(device))?;
        (0..self.processes.len()).try_for_each(|process| self.check_intervals(process))
    }

    /// Every valid entry leads to the frame that the process has there now, with no more rights than it has (invariants 1
    /// and 6), and the counts are those of the entries (invariant 9).
    fn check_region(&self, slot: &Slot) -> Result<(), Broken> {
        let Slot { place, region } = slot;
        let words = region.raw_entries().unwrap_or_default();
        let (mut valid, mut linked) = (0, 0);
        let mut frames = None;
        let first = place.kept().start().page_number();
        for (index, word) in words.iter().enumerate() {
            let entry = Entry::from_bits(*word);
            linked += u64::from(entry.is_linked());
            if !entry.is_valid() {
                continue;
            }
            valid += 1;
            let frames = frames.get_or_insert_with(|| self.present(place));
            self.check_entry(place, entry, first + index as u64, frames)?;
        }
        let report = region.report();
        if (report.present, report.linked) != (valid, linked) {
            let detail = format!("{place:?}: {report:?}, but {valid} entries are valid and {linked} linked");
            return broken("invariant 9: counts are those of the entries", detail);
        }
        Ok(())
    }

    pub(super) fn present(&self, place: &Place) -> BTreeMap<u64, (PhysAddr, bool)> {
        let space = self.address_space(place.process);
        space.map_or_else(BTreeMap::new, |space| present(space, place.kept()))
    }

    pub(super) fn check_entry(
        &self,
        place: &Place,
        entry: Entry,
        page: u64,
        frames: &BTreeMap<u64, (PhysAddr, bool)>,
    ) -> Result<(), Broken> {
        let at = VirtAddr::from_page_number(page);
        let port = self.devices[place.device].device.hca().port();
        let leads_to = match entry.path() {
            Path::Iova | Path::HostBridge => {
                port.domain().and_then(|domain| domain.iova_to_phys(entry.address().to_iova()))
            }
            Path::Direct => Some(entry.address().to_phys_identity()),
            Path::BusAddress => {
                let bus = port.bus();
                let mut bars = (0..3).filter_map(|provider| bus.bar(hw_model::bus::ProviderId(provider)));
                bars.find_map(|bar| {
                    let offset = entry.address().0.checked_sub(bar.bus_base().0)?;
                    (offset < bar.size()).then(|| bar.base().offset(offset))
                })
            }
            Path::Bounce => None,
        };
        let Some((frame, writable)) = frames.get(&page) else {
            return broken(
                "invariant 6: entries are true",
                format!("{at} of {place:?}: {entry:?}, but no page is there"),
            );
        };
        if leads_to != Some(*frame) {
            let detail =
                format!("{at} of {place:?}: {entry:?} leads to {leads_to:?}, the page is at {frame}");
            return broken("invariant 6: entries are true", detail);
        }
        if entry.is_writable() && !writable {
            return broken(
                "invariant 6: entries are true",
                format!("{at} of {place:?}: {entry:?} may write, the program not"),
            );
        }
        Ok(())
    }

    /// Nothing that hardware counts as software's mistake.
    pub(super) fn check_device(&self, device: usize) -> Result<(), Broken> {
        let hca = self.devices[device].device.hca();
        let refused = hca.stats().dma_refused;
        if refused > 0 {
            let faults = hca.port().domain().map(|domain| format!("{:?}", domain.faults()));
            return broken(
                "DMA",
                format!("device {device}: the bus refused DMA {refused} times; {faults:?}"),
            );
        }
        let Some(domain) = hca.port().domain() else { return Ok(()) };
        let stats = domain.stats();
        if stats.stale_hits > 0 {
            return broken(
                "IOTLB",
                format!("device {device} used {} translations that were unmapped", stats.stale_hits),
            );
        }
        if stats.violations + stats.faults > 0 {
            return broken("IOMMU", format!("device {device}: {stats:?}"));
        }
        Ok(())
    }

    /// Keys, IOVA ranges and linked bytes are those of the regions there are.
    fn check_counts(&self, device: usize) -> Result<(), Broken> {
        let dev = &self.devices[device];
        let of = |place: &Place| place.device == device;
        let regions = self.regions.iter().filter(|slot| of(&slot.place)).count() as u64;
        let coming = self.registrations.iter().filter(|(place, _)| of(place)).count() as u64;
        let going = self.teardowns.iter().filter(|(place, _)| of(place)).count() as u64;
        let wholes = self.wholes.iter().filter(|whole| whole.device == device);
        // A part that has been taken away has lost its key.
        let keys = regions + wholes.map(|whole| 1 + whole.region.report().children).sum::<u64>();
        let (live, aliases) = (dev.device.hca().live_objects(), self.aliases_of(device));
        if live.keys != keys + aliases {
            let detail =
                format!("device {device}: {live:?}, {keys} of regions and their parts, {aliases} of windows");
            return broken("keys", detail);
        }
        let Some(domain) = dev.device.dma().domain() else { return Ok(()) };
        let iova = dev.device.dma().iova_stats();
        let beside = self.reregs.iter().filter_map(Changing::beside).filter(|place| of(place)).count() as u64;
        let parts = self.parts_of(device);
        if iova.live_ranges != regions + coming + going + beside + parts {
            let detail = format!(
                "device {device}: {iova:?}; regions: {regions}, {coming} coming, {going} going, {beside} beside, {parts} parts"
            );
            return broken("IOVA", detail);
        }
        let leaving = self.leaving.iter().filter(|leaving| leaving.device == device).count() as u64;
        let wholes = || self.wholes.iter().filter(|whole| whole.device == device);
        let taken: u64 = wholes().map(|whole| whole.region.children_going()).sum();
        if coming + going + beside + leaving + taken == 0 {
            let of_parts: u64 = wholes().map(|whole| whole.region.report().linked).sum();
            let linked: u64 = self
                .regions
                .iter()
                .filter(|slot| of(&slot.place))
                .map(|slot| slot.region.report().linked)
                .sum::<u64>()
                + of_parts;
            let mapped = domain.stats().mapped_bytes;
            if mapped != linked * PAGE_SIZE {
                return broken(
                    "links",
                    format!("device {device}: {mapped:#x} bytes mapped, {linked} pages linked"),
                );
            }
        }
        Ok(())
    }

    fn check_intervals(&self, process: usize) -> Result<(), Broken> {
        let of = |place: &Place| place.process == process;
        let regions = self.regions.iter().filter(|slot| of(&slot.place)).count();
        let coming = self.registrations.iter().filter(|(place, _)| of(place)).count();
        let going = self.teardowns.iter().filter(|(place, _)| of(place)).count();
        let beside = self.reregs.iter().filter_map(Changing::beside).filter(|place| of(place)).count();
        let parts = self.parts_in(process);
        let Some(space) = self.address_space(process) else { return Ok(()) };
        let stats = space.notifiers().stats();
        if stats.intervals != (regions + coming + going + beside) as u64 + parts {
            let detail =
                format!("process {process}: {stats:?}; regions: {regions}, {coming} coming, {going} going");
            return broken("notifiers", detail);
        }
        Ok(())
    }
}
