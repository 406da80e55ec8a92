//! Page faults: who waits, who is told what, and what becomes of the request.

use crate::world::{ALL, Pair, config, connect, pattern};
use hw_model::addr::{PAGE_SIZE, RegionAddr};
use hw_model::hca::{
    FaultAccess, FaultKind, FaultOutcome, FaultScheme, HcaConfig, Key, PageFault, PathMtu, QpState,
    RecvRequest, SendRequest, Sge, Status, Step,
};

const SIZE: u64 = 40_000;

fn small_packets() -> HcaConfig {
    HcaConfig { path_mtu: PathMtu::new(1024).expect("an MTU"), ..config() }
}

/// Runs one request over regions whose pages are all absent, and brings in the page of each event, one at a time.
fn with_absent_pages(write: bool) {
    for micro_steps in [false, true] {
        let mut pair = Pair::new(HcaConfig { micro_steps, ..small_packets() });
        let (local, remote) = (pair.a.region(SIZE), pair.b.region(SIZE));
        let (source, from) = if write { (&pair.a, &local) } else { (&pair.b, &remote) };
        let data = pattern(1, SIZE);
        source.fill(from, 0, &data);
        for page in 0..SIZE.div_ceil(4096) {
            local.absent(page);
            remote.absent(page);
        }
        let sges = [local.sge(0, SIZE as u32)];
        let request = match write {
            true => SendRequest::write(1, &sges, remote.remote(0)),
            false => SendRequest::read(1, &sges, remote.remote(0)),
        };
        pair.qa.post_send(&request).expect("posted");
        let mut events: Vec<PageFault> = Vec::new();
        let (requester, responder) = (pair.qa.qpn(), pair.qb.qpn());
        pair.run(|_, fault| {
            events.push(*fault);
            let local_side = fault.kind == FaultKind::ByWorkRequest;
            assert_eq!(fault.qpn, if local_side { requester } else { responder });
            let region = if local_side { &local } else { &remote };
            assert_eq!(fault.key, region.key);
            assert_eq!(
                fault.address.0 + fault.length,
                region.base + SIZE,
                "the event names the rest of the message"
            );
            let writes = local_side != write;
            assert_eq!(fault.access, if writes { FaultAccess::Write } else { FaultAccess::Read });
            region.present(region.page_of(fault), writes);
            FaultOutcome::Resolved
        });
        let completions = pair.a.take();
        assert_eq!(completions.len(), 1);
        assert_eq!(completions[0].status, Status::Success);
        let (target, to) = if write { (&pair.b, &remote) } else { (&pair.a, &local) };
        assert_eq!(target.bytes(to, 0, SIZE), data);
        assert_eq!(events.len(), 20, "one event a page and side, no flood: {events:?}");
        let (a, b) = (pair.a.hca.stats(), pair.b.hca.stats());
        assert_eq!((a.faults_by_work_request, b.faults_by_remote_access), (10, 10));
        assert!(b.rnr_naks_sent >= 10, "a responder that faults tells its peer to come again");
        assert_eq!(a.retries, 0, "a fault is no loss");
    }
}

#[test]
fn a_write_over_absent_pages_waits_for_each_and_arrives() {
    with_absent_pages(true);
}

#[test]
fn a_read_over_absent_pages_waits_for_each_and_arrives() {
    with_absent_pages(false);
}

#[test]
fn a_page_that_is_present_but_read_only_faults_for_writing() {
    let mut pair = Pair::new(small_packets());
    let (local, remote) = (pair.a.region(4096), pair.b.region(4096));
    remote.present(0, false);
    let sges = [local.sge(0, 100)];
    pair.qa.post_send(&SendRequest::write(1, &sges, remote.remote(0))).expect("posted");
    let mut events = 0;
    pair.run(|_, fault| {
        assert_eq!((fault.kind, fault.access), (FaultKind::ByRemoteAccess, FaultAccess::Write));
        events += 1;
        remote.present(0, true);
        FaultOutcome::Resolved
    });
    assert_eq!((events, pair.a.take()[0].status), (1, Status::Success));
}

