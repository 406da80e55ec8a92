//! Two HCAs over one memory: packets say where their bytes are, and the receiver copies them from there.

use crate::world::{Host, Pair, config, pattern};
use hw_model::hca::{FaultKind, FaultOutcome, HcaConfig, PathMtu, QpChange, QpState, SendRequest, Status};
use hw_model::link::{Fabric, FaultyLink, LossRates};
use hw_model::sync::Arc;

const SIZE: u64 = 100_000;

fn pair(config: HcaConfig) -> Pair {
    let fabric = Fabric::new();
    Pair::sharing(config, Box::new(fabric.port()), Box::new(fabric.port()))
}

fn micro() -> HcaConfig {
    HcaConfig { micro_steps: true, ..config() }
}

/// Steps only `host`, until it has nothing to do or did so many steps.
fn step(host: &Host, pair_now: hw_model::hca::Time, most: usize) {
    for _ in 0..most {
        if matches!(host.hca.step_engine(0, pair_now), hw_model::hca::Step::Idle { .. }) {
            return;
        }
    }
}

#[test]
fn writes_and_reads_are_copied_once_and_in_ascending_order() {
    for config in [config(), micro()] {
        let mut pair = pair(config);
        let (local, remote) = (pair.a.region(SIZE), pair.b.region(SIZE));
        pair.a.fill(&local, 0, &pattern(1, SIZE));
        *pair.a.memory.writes.lock() = Some(Vec::new());
        let sges = [local.sge(5, 40_000), local.sge(50_003, 30_000)];
        assert_eq!(pair.ask(&SendRequest::write(1, &sges, remote.remote(9))), Status::Success);
        let writes = pair.a.memory.writes.lock().take().expect("recorded");
        let starts: Vec<u64> = writes.iter().map(|(at, _)| *at).collect();
        assert!(starts.is_sorted(), "bytes were placed out of order");
        assert_eq!(writes.iter().map(|(_, len)| len).sum::<usize>(), 70_000, "each byte is placed once");
        let wanted = [&pattern(1, SIZE)[5..40_005], &pattern(1, SIZE)[50_003..80_003]].concat();
        assert_eq!(pair.b.bytes(&remote, 9, 70_000), wanted);
        assert!(pair.a.hca.stats().loans > 0, "nothing was lent");

        // More pieces than a loan has room for.
        let pieces = [(7, 10_000), (20_000, 9_000), (40_001, 500), (60_000, 7_777)];
        let sges = pieces.map(|(at, len)| local.sge(at, len));
        assert_eq!(pair.ask(&SendRequest::write(3, &sges, remote.remote(11))), Status::Success);
        let all = pattern(1, SIZE);
        let wanted = pieces.map(|(at, len)| &all[at as usize..(at + u64::from(len)) as usize]).concat();
        assert_eq!(pair.b.bytes(&remote, 11, wanted.len() as u64), wanted);

        pair.b.fill(&remote, 0, &pattern(2, SIZE));
        let sges = [local.sge(0, SIZE as u32 - 3)];
        assert_eq!(pair.ask(&SendRequest::read(2, &sges, remote.remote(3))), Status::Success);
        assert_eq!(pair.a.bytes(&local, 0, SIZE - 3), pattern(2, SIZE)[3..]);
        assert!(pair.b.hca.stats().loans > 0, "nothing was lent");
    }
}

#[test]
fn two_memories_and_small_messages_are_carried() {
    let mut apart = Pair::new(config());
    let (local, remote) = (apart.a.region(SIZE), apart.b.region(SIZE));
    assert_eq!(apart.ask(&SendRequest::write(1, &[local.sge(0, 9000)], remote.remote(0))), Status::Success);
    assert_eq!(apart.a.hca.stats().loans, 0);
    let mut pair = pair(config());
    let (local, remote) = (pair.a.region(SIZE), pair.b.region(SIZE));
    pair.a.fill(&local, 0, &pattern(1, 64));
    assert_eq!(pair.ask(&SendRequest::write(1, &[local.sge(0, 64)], remote.remote(0))), Status::Success);
    assert_eq!((pair.a.hca.stats().loans, pair.b.bytes(&remote, 0, 64)), (0, pattern(1, 64)));
}

