//! The command line.

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// One RDMA memory region out of any mixture of pages: with no RDMA hardware, no kernel module and no root.
#[derive(Parser)]
#[command(
    version,
    about,
    after_help = "Exit status: 0 all is well, 1 a check failed, 2 the command line or its input was wrong, 3 this machine cannot do it."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Registers a range of real mixed memory as one on-demand region, moves data through it while its pages really
    /// change, and verifies every byte.
    Demo(anypage::demo::Args),
    /// Simulates whole worlds from seeds, and checks every byte and every invariant.
    Sim(anypage::sim::Args),
    /// Says which way DMA takes to a page and by which rule of the kernel; without a question, the whole table.
    Route(anypage::route::Args),
    /// Says what this machine gives: devices, limits, the rung of the ladder in force and why not a better one.
    Info(anypage::info::Args),
    /// Measures rate and latency of one operation between two HCAs of this process; with --listen and --connect between two
    /// processes or hosts over RoCEv2, every byte verified.
    Perf(anypage::perf::Args),
    /// Measures what registration costs, on any device, beside the least that the kernel can be asked for.
    Bench(anypage::bench::Args),
    /// Starts a program with modelled RDMA devices: our libibverbs takes the place of the system's.
    Run(anypage::run::Args),
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let cli = Cli::parse();
    match cli.command {
        Command::Demo(args) => anypage::demo::main(&args),
        Command::Sim(args) => anypage::sim::main(&args),
        Command::Route(args) => anypage::route::main(&args),
        Command::Info(args) => anypage::info::main(&args),
        Command::Perf(args) => anypage::perf::main(&args),
        Command::Bench(args) => anypage::bench::main(&args),
        Command::Run(args) => anypage::run::main(&args),
    }
}
