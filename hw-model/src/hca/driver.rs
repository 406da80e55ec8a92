//! Threads around the engines: thin loops that step, spin for a moment, and sleep. And the threads of callers, who run the
//! engine they post to, and their peer's if it is in this process, before anybody is woken: what is small is done when the
//! call returns.

use super::device::Hca;
use super::engine::{Engine, Step};
use super::points;
use super::time::Time;
use crate::link::Roused;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Arc, MutexGuard};
use crate::wire::Qpn;
use crossbeam::sync::Parker;
use std::io;
use std::thread::JoinHandle;
use std::time::Duration;

/// Steps that a thread does before it lets others at its engine.
const STEPS_A_TURN: usize = 16;
/// Steps that a posting thread does at most, and a polling one, of all the engines that it runs.
const STEPS_OF_A_CALLER: usize = 32;
/// Looks at the mailbox before going to sleep: a microsecond or two.
const SPINS: usize = 200;
/// How soon a thread that found the epoch closed tries again.
const CLOSED_NAP: Duration = Duration::from_micros(20);

/// The engine threads of one device. Dropping this stops and joins them; the device works on, driven by its callers.
pub struct EngineThreads {
    hca: Arc<Hca>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Parker>>,
}

impl Hca {
    /// Starts one thread an engine, unless they run already (then there is nothing in the handle).
    ///
    /// # Errors
    /// What the operating system says if it gives no thread; none is left running then.
    pub fn spawn_engines(self: &Arc<Self>) -> io::Result<EngineThreads> {
        let stop = Arc::new(AtomicBool::new(false));
        let parkers = std::mem::take(&mut *self.parkers.lock());
        let mut running = EngineThreads { hca: Arc::clone(self), stop, threads: Vec::new() };
        for (index, parker) in parkers.into_iter().enumerate() {
            let (hca, stop) = (Arc::clone(self), Arc::clone(&running.stop));
            let body = move || {
                run(&hca, index, &parker, &stop);
                parker
            };
            let thread = std::thread::Builder::new().name(format!("hca-engine-{index}")).spawn(body)?;
            self.threads.fetch_add(1, Ordering::Relaxed);
            running.threads.push(thread);
        }
        Ok(running)
    }
}

impl Hca {
    /// As [`Hca::progress`], for one who polls: what has arrived is read on the calling thread too.
    pub(super) fn poll(&self) {
        if self.device.config.callers_drive {
            self.device.link.poll();
            self.progress();
        }
    }

    /// The calling thread, which may have polled, is about to sleep.
    pub(super) fn rest(&self) {
        self.device.link.rest();
    }

    /// What the link has counted, by name.
    #[must_use]
    pub fn link_counts(&self) -> Vec<(&'static str, u64)> {
        self.device.link.named_counts()
    }

    /// Steps an engine on the calling thread, and those that it sends to and that answer, until they are idle or enough was
    /// done. What is left is for their threads.
    pub(super) fn drive(&self, index: usize) {
        let mut steps = STEPS_OF_A_CALLER;
        let mut roused = Roused::default();
        self.run(index, &mut steps, &mut roused);
        roused.run(&mut steps);
    }

    /// Sees to it that an engine collects what was left for it. Whoever polls does that at once, and an engine's thread that
    /// is woken beside him only takes a processor away; so they are given a moment, and then this thread steps the engine
    /// itself, unless other faults wait for it.
    pub(super) fn see_to(&self, index: usize) {
        let mailbox = &self.device.mailboxes[index];
        if !self.device.faults.is_empty() {
            return mailbox.wake();
        }
        let is_taken = || {
            std::hint::spin_loop();
            !mailbox.has_mail()
        };
        if !(0..SPINS).any(|_| is_taken()) {
            self.drive(index);
        }
    }

