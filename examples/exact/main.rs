//! Memory is given back while a peer goes on writing to it, and something else is mapped at its address: not one byte of
//! that changes, and the peer is told.
//!
//! `cargo run --release --example exact`
//!
//! A round: malloc, register, free, all with a peer writing by the region's key, over and over. Then other memory is mapped
//! at the very address and filled, while the peer still writes. Its requests must succeed up to the free, end with a remote
//! access error from then on, and leave the new memory alone. The region is anchored
//! ([`UserRange::anchored`](odp::space::UserRange::anchored)): its key ends with the mapping that it was made of.
//!
//! With `--follow` the region is one that follows its addresses, as on-demand regions do by default: then the peer goes on
//! into the new memory, and the exit status is 1.
//!
//! It needs the exact rung, which is installed first thing in `main`; where seccomp is refused it says so and exits with 3.

mod memory;

use anypage::machine::{End, Machine, MachineConfig};
use clap::Parser;
use hw_model::hca::{Remote, SendRequest, Sge, Status};
use hw_model::sync::Arc;
use hw_model::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use mr::{Region, RegisterOptions};
use odp::space::process::{Exact, Options, OwnedMemory, ProcessSpace};
use odp::space::{AddressSpace, Rung};
use serde::Serialize;
use std::error::Error;
use std::fmt;
use std::process::ExitCode;
use std::time::{Duration, Instant};

type Failure = Box<dyn Error + Send + Sync>;

/// Bytes of an allocation: so many that malloc maps it apart, and free unmaps it.
const BYTES: u64 = 256 << 10;
/// Bytes of one write of the peer.
const MESSAGE: u32 = 8 << 10;
/// A request that takes longer than this never ends.
const PATIENCE: Duration = Duration::from_secs(60);

/// Frees registered memory under a peer's writes, maps other memory in its place, and looks what became of it.
///
/// Exit status: 0 every round was right, 1 one was not, 2 bad input, 3 this machine cannot do it.
#[derive(Parser)]
#[command(name = "exact")]
struct Args {
    /// Rounds.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// Register the memory so that the key follows the address: what the peer does then to memory that it was never given.
    #[arg(long)]
    follow: bool,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

/// What happened.
#[derive(Default, Serialize)]
struct Report {
    rounds: u64,
    /// The new memory came to lie at the old address.
    same_address: u64,
    /// Writes of the peer that were done while the memory was there.
    writes: u64,
    /// Rounds in which the peer was told of a remote access error.
    refused: u64,
    /// Rounds in which it was told something else.
    other_statuses: u64,
    /// Bytes of new memory that changed.
    changed_bytes: u64,
    /// DMA refused because it came through a translation that had gone: there is to be none.
    stale_uses: u64,
    /// System calls that went through the supervisor.
    supervised_calls: u64,
    seconds: f64,
}

impl Report {
    fn is_clean(&self) -> bool {
        self.changed_bytes == 0 && self.stale_uses == 0 && self.refused == self.rounds
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "rounds                        {:>12}", self.rounds)?;
        writeln!(f, "new memory at the old address {:>12}", self.same_address)?;
        writeln!(f, "writes before the free        {:>12}", self.writes)?;
        writeln!(f, "rounds the peer was refused   {:>12}", self.refused)?;
        writeln!(f, "rounds with another status    {:>12}", self.other_statuses)?;
        writeln!(f, "bytes of new memory changed   {:>12}", self.changed_bytes)?;
        writeln!(f, "uses of stale translations    {:>12}", self.stale_uses)?;
        writeln!(f, "calls through the supervisor  {:>12}", self.supervised_calls)?;
        writeln!(f, "seconds                       {:>12.1}", self.seconds)?;
        let verdict = if self.is_clean() { "right: not one byte changed" } else { "WRONG" };
        writeln!(f, "{verdict}")
    }
}

fn main() -> ExitCode {
    // Before any other thread: one that is there already could not be filtered.
    let exact = Exact::install();
    let args = Args::parse();
    let exact = match exact {
        Ok(exact) => exact,
        Err(error) => {
            eprintln!("exact: {error}");
            return ExitCode::from(3);
        }
    };
    match run(exact, args.rounds, args.follow) {
        Ok(report) => {
            if args.json {
                println!("{}", serde_json::to_string_pretty(&report).expect("the report is plain data"));
            } else {
                print!("{report}");
            }
            ExitCode::from(u8::from(!report.is_clean()))
        }
        Err(error) => {
            eprintln!("exact: {error}");
            ExitCode::from(3)
        }
    }
}

