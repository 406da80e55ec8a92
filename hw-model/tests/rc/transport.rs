//! Loss, duplication, reordering, peers that are not ready or not there, and peers that lie.

use crate::world::{Host, Pair, config, connect, pattern};
use hw_model::hca::{
    AckTimeout, FaultOutcome, Gid, HcaConfig, PathMtu, Psn, QpChange, QpState, Qpn, Remote, SendRequest,
    Status,
};
use hw_model::link::{Fabric, FaultyLink, Ingress, Link, LossRates};
use hw_model::sync::{Arc, Mutex};
use hw_model::wire::{Header, NakCode, Packet, Payload, PayloadPool, Reth, Syndrome};
use proptest::prelude::*;

fn small_packets() -> HcaConfig {
    HcaConfig { path_mtu: PathMtu::new(256).expect("an MTU"), ..config() }
}

#[derive(Clone, Debug)]
struct Op {
    write: bool,
    at: u64,
    length: u64,
    fence: bool,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = (any::<bool>(), 0..30_000u64, 0..6000u64, any::<bool>())
        .prop_map(|(write, at, length, fence)| Op { write, at, length, fence });
    prop::collection::vec(op, 1..24)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Every request ends once, in order, with success; every byte is where a lossless link would have put it.
    #[test]
    fn a_lossy_link_changes_nothing_but_the_time(
        ops in ops(), seed: u64, drop in 0..120u32, duplicate in 0..120u32, reorder in 0..120u32,
        micro_steps: bool, faults: bool,
    ) {
        let fabric = Fabric::new();
        let rates = LossRates { drop, duplicate, reorder, ..LossRates::default() };
        let ends = [fabric.port(), fabric.port()].map(|port| Box::new(FaultyLink::new(port, rates, seed)));
        let [a, b] = ends;
        let mut pair = Pair::over(HcaConfig { micro_steps, retry_count: 100, ..small_packets() }, a, b);
        const SIZE: u64 = 36_000;
        let remote = pair.b.region(SIZE);
        // Each operation has local bytes of its own, so that what it should do does not depend on the others' time.
        let sources: Vec<_> = ops.iter().map(|_| pair.a.region(6000)).collect();
        let mut expected_remote = pattern(1, SIZE);
        pair.b.fill(&remote, 0, &expected_remote);
        let mut expected_reads = Vec::new();
        for (n, (op, source)) in ops.iter().zip(&sources).enumerate() {
            let range = op.at as usize..(op.at + op.length) as usize;
            if op.write {
                let data = pattern(n as u64 + 2, op.length);
                pair.a.fill(source, 0, &data);
                expected_remote[range].copy_from_slice(&data);
            } else {
                expected_reads.push((n, expected_remote[range].to_vec()));
            }
        }
        if faults {
            for page in 0..9 {
                remote.absent(page);
            }
            sources.iter().for_each(|source| source.absent(1));
        }
        for (n, (op, source)) in ops.iter().zip(&sources).enumerate() {
            let sges = [source.sge(0, op.length as u32)];
            let target = remote.remote(op.at);
            // A write may overtake the data of a read before it, unless fenced.
            let after_read = n > 0 && !ops[n - 1].write;
            let request = match op.write {
                true => SendRequest { fence: op.fence || after_read, ..SendRequest::write(n as u64, &sges, target) },
                false => SendRequest { fence: op.fence, ..SendRequest::read(n as u64, &sges, target) },
            };
            pair.qa.post_send(&request).expect("posted");
        }
        pair.run(|_, fault| {
            let region = sources.iter().chain([&remote]).find(|region| region.key == fault.key).expect("known");
            region.present(region.page_of(fault), true);
            FaultOutcome::Resolved
        });
        let ends: Vec<_> = pair.a.take().iter().map(|c| (c.id.0, c.status)).collect();
        let wanted: Vec<_> = (0..ops.len() as u64).map(|id| (id, Status::Success)).collect();
        prop_assert_eq!(ends, wanted);
        prop_assert!(pair.b.bytes(&remote, 0, SIZE) == expected_remote, "remote bytes differ");
        for (n, data) in expected_reads {
            prop_assert!(pair.a.bytes(&sources[n], 0, data.len() as u64) == data, "read {} differs", n);
        }
        prop_assert_eq!(pair.a.hca.stats().dma_refused + pair.b.hca.stats().dma_refused, 0);
    }
}

