//! What can be done to the memory of one process: which pages it takes away from whom, and how.

use super::kernel::{Kernel, Mm, MmId, NoFrame, Place};
use super::object_change::ObjectChange;
use super::op::{Applied, SimError};
use super::span::{HUGE_PAGES, Span};
use super::store::{DeviceKind, DeviceMemoryId};
use super::vma::{Encryption, MapRequest, Protection, Source, Vma};
use crate::space::Access;
use hw_model::addr::{VirtAddr, VirtRange};

/// One past the last page of user space: 47 bits of address.
const USER_END: u64 = 1 << 35;

/// A change of one process's memory. Ranges are whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpaceChange {
    /// mmap.
    Map(MapRequest),
    /// munmap.
    Unmap(VirtRange),
    /// mprotect.
    Protect(VirtRange, Protection),
    /// mremap to exactly `to`, replacing what is there. `from` lies in one mapping.
    Remap {
        /// The pages to move.
        from: VirtRange,
        /// Their new place.
        to: VirtAddr,
    },
    /// MADV_DONTNEED: what is private is lost, the rest merely unmapped.
    Discard(VirtRange),
    /// MADV_REMOVE: a hole in the shared objects mapped here.
    Remove(VirtRange),
    /// Maps huge pages by small ones; the frames stay.
    Split(VirtRange),
    /// MADV_COLLAPSE: whole huge pages of private anonymous memory become one frame each.
    Collapse(VirtRange),
    /// Other frames for what is in RAM, as compaction and NUMA balancing do.
    Migrate(VirtRange),
    /// Private and shared memory goes to swap.
    SwapOut(VirtRange),
    /// Anonymous pages that nobody shares go to a device's memory.
    ToDevice {
        /// The pages.
        range: VirtRange,
        /// Where to.
        memory: DeviceMemoryId,
    },
    /// And come back.
    FromDevice(VirtRange),
    /// Present pages are lent to some other device for its exclusive use, until they are touched.
    Exclusive(VirtRange),
    /// The memory of the page at this address fails: nobody can read it again.
    Poison(VirtAddr),
    /// Private anonymous memory of an encrypted guest becomes private or shared; what the guest sees stays.
    Encrypt(VirtRange, Encryption),
    /// fork.
    Fork,
}

/// Anything that takes pages away.
#[derive(Clone, Copy, Debug)]
pub(super) enum Change {
    Space(MmId, SpaceChange),
    Object(ObjectChange),
    /// A fault that has to replace a page.
    Resolve {
        mm: MmId,
        page: u64,
        access: Access,
    },
    /// The process ends.
    Exit(MmId),
}

/// The pages of `range`, if they are whole pages of user space.
fn span_of(range: VirtRange) -> Result<Span, SimError> {
    let span = Span::of(range);
    let whole = range.start().page_offset() == 0 && range == span.range();
    if range.is_empty() || !whole || span.end > USER_END {
        return Err(SimError::BadRange { range });
    }
    Ok(span)
}

