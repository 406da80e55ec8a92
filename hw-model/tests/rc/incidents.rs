//! What happens to a device: its port, its tables, its end.

use crate::world::{Host, Pair, Words, config};
use hw_model::addr::PAGE_SIZE;
use hw_model::fault_plan::{Action, FaultPlan, Points, Rule};
use hw_model::hca::{
    AckTimeout, AsyncEvent, CreateQpError, Gid, HcaConfig, ModifyQpError, PKey, PORT, PortState, QpChange,
    QpSpec, QpState, SendRequest, Status, TableError,
};
use hw_model::link::Fabric;
use hw_model::sync::Arc;

fn patient() -> HcaConfig {
    HcaConfig { retry_count: 3, ack_timeout: AckTimeout::from_code(10).expect("five bits"), ..config() }
}

fn events(host: &Host) -> Vec<AsyncEvent> {
    std::iter::from_fn(|| host.hca.events().try_next()).collect()
}

fn state(host: &Host) -> PortState {
    host.hca.port_attributes(PORT).expect("the port").state
}

#[test]
fn packets_are_lost_while_the_port_of_either_end_is_down_and_its_programs_are_told() {
    for near in [true, false] {
        let mut pair = Pair::new(patient());
        let (local, remote) = (pair.a.region(PAGE_SIZE), pair.b.region(PAGE_SIZE));
        let sges = [local.sge(0, 64)];
        let request = SendRequest::write(1, &sges, remote.remote(0));
        assert_eq!(pair.ask(&request), Status::Success);
        let host = if near { &pair.a } else { &pair.b };
        host.hca.set_port_state(PortState::Down);
        assert_eq!((state(host), events(host)), (PortState::Down, vec![AsyncEvent::PortError(PORT)]));
        host.hca.set_port_state(PortState::Down);
        assert_eq!(events(host), [], "it was down");
        assert_eq!(pair.ask(&request), Status::RetryExceeded);
        let host = if near { &pair.a } else { &pair.b };
        host.hca.set_port_state(PortState::Active);
        assert_eq!((state(host), events(host)), (PortState::Active, vec![AsyncEvent::PortActive(PORT)]));
    }
}

#[test]
fn a_request_outlives_a_port_that_comes_back_before_its_retries_are_used_up() {
    let mut pair = Pair::new(patient());
    let (local, remote) = (pair.a.region(PAGE_SIZE), pair.b.region(PAGE_SIZE));
    pair.a.hca.set_port_state(PortState::Down);
    let sges = [local.sge(0, 64)];
    pair.qa.post_send(&SendRequest::write(1, &sges, remote.remote(0))).expect("posted");
    pair.settle();
    assert!(pair.a.take().is_empty(), "it waits");
    pair.a.hca.set_port_state(PortState::Active);
    pair.run_without_faults();
    assert_eq!(pair.a.take().iter().map(|one| one.status).collect::<Vec<_>>(), [Status::Success]);
    assert!(pair.a.hca.stats().retries > 0);
}

#[test]
fn packets_carry_the_partition_key_that_stands_in_the_table_now() {
    let mut pair = Pair::new(patient());
    let (local, remote) = (pair.a.region(PAGE_SIZE), pair.b.region(PAGE_SIZE));
    let sges = [local.sge(0, 64)];
    let request = SendRequest::write(1, &sges, remote.remote(0));
    // A limited member still reaches a full one, another partition does not.
    pair.a.hca.set_pkey(0, PKey(0x7fff)).expect("there is an entry");
    assert_eq!(pair.ask(&request), Status::Success);
    pair.a.hca.set_pkey(0, PKey(0x8123)).expect("there is an entry");
    assert_eq!(pair.qa.query().expect("alive").pkey, PKey(0x7fff), "engines hear of it when they run");
    pair.settle();
    assert_eq!(pair.qa.query().expect("alive").pkey, PKey(0x8123));
    assert_eq!(pair.ask(&request), Status::RetryExceeded);
    assert_eq!(events(&pair.a), [AsyncEvent::PKeyChange(PORT); 2]);
    assert_eq!(pair.a.hca.query_pkey(PORT, 0), Ok(PKey(0x8123)));
    let none = TableError::Index { index: 1, entries: 1 };
    assert_eq!(pair.a.hca.set_pkey(1, PKey(1)), Err(none));
    assert_eq!(events(&pair.a), [], "nothing has changed");
    // A queue pair that is set up now has the table as it is now.
    let fresh = pair.a.qp();
    fresh
        .modify(&QpChange {
            pkey_index: Some(0),
            port: Some(1),
            access: Some(hw_model::hca::Access::empty()),
            ..QpChange::to(QpState::Init)
        })
        .expect("a way");
    assert_eq!(fresh.query().expect("alive").pkey, PKey(0x8123));
}

