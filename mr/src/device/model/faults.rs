//! Page-fault events of the modelled HCA, from the event to its answer.

use super::implicit::ChildUse;
use super::target::{FaultTarget, Place};
use super::{ModelDevice, prefetch};
use crate::device::RegisterError;
use crate::points;
use crate::region::counters::add;
use crate::region::{MapRegionError, PublishError, RegionFault};
use hw_model::addr::VirtRange;
use hw_model::fault_plan::{Direction, Subject};
use hw_model::hca::{Backing, FaultAccess, FaultKind, FaultOutcome, Hca, PageFault};
use hw_model::sync::Arc;
use hw_model::sync::atomic::{AtomicBool, Ordering};
use odp::fault::{FaultFailure, Progress, Want};
use odp::prefetch::Ahead;
use odp::space::Access;
use std::thread::JoinHandle;
use std::time::Duration;

/// How long the service sleeps at a time when nobody needs it.
const LONG: Duration = Duration::from_secs(3600);

/// Why a page-fault event cannot be answered with pages.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// They cannot be had.
    #[error(transparent)]
    Pages(#[from] FaultFailure<PublishError>),
    /// They have no place in an implicit region.
    #[error(transparent)]
    Part(#[from] RegisterError),
}

/// One page-fault event on its way to its answer.
pub struct FaultJob {
    device: Arc<ModelDevice>,
    event: PageFault,
    work: Option<Work>,
    /// A fault plan says that there is no such memory.
    refused: bool,
    answered: bool,
}

struct Work {
    target: FaultTarget,
    /// What the device wants of it.
    memory: VirtRange,
    want: Want,
    begun: Option<Begun>,
}

/// A fault of which is known where its pages are kept.
struct Begun {
    fault: RegionFault,
    /// What the device wants of what the fault brings in.
    range: VirtRange,
    /// A child stays while it is used.
    _held: Option<ChildUse>,
    /// What comes next, what of it the fault brings in itself, and what it keeps to.
    ahead: Option<(Ahead, VirtRange, VirtRange)>,
}

impl FaultJob {
    pub(super) fn new(device: &Arc<ModelDevice>, event: PageFault) -> Self {
        let access = match event.access {
            FaultAccess::Read => Access::Read,
            FaultAccess::Write => Access::Write,
        };
        let _ = device.dma().points().meet(points::FAULT);
        let refused = device.dma().points().meet_about(points::PAGE_FAULT, || subject(&event)).fails();
        let work = device.fault_target(event.key).and_then(|target| {
            let memory = target.faulted(event.address, event.length)?;
            add(&target.counters().page_faults, 1);
            Some(Work { target, memory, want: Want::Fault(access), begun: None })
        });
        Self { device: Arc::clone(device), event, work, refused, answered: false }
    }

    /// The event.
    #[must_use]
    pub fn event(&self) -> &PageFault {
        &self.event
    }

    /// Looks at what is there, decides what to bring in besides, and makes the IO page tables for it. `false` if nothing is
    /// left to do.
    fn begin(&mut self) -> Result<bool, Failure> {
        let Some(work) = &mut self.work else { return Ok(false) };
        let Some(place) = work.target.place(work.memory)? else { return Ok(false) };
        // Posted before pages were published for an event that came earlier: perhaps those were the same.
        if self.event.token.serial() < place.core.answered.load(Ordering::Acquire)
            && place.core.has(place.range, work.want)
        {
            add(&place.core.counters.faults_coalesced, 1);
            return Ok(false);
        }
        let prefetcher = self.device.prefetcher();
        let pages = place.range.page_aligned();
        let (policy, ahead) = prefetcher.observe((self.event.qpn, self.event.kind), pages);
        let around = prefetch::around(&policy, pages, ahead);
        let reach = ahead.and_then(Ahead::hull).map_or(around, |ahead| ahead.hull(around));
        let bounds = work.target.together(pages, reach);
        let around = around.intersection(bounds).unwrap_or(pages);
        let Place { core, sequence, range, held } = place;
        let fault = RegionFault::new(core, sequence, range, work.want);
        let fault = fault.narrowing().with_neighbours(around);
        fault.prepare()?;
        let ahead = ahead.map(|ahead| (ahead, around, bounds));
        work.begun = Some(Begun { fault, range, _held: held, ahead });
        Ok(true)
    }

    /// One step; never waits. Once it says `Done` the HCA has its answer.
    pub fn poll(&mut self) -> Progress<FaultOutcome> {
        if self.refused {
            return self.answer(FaultOutcome::Failed, 0);
        }
        // A key that is gone: the queue pair finds that out by itself when it tries again.
        let Some(work) = &mut self.work else { return self.answer(FaultOutcome::Resolved, 0) };
        let Some(begun) = &mut work.begun else {
            return match self.begin() {
                Ok(true) => Progress::Again,
                Ok(false) => self.answer(FaultOutcome::Resolved, 1),
                Err(failure) => self.fail(&failure),
            };
        };
        match begun.fault.poll() {
            Ok(Progress::Done(published)) => self.publish(published),
            Ok(Progress::Again) => Progress::Again,
            Ok(Progress::Blocked) => Progress::Blocked,
            Err(failure) => self.fail(&failure.into()),
        }
    }

    /// Steps to the end, waiting where an invalidation is in the way.
    pub fn run(mut self) {
        if self.refused {
            let _ = self.answer(FaultOutcome::Failed, 0);
            return;
        }
        let outcome = match (self.begin(), &mut self.work) {
            (Ok(true), Some(Work { begun: Some(begun), .. })) => begun.fault.run().map_err(Failure::from),
            (Err(failure), _) => Err(failure),
            (Ok(_), work) => {
                let handled = u64::from(work.is_some());
                let _ = self.answer(FaultOutcome::Resolved, handled);
                return;
            }
        };
        let _ = match outcome {
            Ok(published) => self.publish(published),
            Err(failure) => self.fail(&failure),
        };
    }

    /// The pages are there. What comes after them is asked for once the device has its answer.
    fn publish(&mut self, published: u64) -> Progress<FaultOutcome> {
        let mut next = None;
        let mut outcome = FaultOutcome::Resolved;
        if let Some(work) = &mut self.work
            && let Some(begun) = work.begun.take()
        {
            let core = begun.fault.core();
            core.answered.fetch_max(self.device.hca().faults().posted(), Ordering::AcqRel);
            let wanted = core.whole(begun.range).page_count();
            add(&core.counters.pages_ahead, published.saturating_sub(wanted));
            let about = || {
                let page = core.backing_at(begun.range).map(Backing::name);
                Subject { page, ..subject(&self.event) }
            };
            if self.device.dma().points().meet_about(points::PAGES_IN, about).fails() {
                outcome = FaultOutcome::Failed;
            }
            next = begun.ahead.map(|ahead| (work.target.clone(), work.want, ahead));
        }
        let done = self.answer(outcome, 1);
        if let Some((target, want, (ahead, around, bounds))) = next {
            self.device.prefetcher().go_ahead(&target, want, (ahead, bounds), around);
        }
        done
    }

    fn fail(&mut self, failure: &Failure) -> Progress<FaultOutcome> {
        match failure {
            // The key is gone, or about to be: the queue pair finds that out by itself. So is a part of an implicit region
            // that was empty, and then the next try makes another.
            Failure::Pages(FaultFailure::Publish(PublishError::Closing))
            | Failure::Part(RegisterError::Map(MapRegionError::Closing)) => {
                self.answer(FaultOutcome::Resolved, 0)
            }
            // The region kept changing, here or elsewhere. That is no reason to refuse the device: it asks again.
            Failure::Pages(FaultFailure::Unsettled { .. }) => self.answer(FaultOutcome::Resolved, 0),
            _ => {
                tracing::debug!(%failure, event = ?self.event, "page fault failed");
                self.answer(FaultOutcome::Failed, 0)
            }
        }
    }

    /// Answers the HCA, once. `handled` is 1 if the pages were there.
    fn answer(&mut self, outcome: FaultOutcome, handled: u64) -> Progress<FaultOutcome> {
        if let Some(work) = self.work.take() {
            add(&work.target.counters().page_faults_handled, handled);
        }
        if !std::mem::replace(&mut self.answered, true) {
            self.device.hca().resume(self.event.token, outcome);
        }
        Progress::Done(outcome)
    }
}

/// What rules of a fault plan can ask about an event.
fn subject(event: &PageFault) -> Subject {
    let direction = match event.kind {
        FaultKind::ByWorkRequest => Some(Direction::Send),
        FaultKind::ByRemoteAccess => Some(Direction::Receive),
        // Of any number of queue pairs, of both sides.
        FaultKind::ByRange => None,
    };
    Subject {
        key: Some(event.key),
        qpn: Some(event.qpn),
        memory: Some((event.address.0, event.length)),
        direction,
        ..Subject::default()
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