#[test]
fn a_fault_that_fails_on_the_requesters_side_is_a_local_protection_error() {
    for write in [true, false] {
        let mut pair = Pair::new(small_packets());
        let (local, remote) = (pair.a.region(SIZE), pair.b.region(SIZE));
        local.absent(3);
        let sges = [local.sge(0, SIZE as u32)];
        let request = match write {
            true => SendRequest::write(1, &sges, remote.remote(0)),
            false => SendRequest::read(1, &sges, remote.remote(0)),
        };
        pair.qa.post_send(&request).expect("posted");
        pair.qa.post_send(&SendRequest::write(2, &[], remote.remote(0))).expect("posted");
        pair.run(|_, fault| {
            assert_eq!((fault.kind, local.page_of(fault)), (FaultKind::ByWorkRequest, 3));
            FaultOutcome::Failed
        });
        let ends: Vec<_> = pair.a.take().iter().map(|c| (c.id.0, c.status)).collect();
        assert_eq!(ends, [(1, Status::LocalProtectionError), (2, Status::FlushError)]);
        assert_eq!(pair.qa.state(), QpState::Error);
    }
}

#[test]
fn a_fault_that_fails_on_the_responders_side_is_a_remote_access_error() {
    for write in [true, false] {
        let mut pair = Pair::new(small_packets());
        let (local, remote) = (pair.a.region(SIZE), pair.b.region(SIZE));
        remote.absent(3);
        let sges = [local.sge(0, SIZE as u32)];
        let request = match write {
            true => SendRequest::write(1, &sges, remote.remote(0)),
            false => SendRequest::read(1, &sges, remote.remote(0)),
        };
        pair.qa.post_send(&request).expect("posted");
        pair.run(|_, fault| {
            assert_eq!((fault.kind, remote.page_of(fault)), (FaultKind::ByRemoteAccess, 3));
            FaultOutcome::Failed
        });
        assert_eq!(pair.a.take()[0].status, Status::RemoteAccessError);
        assert_eq!((pair.qa.state(), pair.qb.state()), (QpState::Error, QpState::Error));
    }
}

#[test]
fn other_queue_pairs_go_on_while_one_waits_for_a_page() {
    let mut pair = Pair::new(small_packets());
    let (qa, qb) = (pair.a.qp(), pair.b.qp());
    connect(&qa, &qb);
    let (absent, local, remote) = (pair.a.region(4096), pair.a.region(SIZE), pair.b.region(SIZE));
    absent.absent(0);
    let sges = [absent.sge(0, 8)];
    pair.qa.post_send(&SendRequest::write(1, &sges, remote.remote(0))).expect("posted");
    pair.settle();
    let fault = pair.a.hca.faults().next().expect("an event");
    let sges = [local.sge(0, SIZE as u32)];
    qa.post_send(&SendRequest::write(2, &sges, remote.remote(0))).expect("posted");
    pair.settle();
    assert_eq!(pair.a.take().iter().map(|c| c.id.0).collect::<Vec<_>>(), [2]);
    absent.present(0, false);
    pair.a.hca.resume(fault.token, FaultOutcome::Resolved);
    pair.a.hca.resume(fault.token, FaultOutcome::Failed);
    pair.settle();
    assert_eq!(pair.a.take().iter().map(|c| (c.id.0, c.status)).collect::<Vec<_>>(), [(1, Status::Success)]);
    assert_eq!(pair.a.hca.stats().stale_answers, 1, "the second answer to one event does nothing");
}

#[test]
fn a_full_event_queue_delays_and_loses_nothing() {
    let mut pair = Pair::new(HcaConfig { fault_queue_depth: 1, ..small_packets() });
    let regions: Vec<_> = (0..4).map(|_| (pair.a.region(4096), pair.b.region(4096))).collect();
    let qps: Vec<_> = (0..4).map(|_| (pair.a.qp(), pair.b.qp())).collect();
    for ((qa, qb), (local, remote)) in qps.iter().zip(&regions) {
        connect(qa, qb);
        local.absent(0);
        remote.absent(0);
        qa.post_send(&SendRequest::write(1, &[local.sge(0, 64)], remote.remote(0))).expect("posted");
    }
    pair.run(|_, fault| {
        let (local, remote) = regions
            .iter()
            .find(|(local, remote)| match fault.kind {
                FaultKind::ByWorkRequest => local.key == fault.key,
                FaultKind::ByRemoteAccess => remote.key == fault.key,
                FaultKind::ByRange => false,
            })
            .expect("a known key");
        if fault.kind == FaultKind::ByWorkRequest { local } else { remote }.present(0, true);
        FaultOutcome::Resolved
    });
    assert!(pair.a.take().iter().all(|c| c.status == Status::Success));
    assert!(pair.a.hca.stats().fault_queue_full > 0, "the test filled no queue");
}

