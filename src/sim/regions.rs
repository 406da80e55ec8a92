//! Regions are registered, advised and deregistered, one step at a time.

use super::Broken;
use super::world::{Place, Slot, World};
use hw_model::addr::{PAGE_SIZE, RegionAddr, VirtAddr, VirtRange};
use hw_model::hca::{Access as Rights, Sge};
use mr::device::RegisterError;
use mr::{Flush, MapRegionError, ProtectionDomain, Region, RegisterOptions, Teardown};
use odp::fault::{Progress, Want};
use odp::space::{Access, WatchError};

/// Regions of one device, those on their way in and out too.
const MOST_REGIONS: usize = 5;
/// Pages of a region, unless it takes in huge pages.
const MOST_PAGES: u64 = 40;

impl Place {
    pub(super) fn range(&self) -> VirtRange {
        VirtRange::new(self.at, self.len).expect("a range of user memory")
    }
}

impl World {
    fn regions_of(&self, device: usize) -> usize {
        let places = self.regions.iter().map(|slot| slot.place);
        let places = places.chain(self.registrations.iter().map(|(place, _)| *place));
        places
            .chain(self.teardowns.iter().map(|(place, _)| *place))
            .filter(|place| place.device == device)
            .count()
    }

    pub(super) fn begin_registration(&mut self) -> Result<(), Broken> {
        if self.choices.chance(60) {
            self.begin_implicit();
            return Ok(());
        }
        let device = self.choices.below(self.devices.len() as u32) as usize;
        let host = self.devices[device].host;
        if self.regions_of(device) >= MOST_REGIONS {
            return Ok(());
        }
        let process = match self.choices.chance(200) {
            true => Some(self.exported(host)),
            false => self.some_process(Some(host)),
        };
        let Some(process) = process else { return Ok(()) };
        let in_huge = self.choices.chance(200).then(|| self.some_hugetlb_page(process)).flatten();
        let Some(page) = in_huge.or_else(|| self.some_page(process)) else { return Ok(()) };
        let mut most = if self.choices.chance(100) { 600 } else { MOST_PAGES };
        most = self.choices.between(1, most);
        // Up to the first page that is not mapped, or, rarely, beyond it: that is refused.
        let mapped =
            (page..page + most).take_while(|page| self.memory.is_mapped(process, *page)).count() as u64;
        let pages = if self.choices.chance(30) { most } else { mapped.max(1) };
        let (skip, cut) = if self.choices.chance(300) {
            (u64::from(self.choices.below(4095)), u64::from(self.choices.below(4095)))
        } else {
            (0, 0)
        };
        let len = (pages * PAGE_SIZE).saturating_sub(skip + cut).max(1);
        let at = VirtAddr::from_page_number(page).offset(skip);
        let mut options = self.some_options();
        // Elsewhere it is refused.
        if self.choices.chance(if in_huge.is_some() { 700 } else { 10 }) {
            options = options.with_hugetlb();
        }
        let place = Place { device, process, at, len, huge: options.hugetlb };
        let Some(memory) = self.user_range(&place) else { return Ok(()) };
        let begun = self.devices[device].pd.begin_register(&memory, options);
        self.note(|| format!("register {place:?} {options:?}: {:?}", begun.as_ref().map(|_| ())));
        match begun {
            Ok(_) if place.huge && !self.is_all_hugetlb(process, place.kept()) => {
                let detail = format!("{place:?} is not hugetlb throughout, and was taken for it");
                return Err(Broken { rule: "registration", detail });
            }
            Ok(registration) => self.registrations.push((place, registration)),
            Err(error) => self.refused_registration(&place, &error)?,
        }
        Ok(())
    }

    fn some_options(&mut self) -> RegisterOptions {
        let options =
            if self.choices.chance(250) { RegisterOptions::pinned() } else { RegisterOptions::on_demand() };
        let access = self.some_rights();
        let address = self.choices.chance(200).then_some(RegionAddr(0));
        RegisterOptions { access, address, ..options }
    }

    pub(super) fn some_rights(&mut self) -> Rights {
        let all = Rights::LOCAL_WRITE
            | Rights::REMOTE_WRITE
            | Rights::REMOTE_READ
            | Rights::REMOTE_ATOMIC
            | Rights::WINDOW_BIND
            | Rights::FLUSH_GLOBAL;
        self.choices.of(&[all, all, all, Rights::REMOTE_READ, Rights::LOCAL_WRITE])
    }

    fn refused_registration(&mut self, place: &Place, error: &RegisterError) -> Result<(), Broken> {
        self.counts.one("registrations that failed");
        if let RegisterError::Map(MapRegionError::Watch(WatchError::NotMapped { at, .. })) = error
            && self.memory.is_mapped(place.process, at.page_number())
        {
            let detail = format!("{error} for {place:?}, but it is mapped");
            return Err(Broken { rule: "registration", detail });
        }
        if let RegisterError::Map(MapRegionError::NotHuge { .. }) = error {
            self.counts.one("registrations of what is not hugetlb");
            if self.is_all_hugetlb(place.process, place.kept()) {
                let detail = format!("{error} for {place:?}, but it is hugetlb");
                return Err(Broken { rule: "registration", detail });
            }
        }
        Ok(())
    }

    pub(super) fn step_some_registration(&mut self) -> Result<(), Broken> {
        match self.choices.index(self.registrations.len()) {
            Some(index) => self.step_registration(index).map(drop),
            None => Ok(()),
        }
    }

