//! The process space against real memory of this process.

mod dmabuf;
mod events;
mod exact;
mod kinds;
mod mapped;
mod monitor_allocations;
mod pins;
mod race;
#[path = "../conformance/refuse.rs"]
mod refuse;
mod refused;
mod unprivileged;

use std::process::{Command, Output};

/// Set in a child that runs one test for its parent.
const CHILD: &str = "ANYPAGE_TEST_CHILD";

fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// This binary again, as `command`, with [`CHILD`] set. Prints the skips it counted.
fn run_child(mut command: Command) -> std::io::Result<Output> {
    let output = command.env(CHILD, "1").arg("--nocapture").output()?;
    for line in String::from_utf8_lossy(&output.stdout).lines().filter(|line| line.starts_with("SKIPPED")) {
        println!("{line} (in a child)");
    }
    Ok(output)
}

fn assert_passed(output: &Output) {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("test result: ok"), "{out}{err}");
}
