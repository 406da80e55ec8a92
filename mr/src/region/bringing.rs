//! Bringing a range of a region in as a value that can be stepped: [`Core::bring`] for one thread that steps everything.

use super::core::Core;
use super::counters::Counters;
use super::fault::{RegionFault, STEP};
use super::publish::PublishError;
use hw_model::addr::VirtRange;
use hw_model::sync::Arc;
use odp::fault::{FaultFailure, Progress, Want};
use odp::notifier::Sequence;

/// Whole pages of a region on their way in.
pub(crate) struct Bringing {
    core: Arc<Core>,
    sequence: Arc<Sequence>,
    left: VirtRange,
    want: Want,
    /// Bytes brought in at a time.
    step: u64,
    published: u64,
    skips: bool,
    fault: Option<RegionFault>,
}

impl Bringing {
    pub(crate) fn new(core: &Arc<Core>, sequence: Arc<Sequence>, range: VirtRange, want: Want) -> Self {
        Self {
            core: Arc::clone(core),
            sequence,
            left: range,
            want,
            step: STEP,
            published: 0,
            skips: false,
            fault: None,
        }
    }

    /// The same in steps of `step` bytes, whole pages.
    pub(crate) fn in_steps_of(self, step: u64) -> Self {
        Self { step, ..self }
    }

    /// The same without another look at steps of which all pages are there.
    pub(crate) fn skipping_present(self) -> Self {
        Self { skips: true, ..self }
    }

    /// Skips steps that need nothing.
    fn skip(&mut self) {
        let step = self.step;
        while self.skips && !self.left.is_empty() {
            let part = self.part(0, step.min(self.left.len()));
            if !self.core.has(part, self.want) {
                return;
            }
            self.advance();
        }
    }

    /// The counters of its region.
    pub(crate) fn counters(&self) -> &Counters {
        &self.core.counters
    }

    /// Entries written since this was asked last.
    pub(crate) fn take_published(&mut self) -> u64 {
        std::mem::take(&mut self.published)
    }

    /// Polls to the end, waiting where an invalidation is in the way.
    pub(crate) fn run(&mut self) -> Result<(), FaultFailure<PublishError>> {
        loop {
            self.skip();
            if self.left.is_empty() {
                return Ok(());
            }
            let part = self.part(0, self.step.min(self.left.len()));
            let mut fault =
                RegionFault::new(Arc::clone(&self.core), Arc::clone(&self.sequence), part, self.want);
            fault.prepare()?;
            self.published += fault.run()?;
            self.advance();
        }
    }

    fn advance(&mut self) {
        let done = self.step.min(self.left.len());
        self.left = self.part(done, self.left.len() - done);
    }

    /// One step; never waits.
    pub(crate) fn poll(&mut self) -> Result<Progress<()>, FaultFailure<PublishError>> {
        if self.fault.is_none() {
            self.skip();
        }
        let Some(fault) = &mut self.fault else {
            if self.left.is_empty() {
                return Ok(Progress::Done(()));
            }
            let part = self.part(0, self.step.min(self.left.len()));
            let fault = RegionFault::new(Arc::clone(&self.core), Arc::clone(&self.sequence), part, self.want);
            fault.prepare()?;
            self.fault = Some(fault);
            return Ok(Progress::Again);
        };
        match fault.poll()? {
            Progress::Blocked => Ok(Progress::Blocked),
            Progress::Again => Ok(Progress::Again),
            Progress::Done(published) => {
                self.fault = None;
                self.published += published;
                self.advance();
                Ok(Progress::Again)
            }
        }
    }

    fn part(&self, offset: u64, len: u64) -> VirtRange {
        VirtRange::new(self.left.start().offset(offset), len).expect("part of a range")
    }
}
