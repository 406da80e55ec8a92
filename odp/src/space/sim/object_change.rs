//! What can be done to an object that processes map: it affects all of them.

use super::kernel::{Holder, Kernel, MmId, NoFrame, Place, SwapSlot};
use super::object::{ObjectId, ObjectKind, Residence};
use super::op::{Applied, SimError};
use super::span::{HUGE_PAGES, Span};
use hw_model::addr::VirtAddr;

/// A change of an object. Counted in its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ObjectChange {
    /// fallocate(PUNCH_HOLE): pages `first..end` read as zero from now on. Private copies stay.
    Punch {
        /// The object.
        object: ObjectId,
        /// First page.
        first: u64,
        /// One past the last page.
        end: u64,
    },
    /// ftruncate. Mappings of what is cut off, private copies too, are gone; touching them is an error.
    Truncate {
        /// The object.
        object: ObjectId,
        /// Its new length in pages.
        pages: u64,
    },
    /// Writes a file's dirty pages back; they are mapped read-only from then on, until written again.
    WriteBack {
        /// The file.
        object: ObjectId,
        /// First page.
        first: u64,
        /// One past the last page.
        end: u64,
    },
    /// Drops a file's clean pages from the page cache.
    Evict {
        /// The file.
        object: ObjectId,
        /// First page.
        first: u64,
        /// One past the last page.
        end: u64,
    },
    /// Moves pages of a DMABUF.
    Move {
        /// The DMABUF.
        object: ObjectId,
        /// First page.
        first: u64,
        /// One past the last page.
        end: u64,
        /// Where to.
        to: Residence,
    },
}

impl ObjectChange {
    /// The object, the pages, and whether copies of its pages in private mappings go too.
    fn scope(&self, kernel: &Kernel) -> Result<(ObjectId, Span), SimError> {
        let (object, first, end) = match *self {
            Self::Punch { object, first, end }
            | Self::WriteBack { object, first, end }
            | Self::Evict { object, first, end }
            | Self::Move { object, first, end, .. } => (object, first, end),
            Self::Truncate { object, pages } => {
                let now = kernel.objects.get(&object).ok_or(SimError::Gone)?.pages;
                // Growing is bounded like everything else; it takes nothing away.
                if pages > super::change::user_span().end {
                    return Err(SimError::BadPages { first: 0, end: pages, pages: now });
                }
                (object, pages.min(now), now)
            }
        };
        let known = kernel.objects.get(&object).ok_or(SimError::Gone)?;
        let (kind, pages) = (known.kind, known.pages);
        let applies = match self {
            Self::Punch { .. } | Self::Truncate { .. } => !known.is_dmabuf(),
            Self::WriteBack { .. } | Self::Evict { .. } => known.is_file(),
            Self::Move { .. } => known.is_dmabuf(),
        };
        if !applies {
            return Err(SimError::WrongKind { at: VirtAddr(0) });
        }
        let cut = kind == ObjectKind::Hugetlb
            && !(first.is_multiple_of(HUGE_PAGES) && end.is_multiple_of(HUGE_PAGES));
        let wanted = if let Self::Truncate { pages, .. } = self { *pages } else { 0 };
        let cut = cut || kind == ObjectKind::Hugetlb && !wanted.is_multiple_of(HUGE_PAGES);
        if first > end || end > pages || cut {
            return Err(SimError::BadPages { first, end, pages });
        }
        Ok((object, Span::new(first, end)))
    }

    pub(super) fn affected(&self, kernel: &Kernel) -> Result<Vec<(MmId, Span)>, SimError> {
        let (object, span) = self.scope(kernel)?;
        Ok(kernel.mappings_of(object, span))
    }