#[test]
fn memory_that_vanishes_under_a_valid_entry_is_a_page_fault() {
    for write in [true, false] {
        let mut pair = Pair::new(small_packets());
        let (local, remote) = (pair.a.region(8192), pair.b.region(8192));
        let data = pattern(5, 8192);
        pair.a.fill(&local, 0, &data);
        pair.b.fill(&remote, 0, &data);
        pair.b.memory.gone.lock().push((remote.first_page + 1, false));
        let sges = [local.sge(100, 8000)];
        let request = match write {
            true => SendRequest::write(1, &sges, remote.remote(100)),
            false => SendRequest::read(1, &sges, remote.remote(100)),
        };
        pair.qa.post_send(&request).expect("posted");
        pair.run(|host, fault| {
            assert_eq!(fault.address.0, remote.base + 4096, "the byte that could not be reached");
            assert_eq!(fault.length, 100 + 8000 - 4096);
            host.memory.gone.lock().clear();
            FaultOutcome::Resolved
        });
        assert_eq!(pair.a.take()[0].status, Status::Success);
        assert_eq!(pair.b.hca.stats().dma_refused, 0);
        assert_eq!(pair.b.bytes(&remote, 0, 8192), data);
    }
}

#[test]
fn a_stale_translation_is_counted_and_is_an_operational_error() {
    for (write, remote_side, status) in [
        (true, true, Status::RemoteOperationError),
        (false, true, Status::RemoteOperationError),
        (true, false, Status::LocalQpOperationError),
        (false, false, Status::LocalQpOperationError),
    ] {
        let mut pair = Pair::new(small_packets());
        let (local, remote) = (pair.a.region(4096), pair.b.region(4096));
        let (host, region) = if remote_side { (&pair.b, &remote) } else { (&pair.a, &local) };
        host.memory.gone.lock().push((region.first_page, true));
        let sges = [local.sge(0, 64)];
        let request = match write {
            true => SendRequest::write(1, &sges, remote.remote(0)),
            false => SendRequest::read(1, &sges, remote.remote(0)),
        };
        assert_eq!(pair.ask(&request), status);
        let (a, b) = (pair.a.hca.stats().dma_refused, pair.b.hca.stats().dma_refused);
        assert_eq!((a, b), if remote_side { (0, 1) } else { (1, 0) });
    }
}

#[test]
fn a_read_that_faults_before_a_refused_request_is_still_answered() {
    let mut pair = Pair::new(small_packets());
    let (local, remote) = (pair.a.region(SIZE), pair.b.region(SIZE));
    pair.b.fill(&remote, 0, &pattern(6, SIZE));
    remote.absent(5);
    let sges = [local.sge(0, SIZE as u32)];
    let read = SendRequest::read(1, &sges, remote.remote(0));
    let beyond = SendRequest::write(2, &sges, remote.remote(1));
    pair.qa.post_send_list(&[read, beyond]).expect("posted");
    pair.run(|_, fault| {
        remote.present(remote.page_of(fault), true);
        FaultOutcome::Resolved
    });
    let ends: Vec<_> = pair.a.take().iter().map(|c| (c.id.0, c.status)).collect();
    assert_eq!(ends, [(1, Status::Success), (2, Status::RemoteAccessError)]);
    assert_eq!(pair.a.bytes(&local, 0, SIZE), pattern(6, SIZE));
}

