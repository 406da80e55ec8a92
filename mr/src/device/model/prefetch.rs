//! Pages brought in before the device asks for them: by advice that need not be waited for, and ahead of streams.
//!
//! Best effort. Requests wait in a bounded queue; one that finds it full is dropped and counted, and one whose pages cannot
//! be had ends there: the device's own fault will say so to whom it concerns. They are carried out in steps short enough
//! that a fault on the same pages waits for a step or not at all.

use super::ModelDevice;
use super::target::{FaultTarget, Place};
use crate::region::Bringing;
use crate::region::counters::add;
use crossbeam::sync::{Parker, Unparker};
use hw_model::addr::VirtRange;
use hw_model::hca::{FaultKind, Qpn};
use hw_model::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use hw_model::sync::{Arc, Mutex};
use odp::fault::{Progress, Want};
use odp::prefetch::{Ahead, PrefetchPolicy, Streams};
use std::collections::VecDeque;
use std::thread::JoinHandle;
use std::time::Duration;

/// Requests that wait at most.
const DEPTH: usize = 256;
/// Bytes brought in at a time.
const SLICE: u64 = 512 << 10;
/// Bytes of a stream's window that the fault itself brings in: a quarter of it, within these bounds. The device goes on with
/// them while the rest comes, and however late that is, each fault takes the stream as far as this.
const AT_ONCE: std::ops::RangeInclusive<u64> = 128 << 10..=8 << 20;
/// How long the service sleeps at a time when nobody needs it.
const LONG: Duration = Duration::from_secs(3600);
/// How long it waits for a burst.
const SOON: Duration = Duration::from_micros(50);

/// How page faults of a device are answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FaultPolicy {
    /// Pages of the aligned block of so many bytes around a fault are brought in with it, as far as they can be had. A
    /// power of two; 0 or a page for none.
    pub neighbours: u64,
    /// What is brought in ahead of streams.
    pub prefetch: PrefetchPolicy,
}

/// What became of prefetches so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefetchStats {
    /// Windows asked for ahead of streams.
    pub windows: u64,
    /// Bytes of those windows.
    pub bytes_ahead: u64,
    /// Requests taken, to be carried out.
    pub asked: u64,
    /// Requests carried out, to their end or to the first page that could not be had.
    pub carried_out: u64,
    /// Requests dropped because too many were waiting.
    pub dropped: u64,
}

/// Who asked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    Advice,
    Stream,
}

struct Request {
    target: FaultTarget,
    memory: VirtRange,
    want: Want,
    origin: Origin,
}

/// Who faults how, and what is done about it: one lock a fault.
#[derive(Default)]
struct Watch {
    policy: FaultPolicy,
    streams: Streams<(Qpn, FaultKind)>,
}

/// The queue of one device, and what it knows of its streams.
pub(super) struct Prefetcher {
    watch: Mutex<Watch>,
    queue: Mutex<VecDeque<Request>>,
    /// Rung for requests, and from inside invalidations for parts of implicit regions that have become empty.
    bell: Unparker,
    /// Who hears it, until the service has it.
    ear: Mutex<Option<Parker>>,
    windows: AtomicU64,
    bytes_ahead: AtomicU64,
    asked: AtomicU64,
    carried_out: AtomicU64,
    dropped: AtomicU64,
}

impl Prefetcher {
    pub(super) fn new(policy: FaultPolicy) -> Self {
        let ear = Parker::new();
        Self {
            watch: Mutex::new(Watch { policy, streams: Streams::default() }),
            queue: Mutex::default(),
            bell: ear.unparker().clone(),
            ear: Mutex::new(Some(ear)),
            windows: AtomicU64::new(0),
            bytes_ahead: AtomicU64::new(0),
            asked: AtomicU64::new(0),
            carried_out: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
        }
    }

    pub(super) fn bell(&self) -> Unparker {
        self.bell.clone()
    }

    pub(super) fn policy(&self) -> FaultPolicy {
        self.watch.lock().policy
    }

    pub(super) fn set_policy(&self, policy: FaultPolicy) {
        self.watch.lock().policy = policy;
    }

    pub(super) fn stats(&self) -> PrefetchStats {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        PrefetchStats {
            windows: count(&self.windows),
            bytes_ahead: count(&self.bytes_ahead),
            asked: count(&self.asked),
            carried_out: count(&self.carried_out),
            dropped: count(&self.dropped),
        }
    }

    /// Takes note of a fault, whole pages. Gives the policy, and what comes next by it.
    pub(super) fn observe(&self, source: (Qpn, FaultKind), fault: VirtRange) -> (FaultPolicy, Option<Ahead>) {
        let mut watch = self.watch.lock();
        let policy = watch.policy;
        let ahead = watch.streams.observe(policy.prefetch, source, fault);
        drop(watch);
        if let Some(ahead) = ahead {
            add(&self.windows, 1);
            add(&self.bytes_ahead, ahead.bytes());
        }
        (policy, ahead)
    }

    /// Puts a request behind the others. `false` if there is no room.
    pub(super) fn ask(&self, target: &FaultTarget, memory: VirtRange, want: Want, origin: Origin) -> bool {
        let request = Request { target: target.clone(), memory, want, origin };
        let mut queue = self.queue.lock();
        if queue.len() >= DEPTH {
            drop(queue);
            add(&self.dropped, 1);
            return false;
        }
        queue.push_back(request);
        add(&self.asked, 1);
        drop(queue);
        self.bell.unpark();
        true
    }