    pub(super) fn apply(&self, kernel: &mut Kernel) -> Result<Applied, SimError> {
        let (object, span) = self.scope(kernel)?;
        match *self {
            Self::Punch { .. } => Ok(Applied::pages(kernel.punch(object, span))),
            Self::Truncate { pages, .. } => {
                for (mm, mapped) in kernel.mappings_of(object, span) {
                    kernel.zap(mm, mapped);
                }
                let dropped = kernel.punch(object, span);
                kernel.object_mut(object).pages = pages;
                Ok(Applied::pages(dropped))
            }
            Self::WriteBack { .. } => Ok(Applied::pages(kernel.write_back(object, span))),
            Self::Evict { .. } => {
                let clean = |(index, place): &(u64, Place)| {
                    !kernel.objects[&object].dirty.contains(index) && !kernel.is_pinned(*place)
                };
                let clean: Vec<_> = kernel.cached_in(object, span).into_iter().filter(clean).collect();
                for (index, place) in &clean {
                    kernel.drop_cached(object, *index, *place);
                }
                Ok(Applied::pages(clean.len() as u64))
            }
            Self::Move { to, .. } => kernel.move_dmabuf(object, span, to),
        }
    }
}

impl Kernel {
    /// The holes that MADV_REMOVE of `span` makes in objects.
    pub fn punches(&self, id: MmId, span: Span) -> Result<Vec<ObjectChange>, SimError> {
        let span = self.mapped(id, span)?;
        let mm = self.mm(id).ok_or(SimError::Gone)?;
        let mut punches = Vec::new();
        for vma in mm.vmas.overlapping(span) {
            let part = vma.span.intersection(span).ok_or(SimError::Gone)?;
            match vma.object_page(part.first) {
                Some((object, first)) if vma.is_shared() && !self.objects[&object].is_dmabuf() => {
                    // Past the end of the object there is nothing to remove.
                    let pages = self.objects[&object].pages;
                    let end = (first + part.len()).min(pages);
                    punches.push(ObjectChange::Punch { object, first: first.min(end), end });
                }
                _ => return Err(SimError::WrongKind { at: VirtAddr::from_page_number(part.first) }),
            }
        }
        Ok(punches)
    }

    fn cached_in(&self, object: ObjectId, span: Span) -> Vec<(u64, Place)> {
        let cache = &self.objects[&object].cache;
        cache.range(span.pages()).map(|(index, place)| (*index, *place)).collect()
    }

    /// Unmaps a cached page everywhere and drops it.
    fn drop_cached(&mut self, object: ObjectId, index: u64, place: Place) {
        let mappers = self.mappers(place);
        for (mm, page) in mappers {
            self.mm_mut(mm).split(Span::page(page));
            self.unlink(mm, page);
        }
        self.object_mut(object).cache.remove(&index);
        self.release(place, Holder::Object(object, index));
    }

    /// Pages `span` of `object` become holes. Gives how many were there.
    fn punch(&mut self, object: ObjectId, span: Span) -> u64 {
        let cached = self.cached_in(object, span);
        for (index, place) in &cached {
            self.drop_cached(object, *index, *place);
        }
        // Entries for failed memory are held by nobody; they go by where they are mapped.
        for (mm, mapped) in self.mappings_of(object, span) {
            let entries = self.mm_mut(mm).entries(mapped);
            for (page, pte) in entries {
                let shared = self.vma(mm, page).is_some_and(|vma| vma.is_shared());
                if pte.place == Place::Poisoned && shared {
                    self.unlink(mm, page);
                }
            }
        }
        let known = self.object_mut(object);
        known.dirty.retain(|index| !span.contains(Span::page(*index)));
        known.disk.retain(|index, _| !span.contains(Span::page(*index)));
        cached.len() as u64
    }

    fn write_back(&mut self, object: ObjectId, span: Span) -> u64 {
        let dirty: Vec<u64> = self.objects[&object].dirty.range(span.pages()).copied().collect();
        for index in &dirty {
            let Some(place) = self.objects[&object].cache.get(index).copied() else { continue };
            for (mm, page) in self.mappers(place) {
                self.mm_mut(mm).table.get_mut(&page).expect("a mapper maps").write = false;
            }
            if place != Place::Poisoned {
                let bytes = self.store.page(place);
                self.object_mut(object).disk.insert(*index, bytes);
            }
            self.object_mut(object).dirty.remove(index);
        }
        dirty.len() as u64
    }