#[test]
fn a_page_that_goes_between_loan_and_copy_is_asked_for_by_its_owner_at_no_cost_in_retries() {
    for config in [config(), micro()] {
        let mut pair = pair(HcaConfig { retry_count: 0, rnr_retry: 0, ..config });
        let (local, remote) = (pair.a.region(SIZE), pair.b.region(SIZE));
        pair.a.fill(&local, 0, &pattern(1, SIZE));
        let sges = [local.sge(0, 60_000)];
        pair.qa.post_send(&SendRequest::write(1, &sges, remote.remote(0))).expect("posted");
        step(&pair.a, pair.now, 1000);
        local.absent(2);
        step(&pair.b, pair.now, 1000);
        assert_eq!(pair.b.hca.stats().loans_given_back, 1);
        let mut asked = Vec::new();
        pair.run(|_, fault| {
            asked.push((fault.kind, local.page_of(fault)));
            local.present(2, false);
            FaultOutcome::Resolved
        });
        assert_eq!(asked, [(FaultKind::ByWorkRequest, 2)], "the owner asks for its own page");
        assert_eq!(pair.a.take()[0].status, Status::Success);
        assert_eq!(pair.b.bytes(&remote, 0, 60_000), pattern(1, 60_000));
        let stats = pair.a.hca.stats();
        assert_eq!((stats.retries, stats.rnr_naks_received, stats.naks_received), (0, 0, 0));
    }
}

#[test]
fn a_read_whose_bytes_go_on_the_way_is_answered_again_at_no_cost_in_retries() {
    let mut pair = pair(HcaConfig { retry_count: 0, ..config() });
    let (local, remote) = (pair.a.region(SIZE), pair.b.region(SIZE));
    pair.b.fill(&remote, 0, &pattern(1, SIZE));
    let sges = [local.sge(0, 60_000)];
    pair.qa.post_send(&SendRequest::read(1, &sges, remote.remote(0))).expect("posted");
    step(&pair.a, pair.now, 1000);
    step(&pair.b, pair.now, 1000);
    remote.absent(3);
    step(&pair.a, pair.now, 1000);
    assert!(pair.a.hca.stats().loans_given_back > 0);
    let mut asked = Vec::new();
    pair.run(|_, fault| {
        asked.push((fault.kind, remote.page_of(fault)));
        remote.present(3, false);
        FaultOutcome::Resolved
    });
    assert_eq!(asked, [(FaultKind::ByRemoteAccess, 3)]);
    assert_eq!(pair.a.take()[0].status, Status::Success);
    assert_eq!(pair.a.bytes(&local, 0, 60_000), pattern(1, 60_000));
    assert_eq!(pair.a.hca.stats().retries, 0);
}

#[test]
fn memory_that_vanishes_under_the_copy_is_told_to_whose_it_is() {
    // As a process's memory does: the page list still says that it is there.
    for source in [true, false] {
        let mut pair = pair(config());
        let (local, remote) = (pair.a.region(SIZE), pair.b.region(SIZE));
        pair.a.fill(&local, 0, &pattern(1, SIZE));
        let sges = [local.sge(0, 60_000)];
        pair.qa.post_send(&SendRequest::write(1, &sges, remote.remote(0))).expect("posted");
        step(&pair.a, pair.now, 1000);
        let region = if source { &local } else { &remote };
        let gone = (region.first_page + 4, false);
        pair.a.memory.gone.lock().push(gone);
        let mut asked = Vec::new();
        let memory = Arc::clone(&pair.a.memory);
        pair.run(|_, fault| {
            asked.push((fault.kind, region.page_of(fault)));
            memory.gone.lock().clear();
            FaultOutcome::Resolved
        });
        let kind = if source { FaultKind::ByWorkRequest } else { FaultKind::ByRemoteAccess };
        assert_eq!(asked, [(kind, 4)]);
        assert_eq!(pair.a.take()[0].status, Status::Success);
        assert_eq!(pair.b.bytes(&remote, 0, 60_000), pattern(1, 60_000));
    }
}

