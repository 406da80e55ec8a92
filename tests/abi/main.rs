//! The drop-in libibverbs as programs meet it.

mod pairs;
mod plans;
mod symbols;
mod tools;

use std::path::PathBuf;
use std::process::{Command, Output};

/// `anypage run` with `options`, then the program and its arguments.
fn run(options: &[&str], program: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_anypage"));
    command.arg("run").args(options).arg("--").args(program).output().expect("the binary runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The directory of the library, as `--print-env` says it.
fn library_directory() -> PathBuf {
    let output = Command::new(env!("CARGO_BIN_EXE_anypage")).args(["run", "--print-env"]).output();
    let output = output.expect("the binary runs");
    assert!(output.status.success(), "{}", text(&output.stderr));
    let said = text(&output.stdout);
    let line = said.lines().find_map(|line| line.strip_prefix("export LD_LIBRARY_PATH="));
    let paths = line.unwrap_or_else(|| panic!("no LD_LIBRARY_PATH in {said}"));
    PathBuf::from(paths.split(':').next().expect("one part"))
}

/// Whether the machine has a program; says what is skipped without it.
fn has(test: &str, program: &str, package: &str) -> bool {
    let found = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .any(|folder| folder.join(program).exists());
    if !found {
        println!("SKIPPED {test}: {program} of the package {package} is not installed");
    }
    found
}