#[test]
fn a_port_has_the_addresses_that_were_added_behind_that_of_its_link() {
    let pair = Pair::new(patient());
    let hca = &pair.a.hca;
    let own = hca.gid();
    hca.set_more_gids(&[Gid(5), Gid(6)]).expect("room");
    assert_eq!(hca.gids(), [own, Gid(5), Gid(6)]);
    assert_eq!(hca.query_gid(PORT, 2), Ok(Gid(6)));
    assert_eq!(hca.port_attributes(PORT).expect("the port").gids, 3);
    hca.set_more_gids(&[]).expect("room");
    assert_eq!(hca.gids(), [own]);
    assert!(hca.set_more_gids(&[Gid(1); 8]).is_err());
    assert_eq!(events(&pair.a), [AsyncEvent::GidChange(PORT); 2]);
}

#[test]
fn a_device_that_fails_flushes_what_was_posted_and_makes_and_changes_no_queue_pair_any_more() {
    let mut pair = Pair::new(patient());
    let (local, remote) = (pair.a.region(PAGE_SIZE), pair.b.region(PAGE_SIZE));
    let idle = pair.a.qp();
    idle.connect(pair.qb.address()).expect("connected");
    let sges = [local.sge(0, 64)];
    let request = SendRequest::write(1, &sges, remote.remote(0));
    pair.b.hca.set_port_state(PortState::Down);
    pair.qa.post_send(&request).expect("posted");
    pair.settle();
    pair.a.hca.fail();
    pair.a.hca.fail();
    pair.settle();
    assert_eq!(events(&pair.a), [AsyncEvent::DeviceFatal], "once");
    assert_eq!(pair.a.take().iter().map(|one| one.status).collect::<Vec<_>>(), [Status::FlushError]);
    assert_eq!((pair.qa.state(), idle.state()), (QpState::Error, QpState::Error));
    let refused = pair.a.hca.create_qp(&QpSpec::new(pair.a.pd, &pair.a.cq)).map(|_| ());
    assert_eq!(refused, Err(CreateQpError::Failed));
    assert_eq!(pair.qa.modify(&QpChange::to(QpState::Reset)), Err(ModifyQpError::Failed));
    assert_eq!(pair.ask(&request), Status::FlushError, "what is posted now is flushed too");
}

#[test]
fn what_a_queue_pair_has_left_in_a_completion_queue_can_be_taken_back() {
    let mut pair = Pair::new(patient());
    let other = pair.a.qp();
    other.connect(pair.b.qp().address()).expect("connected");
    for qp in [&pair.qa, &other] {
        qp.modify(&QpChange::to(QpState::Error)).expect("a way");
        qp.post_send(&SendRequest::send(1, &[])).expect("posted");
    }
    pair.settle();
    pair.a.cq.forget(other.qpn());
    assert_eq!(pair.a.take().iter().map(|one| one.qpn).collect::<Vec<_>>(), [pair.qa.qpn()]);
}

/// A pair whose first host is under `rules`.
fn planned(rules: Vec<Rule>) -> (Pair, Arc<FaultPlan>) {
    let plan = FaultPlan::new(0, rules);
    let fabric = Fabric::new();
    let host = |seed, points| {
        let config = HcaConfig { seed, ..patient() };
        Host::planned(Words::new(64), Box::new(fabric.port()), (config, points), 0)
    };
    let (a, b) = (host(0, Points::with(&plan)), host(1, Points::OFF));
    (Pair::of(a, b), plan)
}

#[test]
fn a_plan_takes_the_port_down_with_a_packet_and_brings_it_back_with_one_that_was_lost() {
    let down = Rule { skip: 2, times: Some(1), ..Rule::always("hca.port_down", Action::Fail) };
    let up = Rule { skip: 1, times: Some(1), ..Rule::always("hca.port_up", Action::Fail) };
    let (mut pair, plan) = planned(vec![down, up]);
    let (local, remote) = (pair.a.region(PAGE_SIZE), pair.b.region(PAGE_SIZE));
    for at in 0..4 {
        let sges = [local.sge(0, 64)];
        assert_eq!(pair.ask(&SendRequest::write(at, &sges, remote.remote(0))), Status::Success);
    }
    assert_eq!(events(&pair.a), [AsyncEvent::PortError(PORT), AsyncEvent::PortActive(PORT)]);
    assert!(plan.fired().iter().all(|(_, fired)| *fired == 1), "{:?}", plan.fired());
}

#[test]
fn a_plan_changes_tables_and_ends_a_device() {
    let once = |point| Rule { times: Some(1), ..Rule::always(point, Action::Fail) };
    let last = Rule { skip: 1, ..once("hca.fatal") };
    let (mut pair, _) = planned(vec![once("hca.gid_change"), once("hca.pkey_change"), last]);
    let (local, remote) = (pair.a.region(PAGE_SIZE), pair.b.region(PAGE_SIZE));
    let sges = [local.sge(0, 64)];
    let request = SendRequest::write(1, &sges, remote.remote(0));
    assert_eq!(pair.ask(&request), Status::Success);
    assert_eq!(events(&pair.a), [AsyncEvent::GidChange(PORT), AsyncEvent::PKeyChange(PORT)]);
    assert_eq!((pair.a.hca.gids().len(), pair.a.hca.query_pkey(PORT, 0)), (2, Ok(PKey(0x7fff))));
    assert_eq!(pair.ask(&request), Status::FlushError);
    assert_eq!(events(&pair.a), [AsyncEvent::DeviceFatal]);
}
