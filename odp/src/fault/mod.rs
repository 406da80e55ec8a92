//! The fault handler's core: pages of a range, seen at a sequence number that still holds when they are published.
//!
//! One [`FaultWork`] goes **begin** (take the number) → **resolve** (ask the address space, no lock held) → **publish**
//! (the caller takes its lock, checks the number, stores what was seen) and back to begin whenever an invalidation came in
//! between. [`FaultWork::poll`] does one of these steps and never waits, so that one thread can put anything between two of
//! them; [`FaultWork::run`] is the loop around it for a thread that may wait.
//!
//! Kernel: the loop in Documentation/mm/hmm.rst around `hmm_range_fault`, and `ib_umem_odp_map_dma_and_lock` in
//! drivers/infiniband/core/umem_odp.c, which loops for as long as it takes. This one ends, and says why.

use crate::notifier::{Seq, Sequence};
use crate::page::PageRun;
use crate::space::{Access, AddressSpace, FaultError};
use hw_model::addr::VirtRange;
use hw_model::sync::{Arc, thread};
use std::time::Duration;

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
    want: Want,
    stage: Stage,
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
            want: want.into(),
            stage: Stage::Begin,
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

    /// Starts over for other pages of the same interval, keeping the buffer.
    pub fn restart(&mut self, range: VirtRange, want: impl Into<Want>) {
        (self.range, self.want, self.stage, self.attempts) = (range, want.into(), Stage::Begin, 0);
    }

    /// The pages wanted.
    #[must_use]
    pub fn range(&self) -> VirtRange {
        self.range
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
            Stage::Resolve(seq) => {
                self.runs.clear();
                let resolved = match self.want {
                    Want::Fault(access) => space.fault(self.range, access, &mut self.runs),
                    Want::Snapshot => space.snapshot(self.range, &mut self.runs),
                };
                match resolved {
                    Ok(()) => {
                        self.stage = Stage::Publish(seq);
                        #[cfg(feature = "planted-bugs")]
                        {
                            self.decided = self.sequence.retry(seq);
                        }
                        Ok(Progress::Again)
                    }
                    // What failed may have failed because the range was changing: the number decides.
                    Err(FaultError::Busy { .. }) => self.again(),
                    Err(_) if self.sequence.retry(seq) => self.again(),
                    Err(error) => {
                        self.stage = Stage::Begin;
                        Err(FaultFailure::Space(error))
                    }
                }
            }
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
        self.stage = Stage::Begin;
        self.attempts += 1;
        if self.attempts < self.limit {
            return Ok(Progress::Again);
        }
        let failure = FaultFailure::Unsettled { range: self.range, attempts: self.attempts };
        self.attempts = 0;
        Err(failure)
    }
}
