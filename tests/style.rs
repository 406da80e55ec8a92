//! What `clippy` does not check about this repository, as a ratchet: a rule here holds for every file, exceptions are
//! named with their reason, and an exception that is no longer needed fails too.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};

/// No production file has more lines of code than this; comments, blank lines and tests do not count.
const MOST_LINES: usize = 450;

/// Files that are longer, and what they may not exceed: these numbers only go down.
const LONGER: &[(&str, usize)] = &[];

/// The only files that may hold `unsafe`. Each opens with the invariant that it keeps.
const ISLANDS: &[&str] = &[
    "benches/rdma/clock.rs",
    "benches/rungs/memory.rs",
    "examples/exact/memory.rs",
    "benches/wire/plain.rs",
    "hw-model/src/bus/barrier.rs",
    "hw-model/src/link/shm/ring.rs",
    "hw-model/src/link/udp/sys.rs",
    "hw-model/src/prefetch.rs",
    "mr/src/cache/unkept.rs",
    "mr/src/device/verbs/context.rs",
    "mr/src/device/verbs/events.rs",
    "mr/src/device/verbs/extended.rs",
    "mr/src/device/verbs/handover.rs",
    "mr/src/device/verbs/pd.rs",
    "mr/src/device/verbs/post.rs",
    "mr/src/device/verbs/queue.rs",
    "mr/src/device/verbs/region.rs",
    "mr/src/device/verbs/register.rs",
    "mr/src/device/verbs/window.rs",
    "mr/src/device/verbs/shared.rs",
    "mr/src/dma/vfio/bar.rs",
    "mr/tests/invalidation_allocations.rs",
    "mr/src/dma/vfio/sys.rs",
    "mr/src/region/publish/tests/huge.rs",
    "mr/src/region/two_pages.rs",
    "hw-model/tests/rc/burst.rs",
    "odp/src/space/process/copy.rs",
    "odp/src/space/process/exact/sys.rs",
    "odp/src/space/process/fork.rs",
    "odp/src/space/process/layout.rs",
    "odp/src/space/process/layout/tests.rs",
    "odp/src/space/process/pin.rs",
    "odp/src/space/process/recover.rs",
    "odp/src/space/process/sys.rs",
    "odp/src/space/process/tests.rs",
    "odp/src/space/process/view.rs",
    "odp/src/space/user_range.rs",
    "odp/tests/conformance/memory.rs",
    "odp/tests/conformance/refuse.rs",
    "odp/tests/process/exact.rs",
    "odp/tests/process/mapped.rs",
    "odp/tests/notifier_allocations.rs",
    "odp/tests/process/monitor_allocations.rs",
    "src/bench/floor.rs",
    "src/bench/pin.rs",
    "src/mixed.rs",
    "tests/conformance/remapped.rs",
    "tests/it/remapped.rs",
    "tests/lab/oracle/src/memory.rs",
    "tests/lab/oracle/src/verbs.rs",
    "tests/verbs/world.rs",
    "tests/vfio/kernel.rs",
    "tests/verbs-abi/programs/src/bin/plain.rs",
    "tests/verbs-abi/programs/src/bin/safe.rs",
    "verbs-abi/src/exports/absent.rs",
    "verbs-abi/src/exports/device.rs",
    "verbs-abi/src/exports/window.rs",
    "verbs-abi/src/exports/xrc.rs",
    "verbs-abi/src/exports/import.rs",
    "verbs-abi/src/exports/domain.rs",
    "verbs-abi/src/exports/start.rs",
    "verbs-abi/src/exports/queue.rs",
    "verbs-abi/src/exports/post.rs",
    "verbs-abi/src/exports/event.rs",
    "verbs-abi/src/exports/dm.rs",
    "verbs-abi/src/exports/completion.rs",
    "verbs-abi/src/exports/build.rs",
    "verbs-abi/src/exports/ah.rs",
    "verbs-abi/src/exports/memory.rs",
    "verbs-abi/src/exports/names.rs",
    "verbs-abi/src/exports/private.rs",
    "verbs-abi/src/exports/query.rs",
    "verbs-abi/src/handle.rs",
];

/// Production files that name `std::sync` although it is not the door, and what for.
const PAST_THE_DOOR: &[(&str, &str)] =
    &[("hw-model/src/bus/epoch.rs", "compiler_fence, which no model checker has")];

/// The one door to atomics and locks.
const SYNC_DOOR: &str = "hw-model/src/sync.rs";

const SYNC_SOURCES: &[&str] = &["std::sync", "core::sync", "parking_lot"];

