//! Verbs and requests as wholes: 12, 16.

use crate::bed::{Bed, space};
use crate::checks::{Counts, ended_once};
use crate::fail_nth::{Stand, sweep};
use crate::gate::Gate;
use crate::remapped::Remapped;
use anypage::machine::MachineConfig;
use hw_model::addr::{PAGE_SIZE, page_bytes};
use hw_model::fault_plan::{FaultPlan, Points, Rule};
use hw_model::hca::{Completion, Status};
use hw_model::sync::Arc;
use mr::RegisterOptions;
use odp::space::AddressSpace;
use std::time::Duration;

#[test]
fn invariant_12_a_verb_that_fails_leaves_all_counts_as_they_were() {
    let stand = Stand::new(true);
    for options in [RegisterOptions::on_demand(), RegisterOptions::pinned()] {
        let row = sweep(&stand, "register", || {
            let region = Arc::clone(&stand.bed.near.pd).register(&stand.present, options);
            region.map(|region| Box::new(region) as _).map_err(|error| error.to_string())
        });
        let row = row.expect("nothing leaks");
        assert!(row.injected >= 5, "watch, list, IOVA, pages, tables, links, key: {row:?}");
    }
}

#[test]
fn invariant_12_can_fail() {
    let mut stand = Stand::new(true);
    stand.patience = Duration::from_millis(100);
    // A verb that forgets to give its watch back when a later step fails.
    let leaky = sweep(&stand, "leaky", || {
        let space = &stand.bed.space;
        let watch = space.watch(stand.present.range()).map_err(|error| error.to_string())?;
        match space.snapshot(stand.present.range(), &mut Vec::new()) {
            Ok(()) => Ok(Box::new(watch) as _),
            Err(error) => {
                std::mem::forget(watch);
                Err(error.to_string())
            }
        }
    });
    let said = leaky.expect_err("a watch was left behind");
    assert!(said.contains("leaked"), "{said}");
}

fn ids(completions: &[Completion]) -> Vec<u64> {
    completions.iter().map(|completion| completion.id.0).collect()
}

#[test]
fn invariant_16_every_request_ends_once_and_deregistration_waits_for_no_fault() {
    // A fault held before its region is looked up, and one held between looking at the pages and publishing them.
    for (point, visit) in [("mr.fault", 1), ("mr.publish", 2)] {
        let gate = Gate::new();
        let plan = FaultPlan::new(0, vec![Rule::nth(point, visit, gate.action())]);
        let config = MachineConfig { points: Points::with(&plan), ..MachineConfig::default() };
        let (space, memory) = (space(), Remapped::new(64));
        let range = memory.user_range(Arc::clone(&space) as _);
        let bed = Bed::new(&space, &range, RegisterOptions::on_demand(), &config);
        let before = Counts::of(&bed.machine, &space);
        let posted: Vec<u64> = (0..20).collect();
        for id in &posted {
            bed.post_write(*id, page_bytes(*id), PAGE_SIZE as u32);
        }
        gate.wait_for_arrival();
        bed.near.region.deregister();
        assert_eq!(
            bed.machine.near.dma().iova_stats().live_ranges,
            0,
            "all the way, though a fault is outstanding"
        );
        let after = Counts::of(&bed.machine, &space);
        assert_ne!(after, before, "the region is gone");
        gate.open();
        let ended = bed.far_ends(posted.len());
        ended_once(&posted, &ids(&ended)).expect("each once");
        assert_eq!(ended[0].status, Status::RemoteAccessError, "held at {point}: its key is gone");
        assert!(ended[1..].iter().all(|completion| completion.status == Status::FlushError));
        let mut more = Vec::new();
        assert_eq!(bed.far.cq.poll(&mut more, 16), Ok(0), "nothing ends twice");
        after.are_back(&bed.machine, &space).expect("the fault that came too late left nothing");
        crate::checks::protocol_kept(&bed.machine, &space).expect("nor did it use anything");
    }
}

#[test]
fn invariant_16_can_fail() {
    ended_once(&[1, 2, 3], &[3, 1, 2]).expect("in any order");
    ended_once(&[1, 2, 3], &[1, 3]).expect_err("one never ended");
    ended_once(&[1, 2, 3], &[1, 2, 2, 3]).expect_err("one ended twice");
    ended_once(&[1, 2, 3], &[1, 2, 3, 4]).expect_err("one was never posted");
}
