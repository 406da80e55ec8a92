//! The fault handler's core: pages of a range, seen at a sequence number that still holds when they are published.
//!
//! One [`FaultWork`] goes **begin** (take the number) → **resolve** (ask the address space, no lock held) → **publish**
//! (the caller takes its lock, checks the number, stores what was seen) and back to begin whenever an invalidation came in
//! between. [`FaultWork::poll`] does one of these steps and never waits, so that one thread can put anything between two of
//! them; [`FaultWork::run`] is the loop around it for a thread that may wait.
//!
//! What is wanted may have neighbours: pages around it that are brought in with it, in the same look, as far as they can be
//! had, and never a reason to fail. Several who want the same pages at one time look once; see `joint`.
//!
//! Kernel: the loop in Documentation/mm/hmm.rst around `hmm_range_fault`, and `ib_umem_odp_map_dma_and_lock` in
//! drivers/infiniband/core/umem_odp.c, which loops for as long as it takes. This one ends, and says why.

use crate::notifier::{Seq, Sequence};
use crate::page::PageRun;
use crate::space::{Access, AddressSpace, FaultError};
use hw_model::addr::VirtRange;
use hw_model::sync::{Arc, thread};
use joint::{Asked, Entered, Waiting};
use std::time::Duration;

mod joint;

pub use joint::Resolutions;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;

/// Attempts before a fault gives up, unless told otherwise.
pub const DEFAULT_ATTEMPTS: u32 = 100;

/// What to get of the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Want {
    /// Every page, faulted in for this access.
    Fault(Access),
    /// The pages that are present, faulting none in. Registration and the no-fault advice want this.
    Snapshot,
}

impl From<Access> for Want {
    fn from(access: Access) -> Self {
        Self::Fault(access)
    }
}

/// One fault, or snapshot, on its way. It can be used again with [`FaultWork::restart`], which keeps its buffer.
#[derive(Debug)]
pub struct FaultWork {
    sequence: Arc<Sequence>,
    range: VirtRange,
    /// It and its neighbours.
    around: VirtRange,
    want: Want,
    stage: Stage,
    /// Another looks at the pages.
    waiting: Option<Waiting>,
    /// Waiting for another came to nothing.
    alone: bool,
    attempts: u32,
    limit: u32,
    runs: Vec<PageRun>,
    /// Whether the pages were good when they had been looked at: asked outside the lock.
    #[cfg(feature = "planted-bugs")]
    decided: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Begin,
    Resolve(Seq),
    Publish(Seq),
}

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Progress<T> {
    /// An invalidation runs on the interval: nothing was done. Poll again when it may have ended.
    Blocked,
    /// A step was done; there is another.
    Again,
    /// Published. What the publisher gave.
    Done(T),
}

/// What the publisher did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Publication<T> {
    /// Stored all of it.
    Published(T),
    /// [`RetryCheck::retry`] said so: stored nothing.
    Retry,
}

/// The question to ask under the owner's lock, before anything is stored.
#[derive(Clone, Copy, Debug)]
pub struct RetryCheck<'a> {
    sequence: &'a Sequence,
    seq: Seq,
    /// What was decided outside the lock.
    #[cfg(feature = "planted-bugs")]
    decided: Option<bool>,
}

impl RetryCheck<'_> {
    /// Whether an invalidation has begun since the pages were looked at; see [`Sequence::retry`].
    #[must_use]
    pub fn retry(&self) -> bool {
        #[cfg(feature = "planted-bugs")]
        if let Some(decided) = self.decided {
            return decided;
        }
        self.sequence.retry(self.seq)
    }
}

/// Why a fault ended without being published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FaultFailure<E> {
    /// The range changed under every attempt.
    #[error("{range} changed under each of {attempts} attempts to fault it in")]
    Unsettled {
        /// The range.
        range: VirtRange,
        /// Attempts made.
        attempts: u32,
    },
    /// The address space cannot give the pages.
    #[error(transparent)]
    Space(FaultError),
    /// The publisher refused.
    #[error("the pages could not be published")]
    Publish(#[source] E),
}

