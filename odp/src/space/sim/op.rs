//! A change that takes pages away, as a value that can be stepped.

use super::change::{Change, SpaceChange};
use super::host::SimHost;
use super::kernel::{Kernel, MmId};
use super::object_change::ObjectChange;
use super::process::SimSpace;
use super::span::Span;
use crate::notifier::{Cannot, Invalidation, Notifiers};
use crate::space::FaultError;
use hw_model::addr::{VirtAddr, VirtRange};
use hw_model::sync::Arc;

/// A change under way: invalidations have begun, nothing has changed yet. [`SimOp::poll`] until it is ready, then
/// [`SimOp::finish`]; or [`SimOp::run`]. Dropped, it changes nothing.
#[derive(Debug)]
#[must_use = "an operation that is not finished changes nothing"]
pub struct SimOp {
    host: Arc<SimHost>,
    pending: Pending,
}

/// What an operation came to.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Pages that were changed: unmapped, moved, copied, …; huge pages for a split or collapse.
    pub pages: u64,
    /// Where the new mapping is, for those that make one.
    pub at: Option<VirtRange>,
    /// The new process, for a fork.
    pub child: Option<Arc<SimSpace>>,
    /// Whose pages were lost, for memory that failed: what a SIGBUS tells a process.
    pub lost: Vec<(MmId, VirtAddr)>,
}

/// Why an operation did not happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SimError {
    /// Part of the range is not mapped.
    #[error("nothing is mapped at {at}")]
    NotMapped {
        /// First address that is not.
        at: VirtAddr,
    },
    /// The range is empty, not of whole pages, beyond user space, or cuts a huge page that cannot be cut.
    #[error("{range} cannot be a range of this operation")]
    BadRange {
        /// The range asked for.
        range: VirtRange,
    },
    /// A mapping that would pass the end of the address space.
    #[error("{pages} pages at {at} do not fit in the address space")]
    TooLong {
        /// Where it was to begin.
        at: VirtAddr,
        /// Its length in pages.
        pages: u64,
    },
    /// Pages that the object does not have, or that cut one of its huge pages.
    #[error("pages {first}..{end} of an object of {pages} pages")]
    BadPages {
        /// First page asked for.
        first: u64,
        /// One past the last page asked for.
        end: u64,
        /// Pages of the object.
        pages: u64,
    },
    /// The mapping or object is of a kind that this operation does not apply to.
    #[error("the operation does not apply to what is at {at}")]
    WrongKind {
        /// Where, or 0 for an object.
        at: VirtAddr,
    },
    /// The host has no frame, huge page, address range or device page left, and nothing was changed.
    #[error("out of memory, nothing was changed")]
    OutOfMemory,
    /// The object or device memory does not exist, or the process has ended.
    #[error("no such object, device memory or process")]
    Gone,
    /// A change that may not wait would have had to: a device moves data there, or its driver is busy with it.
    #[error("{range} cannot be changed without waiting for a device")]
    WouldWait {
        /// What it would have had to wait for.
        range: VirtRange,
    },
    /// A fault on the way failed.
    #[error(transparent)]
    Fault(#[from] FaultError),
}

/// What a change did, before it is given to the user.
#[derive(Clone, Debug, Default)]
pub(super) struct Applied {
    pub pages: u64,
    pub at: Option<VirtRange>,
    pub child: Option<MmId>,
    pub lost: Vec<(MmId, VirtAddr)>,
}

impl Applied {
    pub fn pages(pages: u64) -> Self {
        Self { pages, ..Self::default() }
    }

    fn outcome(self, host: &Arc<SimHost>) -> Outcome {
        let Self { pages, at, child, lost } = self;
        Outcome { pages, at, child: child.map(|mm| SimSpace::of(host, mm)), lost }
    }
}

/// The operation without its host, so that a host can keep some.
#[derive(Debug)]
pub(super) struct Pending {
    pub change: Change,
    held: Vec<Held>,
}

#[derive(Debug)]
struct Held {
    mm: MmId,
    span: Span,
    invalidation: Invalidation,
}

impl Pending {
    pub fn begin(host: &SimHost, change: Change) -> Result<Self, SimError> {
        let mut pending = Self { change, held: Vec::new() };
        pending.cover(host)?;
        Ok(pending)
    }

    /// Makes a change that may not wait.
    pub fn at_once(host: &SimHost, change: Change) -> Result<Applied, SimError> {
        let mut pending = Self { change, held: Vec::new() };
        loop {
            let event = pending.change.event();
            pending.cover_by(host, |notifiers, range| notifiers.try_begin_event(range, event))?;
            if let Some(applied) = pending.apply(host)? {
                return applied;
            }
        }
    }

    /// Begins what invalidations are missing; whether none was.
    fn cover(&mut self, host: &SimHost) -> Result<bool, SimError> {
        let event = self.change.event();
        self.cover_by(host, |notifiers, range| Ok(notifiers.begin_event(range, event)))
    }