    /// Has an engine hear that a queue pair has new requests, and goes on as [`Hca::drive`]. False if the engine is being
    /// stepped by another thread: it has heard nothing.
    pub(super) fn drive_for(&self, qpn: Qpn, index: usize) -> bool {
        let Some(mut engine) = self.engine_at(index).try_lock() else { return false };
        engine.hear(qpn);
        let mut steps = STEPS_OF_A_CALLER;
        let mut roused = Roused::default();
        self.run_locked(engine, index, &mut steps, &mut roused);
        roused.run(&mut steps);
        true
    }

    /// Steps one engine that nobody else is stepping.
    pub(super) fn run(&self, index: usize, steps: &mut usize, roused: &mut Roused) {
        match self.engine_at(index).try_lock() {
            Some(engine) => self.run_locked(engine, index, steps, roused),
            None => self.device.mailboxes[index].wake(),
        }
    }

    fn run_locked(
        &self,
        mut engine: MutexGuard<'_, Engine>,
        index: usize,
        steps: &mut usize,
        roused: &mut Roused,
    ) {
        let now = self.time_of(roused.instant());
        let mut step = Step::Worked;
        while *steps > 0 && step == Step::Worked {
            *steps -= 1;
            step = engine.step_of_several(now);
            if step == Step::Worked {
                step = engine.rest().unwrap_or(step);
            }
        }
        engine.flush();
        roused.take_from(engine.roused());
        drop(engine);
        let mailbox = &self.device.mailboxes[index];
        match step {
            Step::Worked | Step::Blocked => mailbox.remind(),
            Step::Idle { .. } if mailbox.has_mail() => mailbox.wake(),
            Step::Idle { wake_at: Some(time) } => mailbox.wake_for(time.0),
            Step::Idle { wake_at: None } => {}
        }
    }
}

fn run(hca: &Hca, index: usize, parker: &Parker, stop: &AtomicBool) {
    let mailbox = &hca.device.mailboxes[index];
    while !stop.load(Ordering::Acquire) {
        match turn(hca, index) {
            Step::Worked => {}
            Step::Blocked => std::thread::sleep(CLOSED_NAP),
            Step::Idle { wake_at } => {
                if (0..SPINS).any(|_| {
                    std::hint::spin_loop();
                    mailbox.has_mail()
                }) {
                    continue;
                }
                let _ = hca.device.points.meet(points::ENGINE_SLEEP);
                let until = wake_at.unwrap_or(Time(u64::MAX));
                mailbox.going_to_sleep(until.0);
                // Looked at after the announcement: what is left from now on wakes this thread. Others may have had the engine
                // since its last step, and have left a deadline or a queue pair to serve while they saw nobody asleep.
                let may_sleep = hca.engine_at(index).lock().may_sleep(hca.now(), until);
                if may_sleep && !stop.load(Ordering::Acquire) {
                    match wake_at {
                        None => parker.park(),
                        Some(Time(at)) => {
                            parker.park_timeout(Duration::from_nanos(at.saturating_sub(hca.now().0)));
                        }
                    }
                }
                mailbox.awake();
            }
        }
    }
}

fn turn(hca: &Hca, index: usize) -> Step {
    let mut engine = hca.engine_at(index).lock();
    let mut step = Step::Worked;
    let now = hca.now();
    for _ in 0..STEPS_A_TURN {
        step = engine.step(now);
        engine.roused().wake();
        if step == Step::Worked {
            step = engine.rest().unwrap_or(step);
        }
        if step != Step::Worked {
            break;
        }
    }
    step
}

impl Drop for EngineThreads {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        for mailbox in self.hca.device.mailboxes.iter() {
            mailbox.stop();
        }
        let mut parkers = Vec::new();
        for thread in self.threads.drain(..) {
            self.hca.threads.fetch_sub(1, Ordering::Relaxed);
            match thread.join() {
                Ok(parker) => parkers.push(parker),
                // The engine panicked and said so; it stays without a thread.
                Err(_) => tracing::error!("an engine thread panicked"),
            }
        }
        self.hca.parkers.lock().extend(parkers);
    }
}

impl std::fmt::Debug for EngineThreads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineThreads").field("threads", &self.threads.len()).finish_non_exhaustive()
    }
}
