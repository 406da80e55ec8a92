//! Every completion status that the specification names for these services (11.6.2), each by the shortest way to it.

use crate::world::{Pair, config};
use hw_model::hca::{
    AckTimeout, Completion, HcaConfig, Key, PathMtu, Psn, QpAddress, QpSpec, Qpn, RecvRequest, SendRequest,
    Sge, SrqSpec, Status, Transport,
};
use hw_model::link::{Fabric, Link};
use hw_model::wire::{Aeth, Header, Packet, PayloadPool, Service, Syndrome};

fn small_packets() -> HcaConfig {
    let ack_timeout = AckTimeout::from_code(8).expect("five bits");
    let path_mtu = PathMtu::new(256).expect("an MTU");
    HcaConfig { path_mtu, ack_timeout, retry_count: 1, rnr_retry: 1, ..config() }
}

/// What completes at either end after `post` was given a pair, a region at either end, and a key that is nobody's.
fn after(post: impl FnOnce(&Pair, [Sge; 1], hw_model::hca::Remote, Key)) -> Vec<Completion> {
    let mut pair = Pair::new(small_packets());
    let (near, far) = (pair.a.region(4096), pair.b.region(4096));
    post(&pair, [near.sge(0, 8)], far.remote(0), Key(near.key.0 ^ 0x5500));
    pair.run_without_faults();
    let mut ended = pair.a.take();
    ended.extend(pair.b.take());
    ended
}

fn post(pair: &Pair, request: &SendRequest<'_>) {
    pair.qa.post_send(request).expect("posted");
}

/// A peer that answers a read with what answers an atomic.
fn lying_peer() -> Vec<Completion> {
    let fabric = Fabric::new();
    let mut pair = Pair::over(small_packets(), Box::new(fabric.port()), Box::new(fabric.port()));
    let puppet = fabric.port();
    let qp = pair.a.qp();
    let psn = Psn::new(5);
    qp.connect(QpAddress { gid: puppet.address(), qpn: Qpn(77), psn }).expect("connects");
    let near = pair.a.region(4096);
    let sges = [near.sge(0, 8)];
    qp.post_send(&SendRequest::read(1, &sges, near.remote(0))).expect("posted");
    pair.settle();
    let answer = Header::AtomicAcknowledge(Aeth { syndrome: Syndrome::Ack, msn: 1 }, 0);
    let to = (pair.a.hca.gid(), qp.qpn());
    puppet.send(Packet::reliable(puppet.address(), to, qp.address().psn, answer));
    pair.run_without_faults();
    pair.a.take()
}

/// An unreliable peer that begins a message, and another one before its end.
fn peer_that_breaks_off() -> Vec<Completion> {
    let fabric = Fabric::new();
    let mut pair = Pair::over(small_packets(), Box::new(fabric.port()), Box::new(fabric.port()));
    let puppet = fabric.port();
    let (host, transport) = (&pair.a, Transport::UnreliableConnection);
    let srq = host.hca.create_srq(&SrqSpec { pd: host.pd, max_requests: 4, max_sges: 1 }).expect("a queue");
    let spec = QpSpec { srq: Some(srq.clone()), ..QpSpec::new(host.pd, &host.cq).with_transport(transport) };
    let qp = host.hca.create_qp(&spec).expect("a queue pair");
    let peer = QpAddress { gid: puppet.address(), qpn: Qpn(77), psn: Psn::new(5) };
    qp.connect(peer).expect("connects");
    let near = host.region(4096);
    (0..2).for_each(|id| srq.post(&RecvRequest::new(id, &[near.sge(0, 1000)])).expect("posted"));
    for (psn, header, bytes) in [(5, Header::SendFirst, 256), (6, Header::SendOnly, 8)] {
        let to = (host.hca.gid(), qp.qpn());
        let packet = Packet::reliable(puppet.address(), to, Psn::new(psn), header);
        let payload = PayloadPool::new(256, 0).take(bytes);
        puppet.send(Packet { service: Service::UnreliableConnection, payload, ..packet });
    }
    pair.run_without_faults();
    pair.a.take()
}

fn way_to(status: Status) -> Vec<Completion> {
    match status {
        Status::Success => after(|pair, sges, remote, _| post(pair, &SendRequest::write(1, &sges, remote))),
        Status::LocalProtectionError => after(|pair, sges, remote, nobody| {
            post(pair, &SendRequest::write(1, &[Sge { key: nobody, ..sges[0] }], remote));
        }),
        Status::LocalQpOperationError => after(|pair, sges, remote, _| {
            pair.a.memory.gone.lock().push((0, true));
            post(pair, &SendRequest::write(1, &sges, remote));
        }),
        Status::FlushError => after(|pair, sges, remote, nobody| {
            post(pair, &SendRequest::write(1, &[Sge { key: nobody, ..sges[0] }], remote));
            post(pair, &SendRequest::write(2, &sges, remote));
        }),
        Status::BadResponseError => lying_peer(),
        Status::RemoteInvalidRequestError => after(|pair, sges, mut remote, _| {
            remote.address = remote.address.offset(1);
            post(pair, &SendRequest::fetch_add(1, &sges, remote, 1));
        }),
        Status::RemoteAccessError => after(|pair, sges, remote, nobody| {
            post(pair, &SendRequest::write(1, &sges, hw_model::hca::Remote { key: nobody, ..remote }));
        }),
        Status::RemoteOperationError => after(|pair, sges, _, nobody| {
            let list = [Sge { key: nobody, ..sges[0] }];
            pair.qb.post_recv(&RecvRequest::new(2, &list)).expect("posted");
            post(pair, &SendRequest::send(1, &sges));
        }),
        Status::RetryExceeded => after(|pair, sges, remote, _| {
            use hw_model::hca::{QpChange, QpState};
            pair.qb.modify(&QpChange::to(QpState::Reset)).expect("always possible");
            post(pair, &SendRequest::write(1, &sges, remote));
        }),
        Status::RnrRetryExceeded => after(|pair, sges, _, _| post(pair, &SendRequest::send(1, &sges))),
        Status::MemoryManagementError => {
            after(|pair, _, _, nobody| post(pair, &SendRequest::invalidate(1, nobody)))
        }
        Status::LocalLengthError => after(|pair, sges, _, _| {
            pair.qb.post_recv(&RecvRequest::new(2, &[])).expect("posted");
            post(pair, &SendRequest::send(1, &sges));
        }),
        Status::LocalAccessError => after(|pair, sges, remote, nobody| {
            pair.qb.post_recv(&RecvRequest::new(2, &[])).expect("posted");
            let remote = hw_model::hca::Remote { key: nobody, ..remote };
            post(pair, &SendRequest::write_immediate(1, &sges, remote, 1));
        }),
        Status::RemoteAbortedError => peer_that_breaks_off(),
    }
}

#[test]
fn every_status_can_be_reached() {
    for status in Status::ALL {
        let ended = way_to(status);
        let seen: Vec<Status> = ended.iter().map(|completion| completion.status).collect();
        assert!(seen.contains(&status), "{status:?}: {seen:?}");
    }
}
