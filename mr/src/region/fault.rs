//! Making pages of a region present, by a fault, by advice, or at registration.

use super::bringing::Bringing;
use super::core::Core;
use super::counters::add;
use super::publish::PublishError;
use crate::dma::LinkError;
use crate::points;
use hw_model::addr::VirtRange;
use hw_model::hca::Backing;
use hw_model::sync::Arc;
use odp::fault::{FaultFailure, FaultWork, Progress, Publication, RetryCheck, Want};
use odp::notifier::Sequence;
use odp::page::PageRun;
use odp::space::Access;
use std::time::Duration;

/// How long an attempt waits for an invalidation that is in its way.
const INVALIDATION_WAIT: Duration = Duration::from_millis(100);

/// Bytes that one step of bringing a range in covers: bounds the list of runs that is held at a time, and how long the
/// region's lock is held to publish them.
pub(super) const STEP: u64 = 64 << 20;

/// Bytes that the answer to one page-fault event brings in at most. The device asks again for what lies behind.
pub(crate) const WINDOW: u64 = 16 << 20;

/// Attempts at all the pages of a device's fault before it goes on with the first page alone.
const ATTEMPTS: u32 = 20;

impl Core {
    /// Makes the pages of `range`, whole pages of the region, present in steps of bounded size. Gives how many entries it
    /// wrote.
    pub(crate) fn bring(
        self: &Arc<Self>,
        sequence: &Arc<Sequence>,
        range: VirtRange,
        want: Want,
    ) -> Result<u64, FaultFailure<PublishError>> {
        let mut bringing = Bringing::new(self, Arc::clone(sequence), range, want);
        bringing.run()?;
        Ok(bringing.take_published())
    }
}

impl Core {
    /// What kind of page the first of `range`, which lies in the region, is; `None` if it is not there.
    pub(crate) fn backing_at(&self, range: VirtRange) -> Option<Backing> {
        let index = self.page_span(range).next()?;
        let entry = self.list.load(index).expect("a page of the region");
        entry.is_valid().then(|| entry.backing())
    }

    /// Whether the device finds the pages of `range`, which lies in the region, for `want`. A moment's view: it asks again if
    /// they have gone meanwhile.
    pub(crate) fn has(&self, range: VirtRange, want: Want) -> bool {
        let mut span = self.page_span(range);
        span.all(|index| {
            let entry = self.list.load(index).expect("a page of the region");
            if want == Want::Fault(Access::Write) { entry.is_writable() } else { entry.is_valid() }
        })
    }
}

/// A fault on its way to being published in one region.
pub(crate) struct RegionFault {
    core: Arc<Core>,
    work: FaultWork,
    want: Want,
    narrows: bool,
}

impl RegionFault {
    /// Wants the pages that hold `range`, which lies in the region.
    pub(crate) fn new(core: Arc<Core>, sequence: Arc<Sequence>, range: VirtRange, want: Want) -> Self {
        let work = FaultWork::new(sequence, core.whole(range), want);
        Self { core, work, want, narrows: false }
    }

    /// What it brings pages into.
    pub(crate) fn core(&self) -> &Core {
        &self.core
    }

    /// The same with the pages of `around` that lie in the region as neighbours; see [`FaultWork::with_neighbours`].
    pub(crate) fn with_neighbours(self, around: VirtRange) -> Self {
        let wanted = self.work.range();
        let around = self.core.whole(around).intersection(self.core.pages);
        let around = around.filter(|around| around.contains(wanted));
        Self { work: self.work.with_neighbours(around.unwrap_or(wanted)), ..self }
    }

    /// The same for a device that asks again for what is still missing: where the range keeps changing, its first page
    /// alone will do.
    pub(crate) fn narrowing(self) -> Self {
        Self { work: self.work.with_attempts(ATTEMPTS), narrows: true, ..self }
    }

    /// Makes the IO page tables that the links will need, while no lock is held.
    pub(crate) fn prepare(&self) -> Result<(), FaultFailure<PublishError>> {
        let Some(mapping) = &self.core.mapping else { return Ok(()) };
        let range = self.work.around();
        let offset = range.start().0 - self.core.pages.start().0;
        debug_assert_eq!(range.len() % self.core.list.entry_bytes(), 0);
        let failed = |error| match error {
            // Taken down to the end since it was found: nothing is wrong with the pages. Where the key leads to other memory
            // now, the device finds that when it tries again.
            LinkError::Freed { .. } => PublishError::Closing,
            error => PublishError::Link { at: range.start(), error },
        };
        mapping.prepare(offset, range.len()).map_err(|error| FaultFailure::Publish(failed(error)))
    }

    /// One step; never waits. Gives how many entries it wrote.
    pub(crate) fn poll(&mut self) -> Result<Progress<u64>, FaultFailure<PublishError>> {
        let core = &self.core;
        let attempts = self.work.attempts();
        let progress = self.work.poll(&*core.space, |runs, check| publication(core, runs, &check));
        match progress {
            Err(FaultFailure::Unsettled { range, attempts: made }) => {
                add(&self.core.counters.fault_retries, u64::from(made - attempts));
                self.narrow(range, made).map(|()| Progress::Again)
            }
            Err(FaultFailure::Publish(_)) if self.leave_neighbours() => Ok(Progress::Again),
            progress => {
                add(&self.core.counters.fault_retries, u64::from(self.work.attempts() - attempts));
                progress
            }
        }
    }

    /// Steps to the end, waiting where an invalidation is in the way. Gives how many entries it wrote.
    pub(crate) fn run(&mut self) -> Result<u64, FaultFailure<PublishError>> {
        loop {
            let core = &self.core;
            let publish = |runs: &[PageRun], check: RetryCheck<'_>| publication(core, runs, &check);
            match self.work.run(&*core.space, INVALIDATION_WAIT, publish) {
                Err(FaultFailure::Unsettled { range, attempts }) => {
                    add(&self.core.counters.fault_retries, u64::from(attempts));
                    self.narrow(range, attempts)?;
                }
                Err(FaultFailure::Publish(_)) if self.leave_neighbours() => {}
                outcome => {
                    add(&self.core.counters.fault_retries, u64::from(self.work.attempts()));
                    return outcome;
                }
            }
        }
    }

    /// Goes on with what is wanted alone, if there were neighbours: one that the device has no way to is no reason to fail.
    fn leave_neighbours(&mut self) -> bool {
        let range = self.work.range();
        let had = self.work.around() != range;
        if had {
            self.work.restart(range, self.want);
        }
        had
    }

    /// Goes on with the first page alone, if that will do and there were more.
    fn narrow(&mut self, range: VirtRange, attempts: u32) -> Result<(), FaultFailure<PublishError>> {
        let least = self.core.list.entry_bytes();
        if !self.narrows || range.len() <= least {
            return Err(FaultFailure::Unsettled { range, attempts });
        }
        let first = VirtRange::new(range.start(), least).expect("part of a range");
        self.work.restart(first, self.want);
        Ok(())
    }
}

fn publication(
    core: &Core,
    runs: &[PageRun],
    check: &RetryCheck<'_>,
) -> Result<Publication<u64>, PublishError> {
    let _ = core.device.points().meet(points::PUBLISH);
    let published = core.publish(runs, || !check.retry())?;
    Ok(published.map_or(Publication::Retry, Publication::Published))
}