#[test]
fn heavy_loss_is_survived_by_retrying_and_the_link_really_lost() {
    let fabric = Fabric::new();
    let config = HcaConfig { retry_count: 100, ..small_packets() };
    let rates = LossRates { drop: 200, duplicate: 100, reorder: 100, ..LossRates::default() };
    let link = Arc::new(FaultyLink::new(fabric.port(), rates, 7));
    let mut pair = Pair::over(config, Box::new(Arc::clone(&link)), Box::new(fabric.port()));
    let (local, remote) = (pair.a.region(100_000), pair.b.region(100_000));
    pair.a.fill(&local, 0, &pattern(1, 100_000));
    let sges = [local.sge(0, 100_000)];
    assert_eq!(pair.ask(&SendRequest::write(1, &sges, remote.remote(0))), Status::Success);
    assert_eq!(pair.b.bytes(&remote, 0, 100_000), pattern(1, 100_000));
    let counts = link.counts();
    assert!(counts.dropped > 20 && counts.duplicated > 10 && counts.reordered > 10, "{counts:?}");
    assert!(pair.a.hca.stats().retries > 20);
}

#[test]
fn a_peer_that_is_not_there_exceeds_the_retries() {
    let config = HcaConfig {
        retry_count: 3,
        ack_timeout: AckTimeout::from_code(8).expect("five bits"),
        ..small_packets()
    };
    let mut pair = Pair::new(config);
    let local = pair.a.region(4096);
    let gone = pair.b.qp().address();
    let qa = pair.a.qp();
    qa.connect(gone).expect("connects");
    pair.qa = qa;
    let sges = [local.sge(0, 8)];
    assert_eq!(pair.ask(&SendRequest::write(1, &sges, local.remote(0))), Status::RetryExceeded);
    assert_eq!(pair.a.hca.stats().timeouts, 4, "the first and three more");
    assert_eq!(pair.now.0, 4 * (4096 << 8), "each waits for the whole timeout");
}

#[test]
fn a_receiver_that_is_never_ready_exceeds_the_rnr_retries() {
    let mut pair = Pair::new(HcaConfig { rnr_retry: 2, ..small_packets() });
    let (local, remote) = (pair.a.region(4096), pair.b.region(4096));
    remote.absent(0);
    let sges = [local.sge(0, 8)];
    // Nobody answers the page fault.
    pair.qa.post_send(&SendRequest::write(1, &sges, remote.remote(0))).expect("posted");
    while let Some(wake) = pair.step().unwrap_or(Some(pair.now)) {
        pair.now = wake;
    }
    assert_eq!(pair.a.take()[0].status, Status::RnrRetryExceeded);
    assert_eq!(pair.a.hca.stats().rnr_naks_received, 3);
    assert_eq!(pair.b.hca.stats().faults_by_remote_access, 1, "retries make no further event");
}

#[test]
fn the_error_state_and_destruction_flush_what_is_posted() {
    for destroy in [false, true] {
        let mut pair = Pair::new(small_packets());
        let (local, remote) = (pair.a.region(4096), pair.b.region(4096));
        local.absent(0);
        let sges = [local.sge(0, 8)];
        for id in 0..5 {
            let signaled = id % 2 == 0;
            let request = SendRequest { signaled, ..SendRequest::write(id, &sges, remote.remote(0)) };
            pair.qa.post_send(&request).expect("posted");
        }
        pair.settle();
        if destroy {
            pair.qa = pair.a.qp();
        } else {
            pair.qa.modify(&QpChange::to(QpState::Error)).expect("always possible");
        }
        let ends: Vec<_> = pair.a.take().iter().map(|c| (c.id.0, c.status)).collect();
        assert_eq!(ends, (0..5).map(|id| (id, Status::FlushError)).collect::<Vec<_>>());
        pair.settle();
        assert!(pair.a.take().is_empty(), "a request ended twice");
    }
}