impl Change {
    /// The pages that devices must let go of before the change, in every process, whole huge pages where it cuts some.
    pub fn affected(&self, kernel: &Kernel) -> Result<Vec<(MmId, Span)>, SimError> {
        let (id, change) = match *self {
            Self::Object(change) => return change.affected(kernel),
            Self::Resolve { mm, page, .. } => {
                let cover = kernel.mm(mm).ok_or(SimError::Gone)?.huge_cover(Span::page(page));
                return Ok(vec![(mm, cover)]);
            }
            Self::Exit(id) => {
                let mm = kernel.mm(id).ok_or(SimError::Gone)?;
                return Ok(hull(mm, |_| true).map(|span| (id, span)).into_iter().collect());
            }
            Self::Space(id, change) => (id, change),
        };
        let mm = kernel.mm(id).ok_or(SimError::Gone)?;
        let own = |range| Ok(vec![(id, mm.huge_cover(span_of(range)?))]);
        match change {
            SpaceChange::Map(request) => match request.at {
                Some(at) => own(request.range(at)?),
                None => Ok(Vec::new()),
            },
            SpaceChange::Unmap(range)
            | SpaceChange::Protect(range, _)
            | SpaceChange::Discard(range)
            | SpaceChange::Split(range)
            | SpaceChange::Collapse(range)
            | SpaceChange::ToDevice { range, .. }
            | SpaceChange::FromDevice(range)
            | SpaceChange::Exclusive(range)
            | SpaceChange::Encrypt(range, _) => own(range),
            SpaceChange::Remap { from, to } => {
                let target = VirtRange::new(to, from.len()).ok_or(SimError::BadRange { range: from })?;
                Ok([own(from)?, own(target)?].concat())
            }
            SpaceChange::Remove(range) => {
                let mut affected = Vec::new();
                for punch in kernel.punches(id, span_of(range)?)? {
                    affected.extend(punch.affected(kernel)?);
                }
                Ok(affected)
            }
            SpaceChange::Migrate(range) | SpaceChange::SwapOut(range) => {
                let span = mm.huge_cover(span_of(range)?);
                let mut affected = vec![(id, span)];
                for (_, pte) in mm.entries(span) {
                    affected.extend(kernel.mapper_covers(pte.place));
                }
                Ok(affected)
            }
            SpaceChange::Poison(at) => {
                let pte = kernel.pte(id, at.page_number()).ok_or(SimError::NotMapped { at })?;
                Ok(kernel.mapper_covers(pte.place))
            }
            SpaceChange::Fork => {
                Ok(hull(mm, Kernel::is_private).map(|span| (id, span)).into_iter().collect())
            }
        }
    }

    /// Makes the change. What [`Change::affected`] says now is invalidated.
    pub fn apply(&self, kernel: &mut Kernel) -> Result<Applied, SimError> {
        let (mm, change) = match *self {
            Self::Object(change) => return change.apply(kernel),
            Self::Resolve { mm, page, access } => {
                return match kernel.fault_page(mm, page, access, true) {
                    Ok(()) => Ok(Applied::pages(1)),
                    Err(super::fault::Stop::Failed(error)) => Err(SimError::Fault(error)),
                    Err(super::fault::Stop::Invalidate) => unreachable!("the page is invalidated"),
                };
            }
            Self::Exit(mm) => return kernel.exit(mm),
            Self::Space(mm, change) => (mm, change),
        };
        let span = span_of;
        match change {
            SpaceChange::Map(request) => kernel.map(mm, request),
            SpaceChange::Unmap(range) => kernel.unmap(mm, span(range)?),
            SpaceChange::Protect(range, protection) => kernel.protect(mm, span(range)?, protection),
            SpaceChange::Remap { from, to } => kernel.remap(mm, span(from)?, to),
            SpaceChange::Discard(range) => {
                let span = kernel.mapped(mm, span(range)?)?;
                Ok(Applied::pages(kernel.zap(mm, span)))
            }
            SpaceChange::Remove(range) => {
                let mut pages = 0;
                for punch in kernel.punches(mm, span(range)?)? {
                    pages += punch.apply(kernel)?.pages;
                }
                Ok(Applied::pages(pages))
            }
            SpaceChange::Split(range) => kernel.split(mm, span(range)?),
            SpaceChange::Collapse(range) => kernel.collapse(mm, span(range)?),
            SpaceChange::Migrate(range) => kernel.migrate(mm, span(range)?),
            SpaceChange::SwapOut(range) => kernel.swap_out(mm, span(range)?),
            SpaceChange::ToDevice { range, memory } => kernel.migrate_to_device(mm, span(range)?, memory),
            SpaceChange::FromDevice(range) => kernel.migrate_from_device(mm, span(range)?),
            SpaceChange::Exclusive(range) => kernel.lend(mm, span(range)?),
            SpaceChange::Poison(at) => kernel.poison(mm, at),
            SpaceChange::Encrypt(range, mode) => kernel.encrypt(mm, span(range)?, mode),
            SpaceChange::Fork => kernel.fork(mm),
        }
    }
}

