//! The library's symbols with their versions, against the list: for the number of private node that programs of this machine
//! have, and for those of other distributions.

use super::{library_directory, run, text};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Compares what the library in `directory` defines with the list.
fn compare(directory: &Path) {
    let library = directory.join("libibverbs.so.1");
    let node = directory.file_name().map(|name| name.to_string_lossy().into_owned()).expect("a number");
    let output =
        Command::new("nm").args(["-D", "--with-symbol-versions", "--defined-only"]).arg(&library).output();
    let output = output.expect("nm comes with the linker");
    assert!(output.status.success(), "{}", text(&output.stderr));
    // The version nodes themselves are absolute symbols.
    let said = text(&output.stdout);
    let mut found: Vec<&str> = said
        .lines()
        .filter(|line| !line.contains(" A "))
        .filter_map(|line| line.split(' ').next_back())
        .collect();
    found.sort_unstable();
    let list = include_str!("../../verbs-abi/symbols.txt").replace("@PRIVATE@", &node);
    let mut expected: Vec<&str> = list.lines().collect();
    expected.sort_unstable();
    let missing: Vec<_> = expected.iter().filter(|name| !found.contains(name)).collect();
    let surplus: Vec<_> = found.iter().filter(|name| !expected.contains(name)).collect();
    assert!(
        missing.is_empty() && surplus.is_empty(),
        "node {node}: missing {missing:?}, not in the list {surplus:?}"
    );
    assert_eq!(found.len(), 146, "the list itself was changed");
}

/// The directory of the library that a program is given which was linked with this number.
fn directory_for(node: u32, folder: &Path) -> PathBuf {
    let program = folder.join(format!("linked-with-{node}"));
    let script = format!("#!/bin/sh\n# IBVERBS_PRIVATE_{node}\nprintf %s \"$LD_LIBRARY_PATH\"\n");
    fs::write(&program, script).expect("a file");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("it can be run");
    let output = run(&[], &[program.to_str().expect("a name in UTF-8")]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    PathBuf::from(text(&output.stdout).split(':').next().expect("one part"))
}

#[test]
fn the_library_has_exactly_the_symbols_and_versions_of_the_list() {
    compare(&library_directory());
}

/// Debian's, and two that others have.
#[test]
fn a_program_gets_the_library_of_the_private_node_that_it_was_linked_with() {
    let folder = tempfile::tempdir().expect("a folder");
    for node in [34, 57, 59] {
        let directory = directory_for(node, folder.path());
        assert!(directory.ends_with(node.to_string()), "{}", directory.display());
        compare(&directory);
    }
}
