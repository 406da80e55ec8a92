//! A program whose end is waited for, because something is to be said after it.
//!
//! Signals that would end a program go to it, and its end is ours. It is in our process group, so what a terminal sends
//! comes to both: those signals are only kept from ending us first.

use super::program::{ProgramError, command};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;
use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;

/// Runs the program to its end; gives its exit status, as a shell would.
pub(super) fn run(
    path: &Path,
    arguments: &[OsString],
    variables: &[(&'static str, OsString)],
) -> Result<u8, ProgramError> {
    let refused = |reason| ProgramError::Refused { path: path.to_owned(), reason };
    let mut signals = Signals::new([SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM]).map_err(refused)?;
    let mut child = command(path, arguments, variables).spawn().map_err(refused)?;
    loop {
        if let Some(status) = child.try_wait().map_err(refused)? {
            return Ok(status_of(status));
        }
        for signal in signals.wait() {
            // From a terminal it has them already.
            let signal = match signal {
                SIGTERM => Signal::TERM,
                SIGHUP => Signal::HUP,
                _ => continue,
            };
            let _ = kill_process(Pid::from_child(&child), signal);
        }
    }
}

/// The status that a shell gives: 128 and the signal's number for a program that one ended.
fn status_of(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX)
}
