//! Fault plans in files, as `anypage run` takes them.

use super::{has, run, text};
use std::fs;
use std::path::PathBuf;

/// A file with a plan, gone with its folder.
fn plan(contents: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("plan.toml");
    fs::write(&file, contents).expect("a file");
    (folder, file)
}

fn options(file: &std::path::Path) -> [&str; 2] {
    ["--plan", file.to_str().expect("a name in UTF-8")]
}

#[test]
fn a_wrong_plan_is_told_with_its_line_and_word_before_anything_starts() {
    let (_folder, file) = plan("[[rule]]\npoint = \"mr.page_fault\"\nskp = 6\n");
    let output = run(&options(&file), &["sh", "-c", "echo started"]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    for part in ["plan.toml:3:1", "skp", "means nothing", "did you mean `skip`?"] {
        assert!(said.contains(part), "no {part} in {said}");
    }
    assert!(output.stdout.is_empty(), "the program was started");
}

#[test]
fn what_fired_is_told_and_a_rule_that_never_did_fails_a_strict_run() {
    if !has("what_fired_is_told_and_a_rule_that_never_did_fails_a_strict_run", "ibv_devinfo", "ibverbs-utils")
    {
        return;
    }
    let (_folder, file) = plan("[[rule]]\npoint = \"link.send\"\n");
    let output = run(&options(&file), &["ibv_devinfo"]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("rule 1 (line 1, link.send) fired 0 times: it never fired"), "{said}");
    let [option, name] = options(&file);
    let output = run(&[option, name, "--plan-strict"], &["ibv_devinfo"]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
}

#[test]
fn the_devices_counts_are_told_for_each_process() {
    if !has("the_devices_counts_are_told_for_each_process", "ibv_devinfo", "ibverbs-utils") {
        return;
    }
    let output = run(&["--stats", "--rung", "poll"], &["sh", "-c", "ibv_devinfo; ibv_devinfo"]);
    let said = text(&output.stderr);
    assert_eq!(said.matches("(ibv_devinfo), rung poll").count(), 2, "{said}");
    assert!(!said.contains("without a report"), "{said}");
}

#[test]
fn the_status_of_a_program_that_is_waited_for_is_its_own() {
    let status = |script: &str| run(&["--stats"], &["sh", "-c", script]).status.code();
    assert_eq!((status("exit 7"), status("kill -KILL $$")), (Some(7), Some(137)));
}
