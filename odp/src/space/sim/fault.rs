//! What happens when a page is touched, by the CPU or by a device's fault: mm/memory.c (`handle_mm_fault`) in small.
//!
//! A fault only ever adds: it maps what was not mapped, or gives a permission that was missing, and needs no invalidation.
//! The two that replace a page, copy-on-write and the return from private device memory, say so, and are then done as a
//! change, with the page's invalidation running.

use super::kernel::{Holder, Kernel, MmId, NoFrame, Place, Pte};
use super::object::{ObjectId, ObjectKind};
use super::span::{HUGE_PAGES, Span, huge_head};
use super::vma::{Source, Vma};
use crate::space::{Access, FaultError};
use hw_model::addr::VirtAddr;
use hw_model::bus::ProviderId;

/// What somebody wants of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Touch {
    pub access: Access,
    /// The device that wants it: its own memory, and what is lent to it, are present for it. `None` for everybody else.
    pub viewer: Option<ProviderId>,
    /// To hold it where it is (FOLL_LONGTERM): no device's memory will do, nor a page that is to be copied yet.
    pub pin: bool,
}

impl Touch {
    /// Of the CPU, or a device that has no memory of its own here.
    pub fn plain(access: Access) -> Self {
        Self { access, viewer: None, pin: false }
    }
}

/// Why a page is not there yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// The page has to be replaced: again, with its invalidation running.
    Invalidate,
    /// It cannot be.
    Failed(FaultError),
}

impl Kernel {
    /// Makes `page` present as `touch` wants it. With `invalidated`, what takes a page away is allowed.
    pub fn fault_page(&mut self, mm: MmId, page: u64, touch: Touch, invalidated: bool) -> Result<(), Stop> {
        let Touch { access, viewer, pin } = touch;
        let at = VirtAddr::from_page_number(page);
        let none = Stop::Failed(FaultError::NoMapping { at });
        let vma = self.vma(mm, page).ok_or(none)?;
        if vma.source == Source::Special {
            return Err(Stop::Failed(FaultError::Special { at }));
        }
        if !vma.protection.allows(access) {
            return Err(Stop::Failed(FaultError::Permission { at, access }));
        }
        if let Some((object, index)) = vma.object_page(page)
            && index >= self.objects[&object].pages
        {
            return Err(none);
        }
        if pin {
            self.may_pin(&vma, page).map_err(Stop::Failed)?;
        }
        let Some(pte) = self.pte(mm, page) else { return self.populate(mm, page, &vma, access) };
        if pte.exclusive.is_some() && pte.exclusive != viewer {
            // Whom it is lent to has to let go first.
            if !invalidated {
                return Err(Stop::Invalidate);
            }
            self.mm_mut(mm).table.get_mut(&page).expect("it was just there").exclusive = None;
        }
        match pte.place {
            Place::Poisoned => Err(none),
            Place::Swap(slot) => {
                let to = self.take_frame().map_err(|NoFrame| out_of_memory(page))?;
                self.store.write(to, 0, &self.swap[&slot].bytes);
                self.relink(mm, page, to, access == Access::Write);
                Ok(())
            }
            Place::Device { memory, .. } if pin || !self.store.device(memory).is_reached_by(viewer) => {
                if !invalidated {
                    return Err(Stop::Invalidate);
                }
                if self.whole_from_device(mm, Span::huge(page)) {
                    return Ok(());
                }
                self.copy_here(mm, page, pte, access == Access::Write)
            }
            _ if access == Access::Read || pte.write => Ok(()),
            _ => self.upgrade(mm, page, &vma, pte, invalidated),
        }
    }

    /// Whether `page` is of a mapping whose pages can be pinned for long (`check_vma_flags` in mm/gup.c).
    fn may_pin(&self, vma: &Vma, page: u64) -> Result<(), FaultError> {
        let at = VirtAddr::from_page_number(page);
        match vma.object_page(page).map(|(object, _)| self.kind(object)) {
            Some(ObjectKind::Dmabuf { .. }) => Err(FaultError::Special { at }),
            Some(ObjectKind::File) if vma.is_shared() => {
                Err(FaultError::Permission { at, access: Access::Write })
            }
            _ => Ok(()),
        }
    }

    /// Nothing is mapped at `page`.
    fn populate(&mut self, mm: MmId, page: u64, vma: &Vma, access: Access) -> Result<(), Stop> {
        let Some((object, index)) = vma.object_page(page) else {
            return self.populate_anonymous(mm, page, vma, access);
        };
        let place = self.object_page(object, index).map_err(|error| stop(error, page))?;
        let kind = self.kind(object);
        match (vma.source, kind) {
            (_, ObjectKind::Hugetlb) => {
                let head = huge_head(page);
                let write = vma.protection.allows(Access::Write);
                for n in 0..HUGE_PAGES {
                    let place = self.objects[&object].cache[&(index - (page - head) + n)];
                    self.link(mm, head + n, place, write);
                }
                self.mm_mut(mm).huge.insert(head);
            }
            (Source::Shared { .. }, ObjectKind::File) => {
                // Mapped read-only until it is written, so that the file's dirty pages are known.
                if access == Access::Write {
                    self.object_mut(object).dirty.insert(index);
                }
                self.link(mm, page, place, access == Access::Write);
            }
            (Source::Shared { .. }, _) => {
                self.link(mm, page, place, vma.protection.allows(Access::Write));
            }
            _ if access == Access::Write => {
                let own = self.take_frame().map_err(|NoFrame| out_of_memory(page))?;
                self.store.copy(place, own);
                self.link(mm, page, own, true);
            }
            _ => self.link(mm, page, place, false),
        }
        Ok(())
    }