/// Words that mean that something is not done, and module names that mean nothing.
const UNFINISHED: &[&str] = &["todo!", "unimplemented!", "dbg!", "#[ignore", "allow(dead_code)"];
const MEANINGLESS: &[&str] = &["utils", "util", "helpers", "helper", "common", "misc"];

/// One Rust file of the repository, comments taken out.
struct Source {
    /// Relative to the root of the repository, with `/`.
    path: String,
    /// Every line of code: without comments, trimmed, blank ones left out; numbered from 1.
    code: Vec<(usize, String)>,
    /// Where the tests at the end of the file begin in `code`.
    tests_at: usize,
    /// The whole file is compiled for tests or benchmarks only.
    is_test: bool,
}

impl Source {
    fn production(&self) -> &[(usize, String)] {
        if self.is_test { &[] } else { &self.code[..self.tests_at] }
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn walk(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).expect("the repository can be read") {
        let path = entry.expect("the repository can be read").path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                walk(&path, found);
            }
        } else if name.ends_with(".rs") {
            found.push(path);
        }
    }
}

/// Takes out comments. Strings with `//` in them lose their tail, which is harmless to every rule here.
fn code_of(text: &str) -> Vec<(usize, String)> {
    let mut in_block = false;
    let mut code = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let mut line = line.split("//").next().unwrap_or_default().trim();
        if in_block || line.starts_with("/*") {
            in_block = !line.contains("*/");
            line = line.split_once("*/").map_or("", |(_, rest)| rest.trim());
        }
        if !line.is_empty() {
            code.push((number + 1, line.to_owned()));
        }
    }
    code
}

/// Whether an attribute keeps what follows out of a production build.
fn is_test_attribute(line: &str) -> bool {
    line.strip_prefix("#[cfg(").is_some_and(|condition| {
        let words: Vec<_> = condition.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
        words.contains(&"test") && !condition.contains("not(test")
    })
}

/// The name in `mod name;`, if that is what the line says.
fn outer_module(line: &str) -> Option<&str> {
    let line = line.rsplit_once(']').map_or(line, |(_, rest)| rest.trim());
    let (before, name) = line.strip_suffix(';')?.split_once("mod ")?;
    (before.is_empty() || before.starts_with("pub")).then_some(name)
}

fn sources() -> Vec<Source> {
    let mut paths = Vec::new();
    walk(root(), &mut paths);
    paths.sort();
    let mut test_modules = BTreeSet::new();
    let mut sources: Vec<Source> = paths
        .iter()
        .map(|path| {
            let code = code_of(&fs::read_to_string(path).expect("sources are UTF-8"));
            let mut tests_at = code.len();
            for (at, (_, line)) in code.iter().enumerate() {
                if !is_test_attribute(line) {
                    continue;
                }
                // The attribute and its item stand on one line or on two, or other attributes come between.
                let item = code[at..].iter().map(|(_, line)| line).find(|line| !line.ends_with(']'));
                if let Some(name) = item.and_then(|item| outer_module(item)) {
                    test_modules.insert(child(path, name));
                } else if item.is_some_and(|item| item.starts_with("mod ") || item.starts_with("pub mod ")) {
                    tests_at = tests_at.min(at);
                }
            }
            let relative = path.strip_prefix(root()).expect("found below the root");
            let relative = relative.to_string_lossy().replace('\\', "/");
            Source { is_test: false, path: relative, code, tests_at }
        })
        .collect();
    for (source, path) in sources.iter_mut().zip(&paths) {
        let in_test_tree = source.path.split('/').any(|part| matches!(part, "tests" | "benches" | "fuzz"));
        let below_test_module = test_modules.iter().any(|module| path.with_extension("").starts_with(module));
        source.is_test = in_test_tree || below_test_module;
    }
    sources
}

/// Where the file of a module declared in `parent` lives, without `.rs`.
fn child(parent: &Path, name: &str) -> PathBuf {
    let stem = parent.file_stem().unwrap_or_default().to_string_lossy();
    if matches!(stem.as_ref(), "mod" | "lib" | "main") {
        parent.with_file_name(name)
    } else {
        parent.with_extension("").join(name)
    }
}

/// Fails with every offence at once: one a line, as `file:line: what`.
fn expect_none(offences: Vec<String>) {
    assert!(offences.is_empty(), "{} offences:\n{}", offences.len(), offences.join("\n"));
}

fn has_word(line: &str, word: &str) -> bool {
    line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|part| part == word)
}

