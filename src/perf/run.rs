//! The measurement: so many requests under way on each queue pair, and for each that ends the next.

use super::end::{End, Served};
use super::report::{Latency, Report};
use super::{Args, Operation};
use crate::machine::{Machine, MachineConfig};
use crate::range::{self, OutOfRange};
use hdrhistogram::Histogram;
use hw_model::hca::{Completion, HcaConfig, SendRequest, Status};
use indicatif::{ProgressBar, ProgressStyle};
use odp::space::AddressSpace;
use odp::space::process::{Options, ProcessSpace};
use std::time::{Duration, Instant};

/// The longest time to wait for a completion.
const PATIENCE: Duration = Duration::from_secs(60);
/// Significant digits of latencies.
const DIGITS: u8 = 3;
const MOST_DEPTH: u32 = 8192;
const MOST_QPS: u32 = 16384;
const MOST_SIZE: u64 = 1 << 30;
/// Completions of both ends together.
const MOST_REQUESTS: u32 = 1 << 19;

/// Why nothing was measured.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum PerfError {
    /// An option is out of its range.
    #[error(transparent)]
    #[diagnostic(transparent)]
    OutOfRange(#[from] OutOfRange),
    /// An atomic is of one size.
    #[error("--size {size}: an atomic has 8 bytes")]
    #[diagnostic(help("leave --size out, or say --size 8"))]
    AtomicSize {
        /// Bytes asked for.
        size: u64,
    },
    /// An option that says something of the other side, and no other side.
    #[error("--{option} needs --listen or --connect")]
    #[diagnostic(help("start one side with --listen and the other with --connect"))]
    NoOtherSide {
        /// The option.
        option: &'static str,
    },
    /// An option that says nothing of two processes.
    #[error("--{option} means nothing with --listen or --connect")]
    #[diagnostic(help("leave it out; say how many messages with --iters"))]
    OneProcess {
        /// The option.
        option: &'static str,
    },
    /// The machine refused something that cannot be done without.
    #[error("{what}")]
    Setup {
        /// What was being done.
        what: &'static str,
        /// What came of it.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A request did not succeed.
    #[error("a request ended with {status:?}")]
    Failed {
        /// How it ended.
        status: Status,
    },
    /// A completion never came.
    #[error("no request ended in {} seconds", PATIENCE.as_secs())]
    Stuck,
}

impl PerfError {
    /// The process's exit status for this error.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::OutOfRange(_)
            | Self::AtomicSize { .. }
            | Self::NoOtherSide { .. }
            | Self::OneProcess { .. } => 2,
            Self::Setup { .. } => 3,
            Self::Failed { .. } | Self::Stuck => 1,
        }
    }
}

fn setup<E: Into<Box<dyn std::error::Error + Send + Sync>>>(what: &'static str) -> impl Fn(E) -> PerfError {
    move |error| PerfError::Setup { what, source: error.into() }
}

/// A measurement in one process: what was asked for, and what is meant where nothing was.
pub(super) struct Plan {
    pub(super) operation: Operation,
    pub(super) size: u64,
    pub(super) depth: u32,
    pub(super) qps: u32,
    pub(super) memory: u64,
    pub(super) odp: bool,
    iters: Option<u64>,
    duration: f64,
}

impl Plan {
    fn of(args: &Args) -> Result<Self, PerfError> {
        if let Some(option) = args.sides.idle_option() {
            return Err(PerfError::NoOtherSide { option });
        }
        let (size, memory) = (args.message()?, args.memory.unwrap_or(64 << 20));
        range::count("size", size, 1, MOST_SIZE)?;
        range::count("depth", args.depth.into(), 1, MOST_DEPTH.into())?;
        range::count("qps", args.qps.into(), 1, (MOST_REQUESTS / args.depth).min(MOST_QPS).into())?;
        range::count("memory", memory, size.next_multiple_of(64), 1 << 40)?;
        if let Some(iters) = args.iters {
            range::count("iters", iters, 1, u64::MAX)?;
        }
        let duration = args.duration.unwrap_or(2.0);
        range::seconds("duration", duration, 86400)?;
        let Args { operation, depth, qps, odp, iters, .. } = *args;
        Ok(Self { operation, size, depth, qps, memory, odp, iters, duration })
    }
}

