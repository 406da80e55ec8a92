//! All of it as a user without privileges: this binary again, as nobody.

use super::{assert_passed, is_child, run_child};
use std::os::unix::fs::MetadataExt;
use std::process::Command;

#[test]
fn everything_passes_as_nobody() {
    if is_child() {
        return;
    }
    // The effective user of this process owns its files in /proc.
    if std::fs::metadata("/proc/self").expect("proc").uid() != 0 {
        println!("SKIPPED everything_passes_as_nobody: not root, so all tests are unprivileged");
        return;
    }
    // Copied to where nobody may read it: a checkout below /root is not such a place.
    let copy = std::env::temp_dir().join(format!("anypage-process-{}", std::process::id()));
    std::fs::copy(std::env::current_exe().expect("a path"), &copy).expect("a copy of this binary");
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--"])
        .arg(&copy)
        .current_dir("/");
    let output = run_child(command);
    std::fs::remove_file(&copy).expect("the copy just made");
    match output {
        Ok(output) => assert_passed(&output),
        Err(error) => println!("SKIPPED everything_passes_as_nobody: setpriv cannot be run: {error}"),
    }
}
