//! Sends and receives: where messages go, what completes, and what happens when there is no place for one.

use crate::world::{Pair, Region, config, connect, pattern};
use hw_model::addr::{DmaAddr, RegionAddr};
use hw_model::hca::{
    Completion, FastKeySpec, FastMap, FastMemory, FaultOutcome, HcaConfig, IndirectEntry, IndirectList,
    IndirectTarget, Key, Operation, OperationCode, PathMtu, PostError, QpChange, QpSpec, QpState,
    RecvRequest, Remote, SendRequest, Sge, Status, Time,
};
use hw_model::sync::Arc;

fn small_packets() -> HcaConfig {
    HcaConfig { path_mtu: PathMtu::new(256).expect("an MTU"), ..config() }
}

/// A pair with a region at either end, filled at the first.
struct Scene {
    pair: Pair,
    near: Region,
    far: Region,
}

const SIZE: u64 = 16_000;

impl Scene {
    fn new(config: HcaConfig) -> Self {
        let pair = Pair::new(config);
        let (near, far) = (pair.a.region(SIZE), pair.b.region(SIZE));
        pair.a.fill(&near, 0, &pattern(1, SIZE));
        Self { pair, near, far }
    }

    fn post_recv(&self, id: u64, at: u64, length: u32) {
        self.pair.qb.post_recv(&RecvRequest::new(id, &[self.far.sge(at, length)])).expect("posted");
    }

    fn received(&self) -> Vec<Completion> {
        self.pair.b.take()
    }
}

#[test]
fn a_send_goes_to_the_oldest_receive_and_both_ends_hear_of_it() {
    for length in [0, 1, 255, 256, 257, 512, 5000] {
        let mut scene = Scene::new(small_packets());
        scene.post_recv(70, 0, 6000);
        scene.post_recv(71, 8000, 6000);
        let sges = [scene.near.sge(3, length)];
        assert_eq!(scene.pair.ask(&SendRequest::send(1, &sges)), Status::Success);
        let immediate = SendRequest { solicited: true, ..SendRequest::send_immediate(2, &sges, 0x1234_5678) };
        assert_eq!(scene.pair.ask(&immediate), Status::Success);
        let completions = scene.received();
        let seen: Vec<_> = completions
            .iter()
            .map(|c| (c.id.0, c.status, c.operation, c.bytes, c.immediate().map(|i| i.0), c.solicited))
            .collect();
        let receive = OperationCode::Receive;
        let first = (70, Status::Success, receive, length, None, false);
        let second = (71, Status::Success, receive, length, Some(0x1234_5678), true);
        assert_eq!(seen, [first, second]);
        let sent = &pattern(1, SIZE)[3..3 + length as usize];
        for at in [0, 8000] {
            assert_eq!(scene.pair.b.bytes(&scene.far, at, u64::from(length)), sent);
            let beyond = scene.pair.b.bytes(&scene.far, at + u64::from(length), 100);
            assert_eq!(beyond, [0; 100], "a byte beyond the message was written");
        }
    }
}

#[test]
fn a_message_is_scattered_over_the_list_of_its_receive() {
    let mut scene = Scene::new(small_packets());
    let list =
        [scene.far.sge(0, 100), scene.far.sge(5000, 1), scene.far.sge(6000, 700), scene.far.sge(9000, 999)];
    scene.pair.qb.post_recv(&RecvRequest::new(1, &list)).expect("posted");
    let sges = [scene.near.sge(0, 400), scene.near.sge(1000, 600)];
    assert_eq!(scene.pair.ask(&SendRequest::send(1, &sges)), Status::Success);
    let data = pattern(1, SIZE);
    let sent: Vec<u8> = [&data[..400], &data[1000..1600]].concat();
    let got: Vec<u8> = [(0, 100), (5000, 1), (6000, 700), (9000, 199)]
        .into_iter()
        .flat_map(|(at, length)| scene.pair.b.bytes(&scene.far, at, length))
        .collect();
    assert_eq!(got, sent);
    assert_eq!(scene.received()[0].bytes, 1000);
}