#[test]
fn files_stay_short_enough_to_be_read_at_one_go() {
    let mut offences = Vec::new();
    for source in sources() {
        let lines = source.production().len();
        let allowed = match LONGER.iter().find(|(path, _)| *path == source.path) {
            Some(_) if lines <= MOST_LINES => {
                offences.push(format!("{}: {lines} lines of code; take it off the list", source.path));
                continue;
            }
            Some((_, allowed)) => *allowed,
            None => MOST_LINES,
        };
        if lines > allowed {
            offences.push(format!("{}: {lines} lines of code, {allowed} allowed", source.path));
        }
    }
    expect_none(offences);
}

#[test]
fn unsafe_lives_on_named_islands() {
    let mut inhabited = BTreeSet::new();
    let mut offences = Vec::new();
    for source in sources() {
        let first = source.code.iter().find(|(_, line)| has_word(line, "unsafe") && !line.contains('"'));
        let Some((number, line)) = first else { continue };
        inhabited.insert(source.path.clone());
        if !ISLANDS.contains(&source.path.as_str()) {
            offences.push(format!("{}:{number}: not an island: {line}", source.path));
        }
    }
    let deserted = ISLANDS.iter().filter(|island| !inhabited.contains(**island));
    offences
        .extend(deserted.map(|island| format!("{island}: an island without unsafe; take it off the list")));
    expect_none(offences);
}

#[test]
fn atomics_and_locks_come_through_one_door() {
    let mut used = BTreeSet::new();
    let mut offences = Vec::new();
    for source in sources().iter().filter(|source| source.path != SYNC_DOOR) {
        for (number, line) in source.production() {
            if !SYNC_SOURCES.iter().any(|name| line.contains(name)) {
                continue;
            }
            match PAST_THE_DOOR.iter().find(|(path, _)| *path == source.path) {
                Some((path, _)) => drop(used.insert(*path)),
                None => offences.push(format!("{}:{number}: past {SYNC_DOOR}: {line}", source.path)),
            }
        }
    }
    let needless = PAST_THE_DOOR.iter().filter(|(path, _)| !used.contains(path));
    offences.extend(needless.map(|(path, why)| format!("{path}: needs no exception any more ({why})")));
    expect_none(offences);
}

#[test]
fn nothing_is_left_unfinished_or_unnamed() {
    let mut offences = Vec::new();
    for source in sources() {
        for (number, line) in &source.code {
            let unfinished = UNFINISHED
                .iter()
                .filter(|word| line.contains(**word) && !line.contains(&format!("\"{word}")));
            offences.extend(unfinished.map(|word| format!("{}:{number}: {word}", source.path)));
        }
        let mut parts = source.path.trim_end_matches(".rs").split('/');
        if let Some(part) = parts.find(|part| MEANINGLESS.contains(part)) {
            offences.push(format!("{}: a module named {part} says nothing", source.path));
        }
    }
    expect_none(offences);
}

#[test]
fn the_map_names_paths_that_exist() {
    let Ok(map) = fs::read_to_string(root().join("ARCHITECTURE.md")) else {
        println!("SKIPPED the_map_names_paths_that_exist: there is no ARCHITECTURE.md yet");
        return;
    };
    // Every second piece between backticks is code; a path in it has a slash and begins in a folder of ours.
    let mut offences = Vec::new();
    for name in map.split('`').skip(1).step_by(2) {
        let path = Path::new(name);
        let is_path = name.contains('/') && !name.contains(['*', '{', '<', ' ', '\n']);
        let ours = path.components().next().is_some_and(|first| match first {
            Component::Normal(folder) => root().join(folder).is_dir(),
            _ => false,
        });
        if is_path && (ours || name.ends_with(".rs")) && !root().join(path).exists() {
            offences.push(format!("ARCHITECTURE.md: {name} does not exist"));
        }
    }
    expect_none(offences);
}

#[test]
fn every_dependency_has_its_reason() {
    let mut manifests = vec![root().join("Cargo.toml")];
    manifests
        .extend(["hw-model", "odp", "mr", "verbs-abi"].map(|member| root().join(member).join("Cargo.toml")));
    let mut offences = Vec::new();
    for manifest in manifests {
        let text = fs::read_to_string(&manifest).expect("the manifest can be read");
        let mut section = "";
        for (number, line) in text.lines().enumerate() {
            if line.starts_with('[') {
                section = line.trim_matches(['[', ']']);
                continue;
            }
            let Some((name, value)) = line.split_once('=') else { continue };
            let inherited = name.trim().ends_with(".workspace") || value.contains("workspace = true");
            if section.ends_with("dependencies") && !inherited && !line.contains(" # ") {
                offences.push(format!("{}:{}: no reason given: {line}", manifest.display(), number + 1));
            }
        }
    }
    expect_none(offences);
}
