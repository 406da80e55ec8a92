use super::*;
use clap::Parser;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: RegisterArgs,
}

fn args(words: &[&str]) -> RegisterArgs {
    Line::try_parse_from([&["register"], words].concat()).expect("a command line").args
}

fn measured(words: &[&str]) -> Report {
    measure(&args(words)).expect("the model is everywhere")
}

#[test]
fn the_documented_schema_is_the_real_one() {
    crate::schema::check("bench", &schemars::schema_for!(Report));
}

/// A histogram that grows does not grow for a value that is recorded saturating.
#[test]
fn long_times_are_not_cut_short() {
    let mut seen = round::Seen::new();
    seen.latency.saturating_record(5_000_000_000);
    assert!(seen.latency.value_at_quantile(0.5) > 4_990_000_000);
}

#[test]
fn every_kind_mode_and_state_is_measured_beside_the_floor() {
    let report = measured(&["--sizes", "64K", "--time", "0.001", "--threads", "1,2"]);
    // 5 kinds, 2 states, 2 numbers of threads; 4 modes, the floor and the real pin.
    assert_eq!(report.rows.len(), 5 * 2 * 2 * 6);
    for row in report.rows.iter().filter(|row| row.what == "model") {
        let latency = row.latency.as_ref().unwrap_or_else(|| panic!("{}: {:?}", row.name(), row.refused));
        assert!(row.samples >= 5 && latency.p50_ns > 0 && row.pages_per_second > 0.0, "{row:?}");
        assert_eq!(row.list_bytes, Some(16 * 8), "8 bytes a page");
        let pages = match row.mode.as_deref() {
            Some("on-demand") => None,
            Some("empty") => Some(0),
            _ => Some(16),
        };
        assert!(pages.is_none() || row.present == pages, "{}: {:?} pages are there", row.name(), row.present);
    }
    let text = report.to_string();
    assert!(text.contains("mixed, cold, 64 KiB, 2 threads") && text.contains("model prefetch"), "{text}");
}

#[test]
fn a_registration_flushes_at_most_once_whatever_its_pages_are() {
    let report = measured(&["--sizes", "1M", "--time", "0.001", "--before", "warm", "--modes", "pinned"]);
    for row in report.rows.iter().filter(|row| row.what == "model") {
        assert!(row.flushes.is_some_and(|flushes| flushes <= 1.0), "{}: {:?}", row.name(), row.flushes);
    }
}

#[test]
fn an_old_result_is_read_again_and_compared_row_by_row() {
    let words = ["--sizes", "4K", "--pages", "small", "--before", "warm", "--time", "0.001"];
    let report = measured(&words);
    let text = serde_json::to_string(&report).expect("plain data");
    let old: Report = serde_json::from_str(&text).expect("what was written can be read");
    let said = compare::table(&old, &report);
    assert!(said.contains("small, warm, 4 KiB: model pinned") && said.contains("+0.0 %"), "{said}");
    let other = measured(&["--sizes", "8K", "--pages", "small", "--before", "warm", "--time", "0.001"]);
    assert!(compare::table(&old, &other).contains("6 rows were not measured then"));
}

#[test]
fn many_regions_are_counted_in_one_mapping_and_in_many() {
    let report = measured(&["--crowd", "3000", "--modes", "on-demand"]);
    let seen: Vec<_> = report.crowds.iter().map(|row| (row.regions, row.mappings)).collect();
    assert_eq!(seen, [(3000, 1), (3000, 3000)], "{report}");
    assert!(report.crowds.iter().all(|row| row.refused.is_none() && row.first_ns > 0), "{report}");
}

#[test]
fn bad_input_is_named() {
    for (words, option) in [
        (&["--sizes", "0"][..], "sizes"),
        (&["--sizes", "512T"], "sizes"),
        (&["--threads", "0"], "threads"),
        (&["--time", "0"], "time"),
        (&["--crowd", "99999999"], "regions"),
    ] {
        let error = measure(&args(words)).expect_err("out of range");
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().starts_with(&format!("--{option} ")), "{error}");
    }
    let error = measure(&args(&["--device", "no-such-device"])).expect_err("there is none");
    assert!(error.exit_code() == 3 && error.to_string().contains("no-such-device"), "{error}");
    let error = read(Path::new("/dev/null")).expect_err("no JSON");
    assert_eq!(error.exit_code(), 2);
}