#[test]
fn a_key_destroyed_on_the_way_reaches_nothing() {
    let mut pair = pair(config());
    let (local, remote) = (pair.a.region(SIZE), pair.b.region(SIZE));
    pair.a.fill(&local, 0, &pattern(1, SIZE));
    let sges = [local.sge(0, 9000)];
    pair.qa.post_send(&SendRequest::write(1, &sges, remote.remote(0))).expect("posted");
    step(&pair.a, pair.now, 1000);
    pair.a.hca.destroy_key(local.key).expect("there");
    pair.run_without_faults();
    assert_eq!(pair.a.take()[0].status, Status::LocalProtectionError);
    assert_eq!(pair.b.bytes(&remote, 0, 9000), vec![0; 9000], "bytes of a region that is gone arrived");
}

#[test]
fn answers_that_were_overtaken_by_a_read_asked_again_cost_no_retries() {
    // Regression: the acknowledgement of what lies behind a read, held back while the read was answered a second time.
    let mut pair = pair(HcaConfig { path_mtu: PathMtu::new(1024).expect("an MTU"), ..config() });
    let (local, remote) = (pair.a.region(SIZE), pair.b.region(SIZE));
    pair.b.fill(&remote, 0, &pattern(1, SIZE));
    for page in 0..8 {
        for (id, at) in [(0, 0), (1, 8192)] {
            let sges = [local.sge(at, 8192)];
            pair.qa.post_send(&SendRequest::read(id, &sges, remote.remote(at))).expect("posted");
        }
        pair.qa
            .post_send(&SendRequest::write(2, &[local.sge(30_000, 9)], remote.remote(30_000)))
            .expect("posted");
        step(&pair.a, pair.now, 1000);
        step(&pair.b, pair.now, 1000);
        remote.absent(page % 4);
        step(&pair.a, pair.now, 1);
        remote.present(page % 4, true);
        pair.run_without_faults();
        assert!(pair.a.take().iter().all(|c| c.status == Status::Success));
        assert_eq!(pair.a.bytes(&local, 0, 16384), pattern(1, 16384));
    }
    assert!(pair.a.hca.stats().loans_given_back > 0);
    assert_eq!(pair.a.hca.stats().retries, 0);
}

#[test]
fn a_read_of_a_region_that_goes_is_refused_even_if_the_peer_has_closed_by_then() {
    // Regression: responses that were lent, then the refusal of the rest; the peer, closed, never answered again.
    let mut pair = pair(HcaConfig { path_mtu: PathMtu::new(1024).expect("an MTU"), ..config() });
    let (local, remote) = (pair.a.region(SIZE), pair.b.region(SIZE));
    pair.qa.post_send(&SendRequest::read(1, &[local.sge(0, 90_000)], remote.remote(0))).expect("posted");
    step(&pair.a, pair.now, 1000);
    step(&pair.b, pair.now, 1);
    assert!((1..80).contains(&pair.b.hca.stats().loans), "some of its responses are on their way");
    pair.b.hca.destroy_key(remote.key).expect("there");
    pair.run_without_faults();
    assert_eq!(pair.a.take()[0].status, Status::RemoteAccessError);
}

