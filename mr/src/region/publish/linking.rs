//! Linking the pages of one publication: single pages that follow each other in one call, larger runs each in its own.

use super::super::core::{Core, State};
use super::super::counters::add;
use super::{PublishError, Published, pages_of};
use crate::dma::{LinkError, Mapping, Segment};
use hw_model::addr::{PAGE_SIZE, page_bytes};
use hw_model::hca::{Entry, Path, Slot};
use hw_model::iommu::LeafSize;
use std::ops::Range;

/// Runs that one call links together, at most: they wait on the stack, under the region's lock.
const BATCH: usize = 16;
/// Pages of one run that are linked by themselves, at least, where none was ever published.
const NEWS: u64 = 16;
/// From here on a run may have a larger leaf, and is linked by itself.
const LARGE_LEAF: u64 = 2 << 20;

/// Runs that follow each other in what is mapped and are linked page by page.
#[derive(Default)]
pub(super) struct Batch {
    runs: [Option<Segment>; BATCH],
    count: usize,
    pages: u64,
}

impl Batch {
    /// Puts `run` behind what is there. `false` if it does not follow that, or there is no room.
    fn push(&mut self, run: Segment) -> bool {
        let follows = match self.count.checked_sub(1).and_then(|last| self.runs[last]) {
            Some(last) => self.count < BATCH && last.at + last.len == run.at,
            None => true,
        };
        if follows {
            self.runs[self.count] = Some(run);
            self.count += 1;
            self.pages += run.len / PAGE_SIZE;
        }
        follows
    }

    fn runs(&self) -> impl Iterator<Item = &Segment> {
        self.runs[..self.count].iter().flatten()
    }

    fn link(&self, mapping: &Mapping, at: u64) -> Result<(), LinkError> {
        let pages = |run: &Segment| {
            let phys = run.phys;
            (0..run.len / PAGE_SIZE).map(move |page| phys.offset(page_bytes(page)))
        };
        let mut frames = self.runs().flat_map(pages);
        let count = self.pages as usize;
        mapping.link_scattered(at, (0..count).map(|_| frames.next().expect("as many as were counted")))
    }
}

/// What one publication has linked so far.
pub(super) struct Linking<'a> {
    pub(super) core: &'a Core,
    pub(super) mapping: &'a Mapping,
    pub(super) state: &'a mut State,
    pub(super) published: &'a mut Published,
    /// First page linked to one past the last, with whatever lies between.
    pub(super) linked: Range<u64>,
    pub(super) batch: Batch,
}

