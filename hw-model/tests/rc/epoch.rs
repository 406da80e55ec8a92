//! Invalidation and the engines: what a drain waits for, and what a closed epoch does.

use crate::world::{Pair, config, pattern};
use hw_model::bus::DmaPort;
use hw_model::hca::{Hca, HcaConfig, NewHcaError, SendRequest, Status, Step};
use hw_model::link::Fabric;

fn micro() -> HcaConfig {
    HcaConfig { micro_steps: true, ..config() }
}

#[test]
fn a_drain_waits_for_a_burst_that_has_translated_and_not_moved() {
    let mut pair = Pair::new(micro());
    let (local, remote) = (pair.a.region(4096), pair.b.region(4096));
    pair.a.fill(&local, 0, &pattern(1, 4096));
    let sges = [local.sge(0, 4096)];
    pair.qa.post_send(&SendRequest::write(1, &sges, remote.remote(0))).expect("posted");
    // Step the writing side's peer until it has translated: then its slot is busy.
    let epoch = pair.b.hca.port().epoch().clone();
    let mut drain = loop {
        pair.step();
        let mut drain = epoch.drain();
        if !drain.poll(&epoch) {
            break drain;
        }
    };
    // An invalidation now: the entry goes, the burst goes on with what it has read.
    remote.absent(0);
    assert!(!drain.poll(&epoch), "the page would be released under the burst");
    assert_eq!(pair.b.hca.step_engine(0, pair.now), Step::Worked);
    assert!(drain.poll(&epoch), "the burst is over");
    assert_eq!(pair.b.bytes(&remote, 0, 4096), pattern(1, 4096));
    pair.run_without_faults();
    assert_eq!(pair.a.take()[0].status, Status::Success);
}

#[test]
fn a_key_destroyed_before_a_burst_begins_is_not_found_and_one_destroyed_within_it_is_drained_for() {
    let mut pair = Pair::new(micro());
    let (local, remote) = (pair.a.region(4096), pair.b.region(4096));
    let sges = [local.sge(0, 100)];
    pair.qa.post_send(&SendRequest::write(1, &sges, remote.remote(0))).expect("posted");
    let epoch = pair.b.hca.port().epoch().clone();
    while epoch.drain().poll(&epoch) {
        pair.step();
    }
    pair.b.hca.destroy_key(remote.key).expect("live");
    let mut drain = epoch.drain();
    assert!(!drain.poll(&epoch));
    pair.run_without_faults();
    assert!(drain.poll(&epoch));
    assert_eq!(pair.a.take()[0].status, Status::Success, "the burst had begun");
    assert_eq!(pair.ask(&SendRequest::write(2, &sges, remote.remote(0))), Status::RemoteAccessError);
}

#[test]
fn a_closed_epoch_blocks_and_loses_nothing() {
    for micro_steps in [false, true] {
        let mut pair = Pair::new(HcaConfig { micro_steps, ..config() });
        let (local, remote) = (pair.a.region(40_000), pair.b.region(40_000));
        pair.a.fill(&local, 0, &pattern(4, 40_000));
        let epoch = pair.a.hca.port().epoch().clone();
        epoch.close();
        let sges = [local.sge(0, 40_000)];
        pair.qa.post_send(&SendRequest::write(1, &sges, remote.remote(0))).expect("posted");
        for _ in 0..3 {
            assert_eq!(pair.a.hca.step_engine(0, pair.now), Step::Blocked);
        }
        let mut drain = epoch.drain();
        assert!(drain.poll(&epoch), "an engine that was refused is not busy");
        epoch.open();
        pair.run_without_faults();
        assert_eq!(pair.a.take()[0].status, Status::Success);
        assert_eq!(pair.b.bytes(&remote, 0, 40_000), pattern(4, 40_000));
        assert_eq!(pair.a.hca.stats().epoch_closed, 3);
    }
}

#[test]
fn a_queue_pair_destroyed_in_the_middle_of_a_burst_leaves_nothing_busy() {
    let mut pair = Pair::new(micro());
    let (local, remote) = (pair.a.region(4096), pair.b.region(4096));
    let sges = [local.sge(0, 100)];
    pair.qa.post_send(&SendRequest::write(1, &sges, remote.remote(0))).expect("posted");
    let epoch = pair.a.hca.port().epoch().clone();
    while epoch.drain().poll(&epoch) {
        pair.step();
    }
    pair.qa = pair.a.qp();
    pair.settle();
    assert!(epoch.drain().poll(&epoch), "the slot stayed busy");
    let ends: Vec<_> = pair.a.take().iter().map(|c| c.status).collect();
    assert_eq!(ends, [Status::FlushError]);
}

#[test]
fn engines_take_and_give_back_places_in_the_epoch() {
    let memory = crate::world::Words::new(1);
    let fabric = Fabric::new();
    let new = |engines| {
        let config = HcaConfig { engines, ..config() };
        Hca::new(config, DmaPort::direct(memory.clone()), Box::new(fabric.port()))
    };
    let first = new(60).expect("60 places");
    let refused = new(5).expect_err("4 places are left");
    assert_eq!(refused, NewHcaError::NoEpochSlot { engines: 5, taken: 60, max: 64 });
    drop(first);
    new(64).expect("all places are free again");
    assert_eq!(new(0).expect_err("none"), NewHcaError::NoEngines);
}
