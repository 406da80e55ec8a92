//! Shared receive queues, the states of queue pairs on the way, and the events that speak of both.

use crate::world::{Host, Pair, config, connect, pattern};
use hw_model::hca::{
    AsyncEvent, CreateQpError, CreateSrqError, HcaConfig, PathMtu, PostError, QpChange, QpSpec, QpState,
    QueuePair, RecvRequest, SendRequest, SharedReceiveQueue, SrqLimitError, SrqSpec, Status,
};
use hw_model::sync::Arc;

fn small_packets() -> HcaConfig {
    HcaConfig { path_mtu: PathMtu::new(256).expect("an MTU"), ..config() }
}

fn srq(host: &Host, max_requests: u32) -> Arc<SharedReceiveQueue> {
    host.hca.create_srq(&SrqSpec { pd: host.pd, max_requests, max_sges: 2 }).expect("a shared queue")
}

fn qp_over(host: &Host, srq: &Arc<SharedReceiveQueue>) -> Arc<QueuePair> {
    let spec = QpSpec { srq: Some(Arc::clone(srq)), ..QpSpec::new(host.pd, &host.cq) };
    host.hca.create_qp(&spec).expect("a queue pair")
}

fn events(host: &Host) -> Vec<AsyncEvent> {
    std::iter::from_fn(|| host.hca.events().try_next()).collect()
}

#[test]
fn queue_pairs_take_receives_from_one_queue_in_the_order_of_their_messages() {
    let mut pair = Pair::new(small_packets());
    let shared = srq(&pair.b, 64);
    let ends: Vec<_> = (0..4).map(|_| (pair.a.qp(), qp_over(&pair.b, &shared))).collect();
    ends.iter().for_each(|(near, far)| connect(near, far));
    let (near, far) = (pair.a.region(4096), pair.b.region(64 * 512));
    pair.a.fill(&near, 0, &pattern(1, 4096));
    for id in 0..32 {
        shared.post(&RecvRequest::new(id, &[far.sge(id * 512, 512)])).expect("posted");
    }
    for round in 0..8_u64 {
        for (at, (qp, _)) in ends.iter().enumerate() {
            let sges = [near.sge(at as u64 * 600, 300)];
            qp.post_send(&SendRequest::send_immediate(round, &sges, at as u32)).expect("posted");
        }
    }
    pair.run_without_faults();
    let received = pair.b.take();
    assert_eq!(received.len(), 32);
    for completion in &received {
        let at = completion.immediate().expect("all have it").0 as usize;
        assert_eq!(completion.qpn, ends[at].1.qpn(), "the completion names another queue pair");
        let data = pair.b.bytes(&far, completion.id.0 * 512, 300);
        assert_eq!(data, pattern(1, 4096)[at * 600..at * 600 + 300]);
    }
    assert_eq!(shared.outstanding(), 0);
    let (sender, starved) = &ends[0];
    let sges = [near.sge(0, 1)];
    sender.post_send(&SendRequest::send(99, &sges)).expect("posted");
    pair.settle();
    assert!(pair.b.hca.stats().rnr_naks_sent > 0, "an empty shared queue is one that is not ready");
    let own = starved.post_recv(&RecvRequest::new(1, &[]));
    assert_eq!(own, Err(PostError::NoReceiveQueue { qpn: starved.qpn() }));
}

#[test]
fn falling_below_the_limit_is_an_event_once() {
    let mut pair = Pair::new(small_packets());
    let shared = srq(&pair.b, 8);
    let (near, far) = (pair.a.qp(), qp_over(&pair.b, &shared));
    connect(&near, &far);
    let limit = AsyncEvent::SrqLimitReached(shared.number());
    (0..4).for_each(|id| shared.post(&RecvRequest::new(id, &[])).expect("posted"));
    shared.set_limit(3).expect("within the queue");
    assert!(events(&pair.b).is_empty(), "four are posted");
    let mut send = |count: u64| {
        (0..count).for_each(|id| near.post_send(&SendRequest::send(id, &[])).expect("posted"));
        pair.run_without_faults();
        events(&pair.b)
    };
    assert!(send(1).is_empty(), "three are posted, which is not below three");
    assert_eq!(send(2), [limit], "once, though two were taken");
    assert_eq!(shared.limit(), 0, "it is to be armed anew");
    assert_eq!(shared.set_limit(9), Err(SrqLimitError { limit: 9, capacity: 8 }));
    shared.set_limit(2).expect("within the queue");
    assert_eq!(events(&pair.b), [limit], "below already");
}

#[test]
fn a_failed_queue_pair_leaves_the_shared_queue_to_the_others() {
    let pair = Pair::new(small_packets());
    let shared = srq(&pair.b, 8);
    let qp = qp_over(&pair.b, &shared);
    (0..4).for_each(|id| shared.post(&RecvRequest::new(id, &[])).expect("posted"));
    qp.modify(&QpChange::to(QpState::Error)).expect("always possible");
    assert_eq!(events(&pair.b), [AsyncEvent::LastWqeReached(qp.qpn())]);
    assert!(pair.b.take().is_empty(), "what was posted is not this queue pair's to flush");
    assert_eq!(shared.outstanding(), 4);
}

