//! Implicit regions: all the memory of a process behind one key, whose parts come with the first fault and go when they are
//! empty.

use super::Broken;
use super::memory::Piece;
use super::traffic::Chosen;
use super::world::{Place, World};
use hw_model::addr::{PAGE_SIZE, RegionAddr, VirtAddr};
use hw_model::hca::{Access as Rights, Entry};
use hw_model::sync::Arc;
use mr::device::model::{ImplicitRegion, ImplicitTeardown};
use mr::{Region, RegisterOptions};
use odp::fault::Want;
use odp::space::{Access, AddressSpace, UserRange};

/// Implicit regions of one device.
const MOST: usize = 2;

/// An implicit region.
pub struct Whole {
    pub(super) device: usize,
    pub(super) process: usize,
    pub(super) region: Arc<ImplicitRegion>,
}

/// One on its way out.
pub struct Leaving {
    pub(super) device: usize,
    pub(super) process: usize,
    pub(super) teardown: ImplicitTeardown,
}

impl World {
    pub(super) fn begin_implicit(&mut self) {
        let device = self.choices.below(self.devices.len() as u32) as usize;
        let host = self.devices[device].host;
        let Some(process) = self.some_process(Some(host)) else { return };
        if self.wholes.iter().filter(|whole| whole.device == device).count() >= MOST {
            return;
        }
        let space = self.space(process);
        let memory = UserRange::simulated(space, space.addresses());
        let all = Rights::LOCAL_WRITE | Rights::REMOTE_WRITE | Rights::REMOTE_READ | Rights::REMOTE_ATOMIC;
        let options =
            RegisterOptions::implicit().with_access(all | Rights::FLUSH_GLOBAL | Rights::WINDOW_BIND);
        let made = self.devices[device].pd.register_implicit(&memory, options);
        self.note(|| {
            let key = made.as_ref().map(|region| region.key());
            format!("register all of process {process} for {device}: {key:?}")
        });
        match made {
            Ok(region) => {
                self.counts.one("implicit regions registered");
                self.wholes.push(Whole { device, process, region });
            }
            Err(_) => self.counts.one("registrations that failed"),
        }
    }

    /// Up to `len` bytes of the memory behind an implicit key, mostly as far as something is mapped.
    pub(super) fn some_implicit_part(&mut self, device: usize, len: u64) -> Option<Chosen> {
        let all: Vec<usize> =
            (0..self.wholes.len()).filter(|index| self.wholes[*index].device == device).collect();
        let Whole { process, region, .. } = &self.wholes[all[self.choices.index(all.len())?]];
        let (process, key, access) = (*process, region.key(), region.access());
        let page = self.some_page(process)?;
        let at = VirtAddr::from_page_number(page).offset(u64::from(self.choices.below(4096)));
        let mapped = (page..).take_while(|page| self.memory.is_mapped(process, *page)).take(8).count() as u64;
        let most = VirtAddr::from_page_number(page + mapped).0.saturating_sub(at.0).max(1);
        let len = if self.choices.chance(30) { len } else { len.min(most) };
        let piece = Piece { process, at, len: len as usize };
        Some(Chosen { key, address: RegionAddr(at.0), piece, access, through: None })
    }

    pub(super) fn advise_some_implicit(&mut self) {
        let Some(index) = self.choices.index(self.wholes.len()) else { return };
        let Whole { process, region, .. } = &self.wholes[index];
        let (process, region) = (*process, Arc::clone(region));
        let Some(page) = self.some_page(process) else { return };
        let want = self.choices.of(&[Want::Fault(Access::Read), Want::Fault(Access::Write), Want::Snapshot]);
        let pages = self.choices.between(1, 12);
        // Offsets of an implicit region count from its first address, which is 0.
        let advised = region.advise_later(page * PAGE_SIZE, pages * PAGE_SIZE, want);
        self.note(|| {
            format!("advise {want:?} of {pages} pages at {page:#x} of process {process}: {advised:?}")
        });
        self.counts.one("advice about implicit regions");
    }

