use super::*;

#[test]
fn the_documented_schema_is_the_real_one() {
    crate::schema::check("info", &schemars::schema_for!(Report));
}

/// As on a machine whose kernel refuses the filter: this one has threads, and may not be filtered.
fn report() -> Report {
    Report::with(Err(InstallError::Threads { threads: 3 })).expect("this process can use its own memory")
}

#[test]
fn the_rung_in_force_is_that_of_a_space_that_is_opened_and_the_better_ones_say_why_not() {
    let report = report();
    let space = ProcessSpace::open(Options::default()).expect("a space");
    assert_eq!(report.ladder.in_force, space.capabilities().rung.to_string());
    let names: Vec<_> = report.ladder.rungs.iter().map(|rung| rung.rung.as_str()).collect();
    assert_eq!(names, ["exact", "owned", "events", "poll"]);
    let exact = &report.ladder.rungs[0];
    assert!(!exact.available && exact.why.contains("3 threads"), "{exact:?}");
    assert_eq!(report.ladder.rungs[2].available, space.capabilities().rung == Rung::Events);
    assert_eq!(report.ladder.best, report.ladder.in_force, "no better one can be had");
}

#[test]
fn every_limit_and_capability_of_the_device_is_in_the_text_and_in_the_json() {
    let report = report();
    let text = report.to_string();
    let json = serde_json::to_value(&report).expect("plain data");
    let device = &report.devices[0];
    assert!(device.can(Capabilities::ON_DEMAND | Capabilities::WINDOWS_TYPE_2B));
    for (limit, value) in &device.limits {
        assert!(text.contains(limit), "{limit} is not in the text");
        assert_eq!(json["devices"][0]["limits"][limit], *value, "{limit} is not in the JSON");
    }
    for feature in report.kernel.features.keys() {
        assert!(text.contains(feature), "{feature} is not in the text");
    }
    assert_eq!(device.port.gids.len(), 1);
    assert_eq!(device.port.pkeys, ["0xffff"]);
    assert!(device.on_demand["rc"].contains(&"write".to_owned()));
}
