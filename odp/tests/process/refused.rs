//! All of it where userfaultfd and seccomp are both refused: this binary again, under a filter that refuses them.

use super::{assert_passed, is_child, run_child};
use odp::space::Rung;
use odp::space::process::{Options, ProcessSpace, Support};
use std::process::Command;

/// Set in a process that is to refuse itself both before main.
const REFUSED: &str = "ANYPAGE_TEST_REFUSED";

/// Run before main.
pub fn before_main() {
    if is_refused() && crate::refuse::userfaultfd_and_seccomp().is_err() {
        std::process::abort();
    }
}

pub fn is_refused() -> bool {
    std::env::var_os(REFUSED).is_some()
}

#[test]
fn everything_passes_where_userfaultfd_and_seccomp_are_refused() {
    if is_refused() {
        let space = ProcessSpace::open(Options::default()).expect("the poll rung needs neither");
        let found = space.capabilities();
        assert_eq!(found.rung, Rung::Poll);
        assert!(matches!(found.userfaultfd, Support::Refused(_)), "{}", found.userfaultfd);
        return;
    }
    if is_child() || crate::exact::installed().is_some() {
        return;
    }
    let mut command = Command::new(std::env::current_exe().expect("a path"));
    command.env(REFUSED, "1");
    assert_passed(&run_child(command).expect("this binary runs"));
}