    pub(super) fn deregister_some_implicit(&mut self) {
        if let Some(index) = self.choices.index(self.wholes.len()) {
            self.deregister_implicit(index);
        }
    }

    pub(super) fn deregister_implicit(&mut self, index: usize) {
        let Whole { device, process, region } = self.wholes.swap_remove(index);
        let key = region.key();
        self.note(|| format!("deregister all of process {process} for {device}: {key:?}"));
        self.counts.one("implicit regions deregistered");
        self.disturbances += 1;
        self.excuse_key(key);
        let Some(teardown) = region.begin_deregister() else { return };
        self.counts.add("parts of implicit regions made", region.children_made());
        self.counts.add("invalidations of implicit regions", region.counters().page_invalidations);
        self.dead_keys.push((device, key, self.processes[process].arena * PAGE_SIZE));
        self.leaving.push(Leaving { device, process, teardown });
    }

    pub(super) fn step_some_leaving(&mut self) {
        if let Some(index) = self.choices.index(self.leaving.len()) {
            self.step_leaving(index);
        }
    }

    /// Whether it is done.
    pub(super) fn step_leaving(&mut self, index: usize) -> bool {
        let done = self.leaving[index].teardown.poll();
        if done {
            drop(self.leaving.swap_remove(index));
        }
        done
    }

    /// Parts that have become empty are taken away.
    pub(super) fn reclaim_some(&mut self) {
        let device = self.choices.below(self.devices.len() as u32) as usize;
        let parts = |world: &Self| -> u64 {
            let of = world.wholes.iter().filter(|whole| whole.device == device);
            of.map(|whole| whole.region.report().children).sum()
        };
        let before = parts(self);
        let left = self.devices[device].device.reclaim();
        let taken = before - parts(self);
        self.counts.add("empty parts taken away", taken);
        if taken > 0 || left {
            self.note(|| format!("{taken} empty parts taken away at {device}, something left: {left}"));
        }
    }

    /// Parts that `device` has, those on their way out too.
    pub(super) fn parts_of(&self, device: usize) -> u64 {
        let whole = self.wholes.iter().filter(|whole| whole.device == device);
        let live = whole.map(|whole| whole.region.report().children + whole.region.children_going());
        let leaving = self.leaving.iter().filter(|leaving| leaving.device == device);
        live.sum::<u64>() + leaving.map(|leaving| leaving.teardown.left()).sum::<u64>()
    }

    /// The same of what lies in `process`.
    pub(super) fn parts_in(&self, process: usize) -> u64 {
        let whole = self.wholes.iter().filter(|whole| whole.process == process);
        let live = whole.map(|whole| whole.region.report().children + whole.region.children_going());
        let leaving = self.leaving.iter().filter(|leaving| leaving.process == process);
        live.sum::<u64>() + leaving.map(|leaving| leaving.teardown.left()).sum::<u64>()
    }

    /// As for every region: each entry leads to the page that is there, and the counts are those of the entries.
    pub(super) fn check_implicit(&self, whole: &Whole) -> Result<(), Broken> {
        let entries = whole.region.present_entries();
        let linked = entries.iter().filter(|(_, word)| Entry::from_bits(*word).is_linked()).count() as u64;
        let report = whole.region.report();
        // Hidden pages may still be linked, for as long as a burst lasts.
        if report.present != entries.len() as u64 || report.linked < linked {
            let detail = format!(
                "{report:?} of process {}, but {} entries are valid and {linked} of them linked",
                whole.process,
                entries.len()
            );
            return Err(Broken { rule: "invariant 9: counts are those of the entries", detail });
        }
        for run in entries.chunk_by(|one, next| one.0.offset(PAGE_SIZE) == next.0) {
            let (at, len) = (run[0].0, run.len() as u64 * PAGE_SIZE);
            let place = Place { device: whole.device, process: whole.process, at, len, huge: false };
            let frames = self.present(&place);
            for (at, word) in run {
                self.check_entry(&place, Entry::from_bits(*word), at.page_number(), &frames)?;
            }
        }
        Ok(())
    }
}