#[test]
fn what_was_flushed_belongs_to_the_program_again_and_is_not_read() {
    for (config, steps_of_b) in [(config(), 0), (micro(), 0), (micro(), 1)] {
        for destroyed in [false, true] {
            let mut pair = pair(config);
            let (local, remote) = (pair.a.region(SIZE), pair.b.region(SIZE));
            let sges = [local.sge(0, 9000)];
            pair.qa.post_send(&SendRequest::write(1, &sges, remote.remote(0))).expect("posted");
            step(&pair.a, pair.now, 1000);
            assert_eq!(pair.a.hca.stats().loans, 1);
            // In micro-steps: translated, not moved.
            step(&pair.b, pair.now, steps_of_b);
            if destroyed {
                let other = pair.a.qp();
                drop(std::mem::replace(&mut pair.qa, other));
            } else {
                pair.qa.modify(&QpChange::to(QpState::Reset)).expect("always possible");
            }
            assert_eq!(pair.a.take()[0].status, Status::FlushError);
            pair.a.fill(&local, 0, b"a secret of later");
            pair.run_without_faults();
            assert_eq!(pair.b.bytes(&remote, 0, 9000), vec![0; 9000], "read after its request had ended");
        }
    }
}

#[test]
fn a_lossy_link_carries_loans_and_nothing_is_read_after_its_completion() {
    let rates = LossRates { drop: 60, duplicate: 100, reorder: 100, delay: 20, corrupt: 20 };
    for seed in 0..20 {
        let config = HcaConfig {
            path_mtu: PathMtu::new(2048).expect("an MTU"),
            retry_count: 255,
            micro_steps: seed % 2 == 1,
            ..config()
        };
        let fabric = Fabric::new();
        let [a, b] = [0, 1].map(|end| Box::new(FaultyLink::new(fabric.port(), rates, seed * 2 + end)));
        let mut pair = Pair::sharing(config, a, b);
        let (local, remote) = (pair.a.region(SIZE), pair.b.region(SIZE));
        for round in 0..6 {
            let wanted = pattern(seed * 100 + round, 30_000);
            let sges = [local.sge(round * 3, 30_000)];
            let (request, (source, from), (target, to)) = if round % 2 == 0 {
                let request = SendRequest::write(round, &sges, remote.remote(round));
                (request, (&local, round * 3), (&remote, round))
            } else {
                let request = SendRequest::read(round, &sges, remote.remote(round));
                (request, (&remote, round), (&local, round * 3))
            };
            pair.a.fill(source, from, &wanted);
            source.absent(round + 1);
            target.absent(round);
            pair.qa.post_send(&request).expect("posted");
            pair.run(|_, fault| {
                let region = if fault.key == local.key { &local } else { &remote };
                region.present(region.page_of(fault), true);
                FaultOutcome::Resolved
            });
            assert_eq!(pair.a.take()[0].status, Status::Success);
            if round % 2 == 0 {
                // It is ours again: packets that come late must not show what it becomes now.
                pair.a.fill(source, from, &vec![0xff; 30_000]);
            }
            pair.run_without_faults();
            assert_eq!(pair.b.bytes(target, to, 30_000), wanted, "seed {seed}, round {round}");
        }
        assert!(pair.a.hca.stats().loans > 0 && pair.b.hca.stats().loans > 0, "nothing was lent");
    }
}

#[test]
fn devices_that_go_with_packets_on_the_way_leave_nothing() {
    let pair = pair(config());
    let memory = Arc::downgrade(&pair.a.memory);
    let (local, remote) = (pair.a.region(SIZE), pair.b.region(SIZE));
    pair.qa.post_send(&SendRequest::write(1, &[local.sge(0, 9000)], remote.remote(0))).expect("posted");
    pair.qb.post_send(&SendRequest::write(1, &[remote.sge(0, 9000)], local.remote(0))).expect("posted");
    step(&pair.a, pair.now, 1);
    step(&pair.b, pair.now, 1);
    drop(pair);
    assert!(memory.upgrade().is_none(), "a packet keeps its sender alive, and its sender the packet");
}
