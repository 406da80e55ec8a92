//! Making pages present: link what needs a link, sync once, then let the HCA see the entries.

use super::core::{Core, Mode, State, Touched};
use super::counters::add;
use crate::dma::{Extent, LinkError, Refusal, Segment, Segments};
use hw_model::addr::{PAGE_SIZE, VirtAddr, page_bytes, pages_for};
use hw_model::hca::{Backing, Entry, Path, Slot};
use hw_model::iommu::LeafSize;
use odp::page::PageRun;
use std::ops::Range;

/// Why pages that are present in memory could not be made present for the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// The device has no way to the page.
    #[error("page at {at} cannot be reached by the device: {refusal}")]
    Refused {
        /// The page.
        at: VirtAddr,
        /// Why.
        refusal: Refusal,
    },
    /// The IOMMU refused the link.
    #[error("page at {at} could not be linked: {error}")]
    Link {
        /// First page of the link.
        at: VirtAddr,
        /// Why.
        error: LinkError,
    },
    /// A region of hugetlb memory takes whole huge pages of it, and nothing else.
    #[error("the memory at {at} is no whole hugetlb page; register it without the hugetlb access")]
    NotHuge {
        /// The first page that is not part of one.
        at: VirtAddr,
    },
    /// The region is being deregistered.
    #[error("the region is being deregistered")]
    Closing,
    /// The region was sealed when its memory changed: it takes no new page.
    #[error("the region was sealed when its memory changed; it takes no new page")]
    Sealed,
}

/// What one call published.
#[derive(Default)]
struct Published {
    pages: u64,
    entries: u64,
    relinked: u64,
    changed_kind: u64,
}

impl Published {
    /// Counts entries of pages that become present for the first time.
    fn arrivals(&mut self, pages: u64) {
        self.pages += pages;
        self.entries += pages;
    }

    /// Counts an entry that becomes present with `segment`'s kind and path where `before` was.
    fn arrival(&mut self, slot: Slot, before: Entry, segment: &Segment) {
        self.pages += slot.pages();
        self.entries += 1;
        self.relinked += u64::from(before.was_seen());
        let changed = before.backing() != segment.backing || before.path() != segment.path;
        self.changed_kind += u64::from(before.was_seen() && changed);
    }
}

impl Core {
    /// Publishes `runs`, which were reported at a sequence number that `accepted` confirms under the lock. Gives how many
    /// pages came in or got more permission; `None` if it does not confirm: nothing was done, begin again.
    ///
    /// All or nothing: when a page is refused, the links of this call are taken down again and no entry was stored.
    ///
    /// # Errors
    /// See [`PublishError`].
    pub(crate) fn publish(
        &self,
        runs: &[PageRun],
        accepted: impl FnOnce() -> bool,
    ) -> Result<Option<u64>, PublishError> {
        let mut state = self.state.lock();
        if state.closing {
            return Err(PublishError::Closing);
        }
        if state.sealed {
            return Err(PublishError::Sealed);
        }
        if !accepted() {
            return Ok(None);
        }
        let mut published = Published::default();
        let known = state.touched;
        self.link_all(&mut state, runs, &mut published)?;
        for segment in self.segments(runs) {
            let segment = segment?;
            match self.is_news(known, &segment) {
                true => self.show_news(&mut state, &segment, &mut published),
                false => self.show(&mut state, &segment, &mut published),
            }
        }
        add(&self.counters.entries_published, published.entries);
        add(&self.counters.entries_relinked, published.relinked);
        add(&self.counters.entries_changed_kind, published.changed_kind);
        Ok(Some(published.pages))
    }

