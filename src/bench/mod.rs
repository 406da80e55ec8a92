//! `anypage bench`: what registration costs.
//!
//! Devices are measured side by side: each round registers the same memory once with every device in every mode, and does
//! once what the kernel can least be asked for ([`Floor`], [`RealPin`]), so that whatever else the machine does disturbs all
//! of them alike. What a round does is in `round`, which rounds there are in `plan`, and in `crowd` what a region costs where
//! there are many.

mod compare;
mod crowd;
mod devices;
mod floor;
mod host;
mod pin;
mod plan;
mod report;
mod round;

pub use floor::Floor;
pub use pin::RealPin;
pub use report::{CrowdRow, Host, Report, Row};

use crate::range::OutOfRange;
use clap::{Args as ClapArgs, Subcommand, ValueEnum};
use devices::Registrar;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// What to measure.
#[derive(ClapArgs, Clone, Debug)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Clone, Debug)]
enum What {
    /// Registers memory of every size and kind in every mode.
    Register(RegisterArgs),
}

/// The kind of the pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Pages {
    /// 4 KiB pages of private memory.
    Small,
    /// Transparent huge pages, where the kernel gives them.
    Thp,
    /// A private mapping of a file.
    File,
    /// Shared memory.
    Shared,
    /// A quarter of each.
    Mixed,
}

/// How it is registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum How {
    /// Every page from the start.
    Pinned,
    /// What is there already; the rest by page faults.
    OnDemand,
    /// On demand, with nothing linked before it is asked for. Of the model alone: a real device begins as its driver does.
    Empty,
    /// On demand, and then all of it prefetched for writing.
    Prefetch,
}

/// What is in memory before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Before {
    /// Nothing.
    Cold,
    /// All of it.
    Warm,
}

/// The options of the measurement.
#[derive(ClapArgs, Clone, Debug)]
#[command(after_help = "Exit status: 0 measured, 2 the command line was wrong, 3 this machine cannot do it.")]
pub struct RegisterArgs {
    /// `model`, or the name of an RDMA device, which needs a build with the feature `verbs`; several are measured in turns.
    #[arg(long = "device", value_name = "NAME", default_value = "model", value_delimiter = ',')]
    pub devices: Vec<String>,
    /// Bytes of a region. Takes K, M and G. [default: 4K,64K,1M,16M,64M,256M; with --quick 4K,64M,256M]
    #[arg(long, value_delimiter = ',', value_parser = crate::demo::parse_size)]
    pub sizes: Vec<u64>,
    /// The pages under it. [default: all; with --quick small,thp]
    #[arg(long, value_enum, value_delimiter = ',')]
    pub pages: Vec<Pages>,
    /// How it is registered.
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["pinned", "on-demand", "empty", "prefetch"])]
    pub modes: Vec<How>,
    /// What is in memory before. [default: both; with --quick warm]
    #[arg(long, value_enum, value_delimiter = ',')]
    pub before: Vec<Before>,
    /// Threads that register at a time, each its own memory.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    pub threads: Vec<usize>,
    /// Regions of one page that each device has already.
    #[arg(long, value_delimiter = ',', default_value = "0")]
    pub regions: Vec<u64>,
    /// So many regions of one page, kept, instead: in one mapping, and in as many mappings as the process may have. Says what
    /// the first thousand cost, and the last.
    #[arg(long, value_name = "REGIONS")]
    pub crowd: Option<u64>,
    /// Seconds for each size, kind, state and number. [default: 1; with --quick 0.2]
    #[arg(long, value_name = "SECONDS")]
    pub time: Option<f64>,
    /// Fewer cases and less time.
    #[arg(long)]
    pub quick: bool,
    /// Print JSON (docs/bench.schema.json).
    #[arg(long)]
    pub json: bool,
    /// A result of --json, to say what has changed since.
    #[arg(long, value_name = "OLD.json")]
    pub compare: Option<PathBuf>,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum BenchError {
    /// An option is out of its range.
    #[error(transparent)]
    #[diagnostic(transparent)]
    OutOfRange(#[from] OutOfRange),
    /// The old result cannot be read.
    #[error("{} is no result of --json", path.display())]
    #[diagnostic(help("make one with `anypage bench register --json >OLD.json`"))]
    Old {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No such device, or none in this build.
    #[error("{device} cannot be measured")]
    #[diagnostic(help(
        "`model` is always there; others need `cargo build --features verbs`, and tests/lab/vm has rxe0"
    ))]
    Device {
        /// Asked for.
        device: String,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
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
}

impl BenchError {
    fn exit_code(&self) -> u8 {
        match self {
            Self::OutOfRange(_) | Self::Old { .. } => 2,
            Self::Device { .. } | Self::Setup { .. } => 3,
        }
    }
}

fn setup<E: Into<Box<dyn std::error::Error + Send + Sync>>>(what: &'static str) -> impl Fn(E) -> BenchError {
    move |error| BenchError::Setup { what, source: error.into() }
}

/// Measures and prints. 0: measured; 2: bad input; 3: this machine cannot.
#[must_use]
pub fn main(args: &Args) -> ExitCode {
    let What::Register(args) = &args.what;
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = error.exit_code();
            eprintln!("{:?}", miette::Report::new(error));
            ExitCode::from(code)
        }
    }
}

fn run(args: &RegisterArgs) -> Result<(), BenchError> {
    let old = args.compare.as_deref().map(read).transpose()?;
    let report = measure(args)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report).expect("the report is plain data"));
        return Ok(());
    }
    println!("{report}");
    if let Some(old) = old {
        println!("{}", compare::table(&old, &report));
    }
    Ok(())
}

fn read(path: &Path) -> Result<Report, BenchError> {
    let refused = |source| BenchError::Old { path: path.to_owned(), source };
    let text = std::fs::read_to_string(path).map_err(|error| refused(error.into()))?;
    serde_json::from_str(&text).map_err(|error| refused(error.into()))
}

/// Measures what `args` ask for.
///
/// # Errors
/// See [`BenchError`].
pub fn measure(args: &RegisterArgs) -> Result<Report, BenchError> {
    let plan = plan::Plan::of(args)?;
    let space = odp::space::process::ProcessSpace::open(odp::space::process::Options::default())
        .map_err(setup("the memory of this process cannot be given to a device"))?;
    let devices =
        args.devices.iter().map(|name| Registrar::open(name, &space)).collect::<Result<Vec<_>, _>>()?;
    let mut report = Report::new(args.devices.clone(), &space);
    match args.crowd {
        Some(count) => report.crowds = crowd::measure(&devices, &space, count, &args.modes)?,
        None => report.rows = plan.run(&devices, &space, args.json)?,
    }
    Ok(report)
}

#[cfg(test)]
mod tests;
