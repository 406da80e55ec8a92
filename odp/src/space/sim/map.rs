//! Mappings made, cut, moved and copied: the part of a change that is about ranges.

use super::change::user_span;
use super::kernel::{Kernel, Mm, MmId, NoFrame, Place};
use super::object::ObjectKind;
use super::op::{Applied, SimError};
use super::span::{HUGE_PAGES, Span};
use super::vma::{Encryption, MapRequest, Protection, Source, Vma};
use crate::notifier::Notifiers;
use crate::space::Access;
use hw_model::addr::VirtAddr;
use hw_model::sync::Arc;
use rand::RngExt;
use std::collections::{BTreeMap, BTreeSet};

impl Kernel {
    pub(super) fn map(&mut self, id: MmId, request: MapRequest) -> Result<Applied, SimError> {
        let hugetlb = self.check_source(&request)?;
        let span = match request.at {
            Some(at) => {
                let range = request.range(at)?;
                let span = Span::of(range);
                let aligned = at.page_offset() == 0 && (!hugetlb || span.is_huge_aligned());
                if span.is_empty() || !aligned || !user_span().contains(span) {
                    return Err(SimError::BadRange { range });
                }
                self.unmap(id, span)?;
                span
            }
            None => {
                let align = if hugetlb || request.huge { HUGE_PAGES } else { 1 };
                self.find_room(id, request.pages, align)?
            }
        };
        self.mm_mut(id).vmas.insert(Vma {
            span,
            source: request.source,
            protection: request.protection,
            huge: request.huge,
            encryption: Encryption::Plain,
        });
        Ok(Applied { pages: span.len(), at: Some(span.range()), ..Applied::default() })
    }

    /// Whether the source is hugetlb, if it can be mapped as asked.
    fn check_source(&self, request: &MapRequest) -> Result<bool, SimError> {
        let (object, first, shared) = match request.source {
            Source::Anonymous | Source::Special => return Ok(false),
            Source::Shared { object, first } => (object, first, true),
            Source::Private { object, first } => (object, first, false),
        };
        let known = self.objects.get(&object).ok_or(SimError::Gone)?;
        let hugetlb = known.kind == ObjectKind::Hugetlb;
        let end = first.checked_add(request.pages).ok_or(SimError::Gone)?;
        let pages = known.pages;
        if hugetlb && !(first.is_multiple_of(HUGE_PAGES) && end.is_multiple_of(HUGE_PAGES)) {
            return Err(SimError::BadPages { first, end, pages });
        }
        if !shared && (hugetlb || known.is_dmabuf()) {
            return Err(SimError::WrongKind { at: request.at.unwrap_or_default() });
        }
        Ok(hugetlb)
    }

    /// A random place where `pages` pages fit.
    fn find_room(&mut self, id: MmId, pages: u64, align: u64) -> Result<Span, SimError> {
        const TRIES: u32 = 64;
        /// Places are chosen in this many pages (64 GiB), so that mappings are near each other but not together.
        const WINDOW: u64 = 1 << 24;
        let user = user_span();
        let room = (user.len()).checked_sub(pages).filter(|_| pages > 0).ok_or(SimError::OutOfMemory)?;
        for _ in 0..TRIES {
            let first = user.first + self.rng.random_range(0..=room.min(WINDOW));
            let first = first.next_multiple_of(align);
            let span = Span::new(first, first + pages);
            if user.contains(span) && self.mm(id).is_some_and(|mm| mm.vmas.overlapping(span).next().is_none())
            {
                return Ok(span);
            }
        }
        Err(SimError::OutOfMemory)
    }

    pub(super) fn unmap(&mut self, id: MmId, span: Span) -> Result<Applied, SimError> {
        let span = self.uncut(id, span)?;
        self.zap(id, span);
        let cut = self.mm_mut(id).vmas.cut(span);
        Ok(Applied::pages(cut.iter().map(|vma| vma.span.len()).sum()))
    }

    pub(super) fn protect(&mut self, id: MmId, span: Span, to: Protection) -> Result<Applied, SimError> {
        let span = self.mapped(id, span)?;
        let mm = self.mm_mut(id);
        for vma in mm.vmas.cut(span) {
            mm.vmas.insert(Vma { protection: to, ..vma });
        }
        self.split_edges(id, span);
        for (_, pte) in self.mm_mut(id).table.range_mut(span.pages()) {
            pte.write &= to.allows(Access::Write);
            // What was lent is taken back.
            pte.exclusive = None;
        }
        Ok(Applied::pages(span.len()))
    }

    /// Splits the huge pages that `span` cuts, not those inside.
    fn split_edges(&mut self, id: MmId, span: Span) {
        let mm = self.mm_mut(id);
        for head in mm.heads(span) {
            if !span.contains(Span::huge(head)) {
                mm.huge.remove(&head);
            }
        }
    }