    fn segments<'a>(
        &'a self,
        runs: &'a [PageRun],
    ) -> impl Iterator<Item = Result<Segment, PublishError>> + 'a {
        let base = self.pages.start();
        let refused = move |(at, refusal)| PublishError::Refused { at: base.offset(at), refusal };
        Segments::new(&self.device, runs.iter().map(move |run| Extent::of_run(run, base))).map(move |step| {
            match step.map_err(refused)? {
                // A device that faults has no moment to copy at, whatever the policy (mm/hmm.c `hmm_dma_map_alloc`). Where
                // nothing translates, the buffers would have to live beside the region: see [`crate::dma::Bounced`].
                segment
                    if segment.path == Path::Bounce
                        && (self.mapping.is_none() || self.mode == Mode::OnDemand) =>
                {
                    Err(refused((segment.at, Refusal::WouldBounce)))
                }
                segment => Ok(segment),
            }
        })
    }

    /// Whether `segment` is pages of which the list, where `known` is what was ever published of it, knows nothing, and that
    /// are kept page by page: whatever is written for one of them is written for all.
    fn is_news(&self, known: Touched, segment: &Segment) -> bool {
        let span = pages_of(segment);
        let paged = match (&self.mapping, segment.path) {
            (Some(mapping), Path::Iova) => mapping.granule() <= PAGE_SIZE,
            (_, path) => !path.is_linked(),
        };
        paged
            && known.part_of(span.start, span.end - span.start).is_empty()
            && self.largest_unit(segment.backing) == LeafSize::Page
            && !self.list.is_huge()
    }

    /// As [`Core::show`], for pages that are news.
    fn show_news(&self, state: &mut State, segment: &Segment, published: &mut Published) {
        let span = pages_of(segment);
        let (pages, at) = (span.end - span.start, page_bytes(span.start));
        let address = match &self.mapping {
            Some(mapping) if segment.path.is_linked() => mapping.dma_address(at),
            _ => {
                published.arrivals(pages);
                segment.unlinked_address(at)
            }
        };
        let write = segment.writable && self.writable;
        self.list.store_run(span.start, pages, Entry::present(address, segment.path, segment.backing, write));
        state.present += pages;
        state.touch(span.start);
        state.touch(span.end - 1);
    }

    /// Lets the HCA see the pages of `segment`, which are linked and synced where they need it (invariant 1).
    fn show(&self, state: &mut State, segment: &Segment, published: &mut Published) {
        let write = segment.writable && self.writable;
        for slot in self.slots(segment) {
            let slot = slot.expect("looked at before anything was linked");
            let before = self.list.load_slot(slot);
            if before.is_valid() {
                let now = self.renewed(before, segment);
                if now != before {
                    self.list.store_slot(slot, now);
                    published.entries += 1;
                    published.pages += slot.pages();
                }
                continue;
            }
            let entry = if segment.path.is_linked() {
                if before.was_seen() {
                    // Hidden with its link in place, and counted by nobody so far.
                    published.arrival(slot, before, segment);
                }
                before.relabelled(segment.backing).shown(write)
            } else {
                published.arrival(slot, before, segment);
                let address = segment.unlinked_address(page_bytes(slot.first()));
                Entry::present(address, segment.path, segment.backing, write)
            };
            self.list.store_slot(slot, entry);
            state.present += slot.pages();
            state.touch(slot.first());
            state.touch(slot.end() - 1);
        }
    }

    /// A present entry as `segment` would have it. The page did not move, or an invalidation would have hidden it: its
    /// address stays (invariant 11).
    fn renewed(&self, entry: Entry, segment: &Segment) -> Entry {
        let same = entry.relabelled(segment.backing);
        if segment.writable && self.writable { same.upgraded() } else { same }
    }

    /// Links every page of `runs` that needs it, and syncs once. On failure takes its own links down again.
    fn link_all(
        &self,
        state: &mut State,
        runs: &[PageRun],
        published: &mut Published,
    ) -> Result<(), PublishError> {
        let Some(mapping) = &self.mapping else {
            // Nothing to link, but a page without a way must be refused before any entry is stored.
            return self.segments(runs).try_for_each(|segment| self.check(&segment?));
        };
        let mut linking =
            Linking { core: self, mapping, linked: 0..0, batch: Batch::default(), state, published };
        let outcome = self.segments(runs).try_for_each(|segment| linking.segment(&segment?));
        let outcome = outcome.and_then(|()| linking.link_batch());
        let linked = linking.linked;
        if linked.is_empty() {
            return outcome;
        }
        let outcome = outcome.and_then(|()| {
            add(&self.counters.syncs, 1);
            mapping
                .sync(page_bytes(linked.start), page_bytes(linked.end - linked.start))
                .map_err(|error| PublishError::Link { at: self.page_address(linked.start), error })
        });
        if outcome.is_err() {
            self.unlink_fresh(state, linked);
        }
        outcome
    }

    /// Takes down what this call linked in `span`. No device has seen it, so there is nothing to drain; what is linked
    /// there besides may still be in use (see [`Linking::segment`]) and stays.
    fn unlink_fresh(&self, state: &mut State, span: Range<u64>) {
        let mut fresh = span.start..span.start;
        for (slot, entry) in self.list.slots(span) {
            if entry.is_linked() && !entry.is_valid() && !entry.was_seen() {
                fresh.end = slot.end();
                continue;
            }
            self.unlink_hidden(state, fresh);
            fresh = slot.end()..slot.end();
        }
        self.unlink_hidden(state, fresh);
    }

    /// What pages of `backing` are kept in at most: they come and go together. Of an on-demand region those are the pages that
    /// the processor has: what takes a part of a huge page away splits it, and tells of all of it (mm/huge_memory.c
    /// `__split_huge_pmd`).
    fn largest_unit(&self, backing: Backing) -> LeafSize {
        match self.mode {
            Mode::Pinned => LeafSize::Huge,
            Mode::OnDemand | Mode::Implicit => match backing {
                Backing::Hugetlb | Backing::TransparentHuge => LeafSize::Large,
                _ => LeafSize::Page,
            },
        }
    }
}

/// Indices in the page list of the pages of `segment`: what is mapped begins where the list does.
fn pages_of(segment: &Segment) -> Range<u64> {
    let first = segment.at / PAGE_SIZE;
    first..first + pages_for(segment.len)
}

mod linking;
mod slots;

use linking::{Batch, Linking};

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