#[test]
fn a_reset_queue_pair_can_be_connected_again() {
    let mut pair = Pair::new(small_packets());
    let (local, remote) = (pair.a.region(4096), pair.b.region(4096));
    let sges = [local.sge(0, 4096)];
    let beyond = remote.remote(1);
    assert_eq!(pair.ask(&SendRequest::write(1, &sges, beyond)), Status::RemoteAccessError);
    for qp in [&pair.qa, &pair.qb] {
        qp.modify(&QpChange::to(QpState::Reset)).expect("always possible");
    }
    connect(&pair.qa, &pair.qb);
    assert_eq!(pair.ask(&SendRequest::write(2, &sges, remote.remote(0))), Status::Success);
}

#[test]
fn a_completion_queue_that_overruns_says_so_and_stops_its_queue_pairs() {
    let mut pair = Pair::new(small_packets());
    let (local, remote) = (pair.a.region(4096), pair.b.region(4096));
    let cq = pair.a.hca.create_cq(2).expect("a queue");
    let spec = hw_model::hca::QpSpec::new(pair.a.pd, &cq);
    let qa = pair.a.hca.create_qp(&spec).expect("a queue pair");
    pair.qb = pair.b.qp();
    connect(&qa, &pair.qb);
    let sges = [local.sge(0, 8)];
    for id in 0..4 {
        qa.post_send(&SendRequest::write(id, &sges, remote.remote(0))).expect("posted");
    }
    pair.run_without_faults();
    assert_eq!(qa.state(), QpState::Error);
    assert_eq!(qa.outstanding(), 0, "requests whose completion is lost have ended all the same");
    let mut out = Vec::new();
    assert_eq!(cq.poll(&mut out, 8), Ok(2));
    assert_eq!(out.iter().map(|c| c.id.0).collect::<Vec<_>>(), [0, 1]);
    assert!(cq.poll(&mut out, 8).is_err(), "the overrun would go unseen");
    assert!(cq.wait(std::time::Duration::ZERO), "who waits must hear of it too");
}

#[test]
fn many_queue_pairs_are_served_in_turns() {
    let mut pair = Pair::new(HcaConfig { window_bytes: 1 << 20, ..small_packets() });
    let (local, remote) = (pair.a.region(1 << 20), pair.b.region(1 << 20));
    let long = [local.sge(0, 1 << 20)];
    let short = [local.sge(0, 8)];
    pair.qa.post_send(&SendRequest::write(1000, &long, remote.remote(0))).expect("posted");
    let qps: Vec<_> = (0..100).map(|_| (pair.a.qp(), pair.b.qp())).collect();
    for (id, (qa, qb)) in qps.iter().enumerate() {
        connect(qa, qb);
        qa.post_send(&SendRequest::write(id as u64, &short, remote.remote(0))).expect("posted");
    }
    pair.run_without_faults();
    let order: Vec<_> = pair.a.take().iter().map(|c| c.id.0).collect();
    assert_eq!(order.len(), 101);
    assert_eq!(order.last(), Some(&1000), "a long message went ahead of a hundred short ones");
}

/// A link that a test sends through by hand.
struct Puppet {
    inner: Arc<dyn Link>,
    seen: Mutex<Vec<Packet>>,
}

impl Ingress for Puppet {
    fn deliver(&self, packet: Packet) {
        self.seen.lock().push(packet);
    }
}

/// A host, and a peer of it that sends whatever it is told.
struct Hostile {
    pair: Pair,
    puppet: Arc<Puppet>,
    next: Psn,
}

impl Hostile {
    fn new() -> Self {
        let fabric = Fabric::new();
        let pair = Pair::over(small_packets(), Box::new(fabric.port()), Box::new(fabric.port()));
        let puppet = Arc::new(Puppet { inner: Arc::new(fabric.port()), seen: Mutex::default() });
        puppet.inner.attach(puppet.clone());
        let mut hostile = Self { pair, puppet, next: Psn::new(0xff_fffe) };
        hostile.reconnect();
        hostile
    }

