//! What can be done to the memory of one process: which pages it takes away from whom, and how.

use super::fault::Touch;
use super::kernel::{Kernel, Mm, MmId, NoFrame, Place};
use super::object_change::ObjectChange;
use super::op::{Applied, SimError};
use super::span::{HUGE_PAGES, Span};
use super::store::DeviceMemoryId;
use super::vma::{Encryption, MapRequest, Protection, Source, Vma};
use crate::notifier::Event;
use crate::space::Access;
use hw_model::addr::{VirtAddr, VirtRange};
use hw_model::bus::ProviderId;

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
    /// Other frames for what is in RAM, as compaction does.
    Migrate(VirtRange),
    /// Frames of another node for what is in RAM, as NUMA balancing and move_pages(2) do.
    ToNode {
        /// The pages.
        range: VirtRange,
        /// Where to.
        node: u32,
    },
    /// Private and shared memory goes to swap.
    SwapOut(VirtRange),
    /// Anonymous pages that nobody shares go to a device's memory, those that were never touched too. A whole huge page goes
    /// as one where there is room for it, and else by small pages (mm/migrate_device.c).
    ToDevice {
        /// The pages.
        range: VirtRange,
        /// Where to.
        memory: DeviceMemoryId,
    },
    /// And come back.
    FromDevice(VirtRange),
    /// Pages that nobody shares are lent to a device for its exclusive use (`make_device_exclusive`): brought into RAM for
    /// writing, and present for nobody else until somebody else touches them.
    Exclusive {
        /// The pages.
        range: VirtRange,
        /// The device.
        owner: ProviderId,
    },
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
        touch: Touch,
    },
    /// The driver of a device goes: what is in its memory comes back.
    Evict(DeviceMemoryId),
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
    /// What its invalidations are about.
    pub fn event(&self) -> Event {
        match self {
            Self::Space(_, SpaceChange::Map(_) | SpaceChange::Unmap(_) | SpaceChange::Remap { .. })
            | Self::Exit(_) => Event::Unmap,
            Self::Space(..) | Self::Object(_) | Self::Resolve { .. } | Self::Evict(_) => Event::Clear,
        }
    }

    /// The pages that devices must let go of before the change, in every process, whole huge pages where it cuts some.
    pub fn affected(&self, kernel: &Kernel) -> Result<Vec<(MmId, Span)>, SimError> {
        let (id, change) = match *self {
            Self::Object(change) => return change.affected(kernel),
            Self::Resolve { mm, page, .. } => {
                let cover = kernel.mm(mm).ok_or(SimError::Gone)?.huge_cover(Span::page(page));
                return Ok(vec![(mm, cover)]);
            }
            Self::Evict(memory) => return Ok(kernel.mappers_of_device(memory)),
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
            | SpaceChange::Exclusive { range, .. }
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
            SpaceChange::Migrate(range) | SpaceChange::ToNode { range, .. } | SpaceChange::SwapOut(range) => {
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
            Self::Evict(memory) => return kernel.evict_device(memory),
            Self::Resolve { mm, page, touch } => {
                return match kernel.fault_page(mm, page, touch, true) {
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
            SpaceChange::Migrate(range) => kernel.migrate(mm, span(range)?, None),
            SpaceChange::ToNode { range, node } => kernel.migrate(mm, span(range)?, Some(node)),
            SpaceChange::SwapOut(range) => kernel.swap_out(mm, span(range)?),
            SpaceChange::ToDevice { range, memory } => kernel.migrate_to_device(mm, span(range)?, memory),
            SpaceChange::FromDevice(range) => kernel.migrate_from_device(mm, span(range)?),
            SpaceChange::Exclusive { range, owner } => kernel.lend(mm, span(range)?, owner),
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
        let own = |place| matches!(place, Place::Ram(_)) && self.is_sole(place) && !self.is_pinned(place);
        let movable = |place| place == Place::Zero || own(place);
        let fits = plain && vma.span.contains(whole);
        if !fits || entries.iter().any(|(_, pte)| pte.exclusive.is_some() || !movable(pte.place)) {
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
}
