//! Devices that reach each other through shared memory.

use crate::world::{Host, connect, pattern};
use hw_model::hca::{FaultOutcome, FaultPolicy, HcaConfig, PathMtu, SendRequest, Status};
use hw_model::link::{Link, OpenShmError, ShmConfig, ShmLink};
use hw_model::sync::Arc;
use hw_model::sync::atomic::{AtomicU32, Ordering};
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(60);

/// An address that no other test has, in this process or another.
fn address() -> IpAddr {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let number = u64::from(std::process::id()) << 32 | u64::from(NEXT.fetch_add(1, Ordering::Relaxed));
    Ipv6Addr::from_bits(0xfd00 << 112 | u128::from(number)).into()
}

fn open(address: IpAddr) -> Arc<ShmLink> {
    Arc::new(ShmLink::open(&ShmConfig { address, ring_bytes: 256 << 10 }).expect("a free address"))
}

fn host(link: &Arc<ShmLink>, seed: u64, mtu: u32) -> Host {
    let config = HcaConfig { seed, path_mtu: PathMtu::new(mtu).expect("an MTU"), ..HcaConfig::default() };
    Host::new(Box::new(Arc::clone(link)), config, 2048)
}

fn outcome(host: &Host) -> Status {
    assert!(host.cq.wait(LONG), "no completion");
    let mut out = Vec::new();
    host.cq.poll(&mut out, 1).expect("no overrun");
    out[0].status
}

#[test]
fn bytes_go_through_shared_memory_whatever_the_packets() {
    const SIZE: u64 = 1 << 20;
    for mtu in [256, 4096, 64 << 10] {
        let (la, lb) = (open(address()), open(address()));
        let (a, b) = (host(&la, 1, mtu), host(&lb, 2, mtu));
        let (qa, qb) = (a.qp(), b.qp());
        connect(&qa, &qb);
        let threads = [a.hca.spawn_engines().expect("threads"), b.hca.spawn_engines().expect("threads")];
        let (local, remote, back) = (a.region(SIZE), b.region(SIZE), a.region(SIZE));
        for (round, length) in [0, 1, 8, 4097, 65_536, SIZE].into_iter().enumerate() {
            let data = pattern(round as u64, length);
            a.fill(&local, 0, &data);
            let sges = [local.sge(0, length as u32)];
            qa.post_send(&SendRequest::write(1, &sges, remote.remote(0))).expect("posted");
            assert_eq!(outcome(&a), Status::Success, "write of {length}");
            assert!(b.bytes(&remote, 0, length) == data, "a write of {length} bytes put others there");
            let sges = [back.sge(0, length as u32)];
            qa.post_send(&SendRequest::read(2, &sges, remote.remote(0))).expect("posted");
            assert_eq!(outcome(&a), Status::Success, "read of {length}");
            assert!(a.bytes(&back, 0, length) == data, "a read of {length} bytes brought others");
        }
        drop(threads);
        let counts = lb.counts();
        assert_eq!((counts.malformed, counts.broken, counts.dropped), (0, 0, 0), "{counts:?}");
    }
}

#[test]
fn a_queue_pair_that_waits_for_a_page_keeps_nobody_else_out_of_the_ring() {
    const SIZE: u64 = 256 << 10;
    let (la, lb) = (open(address()), open(address()));
    let path_mtu = PathMtu::new(16 << 10).expect("an MTU");
    let config = HcaConfig { path_mtu, fault_policy: FaultPolicy::Wait, ..HcaConfig::default() };
    let a = Host::new(Box::new(Arc::clone(&la)), config, 2048);
    let b = Host::new(Box::new(Arc::clone(&lb)), HcaConfig { seed: 1, ..config }, 2048);
    let pairs = [(a.qp(), b.qp()), (a.qp(), b.qp())];
    pairs.iter().for_each(|(qa, qb)| connect(qa, qb));
    let threads = [a.hca.spawn_engines().expect("threads"), b.hca.spawn_engines().expect("threads")];
    let (local, absent, there) = (a.region(SIZE), b.region(SIZE), b.region(SIZE));
    a.fill(&local, 0, &pattern(1, SIZE));
    absent.absent(0);
    let sges = [local.sge(0, SIZE as u32)];
    // As much as the ring holds waits for the page; it is not asked for again while it does.
    pairs[0].0.post_send(&SendRequest::write(1, &sges, absent.remote(0))).expect("posted");
    let fault = b.hca.faults().wait(LONG).expect("a page fault");
    for round in 0..8 {
        pairs[1].0.post_send(&SendRequest::write(2, &sges, there.remote(0))).expect("posted");
        assert_eq!(outcome(&a), Status::Success, "round {round}: those who wait fill the ring");
    }
    absent.present(0, true);
    b.hca.resume(fault.token, FaultOutcome::Resolved);
    assert_eq!(outcome(&a), Status::Success);
    for region in [&absent, &there] {
        assert!(b.bytes(region, 0, SIZE) == pattern(1, SIZE), "other bytes");
    }
    drop(threads);
    let counts = lb.counts();
    assert_eq!((counts.malformed, counts.broken, counts.dropped), (0, 0, 0), "{counts:?}");
}

#[test]
fn an_address_is_had_by_one_at_a_time_and_free_again_when_he_goes() {
    let address = address();
    let first = open(address);
    let second = ShmLink::open(&ShmConfig::at(address));
    assert!(matches!(second, Err(OpenShmError::Taken { .. })), "{second:?}");
    drop(first);
    drop(open(address));
}

#[test]
fn who_comes_back_at_his_address_is_found_again() {
    let (la, place) = (open(address()), address());
    let a = host(&la, 1, 4096);
    for round in 0..3 {
        let lb = open(place);
        let b = host(&lb, round, 4096);
        let (qa, qb) = (a.qp(), b.qp());
        connect(&qa, &qb);
        let threads = [a.hca.spawn_engines().expect("threads"), b.hca.spawn_engines().expect("threads")];
        let (local, remote) = (a.region(4096), b.region(4096));
        a.fill(&local, 0, &pattern(round, 4096));
        qa.post_send(&SendRequest::write(1, &[local.sge(0, 4096)], remote.remote(0))).expect("posted");
        assert_eq!(outcome(&a), Status::Success, "round {round}");
        assert!(b.bytes(&remote, 0, 4096) == pattern(round, 4096));
        drop(threads);
    }
    assert_eq!(la.address(), a.hca.gid());
}

#[test]
fn nobody_there_is_a_loss_like_any_other() {
    let la = open(address());
    let config = HcaConfig {
        retry_count: 1,
        ack_timeout: hw_model::hca::AckTimeout::from_code(8).expect("five bits"),
        ..HcaConfig::default()
    };
    let a = Host::new(Box::new(Arc::clone(&la)), config, 64);
    let threads = a.hca.spawn_engines().expect("threads");
    let qa = a.qp();
    let gone = hw_model::hca::QpAddress { gid: hw_model::wire::gid_of(address()), ..qa.address() };
    qa.connect(gone).expect("connects");
    let local = a.region(4096);
    qa.post_send(&SendRequest::write(1, &[local.sge(0, 8)], local.remote(0))).expect("posted");
    assert_eq!(outcome(&a), Status::RetryExceeded);
    assert!(la.counts().dropped > 0);
    drop(threads);
}
