//! Page-fault events of the modelled HCA, from the event to its answer.

use super::ModelDevice;
use super::region::FaultTarget;
use crate::points;
use crate::region::PublishError;
use crate::region::RegionFault;
use crate::region::counters::add;
use hw_model::hca::{FaultAccess, FaultOutcome, Hca, PageFault};
use hw_model::sync::Arc;
use hw_model::sync::atomic::{AtomicBool, Ordering};
use odp::fault::{FaultFailure, Progress, Want};
use odp::space::Access;
use std::thread::JoinHandle;
use std::time::Duration;

/// How long the service sleeps at a time when nobody needs it.
const LONG: Duration = Duration::from_secs(3600);

/// One page-fault event on its way to its answer.
pub struct FaultJob {
    device: Arc<ModelDevice>,
    event: PageFault,
    work: Option<Work>,
    answered: bool,
}

struct Work {
    target: FaultTarget,
    fault: RegionFault,
    prepared: bool,
}

impl FaultJob {
    pub(super) fn new(device: &Arc<ModelDevice>, event: PageFault) -> Self {
        let access = match event.access {
            FaultAccess::Read => Access::Read,
            FaultAccess::Write => Access::Write,
        };
        let _ = device.dma().points().meet(points::FAULT);
        let work = device.fault_target(event.key).and_then(|target| {
            add(&target.core.counters.page_faults, 1);
            let range = target.memory_of(event.address, event.length)?;
            let fault =
                RegionFault::new(&target.core, Arc::clone(&target.sequence), range, Want::Fault(access));
            Some(Work { target, fault: fault.narrowing(), prepared: false })
        });
        Self { device: Arc::clone(device), event, work, answered: false }
    }

    /// The event.
    #[must_use]
    pub fn event(&self) -> &PageFault {
        &self.event
    }

    /// One step; never waits. Once it says `Done` the HCA has its answer.
    pub fn poll(&mut self) -> Progress<FaultOutcome> {
        // A key that is gone: the queue pair finds that out by itself when it tries again.
        let Some(work) = &mut self.work else { return self.answer(FaultOutcome::Resolved, 0) };
        let step = if work.prepared {
            work.fault.poll()
        } else {
            work.prepared = true;
            work.fault.prepare().map(|()| Progress::Again)
        };
        match step {
            Ok(Progress::Done(_)) => self.answer(FaultOutcome::Resolved, 1),
            Ok(Progress::Again) => Progress::Again,
            Ok(Progress::Blocked) => Progress::Blocked,
            Err(failure) => self.fail(&failure),
        }
    }

    /// Steps to the end, waiting where an invalidation is in the way.
    pub fn run(mut self) {
        let Some(work) = &mut self.work else {
            let _ = self.answer(FaultOutcome::Resolved, 0);
            return;
        };
        let outcome = work.fault.prepare().and_then(|()| work.fault.run());
        let _ = match outcome {
            Ok(_) => self.answer(FaultOutcome::Resolved, 1),
            Err(failure) => self.fail(&failure),
        };
    }

    fn fail(&mut self, failure: &FaultFailure<PublishError>) -> Progress<FaultOutcome> {
        match failure {
            // The key is gone, or about to be: the queue pair finds that out by itself.
            FaultFailure::Publish(PublishError::Closing) => self.answer(FaultOutcome::Resolved, 0),
            // The region kept changing, here or elsewhere. That is no reason to refuse the device: it asks again.
            FaultFailure::Unsettled { .. } => self.answer(FaultOutcome::Resolved, 0),
            _ => {
                tracing::debug!(%failure, event = ?self.event, "page fault failed");
                self.answer(FaultOutcome::Failed, 0)
            }
        }
    }

    /// Answers the HCA, once. `handled` is 1 if the pages were there.
    fn answer(&mut self, outcome: FaultOutcome, handled: u64) -> Progress<FaultOutcome> {
        if let Some(work) = self.work.take() {
            add(&work.target.core.counters.page_faults_handled, handled);
        }
        if !std::mem::replace(&mut self.answered, true) {
            self.device.hca().resume(self.event.token, outcome);
        }
        Progress::Done(outcome)
    }
}

impl Drop for FaultJob {
    /// A queue pair waits for every event: one that is given up is worth another try.
    fn drop(&mut self) {
        let _ = self.answer(FaultOutcome::Resolved, 0);
    }
}

/// A thread that answers page-fault events, asleep while there are none. Stops when dropped.
pub(super) struct FaultService {
    hca: Arc<Hca>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl FaultService {
    pub(super) fn spawn(device: &Arc<ModelDevice>) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, hca) = (Arc::clone(&stop), Arc::clone(device.hca()));
        // Weak: the device owns the service.
        let device = Arc::downgrade(device);
        let events = Arc::clone(&hca);
        let thread = std::thread::Builder::new().name("anypage-faults".into()).spawn(move || {
            while !stopped.load(Ordering::Acquire) {
                let Some(event) = events.faults().wait(LONG) else { continue };
                let Some(device) = device.upgrade() else { return };
                FaultJob::new(&device, event).run();
            }
        })?;
        Ok(Self { hca, stop, thread: Some(thread) })
    }
}

impl Drop for FaultService {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.hca.faults().interrupt();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            // A panic there has been printed by its own hook.
            let _ = thread.join();
        }
    }
}
