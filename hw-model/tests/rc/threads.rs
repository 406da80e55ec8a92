//! Engine threads, and callers that drive the engines.

use crate::world::{Host, Pair, Words, config, connect, pattern};
use hw_model::fault_plan::{Action, FaultPlan, Points, Rule};
use hw_model::hca::{FaultOutcome, HcaConfig, PathMtu, QpChange, QpState, SendRequest, Status};
use hw_model::link::Fabric;
use hw_model::sync::Arc;
use hw_model::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(60);

fn threaded() -> HcaConfig {
    HcaConfig { path_mtu: PathMtu::new(4096).expect("an MTU"), ..config() }
}

#[test]
fn threads_do_the_work_and_sleep_when_there_is_none() {
    let pair = Pair::new(threaded());
    let (threads_a, threads_b) =
        (pair.a.hca.spawn_engines().expect("threads"), pair.b.hca.spawn_engines().expect("threads"));
    let (local, remote) = (pair.a.region(100_000), pair.b.region(100_000));
    pair.a.fill(&local, 0, &pattern(1, 100_000));
    let sges = [local.sge(0, 100_000)];
    let mut out = Vec::new();
    for id in 0..50 {
        pair.qa.post_send(&SendRequest::write(id, &sges, remote.remote(0))).expect("posted");
        assert!(pair.a.cq.wait(LONG), "no completion");
        pair.a.cq.poll(&mut out, 10).expect("no overrun");
    }
    assert!(out.iter().all(|c| c.status == Status::Success) && out.len() == 50);
    assert_eq!(pair.b.bytes(&remote, 0, 100_000), pattern(1, 100_000));
    // Idle: after a moment to come to rest, not one step in a while. Retried, for a loaded machine may be slow to rest.
    let steps = || pair.a.hca.stats().steps + pair.b.hca.stats().steps;
    let end = Instant::now() + LONG;
    loop {
        let before = steps();
        std::thread::sleep(Duration::from_millis(300));
        if steps() == before {
            break;
        }
        assert!(Instant::now() < end, "idle engines keep stepping");
    }
    // And they wake again.
    pair.qa.post_send(&SendRequest::write(99, &sges, remote.remote(0))).expect("posted");
    assert!(pair.a.cq.wait(LONG), "the threads sleep through a post");
    drop((threads_a, threads_b));
    let again = pair.a.hca.spawn_engines().expect("threads again");
    drop(again);
}

#[test]
fn without_threads_the_callers_make_all_the_progress() {
    let fabric = Fabric::new();
    let config = HcaConfig { callers_drive: true, ..threaded() };
    let host = Host::new(Box::new(fabric.port()), config, 256);
    let (qa, qb) = (host.qp(), host.qp());
    connect(&qa, &qb);
    let (from, to) = (host.region(100_000), host.region(100_000));
    host.fill(&from, 0, &pattern(1, 100_000));
    let sges = [from.sge(0, 100_000)];
    qa.post_send(&SendRequest::write(1, &sges, to.remote(0))).expect("posted");
    assert!(host.cq.wait(LONG));
    assert_eq!(host.take()[0].status, Status::Success);
    assert_eq!(host.bytes(&to, 0, 100_000), pattern(1, 100_000));
}

#[test]
fn a_deadline_wakes_a_thread_that_callers_left_it_to() {
    // The caller's step sends; the peer does not exist; the thread must see to the timeout by itself.
    let config = HcaConfig {
        callers_drive: true,
        retry_count: 2,
        ack_timeout: hw_model::hca::AckTimeout::from_code(9).expect("five bits"),
        ..threaded()
    };
    let fabric = Fabric::new();
    let host = Host::new(Box::new(fabric.port()), config, 16);
    let threads = host.hca.spawn_engines().expect("threads");
    let (qa, gone) = (host.qp(), host.qp().address());
    qa.connect(gone).expect("connects");
    let region = host.region(4096);
    qa.post_send(&SendRequest::write(1, &[region.sge(0, 8)], region.remote(0))).expect("posted");
    assert!(host.cq.wait(LONG), "the deadline was missed");
    assert_eq!(host.take()[0].status, Status::RetryExceeded);
    drop(threads);
}

#[test]
fn a_deadline_that_a_caller_left_while_the_thread_fell_asleep_wakes_it() {
    let config = HcaConfig {
        callers_drive: true,
        retry_count: 0,
        ack_timeout: hw_model::hca::AckTimeout::from_code(9).expect("five bits"),
        ..threaded()
    };
    // The thread has found nothing to do; before it says that it sleeps, a request is posted and sent by its caller.
    let (falling, fallen) = crossbeam::channel::bounded::<()>(1);
    let (post, posted) = crossbeam::channel::bounded::<()>(1);
    let rule = Rule::nth(
        "hca.engine_sleep",
        1,
        Action::Run(Arc::new(move |_| {
            falling.send(()).expect("the test waits");
            posted.recv().expect("the test posts");
        })),
    );
    let points = Points::with(&FaultPlan::new(1, vec![rule]));
    let fabric = Fabric::new();
    let host = Host::planned(Words::new(16), Box::new(fabric.port()), (config, points), 0);
    let (qa, gone) = (host.qp(), host.qp().address());
    qa.connect(gone).expect("connects");
    let region = host.region(4096);
    let threads = host.hca.spawn_engines().expect("threads");
    fallen.recv().expect("the thread goes to sleep");
    qa.post_send(&SendRequest::write(1, &[region.sge(0, 8)], region.remote(0))).expect("posted");
    post.send(()).expect("the thread waits");
    assert!(host.cq.wait(LONG), "the deadline was missed");
    assert_eq!(host.take()[0].status, Status::RetryExceeded);
    drop(threads);
}