#[test]
fn inline_data_is_taken_when_posted_and_needs_no_key() {
    let mut scene = Scene::new(small_packets());
    scene.post_recv(1, 0, 300);
    let mut data = pattern(5, 256);
    scene.pair.qa.post_send(&SendRequest::send(1, &[]).with_inline(&data)).expect("posted");
    data.fill(0);
    scene.pair.run_without_faults();
    assert_eq!(scene.pair.b.bytes(&scene.far, 0, 256), pattern(5, 256));
    let request = SendRequest::write(2, &[], scene.far.remote(1000)).with_inline(&[7; 8]);
    scene.pair.a.take();
    assert_eq!(scene.pair.ask(&request), Status::Success);
    assert_eq!(scene.pair.b.bytes(&scene.far, 1000, 8), [7; 8]);
    let long = SendRequest::send(3, &[]).with_inline(&[0; 257]);
    let refused = scene.pair.qa.post_send(&long);
    assert_eq!(refused, Err(PostError::InlineTooLong { bytes: 257, max: 256 }));
    let read = SendRequest { inline: &[0; 8], ..SendRequest::read(4, &[], scene.far.remote(0)) };
    assert_eq!(scene.pair.qa.post_send(&read), Err(PostError::InlineTooLong { bytes: 8, max: 0 }));
    let sges = [scene.near.sge(0, 8)];
    let both = SendRequest { inline: &[0; 8], ..SendRequest::send(5, &sges) };
    assert_eq!(scene.pair.qa.post_send(&both), Err(PostError::InlineAndList));
}

#[test]
fn a_write_with_immediate_data_completes_a_receive_and_leaves_its_memory_alone() {
    for length in [0, 8, 256, 900] {
        let mut scene = Scene::new(small_packets());
        scene.post_recv(9, 0, 4);
        let sges = [scene.near.sge(0, length)];
        let request = SendRequest::write_immediate(1, &sges, scene.far.remote(4096), 77);
        assert_eq!(scene.pair.ask(&request), Status::Success);
        let received = scene.received();
        assert_eq!(received.len(), 1);
        let Completion { id, operation, bytes, .. } = received[0];
        assert_eq!((id.0, operation, bytes), (9, OperationCode::ReceiveWrite, length));
        assert_eq!(received[0].immediate().map(|i| i.0), Some(77));
        assert_eq!(scene.pair.b.bytes(&scene.far, 0, 4), [0; 4]);
        let sent = &pattern(1, SIZE)[..length as usize];
        assert_eq!(scene.pair.b.bytes(&scene.far, 4096, u64::from(length)), sent);
    }
}

#[test]
fn a_sender_comes_again_until_there_is_a_receive() {
    for immediate in [false, true] {
        let mut scene = Scene::new(small_packets());
        let sges = [scene.near.sge(0, 600)];
        let request = match immediate {
            true => SendRequest::write_immediate(1, &sges, scene.far.remote(0), 5),
            false => SendRequest::send(1, &sges),
        };
        scene.pair.qa.post_send(&request).expect("posted");
        for _ in 0..5 {
            scene.pair.settle();
            scene.pair.now = Time(scene.pair.now.0 + 20_000);
        }
        assert!(scene.pair.a.take().is_empty(), "it ended without a receive");
        assert!(scene.pair.b.hca.stats().rnr_naks_sent >= 3, "{:?}", scene.pair.b.hca.stats());
        scene.post_recv(1, 0, 600);
        scene.pair.run_without_faults();
        assert_eq!(scene.pair.a.take()[0].status, Status::Success);
        assert_eq!(scene.pair.b.bytes(&scene.far, 0, 600), pattern(1, SIZE)[..600]);
        assert_eq!(scene.received().len(), 1, "one message, one receive");
    }
}

#[test]
fn a_sender_that_is_not_to_come_again_for_ever_gives_up() {
    let mut scene = Scene::new(HcaConfig { rnr_retry: 2, ..small_packets() });
    let sges = [scene.near.sge(0, 8)];
    assert_eq!(scene.pair.ask(&SendRequest::send(1, &sges)), Status::RnrRetryExceeded);
    assert_eq!(scene.pair.b.hca.stats().rnr_naks_sent, 3, "the first and two more");
    assert_eq!(scene.pair.qa.state(), QpState::Error);
    assert_eq!(scene.pair.qb.state(), QpState::ReadyToSend, "the receiver has done nothing wrong");
}

