//! Links that do things to packets on their way, and one that writes them down.

use crate::world::{Pair, config, pattern};
use hw_model::hca::{HcaConfig, PathMtu, SendRequest, Status};
use hw_model::link::{Fabric, FaultyLink, LossRates, LossRule, PacketDirection, PacketKinds, PcapLink};
use hw_model::sync::Arc;
use std::process::Command;

fn small_packets() -> HcaConfig {
    HcaConfig { path_mtu: PathMtu::new(1024).expect("an MTU"), retry_count: 100, ..config() }
}

/// Writes there and reads back until every rule has had its chance.
fn exercise(pair: &mut Pair, rounds: u64) {
    const SIZE: u64 = 40_000;
    let (local, remote, back) = (pair.a.region(SIZE), pair.b.region(SIZE), pair.a.region(SIZE));
    for round in 0..rounds {
        let data = pattern(round, SIZE);
        pair.a.fill(&local, 0, &data);
        let written = pair.ask(&SendRequest::write(1, &[local.sge(0, SIZE as u32)], remote.remote(0)));
        assert_eq!(written, Status::Success);
        assert!(pair.b.bytes(&remote, 0, SIZE) == data, "round {round}: other bytes");
        let read = pair.ask(&SendRequest::read(2, &[back.sge(0, SIZE as u32)], remote.remote(0)));
        assert_eq!(read, Status::Success);
        assert!(pair.a.bytes(&back, 0, SIZE) == data, "round {round}: other bytes came back");
    }
}

#[test]
fn whatever_a_link_does_to_packets_every_byte_arrives() {
    let rates = LossRates { drop: 10, duplicate: 10, reorder: 10, delay: 10, corrupt: 10 };
    for seed in 0..4 {
        let fabric = Fabric::new();
        let [a, b] = [fabric.port(), fabric.port()].map(|port| Arc::new(FaultyLink::new(port, rates, seed)));
        let mut pair = Pair::over(small_packets(), Box::new(Arc::clone(&a)), Box::new(Arc::clone(&b)));
        exercise(&mut pair, 20);
        let counts = a.counts();
        for happened in
            [counts.dropped, counts.duplicated, counts.reordered, counts.delayed, counts.corrupted]
        {
            assert!(happened > 0, "something never happened: {counts:?}");
        }
    }
}

#[test]
fn a_rule_touches_its_kind_and_direction_and_nothing_else() {
    let rates = LossRates { drop: 100, ..LossRates::default() };
    let rule = |direction, kinds| LossRule { direction, kinds, rates };
    let rules = [
        rule(PacketDirection::Outgoing, PacketKinds::READ_REQUEST),
        rule(PacketDirection::Incoming, PacketKinds::ACKNOWLEDGE | PacketKinds::READ_RESPONSE),
        rule(PacketDirection::Incoming, PacketKinds::WRITE),
        rule(PacketDirection::Outgoing, PacketKinds::ATOMIC),
    ];
    let fabric = Fabric::new();
    let link = Arc::new(FaultyLink::with_rules(fabric.port(), rules, 5));
    let mut pair = Pair::over(small_packets(), Box::new(Arc::clone(&link)), Box::new(fabric.port()));
    exercise(&mut pair, 30);
    let counts = link.counts_by_rule();
    assert!(counts[0].dropped > 0 && counts[1].dropped > 0, "{counts:?}");
    assert_eq!((counts[2].sent, counts[3].sent), (0, 0), "nobody writes to it, and nothing is atomic");
    assert!(counts[0].sent < 200, "more than the read requests: {counts:?}");
}

#[test]
fn a_capture_is_read_by_tshark_with_nothing_malformed() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let fabric = Fabric::new();
    let rates = LossRates { drop: 20, ..LossRates::default() };
    let link = FaultyLink::new(fabric.port(), rates, 1);
    let link = Arc::new(PcapLink::new(link, file.reopen().expect("the file")).expect("a capture"));
    let mut pair = Pair::over(small_packets(), Box::new(Arc::clone(&link)), Box::new(fabric.port()));
    exercise(&mut pair, 2);
    let written = link.written();
    assert!(written > 160, "{written} packets of two rounds");
    drop((pair, link));
    let tshark =
        |arguments: &[&str]| Command::new("tshark").arg("-r").arg(file.path()).args(arguments).output();
    let Ok(decoded) = tshark(&["-T", "fields", "-e", "infiniband.bth.opcode", "-e", "_ws.malformed"]) else {
        println!("SKIPPED a_capture_is_read_by_tshark_with_nothing_malformed: there is no tshark");
        return;
    };
    assert!(decoded.status.success(), "{}", String::from_utf8_lossy(&decoded.stderr));
    let lines = String::from_utf8_lossy(&decoded.stdout).into_owned();
    assert_eq!(lines.lines().count() as u64, written);
    for line in lines.lines() {
        let (opcode, malformed) = line.split_once('\t').expect("two fields");
        assert!(!opcode.is_empty() && malformed.is_empty(), "not decoded: {line}");
    }
    let bad = tshark(&["-Y", "_ws.malformed or _ws.expert.severity >= 6291456"]).expect("tshark runs");
    assert!(bad.stdout.is_empty(), "{}", String::from_utf8_lossy(&bad.stdout));
}
