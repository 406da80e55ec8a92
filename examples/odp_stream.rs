//! Streams over memory that is not there yet: what on-demand paging costs, with prefetch and without.
//!
//! A peer reads a region from its start to its end, twice: cold, when no page of it has ever been touched, and warm. Once
//! with every fault answered with what was asked for, once with windows that grow while the stream goes on, and once after
//! advice to prefetch all of it. Exit status: 0 every stream ended well, 1 one did not, 2 bad input.
//!
//! `cargo run --release --example odp_stream [-- --size 1024 --message 64 --json]`

use anypage::machine::{BuildError, End, Machine, MachineConfig};
use anypage::mixed::{Kind, MixedMemory};
use clap::Parser;
use comfy_table::{CellAlignment, Table, presets};
use hw_model::addr::PAGE_SIZE;
use hw_model::hca::{Remote, SendRequest, Sge, Status};
use hw_model::sync::Arc;
use mr::RegisterOptions;
use mr::device::model::FaultPolicy;
use odp::fault::Want;
use odp::prefetch::PrefetchPolicy;
use odp::space::process::{Options, OwnedMemory, ProcessSpace};
use odp::space::{Access, AddressSpace};
use serde::Serialize;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Messages on their way at a time.
const DEPTH: u64 = 8;

#[derive(Parser)]
#[command(about = "What a stream over memory that is not there yet costs, with prefetch and without.")]
struct Args {
    /// Size of the region, in MiB.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=65536))]
    size: u64,
    /// Size of a message, in KiB.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(4..=1024))]
    message: u64,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// What is done before the device asks for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Prefetch {
    Off,
    Adaptive,
    Advice,
}

#[derive(Debug, Serialize)]
struct Row {
    prefetch: Prefetch,
    stream: &'static str,
    /// Page faults of the device.
    faults: u64,
    /// Pages that came before the device asked for them.
    pages_ahead: u64,
    microseconds: u64,
    mib_per_second: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    bytes: u64,
    message: u64,
    /// What the address space promises about the memory.
    rung: String,
    /// Populating and looking at as much memory, and nothing else.
    floor_microseconds: u64,
    rows: Vec<Row>,
}

fn stream(near: &End, far: &End, bytes: u64, message: u64) -> Result<Duration, BuildError> {
    let start = Instant::now();
    let (mut posted, mut ended, mut done) = (0, 0, Vec::new());
    while ended < bytes / message {
        while posted < bytes / message && posted - ended < DEPTH {
            let remote =
                Remote { key: near.region.key(), address: near.region.address().offset(posted * message) };
            let address = far.region.address().offset(posted % DEPTH * message);
            let local = [Sge { key: far.region.key(), address, length: message as u32 }];
            far.qp.post_send(&SendRequest::read(posted, &local, remote))?;
            posted += 1;
        }
        done.clear();
        if far.cq.poll(&mut done, DEPTH as usize)? == 0 {
            far.cq.wait(Duration::from_secs(1));
        }
        if let Some(failed) = done.iter().find(|done| done.status != Status::Success) {
            return Err(format!("a read ended with {:?}", failed.status).into());
        }
        ended += done.len() as u64;
    }
    Ok(start.elapsed())
}

fn run(space: &Arc<ProcessSpace>, args: &Args, prefetch: Prefetch) -> Result<[Row; 2], BuildError> {
    let (bytes, message) = (args.size << 20, args.message << 10);
    let policy = match prefetch {
        Prefetch::Adaptive => PrefetchPolicy::ADAPTIVE,
        Prefetch::Off | Prefetch::Advice => PrefetchPolicy::Off,
    };
    let faults = FaultPolicy { prefetch: policy, ..FaultPolicy::default() };
    let machine = Machine::new(space.memory(), None, &MachineConfig { faults, ..MachineConfig::default() })?;
    let memory = Arc::new(MixedMemory::new(&[(Kind::Untouched, bytes)])?);
    let range = memory.user_range(Arc::clone(space) as _);
    let near = End::new(&machine.near, &range, RegisterOptions::on_demand())?;
    let mirror = Arc::new(OwnedMemory::new(space, DEPTH * message)?);
    let far = End::new(&machine.far, &mirror.user_range(), RegisterOptions::pinned())?;
    near.connect(&far)?;
    let start = Instant::now();
    if prefetch == Prefetch::Advice {
        near.region.advise(0, bytes, Want::Fault(Access::Read))?;
    }
    let advised = start.elapsed();
    let row = |stream_name, more: Duration| {
        let before = near.region.counters();
        let took = stream(&near, &far, bytes, message)? + more;
        let counted = near.region.counters() - before;
        Ok::<_, BuildError>(Row {
            prefetch,
            stream: stream_name,
            faults: counted.page_faults,
            pages_ahead: counted.pages_ahead,
            microseconds: took.as_micros() as u64,
            mib_per_second: args.size as f64 / took.as_secs_f64(),
        })
    };
    // What the advice took is part of the cold stream's time.
    let mut cold = row("cold", advised)?;
    if prefetch == Prefetch::Advice {
        cold.pages_ahead = near.region.counters().page_prefetch;
    }
    Ok([cold, row("warm", Duration::ZERO)?])
}

fn floor(space: &Arc<ProcessSpace>, bytes: u64) -> Result<Duration, BuildError> {
    let memory = Arc::new(MixedMemory::new(&[(Kind::Untouched, bytes)])?);
    let start = Instant::now();
    space.fault(memory.range(), Access::Read, &mut Vec::new())?;
    Ok(start.elapsed())
}

fn report(args: &Args) -> Result<Report, BuildError> {
    let space = ProcessSpace::open(Options::default())?;
    let floor = floor(&space, args.size << 20)?;
    let mut rows = Vec::new();
    for prefetch in [Prefetch::Off, Prefetch::Adaptive, Prefetch::Advice] {
        rows.extend(run(&space, args, prefetch)?);
    }
    Ok(Report {
        bytes: args.size << 20,
        message: args.message << 10,
        rung: space.capabilities().rung.to_string(),
        floor_microseconds: floor.as_micros() as u64,
        rows,
    })
}

fn print(report: &Report) {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["prefetch", "stream", "faults", "pages ahead", "ms", "MiB/s"]);
    for column in 2..6 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    for row in &report.rows {
        table.add_row([
            format!("{:?}", row.prefetch).to_lowercase(),
            row.stream.to_owned(),
            row.faults.to_string(),
            row.pages_ahead.to_string(),
            format!("{:.1}", row.microseconds as f64 / 1e3),
            format!("{:.0}", row.mib_per_second),
        ]);
    }
    let (mib, pages) = (report.bytes >> 20, report.bytes / PAGE_SIZE);
    println!("{mib} MiB ({pages} pages) in messages of {} KiB, rung {}", report.message >> 10, report.rung);
    println!("{table}");
    println!("faulting as much in, and nothing else: {:.1} ms", report.floor_microseconds as f64 / 1e3);
}

fn main() -> ExitCode {
    let args = Args::parse();
    match report(&args) {
        Ok(report) if args.json => {
            println!("{}", serde_json::to_string_pretty(&report).expect("a report is JSON"));
            ExitCode::SUCCESS
        }
        Ok(report) => {
            print(&report);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("odp_stream: {error}");
            ExitCode::FAILURE
        }
    }
}
