//! The backend of real devices, on a device: the one that `ANYPAGE_LAB_DEVICE` names (rxe0, in the laboratory), and else the drop-in
//! libibverbs, in a process of this binary's that `anypage run` starts. What a device lacks is an error that names both, and
//! that is what is then tested of it.

mod handed;
mod handles;
mod kinds;
mod windows;
mod world;

use libtest_mimic::{Arguments, Failed, Trial};
use std::process::{Command, ExitCode};
use world::{Case, World};

const DEVICE: &str = "ANYPAGE_LAB_DEVICE";
/// `anypage run`: this machine cannot do it.
const CANNOT: i32 = 3;

/// The same under `anypage run`.
fn again() -> ExitCode {
    let me = std::env::current_exe().expect("this program's own name");
    let mut anypage = Command::new(env!("CARGO_BIN_EXE_anypage"));
    anypage.args(["run", "--"]).arg(me).args(std::env::args_os().skip(1)).env(DEVICE, "anypage0");
    match anypage.status().expect("anypage was built with this").code() {
        Some(0) => ExitCode::SUCCESS,
        Some(CANNOT) => {
            println!(
                "SKIPPED the backend on the drop-in library: it cannot be linked here, as is said above"
            );
            ExitCode::SUCCESS
        }
        code => {
            println!("under anypage run: {code:?}");
            ExitCode::FAILURE
        }
    }
}

fn hold(device: &str, case: &Case) -> Result<(), Failed> {
    let world = World::open(device)?;
    (case.run)(&world)?;
    // Everything that the case made is gone: nothing keeps the device.
    world.close()?;
    Ok(())
}

fn main() -> ExitCode {
    let Ok(device) = std::env::var(DEVICE) else { return again() };
    let cases = [handed::CASES, handles::CASES, kinds::CASES, windows::CASES].concat();
    let trials = cases.into_iter().map(|case| {
        let device = device.clone();
        Trial::test(format!("{device}: {}", case.name), move || hold(&device, &case))
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}