#[test]
fn a_message_longer_than_its_receive_fails_both_ends() {
    for (length, room) in [(257, 256), (1, 0), (1000, 999)] {
        let mut scene = Scene::new(small_packets());
        scene.post_recv(5, 0, room);
        scene.post_recv(6, 0, 4000);
        let sges = [scene.near.sge(0, length)];
        assert_eq!(scene.pair.ask(&SendRequest::send(1, &sges)), Status::RemoteInvalidRequestError);
        let seen: Vec<_> = scene.received().iter().map(|c| (c.id.0, c.status)).collect();
        assert_eq!(seen, [(5, Status::LocalLengthError), (6, Status::FlushError)]);
        let beyond = scene.pair.b.bytes(&scene.far, u64::from(room), 100);
        assert_eq!(beyond, [0; 100], "a byte beyond the receive was written");
        assert_eq!((scene.pair.qa.state(), scene.pair.qb.state()), (QpState::Error, QpState::Error));
    }
}

#[test]
fn a_receive_into_memory_that_it_may_not_write_fails_both_ends() {
    let mut scene = Scene::new(small_packets());
    let nowhere = Sge { key: hw_model::hca::Key(scene.far.key.0 ^ 0x100), ..scene.far.sge(0, 100) };
    scene.pair.qb.post_recv(&RecvRequest::new(3, &[nowhere])).expect("posted");
    let sges = [scene.near.sge(0, 8)];
    assert_eq!(scene.pair.ask(&SendRequest::send(1, &sges)), Status::RemoteOperationError);
    assert_eq!(scene.received()[0].status, Status::LocalProtectionError);
}

#[test]
fn a_write_with_immediate_data_to_memory_that_is_not_the_peers_ends_the_receive_too() {
    let mut scene = Scene::new(small_packets());
    scene.post_recv(3, 0, 100);
    let sges = [scene.near.sge(0, 8)];
    let request = SendRequest::write_immediate(1, &sges, scene.far.remote(SIZE), 1);
    assert_eq!(scene.pair.ask(&request), Status::RemoteAccessError);
    assert_eq!(scene.received()[0].status, Status::LocalAccessError);
}

#[test]
fn receives_posted_to_a_queue_pair_in_the_error_state_are_flushed() {
    let mut scene = Scene::new(small_packets());
    scene.post_recv(1, 0, 8);
    scene.pair.qb.modify(&QpChange::to(QpState::Error)).expect("always possible");
    scene.post_recv(2, 0, 8);
    scene.pair.run_without_faults();
    let seen: Vec<_> = scene.received().iter().map(|c| (c.id.0, c.status)).collect();
    assert_eq!(seen, [(1, Status::FlushError), (2, Status::FlushError)]);
}

#[test]
fn receives_are_taken_from_the_initialised_state_on_and_not_before() {
    let host = Pair::new(small_packets()).a;
    let spec = QpSpec { max_recv_requests: 2, max_recv_sges: 1, ..QpSpec::new(host.pd, &host.cq) };
    let qp = host.hca.create_qp(&spec).expect("a queue pair");
    let receive = RecvRequest::new(1, &[]);
    let state = QpState::Reset;
    assert_eq!(qp.post_recv(&receive), Err(PostError::State { qpn: qp.qpn(), state }));
    let (transport, access) = (spec.transport, spec.access);
    qp.modify(&QpChange::init(transport, access, hw_model::hca::QKey(0))).expect("a way");
    let region = host.region(4096);
    let two = [region.sge(0, 1), region.sge(1, 1)];
    let refused = qp.post_recv(&RecvRequest::new(1, &two));
    assert_eq!(refused, Err(PostError::TooManySges { entries: 2, max: 1 }));
    qp.post_recv(&receive).expect("posted");
    qp.post_recv(&receive).expect("posted");
    assert_eq!(qp.post_recv(&receive), Err(PostError::QueueFull { capacity: 2 }));
}

#[test]
fn pages_missing_on_either_side_are_brought_in_and_the_message_arrives_once() {
    for policy in [hw_model::hca::FaultPolicy::NotReady, hw_model::hca::FaultPolicy::Wait] {
        let mut scene = Scene::new(HcaConfig { fault_policy: policy, ..small_packets() });
        let (near, far) = (&scene.near, &scene.far);
        (0..4).for_each(|page| near.absent(page));
        (0..4).for_each(|page| far.absent(page));
        for id in 0..3 {
            scene.post_recv(id, id * 5000, 5000);
            let sges = [near.sge(id * 5000, 5000)];
            scene.pair.qa.post_send(&SendRequest::send(id, &sges)).expect("posted");
        }
        let Scene { pair, near, far } = &mut scene;
        pair.run(|_, fault| {
            let region = if fault.key == near.key { &*near } else { &*far };
            region.present(region.page_of(fault), true);
            FaultOutcome::Resolved
        });
        let ends: Vec<_> = scene.received().iter().map(|c| (c.id.0, c.status, c.bytes)).collect();
        assert_eq!(ends, [0, 1, 2].map(|id| (id, Status::Success, 5000)), "{policy:?}");
        assert_eq!(scene.pair.b.bytes(&scene.far, 0, 15_000), pattern(1, SIZE)[..15_000]);
        let naks = scene.pair.b.hca.stats().rnr_naks_sent;
        assert_eq!(naks > 0, policy == hw_model::hca::FaultPolicy::NotReady, "{naks} under {policy:?}");
    }
}