/// Found by the simulation: a send whose receive could not take it was refused, and the refusal taken back when a read before it
/// met a missing page. Asked for again it found no receive, which had ended with the refusal, and was told to come again for
/// ever.
#[test]
fn a_send_that_was_refused_is_refused_when_a_read_before_it_has_had_its_page() {
    let mut pair = Pair::new(small_packets());
    let (local, remote) = (pair.a.region(SIZE), pair.b.region(SIZE));
    remote.absent(5);
    let sges = [local.sge(0, SIZE as u32)];
    let read = SendRequest::read(1, &sges, remote.remote(0));
    let nowhere = Sge { key: Key(0), address: RegionAddr(0), length: 1024 };
    pair.qb.post_recv(&RecvRequest::new(3, &[nowhere])).expect("posted");
    let sent = [local.sge(0, 1024)];
    let send = SendRequest::send(2, &sent);
    pair.qa.post_send_list(&[read, send]).expect("posted");
    pair.run(|_, fault| {
        remote.present(remote.page_of(fault), true);
        FaultOutcome::Resolved
    });
    let ends: Vec<_> = pair.a.take().iter().map(|c| (c.id.0, c.status)).collect();
    assert_eq!(ends, [(1, Status::Success), (2, Status::RemoteOperationError)]);
    let ends: Vec<_> = pair.b.take().iter().map(|c| (c.id.0, c.status)).collect();
    assert_eq!(ends, [(3, Status::LocalProtectionError)]);
}

/// A write is sent again after a timeout, and its page is gone by then; before software has said so, the acknowledgement
/// of the first time arrives. What software says then failed the request behind it.
#[test]
fn a_fault_for_a_request_that_was_answered_meanwhile_fails_no_other() {
    // Room for few packets: the second request has been begun, and waits for the first.
    let mut pair = Pair::new(HcaConfig { window_bytes: 2048, ..small_packets() });
    let local = pair.a.region(4096);
    let other = pair.a.region_at(0x7e00_0000_0000, 0, 100_000, ALL, pair.a.pd);
    let remote = pair.b.region(101_000);
    let (first, second) = ([local.sge(0, 100)], [other.sge(0, 100_000)]);
    pair.qa.post_send(&SendRequest::write(1, &first, remote.remote(0))).expect("posted");
    pair.qa.post_send(&SendRequest::write(2, &second, remote.remote(200))).expect("posted");
    // The peer does nothing yet, until the requester has lost patience.
    let alone = |pair: &Pair| loop {
        if let Step::Idle { wake_at } = pair.a.hca.step_engine(0, pair.now) {
            return wake_at;
        }
    };
    pair.now = alone(&pair).expect("it waits for an acknowledgement");
    local.absent(0);
    alone(&pair);
    let fault = pair.a.hca.faults().next().expect("the page is needed to send it again");
    pair.settle();
    let ended: Vec<_> = pair.a.take().iter().map(|completion| (completion.id.0, completion.status)).collect();
    assert_eq!(ended, [(1, Status::Success)], "the peer has had it all along");
    pair.a.hca.resume(fault.token, FaultOutcome::Failed);
    pair.run_without_faults();
    let ended: Vec<_> = pair.a.take().iter().map(|completion| (completion.id.0, completion.status)).collect();
    assert_eq!(ended, [(2, Status::Success)], "nothing is wrong with the second");
}

/// Four queue pairs meet the same missing range: one event, one answer, all go on.
#[test]
fn queue_pairs_that_meet_one_range_share_an_event_and_its_answer() {
    for outcome in [FaultOutcome::Resolved, FaultOutcome::Failed] {
        let mut pair = Pair::new(HcaConfig { fault_scheme: FaultScheme::ByRange, ..config() });
        let (local, remote) = (pair.a.region(4 * PAGE_SIZE), pair.b.region(4 * PAGE_SIZE));
        pair.a.fill(&local, 0, &pattern(1, 4 * PAGE_SIZE));
        (0..4).for_each(|page| remote.absent(page));
        let more: Vec<_> = (0..3)
            .map(|_| {
                let (qa, qb) = (pair.a.qp(), pair.b.qp());
                crate::world::connect(&qa, &qb);
                (qa, qb)
            })
            .collect();
        let sges = [local.sge(0, 4 * PAGE_SIZE as u32)];
        let request = SendRequest::write(1, &sges, remote.remote(0));
        for qa in more.iter().map(|(qa, _)| qa).chain([&pair.qa]) {
            qa.post_send(&request).expect("posted");
        }
        pair.settle();
        let faults: Vec<_> = std::iter::from_fn(|| pair.b.hca.faults().next()).collect();
        assert_eq!(faults.len(), 1, "one range, one event: {faults:?}");
        let fault = faults[0];
        assert_eq!(
            (fault.kind, fault.key, fault.access),
            (FaultKind::ByRange, remote.key, FaultAccess::Write)
        );
        assert_eq!((fault.address.0, fault.length), (remote.base, 4 * PAGE_SIZE));
        if outcome == FaultOutcome::Resolved {
            (0..4).for_each(|page| remote.present(page, true));
        }
        pair.b.hca.resume(fault.token, outcome);
        pair.run_without_faults();
        let status =
            if outcome == FaultOutcome::Resolved { Status::Success } else { Status::RemoteAccessError };
        let ended: Vec<_> = pair.a.take().iter().map(|completion| completion.status).collect();
        assert_eq!(ended, [status; 4]);
        let stats = pair.b.hca.stats();
        assert_eq!((stats.faults_by_range, stats.faults_joined, stats.faults_by_remote_access), (1, 3, 0));
        // Answered once; a second answer is for nobody.
        pair.b.hca.resume(fault.token, outcome);
        pair.run_without_faults();
    }
}