    fn move_dmabuf(&mut self, object: ObjectId, span: Span, to: Residence) -> Result<Applied, SimError> {
        let ObjectKind::Dmabuf { bar, first } = self.kind(object) else {
            return Err(SimError::WrongKind { at: VirtAddr(0) });
        };
        let mut moved = 0;
        for (index, from) in self.cached_in(object, span) {
            let target = match (to, from) {
                (Residence::Peer, Place::Ram(_)) => Place::Device { memory: bar, page: first + index as u32 },
                (Residence::System, Place::Device { .. }) => match self.take_frame() {
                    Ok(frame) => frame,
                    Err(NoFrame) if moved == 0 => return Err(SimError::OutOfMemory),
                    Err(NoFrame) => break,
                },
                _ => continue,
            };
            self.move_page(from, target);
            moved += 1;
        }
        Ok(Applied::pages(moved))
    }

    pub(super) fn swap_out(&mut self, id: MmId, span: Span) -> Result<Applied, SimError> {
        let mut swapped = 0;
        let mm = self.mm(id).ok_or(SimError::Gone)?;
        for (page, _) in mm.entries(mm.huge_cover(span)) {
            // Read anew: the page before may have been the same one.
            let Some(pte) = self.pte(id, page) else { continue };
            let cached = self.cached(pte.place);
            let shmem = cached.is_none_or(|(object, _)| self.kind(object) == ObjectKind::Shmem);
            if !matches!(pte.place, Place::Ram(_))
                || pte.exclusive.is_some()
                || !shmem
                || self.is_pinned(pte.place)
            {
                continue;
            }
            let slot = self.next_slot;
            self.next_slot += 1;
            self.swap.insert(slot, SwapSlot { bytes: self.store.page(pte.place), references: 0 });
            if let Some((object, index)) = cached {
                self.cache(object, index, Place::Swap(slot));
            }
            for (mm, page) in self.mappers(pte.place) {
                if cached.is_some() {
                    self.mm_mut(mm).split(Span::page(page));
                    self.unlink(mm, page);
                } else {
                    self.relink(mm, page, Place::Swap(slot), false);
                }
            }
            if let Some((object, index)) = cached {
                self.release(pte.place, Holder::Object(object, index));
            }
            swapped += 1;
        }
        Ok(Applied::pages(swapped))
    }

    pub(super) fn poison(&mut self, id: MmId, at: VirtAddr) -> Result<Applied, SimError> {
        let page = at.page_number();
        let pte = self.pte(id, page).ok_or(SimError::NotMapped { at })?;
        let vma = self.vma(id, page).ok_or(SimError::NotMapped { at })?;
        let Place::Ram(frame) = pte.place else { return Err(SimError::WrongKind { at }) };
        if self.is_hugetlb(&vma) || self.is_pinned(pte.place) {
            return Err(SimError::WrongKind { at });
        }
        let cached = self.cached(pte.place);
        if let Some((object, _)) = cached
            && self.objects[&object].is_dmabuf()
        {
            return Err(SimError::WrongKind { at });
        }
        self.poisoned.insert(frame);
        let mappers = self.mappers(pte.place);
        let lost = mappers.iter().map(|(mm, page)| (*mm, VirtAddr::from_page_number(*page))).collect();
        for (mm, page) in mappers {
            self.relink(mm, page, Place::Poisoned, false);
        }
        if let Some((object, index)) = cached {
            self.cache(object, index, Place::Poisoned);
            self.release(pte.place, Holder::Object(object, index));
        }
        Ok(Applied { pages: 1, lost, ..Applied::default() })
    }
}
