//! One suite over every device: the model behind an IOMMU, the model without one, and with the feature `verbs` the device that
//! `ANYPAGE_LAB_DEVICE` names (in the laboratory, rxe0).
//!
//! A case says what the specification has a request end with and which bytes it has it move. A device that does otherwise
//! stands in [`differences::DIFFERENCES`] with what it does and who is right; that is what is then held against it, so a
//! difference that has gone is found too. docs/conformance.md is that table.

mod atomics;
mod bytes;
mod cases;
mod differences;
mod events;
mod exchange;
mod messages;
mod objects;
mod remapped;
mod rig;
mod shared;
mod statuses;
mod talk;
mod windows;
mod world;

use libtest_mimic::{Arguments, Failed, Trial};
use rig::Rig;
use std::process::ExitCode;

/// Runs one case on one device.
fn hold(rig: &Rig, case: &cases::Case) -> Result<(), Failed> {
    let said = (case.run)(rig).map_err(|error| format!("{}: {error}", case.name))?;
    match differences::of(rig.kind(), &case.name) {
        None if said == case.expected => Ok(()),
        None => Err(format!("{said}; the specification has: {}", case.expected).into()),
        Some(known) if said == known.instead => Ok(()),
        Some(known) if said == case.expected => {
            Err(format!("the difference has gone ({said}): take it off the list ({})", known.why).into())
        }
        Some(known) => Err(format!("{said}; the list has: {}", known.instead).into()),
    }
}

fn main() -> ExitCode {
    let mut trials = Vec::new();
    for rig in rig::all() {
        let rig: &'static Rig = Box::leak(Box::new(rig));
        for case in cases::all() {
            let name = format!("{}: {}", rig.name(), case.name);
            let left_out = || differences::left_out(rig.kind(), &case.name).map(str::to_owned);
            match rig.lacks(case.mode, case.changes_memory).or_else(left_out) {
                Some(reason) => println!("SKIPPED {name}: {reason}"),
                None => trials.push(Trial::test(name, move || hold(rig, &case))),
            }
        }
    }
    if let Some(reason) = rig::no_device() {
        println!("SKIPPED the suite on a real device: {reason}");
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
