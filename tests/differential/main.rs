//! The same programs on two devices: the model behind an IOMMU against the model without one, and with the feature `verbs`
//! against the device that `ANYPAGE_LAB_DEVICE` names (in the laboratory, rxe0).
//!
//! After each step both must have said the same, and the bytes that it was to change must be the same; at the end, all of
//! the memory. What docs/conformance.md explains is counted, row by row. Anything else is shrunk to the shortest program that
//! still shows it, printed with its seed, and fails.

#[path = "../conformance/bytes.rs"]
mod bytes;
mod explained;
mod play;
mod program;
#[path = "../conformance/remapped.rs"]
mod remapped;
#[path = "../conformance/rig.rs"]
mod rig;

use clap::Parser;
use explained::Known;
use mr::Mode;
use play::{Error, Player};
use program::Step;
use rig::{Kind, Rig};
use std::collections::BTreeMap;
use std::process::ExitCode;

#[derive(Parser)]
struct Arguments {
    /// Programs to run.
    #[arg(long, default_value_t = 300)]
    programs: u64,
    /// The seed of the first; the next has the next.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Say each step before it is run: for a machine that dies of one.
    #[arg(long)]
    trace: bool,
    /// What the test runner says to every test: passed over.
    #[arg(hide = true, trailing_var_arg = true, allow_hyphen_values = true)]
    _rest: Vec<String>,
}

/// How a program ended.
enum End {
    Same { steps: usize },
    Explained { steps: usize },
    Differs(String),
}

/// Runs a program on both; `rows` counts what is explained on the way.
fn compare(
    pair: [&Rig; 2],
    program: &[Step],
    rows: &mut BTreeMap<Known, u64>,
    trace: bool,
) -> Result<End, Error> {
    let [mut ours, mut theirs] = [Player::new(pair[0])?, Player::new(pair[1])?];
    for (number, step) in program.iter().enumerate() {
        if trace {
            println!("    step {number}: {step:?}");
        }
        let said = [ours.step(step)?, theirs.step(step)?];
        if said[0] == said[1] {
            continue;
        }
        let row = (pair[1].kind() == Kind::Rxe).then(|| explained::of(step, &ours, [&said[0], &said[1]]));
        match row.flatten() {
            Some(row) => {
                *rows.entry(row).or_default() += 1;
                if row.ends {
                    return Ok(End::Explained { steps: number });
                }
            }
            None if said[0].said == said[1].said => {
                return Ok(End::Differs(format!("step {number}: both {}, other bytes", said[0].said)));
            }
            None => {
                let [one, other] = [0, 1].map(|at| format!("{}: {}", pair[at].name(), said[at].said));
                return Ok(End::Differs(format!("step {number}: {one}; {other}")));
            }
        }
    }
    let [one, other] = [ours.memory()?, theirs.memory()?];
    match one.iter().zip(&other).position(|(one, other)| one != other) {
        None => Ok(End::Same { steps: program.len() }),
        Some(at) => Ok(End::Differs(format!("at the end: memory differs from byte {at:#x} on"))),
    }
}

fn differs(pair: [&Rig; 2], program: &[Step]) -> Result<Option<String>, Error> {
    Ok(match compare(pair, program, &mut BTreeMap::new(), false)? {
        End::Differs(how) => Some(how),
        End::Same { .. } | End::Explained { .. } => None,
    })
}

/// Leaves out steps as long as it still differs: halves first, single ones last.
fn shrunk(pair: [&Rig; 2], mut program: Vec<Step>) -> Result<Vec<Step>, Error> {
    let mut size = program.len().div_ceil(2);
    loop {
        let mut at = 0;
        while at < program.len() {
            let mut shorter = program.clone();
            shorter.drain(at..(at + size).min(program.len()));
            if differs(pair, &shorter)?.is_some() {
                program = shorter;
            } else {
                at += size;
            }
        }
        if size == 1 {
            return Ok(program);
        }
        size = size.div_ceil(2);
    }
}

/// Runs all programs on one pair. Whether they agreed.
fn run(pair: [&Rig; 2], arguments: &Arguments) -> Result<bool, Error> {
    let mut rows = BTreeMap::new();
    let (mut same, mut ended, mut steps, mut agreed) = (0, 0, 0, true);
    for seed in arguments.seed..arguments.seed + arguments.programs {
        let program = program::of(seed);
        if arguments.trace {
            println!("seed {seed}");
        }
        match compare(pair, &program, &mut rows, arguments.trace)
            .map_err(|error| format!("seed {seed}: {error}"))?
        {
            End::Same { steps: ran } => (same, steps) = (same + 1, steps + ran),
            End::Explained { steps: ran } => (ended, steps) = (ended + 1, steps + ran),
            End::Differs(how) => {
                println!("seed {seed}: {how}");
                let program = shrunk(pair, program)?;
                let how = differs(pair, &program)?.unwrap_or_else(|| "not always".to_owned());
                println!("shrunk to {} steps ({how}); again with --programs 1 --seed {seed}:", program.len());
                program.iter().for_each(|step| println!("    {step:?}"));
                agreed = false;
            }
        }
    }
    let [one, other] = pair.map(Rig::name);
    println!(
        "differential, {one} and {other}: {} programs from seed {}, {steps} steps the same; {same} programs to the end, \
         {ended} up to a known difference",
        arguments.programs, arguments.seed
    );
    rows.iter().for_each(|(row, count)| println!("    {count} times {}", row.what));
    Ok(agreed)
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let rigs = rig::all();
    if let Some(reason) = rig::no_device() {
        println!("SKIPPED the programs on a real device: {reason}");
    }
    let mut agreed = true;
    for other in &rigs[1..] {
        let pair = [&rigs[0], other];
        let lacks = pair.into_iter().find_map(|rig| rig.lacks(Mode::OnDemand, true));
        if let Some(reason) = lacks {
            println!("SKIPPED the programs on {} and {}: {reason}", pair[0].name(), other.name());
            continue;
        }
        match run(pair, &arguments) {
            Ok(same) => agreed &= same,
            Err(error) => {
                println!("a program could not be run: {error}");
                agreed = false;
            }
        }
    }
    if agreed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
