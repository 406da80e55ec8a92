//! Pages that go elsewhere and stay the same: to other frames, to a device's memory and back, into one device's sole use
//! (mm/migrate.c, mm/migrate_device.c, `make_device_exclusive` in mm/rmap.c).

use super::fault::{Stop, Touch};
use super::kernel::{Kernel, MmId, NoFrame, Place};
use super::op::{Applied, SimError};
use super::span::{HUGE_PAGES, Span};
use super::store::{DeviceKind, DeviceMemoryId};
use super::vma::{Encryption, Protection, Source, Vma};
use crate::space::Access;
use hw_model::bus::ProviderId;

impl Kernel {
    /// The whole of each huge page, or the single pages, that `span` touches: what is moved as one.
    fn units(&self, id: MmId, span: Span) -> Vec<Span> {
        let Some(mm) = self.mm(id) else { return Vec::new() };
        let mut units: Vec<Span> = Vec::new();
        for (page, _) in mm.entries(mm.huge_cover(span)) {
            let unit = if mm.is_huge(page) { Span::huge(page) } else { Span::page(page) };
            if units.last() != Some(&unit) {
                units.push(unit);
            }
        }
        units
    }

    /// Moves what is in RAM to other frames, of `node` if one is named.
    pub(super) fn migrate(&mut self, id: MmId, span: Span, node: Option<u32>) -> Result<Applied, SimError> {
        if node.is_some_and(|node| node >= self.frames.nodes()) {
            return Err(SimError::Gone);
        }
        let mut moved = 0;
        let mut full = false;
        for unit in self.units(id, span) {
            let Some(pte) = self.pte(id, unit.first) else { continue };
            // An exporter's pages, pinned and lent ones stay; so do those that are not in RAM.
            let exported =
                self.cached(pte.place).is_some_and(|(object, _)| self.objects[&object].is_dmabuf());
            let Place::Ram(old) = pte.place else { continue };
            let there = node == Some(self.frames.node(old));
            let pinned =
                unit.pages().any(|page| self.pte(id, page).is_some_and(|pte| self.is_pinned(pte.place)));
            if exported || there || pinned || pte.exclusive.is_some() {
                continue;
            }
            let huge = unit.len() == HUGE_PAGES;
            let to = if huge { self.take_huge_of(node) } else { self.take_frame_of(node).map(frame_number) };
            let Ok(to) = to else {
                full = true;
                break;
            };
            if !huge {
                // Somebody else may map this frame as part of a huge page.
                for (mm, page) in self.mappers(pte.place) {
                    self.mm_mut(mm).split(Span::page(page));
                }
            }
            for n in 0..unit.len() as u32 {
                self.move_page(Place::Ram(old + n), Place::Ram(to + n));
            }
            moved += unit.len();
        }
        if full && moved == 0 { Err(SimError::OutOfMemory) } else { Ok(Applied::pages(moved)) }
    }

    /// Anonymous pages of `span` go to `memory`, as many as there is room for.
    pub(super) fn migrate_to_device(
        &mut self,
        id: MmId,
        span: Span,
        memory: DeviceMemoryId,
    ) -> Result<Applied, SimError> {
        if !self.device_free.contains_key(&memory) {
            return Err(SimError::Gone);
        }
        let plain = |vma: &&Vma| {
            let reachable = vma.protection != Protection::None;
            vma.source == Source::Anonymous && vma.encryption == Encryption::Plain && reachable
        };
        let mm = self.mm(id).ok_or(SimError::Gone)?;
        let vmas: Vec<Vma> = mm.vmas.overlapping(span).filter(plain).copied().collect();
        let mut moved = 0;
        for vma in vmas {
            let Some(part) = vma.span.intersection(span) else { continue };
            let mut page = part.first;
            while page < part.end {
                let whole = Span::huge(page);
                if whole.first == page
                    && part.contains(whole)
                    && self.whole_to_device(id, &vma, whole, memory)
                {
                    moved += HUGE_PAGES;
                    page = whole.end;
                    continue;
                }
                match self.page_to_device(id, &vma, page, memory) {
                    Ok(done) => moved += u64::from(done),
                    Err(NoFrame) => return Ok(Applied::pages(moved)),
                }
                page += 1;
            }
        }
        Ok(Applied::pages(moved))
    }

    /// Moves a huge page, or one that was never written, as one; whether that could be.
    fn whole_to_device(&mut self, id: MmId, vma: &Vma, whole: Span, memory: DeviceMemoryId) -> bool {
        let Some(mm) = self.mm(id) else { return false };
        let entries = mm.entries(whole);
        let moves = if mm.is_huge(whole.first) {
            entries.iter().all(|(_, pte)| pte.exclusive.is_none() && self.is_own(pte.place))
        } else {
            vma.huge && entries.iter().all(|(_, pte)| pte.place == Place::Zero)
        };
        if !moves {
            return false;
        }
        let Ok(first) = self.take_huge_device(memory) else { return false };
        self.move_whole(id, whole, vma, |n| Place::Device { memory, page: first + n });
        true
    }

    /// Puts the pages of `whole` where `to` says, which the caller took, and maps them as one huge page.
    pub(super) fn move_whole(&mut self, id: MmId, whole: Span, vma: &Vma, to: impl Fn(u32) -> Place) {
        for (n, page) in (0..).zip(whole.pages()) {
            let (pte, to) = (self.pte(id, page), to(n));
            match pte {
                Some(pte) if pte.place != Place::Zero => self.store.copy(pte.place, to),
                _ => self.store.zero(to),
            }
            let write = vma.protection.allows(Access::Write);
            self.relink(
                id,
                page,
                to,
                pte.filter(|pte| pte.place != Place::Zero).map_or(write, |pte| pte.write),
            );
        }
        self.mm_mut(id).huge.insert(whole.first);
    }