impl Linking<'_> {
    /// Links the pages of `segment` that are not present. What is linked is noted in the list, hidden and not yet seen, so
    /// that it can be taken down again if the call fails further on. Single pages may wait for [`Linking::link_batch`].
    ///
    /// A page that is hidden but still linked was left so by an invalidation that was not allowed to wait, or whose unit
    /// came back in part. DMA that began before it was hidden may be under way, so it is not unlinked here: the link is
    /// used again. Should it lead elsewhere, which no protocol-abiding space brings about, the IOMMU refuses to link over it.
    pub(super) fn segment(&mut self, segment: &Segment) -> Result<(), PublishError> {
        if !segment.path.is_linked() {
            return self.core.check(segment);
        }
        let span = pages_of(segment);
        if span.end - span.start >= NEWS && self.core.is_news(self.state.touched, segment) {
            return self.news(segment);
        }
        let first = span.start;
        let mut run = first..first;
        for slot in self.core.slots(segment) {
            let slot = slot?;
            let entry = self.core.list.load_slot(slot);
            if entry.is_valid() || (entry.is_linked() && self.leads_to(slot, segment)) {
                self.run(segment, run)?;
                run = slot.end()..slot.end();
                continue;
            }
            if run.end != slot.first() {
                // Between them lie pages that are there.
                self.run(segment, run)?;
                run = slot.first()..slot.first();
            }
            run.end = slot.end();
        }
        self.run(segment, run)
    }

    /// Links and notes a run of pages that are news, in one go. Each is a unit of its own, in leaves as large as can be split
    /// when one of them goes.
    fn news(&mut self, segment: &Segment) -> Result<(), PublishError> {
        self.link_batch()?;
        let largest = if self.mapping.can_split() { LeafSize::Large } else { LeafSize::Page };
        let linked = self.mapping.link_segment(segment, largest);
        linked.map_err(|error| self.failed(segment, error))?;
        let span = self.linked(segment);
        let pages = span.end - span.start;
        self.published.arrivals(pages);
        let address = self.mapping.dma_address(page_bytes(span.start));
        let entry = Entry::present(address, segment.path, segment.backing, false).fresh();
        self.core.list.store_run(span.start, pages, entry);
        add(&self.core.counters.links, 1);
        Ok(())
    }

    /// Counts the pages of `run` as linked. Gives which they are.
    fn linked(&mut self, run: &Segment) -> Range<u64> {
        let span = pages_of(run);
        self.state.linked += span.end - span.start;
        self.state.touch(span.start);
        self.state.touch(span.end - 1);
        self.linked = match self.linked.is_empty() {
            true => span.clone(),
            false => self.linked.start.min(span.start)..self.linked.end.max(span.end),
        };
        span
    }

    /// Whether the links of `slot` lead to the pages of `segment`.
    fn leads_to(&self, slot: Slot, segment: &Segment) -> bool {
        (slot.first()..slot.end()).all(|index| {
            let at = page_bytes(index);
            self.mapping.leads_to(at, segment.phys_at(at))
        })
    }

    /// Links pages of `segment`, now or with what follows them.
    fn run(&mut self, segment: &Segment, run: Range<u64>) -> Result<(), PublishError> {
        if run.is_empty() {
            return Ok(());
        }
        let run = segment.part(page_bytes(run.start), page_bytes(run.end - run.start));
        let largest = self.core.largest_unit(run.backing);
        let is_paged = largest == LeafSize::Page || run.len < LARGE_LEAF;
        if run.path == Path::Iova && is_paged && self.mapping.granule() <= PAGE_SIZE {
            if !self.batch.push(run) {
                self.link_batch()?;
                assert!(self.batch.push(run), "an empty batch takes any run");
            }
            return Ok(());
        }
        self.link_batch()?;
        self.mapping.link_segment(&run, largest).map_err(|error| self.failed(&run, error))?;
        self.note(&run, |mapping, index| index + mapping.unit_at(page_bytes(index)) / PAGE_SIZE);
        add(&self.core.counters.links, 1);
        Ok(())
    }

    /// Links what waits.
    pub(super) fn link_batch(&mut self) -> Result<(), PublishError> {
        let Some(first) = self.batch.runs().next() else { return Ok(()) };
        self.batch.link(self.mapping, first.at).map_err(|error| self.failed(first, error))?;
        for index in 0..std::mem::take(&mut self.batch.count) {
            let run = self.batch.runs[index].expect("one of those just linked");
            // Page by page.
            self.note(&run, |_, index| index);
        }
        self.batch.pages = 0;
        add(&self.core.counters.links, 1);
        Ok(())
    }

    fn failed(&self, run: &Segment, error: LinkError) -> PublishError {
        PublishError::Link { at: self.core.pages.start().offset(run.at), error }
    }

    /// Notes the links of `run` in the list, hidden. `unit_end` gives the page behind the leaf that begins with a page: what
    /// is linked in one leaf is one unit.
    fn note(&mut self, run: &Segment, unit_end: impl Fn(&Mapping, u64) -> u64) {
        let mut unit = self.linked(run).start;
        for slot in self.core.slots(run) {
            let slot = slot.expect("looked at before it was linked");
            let (first, before) = (slot.first(), self.core.list.load_slot(slot));
            self.published.arrival(slot, before, run);
            let address = self.mapping.dma_address(page_bytes(first));
            let mut entry = Entry::present(address, run.path, run.backing, false).fresh();
            if first < unit {
                entry = entry.continued();
            } else {
                unit = unit_end(self.mapping, first);
            }
            self.core.list.store_slot(slot, entry);
        }
    }
}