    pub(super) fn remap(&mut self, id: MmId, from: Span, to: VirtAddr) -> Result<Applied, SimError> {
        let from = self.mapped(id, from)?;
        let first = to.page_number();
        let onto = Span::new(first, first.saturating_add(from.len()));
        let one = self.vma(id, from.first).is_some_and(|vma| vma.span.contains(from));
        let hugetlb = self.vma(id, from.first).is_some_and(|vma| self.is_hugetlb(&vma));
        if to.page_offset() != 0
            || !user_span().contains(onto)
            || from.intersection(onto).is_some()
            || !one
            || hugetlb && !onto.is_huge_aligned()
        {
            return Err(SimError::BadRange { range: from.range() });
        }
        self.unmap(id, onto)?;
        let distance = onto.first.wrapping_sub(from.first);
        let heads = self.mm(id).map(|mm| mm.heads(from)).unwrap_or_default();
        let whole = |head: &u64| from.contains(Span::huge(*head)) && distance.is_multiple_of(HUGE_PAGES);
        let moved_heads: BTreeSet<u64> =
            heads.iter().filter(|head| whole(head)).map(|head| head.wrapping_add(distance)).collect();
        let mm = self.mm_mut(id);
        mm.split(from);
        let entries = mm.entries(from);
        for vma in mm.vmas.cut(from) {
            mm.vmas.insert(Vma { span: onto, ..vma });
        }
        for (page, pte) in entries {
            let target = page.wrapping_add(distance);
            // Linked before it is unlinked, so that the page is held throughout.
            self.link(id, target, pte.place, pte.write);
            self.mm_mut(id).table.get_mut(&target).expect("it was just linked").exclusive = pte.exclusive;
            self.unlink(id, page);
        }
        self.mm_mut(id).huge.extend(moved_heads);
        Ok(Applied { pages: from.len(), at: Some(onto.range()), ..Applied::default() })
    }

    pub(super) fn encrypt(&mut self, id: MmId, span: Span, mode: Encryption) -> Result<Applied, SimError> {
        let span = self.mapped(id, span)?;
        let mm = self.mm_mut(id);
        if let Some(other) = mm.vmas.overlapping(span).find(|vma| vma.source != Source::Anonymous) {
            return Err(SimError::WrongKind { at: VirtAddr::from_page_number(other.span.first) });
        }
        let entries = mm.entries(span);
        let shared = entries.iter().find(|(_, pte)| match pte.place {
            Place::Ram(_) => !self.is_sole(pte.place),
            Place::Device { .. } => true,
            _ => false,
        });
        if let Some((page, _)) = shared {
            return Err(SimError::WrongKind { at: VirtAddr::from_page_number(*page) });
        }
        let mm = self.mm_mut(id);
        for vma in mm.vmas.cut(span) {
            mm.vmas.insert(Vma { encryption: mode, ..vma });
        }
        mm.split(span);
        for (_, pte) in entries {
            if let Place::Ram(frame) = pte.place {
                self.store.set_private(frame, mode == Encryption::Private);
            }
        }
        Ok(Applied::pages(span.len()))
    }

    /// A process without memory.
    pub(super) fn new_mm(&mut self) -> MmId {
        let id = MmId(self.next_id);
        self.next_id += 1;
        let mm = Mm {
            notifiers: Notifiers::new(Arc::clone(&self.epoch)),
            vmas: super::vma::Vmas::default(),
            table: BTreeMap::new(),
            huge: BTreeSet::new(),
        };
        self.mms.insert(id, mm);
        id
    }

    pub(super) fn fork(&mut self, parent: MmId) -> Result<Applied, SimError> {
        let vmas = self.mm(parent).ok_or(SimError::Gone)?.vmas.clone();
        if self.frames.free() < self.pinned_copies(parent) {
            return Err(SimError::OutOfMemory);
        }
        let child = self.new_mm();
        self.mm_mut(child).vmas = vmas.clone();
        let mut shared = 0;
        for vma in vmas.iter().filter(|vma| Self::is_private(vma)) {
            let mm = self.mm_mut(parent);
            let (entries, heads) = (mm.entries(vma.span), mm.heads(vma.span));
            for (page, pte) in entries {
                if self.is_copied_at_fork(pte.place) {
                    // What a device goes on writing stays the parent's (mm/memory.c, `copy_present_page`).
                    self.mm_mut(parent).split(Span::page(page));
                    let own = self.take_frame().map_err(|NoFrame| SimError::OutOfMemory)?;
                    self.store.copy(pte.place, own);
                    self.link(child, page, own, pte.write);
                    continue;
                }
                // A page that is lent comes back first.
                let entry = self.mm_mut(parent).table.get_mut(&page).expect("it was just there");
                (entry.write, entry.exclusive) = (false, None);
                self.link(child, page, pte.place, false);
                shared += 1;
            }
            let still = |head: &u64| {
                vma.span.contains(Span::huge(*head)) && self.mm(parent).is_some_and(|mm| mm.is_huge(*head))
            };
            let heads: Vec<u64> = heads.into_iter().filter(still).collect();
            self.mm_mut(child).huge.extend(heads);
        }
        Ok(Applied { pages: shared, child: Some(child), ..Applied::default() })
    }

    /// Pages that a fork of `parent` copies at once.
    fn pinned_copies(&self, parent: MmId) -> u64 {
        let Some(mm) = self.mm(parent) else { return 0 };
        let private = |page: &u64| mm.vmas.at(*page).is_some_and(Self::is_private);
        let copied = |page: &u64, place| self.is_copied_at_fork(place) && private(page);
        mm.table.iter().filter(|(page, pte)| copied(page, pte.place)).count() as u64
    }

    /// Whether a device holds this page of a process's own.
    fn is_copied_at_fork(&self, place: Place) -> bool {
        self.is_pinned(place) && self.cached(place).is_none()
    }

    pub(super) fn exit(&mut self, id: MmId) -> Result<Applied, SimError> {
        let mm = self.mm(id).ok_or(SimError::Gone)?;
        let pages: Vec<u64> = mm.table.keys().copied().collect();
        self.mm_mut(id).huge.clear();
        for page in &pages {
            self.unlink(id, *page);
        }
        self.mms.remove(&id);
        Ok(Applied::pages(pages.len() as u64))
    }
}
