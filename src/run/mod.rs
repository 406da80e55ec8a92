//! `anypage run`: starts a program with our libibverbs in the place of the system's.
//!
//! No root, no kernel module, no file installed: the dynamic linker finds the library through LD_LIBRARY_PATH, and the
//! library finds what is asked of it in the environment.

mod environment;
mod library;
mod plan;
mod program;
mod report;
mod supervise;

use clap::{Args as ClapArgs, ValueEnum};
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

pub use library::LibraryError;
pub use plan::PlanFileError;
pub use program::ProgramError;

/// How the program learns that its memory changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RungChoice {
    /// Every call that takes pages away is bracketed.
    Exact,
    /// userfaultfd tells.
    Events,
    /// Mappings are compared before each burst.
    Poll,
}

/// What carries packets between processes of one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LinkChoice {
    /// Shared memory.
    Auto,
    /// RoCEv2 over UDP, as between hosts.
    Udp,
}

impl RungChoice {
    fn word(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Events => "events",
            Self::Poll => "poll",
        }
    }
}

/// The options of `anypage run`.
#[derive(ClapArgs, Clone, Debug)]
pub struct Args {
    /// RDMA devices that the program sees.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=16))]
    devices: u32,
    /// The strongest way of learning of changes of memory that is tried; weaker ones are fallen back to, and named.
    #[arg(long, value_enum, default_value_t = RungChoice::Exact)]
    rung: RungChoice,
    /// What carries packets between processes of this host that are all started so.
    #[arg(long, value_enum, default_value_t = LinkChoice::Auto)]
    link: LinkChoice,
    /// On-demand regions begin with no page mapped, and a fault brings in what it is about and no more: faults can be counted.
    #[arg(long)]
    cold: bool,
    /// A file of rules that say what is to go wrong (docs/run.md).
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// Exit status 1 if a rule of the plan never fired, although the program succeeded.
    #[arg(long, requires = "plan")]
    plan_strict: bool,
    /// Writes the packets of each process and device to FILE, its process number and the device's name: FILE1234-anypage0.pcap.
    #[arg(long, value_name = "FILE")]
    pcap: Option<PathBuf>,
    /// Says at the end what the devices counted.
    #[arg(long)]
    stats: bool,
    /// Prints what to set by hand instead of starting anything.
    #[arg(long)]
    print_env: bool,
    /// The program and its arguments.
    #[arg(last = true, value_name = "PROGRAM", required_unless_present = "print_env")]
    program: Vec<OsString>,
}

/// Why a program was not started.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum RunError {
    /// There is no library to start it with.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// The fault plan.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Plan(#[from] PlanFileError),
    /// The program itself.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// The directory for the reports of processes.
    #[error("no directory for reports: {0}")]
    Reports(std::io::Error),
}

impl RunError {
    /// 2 for a wrong command line, 3 for a machine that cannot do it.
    fn status(&self) -> u8 {
        match self {
            Self::Library(_) | Self::Reports(_) => 3,
            Self::Plan(_) | Self::Program(_) => 2,
        }
    }
}

/// Runs the command. Where it can, the program takes the place of this process, and its exit status is the program's.
#[must_use]
pub fn main(args: &Args) -> ExitCode {
    match start(args) {
        Ok(code) => code,
        Err(error) => {
            let status = error.status();
            eprintln!("{:?}", miette::Report::new(error));
            ExitCode::from(status)
        }
    }
}

fn start(args: &Args) -> Result<ExitCode, RunError> {
    let program = args.program.first().map(|name| program::find(name)).transpose()?;
    let plan = args.plan.as_deref().map(plan::read).transpose()?;
    let node = program::private_node(program.as_deref());
    let library = library::provide(node)?;
    let mut variables = environment::variables(args, &library);
    if args.print_env {
        for (name, value) in &variables {
            anstream::println!("export {name}={}", environment::quoted(value));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let Some(path) = program else { return Ok(ExitCode::SUCCESS) };
    if plan.is_none() && !args.stats {
        return Err(program::replace(&path, &args.program, &variables).into());
    }
    let reports = tempfile::tempdir().map_err(RunError::Reports)?;
    variables.push((environment::REPORT, reports.path().into()));
    let status = supervise::run(&path, &args.program, &variables)?;
    let left = report::collect(reports.path());
    if args.stats {
        report::print_counts(&left);
    }
    let all_fired = plan.as_ref().is_none_or(|plan| report::print_fired(plan, &left));
    Ok(if status == 0 && args.plan_strict && !all_fired { ExitCode::FAILURE } else { ExitCode::from(status) })
}