    fn reconnect(&mut self) {
        self.next = Psn::new(0xff_fffe);
        let peer =
            hw_model::hca::QpAddress { gid: self.puppet.inner.address(), qpn: Qpn(77), psn: self.next };
        self.pair.qb = self.pair.b.qp();
        self.pair.qb.connect(peer).expect("connects");
    }

    fn send(&mut self, psn: Psn, header: Header, bytes: usize) -> Vec<Header> {
        let mut payload = PayloadPool::new(1 << 16, 0).take(bytes);
        payload.fill(0xbb);
        self.send_as(self.puppet.inner.address(), psn, header, payload)
    }

    fn send_as(&mut self, source: Gid, psn: Psn, header: Header, payload: Payload) -> Vec<Header> {
        self.post(source, psn, header, payload);
        self.answers().into_iter().map(|(_, header)| header).collect()
    }

    /// Sends without waiting for an answer.
    fn post(&self, source: Gid, psn: Psn, header: Header, payload: Payload) {
        let qp = self.pair.qb.address();
        let packet = Packet::reliable(source, (qp.gid, qp.qpn), psn, header);
        self.puppet.inner.send(Packet { ack_request: true, payload, ..packet });
    }

    /// What the host answers before it comes to rest.
    fn answers(&mut self) -> Vec<(Psn, Header)> {
        self.pair.settle();
        self.puppet.seen.lock().drain(..).map(|packet| (packet.psn, packet.header)).collect()
    }
}

fn nak(headers: &[Header]) -> Option<NakCode> {
    match headers {
        [Header::Acknowledge(aeth)] => match aeth.syndrome {
            Syndrome::Nak(code) => Some(code),
            _ => None,
        },
        _ => None,
    }
}

#[test]
fn packets_out_of_form_are_refused_before_a_byte_lands() {
    let mut world = Hostile::new();
    let region = world.pair.b.region(8192);
    world.pair.b.fill(&region, 0, &[0x11; 8192]);
    let Remote { key, address } = region.remote(0);
    let reth = |length: u32| Reth { address, key, length };
    let cases: &[(&str, Header, usize)] = &[
        ("payload longer than announced", Header::WriteOnly(reth(10)), 11),
        ("payload shorter than announced", Header::WriteOnly(reth(10)), 9),
        ("only-packet larger than the MTU", Header::WriteOnly(reth(300)), 300),
        ("first packet not full", Header::WriteFirst(reth(300)), 255),
        ("first packet of a message that fits one", Header::WriteFirst(reth(256)), 256),
        ("middle without first", Header::WriteMiddle, 256),
        ("last without first", Header::WriteLast, 10),
        ("a read beyond the longest message", Header::ReadRequest(reth(u32::MAX)), 0),
    ];
    for (what, header, bytes) in cases {
        let answers = world.send(world.next, *header, *bytes);
        assert_eq!(nak(&answers), Some(NakCode::InvalidRequest), "{what}: {answers:?}");
        assert_eq!(world.pair.qb.state(), QpState::Error, "{what}");
        let after = world.send(world.next, Header::WriteOnly(reth(8)), 8);
        assert!(after.is_empty(), "a queue pair in the error state answered: {after:?}");
        world.reconnect();
    }
    assert_eq!(world.pair.b.bytes(&region, 0, 8192), [0x11; 8192], "a refused packet left bytes");
}

#[test]
fn a_message_that_goes_beyond_what_its_first_packet_announced_is_cut_off() {
    let mut world = Hostile::new();
    let region = world.pair.b.region(8192);
    let Remote { key, address } = region.remote(0);
    let reth = Reth { address, key, length: 600 };
    let first = world.next;
    world.send(first, Header::WriteFirst(reth), 256);
    world.send(first.next(), Header::WriteMiddle, 256);
    let answers = world.send(first.offset(2), Header::WriteMiddle, 256);
    assert_eq!(nak(&answers), Some(NakCode::InvalidRequest));
    assert_eq!(world.pair.b.bytes(&region, 512, 256), [0; 256]);
}

