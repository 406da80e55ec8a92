//! One look at pages that several devices want at the same time.
//!
//! Devices that share an address space fault in the same pages when they are given the same buffer. Who looks first looks
//! for all who come meanwhile; they wait and publish what was seen, each in its own region under its own check.
//!
//! Why what another saw may be published: the one who waits took his number before he asked here, and what he gets is
//! given to him only while the number of the one who looked still holds. So between that look's beginning and now no
//! invalidation of these pages has ended, and one that has begun, or begins, is found by his own check. Had he taken his
//! number later than an invalidation that the look did not survive, the other's number would say so.
//!
//! No callback of an invalidation comes here.

use super::Want;
use crate::notifier::{Notifiers, Seq, Sequence};
use crate::page::PageRun;
use hw_model::addr::{PAGE_SIZE, VirtRange, page_bytes};
use hw_model::sync::atomic::{AtomicU64, Ordering};
use hw_model::sync::{Arc, Condvar, Mutex};
use std::fmt;
use std::time::{Duration, Instant};

/// A look at more bytes than this is not waited for: who wants a page of it has it sooner by himself.
const LONGEST: u64 = 2 << 20;

/// The looks that are under way in one address space.
#[derive(Default)]
pub struct Resolutions {
    state: Mutex<State>,
    ended: Condvar,
    joined: AtomicU64,
}

#[derive(Default)]
struct State {
    last: u64,
    looks: Vec<Look>,
}

struct Look {
    id: u64,
    range: VirtRange,
    want: Want,
    sequence: Arc<Sequence>,
    seq: Seq,
    waiters: u32,
    outcome: Outcome,
}

enum Outcome {
    UnderWay,
    Failed,
    Seen(Arc<[PageRun]>),
}

/// Who looks.
pub(super) enum Entered {
    /// The caller; he must [`Resolutions::leave`].
    First(u64),
    /// Another.
    Behind(Waiting),
}

/// What came of another's look.
pub(super) enum Asked {
    UnderWay,
    /// Nothing that can be used.
    Nothing,
    /// The pages.
    Seen,
}

/// A place behind another's look. Dropping it gives it up.
pub(super) struct Waiting {
    notifiers: Arc<Notifiers>,
    id: u64,
}

impl Resolutions {
    /// Looks of one that served another as well.
    #[must_use]
    pub fn joined(&self) -> u64 {
        self.joined.load(Ordering::Relaxed)
    }

    pub(super) fn enter(
        &self,
        notifiers: &Arc<Notifiers>,
        (range, want): (VirtRange, Want),
        sequence: &Arc<Sequence>,
        seq: Seq,
    ) -> Entered {
        let mut state = self.state.lock();
        let serves = |look: &&mut Look| {
            let awaited = look.range.len() <= LONGEST && !matches!(look.outcome, Outcome::Failed);
            awaited && look.range.contains(range) && look.want == want
        };
        if let Some(look) = state.looks.iter_mut().find(serves) {
            look.waiters += 1;
            return Entered::Behind(Waiting { notifiers: Arc::clone(notifiers), id: look.id });
        }
        state.last += 1;
        let (id, sequence) = (state.last, Arc::clone(sequence));
        state.looks.push(Look { id, range, want, sequence, seq, waiters: 0, outcome: Outcome::UnderWay });
        Entered::First(id)
    }

    /// Ends look `id`. `runs`: what it saw, if it saw all of its range.
    pub(super) fn leave(&self, id: u64, runs: Option<&[PageRun]>) {
        let mut state = self.state.lock();
        let Some(index) = state.looks.iter().position(|look| look.id == id) else { return };
        if state.looks[index].waiters == 0 {
            let look = state.looks.swap_remove(index);
            drop(state);
            drop(look);
            return;
        }
        let outcome = runs.map_or(Outcome::Failed, |runs| Outcome::Seen(runs.into()));
        state.looks[index].outcome = outcome;
        drop(state);
        self.ended.notify_all();
    }
}

impl Waiting {
    fn resolutions(&self) -> &Resolutions {
        self.notifiers.resolutions()
    }

    /// Puts the pages of `range` into `out`, if they have been seen and still are what was seen.
    pub(super) fn ask(&self, range: VirtRange, out: &mut Vec<PageRun>) -> Asked {
        let resolutions = self.resolutions();
        let state = resolutions.state.lock();
        let Some(look) = state.looks.iter().find(|look| look.id == self.id) else { return Asked::Nothing };
        let runs = match &look.outcome {
            Outcome::UnderWay => return Asked::UnderWay,
            Outcome::Failed => return Asked::Nothing,
            Outcome::Seen(runs) => Arc::clone(runs),
        };
        if look.sequence.retry(look.seq) {
            return Asked::Nothing;
        }
        drop(state);
        out.clear();
        out.extend(runs.iter().filter_map(|run| part(run, range)));
        resolutions.joined.fetch_add(1, Ordering::Relaxed);
        Asked::Seen
    }

    /// Sleeps until the look has ended, at most for `timeout`. Whether it has.
    pub(super) fn wait(&self, timeout: Duration) -> bool {
        let resolutions = self.resolutions();
        let deadline = Instant::now() + timeout;
        let mut state = resolutions.state.lock();
        loop {
            let look = state.looks.iter().find(|look| look.id == self.id);
            if !look.is_some_and(|look| matches!(look.outcome, Outcome::UnderWay)) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            resolutions.ended.wait_for(&mut state, left);
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut state = self.resolutions().state.lock();
        let Some(index) = state.looks.iter().position(|look| look.id == self.id) else { return };
        state.looks[index].waiters -= 1;
        let is_last = state.looks[index].waiters == 0;
        let is_over = !matches!(state.looks[index].outcome, Outcome::UnderWay);
        // The one who looks takes it off himself while it is under way.
        let gone = (is_last && is_over).then(|| state.looks.swap_remove(index));
        drop(state);
        drop(gone);
    }
}

/// The part of `run` in `range`, whole pages.
fn part(run: &PageRun, range: VirtRange) -> Option<PageRun> {
    let part = run.range().intersection(range)?;
    let skipped = (part.start().0 - run.start.0) / PAGE_SIZE;
    let phys = run.phys.offset(page_bytes(skipped));
    Some(PageRun { start: part.start(), pages: part.page_count(), phys, ..*run })
}

impl fmt::Debug for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Waiting").field(&self.id).finish()
    }
}

impl fmt::Debug for Resolutions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolutions").field("joined", &self.joined()).finish_non_exhaustive()
    }
}
