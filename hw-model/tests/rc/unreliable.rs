//! Unreliable connections and datagrams: whole messages or none, and nobody is told.

use crate::world::{Host, Region, config, pattern};
use hw_model::hca::{
    AddressVector, Completion, CompletionQueue, Destination, FaultOutcome, FaultPolicy, HcaConfig, Key,
    OperationCode, PathMtu, PostError, QKey, QpChange, QpSpec, QpState, Qpn, QueuePair, RecvRequest,
    SendRequest, Sge, SrqSpec, Status, Step, Time, Transport,
};
use hw_model::link::{Fabric, FaultyLink, Link, LossRates};
use hw_model::sync::Arc;

const SIZE: u64 = 16_000;
const QKEY: QKey = QKey(0x1111);

fn small_packets() -> HcaConfig {
    HcaConfig { path_mtu: PathMtu::new(256).expect("an MTU"), ..config() }
}

/// Two hosts with a queue pair each, of one unreliable service.
struct Scene {
    a: Host,
    b: Host,
    qa: Arc<QueuePair>,
    qb: Arc<QueuePair>,
    near: Region,
    far: Region,
    transport: Transport,
}

fn hosts(config: HcaConfig, rates: LossRates, seed: u64) -> (Host, Host) {
    let fabric = Fabric::new();
    let lossy: Box<dyn Link> = Box::new(FaultyLink::new(fabric.port(), rates, seed));
    let b = Host::new(Box::new(fabric.port()), HcaConfig { seed: 1, ..config }, 64);
    (Host::new(lossy, config, 64), b)
}

impl Scene {
    fn new(transport: Transport, config: HcaConfig) -> Self {
        Self::over(transport, config, LossRates::default(), 0, None)
    }

    fn over(
        transport: Transport,
        config: HcaConfig,
        rates: LossRates,
        seed: u64,
        shared: Option<u32>,
    ) -> Self {
        let (a, b) = hosts(config, rates, seed);
        let spec = |host: &Host| QpSpec::new(host.pd, &host.cq).with_transport(transport);
        let srq = shared.map(|max_requests| {
            b.hca.create_srq(&SrqSpec { pd: b.pd, max_requests, max_sges: 2 }).expect("a shared queue")
        });
        let qa = a.hca.create_qp(&spec(&a)).expect("a queue pair");
        let qb = b.hca.create_qp(&QpSpec { srq, ..spec(&b) }).expect("a queue pair");
        if transport == Transport::UnreliableDatagram {
            qa.open(QKEY).expect("a opens");
            qb.open(QKEY).expect("b opens");
        } else {
            qa.connect(qb.address()).expect("a connects");
            qb.connect(qa.address()).expect("b connects");
        }
        let (near, far) = (a.region(SIZE), b.region(SIZE));
        a.fill(&near, 0, &pattern(1, SIZE));
        Self { a, b, qa, qb, near, far, transport }
    }

    fn to_b(&self, qkey: QKey) -> Destination {
        match self.transport {
            Transport::UnreliableDatagram => {
                let to = AddressVector::to(self.b.hca.gid());
                Destination::Datagram { to, qpn: self.qb.qpn(), qkey }
            }
            _ => Destination::Connected,
        }
    }

    fn run(&self, mut answer: impl FnMut(&Host) -> FaultOutcome) {
        for _ in 0..100_000 {
            let mut idle = true;
            for host in [&self.a, &self.b] {
                idle &= matches!(host.hca.step_engine(0, Time(0)), Step::Idle { .. });
                while let Some(fault) = host.hca.faults().next() {
                    idle = false;
                    host.hca.resume(fault.token, answer(host));
                }
            }
            if idle {
                return;
            }
        }
        panic!("the engines never come to rest");
    }

    fn send(&self, request: &SendRequest<'_>) -> Status {
        let request = request.with_destination(self.to_b(QKEY));
        self.qa.post_send(&request).expect("posted");
        self.run(|_| panic!("a fault"));
        let ended = self.a.take();
        assert_eq!(ended.len(), 1, "{ended:?}");
        ended[0].status
    }

    fn post_recv(&self, id: u64, at: u64, length: u32) {
        self.qb.post_recv(&RecvRequest::new(id, &[self.far.sge(at, length)])).expect("posted");
    }

    fn received(&self) -> Vec<(u64, Status, u32)> {
        self.b.take().iter().map(|c| (c.id.0, c.status, c.bytes)).collect()
    }
}

fn polled(cq: &CompletionQueue) -> Vec<Completion> {
    let mut out = Vec::new();
    while cq.poll(&mut out, 64).expect("no overrun") > 0 {}
    out
}