impl FaultWork {
    /// Work for `range` (whole pages) of the interval that `sequence` belongs to; an [`Access`] is a [`Want`].
    #[must_use]
    pub fn new(sequence: Arc<Sequence>, range: VirtRange, want: impl Into<Want>) -> Self {
        Self {
            sequence,
            range,
            around: range,
            want: want.into(),
            stage: Stage::Begin,
            waiting: None,
            alone: false,
            attempts: 0,
            limit: DEFAULT_ATTEMPTS,
            runs: Vec::new(),
            #[cfg(feature = "planted-bugs")]
            decided: false,
        }
    }

    /// The same with `limit` attempts, at least one.
    #[must_use]
    pub fn with_attempts(mut self, limit: u32) -> Self {
        self.limit = limit.max(1);
        self
    }

    /// The same with its neighbours: `around` holds the range, in whole pages of the interval. What cannot be had of it
    /// besides the range is left out.
    #[must_use]
    pub fn with_neighbours(mut self, around: VirtRange) -> Self {
        debug_assert!(around.contains(self.range), "{around} is not around {}", self.range);
        self.around = around;
        self
    }

    /// Starts over for other pages of the same interval, without neighbours, keeping the buffer.
    pub fn restart(&mut self, range: VirtRange, want: impl Into<Want>) {
        (self.range, self.around, self.want) = (range, range, want.into());
        (self.stage, self.attempts, self.waiting, self.alone) = (Stage::Begin, 0, None, false);
    }

    /// The pages wanted.
    #[must_use]
    pub fn range(&self) -> VirtRange {
        self.range
    }

    /// The pages wanted, and their neighbours.
    #[must_use]
    pub fn around(&self) -> VirtRange {
        self.around
    }