    /// Whether it did something.
    pub(super) fn step_registration(&mut self, index: usize) -> Result<bool, Broken> {
        match self.registrations[index].1.poll() {
            Progress::Blocked => Ok(false),
            Progress::Again => Ok(true),
            Progress::Done(outcome) => {
                let (place, registration) = self.registrations.swap_remove(index);
                drop(registration);
                self.note(|| {
                    format!("registered {place:?}: {:?}", outcome.as_ref().map(|region| region.key()))
                });
                match outcome {
                    Ok(region) => {
                        self.counts.one("regions registered");
                        self.counts.add("regions in hugetlb pages", u64::from(place.huge));
                        self.regions.push(Slot { place, region });
                    }
                    Err(error) => self.refused_registration(&place, &error)?,
                }
                Ok(true)
            }
        }
    }

    pub(super) fn begin_deregistration(&mut self) {
        if self.choices.chance(250) {
            return self.deregister_some_implicit();
        }
        if let Some(index) = self.choices.index(self.regions.len()) {
            self.deregister(index);
        }
    }

    pub(super) fn deregister(&mut self, index: usize) {
        let Slot { place, region } = self.regions.swap_remove(index);
        let key = region.key();
        self.note(|| format!("deregister {place:?} {key:?}"));
        self.counts.one("regions deregistered");
        self.disturbances += 1;
        // Requests that name it may find it gone.
        self.excuse_key(key);
        self.lose_aliases_of(key);
        let Some(teardown) = region.begin_deregister() else { return };
        let counters = region.counters();
        self.counts.add("invalidations of regions", counters.page_invalidations);
        self.counts.add("pages invalidated", counters.pages_invalidated);
        self.counts.add("entries published", counters.entries_published);
        self.counts.add("entries relinked", counters.entries_relinked);
        if place.huge {
            self.counts.add("huge entries published", counters.entries_published);
            self.counts.add("huge entries relinked", counters.entries_relinked);
        }
        self.counts.add("type changes", counters.entries_changed_kind);
        self.counts.add("faults that lost a race", counters.fault_retries);
        self.dead_keys.push((place.device, key, region.address().0));
        self.teardowns.push((place, teardown));
    }

    pub(super) fn step_some_teardown(&mut self) -> Result<(), Broken> {
        if self.teardowns.is_empty() || self.choices.chance(200) {
            self.step_some_leaving();
            self.reclaim_some();
            return Ok(());
        }
        if let Some(index) = self.choices.index(self.teardowns.len()) {
            self.step_teardown(index);
        }
        Ok(())
    }

    /// Whether it is done.
    pub(super) fn step_teardown(&mut self, index: usize) -> bool {
        let done = Teardown::poll(&mut self.teardowns[index].1);
        if done {
            let (place, teardown) = self.teardowns.swap_remove(index);
            drop(teardown);
            self.note(|| format!("gone: {place:?}"));
        } else {
            self.counts.one("teardowns that waited for a burst");
        }
        done
    }

    pub(super) fn begin_advice(&mut self) {
        if self.choices.chance(200) {
            return self.advise_some_implicit();
        }
        let Some(index) = self.choices.index(self.regions.len()) else { return };
        let Slot { place, .. } = self.regions[index];
        let offset = self.choices.between(0, place.len - 1);
        let len = 1 + self.choices.between(0, (place.len - offset - 1).min(20 * PAGE_SIZE));
        let want = self.choices.of(&[Want::Fault(Access::Read), Want::Fault(Access::Write), Want::Snapshot]);
        if self.choices.chance(300) {
            return self.advise_by_key(index, offset, len, want);
        }
        let advice = self.regions[index].region.begin_advise(offset, len, want);
        self.note(|| format!("advise {want:?} {len} at {offset} of {place:?}: {}", advice.is_ok()));
        match advice {
            Ok(advice) => {
                self.counts.one("advice");
                self.advices.push((place, advice));
            }
            Err(_) => self.counts.one("advice that was refused"),
        }
    }

    /// Advice about a piece by its key, which nobody waits for.
    fn advise_by_key(&mut self, index: usize, offset: u64, len: u64, want: Want) {
        let Slot { place, region } = &self.regions[index];
        let address = region.address().offset(offset);
        let piece = Sge { key: region.key(), address, length: len as u32 };
        let advised = self.devices[place.device].pd.advise(want, Flush::No, &[piece]);
        self.note(|| format!("advise {want:?} {piece:?}: {advised:?}"));
        self.counts.one(if advised.is_ok() { "advice by key" } else { "advice that was refused" });
    }

    pub(super) fn step_some_advice(&mut self) -> Result<(), Broken> {
        if let Some(index) = self.choices.index(self.advices.len()) {
            self.step_advice(index);
        }
        Ok(())
    }

    /// Whether it did something.
    pub(super) fn step_advice(&mut self, index: usize) -> bool {
        match self.advices[index].1.poll() {
            Ok(Progress::Blocked) => false,
            Ok(Progress::Again) => true,
            Ok(Progress::Done(())) => {
                drop(self.advices.swap_remove(index));
                true
            }
            Err(error) => {
                drop(self.advices.swap_remove(index));
                self.note(|| format!("advice failed: {error}"));
                self.counts.one("advice that failed");
                true
            }
        }
    }
}
