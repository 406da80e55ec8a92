//! The command line.

use std::process::{Command, Output};

fn sim(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_anypage")).arg("sim").args(args).output().expect("the program runs")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn a_clean_range_exits_0_and_says_what_happened() {
    let output = sim(&["--seeds", "1..4", "--steps", "800", "--jobs", "2", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["runs"], 4, "both ends are included");
    assert_eq!(report["counts"]["steps"], 3200);
    assert_eq!(report["failures"].as_array().map(Vec::len), Some(0));
}

#[test]
fn bad_input_exits_2() {
    for args in [
        ["--seeds", "9..3"],
        ["--seeds", "many"],
        ["--plan", "dma.link=2"],
        ["--plan", "dma.link"],
        ["--replay", "/nonexistent/trace.json"],
        ["--bug", "no-such-bug"],
    ] {
        let output = sim(&args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", text(&output));
        assert!(!output.stderr.is_empty(), "{args:?} says nothing");
    }
}

#[cfg(not(feature = "planted-bugs"))]
#[test]
fn without_the_feature_a_bug_says_how_to_build_with_it() {
    let output = sim(&["--bug", "stale-entry"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output).contains("--features planted-bugs"), "{}", text(&output));
}

#[cfg(feature = "planted-bugs")]
mod planted {
    use super::{sim, text};

    /// Found within a few seeds; the printed line finds it again, and so does the shortened trace.
    fn is_found(bug: &str) {
        let traces = tempfile::tempdir().expect("a directory");
        let directory = traces.path().to_str().expect("a plain name");
        let found = sim(&["--seeds", "1..40", "--jobs", "2", "--bug", bug, "--traces", directory]);
        let said = text(&found);
        assert_eq!(found.status.code(), Some(1), "{said}");
        let line = |start: &str| {
            let line =
                said.lines().find_map(|line| line.strip_prefix(start)).expect("a line to replay it").trim();
            line.strip_prefix("anypage sim ").expect("a command").to_owned()
        };
        let again = sim(&line("replay: ").split(' ').chain(["--traces", directory]).collect::<Vec<_>>());
        assert_eq!(again.status.code(), Some(1), "the printed line finds nothing:\n{}", text(&again));
        let last = |said: &str| said.lines().rfind(|line| line.starts_with("seed ")).map(str::to_owned);
        assert_eq!(last(&text(&again)), last(&said), "the printed line finds something else");
        let shorter = sim(&line("replay shorter: ").split(' ').collect::<Vec<_>>());
        assert_eq!(shorter.status.code(), Some(1), "{}", text(&shorter));
    }

    #[test]
    fn a_stale_entry_after_an_invalidation_is_found() {
        is_found("stale-entry");
    }
    #[test]
    fn an_iova_used_again_before_the_flush_is_found() {
        is_found("iova-before-flush");
    }
    #[test]
    fn a_translation_remembered_beyond_an_invalidation_is_found() {
        is_found("stale-translation");
    }
    #[test]
    fn a_decision_made_outside_the_lock_is_found() {
        is_found("decision-outside-lock");
    }
}