/// Builds two ends in this process and measures between them.
///
/// # Errors
/// See [`PerfError`].
pub fn run(args: &Args) -> Result<Report, PerfError> {
    let plan = &Plan::of(args)?;
    let space = ProcessSpace::open(Options::default())
        .map_err(setup("the memory of this process cannot be given to a device"))?;
    let config = MachineConfig::default();
    let config = MachineConfig { hca: HcaConfig { seed: config.seed, ..config.hca }, ..config };
    let machine = Machine::new(space.memory(), None, &config).map_err(setup("no machine could be built"))?;
    let end = |device| End::new(device, &space, plan).map_err(setup("an end could not be made"));
    let (asking, serving) = (end(&machine.far)?, end(&machine.near)?);
    let served = serving.served();
    asking.connect(&served).map_err(setup("the ends do not connect"))?;
    serving.connect(&asking.served()).map_err(setup("the ends do not connect"))?;
    serving.prepare(plan).map_err(setup("receives could not be posted"))?;
    let faults = || {
        let stats = [&machine.near, &machine.far].map(|device| device.hca().stats());
        stats.iter().map(|stats| stats.faults_by_work_request + stats.faults_by_remote_access).sum::<u64>()
    };
    let mut load = Load::new(plan, asking, served, serving);
    // Once over all of the memory: what is measured is not the first touch.
    let pass = load.asking.places().min(1 << 22);
    load.measure(pass, None, &ProgressBar::hidden())?;
    let before = faults();
    load.latencies.reset();
    let bar = progress(plan, args.json);
    let until = plan.iters.is_none().then(|| Duration::from_secs_f64(plan.duration));
    let (messages, elapsed) = load.measure(plan.iters.unwrap_or(u64::MAX), until, &bar)?;
    bar.finish_and_clear();
    let seconds = elapsed.as_secs_f64();
    Ok(Report {
        operation: plan.operation.name(),
        size: plan.size,
        qps: plan.qps,
        depth: plan.depth,
        on_demand: plan.odp,
        memory: plan.memory,
        messages,
        seconds,
        messages_per_second: messages as f64 / seconds,
        bytes_per_second: messages as f64 * plan.size as f64 / seconds,
        faults: faults(),
        faults_measured: faults() - before,
        latency: Latency::of(&load.latencies),
    })
}

fn progress(plan: &Plan, json: bool) -> ProgressBar {
    if json {
        return ProgressBar::hidden();
    }
    let (length, template) = match plan.iters {
        Some(iters) => (iters, "{wide_bar} {human_pos}/{human_len} requests, {per_sec}"),
        None => ((plan.duration * 1e3) as u64, "{wide_bar} {pos}/{len} ms"),
    };
    ProgressBar::new(length).with_style(ProgressStyle::with_template(template).expect("a template"))
}

/// The end that asks, with what it asks of.
struct Load<'a> {
    plan: &'a Plan,
    asking: End,
    served: Served,
    serving: End,
    /// Message numbers given out, and receives posted.
    next: u64,
    receives: u64,
    /// When the request in each place of the queues was posted.
    posted: Vec<Instant>,
    latencies: Histogram<u64>,
}

impl<'a> Load<'a> {
    fn new(plan: &'a Plan, asking: End, served: Served, serving: End) -> Self {
        let places = plan.depth as usize * plan.qps as usize;
        let longest = PATIENCE.as_nanos() as u64;
        let latencies = Histogram::new_with_bounds(1, longest, DIGITS).expect("such bounds are possible");
        let posted = vec![Instant::now(); places];
        let receives = u64::from(plan.depth) * 2;
        Self { plan, asking, served, serving, next: 0, receives, posted, latencies }
    }

    /// Runs `most` requests, or until the time is over. Gives how many ended, and the time.
    fn measure(
        &mut self,
        most: u64,
        until: Option<Duration>,
        bar: &ProgressBar,
    ) -> Result<(u64, Duration), PerfError> {
        let start = Instant::now();
        let (mut begun, mut ended) = (0, 0);
        for place in 0..self.posted.len().min(usize::try_from(most).unwrap_or(usize::MAX)) {
            self.post(place)?;
            begun += 1;
        }
        let mut completions: Vec<Completion> = Vec::with_capacity(64);
        let mut open = true;
        let mut heard = start;
        while ended < begun {
            completions.clear();
            let polled = self.asking.cq.poll(&mut completions, 64);
            polled.map_err(|_| PerfError::Failed { status: Status::FlushError })?;
            let now = Instant::now();
            if self.plan.operation == Operation::Send {
                self.serving.serve(&mut self.receives).map_err(|status| PerfError::Failed { status })?;
            }
            if completions.is_empty() {
                if now - heard > PATIENCE {
                    return Err(PerfError::Stuck);
                }
                std::hint::spin_loop();
                continue;
            }
            heard = now;
            open = open && until.is_none_or(|until| now - start < until);
            for completion in &completions {
                if completion.status != Status::Success {
                    return Err(PerfError::Failed { status: completion.status });
                }
                let place = completion.id.0 as usize;
                self.latencies.saturating_record((now - self.posted[place]).as_nanos() as u64);
                ended += 1;
                if open && begun < most {
                    self.post(place)?;
                    begun += 1;
                }
            }
            if ended & 0xfff < completions.len() as u64 {
                bar.set_position(until.map_or(ended, |_| (now - start).as_millis() as u64));
            }
        }
        Ok((ended, start.elapsed()))
    }

    /// Posts the next message in `place` of the queues.
    fn post(&mut self, place: usize) -> Result<(), PerfError> {
        let qp = place % self.asking.qps.len();
        let number = self.next;
        self.next += 1;
        let local = [self.asking.local(number)];
        let remote = self.asking.remote(&self.served, number);
        let id = place as u64;
        let request = match self.plan.operation {
            Operation::Write => SendRequest::write(id, &local, remote),
            Operation::Read => SendRequest::read(id, &local, remote),
            Operation::Send => SendRequest::send(id, &local),
            Operation::Atomic => SendRequest::fetch_add(id, &local, remote, 1),
        };
        self.posted[place] = Instant::now();
        self.asking.qps[qp].post_send(&request).map_err(setup("a request was refused"))
    }
}