#[test]
fn shared_queues_have_limits_and_are_gone_when_dropped() {
    let pair = Pair::new(small_packets());
    let host = &pair.a;
    let before = host.hca.live_objects();
    let limits = host.hca.config().limits;
    let create = |max_requests, max_sges| {
        host.hca.create_srq(&SrqSpec { pd: host.pd, max_requests, max_sges }).map(|srq| srq.capacity())
    };
    let max = limits.recv_requests;
    assert_eq!(create(0, 1), Err(CreateSrqError::Requests { requests: 0, max }));
    assert_eq!(create(max + 1, 1), Err(CreateSrqError::Requests { requests: max + 1, max }));
    let sges = limits.sges + 1;
    assert_eq!(create(1, sges), Err(CreateSrqError::Sges { sges, max: limits.sges }));
    let foreign = srq(&pair.b, 4);
    let spec = QpSpec { srq: Some(foreign), ..QpSpec::new(host.pd, &host.cq) };
    assert_eq!(host.hca.create_qp(&spec).map(|_| ()).expect_err("foreign"), CreateQpError::OtherDevice);
    let shared = srq(host, 1);
    let qp = qp_over(host, &shared);
    assert_eq!(host.hca.live_objects().srqs, before.srqs + 1);
    drop(shared);
    assert_eq!(host.hca.live_objects().srqs, before.srqs + 1, "the queue pair keeps it alive");
    drop(qp);
    assert_eq!(host.hca.live_objects(), before);
}

#[test]
fn a_draining_send_queue_ends_what_it_began_says_so_and_begins_nothing() {
    let mut pair = Pair::new(small_packets());
    let (near, far) = (pair.a.region(8192), pair.b.region(8192));
    let sges = [near.sge(0, 5000)];
    pair.qa.post_send(&SendRequest::write(1, &sges, far.remote(0))).expect("posted");
    assert!(pair.step().is_none(), "it has begun");
    let drain = QpChange { notify_drained: Some(true), ..QpChange::to(QpState::SendQueueDrain) };
    pair.qa.modify(&drain).expect("a way");
    pair.qa.post_send(&SendRequest::write(2, &sges, far.remote(0))).expect("taken, and left waiting");
    assert!(pair.qa.query().expect("alive").draining);
    pair.run_without_faults();
    let ids: Vec<_> = pair.a.take().iter().map(|c| (c.id.0, c.status)).collect();
    assert_eq!(ids, [(1, Status::Success)]);
    assert_eq!(events(&pair.a), [AsyncEvent::SendQueueDrained(pair.qa.qpn())]);
    assert!(!pair.qa.query().expect("alive").draining);
    let narrow = QpChange { reads: Some(1), ..QpChange::to(QpState::SendQueueDrain) };
    pair.qa.modify(&narrow).expect("only a drained queue can be told");
    pair.qa.modify(&QpChange::to(QpState::ReadyToSend)).expect("a way");
    pair.run_without_faults();
    assert_eq!(pair.a.take().len(), 1, "what waited goes on");
    assert_eq!(pair.qa.query().expect("alive").reads, 1);
}

#[test]
fn a_request_that_is_refused_is_an_event_of_the_one_who_refused_it() {
    let mut pair = Pair::new(small_packets());
    let (near, far) = (pair.a.region(4096), pair.b.region(4096));
    let sges = [near.sge(0, 8)];
    assert_eq!(pair.ask(&SendRequest::write(1, &sges, far.remote(4096))), Status::RemoteAccessError);
    assert_eq!(events(&pair.b), [AsyncEvent::QpAccessError(pair.qb.qpn())]);
    let mut pair = Pair::new(small_packets());
    let (near, far) = (pair.a.region(4096), pair.b.region(4096));
    let sges = [near.sge(0, 8)];
    let request = SendRequest::fetch_add(1, &sges, far.remote(1), 1);
    assert_eq!(pair.ask(&request), Status::RemoteInvalidRequestError);
    assert_eq!(events(&pair.b), [AsyncEvent::QpRequestError(pair.qb.qpn())]);
}

#[test]
fn what_a_queue_pair_is_set_to_can_be_read_back() {
    let mut pair = Pair::new(small_packets());
    let set = pair.qa.query().expect("alive");
    assert_eq!((set.state, set.dest_qpn), (QpState::ReadyToSend, pair.qb.qpn()));
    assert_eq!((set.sq_psn, set.rq_psn), (pair.qa.address().psn, pair.qb.address().psn));
    assert_eq!(set.path.map(|path| path.gid), Some(pair.b.hca.gid()));
    let (near, far) = (pair.a.region(4096), pair.b.region(4096));
    let sges = [near.sge(0, 600)];
    assert_eq!(pair.ask(&SendRequest::write(1, &sges, far.remote(0))), Status::Success);
    let (after, peer) = (pair.qa.query().expect("alive"), pair.qb.query().expect("alive"));
    assert_eq!(after.sq_psn, set.sq_psn.offset(3));
    assert_eq!(peer.rq_psn, after.sq_psn);
}