/// The smallest span that holds every mapping that counts.
fn hull(mm: &Mm, counts: impl Fn(&Vma) -> bool) -> Option<Span> {
    mm.vmas.iter().filter(|vma| counts(vma)).map(|vma| vma.span).reduce(Span::hull)
}

impl MapRequest {
    /// Where it would be at `at`.
    pub(super) fn range(&self, at: VirtAddr) -> Result<VirtRange, SimError> {
        let bytes = hw_model::addr::page_bytes(self.pages.min(USER_END));
        VirtRange::new(at, bytes).ok_or(SimError::TooLong { at, pages: self.pages })
    }
}

/// Pages of user space.
pub(super) fn user_span() -> Span {
    // Page 0 stays unmapped, as mmap_min_addr has it.
    Span::new(16, USER_END)
}

impl Kernel {
    /// Every mapping of `place`, whole huge pages.
    pub fn mapper_covers(&self, place: Place) -> Vec<(MmId, Span)> {
        let mappers = self.mappers(place).into_iter();
        mappers.filter_map(|(id, page)| Some((id, self.mm(id)?.huge_cover(Span::page(page))))).collect()
    }

    /// `span`, if all of it is mapped and no hugetlb page is cut by it.
    pub fn mapped(&self, id: MmId, span: Span) -> Result<Span, SimError> {
        let mm = self.mm(id).ok_or(SimError::Gone)?;
        if let Some(hole) = mm.vmas.first_hole(span) {
            return Err(SimError::NotMapped { at: VirtAddr::from_page_number(hole) });
        }
        self.uncut(id, span)
    }

    /// `span`, if no hugetlb page is cut by it.
    pub fn uncut(&self, id: MmId, span: Span) -> Result<Span, SimError> {
        let mm = self.mm(id).ok_or(SimError::Gone)?;
        let cut = |vma: &Vma| {
            self.is_hugetlb(vma) && vma.span.intersection(span).is_some_and(|part| !part.is_huge_aligned())
        };
        if mm.vmas.overlapping(span).any(cut) {
            return Err(SimError::BadRange { range: span.range() });
        }
        Ok(span)
    }

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