#[test]
fn an_unreliable_connection_carries_sends_and_writes_and_has_nothing_else() {
    let scene = Scene::new(Transport::UnreliableConnection, small_packets());
    scene.post_recv(1, 0, 1000);
    scene.post_recv(2, 0, 4);
    let sges = [scene.near.sge(5, 900)];
    assert_eq!(scene.send(&SendRequest::send(1, &sges)), Status::Success);
    assert_eq!(scene.send(&SendRequest::write(2, &sges, scene.far.remote(2000))), Status::Success);
    let immediate = SendRequest::write_immediate(3, &sges, scene.far.remote(4000), 9);
    assert_eq!(scene.send(&immediate), Status::Success);
    assert_eq!(scene.received(), [(1, Status::Success, 900), (2, Status::Success, 900)]);
    for at in [0, 2000, 4000] {
        assert_eq!(scene.b.bytes(&scene.far, at, 900), pattern(1, SIZE)[5..905]);
    }
    let transport = Transport::UnreliableConnection;
    let refused = scene.qa.post_send(&SendRequest::read(4, &sges, scene.far.remote(0)));
    assert_eq!(refused, Err(PostError::NotOfTransport { operation: OperationCode::Read, transport }));
}

#[test]
fn a_message_of_which_a_packet_is_lost_does_not_arrive_and_its_receive_takes_the_next() {
    let mut lost = 0;
    for seed in 0..30 {
        let rates = LossRates { drop: 150, ..LossRates::default() };
        let scene = Scene::over(Transport::UnreliableConnection, small_packets(), rates, seed, None);
        const MESSAGES: u64 = 8;
        (0..MESSAGES).for_each(|id| scene.post_recv(id, id * 1000, 1000));
        for id in 0..MESSAGES {
            scene.a.fill(&scene.near, 0, &pattern(id, 1000));
            let sges = [scene.near.sge(0, 1000)];
            assert_eq!(scene.send(&SendRequest::send_immediate(id, &sges, id as u32)), Status::Success);
        }
        let arrived = scene.b.take();
        lost += MESSAGES as usize - arrived.len();
        for (place, completion) in arrived.iter().enumerate() {
            let id = completion.immediate().expect("all have it").0;
            assert_eq!((completion.status, completion.bytes), (Status::Success, 1000));
            let data = scene.b.bytes(&scene.far, place as u64 * 1000, 1000);
            assert_eq!(data, pattern(u64::from(id), 1000), "seed {seed}: parts of two messages");
        }
        assert_eq!(scene.qb.state(), QpState::ReadyToSend);
    }
    assert!(lost > 20, "{lost} messages were lost");
}

#[test]
fn a_receive_of_a_shared_queue_whose_message_never_ends_is_aborted() {
    let rates = LossRates { drop: 150, ..LossRates::default() };
    let mut aborted = 0;
    for seed in 0..30 {
        let scene = Scene::over(Transport::UnreliableConnection, small_packets(), rates, seed, Some(16));
        let srq = scene.qb.spec().srq.clone().expect("it has one");
        for id in 0..16 {
            srq.post(&RecvRequest::new(id, &[scene.far.sge(id * 1000, 1000)])).expect("posted");
        }
        for id in 0..8 {
            let sges = [scene.near.sge(0, 1000)];
            scene.send(&SendRequest::send(id, &sges));
        }
        let ends = scene.received();
        aborted += ends.iter().filter(|(_, status, _)| *status == Status::RemoteAbortedError).count();
        let known = [Status::Success, Status::RemoteAbortedError];
        assert!(ends.iter().all(|(_, status, _)| known.contains(status)), "{ends:?}");
    }
    assert!(aborted > 10, "{aborted}");
}

#[test]
fn a_datagram_arrives_behind_its_route_header_and_says_who_sent_it() {
    let scene = Scene::new(Transport::UnreliableDatagram, small_packets());
    scene.post_recv(1, 0, 296);
    let sges = [scene.near.sge(0, 256)];
    assert_eq!(scene.send(&SendRequest::send_immediate(1, &sges, 6)), Status::Success);
    let received = scene.b.take();
    let Completion { status, bytes, datagram, .. } = received[0];
    assert_eq!((status, bytes, received[0].immediate().map(|i| i.0)), (Status::Success, 296, Some(6)));
    assert_eq!(datagram.expect("a datagram").qpn, scene.qa.qpn());
    let header = scene.b.bytes(&scene.far, 0, 40);
    assert_eq!(header[0] >> 4, 6, "version");
    assert_eq!(header[8..24], scene.a.hca.gid().0.to_be_bytes(), "from");
    assert_eq!(header[24..40], scene.b.hca.gid().0.to_be_bytes(), "to");
    assert_eq!(scene.b.bytes(&scene.far, 40, 256), pattern(1, SIZE)[..256]);
}