    /// Asks for what of `ahead` lies within `bounds` and the fault does not bring in itself: that ends with `done`.
    pub(super) fn go_ahead(
        &self,
        target: &FaultTarget,
        want: Want,
        (ahead, bounds): (Ahead, VirtRange),
        done: VirtRange,
    ) {
        for piece in ahead.pieces().filter_map(|piece| piece.intersection(bounds)) {
            let left = match piece.intersection(done) {
                Some(_) if piece.start() < done.start() => {
                    VirtRange::new(piece.start(), done.start().0 - piece.start().0)
                }
                Some(_) => VirtRange::new(done.end(), piece.end().0.saturating_sub(done.end().0)),
                None => Some(piece),
            };
            let left = left.and_then(|left| left.intersection(target.range)).filter(|left| !left.is_empty());
            if left.is_some_and(|left| !self.ask(target, left, want, Origin::Stream)) {
                return;
            }
        }
    }
}

/// The pages around `fault` that are brought in with it: its neighbours, and the nearest part of what comes `ahead`.
pub(super) fn around(policy: &FaultPolicy, fault: VirtRange, ahead: Option<Ahead>) -> VirtRange {
    let mut around = fault;
    if policy.neighbours.is_power_of_two() && policy.neighbours > fault.len() {
        let start = fault.start().0 & !(policy.neighbours - 1);
        let end = fault.end().0.checked_next_multiple_of(policy.neighbours).unwrap_or(fault.end().0);
        around = VirtRange::new(hw_model::addr::VirtAddr(start), end - start).unwrap_or(fault);
    }
    let next = ahead.and_then(|ahead| ahead.pieces().next());
    let next = next.filter(|piece| piece.start() == fault.end());
    if let Some(piece) = next {
        let at_once = (piece.len() / 4).clamp(*AT_ONCE.start(), *AT_ONCE.end()).min(piece.len());
        let end = around.end().0.max(fault.end().0 + at_once);
        around = VirtRange::new(around.start(), end - around.start().0).unwrap_or(around);
    }
    around
}

/// One prefetch on its way.
pub struct PrefetchJob {
    device: Arc<ModelDevice>,
    request: Request,
    /// Where, which stays meanwhile, and how far it has come.
    bringing: Option<(Place, Bringing)>,
}

impl PrefetchJob {
    pub(super) fn next(device: &Arc<ModelDevice>) -> Option<Self> {
        let request = device.prefetcher().queue.lock().pop_front()?;
        Some(Self { device: Arc::clone(device), request, bringing: None })
    }

    /// The part that comes next, if any is left.
    fn begin(&mut self) -> Option<&mut Bringing> {
        if self.bringing.is_none() {
            let Request { target, memory, want, .. } = &mut self.request;
            let place = target.place(*memory).ok()??;
            let (end, next) = (memory.end(), place.range.end());
            *memory = VirtRange::new(next, end.0.saturating_sub(next.0))?;
            let pages = place.range.page_aligned();
            let sequence = Arc::clone(&place.sequence);
            let bringing = Bringing::new(&place.core, sequence, pages, *want).in_steps_of(SLICE);
            // A fault may have been there before.
            let bringing = bringing.skipping_present();
            self.bringing = Some((place, bringing));
        }
        self.bringing.as_mut().map(|(_, bringing)| bringing)
    }

    /// One step; never waits.
    pub fn poll(&mut self) -> Progress<()> {
        let Some(bringing) = self.begin() else { return Progress::Done(()) };
        let outcome = bringing.poll();
        self.count();
        match outcome {
            Ok(Progress::Done(())) => {
                self.bringing = None;
                if self.request.memory.is_empty() { Progress::Done(()) } else { Progress::Again }
            }
            Ok(progress) => progress,
            Err(failure) => {
                tracing::debug!(%failure, "prefetch ended");
                Progress::Done(())
            }
        }
    }

    /// To the end, waiting where an invalidation is in the way.
    fn run(mut self) {
        while let Some(bringing) = self.begin() {
            let outcome = bringing.run();
            self.count();
            self.bringing = None;
            if let Err(failure) = outcome {
                tracing::debug!(%failure, "prefetch ended");
                return;
            }
        }
    }

    fn count(&mut self) {
        let Some((_, bringing)) = &mut self.bringing else { return };
        let published = bringing.take_published();
        let counters = bringing.counters();
        match self.request.origin {
            Origin::Advice => add(&counters.page_prefetch, published),
            Origin::Stream => add(&counters.pages_ahead, published),
        }
    }
}

impl Drop for PrefetchJob {
    fn drop(&mut self) {
        add(&self.device.prefetcher().carried_out, 1);
    }
}

/// A thread that carries prefetches out, asleep while there are none. Stops when dropped.
pub(super) struct PrefetchService {
    prefetcher: Arc<Prefetcher>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl PrefetchService {
    pub(super) fn spawn(device: &Arc<ModelDevice>) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, prefetcher) = (Arc::clone(&stop), Arc::clone(device.prefetcher()));
        let ear = prefetcher.ear.lock().take().unwrap_or_default();
        // Weak: the device owns the service.
        let device = Arc::downgrade(device);
        let thread = std::thread::Builder::new().name("anypage-prefetch".into()).spawn(move || {
            while !stopped.load(Ordering::Acquire) {
                let Some(device) = device.upgrade() else { return };
                let left = device.reclaim();
                match PrefetchJob::next(&device) {
                    Some(job) => job.run(),
                    // A burst is under way on what was taken away. It is bounded.
                    None if left => std::thread::sleep(SOON),
                    None => {
                        drop(device);
                        ear.park_timeout(LONG);
                    }
                }
            }
        })?;
        Ok(Self { prefetcher, stop, thread: Some(thread) })
    }
}

impl Drop for PrefetchService {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.prefetcher.bell.unpark();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            // A panic there has been printed by its own hook.
            let _ = thread.join();
        }
        // What nobody will carry out holds regions, which hold address spaces.
        self.prefetcher.queue.lock().clear();
    }
}
