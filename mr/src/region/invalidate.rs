//! Taking pages away: hide entries, and after the drain unlink them.

use super::core::{Core, Mode, State};
use super::counters::add;
use crate::device::Seal;
use hw_model::addr::{VirtRange, page_bytes};
use odp::notifier::{Notify, Raise};

impl Notify for Core {
    fn clear(&self, range: VirtRange, raise: Raise<'_>) {
        self.clear_locked(&mut self.state.lock(), range, raise);
    }

    fn try_clear(&self, range: VirtRange, raise: Raise<'_>) -> bool {
        let Some(mut state) = self.state.try_lock() else { return false };
        self.clear_locked(&mut state, range, raise);
        true
    }

    fn unlink(&self, range: VirtRange) {
        self.unlink_locked(&mut self.state.lock(), range);
    }

    fn try_unlink(&self, range: VirtRange) -> bool {
        let Some(mut state) = self.state.try_lock() else { return false };
        self.unlink_locked(&mut state, range);
        true
    }
}

impl Seal for Core {
    fn seal(&self) {
        self.state.lock().sealed = true;
    }

    fn try_seal(&self) -> bool {
        let Some(mut state) = self.state.try_lock() else { return false };
        state.sealed = true;
        true
    }
}

impl Core {
    fn clear_locked(&self, state: &mut State, range: VirtRange, raise: Raise<'_>) {
        raise.raise();
        add(&self.counters.page_invalidations, 1);
        #[cfg(feature = "planted-bugs")]
        if hw_model::planted::Bug::StaleEntry.is_planted() {
            return;
        }
        let span = self.page_span(range);
        let hidden = self.hide(state, span);
        add(&self.counters.pages_invalidated, hidden);
    }

    fn unlink_locked(&self, state: &mut State, range: VirtRange) {
        self.unlink_hidden(state, self.page_span(range));
        if let Some(emptied) = self.emptied.as_ref().filter(|_| state.is_empty()) {
            emptied.ring();
        }
    }

    /// Hides the present pages of `span`, and the rest of every huge entry and link unit that reaches into it. Gives how many
    /// pages it hid. The caller holds the state's lock, which is what `state` stands for.
    pub(super) fn hide(&self, state: &mut State, span: std::ops::Range<u64>) -> u64 {
        let span = self.whole_units(state.clamp(span.start, span.end - span.start));
        let mut hidden = 0;
        for (slot, entry) in self.list.slots(span) {
            if entry.is_valid() {
                self.list.store_slot(slot, entry.cleared());
                hidden += slot.pages();
            }
        }
        if hidden > 0 && !forgets_to_flush() {
            // What the device remembers of them goes in the same step, before the drain (invariant 2).
            self.list.flush();
        }
        state.present -= hidden;
        hidden
    }

    /// Unlinks what is linked and hidden in `span`, in runs. The drain has ended.
    pub(super) fn unlink_hidden(&self, state: &mut State, span: std::ops::Range<u64>) {
        let span = self.whole_units(state.clamp(span.start, span.end - span.start));
        let mut run = span.start..span.start;
        for (slot, entry) in self.list.slots(span) {
            if entry.is_valid() || !entry.is_linked() {
                self.unlink_run(state, run);
                run = slot.end()..slot.end();
                continue;
            }
            self.list.store_slot(slot, entry.unlinked());
            run.end = slot.end();
        }
        self.unlink_run(state, run);
    }

    fn unlink_run(&self, state: &mut State, run: std::ops::Range<u64>) {
        let pages = run.end - run.start;
        if pages == 0 {
            return;
        }
        let mapping = self.mapping.as_ref().expect("only mapped devices have linked entries");
        let (offset, len) = (page_bytes(run.start), page_bytes(pages));
        if self.mode != Mode::Pinned {
            // Pages that are units of their own may lie in one leaf with others.
            mapping.split(offset, len).expect("the run lies in the region");
        }
        // Its range is what link was called with: failing means that the page list and the IOMMU disagree.
        mapping.unlink(offset, len).expect("the page list knows what is linked");
        state.linked -= pages;
        add(&self.counters.unlinks, 1);
    }

    /// Grows `span` to the link units it cuts (invariant 4: a unit is unlinked as it was linked).
    fn whole_units(&self, span: std::ops::Range<u64>) -> std::ops::Range<u64> {
        if span.is_empty() || self.mapping.is_none() {
            return span;
        }
        let continues =
            |index: u64| self.list.load(index).is_some_and(|entry| entry.is_linked() && !entry.begins_unit());
        // A huge entry is one step.
        let huge = |index: u64| self.list.huge_slot(index).filter(|slot| self.list.is_whole(*slot));
        let (mut start, mut end) = (span.start, span.end);
        while start > 0 && continues(start) {
            start = huge(start).map(|slot| slot.first()).filter(|first| *first < start).unwrap_or(start - 1);
        }
        while continues(end) {
            end = huge(end).map_or(end + 1, |slot| slot.end());
        }
        start..end
    }
}

/// The planted bug.
fn forgets_to_flush() -> bool {
    #[cfg(feature = "planted-bugs")]
    return hw_model::planted::Bug::StaleTranslation.is_planted();
    #[cfg(not(feature = "planted-bugs"))]
    false
}
