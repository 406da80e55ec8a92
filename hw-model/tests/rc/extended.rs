//! Extended connections (XRC): one target serves the shared receive queues of its domain, each with the memory of its own
//! protection domain.

use crate::world::{ALL, Host, Pair, Region, config, connect, pattern};
use hw_model::hca::{
    AsyncEvent, Completion, CompletionQueue, CreateQpError, CreateSrqError, Destination, ExtendedDomain,
    FaultOutcome, FaultPolicy, Gid, HcaConfig, OpenQpError, PathMtu, PostError, QpSpec, QpState, Qpn,
    QueuePair, RecvRequest, SendRequest, SharedReceiveQueue, SrqSpec, Srqn, Status, Transport,
};
use hw_model::link::{Fabric, FabricPort, Ingress, Link};
use hw_model::sync::atomic::{AtomicU32, Ordering};
use hw_model::sync::{Arc, Mutex};
use hw_model::wire::{Packet, Service};

fn small_packets() -> HcaConfig {
    HcaConfig { path_mtu: PathMtu::new(256).expect("an MTU"), ..config() }
}

/// A program at the target's host: a queue in the domain, with memory and completions that are nobody else's.
struct Program {
    cq: Arc<CompletionQueue>,
    srq: Arc<SharedReceiveQueue>,
    memory: Region,
}

impl Program {
    fn new(host: &Host, domain: &Arc<ExtendedDomain>, base: u64) -> Self {
        let pd = host.hca.alloc_pd().expect("a domain");
        let cq = host.hca.create_cq(64).expect("a queue");
        let spec = SrqSpec { pd, max_requests: 16, max_sges: 2 };
        let srq = host.hca.create_extended_srq(&spec, domain, &cq).expect("a shared queue");
        Self { cq, srq, memory: host.region_at(base, 0, 8192, ALL, pd) }
    }

    fn take(&self) -> Vec<Completion> {
        let mut out = Vec::new();
        while self.cq.poll(&mut out, 64).expect("no overrun") > 0 {}
        out
    }

    fn to<'a>(&self, request: SendRequest<'a>) -> SendRequest<'a> {
        request.with_destination(Destination::SharedQueue(self.srq.number()))
    }
}

/// An initiator at one host, a target at the other, and two programs behind it.
struct World {
    pair: Pair,
    domain: Arc<ExtendedDomain>,
    initiator: Arc<QueuePair>,
    target: Arc<QueuePair>,
    programs: [Program; 2],
    near: Region,
}

impl World {
    fn of(mut pair: Pair) -> Self {
        let domain = pair.b.hca.open_domain().expect("a domain");
        let spec = QpSpec::new(pair.a.pd, &pair.a.cq).with_transport(Transport::ExtendedInitiator);
        let initiator = pair.a.hca.create_qp(&spec).expect("an initiator");
        let target = pair.b.hca.create_qp(&QpSpec::target(&domain)).expect("a target");
        connect(&initiator, &target);
        let programs = [0, 1].map(|at| Program::new(&pair.b, &domain, 0x10_0000 << at));
        let near = pair.a.region(8192);
        pair.a.fill(&near, 0, &pattern(1, 8192));
        pair.qa = Arc::clone(&initiator);
        Self { pair, domain, initiator, target, programs, near }
    }

    fn new(config: HcaConfig) -> Self {
        Self::of(Pair::new(config))
    }

    fn events(&self) -> Vec<AsyncEvent> {
        std::iter::from_fn(|| self.pair.b.hca.events().try_next()).collect()
    }
}