#[test]
fn a_gap_is_reported_once_and_repetitions_are_acknowledged_again() {
    let mut world = Hostile::new();
    let region = world.pair.b.region(8192);
    let Remote { key, address } = region.remote(0);
    let write = Header::WriteOnly(Reth { address, key, length: 8 });
    let first = world.next;
    let ahead = world.send(first.offset(5), write, 8);
    assert_eq!(nak(&ahead), Some(NakCode::SequenceError));
    assert!(world.send(first.offset(6), write, 8).is_empty(), "one NAK a gap");
    assert_eq!(world.pair.b.bytes(&region, 0, 8), [0; 8], "a packet out of order was executed");
    assert_eq!(world.send(first, write, 8).len(), 1);
    assert_eq!(world.pair.b.bytes(&region, 0, 8), [0xbb; 8]);
    world.pair.b.fill(&region, 0, &[0; 8]);
    assert_eq!(world.send(first, write, 8).len(), 1, "a repetition is acknowledged");
    assert_eq!(world.pair.b.bytes(&region, 0, 8), [0; 8], "a repetition was executed");
    assert_eq!(world.pair.b.hca.stats().duplicates, 1);
}

/// An acknowledgement says that all before it is answered. A requester that has it takes answers that are still missing
/// for lost.
#[test]
fn nothing_is_acknowledged_before_the_reads_that_it_passed() {
    let mut world = Hostile::new();
    let region = world.pair.b.region(8192);
    let Remote { key, address } = region.remote(0);
    let (read, write) =
        (Header::ReadRequest(Reth { address, key, length: 8 }), Reth { address, key, length: 0 });
    let source = world.puppet.inner.address();
    let first = world.next;
    let second = first.next();
    let acknowledged = |(psn, header): &(Psn, Header)| {
        let is_ack = matches!(header, Header::Acknowledge(aeth) if matches!(aeth.syndrome, Syndrome::Ack));
        is_ack && psn.since(second) >= 0
    };
    // Two reads and a write; before any answer, the first is asked again: the second will be, too.
    for (n, header) in [(0, read), (1, read), (2, Header::WriteOnly(write)), (0, read)] {
        world.post(source, first.offset(n), header, Payload::EMPTY);
    }
    let early = world.answers();
    let answered = |answers: &[(Psn, Header)], to: Psn| {
        answers.iter().any(|(psn, header)| *psn == to && matches!(header, Header::ReadResponseOnly(_)))
    };
    assert!(answered(&early, first) && !answered(&early, second), "the second read is owed: {early:?}");
    assert!(!early.iter().any(acknowledged), "an acknowledgement overtook a read: {early:?}");
    world.post(source, second, read, Payload::EMPTY);
    let late = world.answers();
    assert!(answered(&late, second), "{late:?}");
    assert!(acknowledged(late.last().expect("answers")), "the write is acknowledged behind it: {late:?}");
}

/// The same for a read that waits for its page.
#[test]
fn nothing_is_acknowledged_before_a_read_that_waits_for_its_page() {
    let mut world = Hostile::new();
    let region = world.pair.b.region(8192);
    let Remote { key, address } = region.remote(0);
    let (read, write) =
        (Header::ReadRequest(Reth { address, key, length: 8 }), Reth { address, key, length: 0 });
    let source = world.puppet.inner.address();
    let (first, second) = (world.next, world.next.next());
    region.absent(0);
    world.post(source, first, read, Payload::EMPTY);
    world.post(source, second, Header::WriteOnly(write), Payload::EMPTY);
    let early = world.answers();
    assert!(
        matches!(early[..], [(psn, Header::Acknowledge(aeth))] if psn == first && matches!(aeth.syndrome, Syndrome::RnrNak(_))),
        "the peer is asked to come again with the read, and told nothing else: {early:?}"
    );
    let fault = world.pair.b.hca.faults().next().expect("a page fault");
    region.present(0, true);
    world.pair.b.hca.resume(fault.token, FaultOutcome::Resolved);
    assert!(world.answers().is_empty(), "nothing to say before the read is asked again");
    world.post(source, first, read, Payload::EMPTY);
    world.post(source, second, Header::WriteOnly(write), Payload::EMPTY);
    let late: Vec<Psn> = world.answers().into_iter().map(|(psn, _)| psn).collect();
    assert_eq!(late, [first, second], "the read, then the write");
}

