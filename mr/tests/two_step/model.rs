//! The two-step API as its documentation has it, written the slow way: a map from IO page to what is linked there.

use crate::calls::{Call, Outcome, Resolved, Verb, scattered};
use hw_model::addr::{PAGE_SIZE, PhysAddr};
use hw_model::iommu::LeafSize;
use std::collections::BTreeMap;

/// What one IO page of a mapping leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Start of the memory's IO page.
    pub page: PhysAddr,
    /// First IO page of the unit, and how many it has.
    pub unit: (u64, u64),
}

/// One mapping.
#[derive(Clone, Debug)]
pub struct Model {
    pub granule: u64,
    /// First IOVA, as it was given.
    pub iova: u64,
    pub len: u64,
    /// By number of the IO page in the mapping.
    pub links: BTreeMap<u64, Link>,
    pub freed: bool,
    bounces: bool,
    memory: PhysAddr,
}

impl Model {
    pub fn new(granule: u64, iova: u64, len: u64, bounces: bool, memory: PhysAddr) -> Self {
        Self { granule, iova, len, links: BTreeMap::new(), freed: false, bounces, memory }
    }

    pub fn inside(&self) -> u64 {
        self.iova % self.granule
    }

    pub fn linked(&self) -> u64 {
        self.links.len() as u64 * self.granule
    }

    /// Number of the IO page that holds the byte at `offset`.
    pub fn page_of(&self, offset: u64) -> u64 {
        (self.inside() + offset) / self.granule
    }

    /// First IO page and one past the last.
    fn range(&self, offset: u64, len: u64) -> Result<(u64, u64), Outcome> {
        let end = offset.checked_add(len).ok_or(Outcome::Range)?;
        let is_edge = |at: u64| (self.inside() + at).is_multiple_of(self.granule);
        let starts = offset == 0 || is_edge(offset);
        let ends = end == self.len || is_edge(end);
        if len == 0 || end > self.len || !starts || !ends {
            return Err(Outcome::Range);
        }
        Ok((self.page_of(offset), self.page_of(end - 1) + 1))
    }

    fn live(&self) -> Result<(), Outcome> {
        if self.freed { Err(Outcome::Freed) } else { Ok(()) }
    }

    /// Does what `call` does, and says what comes of it.
    pub fn call(&mut self, call: &Call, resolved: Resolved) -> Outcome {
        match self.try_call(call, resolved) {
            Ok(()) => Outcome::Done,
            Err(outcome) => outcome,
        }
    }

    fn try_call(&mut self, call: &Call, Resolved { offset, len, phys }: Resolved) -> Result<(), Outcome> {
        match call.verb {
            Verb::Alloc { .. } => Ok(()),
            Verb::Prepare(_) | Verb::Sync(_) => self.range(offset, len).and_then(|_| self.live()),
            Verb::Copy { .. } => {
                if offset.checked_add(len).is_none_or(|end| end > self.len) {
                    return Err(Outcome::Range);
                }
                self.live()
            }
            Verb::Link { largest, .. } => self.link(offset, len, phys, largest, true),
            Verb::LinkBounced { .. } => self.link(offset, len, phys, LeafSize::Page, self.bounces),
            Verb::LinkScattered { count, stride, .. } => self.link_scattered(offset, count, stride),
            Verb::Unlink { .. } => self.unlink(offset, len),
            Verb::Free => self.free(),
            Verb::Destroy { .. } if len == 0 => self.free(),
            Verb::Destroy { .. } => {
                self.unlink(0, len)?;
                self.free()
            }
        }
    }

    fn link(
        &mut self,
        offset: u64,
        len: u64,
        phys: PhysAddr,
        largest: LeafSize,
        has_way: bool,
    ) -> Result<(), Outcome> {
        let (first, end) = self.range(offset, len)?;
        if phys.0 % self.granule != (self.iova + offset) % self.granule {
            return Err(Outcome::Unaligned);
        }
        if !has_way {
            return Err(Outcome::NoPool);
        }
        self.live()?;
        if (first..end).any(|page| self.links.contains_key(&page)) {
            return Err(Outcome::AlreadyMapped);
        }
        let start = phys.0 - phys.0 % self.granule;
        let iova = self.iova - self.inside();
        let mut page = first;
        while page < end {
            let at = start + (page - first) * self.granule;
            let unit = LeafSize::ALL.into_iter().rev().find_map(|size| {
                let pages = 512_u64.pow(size as u32);
                let aligned = at.is_multiple_of(pages * self.granule)
                    && (iova + page * self.granule).is_multiple_of(pages * self.granule);
                (size <= largest && aligned && end - page >= pages || size == LeafSize::Page).then_some(pages)
            });
            let unit = unit.expect("a page is always possible");
            for inside in 0..unit {
                let link = Link { page: PhysAddr(at + inside * self.granule), unit: (page, unit) };
                self.links.insert(page + inside, link);
            }
            page += unit;
        }
        Ok(())
    }

    fn link_scattered(&mut self, offset: u64, count: u64, stride: u64) -> Result<(), Outcome> {
        if self.granule > PAGE_SIZE {
            return Err(Outcome::Granule);
        }
        self.range(offset, count * PAGE_SIZE)?;
        if !(self.inside() + offset).is_multiple_of(self.granule) {
            return Err(Outcome::Range);
        }
        self.live()?;
        let before = self.links.clone();
        // As many links of one page, of which all fail if one does.
        for (index, frame) in scattered(self.memory, count, stride).enumerate() {
            let first = self.page_of(offset) + index as u64 * (PAGE_SIZE / self.granule);
            for part in 0..PAGE_SIZE / self.granule {
                let link = Link { page: frame.offset(part * self.granule), unit: (first + part, 1) };
                if self.links.insert(first + part, link).is_some() {
                    self.links = before;
                    return Err(Outcome::AlreadyMapped);
                }
            }
        }
        Ok(())
    }

    fn unlink(&mut self, offset: u64, len: u64) -> Result<(), Outcome> {
        let (first, end) = self.range(offset, len)?;
        self.live()?;
        for page in first..end {
            let Some(Link { unit: (start, pages), .. }) = self.links.get(&page) else {
                return Err(Outcome::Hole);
            };
            if *start < first || start + pages > end {
                return Err(Outcome::PartOfLeaf);
            }
        }
        self.links.retain(|page, _| !(first..end).contains(page));
        Ok(())
    }

    fn free(&mut self) -> Result<(), Outcome> {
        if !self.links.is_empty() {
            return Err(Outcome::StillLinked(self.linked()));
        }
        self.freed = true;
        Ok(())
    }
}