#[test]
fn pages_that_cannot_be_had_fail_the_receive() {
    for policy in [hw_model::hca::FaultPolicy::NotReady, hw_model::hca::FaultPolicy::Wait] {
        let mut scene = Scene::new(HcaConfig { fault_policy: policy, ..small_packets() });
        scene.far.absent(0);
        scene.post_recv(4, 0, 300);
        let sges = [scene.near.sge(0, 300)];
        scene.pair.qa.post_send(&SendRequest::send(1, &sges)).expect("posted");
        scene.pair.run(|_, _| FaultOutcome::Failed);
        assert_eq!(scene.pair.a.take()[0].status, Status::RemoteOperationError, "{policy:?}");
        assert_eq!(scene.received()[0].status, Status::LocalProtectionError, "{policy:?}");
    }
}

#[test]
fn a_queue_pair_that_is_dropped_flushes_its_receives() {
    let scene = Scene::new(small_packets());
    let qp = scene.pair.b.qp();
    connect(&qp, &scene.pair.a.qp());
    qp.post_recv(&RecvRequest::new(8, &[])).expect("posted");
    drop(qp);
    let seen: Vec<_> = scene.received().iter().map(|c| (c.id.0, c.status)).collect();
    assert_eq!(seen, [(8, Status::FlushError)]);
}

#[test]
fn a_send_with_invalidate_ends_a_key_of_the_receiver_or_fails_it() {
    let mut scene = Scene::new(small_packets());
    let (hca, pd) = (Arc::clone(&scene.pair.b.hca), scene.pair.b.pd);
    let key = hca.create_fast_key(FastKeySpec { pd, max_entries: 1 }).expect("a key");
    let entry = IndirectEntry { target: IndirectTarget::Dma(DmaAddr(0)), length: 4096 };
    let memory = FastMemory::Gaps(IndirectList::new(vec![entry]).expect("one entry"));
    hca.map_fast_key(key, FastMap { address: RegionAddr(0), memory }).expect("room");
    let register = SendRequest::register(1, key, crate::world::ALL);
    scene.pair.qb.post_send(&register).expect("posted");
    scene.pair.run_without_faults();
    assert_eq!(scene.received()[0].status, Status::Success);
    let sges = [scene.near.sge(0, 8)];
    let remote = Remote { key, address: RegionAddr(0) };
    assert_eq!(scene.pair.ask(&SendRequest::write(1, &sges, remote)), Status::Success);
    scene.post_recv(5, 0, 100);
    scene.post_recv(6, 0, 100);
    let invalidate = SendRequest::new(2, Operation::SendInvalidate(key), &sges);
    assert_eq!(scene.pair.ask(&invalidate), Status::Success);
    let received = scene.received();
    assert_eq!((received.len(), received[0].invalidated()), (1, Some(key)));
    let nobody = Key(scene.far.key.0 ^ 0x5500);
    let invalidate = SendRequest::new(3, Operation::SendInvalidate(nobody), &sges);
    assert_eq!(scene.pair.ask(&invalidate), Status::Success, "the message itself was received");
    let failed = scene.received();
    assert_eq!((failed[0].id.0, failed[0].status), (6, Status::RemoteInvalidRequestError));
    assert_eq!(scene.pair.qb.state(), QpState::Error);
    let (a, b) = (scene.pair.a.qp(), scene.pair.b.qp());
    connect(&a, &b);
    a.post_send(&SendRequest::write(4, &sges, remote)).expect("posted");
    scene.pair.run_without_faults();
    let ended = scene.pair.a.take();
    assert_eq!(ended.last().map(|c| c.status), Some(Status::RemoteAccessError), "the key reaches nothing");
}