    /// Whether `page` was moved.
    fn page_to_device(
        &mut self,
        id: MmId,
        vma: &Vma,
        page: u64,
        memory: DeviceMemoryId,
    ) -> Result<bool, NoFrame> {
        let write = vma.protection.allows(Access::Write);
        match self.pte(id, page) {
            Some(pte) if pte.place != Place::Zero => {
                if pte.exclusive.is_some() || !self.is_own(pte.place) {
                    return Ok(false);
                }
                let to = self.take_device(memory)?;
                self.store.copy(pte.place, to);
                self.relink(id, page, to, pte.write);
            }
            _ => {
                let to = self.take_device(memory)?;
                self.store.zero(to);
                self.relink(id, page, to, write);
            }
        }
        Ok(true)
    }

    /// Whether `place` is a frame that one entry alone holds, and nobody holds where it is.
    fn is_own(&self, place: Place) -> bool {
        matches!(place, Place::Ram(_)) && self.is_sole(place) && !self.is_pinned(place)
    }

    pub(super) fn migrate_from_device(&mut self, id: MmId, span: Span) -> Result<Applied, SimError> {
        self.mm(id).ok_or(SimError::Gone)?;
        let mut moved = 0;
        for unit in self.units(id, span) {
            let Some(pte) = self.pte(id, unit.first) else { continue };
            let Place::Device { memory, .. } = pte.place else { continue };
            if self.store.device(memory).kind() == DeviceKind::Peer {
                continue;
            }
            if span.contains(unit) && self.whole_from_device(id, unit) {
                moved += unit.len();
                continue;
            }
            for page in unit.intersection(span).into_iter().flat_map(Span::pages) {
                let Some(pte) = self.pte(id, page) else { continue };
                let Ok(to) = self.take_frame() else {
                    return if moved == 0 { Err(SimError::OutOfMemory) } else { Ok(Applied::pages(moved)) };
                };
                self.store.copy(pte.place, to);
                let write = pte.write && self.is_sole(pte.place);
                self.relink(id, page, to, write);
                moved += 1;
            }
        }
        Ok(Applied::pages(moved))
    }

    /// Brings a huge page of a device back as one; whether that could be.
    pub(super) fn whole_from_device(&mut self, id: MmId, unit: Span) -> bool {
        let Some(vma) = self.vma(id, unit.first) else { return false };
        let Some(mm) = self.mm(id) else { return false };
        let sole = mm.entries(unit).iter().all(|(_, pte)| self.is_sole(pte.place));
        if unit.len() != HUGE_PAGES || !mm.is_huge(unit.first) || !sole {
            return false;
        }
        let Ok(first) = self.take_huge() else { return false };
        self.move_whole(id, unit, &vma, |n| Place::Ram(first + n));
        true
    }

    /// Every mapping of a page of a device memory, whole huge pages.
    pub(super) fn mappers_of_device(&self, memory: DeviceMemoryId) -> Vec<(MmId, Span)> {
        self.in_device(memory).into_iter().flat_map(|place| self.mapper_covers(place)).collect()
    }

    fn in_device(&self, memory: DeviceMemoryId) -> Vec<Place> {
        let first = Place::Device { memory, page: 0 };
        let last = Place::Device { memory, page: u32::MAX };
        self.holders.range(first..=last).map(|(place, _)| *place).collect()
    }

    /// What is in a device memory, which is no exporter's, comes back to RAM for everybody who holds it.
    pub(super) fn evict_device(&mut self, memory: DeviceMemoryId) -> Result<Applied, SimError> {
        if !self.device_free.contains_key(&memory) {
            return Err(SimError::Gone);
        }
        let places = self.in_device(memory);
        if self.frames.free() < places.len() as u64 {
            return Err(SimError::OutOfMemory);
        }
        for place in &places {
            let to = self.take_frame().map_err(|NoFrame| SimError::OutOfMemory)?;
            for (mm, page) in self.mappers(*place) {
                self.mm_mut(mm).split(Span::page(page));
            }
            self.move_page(*place, to);
        }
        Ok(Applied::pages(places.len() as u64))
    }

    /// Lends pages to `owner`. What anonymous memory does not have yet it gets.
    pub(super) fn lend(&mut self, id: MmId, span: Span, owner: ProviderId) -> Result<Applied, SimError> {
        let mm = self.mm(id).ok_or(SimError::Gone)?;
        let vmas: Vec<Vma> = mm.vmas.overlapping(span).copied().collect();
        let touch = Touch { access: Access::Write, viewer: Some(owner), pin: false };
        let mut lent = 0;
        for vma in vmas {
            let Some(part) = vma.span.intersection(span) else { continue };
            for page in part.pages() {
                if vma.source == Source::Anonymous {
                    match self.fault_page(id, page, touch, true) {
                        Ok(()) => {}
                        Err(Stop::Failed(error)) if lent == 0 => return Err(error.into()),
                        Err(_) => return Ok(Applied::pages(lent)),
                    }
                }
                let Some(pte) = self.pte(id, page) else { continue };
                if matches!(pte.place, Place::Ram(_)) && self.is_sole(pte.place) {
                    let mm = self.mm_mut(id);
                    mm.split(Span::page(page));
                    mm.table.get_mut(&page).expect("it was just there").exclusive = Some(owner);
                    lent += 1;
                }
            }
        }
        Ok(Applied::pages(lent))
    }
}

/// The frame that `take_frame` gave.
fn frame_number(place: Place) -> u32 {
    match place {
        Place::Ram(frame) => frame,
        _ => unreachable!("frames are RAM"),
    }
}