fn run(exact: Exact, rounds: u64, follow: bool) -> Result<Report, Failure> {
    memory::map_large_allocations_apart();
    let space = ProcessSpace::open(Options { exact: Some(exact), ..Options::default() })?;
    let machine = Machine::new(space.memory(), None, &MachineConfig::default())?;
    let mirror = Arc::new(OwnedMemory::new(&space, u64::from(MESSAGE))?);
    mirror.write_at(0, &vec![0xee; MESSAGE as usize])?;
    // The near end's own region is not written: its queue pair answers for all regions of its protection domain.
    let home = Arc::new(OwnedMemory::new(&space, 4096)?);
    let mut near = End::new(&machine.near, &home.user_range(), RegisterOptions::on_demand())?;
    let mut far = End::new(&machine.far, &mirror.user_range(), RegisterOptions::pinned())?;
    let started = Instant::now();
    let mut report = Report { rounds, ..Report::default() };
    for round in 0..rounds {
        near.renew(&machine.near)?;
        far.renew(&machine.far)?;
        near.connect(&far)?;
        one_round(&space, (&near, &far), (round, follow), &mut report)?;
    }
    report.seconds = started.elapsed().as_secs_f64();
    report.stale_uses = space.stats().retired_uses;
    report.supervised_calls = exact.calls();
    Ok(report)
}

fn one_round(
    space: &Arc<ProcessSpace>,
    (near, far): (&End, &End),
    (round, follow): (u64, bool),
    report: &mut Report,
) -> Result<(), Failure> {
    let block =
        memory::Block::allocate(BYTES).ok_or("malloc gives no memory, or not in a mapping of its own")?;
    let range = block.pages();
    if space.rung(range) != Rung::Exact {
        return Err(format!("{range} is on the {} rung", space.rung(range)).into());
    }
    let memory = block.user_range(space);
    let memory = if follow { memory } else { memory.anchored()? };
    let region = Arc::clone(&near.pd).register(&memory, RegisterOptions::on_demand())?;
    let (written, there) = (AtomicU64::new(0), AtomicBool::new(false));
    let (status, other) = std::thread::scope(|scope| {
        let peer = scope.spawn(|| peer(far, &*region, (&written, &there)));
        let waited = Instant::now();
        while written.load(Ordering::Acquire) < 1 + round % 4 && !peer.is_finished() {
            if waited.elapsed() > PATIENCE {
                break;
            }
            std::thread::yield_now();
        }
        // Freed with the region there and the peer writing; mapped anew with the peer still writing.
        block.free();
        let other = memory::Other::map(range, (round % 251) as u8 | 1);
        there.store(true, Ordering::Release);
        (peer.join(), other)
    });
    let status = status.map_err(|_| "the peer's thread panicked")??;
    report.writes += written.load(Ordering::Relaxed);
    report.refused += u64::from(status == Status::RemoteAccessError);
    report.other_statuses += u64::from(status != Status::RemoteAccessError);
    if let Some(other) = other {
        report.same_address += 1;
        report.changed_bytes += other.changed_bytes();
    }
    drop(region);
    Ok(())
}

/// Writes to one place of the region after another until it is refused, or has been at it all over after the new memory is
/// `there`; what it was told last.
fn peer(
    far: &End,
    region: &dyn Region,
    (written, there): (&AtomicU64, &AtomicBool),
) -> Result<Status, Failure> {
    let places = region.len() / u64::from(MESSAGE);
    let local = [Sge { key: far.region.key(), address: far.region.address(), length: MESSAGE }];
    let mut completions = Vec::new();
    let (mut place, mut left) = (0, places);
    loop {
        let address = region.address().offset(place % places * u64::from(MESSAGE));
        let remote = Remote { key: region.key(), address };
        place += 1;
        far.qp.post_send(&SendRequest::write(1, &local, remote))?;
        completions.clear();
        while far.cq.poll(&mut completions, 1)? == 0 {
            if !far.cq.wait(PATIENCE) {
                return Err("a request of the peer never ended".into());
            }
        }
        if completions[0].status != Status::Success {
            return Ok(completions[0].status);
        }
        if !there.load(Ordering::Acquire) {
            written.fetch_add(1, Ordering::Release);
            continue;
        }
        left -= 1;
        if left == 0 {
            return Ok(Status::Success);
        }
    }
}

/// A new queue pair and queue in the place of those that failed.
trait Renew {
    fn renew(&mut self, device: &Arc<mr::device::model::ModelDevice>) -> Result<(), Failure>;
}

impl Renew for End {
    fn renew(&mut self, device: &Arc<mr::device::model::ModelDevice>) -> Result<(), Failure> {
        use mr::Device;
        self.cq = Arc::clone(device).create_cq(16)?;
        self.qp = Arc::clone(&self.pd).create_qp(Arc::clone(&self.cq), 16)?;
        Ok(())
    }
}