#[test]
fn each_send_goes_to_the_queue_it_names_and_completes_where_that_queue_completes() {
    let mut world = World::new(small_packets());
    for (at, program) in world.programs.iter().enumerate() {
        for id in 0..4 {
            let sges = [program.memory.sge(id * 1024, 1024)];
            program.srq.post(&RecvRequest::new(at as u64 * 100 + id, &sges)).expect("posted");
        }
    }
    for round in 0..4_u32 {
        for (at, program) in world.programs.iter().enumerate() {
            let sges = [world.near.sge(u64::from(round) * 1000, 700)];
            let request = program.to(SendRequest::send_immediate(1, &sges, round * 2 + at as u32));
            world.initiator.post_send(&request).expect("posted");
        }
    }
    world.pair.run_without_faults();
    assert_eq!(world.pair.a.take().len(), 8);
    assert!(world.pair.b.take().is_empty(), "nothing completes anywhere else");
    for (at, program) in world.programs.iter().enumerate() {
        let received = program.take();
        assert_eq!(received.len(), 4);
        for (round, completion) in received.iter().enumerate() {
            assert_eq!((completion.status, completion.bytes), (Status::Success, 700));
            assert_eq!(completion.id.0, (at * 100 + round) as u64, "in the order of its own queue");
            assert_eq!(completion.immediate().map(|data| data.0), Some((round * 2 + at) as u32));
            assert_eq!(completion.qpn, world.target.qpn(), "it came over the target");
            let there = world.pair.b.bytes(&program.memory, round as u64 * 1024, 700);
            assert_eq!(there, pattern(1, 8192)[round * 1000..][..700], "other bytes");
        }
        assert_eq!(program.srq.outstanding(), 0);
    }
}

#[test]
fn writes_reads_and_atomics_reach_the_memory_of_the_named_queues_domain_and_no_other() {
    for micro_steps in [false, true] {
        let mut world = World::new(HcaConfig { micro_steps, ..small_packets() });
        let back = world.pair.a.region(8192);
        let sges = [world.near.sge(0, 3000)];
        for at in [0, 1] {
            let program = &world.programs[at];
            let write = program.to(SendRequest::write(1, &sges, program.memory.remote(8)));
            assert_eq!(world.pair.ask(&write), Status::Success);
            assert_eq!(world.pair.b.bytes(&program.memory, 8, 3000), pattern(1, 3000));
            let into = [back.sge(0, 3000)];
            let read = program.to(SendRequest::read(2, &into, program.memory.remote(8)));
            assert_eq!(world.pair.ask(&read), Status::Success);
            assert_eq!(world.pair.a.bytes(&back, 0, 3000), pattern(1, 3000));
            let word = [back.sge(0, 8)];
            let add = program.to(SendRequest::fetch_add(3, &word, program.memory.remote(0), 5));
            assert_eq!(world.pair.ask(&add), Status::Success);
            assert_eq!(world.pair.b.word(&program.memory, 0), 5);
        }
    }
    for operation in 0..3 {
        let mut world = World::new(small_packets());
        let [one, other] = &world.programs;
        let (sges, remote) = ([world.near.sge(0, 8)], other.memory.remote(0));
        let request = match operation {
            0 => SendRequest::write(1, &sges, remote),
            1 => SendRequest::read(1, &sges, remote),
            _ => SendRequest::fetch_add(1, &sges, remote, 1),
        };
        let request = one.to(request);
        assert_eq!(world.pair.ask(&request), Status::RemoteAccessError, "by the other program's queue");
        assert_eq!(world.events(), [AsyncEvent::QpAccessError(world.target.qpn())]);
        assert_eq!(world.pair.b.word(&world.programs[1].memory, 0), 0);
    }
}