#[test]
fn a_datagram_longer_than_a_packet_stops_the_send_queue_and_leaves_the_receive_queue() {
    let scene = Scene::new(Transport::UnreliableDatagram, small_packets());
    let (long, short) = ([scene.near.sge(0, 257)], [scene.near.sge(0, 8)]);
    let to = scene.to_b(QKEY);
    let requests =
        [SendRequest::send(1, &long), SendRequest::send(2, &short)].map(|r| r.with_destination(to));
    scene.qa.post_send_list(&requests).expect("posted");
    scene.run(|_| panic!("a fault"));
    let ends: Vec<_> = scene.a.take().iter().map(|c| (c.id.0, c.status)).collect();
    assert_eq!(ends, [(1, Status::LocalLengthError), (2, Status::FlushError)]);
    assert_eq!(scene.qa.state(), QpState::SendQueueError);
    assert_eq!(scene.send(&SendRequest::send(3, &short)), Status::FlushError, "posted while it is stopped");
    // It still receives.
    let mine = scene.a.region(4096);
    scene.qa.post_recv(&RecvRequest::new(9, &[mine.sge(0, 100)])).expect("posted");
    let back =
        Destination::Datagram { to: AddressVector::to(scene.a.hca.gid()), qpn: scene.qa.qpn(), qkey: QKEY };
    let answer = SendRequest::send(4, &[]).with_inline(&[5; 8]).with_destination(back);
    scene.qb.post_send(&answer).expect("posted");
    scene.run(|_| panic!("a fault"));
    assert_eq!(polled(&scene.a.cq)[0].id.0, 9);
    // And it sends again once it is told to.
    scene.qa.modify(&QpChange::to(QpState::ReadyToSend)).expect("a way");
    assert_eq!(scene.send(&SendRequest::send(5, &short)), Status::Success);
}

#[test]
fn datagrams_for_nobody_with_another_queue_key_or_without_a_receive_are_dropped() {
    let scene = Scene::new(Transport::UnreliableDatagram, small_packets());
    let sges = [scene.near.sge(0, 8)];
    let to = AddressVector::to(scene.b.hca.gid());
    scene.post_recv(1, 0, 100);
    for destination in [scene.to_b(QKey(0x1112)), Destination::Datagram { to, qpn: Qpn(0xabcd), qkey: QKEY }]
    {
        let request = SendRequest::send(1, &sges).with_destination(destination);
        scene.qa.post_send(&request).expect("posted");
        scene.run(|_| panic!("a fault"));
        assert_eq!(scene.a.take()[0].status, Status::Success, "a sender of datagrams hears nothing");
    }
    assert!(scene.received().is_empty());
    // A controlled key in the request stands for the sender's own.
    let controlled = SendRequest::send(2, &sges).with_destination(scene.to_b(QKey(0x8000_0000)));
    scene.qa.post_send(&controlled).expect("posted");
    scene.run(|_| panic!("a fault"));
    assert_eq!(scene.received(), [(1, Status::Success, 48)]);
    assert_eq!(scene.a.take().len(), 1);
    scene.send(&SendRequest::send(3, &sges));
    assert!(scene.received().is_empty(), "there was no receive for it");
    scene.post_recv(4, 0, 47);
    scene.send(&SendRequest::send(5, &sges));
    assert!(scene.received().is_empty(), "it does not fit, and the receive waits for one that does");
    let small = [scene.near.sge(0, 7)];
    scene.send(&SendRequest::send(6, &small));
    assert_eq!(scene.received(), [(4, Status::Success, 47)]);
    let connected = scene.qa.post_send(&SendRequest::send(7, &sges));
    assert!(matches!(connected, Err(PostError::NoSuchDestination { .. })), "{connected:?}");
}

#[test]
fn a_missing_page_loses_a_datagram_or_holds_it_as_the_policy_says() {
    for (policy, arrives) in [(FaultPolicy::NotReady, false), (FaultPolicy::Wait, true)] {
        for transport in [Transport::UnreliableDatagram, Transport::UnreliableConnection] {
            let scene = Scene::new(transport, HcaConfig { fault_policy: policy, ..small_packets() });
            scene.far.absent(0);
            (0..3).for_each(|id| scene.post_recv(id, 100 * id, 100));
            let sges = [scene.near.sge(0, 8)];
            for id in 0..3 {
                let request = SendRequest::send_immediate(id, &sges, id as u32);
                scene.qa.post_send(&request.with_destination(scene.to_b(QKEY))).expect("posted");
            }
            scene.run(|_| {
                scene.far.present(0, true);
                FaultOutcome::Resolved
            });
            let got: Vec<_> = scene.b.take().iter().filter_map(|c| c.immediate()).map(|i| i.0).collect();
            let wanted: &[u32] = if arrives { &[0, 1, 2] } else { &[] };
            assert!(got.ends_with(wanted), "{policy:?} {transport:?}: {got:?}");
            assert_eq!(got.len() == 3, arrives, "{policy:?} {transport:?}: {got:?}");
            assert_eq!(scene.qb.state(), QpState::ReadyToSend);
        }
    }
}

#[test]
fn a_datagram_into_memory_that_may_not_be_written_fails_its_receiver() {
    let scene = Scene::new(Transport::UnreliableDatagram, small_packets());
    let nowhere = Sge { key: Key(scene.far.key.0 ^ 0x100), ..scene.far.sge(0, 100) };
    scene.qb.post_recv(&RecvRequest::new(3, &[nowhere])).expect("posted");
    let sges = [scene.near.sge(0, 8)];
    assert_eq!(scene.send(&SendRequest::send(1, &sges)), Status::Success);
    assert_eq!(scene.received(), [(3, Status::LocalProtectionError, 0)]);
    assert_eq!(scene.qb.state(), QpState::Error);
}