    fn populate_anonymous(&mut self, mm: MmId, page: u64, vma: &Vma, access: Access) -> Result<(), Stop> {
        if access == Access::Read {
            self.link(mm, page, Place::Zero, false);
            return Ok(());
        }
        let whole = Span::huge(page);
        let room = vma.huge
            && vma.span.contains(whole)
            && self.mm(mm).is_some_and(|mm| mm.table.range(whole.pages()).next().is_none());
        if room && let Ok(first) = self.take_huge() {
            for n in 0..HUGE_PAGES {
                let place = Place::Ram(first + n as u32);
                self.store.zero(place);
                self.link(mm, whole.first + n, place, true);
            }
            self.mm_mut(mm).huge.insert(whole.first);
            return Ok(());
        }
        let place = self.take_frame().map_err(|NoFrame| out_of_memory(page))?;
        self.store.zero(place);
        self.link(mm, page, place, true);
        Ok(())
    }

    /// `page` is present for reading and shall be written.
    fn upgrade(&mut self, mm: MmId, page: u64, vma: &Vma, pte: Pte, invalidated: bool) -> Result<(), Stop> {
        if vma.is_shared() {
            if let Some((object, index)) = vma.object_page(page)
                && self.objects[&object].is_file()
            {
                self.object_mut(object).dirty.insert(index);
            }
            self.allow_write(mm, page);
            return Ok(());
        }
        let huge = self.mm(mm).is_some_and(|mm| mm.is_huge(page));
        if huge {
            let entries = self.mm_mut(mm).entries(Span::huge(page));
            if entries.iter().all(|(_, pte)| self.is_sole(pte.place)) {
                self.allow_write(mm, page);
                return Ok(());
            }
        } else if self.is_sole(pte.place) {
            self.allow_write(mm, page);
            return Ok(());
        }
        if !invalidated {
            return Err(Stop::Invalidate);
        }
        self.copy_here(mm, page, pte, true)
    }

    /// Write permission for `page`, and for the whole huge page it is mapped with: that has only one.
    fn allow_write(&mut self, mm: MmId, page: u64) {
        let mm = self.mm_mut(mm);
        let span = if mm.is_huge(page) { Span::huge(page) } else { Span::page(page) };
        for (_, pte) in mm.table.range_mut(span.pages()) {
            pte.write = true;
        }
    }

    /// Replaces what `page` is mapped to by a copy of its own in RAM.
    fn copy_here(&mut self, mm: MmId, page: u64, pte: Pte, write: bool) -> Result<(), Stop> {
        let own = self.take_frame().map_err(|NoFrame| out_of_memory(page))?;
        self.store.copy(pte.place, own);
        self.relink(mm, page, own, write);
        Ok(())
    }

    /// The page `index` of `object`, brought into the page cache if it is not there.
    pub fn object_page(&mut self, object: ObjectId, index: u64) -> Result<Place, CacheMiss> {
        let known = self.objects[&object].cache.get(&index).copied();
        match known {
            Some(Place::Poisoned) => return Err(CacheMiss::Poisoned),
            Some(Place::Swap(slot)) => {
                let place = self.take_frame().map_err(|NoFrame| CacheMiss::NoFrame)?;
                self.store.write(place, 0, &self.swap[&slot].bytes);
                self.release(Place::Swap(slot), Holder::Object(object, index));
                self.cache(object, index, place);
                return Ok(place);
            }
            Some(place) => return Ok(place),
            None => {}
        }
        if self.kind(object) == ObjectKind::Hugetlb {
            let first = self.take_huge().map_err(|NoFrame| CacheMiss::NoFrame)?;
            for n in 0..HUGE_PAGES {
                let place = Place::Ram(first + n as u32);
                self.store.zero(place);
                self.cache(object, huge_head(index) + n, place);
            }
            return Ok(self.objects[&object].cache[&index]);
        }
        let place = self.take_frame().map_err(|NoFrame| CacheMiss::NoFrame)?;
        match self.objects[&object].disk.get(&index) {
            Some(bytes) => self.store.write(place, 0, bytes),
            None => self.store.zero(place),
        }
        self.cache(object, index, place);
        Ok(place)
    }

    /// Puts `place` into the page cache.
    pub fn cache(&mut self, object: ObjectId, index: u64, place: Place) {
        self.hold(place, Holder::Object(object, index));
        self.object_mut(object).cache.insert(index, place);
    }
}

/// Why an object has no page to give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CacheMiss {
    NoFrame,
    Poisoned,
}

fn stop(miss: CacheMiss, page: u64) -> Stop {
    match miss {
        CacheMiss::NoFrame => out_of_memory(page),
        CacheMiss::Poisoned => Stop::Failed(FaultError::NoMapping { at: VirtAddr::from_page_number(page) }),
    }
}

fn out_of_memory(page: u64) -> Stop {
    Stop::Failed(FaultError::OutOfMemory { at: VirtAddr::from_page_number(page) })
}