#[test]
fn two_reads_that_wait_at_once_are_each_answered_from_their_own_queues_memory() {
    // Both are accepted before the first is answered; losses have some of them asked for again.
    let rates = hw_model::link::LossRates { drop: 15, ..hw_model::link::LossRates::default() };
    let fabric = Fabric::new();
    let [a, b] = [3, 4].map(|seed| hw_model::link::FaultyLink::new(fabric.port(), rates, seed));
    let pair = Pair::over(HcaConfig { retry_count: 100, ..small_packets() }, Box::new(a), Box::new(b));
    let mut world = World::of(pair);
    let back = world.pair.a.region(8192);
    for round in 0..20 {
        for (at, program) in world.programs.iter().enumerate() {
            world.pair.b.fill(&program.memory, 0, &pattern(round * 2 + at as u64, 4000));
            let sges = [back.sge(at as u64 * 4096, 4000)];
            let read = program.to(SendRequest::read(at as u64, &sges, program.memory.remote(0)));
            world.initiator.post_send(&read).expect("posted");
        }
        world.pair.run_without_faults();
        let statuses: Vec<_> = world.pair.a.take().iter().map(|completion| completion.status).collect();
        assert_eq!(statuses, [Status::Success; 2]);
        for at in 0..2 {
            let came = world.pair.a.bytes(&back, at * 4096, 4000);
            assert!(came == pattern(round * 2 + at, 4000), "round {round}: other bytes");
        }
    }
    assert!(world.pair.b.hca.stats().duplicates > 0, "nothing was asked for again");
}

#[test]
fn a_queue_of_another_domain_an_ordinary_one_and_one_that_is_not_there_are_invalid_requests() {
    let number = |world: &World, case: usize| {
        let host = &world.pair.b;
        let spec = SrqSpec { pd: host.pd, max_requests: 4, max_sges: 1 };
        let queue = match case {
            0 => {
                let other = host.hca.open_domain().expect("a domain");
                host.hca.create_extended_srq(&spec, &other, &host.cq).expect("a queue")
            }
            1 => host.hca.create_srq(&spec).expect("a queue"),
            _ => return (Srqn(0xff_fff0), None),
        };
        queue.post(&RecvRequest::new(1, &[])).expect("posted");
        (queue.number(), Some(queue))
    };
    for case in 0..3 {
        for read in [false, true] {
            let mut world = World::new(small_packets());
            let (number, queue) = number(&world, case);
            let sges = [world.near.sge(0, 8)];
            let request = match read {
                true => SendRequest::read(1, &sges, world.programs[0].memory.remote(0)),
                false => SendRequest::send(1, &[]),
            };
            let request = request.with_destination(Destination::SharedQueue(number));
            assert_eq!(world.pair.ask(&request), Status::RemoteInvalidRequestError, "case {case}");
            assert_eq!(world.events(), [AsyncEvent::QpRequestError(world.target.qpn())]);
            assert_eq!(world.target.state(), QpState::Error);
            assert!(queue.is_none_or(|queue| queue.outstanding() == 1), "its receive was taken");
        }
    }
}

#[test]
fn a_queue_that_was_destroyed_is_reached_by_no_request_any_more() {
    let mut world = World::new(small_packets());
    let [gone, stays] = world.programs;
    stays.srq.post(&RecvRequest::new(1, &[])).expect("posted");
    gone.srq.post(&RecvRequest::new(1, &[])).expect("posted");
    let to_gone = gone.to(SendRequest::send(7, &[]));
    world.initiator.post_send(&stays.to(SendRequest::send(6, &[]))).expect("posted");
    world.pair.run_without_faults();
    assert_eq!((world.pair.a.take().len(), stays.take().len()), (1, 1));
    drop(gone.srq);
    assert_eq!(world.pair.ask(&to_gone), Status::RemoteInvalidRequestError);
}

#[test]
fn an_empty_queue_is_waited_for_and_one_below_its_limit_says_so_by_its_own_number() {
    let mut world = World::new(HcaConfig { rnr_retry: 7, ..small_packets() });
    let program = &world.programs[1];
    program.srq.post(&RecvRequest::new(1, &[program.memory.sge(0, 1024)])).expect("posted");
    program.srq.set_limit(1).expect("within its size");
    let sges = [world.near.sge(0, 600)];
    for id in 0..2 {
        world.initiator.post_send(&program.to(SendRequest::send(id, &sges))).expect("posted");
    }
    world.pair.settle();
    assert_eq!(world.events(), [AsyncEvent::SrqLimitReached(world.programs[1].srq.number())]);
    let program = &world.programs[1];
    assert_eq!(program.take().len(), 1, "the second waits");
    program.srq.post(&RecvRequest::new(2, &[program.memory.sge(1024, 1024)])).expect("posted");
    world.pair.run_without_faults();
    assert_eq!(world.programs[1].take().len(), 1);
    assert_eq!(world.pair.a.take().iter().filter(|one| one.status == Status::Success).count(), 2);
    assert!(world.pair.b.hca.stats().rnr_naks_sent > 0);
}

