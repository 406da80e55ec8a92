//! The tools of rdma-core, unmodified.

use super::{has, run, text};

#[test]
fn ibv_devinfo_sees_the_device() {
    if !has("ibv_devinfo_sees_the_device", "ibv_devinfo", "ibverbs-utils") {
        return;
    }
    let output = run(&[], &["ibv_devinfo", "-v"]);
    let said = text(&output.stdout);
    assert!(output.status.success(), "{said}{}", text(&output.stderr));
    for word in ["anypage0", "PORT_ACTIVE", "ODP_SUPPORT", "Ethernet", "GID[  0]"] {
        assert!(said.contains(word), "no {word} in {said}");
    }
}

#[test]
fn as_many_devices_are_listed_as_were_asked_for() {
    if !has("as_many_devices_are_listed_as_were_asked_for", "ibv_devices", "ibverbs-utils") {
        return;
    }
    for count in ["0", "3"] {
        let said = text(&run(&["--devices", count], &["ibv_devices"]).stdout);
        let listed = said.lines().filter(|line| line.contains("anypage")).count();
        assert_eq!(listed.to_string(), count, "{said}");
    }
}

#[test]
fn the_exit_status_is_the_programs_and_a_program_that_is_not_there_is_named() {
    assert_eq!(run(&[], &["sh", "-c", "exit 7"]).status.code(), Some(7));
    let output = run(&[], &["no-such-program-of-ours"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("no-such-program-of-ours"), "{}", text(&output.stderr));
}
