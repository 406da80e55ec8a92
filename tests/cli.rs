//! The command line as its users meet it: what it prints, and its exit status.

use std::process::{Command, Output};

fn anypage(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_anypage")).args(arguments).output().expect("the binary runs")
}

#[test]
fn the_demo_verifies_every_byte_and_says_what_it_did() {
    let output = anypage(&["demo", "--size", "16M", "--rounds", "2", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("--json prints JSON");
    let number =
        |name: &str| report[name].as_u64().unwrap_or_else(|| panic!("{name} is a number in {report}"));
    assert_eq!(number("mismatched_bytes"), 0);
    assert_eq!(number("stale_translations"), 0);
    assert_eq!(number("entries_total"), 4096);
    for name in
        ["verified_bytes", "entries_relinked", "faults", "invalidations", "pages_dropped", "pages_moved"]
    {
        assert!(number(name) > 0, "{name} is 0: the demo did not do what it says");
    }
    let kinds = report["pages_seen_by_kind"].as_object().expect("kinds");
    assert!(kinds.len() >= 5, "only {kinds:?} were met");
    assert_eq!(report["untouched_entries_unchanged"], true);
}

#[test]
fn the_picture_has_no_colour_when_nobody_looks() {
    let output = anypage(&["demo", "--size", "16M", "--rounds", "2"]);
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(text.contains("Every byte compared equal."), "{text}");
    assert!(!text.contains('\u{1b}'), "an escape sequence went to a pipe");
    assert!(text.contains("before\n") && text.contains("after\n") && text.contains("one cell is"), "{text}");
}

#[test]
fn bad_sizes_are_refused_with_the_value_the_limit_and_what_to_do() {
    let cases = [
        ("0", "16777216"),
        ("4096", "16777216"),
        ("16777217", "16781312"),
        ("989560464998400", "available"),
        ("99999999T", "64 bits"),
        ("lots", "256M"),
        ("-1", "--size"),
    ];
    for (size, hint) in cases {
        let output = anypage(&["demo", &format!("--size={size}")]);
        let text = String::from_utf8_lossy(&output.stderr).replace('\n', " ");
        assert_eq!(output.status.code(), Some(2), "--size {size}: {text}");
        assert!(text.contains(size.trim_start_matches('-')), "--size {size} is not named: {text}");
        assert!(text.contains(hint), "--size {size} does not say '{hint}': {text}");
    }
}

#[test]
fn help_names_the_exit_statuses() {
    let output = anypage(&["--help"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&output.stdout).contains("Exit status"));
}

#[test]
fn a_route_is_answered_with_its_rule_and_a_refusal_has_a_status_of_its_own() {
    let ask = |arguments: &[&str]| {
        let output = anypage(&[&["route"], arguments].concat());
        (output.status.code(), String::from_utf8(output.stdout).expect("text"))
    };
    let (status, text) = ask(&[]);
    assert_eq!(status, Some(0));
    for row in &mr::dma::route::TABLE {
        assert!(text.contains(row.name), "the table leaves out '{}': {text}", row.name);
    }
    for (device, status, answer) in [
        ("nic", 0, "\nbus_address\n"),
        ("nic-acs", 0, "\nhost_bridge\n"),
        ("nic-root", 0, "\nhost_bridge\n"),
        ("direct", 0, "\ndirect\n"),
        ("nic-far", 1, "\nrefused: no peer-to-peer path"),
        ("direct32", 1, "\nrefused: a BAR range"),
    ] {
        let (code, text) = ask(&["--backing", "dmabuf-peer", "--device", device]);
        assert_eq!(code, Some(status), "{device}: {text}");
        assert!(text.contains(answer) && text.contains("\nkernel  "), "{device}: {text}");
    }
    for (policy, status) in [("coherent", 1), ("legacy", 0)] {
        let question = ["--backing", "file", "--device", "external", "--len", "100", "--policy", policy];
        assert_eq!(ask(&question).0, Some(status), "{policy}");
    }
    assert_eq!(ask(&["--backing", "lead"]).0, Some(2));
    assert_eq!(ask(&["--at", "5"]).0, Some(2), "a place alone is no question");
    assert_eq!(ask(&["--device", "nic", "--len", "0"]).0, Some(2));
    assert_eq!(ask(&["--backing", "dmabuf-peer", "--at", "0x1000000"]).0, Some(2), "behind the BAR");
    let (_, json) = ask(&["--device", "nic", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&json).expect("--json prints JSON");
    assert_eq!(report["cases"].as_array().map(Vec::len), Some(hw_model::hca::Backing::ALL.len()));
}

#[test]
fn info_says_what_is_here_in_both_forms_and_refuses_what_it_does_not_know() {
    let output = anypage(&["info"]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    for part in
        ["rung in force", "device model", "RLIMIT_MEMLOCK", "vm.max_map_count", "RDMA devices of the kernel"]
    {
        assert!(said.contains(part), "{part} is missing:\n{said}");
    }
    let output = anypage(&["info", "--json"]);
    assert_eq!(output.status.code(), Some(0));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON and nothing else");
    let rungs = report["ladder"]["rungs"].as_array().expect("a list");
    assert_eq!(rungs.len(), 4);
    assert!(rungs.iter().all(|rung| !rung["why"].as_str().expect("text").is_empty()));
    let best = rungs
        .iter()
        .find(|rung| rung["available"] == true && rung["rung"] != "owned")
        .expect("poll at least");
    assert_eq!(report["ladder"]["best"], best["rung"], "the best rung is the first that can be had");
    assert_eq!(anypage(&["info", "--colour"]).status.code(), Some(2));
}

#[test]
fn perf_measures_every_operation_and_names_what_is_out_of_range() {
    for operation in ["write", "read", "send", "atomic"] {
        for odp in [false, true] {
            let mut arguments = vec![
                "perf", operation, "--iters", "300", "--depth", "4", "--qps", "3", "--memory", "1M", "--json",
            ];
            arguments.extend(odp.then_some("--odp"));
            let output = anypage(&arguments);
            assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
            let report: serde_json::Value =
                serde_json::from_slice(&output.stdout).expect("--json prints JSON");
            assert_eq!((&report["operation"], &report["messages"]), (&operation.into(), &300.into()));
            assert_eq!(report["on_demand"], odp);
            assert!(report["latency"]["min_ns"].as_u64() > Some(0), "{report}");
            assert!(report["latency"]["p50_ns"].as_u64() <= report["latency"]["max_ns"].as_u64(), "{report}");
            if odp && operation == "write" {
                assert!(report["faults"].as_u64() > Some(0), "memory on demand was there before: {report}");
            }
        }
    }
    // Deep queues wait long: a histogram that is cut off would show one latency for all.
    let deep = anypage(&["perf", "write", "--iters", "500", "--depth", "64", "--memory", "8M", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&deep.stdout).expect("--json prints JSON");
    assert!(report["latency"]["max_ns"].as_u64() > Some(10_000), "64 times 64 KiB in no time: {report}");
    let table = anypage(&["perf", "write", "--duration", "0.1", "--size", "4K", "--memory", "1M"]);
    let text = String::from_utf8(table.stdout).expect("text");
    assert!(text.contains("messages a second") && text.contains("99.9 %"), "{text}");
    let bad: [&[&str]; 7] = [
        &["perf", "dance"],
        &["perf", "write", "--depth", "0"],
        &["perf", "write", "--size", "2M", "--memory", "1M"],
        &["perf", "write", "--qps", "9999999"],
        &["perf", "write", "--duration", "0"],
        &["perf", "write", "--duration", "1", "--iters", "5"],
        &["perf", "atomic", "--size", "16"],
    ];
    for arguments in bad {
        let output = anypage(arguments);
        assert_eq!(
            output.status.code(),
            Some(2),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