#[test]
fn a_queue_pair_that_is_changed_while_the_thread_falls_asleep_is_served() {
    // What waits in a drained send queue goes on when the queue pair is ready again, though nobody posts or polls then.
    let (falling, fallen) = crossbeam::channel::bounded::<()>(1);
    let (change, changed) = crossbeam::channel::bounded::<()>(1);
    let armed = Arc::new(AtomicBool::new(false));
    let stop_once = Arc::clone(&armed);
    let rule = Rule::always(
        "hca.engine_sleep",
        Action::Run(Arc::new(move |_| {
            if stop_once.swap(false, Ordering::SeqCst) {
                falling.send(()).expect("the test waits");
                changed.recv().expect("the test changes it");
            }
        })),
    );
    let points = Points::with(&FaultPlan::new(1, vec![rule]));
    let config = HcaConfig { callers_drive: false, ..threaded() };
    let host = Host::planned(Words::new(16), Box::new(Fabric::new().port()), (config, points), 0);
    let (qa, qb) = (host.qp(), host.qp());
    connect(&qa, &qb);
    let region = host.region(4096);
    let threads = host.hca.spawn_engines().expect("threads");
    qa.modify(&QpChange::to(QpState::SendQueueDrain)).expect("a way");
    armed.store(true, Ordering::SeqCst);
    qa.post_send(&SendRequest::write(1, &[region.sge(0, 8)], region.remote(8)))
        .expect("taken, and left waiting");
    fallen.recv().expect("the thread goes to sleep");
    qa.modify(&QpChange::to(QpState::ReadyToSend)).expect("a way");
    change.send(()).expect("the thread waits");
    assert!(host.cq.wait(LONG), "the queue pair was left in the list");
    assert_eq!(host.take()[0].status, Status::Success);
    drop(threads);
}

#[test]
fn pages_that_come_and_go_under_traffic_lose_nothing() {
    let config = HcaConfig { callers_drive: true, engines: 2, ..threaded() };
    let pair = Pair::new(config);
    let threads =
        [pair.a.hca.spawn_engines().expect("threads"), pair.b.hca.spawn_engines().expect("threads")];
    const SIZE: u64 = 64 << 10;
    let (local, remote) = (pair.a.region(SIZE), pair.b.region(SIZE));
    pair.a.fill(&local, 0, &pattern(1, SIZE));
    let back = pair.a.region(SIZE);
    let stop = Arc::new(AtomicBool::new(false));
    std::thread::scope(|scope| {
        for (host, regions) in [(&pair.a, vec![&local, &back]), (&pair.b, vec![&remote])] {
            let stop = Arc::clone(&stop);
            // Brings pages in as they are asked for, and takes some away as an invalidation does: clear, drain.
            scope.spawn(move || {
                let epoch = host.hca.port().epoch().clone();
                let mut turn = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    if let Some(fault) = host.hca.faults().wait(Duration::from_millis(1)) {
                        let region = regions.iter().find(|region| region.key == fault.key).expect("known");
                        region.present(region.page_of(&fault), true);
                        host.hca.resume(fault.token, FaultOutcome::Resolved);
                    }
                    turn += 1;
                    let region = regions[turn as usize % regions.len()];
                    region.absent(turn * 7 % (SIZE / 4096));
                    let mut drain = epoch.drain();
                    while !drain.poll(&epoch) {
                        std::thread::yield_now();
                    }
                }
            });
        }
        let mut out = Vec::new();
        for id in 0..200u64 {
            let write = [local.sge(0, SIZE as u32)];
            let read = [back.sge(0, SIZE as u32)];
            let fenced = SendRequest { fence: true, ..SendRequest::write(2 * id, &write, remote.remote(0)) };
            let posted =
                pair.qa.post_send_list(&[fenced, SendRequest::read(2 * id + 1, &read, remote.remote(0))]);
            posted.expect("posted");
            let end = Instant::now() + LONG;
            while out.len() < 2 * (id as usize + 1) {
                assert!(
                    Instant::now() < end,
                    "request {id} never ends: {:?} {:?}",
                    pair.a.hca.stats(),
                    pair.b.hca.stats()
                );
                pair.a.cq.wait(Duration::from_millis(100));
                pair.a.cq.poll(&mut out, 10).expect("no overrun");
            }
        }
        stop.store(true, Ordering::Relaxed);
        assert!(out.iter().all(|c| c.status == Status::Success), "{out:?}");
    });
    assert_eq!(pair.a.bytes(&back, 0, SIZE), pattern(1, SIZE));
    let (a, b) = (pair.a.hca.stats(), pair.b.hca.stats());
    assert!(a.faults_by_work_request > 0 && b.faults_by_remote_access > 0, "nothing faulted: {a:?} {b:?}");
    assert_eq!(a.dma_refused + b.dma_refused, 0);
    drop(threads);
}

#[test]
fn a_handler_that_waits_for_faults_can_be_told_to_stop() {
    let host = Host::new(Box::new(Fabric::new().port()), threaded(), 1);
    host.hca.faults().interrupt();
    assert_eq!(host.hca.faults().wait(LONG), None, "an interrupt before the wait is not lost");
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            let begun = Instant::now();
            (host.hca.faults().wait(LONG), begun.elapsed())
        });
        host.hca.faults().interrupt();
        let (event, slept) = waiter.join().expect("no panic");
        assert!(event.is_none() && slept < LONG);
    });
}