/// Found by the simulation: a request failed because another one, whose range held its page, had also named pages that cannot
/// be had.
#[test]
fn a_range_that_cannot_be_had_fails_nobody_who_asked_for_less() {
    let mut pair = Pair::new(HcaConfig { fault_scheme: FaultScheme::ByRange, ..config() });
    let (local, remote) = (pair.a.region(4 * PAGE_SIZE), pair.b.region(4 * PAGE_SIZE));
    (0..4).for_each(|page| remote.absent(page));
    let connections: Vec<_> = (0..2)
        .map(|_| {
            let (qa, qb) = (pair.a.qp(), pair.b.qp());
            crate::world::connect(&qa, &qb);
            (qa, qb)
        })
        .collect();
    let (all, one) = ([local.sge(0, 4 * PAGE_SIZE as u32)], [local.sge(0, PAGE_SIZE as u32)]);
    let requests =
        [SendRequest::read(0, &all, remote.remote(0)), SendRequest::read(1, &one, remote.remote(PAGE_SIZE))];
    for ((qa, _), request) in connections.iter().zip(&requests) {
        qa.post_send(request).expect("posted");
        pair.settle();
    }
    assert_eq!(pair.b.hca.faults().len(), 1, "the second is in the range of the first");
    // The last page is not to be had.
    pair.run(|_, fault| {
        let first = remote.page_of(fault);
        let pages = first..first + fault.length.div_ceil(PAGE_SIZE);
        if pages.contains(&3) {
            return FaultOutcome::Failed;
        }
        pages.for_each(|page| remote.present(page, true));
        FaultOutcome::Resolved
    });
    let mut ended: Vec<_> = pair.a.take().iter().map(|ended| (ended.id.0, ended.status)).collect();
    ended.sort_unstable_by_key(|(id, _)| *id);
    assert_eq!(ended, [(0, Status::RemoteAccessError), (1, Status::Success)]);
}

/// A range that is being brought in for reading is no answer to one that wants to write, nor to one that reaches further.
#[test]
fn an_event_under_way_serves_what_it_covers_and_nothing_else() {
    let mut pair = Pair::new(HcaConfig { fault_scheme: FaultScheme::ByRange, ..config() });
    let (local, remote) = (pair.a.region(4 * PAGE_SIZE), pair.b.region(4 * PAGE_SIZE));
    (0..4).for_each(|page| remote.absent(page));
    let connections: Vec<_> = (0..3)
        .map(|_| {
            let (qa, qb) = (pair.a.qp(), pair.b.qp());
            crate::world::connect(&qa, &qb);
            (qa, qb)
        })
        .collect();
    let page = [local.sge(0, PAGE_SIZE as u32)];
    let two = [local.sge(0, 2 * PAGE_SIZE as u32)];
    let requests = [
        SendRequest::read(0, &page, remote.remote(0)),
        SendRequest::write(1, &page, remote.remote(0)),
        SendRequest::read(2, &two, remote.remote(0)),
    ];
    for ((qa, _), request) in connections.iter().zip(&requests) {
        qa.post_send(request).expect("posted");
        pair.settle();
    }
    assert_eq!(pair.b.hca.faults().len(), 3);
    pair.run(|_, fault| {
        let first = remote.page_of(fault);
        (first..first + fault.length.div_ceil(PAGE_SIZE)).for_each(|page| remote.present(page, true));
        FaultOutcome::Resolved
    });
    assert!(pair.a.take().iter().all(|completion| completion.status == Status::Success));
}