#[test]
fn a_page_that_is_missing_behind_a_target_is_waited_for_under_either_policy() {
    for fault_policy in [FaultPolicy::NotReady, FaultPolicy::Wait] {
        let mut world = World::new(HcaConfig { fault_policy, ..small_packets() });
        let sizes = [world.near.sge(0, 5000)];
        for at in [0, 1] {
            let program = &world.programs[at];
            (0..2).for_each(|page| program.memory.absent(page));
            let sges = [program.memory.sge(100, 5000)];
            program.srq.post(&RecvRequest::new(1, &sges)).expect("posted");
            world.initiator.post_send(&program.to(SendRequest::send(1, &sizes))).expect("posted");
        }
        let programs = &world.programs;
        world.pair.run(|_, fault| {
            let program = programs.iter().find(|program| program.memory.key == fault.key);
            let program = program.expect("a page of a program's");
            program.memory.present(program.memory.page_of(fault), true);
            FaultOutcome::Resolved
        });
        for program in &world.programs {
            let received: Vec<_> = program.take().iter().map(|one| (one.status, one.bytes)).collect();
            assert_eq!(received, [(Status::Success, 5000)], "{fault_policy:?}");
            assert!(world.pair.b.bytes(&program.memory, 100, 5000) == pattern(1, 5000), "other bytes");
        }
    }
}

/// Names another shared queue in the `n`th packet that goes through it.
struct Renaming {
    port: FabricPort,
    to: Mutex<Option<(u32, Srqn)>>,
    sent: AtomicU32,
}

impl Link for Renaming {
    fn address(&self) -> Gid {
        self.port.address()
    }
    fn max_payload(&self) -> usize {
        self.port.max_payload()
    }
    fn attach(&self, ingress: Arc<dyn Ingress>) {
        self.port.attach(ingress);
    }
    fn detach(&self) {
        self.port.detach();
    }
    fn send(&self, mut packet: Packet) {
        let number = self.sent.fetch_add(1, Ordering::Relaxed);
        if let Some((_, to)) = self.to.lock().filter(|(at, _)| *at == number) {
            packet.service = Service::ExtendedConnection(Some(to));
        }
        self.port.send(packet);
    }
}

#[test]
fn a_message_that_changes_its_queue_on_the_way_is_an_invalid_request_and_spoils_no_other_queue() {
    let fabric = Fabric::new();
    let link = Renaming { port: fabric.port(), to: Mutex::new(None), sent: AtomicU32::new(0) };
    let link = Arc::new(link);
    let pair = Pair::over(small_packets(), Box::new(Arc::clone(&link)), Box::new(fabric.port()));
    let mut world = World::of(pair);
    for program in &world.programs {
        program.srq.post(&RecvRequest::new(1, &[program.memory.sge(0, 4096)])).expect("posted");
    }
    let sent = link.sent.load(Ordering::Relaxed);
    *link.to.lock() = Some((sent + 2, world.programs[1].srq.number()));
    let sges = [world.near.sge(0, 1000)];
    let request = world.programs[0].to(SendRequest::send(1, &sges));
    assert_eq!(world.pair.ask(&request), Status::RemoteInvalidRequestError);
    let ended: Vec<_> = world.programs[0].take().iter().map(|one| one.status).collect();
    assert_eq!(ended, [Status::FlushError], "the receive that had begun ends");
    assert!(world.programs[1].take().is_empty());
    assert_eq!(world.programs[1].srq.outstanding(), 1, "the other queue keeps its receive");
    assert_eq!(world.pair.b.bytes(&world.programs[1].memory, 0, 8), [0; 8]);
}