    fn cover_by(
        &mut self,
        host: &SimHost,
        begin: impl Fn(&Arc<Notifiers>, VirtRange) -> Result<Invalidation, Cannot>,
    ) -> Result<bool, SimError> {
        let missing: Vec<_> = {
            let kernel = host.kernel.lock();
            let missing = self.missing(&kernel)?;
            let notifiers = |mm| kernel.mm(mm).map(|mm| Arc::clone(&mm.notifiers));
            missing.into_iter().filter_map(|(mm, span)| Some((mm, span, notifiers(mm)?))).collect()
        };
        for (mm, span, notifiers) in &missing {
            let begun = begin(notifiers, span.range());
            let invalidation = begun.map_err(|Cannot { range }| SimError::WouldWait { range })?;
            self.held.push(Held { mm: *mm, span: *span, invalidation });
        }
        Ok(missing.is_empty())
    }

    /// What the change affects and no invalidation of ours covers, joined where it touches. An operation never takes more
    /// than a few places in a process's table of invalidations: scattered pages are covered by one span.
    fn missing(&self, kernel: &Kernel) -> Result<Vec<(MmId, Span)>, SimError> {
        const APART: usize = 4;
        let mut missing = self.change.affected(kernel)?;
        missing.retain(|(mm, span)| {
            let covered = |held: &Held| held.mm == *mm && held.span.contains(*span);
            !span.is_empty() && !self.held.iter().any(covered)
        });
        missing.sort_by_key(|(mm, span)| (*mm, span.first));
        join(&mut missing, |earlier, later| later.first <= earlier.end);
        let scattered = |mm: MmId, all: &[(MmId, Span)]| all.iter().filter(|one| one.0 == mm).count() > APART;
        let many: Vec<MmId> = missing.iter().map(|one| one.0).filter(|mm| scattered(*mm, &missing)).collect();
        let (mut spans, few) = missing.into_iter().partition(|one: &(MmId, Span)| many.contains(&one.0));
        join(&mut spans, |_, _| true);
        spans.extend::<Vec<_>>(few);
        Ok(spans)
    }

    /// Whether the change may be made now. Never waits, unless for room among a process's invalidations.
    pub fn poll(&mut self, host: &SimHost) -> bool {
        // All of them, every time: each unlinks as soon as it can.
        let waiting =
            self.held.iter_mut().filter_map(|held| (!held.invalidation.poll()).then_some(())).count();
        // What fails here fails again, and is told, when it is finished.
        waiting == 0 && self.cover(host).unwrap_or(true)
    }

    pub fn wait(&mut self, host: &SimHost) {
        while !self.poll(host) {
            self.held.iter_mut().for_each(|held| held.invalidation.wait());
        }
    }

    pub fn finish(mut self, host: &SimHost) -> Result<Applied, SimError> {
        loop {
            self.wait(host);
            if let Some(applied) = self.apply(host)? {
                return applied;
            }
        }
    }

    /// Makes the change, if all that it affects is covered, and ends the invalidations, which are ready.
    fn apply(&mut self, host: &SimHost) -> Result<Option<Result<Applied, SimError>>, SimError> {
        let mut kernel = host.kernel.lock();
        if !self.missing(&kernel)?.is_empty() {
            return Ok(None);
        }
        let applied = self.change.apply(&mut kernel);
        drop(kernel);
        self.held.drain(..).for_each(|held| held.invalidation.end());
        Ok(Some(applied))
    }
}

/// Joins neighbours of the same process that `belong` together.
fn join(spans: &mut Vec<(MmId, Span)>, belong: impl Fn(Span, Span) -> bool) {
    spans.dedup_by(|later, earlier| {
        let together = later.0 == earlier.0 && belong(earlier.1, later.1);
        if together {
            earlier.1 = earlier.1.hull(later.1);
        }
        together
    });
}

impl SimOp {
    pub(super) fn begin(host: &Arc<SimHost>, change: Change) -> Result<Self, SimError> {
        Ok(Self { host: Arc::clone(host), pending: Pending::begin(host, change)? })
    }

    /// Whether [`SimOp::finish`] will not wait. Never waits itself.
    pub fn poll(&mut self) -> bool {
        self.pending.poll(&self.host)
    }

    /// Makes the change and ends the invalidations. Waits if it is not ready.
    ///
    /// # Errors
    /// See [`SimError`]; nothing was changed then.
    pub fn finish(self) -> Result<Outcome, SimError> {
        let Self { host, pending } = self;
        Ok(pending.finish(&host)?.outcome(&host))
    }

    /// Waits for devices and makes the change.
    ///
    /// # Errors
    /// See [`SimError`]; nothing was changed then.
    pub fn run(self) -> Result<Outcome, SimError> {
        self.finish()
    }

    pub(super) fn at_once(host: &Arc<SimHost>, change: Change) -> Result<Outcome, SimError> {
        Ok(Pending::at_once(host, change)?.outcome(host))
    }

    /// What it will do to a process, if it does something to one.
    #[must_use]
    pub fn space_change(&self) -> Option<SpaceChange> {
        match &self.pending.change {
            Change::Space(_, change) => Some(*change),
            _ => None,
        }
    }

    /// What it will do to an object, if it does something to one.
    #[must_use]
    pub fn object_change(&self) -> Option<ObjectChange> {
        match &self.pending.change {
            Change::Object(change) => Some(*change),
            _ => None,
        }
    }
}
