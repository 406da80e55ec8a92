//! Costs that are counted in instructions, not in seconds: valgrind's callgrind counts the same for the same binary
//! whatever else the machine does.
//!
//! The binary runs itself under valgrind with a number of rounds in [`ROUNDS`]; the difference between two numbers of
//! rounds leaves the start of the process out.

use hw_model::fault_plan::{Point, Points};
use libtest_mimic::{Arguments, Failed, Trial};
use std::hint::black_box;
use std::process::{Command, ExitCode};

const ROUNDS: &str = "ANYPAGE_INSTRUCTION_ROUNDS";
const SUBJECT: &str = "ANYPAGE_INSTRUCTION_SUBJECT";
const MANY: u64 = 100_000;

const POINT: Point = Point::fallible("instructions.point");

/// What is counted.
fn subject(name: &str, rounds: u64) {
    let points = black_box(Points::OFF);
    let mut failed = 0_u64;
    match name {
        "loop" => {
            for round in 0..rounds {
                failed += black_box(round) & 1;
            }
        }
        "point" => {
            for round in 0..rounds {
                if points.meet(POINT).fails() {
                    failed += 1;
                }
                failed += black_box(round) & 1;
            }
        }
        other => panic!("nothing is called {other}"),
    }
    black_box(failed);
}

/// Instructions that `rounds` rounds of `name` take, with the process around them.
fn count(name: &str, rounds: u64) -> Result<u64, Failed> {
    let me = std::env::current_exe()?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(me)
        .env(SUBJECT, name)
        .env(ROUNDS, rounds.to_string())
        .output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    let line = text.lines().find_map(|line| line.split_once("Collected : "));
    let (_, number) = line.ok_or_else(|| format!("valgrind counted nothing: {text}"))?;
    Ok(number.trim().parse()?)
}

/// Instructions of one round of `name`.
fn per_round(name: &str) -> Result<f64, Failed> {
    Ok((count(name, MANY)? - count(name, 0)?) as f64 / MANY as f64)
}

/// A point without a plan is a load, a compare and a branch that is never taken.
fn a_point_that_is_off_is_one_branch() -> Result<(), Failed> {
    let cost = per_round("point")? - per_round("loop")?;
    println!("a fault point that is off: {cost:.2} instructions");
    if cost > 3.5 {
        return Err(format!(
            "a fault point that is off costs {cost:.2} instructions, at most 3 are one branch"
        )
        .into());
    }
    Ok(())
}

fn main() -> ExitCode {
    if let (Ok(name), Ok(rounds)) = (std::env::var(SUBJECT), std::env::var(ROUNDS)) {
        subject(&name, rounds.parse().expect("a number of rounds"));
        return ExitCode::SUCCESS;
    }
    let reason = if cfg!(debug_assertions) {
        Some("what an optimised build costs: cargo test --release --test instructions")
    } else if Command::new("valgrind").arg("--version").output().is_err() {
        Some("valgrind is not installed")
    } else {
        None
    };
    let mut trials = Vec::new();
    match reason {
        Some(reason) => println!("SKIPPED a_point_that_is_off_is_one_branch: {reason}"),
        None => {
            trials.push(Trial::test("a_point_that_is_off_is_one_branch", a_point_that_is_off_is_one_branch))
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
