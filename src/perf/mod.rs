//! `anypage perf`: rate and latency of one operation.
//!
//! Two ends: the one that serves has memory and queue pairs and tells what a peer must know (`end`); the one that
//! asks ([`run`]) keeps so many requests under way on each of its queue pairs, one thread posting and polling. Here both are
//! in this process, each with a modelled HCA of its own behind an IOMMU. With --listen or --connect this process is one end,
//! and [`peer`] does the work.

mod end;
mod report;
mod run;

pub use report::{Latency, Report};
pub use run::{PerfError, run};

use crate::{peer, range};
use clap::{Args as ClapArgs, ValueEnum};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::process::ExitCode;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Operation {
    /// RDMA write.
    Write,
    /// RDMA read.
    Read,
    /// Send, into receives that the other end keeps posting.
    Send,
    /// Fetch and add, on one word after the other.
    Atomic,
}

impl Operation {
    /// Its name, as on the command line and in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Read => "read",
            Self::Send => "send",
            Self::Atomic => "atomic",
        }
    }
}

/// The options of the measurement.
#[derive(ClapArgs, Clone, Debug)]
#[command(
    after_help = "Exit status: 0 measured, 1 a request failed, 2 the command line was wrong, 3 this machine cannot do it."
)]
pub struct Args {
    /// What to measure; a side that listens takes it from the other.
    #[arg(value_enum, default_value = "write")]
    pub operation: Operation,
    /// Bytes of a message, 64K unless told; an atomic has 8. Takes K, M and G.
    #[arg(long, value_parser = crate::demo::parse_size)]
    pub size: Option<u64>,
    /// Register both ends on demand: pages are brought in by page faults. Otherwise both are pinned.
    #[arg(long)]
    pub odp: bool,
    /// Requests to measure, instead of measuring for a time; between two processes 10000 unless told.
    #[arg(long, conflicts_with = "duration", alias = "iterations")]
    pub iters: Option<u64>,
    /// Seconds to measure for, 2 unless told; between two processes it is requests that are counted.
    #[arg(long, value_name = "SECONDS")]
    pub duration: Option<f64>,
    /// Requests under way on each queue pair. Latency is best seen with 1.
    #[arg(long, default_value_t = 16, alias = "window")]
    pub depth: u32,
    /// Queue pairs.
    #[arg(long, default_value_t = 1)]
    pub qps: u32,
    /// Bytes of memory of each end, 64M unless told: messages go from place to place in it. Between two processes it has a
    /// place for each message under way.
    #[arg(long, value_parser = crate::demo::parse_size)]
    pub memory: Option<u64>,
    /// Print the result as JSON (docs/perf.schema.json; between two processes docs/perf-peer.schema.json).
    #[arg(long)]
    pub json: bool,
    /// Two processes or hosts.
    #[command(flatten)]
    pub sides: peer::Sides,
}

/// Messages between two processes unless told.
const BETWEEN_PROCESSES: u64 = 10_000;

impl Args {
    /// Bytes of a message.
    fn message(&self) -> Result<u64, PerfError> {
        match (self.operation, self.size) {
            (Operation::Atomic, None | Some(8)) => Ok(8),
            (Operation::Atomic, Some(size)) => Err(PerfError::AtomicSize { size }),
            (_, size) => Ok(size.unwrap_or(64 << 10)),
        }
    }

    /// What this side does of a measurement between two.
    fn of_two_sides(&self) -> Result<peer::Args, PerfError> {
        for (option, given) in [("duration", self.duration.is_some()), ("memory", self.memory.is_some())] {
            if given {
                return Err(PerfError::OneProcess { option });
            }
        }
        let (operation, size) = (self.operation, self.message()?);
        range::count("size", size, 1, 64 << 20)?;
        range::count("depth", self.depth.into(), 1, 256)?;
        range::count("qps", self.qps.into(), 1, 256)?;
        let iterations = self.iters.unwrap_or(BETWEEN_PROCESSES);
        range::count("iters", iterations, 1, u64::MAX)?;
        let (size, qps, depth) = (size as u32, self.qps, self.depth);
        let (odp, json, sides) = (self.odp, self.json, self.sides.clone());
        Ok(peer::Args { operation, size, iterations, qps, depth, odp, json, sides })
    }
}

/// Measures and prints. 0: measured; 1: a request failed; 2: bad input; 3: this machine cannot.
#[must_use]
pub fn main(args: &Args) -> ExitCode {
    if args.sides.are_two() {
        return match args.of_two_sides() {
            Ok(args) => peer::main(&args),
            Err(error) => refuse(error),
        };
    }
    match run(args) {
        Ok(report) if args.json => {
            println!("{}", serde_json::to_string_pretty(&report).expect("the report is plain data"));
            ExitCode::SUCCESS
        }
        Ok(report) => {
            println!("{}", report.table());
            ExitCode::SUCCESS
        }
        Err(error) => refuse(error),
    }
}

fn refuse(error: PerfError) -> ExitCode {
    let code = error.exit_code();
    eprintln!("{:?}", miette::Report::new(error));
    ExitCode::from(code)
}