    fn migrate(&mut self, id: MmId, span: Span) -> Result<Applied, SimError> {
        let mut moved = 0;
        let mut full = false;
        for unit in self.units(id, span) {
            let Some(pte) = self.pte(id, unit.first) else { continue };
            // An exporter's pages and lent pages stay; so do those that are not in RAM.
            let exported =
                self.cached(pte.place).is_some_and(|(object, _)| self.objects[&object].is_dmabuf());
            let Place::Ram(old) = pte.place else { continue };
            if exported || pte.exclusive {
                continue;
            }
            let huge = unit.len() == HUGE_PAGES;
            let to = if huge { self.take_huge() } else { self.take_frame().map(frame_number) };
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

    fn collapse(&mut self, id: MmId, span: Span) -> Result<Applied, SimError> {
        let span = self.mapped(id, span)?;
        if !span.is_huge_aligned() {
            return Err(SimError::BadRange { range: span.range() });
        }
        let mut collapsed = 0;
        let heads: Vec<u64> = span.pages().step_by(HUGE_PAGES as usize).collect();
        for head in heads {
            match self.collapse_one(id, head) {
                Ok(done) => collapsed += u64::from(done),
                Err(error) if collapsed == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(Applied::pages(collapsed))
    }

    /// Whether there was something to do.
    fn collapse_one(&mut self, id: MmId, head: u64) -> Result<bool, SimError> {
        let (whole, at) = (Span::huge(head), VirtAddr::from_page_number(head));
        let vma = self.vma(id, head).ok_or(SimError::NotMapped { at })?;
        let plain = vma.source == Source::Anonymous && vma.encryption == Encryption::Plain;
        let entries = self.mm_mut(id).entries(whole);
        let movable = |place| place == Place::Zero || matches!(place, Place::Ram(_)) && self.is_sole(place);
        let fits = plain && vma.span.contains(whole);
        if !fits || entries.iter().any(|(_, pte)| pte.exclusive || !movable(pte.place)) {
            return Err(SimError::WrongKind { at });
        }
        if self.mm(id).is_some_and(|mm| mm.is_huge(head)) {
            return Ok(false);
        }
        let to = self.take_huge().map_err(|NoFrame| SimError::OutOfMemory)?;
        for (n, page) in whole.pages().enumerate() {
            let place = Place::Ram(to + n as u32);
            match self.pte(id, page) {
                Some(pte) => self.store.copy(pte.place, place),
                None => self.store.zero(place),
            }
            self.relink(id, page, place, vma.protection.allows(Access::Write));
        }
        self.mm_mut(id).huge.insert(head);
        Ok(true)
    }

    fn split(&mut self, id: MmId, span: Span) -> Result<Applied, SimError> {
        let heads = self.mm(id).ok_or(SimError::Gone)?.heads(span);
        let hugetlb = |head: &u64| self.vma(id, *head).is_some_and(|vma| self.is_hugetlb(&vma));
        if let Some(head) = heads.iter().find(|head| hugetlb(head)) {
            return Err(SimError::WrongKind { at: VirtAddr::from_page_number(*head) });
        }
        Ok(Applied::pages(self.mm_mut(id).split(span)))
    }

    fn migrate_to_device(
        &mut self,
        id: MmId,
        span: Span,
        memory: DeviceMemoryId,
    ) -> Result<Applied, SimError> {
        if !self.device_free.contains_key(&memory) {
            return Err(SimError::Gone);
        }
        let mut moved = 0;
        for (page, pte) in self.mm(id).ok_or(SimError::Gone)?.entries(span) {
            let anonymous = self
                .vma(id, page)
                .is_some_and(|vma| vma.source == Source::Anonymous && vma.encryption == Encryption::Plain);
            if !anonymous || pte.exclusive || !matches!(pte.place, Place::Ram(_)) || !self.is_sole(pte.place)
            {
                continue;
            }
            let Ok(to) = self.take_device(memory) else { break };
            self.store.copy(pte.place, to);
            self.relink(id, page, to, pte.write);
            moved += 1;
        }
        Ok(Applied::pages(moved))
    }

    fn migrate_from_device(&mut self, id: MmId, span: Span) -> Result<Applied, SimError> {
        let mut moved = 0;
        for (page, pte) in self.mm(id).ok_or(SimError::Gone)?.entries(span) {
            let Place::Device { memory, .. } = pte.place else { continue };
            if self.store.device(memory).kind() == DeviceKind::Peer {
                continue;
            }
            let Ok(to) = self.take_frame() else {
                return if moved == 0 { Err(SimError::OutOfMemory) } else { Ok(Applied::pages(moved)) };
            };
            self.store.copy(pte.place, to);
            let write = pte.write && self.is_sole(pte.place);
            self.relink(id, page, to, write);
            moved += 1;
        }
        Ok(Applied::pages(moved))
    }

    fn lend(&mut self, id: MmId, span: Span) -> Result<Applied, SimError> {
        let entries = self.mm(id).ok_or(SimError::Gone)?.entries(span);
        let mut lent = 0;
        for (page, pte) in entries {
            if matches!(pte.place, Place::Ram(_)) && self.is_sole(pte.place) {
                let mm = self.mm_mut(id);
                mm.split(Span::page(page));
                mm.table.get_mut(&page).expect("it was just there").exclusive = true;
                lent += 1;
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
