//! Runs: one from a seed or a trace, and many from a range of seeds on several threads.

use super::choices::{Choices, Trace};
use super::shrink::shrink;
use super::{Broken, Counts, Options, World};
use hw_model::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use hw_model::sync::{Mutex, OnceLock, thread};
use serde::Serialize;
use std::cell::RefCell;
use std::ops::RangeInclusive;
use std::panic::{self, AssertUnwindSafe};

/// Runs that a trace is shortened in.
const SHRINK_RUNS: usize = 300;

/// What a run came to.
#[derive(Debug)]
pub struct Outcome {
    /// What happened.
    pub counts: Counts,
    /// A number that tells what happened from what else could have.
    pub digest: u64,
    /// A line for everything that happened, if they were kept.
    pub log: Vec<String>,
    /// What broke, if something did.
    pub failure: Option<Failure>,
}

/// A run that broke.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What broke.
    pub broken: Broken,
    /// Steps until then.
    pub steps: usize,
    /// What was decided until then.
    pub trace: Trace,
}

thread_local! {
    /// What the panic of a run on this thread said; `None` where no run is.
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Panics of runs are findings: they are kept for the report rather than printed.
fn keep_panics() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let kept = PANIC.with_borrow_mut(|kept| kept.as_mut().map(|kept| *kept = info.to_string()));
            if kept.is_none() {
                before(info);
            }
        }));
    });
}

/// Runs `steps` steps of the world of `seed`, and ends it.
#[must_use]
pub fn run_seed(seed: u64, steps: usize, options: &Options) -> Outcome {
    run(Choices::random(seed), steps, options)
}

/// Plays a trace, and ends it.
#[must_use]
pub fn run_trace(trace: &Trace, options: &Options) -> Outcome {
    run(Choices::given(trace.clone()), trace.steps.len(), options)
}

fn run(choices: Choices, steps: usize, options: &Options) -> Outcome {
    keep_panics();
    let mut world: Option<World> = None;
    let mut done = 0;
    PANIC.set(Some(String::new()));
    let result = panic::catch_unwind(AssertUnwindSafe(|| {
        let world = world.insert(World::new(choices, options)?);
        for _ in 0..steps {
            done += 1;
            world.step()?;
        }
        world.settle()
    }));
    let said = PANIC.take().unwrap_or_default();
    let broken = match result {
        Ok(result) => result.err(),
        Err(_) => Some(Broken { rule: "panic", detail: said }),
    };
    let Some(mut world) = world else {
        let failure = broken.map(|broken| Failure { broken, steps: 0, trace: Trace::default() });
        return Outcome { counts: Counts::default(), digest: 0, log: Vec::new(), failure };
    };
    let mut trace = world.trace().clone();
    trace.steps.truncate(done);
    let failure = broken.map(|broken| Failure { broken, steps: done, trace });
    let outcome =
        Outcome { counts: world.counts().clone(), digest: world.digest(), log: world.take_log(), failure };
    if outcome.failure.is_some() {
        // Broken as it is, taking it apart could wait for ever, or panic while it panics.
        std::mem::forget(world);
    }
    outcome
}

/// A run that broke, cut shorter.
#[derive(Clone, Debug)]
pub struct Shrunk {
    /// What is left of its trace.
    pub trace: Trace,
    /// Runs that it took.
    pub runs: usize,
    /// What broke then.
    pub broken: Broken,
    /// Everything that happens in it.
    pub log: Vec<String>,
}

/// Cuts a run shorter that breaks the same rule.
#[must_use]
pub fn shorten(failure: &Failure, options: &Options) -> Shrunk {
    let quiet = Options { log: false, ..options.clone() };
    let rule = failure.broken.rule;
    let breaks =
        |trace: &Trace| run_trace(trace, &quiet).failure.is_some_and(|failure| failure.broken.rule == rule);
    let (trace, runs) = shrink(failure.trace.clone(), SHRINK_RUNS, breaks);
    let outcome = run_trace(&trace, &Options { log: true, ..options.clone() });
    let broken = outcome.failure.map_or_else(|| failure.broken.clone(), |failure| failure.broken);
    Shrunk { trace, runs, broken, log: outcome.log }
}

/// What many runs came to.
#[derive(Debug, Default, Serialize)]
pub struct Tally {
    /// Runs that ended.
    pub runs: u64,
    /// What happened in all of them.
    pub counts: Counts,
    /// The first seed that broke, and how.
    #[serde(skip)]
    pub failed: Option<(u64, Failure)>,
}

/// Runs all `seeds` on `jobs` threads, up to the first that breaks. `ended` is told after each run.
pub fn run_all(
    seeds: RangeInclusive<u64>,
    jobs: usize,
    steps: usize,
    options: &Options,
    ended: impl Fn(u64) + Sync,
) -> Tally {
    let next = AtomicU64::new(*seeds.start());
    let stop = AtomicBool::new(false);
    let tally = Mutex::new(Tally::default());
    let work = || {
        while !stop.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if !seeds.contains(&seed) {
                return;
            }
            let outcome = run_seed(seed, steps, options);
            let mut tally = tally.lock();
            tally.runs += 1;
            tally.counts.merge(&outcome.counts);
            if let Some(failure) = outcome.failure {
                stop.store(true, Ordering::Relaxed);
                // The lowest of those that break at the same time, so that two runs of a range tell the same.
                if tally.failed.as_ref().is_none_or(|(before, _)| seed < *before) {
                    tally.failed = Some((seed, failure));
                }
            }
            drop(tally);
            ended(seed);
        }
    };
    thread::scope(|scope| {
        (0..jobs.max(1)).for_each(|_| drop(scope.spawn(work)));
    });
    tally.into_inner()
}
