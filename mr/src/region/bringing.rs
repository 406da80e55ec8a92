//! Bringing a range of a region in as a value that can be stepped: [`Core::bring`] for one thread that steps everything.

use super::core::Core;
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
    fault: Option<RegionFault>,
}

impl Bringing {
    pub(crate) fn new(core: &Arc<Core>, sequence: Arc<Sequence>, range: VirtRange, want: Want) -> Self {
        Self { core: Arc::clone(core), sequence, left: range, want, fault: None }
    }

    /// One step; never waits.
    pub(crate) fn poll(&mut self) -> Result<Progress<()>, FaultFailure<PublishError>> {
        let Some(fault) = &mut self.fault else {
            if self.left.is_empty() {
                return Ok(Progress::Done(()));
            }
            let part = self.part(0, STEP.min(self.left.len()));
            let fault = RegionFault::new(&self.core, Arc::clone(&self.sequence), part, self.want);
            fault.prepare()?;
            self.fault = Some(fault);
            return Ok(Progress::Again);
        };
        match fault.poll()? {
            Progress::Blocked => Ok(Progress::Blocked),
            Progress::Again => Ok(Progress::Again),
            Progress::Done(_) => {
                self.fault = None;
                let done = STEP.min(self.left.len());
                self.left = self.part(done, self.left.len() - done);
                Ok(Progress::Again)
            }
        }
    }

    fn part(&self, offset: u64, len: u64) -> VirtRange {
        VirtRange::new(self.left.start().offset(offset), len).expect("part of a range")
    }
}
