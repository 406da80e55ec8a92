//! The behaviours that Linux's own tests of HMM ask for (tools/testing/selftests/mm/hmm-tests.c, against lib/test_hmm.c),
//! written once and run over every address space: the simulated one, and the memory of this process on each rung of the
//! ladder, and where userfaultfd and seccomp are both refused.
//!
//! A trial is named after its behaviour: `conformance::sim::anon_read`, `conformance::process(events)::anon_read`. Each trial
//! of a process runs in a process of its own: an address that one behaviour unmaps must not become another one's memory, the
//! exact rung is installed before there is a second thread, and what a filter refuses it refuses for good.
//!
//! At the end the trials are counted by address space and rung. A behaviour that a machine cannot show says so and counts as
//! skipped.

mod behaviours;
mod device;
mod memory;
mod migration;
mod process;
mod process_only;
mod refuse;
mod sim;
mod world;

use hw_model::sync::{Arc, Mutex};
use libtest_mimic::{Arguments, Failed, Trial};
use process::{ProcessWorld, Where};
use sim::SimWorld;
use std::collections::BTreeMap;
use std::process::{Command, ExitCode};
use world::{Skip, Verdict, World};

/// In a child: the rung, and the behaviour to show.
const CHILD: &str = "ANYPAGE_CONFORMANCE";
/// The status of a child that cannot show it; the last line that it prints says why.
const SKIPPED: i32 = 77;

/// What a behaviour is shown over.
#[derive(Clone, Copy)]
enum Test {
    /// Every address space.
    Any(fn(&dyn World) -> Verdict),
    /// Those whose mappings the program changes by system calls: all but memory that it changes through us.
    Mapped(fn(&dyn World) -> Verdict),
    /// The simulated one.
    Sim(fn(&SimWorld) -> Verdict),
    /// Real processes, but not memory that is changed through us.
    Process(fn(&ProcessWorld) -> Verdict),
}

impl Test {
    fn applies(self, place: Option<Where>) -> bool {
        match (self, place) {
            (Self::Any(_), _) | (Self::Sim(_), None) | (Self::Mapped(_), None) => true,
            (Self::Mapped(_) | Self::Process(_), Some(place)) => place != Where::Owned,
            (Self::Sim(_), Some(_)) | (Self::Process(_), None) => false,
        }
    }
}

fn all() -> impl Iterator<Item = (&'static str, Test)> {
    let lists = [behaviours::ALL, migration::ALL, process_only::ALL];
    lists.into_iter().flatten().copied()
}

/// What became of the trials, by address space and rung: passed, failed, and what was skipped and why.
#[derive(Default)]
struct Tally {
    counts: BTreeMap<String, [u32; 2]>,
    skips: Vec<(String, String)>,
}

fn main() -> ExitCode {
    if let Some(wanted) = std::env::var_os(CHILD) {
        return child(&wanted.to_string_lossy());
    }
    let arguments = Arguments::from_args();
    let tally = Arc::new(Mutex::new(Tally::default()));
    let mut trials = Vec::new();
    for place in std::iter::once(None).chain(Where::ALL.map(Some)) {
        let space = place.map_or("sim".to_owned(), |place| format!("process({})", place.name()));
        for (name, test) in all().filter(|(_, test)| test.applies(place)) {
            let (tally, space) = (Arc::clone(&tally), space.clone());
            trials.push(Trial::test(format!("conformance::{space}::{name}"), move || {
                // A behaviour that panics has failed, and is counted as such before it is told.
                tally.lock().counts.entry(space.clone()).or_default()[1] += 1;
                let verdict = match place {
                    None => in_simulation(test),
                    Some(place) => in_a_process(place, name)?,
                };
                let mut tally = tally.lock();
                let counts = tally.counts.entry(space.clone()).or_default();
                counts[1] -= 1;
                match verdict {
                    Ok(()) => counts[0] += 1,
                    Err(Skip(reason)) => tally.skips.push((format!("conformance::{space}::{name}"), reason)),
                }
                Ok(())
            }));
        }
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    report(&tally.lock());
    conclusion.exit_code()
}

fn report(tally: &Tally) {
    for (space, [passed, failed]) in &tally.counts {
        let prefix = format!("conformance::{space}::");
        let skipped = tally.skips.iter().filter(|(name, _)| name.starts_with(&prefix)).count();
        println!("conformance over {space}: {passed} passed, {failed} failed, {skipped} skipped");
    }
    // As the test harness of Rust shows what a passed test printed, so that whoever counts finds a skip to be none.
    if !tally.skips.is_empty() {
        println!("\nsuccesses:\n");
    }
    for (name, reason) in &tally.skips {
        println!("---- {name} stdout ----\nSKIPPED {name}: {reason}\n");
    }
}

fn in_simulation(test: Test) -> Verdict {
    let world = SimWorld::new();
    let verdict = match test {
        Test::Any(run) | Test::Mapped(run) => run(&world),
        Test::Sim(run) => run(&world),
        Test::Process(_) => unreachable!("it does not apply"),
    };
    world.check();
    verdict
}

/// Has a child show it.
fn in_a_process(place: Where, name: &str) -> Result<Verdict, Failed> {
    let wanted = format!("{}:{name}", place.name());
    let output = Command::new(std::env::current_exe()?).env(CHILD, wanted).output()?;
    let out = String::from_utf8_lossy(&output.stdout);
    match output.status.code() {
        Some(0) => Ok(Ok(())),
        Some(SKIPPED) => Ok(Err(Skip(out.lines().last().unwrap_or_default().to_owned()))),
        _ => Err(format!("{}\n{out}{}", output.status, String::from_utf8_lossy(&output.stderr)).into()),
    }
}

fn child(wanted: &str) -> ExitCode {
    let found = wanted.split_once(':').and_then(|(place, name)| {
        let place = Where::ALL.into_iter().find(|known| known.name() == place)?;
        Some((place, all().find(|(known, _)| *known == name)?.1))
    });
    let Some((place, test)) = found else {
        eprintln!("{CHILD}={wanted} names no rung and behaviour");
        return ExitCode::FAILURE;
    };
    // First of all: what this installs has to be there before any other thread.
    let verdict = ProcessWorld::new(place).and_then(|world| match test {
        Test::Any(run) | Test::Mapped(run) => run(&world),
        Test::Process(run) => run(&world),
        Test::Sim(_) => unreachable!("it does not apply"),
    });
    match verdict {
        Ok(()) => ExitCode::SUCCESS,
        Err(Skip(reason)) => {
            println!("{reason}");
            ExitCode::from(SKIPPED as u8)
        }
    }
}
