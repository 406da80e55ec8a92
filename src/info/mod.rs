//! `anypage info`: what this machine gives: the device and all its limits, how well changes of memory are seen and why not
//! better, what of the kernel that rests on, the RDMA devices that the kernel has, and what each cannot do.

pub(crate) mod kernel;
mod report;
mod verbs;

pub use report::Report;

use clap::Args as ClapArgs;
use std::process::ExitCode;

/// The question.
#[derive(ClapArgs, Clone, Debug)]
#[command(
    after_help = "Exit status: 0 the report was printed; 2 the command line was wrong; 3 this machine cannot run anypage at all, and why is said."
)]
pub struct Args {
    /// Print JSON (docs/info.schema.json).
    #[arg(long)]
    json: bool,
}

/// Prints the report. 3: the memory of this process cannot be watched or copied in any way.
///
/// To be called while the process has one thread, as it tries whether the exact rung can be had by installing it.
#[must_use]
pub fn main(args: &Args) -> ExitCode {
    let report = match Report::new() {
        Ok(report) => report,
        Err(error) => {
            anstream::eprintln!("error: {error}");
            return ExitCode::from(3);
        }
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report).expect("the report is plain data"));
    } else {
        print!("{report}");
    }
    ExitCode::SUCCESS
}