    /// Attempts that came to nothing so far.
    #[must_use]
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// Does one step. In the publishing step `publish` is called with the pages in ascending order: it takes the lock that
    /// the interval's callbacks take, asks the check, and stores, all under that lock.
    ///
    /// # Errors
    /// See [`FaultFailure`]. The work is back at its beginning then.
    pub fn poll<T, E>(
        &mut self,
        space: &dyn AddressSpace,
        publish: impl FnOnce(&[PageRun], RetryCheck<'_>) -> Result<Publication<T>, E>,
    ) -> Result<Progress<T>, FaultFailure<E>> {
        match self.stage {
            Stage::Begin => {
                let Some(seq) = self.sequence.begin() else { return Ok(Progress::Blocked) };
                self.stage = Stage::Resolve(seq);
                Ok(Progress::Again)
            }
            Stage::Resolve(seq) => self.resolve(space, seq),
            Stage::Publish(seq) => {
                self.stage = Stage::Begin;
                let check = RetryCheck {
                    sequence: &self.sequence,
                    seq,
                    #[cfg(feature = "planted-bugs")]
                    decided: hw_model::planted::Bug::DecisionOutsideLock.is_planted().then_some(self.decided),
                };
                match publish(&self.runs, check) {
                    Ok(Publication::Published(done)) => Ok(Progress::Done(done)),
                    Ok(Publication::Retry) => self.again(),
                    Err(error) => Err(FaultFailure::Publish(error)),
                }
            }
        }
    }

    /// Looks at the pages, or takes what another sees.
    fn resolve<T, E>(&mut self, space: &dyn AddressSpace, seq: Seq) -> Result<Progress<T>, FaultFailure<E>> {
        let notifiers = space.notifiers();
        let resolutions = notifiers.resolutions();
        if let Some(waiting) = &self.waiting {
            match waiting.ask(self.around, &mut self.runs) {
                Asked::UnderWay => return Ok(Progress::Blocked),
                Asked::Seen if covers(&self.runs, self.range) => {
                    self.waiting = None;
                    return Ok(self.seen(seq));
                }
                Asked::Seen | Asked::Nothing => (self.waiting, self.alone) = (None, true),
            }
        }
        let mut looking = None;
        if !self.alone && self.want != Want::Snapshot {
            match resolutions.enter(notifiers, (self.around, self.want), &self.sequence, seq) {
                Entered::First(id) => looking = Some(Looking { resolutions, id }),
                Entered::Behind(waiting) => {
                    self.waiting = Some(waiting);
                    return Ok(Progress::Blocked);
                }
            }
        }
        let looked = self.look(space);
        if let Some(looking) = looking {
            looking.end(looked.is_ok().then_some(&self.runs));
        }
        match looked {
            Ok(()) => Ok(self.seen(seq)),
            // What failed may have failed because the range was changing: the number decides.
            Err(FaultError::Busy { .. }) => self.again(),
            Err(_) if self.sequence.retry(seq) => self.again(),
            Err(error) => {
                self.stage = Stage::Begin;
                Err(FaultFailure::Space(error))
            }
        }
    }

    fn seen<T>(&mut self, seq: Seq) -> Progress<T> {
        self.stage = Stage::Publish(seq);
        #[cfg(feature = "planted-bugs")]
        {
            self.decided = self.sequence.retry(seq);
        }
        Progress::Again
    }

    /// The range must be had; its neighbours are taken as far as they come with it.
    fn look(&mut self, space: &dyn AddressSpace) -> Result<(), FaultError> {
        self.runs.clear();
        let access = match self.want {
            Want::Snapshot => return space.snapshot(self.around, &mut self.runs),
            Want::Fault(access) => access,
        };
        let looked = space.fault(self.around, access, &mut self.runs);
        if looked.is_ok() || self.around == self.range || covers(&self.runs, self.range) {
            return looked.or_else(|error| if self.around == self.range { Err(error) } else { Ok(()) });
        }
        self.runs.clear();
        space.fault(self.range, access, &mut self.runs)
    }

    /// Polls to the end. Each time an invalidation is in the way it waits for at most `wait`; a wait in vain is an attempt,
    /// so that the whole is bounded by attempts × `wait`, apart from the address space's own work.
    ///
    /// # Errors
    /// See [`FaultFailure`].
    pub fn run<T, E>(
        &mut self,
        space: &dyn AddressSpace,
        wait: Duration,
        mut publish: impl FnMut(&[PageRun], RetryCheck<'_>) -> Result<Publication<T>, E>,
    ) -> Result<T, FaultFailure<E>> {
        loop {
            let attempts = self.attempts;
            match self.poll(space, &mut publish)? {
                Progress::Done(done) => return Ok(done),
                Progress::Again if self.attempts > attempts => thread::yield_now(),
                Progress::Again => {}
                Progress::Blocked if self.waiting.is_some() => {
                    if !self.waiting.as_ref().is_some_and(|waiting| waiting.wait(wait)) {
                        (self.waiting, self.alone) = (None, true);
                    }
                }
                Progress::Blocked => {
                    if space.notifiers().begin_blocking(&self.sequence, wait).is_none() {
                        self.again::<T, E>().map(drop)?;
                    }
                }
            }
        }
    }

    /// An attempt came to nothing.
    fn again<T, E>(&mut self) -> Result<Progress<T>, FaultFailure<E>> {
        (self.stage, self.waiting, self.alone) = (Stage::Begin, None, false);
        self.attempts += 1;
        if self.attempts < self.limit {
            return Ok(Progress::Again);
        }
        let failure = FaultFailure::Unsettled { range: self.range, attempts: self.attempts };
        self.attempts = 0;
        Err(failure)
    }
}

/// A look that others may wait for. Dropped without an end it came to nothing.
struct Looking<'a> {
    resolutions: &'a Resolutions,
    id: u64,
}

impl Looking<'_> {
    fn end(self, runs: Option<&Vec<PageRun>>) {
        self.resolutions.leave(self.id, runs.map(Vec::as_slice));
        std::mem::forget(self);
    }
}

impl Drop for Looking<'_> {
    fn drop(&mut self) {
        self.resolutions.leave(self.id, None);
    }
}

/// Whether `runs`, in ascending order, hold every page of `range`.
fn covers(runs: &[PageRun], range: VirtRange) -> bool {
    let mut at = range.start();
    for run in runs.iter().map(PageRun::range).filter(|run| run.end() > range.start()) {
        if run.start() > at || at >= range.end() {
            break;
        }
        at = run.end();
    }
    at >= range.end()
}