#[test]
fn packets_of_strangers_and_for_nobody_are_dropped() {
    let mut world = Hostile::new();
    let region = world.pair.b.region(8192);
    let Remote { key, address } = region.remote(0);
    let write = Header::WriteOnly(Reth { address, key, length: 0 });
    let stranger = world.pair.a.hca.gid();
    assert!(world.send_as(stranger, world.next, write, Payload::EMPTY).is_empty());
    for header in [Header::ReadResponseMiddle, Header::WriteLast] {
        let nobody = (world.pair.b.hca.gid(), Qpn(0x12_3456));
        let mut packet_for_nobody = Packet::reliable(stranger, nobody, Psn::new(1), header);
        world.puppet.inner.send(packet_for_nobody.clone());
        packet_for_nobody.destination = Gid(1);
        world.puppet.inner.send(packet_for_nobody);
    }
    world.pair.settle();
    assert_eq!(world.pair.b.hca.stats().packets_dropped, 3);
    assert_eq!(world.pair.qb.state(), QpState::ReadyToSend);
}

#[test]
fn answers_to_what_was_never_asked_change_nothing() {
    let mut world = Hostile::new();
    let region = world.pair.b.region(8192);
    let sges = [region.sge(0, 8)];
    world.pair.qb.post_send(&SendRequest::write(1, &sges, region.remote(0))).expect("posted");
    world.pair.settle();
    let sent = world.puppet.seen.lock().drain(..).next().expect("the request").psn;
    let ack = |syndrome| Header::Acknowledge(hw_model::wire::Aeth { syndrome, msn: 0 });
    world.send(sent.next(), ack(Syndrome::Ack), 0);
    world.send(sent.previous(), ack(Syndrome::Nak(NakCode::RemoteAccess)), 0);
    world.send(sent, Header::ReadResponseMiddle, 256);
    assert!(world.pair.b.take().is_empty(), "a forged answer ended a request");
    world.send(sent, ack(Syndrome::Ack), 0);
    assert_eq!(world.pair.b.take().len(), 1);
}

#[test]
fn a_read_response_of_the_wrong_length_is_a_bad_response() {
    for (bytes, last) in [(7, true), (9, true), (8, false)] {
        let mut world = Hostile::new();
        let region = world.pair.b.region(8192);
        let sges = [region.sge(0, 8)];
        world.pair.qb.post_send(&SendRequest::read(1, &sges, region.remote(0))).expect("posted");
        world.pair.settle();
        let sent = world.puppet.seen.lock().drain(..).next().expect("the request").psn;
        let aeth = hw_model::wire::Aeth { syndrome: Syndrome::Ack, msn: 1 };
        let header = if last { Header::ReadResponseOnly(aeth) } else { Header::ReadResponseFirst(aeth) };
        world.send(sent, header, bytes);
        assert_eq!(world.pair.b.take()[0].status, Status::BadResponseError);
        assert_eq!(world.pair.b.bytes(&region, 0, 16), [0; 16], "a response of the wrong length was placed");
    }
}

#[test]
fn a_host_that_is_gone_leaves_the_fabric() {
    let fabric = Fabric::new();
    let host = Host::new(Box::new(fabric.port()), config(), 16);
    assert_eq!(fabric.attached(), 1);
    let hca = Arc::downgrade(&host.hca);
    drop(host);
    assert_eq!(fabric.attached(), 0);
    assert!(hca.upgrade().is_none(), "something keeps the device alive");
}
