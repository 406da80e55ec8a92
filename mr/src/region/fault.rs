//! Making pages of a region present, by a fault, by advice, or at registration.

use super::core::Core;
use super::counters::add;
use super::publish::PublishError;
use hw_model::addr::{PAGE_SIZE, VirtRange};
use hw_model::sync::Arc;
use odp::fault::{FaultFailure, FaultWork, Progress, Publication, Want};
use odp::notifier::Sequence;
use std::time::Duration;

/// How long an attempt waits for an invalidation that is in its way.
const INVALIDATION_WAIT: Duration = Duration::from_millis(100);

/// Bytes that one step of bringing a range in covers: bounds the list of runs that is held at a time.
const STEP: u64 = 64 << 20;

impl Core {
    /// Makes the pages of `range`, whole pages of the region, present in steps of bounded size.
    pub(crate) fn bring(
        self: &Arc<Self>,
        sequence: &Arc<Sequence>,
        range: VirtRange,
        want: Want,
    ) -> Result<(), FaultFailure<PublishError>> {
        let mut done = 0;
        while done < range.len() {
            let len = STEP.min(range.len() - done);
            let part = VirtRange::new(range.start().offset(done), len).expect("part of a range");
            let mut fault = RegionFault::new(self, Arc::clone(sequence), part, want);
            fault.prepare()?;
            fault.run()?;
            done += len;
        }
        Ok(())
    }
}

/// A fault on its way to being published in one region.
pub(crate) struct RegionFault {
    core: Arc<Core>,
    work: FaultWork,
}

impl RegionFault {
    /// Wants the pages that hold `range`, which lies in the region.
    pub(crate) fn new(core: &Arc<Core>, sequence: Arc<Sequence>, range: VirtRange, want: Want) -> Self {
        Self { core: Arc::clone(core), work: FaultWork::new(sequence, range.page_aligned(), want) }
    }

    /// Makes the IO page tables that the links will need, while no lock is held.
    pub(crate) fn prepare(&self) -> Result<(), FaultFailure<PublishError>> {
        let Some(mapping) = &self.core.mapping else { return Ok(()) };
        let range = self.work.range();
        let offset = range.start().0 - self.core.pages.start().0;
        debug_assert_eq!(range.len() % PAGE_SIZE, 0);
        mapping
            .prepare(offset, range.len())
            .map_err(|error| FaultFailure::Publish(PublishError::Link { at: range.start(), error }))
    }

    /// One step; never waits.
    pub(crate) fn poll(&mut self) -> Result<Progress<()>, FaultFailure<PublishError>> {
        let core = &self.core;
        let attempts = self.work.attempts();
        let progress = self.work.poll(&*core.space, |runs, check| publication(core, runs, &check));
        add(&core.counters.fault_retries, u64::from(self.work.attempts() > attempts));
        progress
    }

    /// Steps to the end, waiting where an invalidation is in the way.
    pub(crate) fn run(&mut self) -> Result<(), FaultFailure<PublishError>> {
        let core = &self.core;
        let outcome =
            self.work.run(&*core.space, INVALIDATION_WAIT, |runs, check| publication(core, runs, &check));
        add(&core.counters.fault_retries, u64::from(self.work.attempts()));
        outcome
    }
}

fn publication(
    core: &Core,
    runs: &[odp::page::PageRun],
    check: &odp::fault::RetryCheck<'_>,
) -> Result<Publication<()>, PublishError> {
    Ok(if core.publish(runs, || !check.retry())? { Publication::Published(()) } else { Publication::Retry })
}
