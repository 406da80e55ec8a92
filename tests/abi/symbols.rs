//! The library's symbols with their versions, against the list.

use super::{library_directory, text};
use std::process::Command;

#[test]
fn the_library_has_exactly_the_symbols_and_versions_of_the_list() {
    let library = library_directory().join("libibverbs.so.1");
    let node =
        library_directory().file_name().map(|name| name.to_string_lossy().into_owned()).expect("a number");
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
    assert!(missing.is_empty() && surplus.is_empty(), "missing {missing:?}, not in the list {surplus:?}");
    assert_eq!(found.len(), 146, "the list itself was changed");
}
