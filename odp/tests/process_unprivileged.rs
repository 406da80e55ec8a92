//! All of it as a user without privileges: the other test binaries, run again as nobody.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs a test binary that was built beside this one as user 65534, if this is root. Else the run as it is will do.
fn run_as_nobody(test: &str) {
    // The effective user of this process: the owner of its files in /proc.
    let root = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata("/proc/self").expect("proc")) == 0;
    if !root {
        println!("SKIPPED run_as_nobody({test}): not root, so all tests are unprivileged");
        return;
    }
    let here = std::env::current_exe().expect("a path");
    let Some(binary) = newest(here.parent().expect("a directory"), test) else {
        println!("SKIPPED run_as_nobody({test}): its binary was not built");
        return;
    };
    // Copied to where nobody may read it: a checkout below /root is not such a place.
    let copy = std::env::temp_dir().join(format!("anypage-{test}-{}", std::process::id()));
    std::fs::copy(&binary, &copy).expect("a copy of the test binary");
    let output = Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--"])
        .arg(&copy)
        .arg("--nocapture")
        .current_dir("/")
        .output();
    std::fs::remove_file(&copy).expect("the copy just made");
    let output = match output {
        Ok(output) => output,
        Err(error) => {
            println!("SKIPPED run_as_nobody({test}): setpriv cannot be run: {error}");
            return;
        }
    };
    let text = String::from_utf8_lossy(&output.stdout);
    for line in text.lines().filter(|line| line.starts_with("SKIPPED")) {
        println!("{line} (as nobody)");
    }
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
}

fn newest(directory: &Path, test: &str) -> Option<PathBuf> {
    let prefix = format!("{test}-");
    let files = std::fs::read_dir(directory).ok()?.filter_map(Result::ok);
    files
        .filter(|file| {
            let name = file.file_name().to_string_lossy().into_owned();
            name.strip_prefix(&prefix).is_some_and(|rest| !rest.contains('.'))
        })
        .max_by_key(|file| file.metadata().and_then(|data| data.modified()).ok())
        .map(|file| file.path())
}

#[test]
fn kinds_as_nobody() {
    run_as_nobody("process_kinds");
}

#[test]
fn events_as_nobody() {
    run_as_nobody("process_events");
}

#[test]
fn dmabuf_as_nobody() {
    run_as_nobody("process_dmabuf");
}