#[test]
fn a_target_is_opened_by_number_in_its_domain_and_goes_with_its_last_handle() {
    let mut world = World::new(small_packets());
    let qpn = world.target.qpn();
    let opened = world.domain.open_qp(qpn).expect("it is there");
    let other = world.pair.b.hca.open_domain().expect("a domain");
    assert_eq!(other.open_qp(qpn).map(|_| ()), Err(OpenQpError { qpn }), "it is not in that domain");
    let nobody = Qpn(0xff_ffff);
    assert_eq!(world.domain.open_qp(nobody).map(|_| ()), Err(OpenQpError { qpn: nobody }));
    world.target = opened;
    let program = &world.programs[0];
    program.srq.post(&RecvRequest::new(1, &[])).expect("posted");
    let request = program.to(SendRequest::send(1, &[]));
    assert_eq!(world.pair.ask(&request), Status::Success, "the creator's handle has gone, this one has not");
    world.target = Arc::clone(&world.initiator);
    assert_eq!(world.domain.open_qp(qpn).map(|_| ()), Err(OpenQpError { qpn }), "nobody has it any more");
}

#[test]
fn what_extended_objects_cannot_be_made_of_is_refused_and_nothing_stays() {
    let pair = Pair::new(small_packets());
    let host = &pair.b;
    let before = host.hca.live_objects();
    let domain = host.hca.open_domain().expect("a domain");
    let spec = SrqSpec { pd: host.pd, max_requests: 4, max_sges: 1 };
    let srq = host.hca.create_extended_srq(&spec, &domain, &host.cq).expect("a queue");
    let foreign = host.hca.create_extended_srq(&spec, &domain, &pair.a.cq).map(|_| ());
    assert_eq!(foreign, Err(CreateSrqError::OtherDevice));
    let refused = |spec: &QpSpec| host.hca.create_qp(spec).map(|_| ()).expect_err("it cannot be");
    let (target, plain) = (QpSpec::target(&domain), QpSpec::new(host.pd, &host.cq));
    let transport = Transport::ExtendedTarget;
    let without = plain.clone().with_transport(transport);
    assert_eq!(refused(&without), CreateQpError::Domain { transport });
    let elsewhere = QpSpec { pd: host.pd, ..target.clone() };
    assert_eq!(refused(&elsewhere), CreateQpError::Domain { transport });
    let transport = Transport::ReliableConnection;
    assert_eq!(refused(&target.clone().with_transport(transport)), CreateQpError::Domain { transport });
    let reached = QpSpec { srq: Some(Arc::clone(&srq)), ..plain.clone() };
    assert_eq!(refused(&reached), CreateQpError::SharedQueue { transport });
    let transport = Transport::ExtendedInitiator;
    let receiving = QpSpec { srq: Some(srq), ..plain.clone().with_transport(transport) };
    assert_eq!(refused(&receiving), CreateQpError::SharedQueue { transport });
    let initiator = host.hca.create_qp(&plain.with_transport(transport)).expect("an initiator");
    initiator.connect(pair.qa.address()).expect("connected");
    let none = PostError::NoReceiveQueue { qpn: initiator.qpn() };
    assert_eq!(initiator.post_recv(&RecvRequest::new(1, &[])), Err(none));
    let lost = initiator.post_send(&SendRequest::send(1, &[]));
    assert!(matches!(lost, Err(PostError::NoSuchDestination { .. })), "it names no queue: {lost:?}");
    let made = host.hca.create_qp(&target).expect("a target");
    made.connect(pair.qa.address()).expect("connected");
    let posted = made.post_send(&SendRequest::send(1, &[]));
    assert!(matches!(posted, Err(PostError::NotOfTransport { .. })), "{posted:?}");
    drop((initiator, made, target, elsewhere, reached, receiving, domain));
    assert_eq!(host.hca.live_objects(), before);
}
