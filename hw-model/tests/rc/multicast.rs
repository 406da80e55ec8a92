//! Multicast groups: each member of a group has a copy of each datagram, and nobody else.

use crate::udp::{LONG, host, link};
use crate::world::{Host, Region, config, pattern};
use hw_model::hca::{
    AddressVector, Destination, Gid, HcaConfig, MulticastError, QKey, QpSpec, Qpn, QueuePair, RecvRequest,
    SendRequest, Status, Transport,
};
use hw_model::link::Fabric;
use hw_model::sync::Arc;
use std::net::Ipv4Addr;

const KEY: QKey = QKey(0x77);
const BYTES: u64 = 200;
/// What stands before a datagram.
const HEADER: u64 = 40;

fn group(address: [u8; 4]) -> Gid {
    Gid(u128::from(Ipv4Addr::from(address).to_ipv6_mapped()))
}

/// A queue pair of datagrams with memory for as many messages as it has receives.
struct Member {
    qp: Arc<QueuePair>,
    memory: Region,
}

impl Member {
    fn new(host: &Host, receives: u64) -> Self {
        let spec = QpSpec::new(host.pd, &host.cq).with_transport(Transport::UnreliableDatagram);
        let qp = host.hca.create_qp(&spec).expect("a queue pair");
        qp.open(KEY).expect("opened");
        let memory = host.region(4096);
        for id in 0..receives {
            let sges = [memory.sge(id * (BYTES + HEADER), (BYTES + HEADER) as u32)];
            qp.post_recv(&RecvRequest::new(id, &sges)).expect("posted");
        }
        Self { qp, memory }
    }

    fn send(&self, to: Gid, id: u64) {
        let destination = Destination::Datagram { to: AddressVector::to(to), qpn: Qpn::MULTICAST, qkey: KEY };
        let sges = [self.memory.sge(2048, BYTES as u32)];
        let request = SendRequest::send(id, &sges).with_destination(destination);
        self.qp.post_send(&request).expect("posted");
    }
}

fn run(hosts: &[Host]) {
    for _ in 0..100 {
        for host in hosts {
            (0..host.hca.config().engines as usize).for_each(|index| {
                host.hca.step_engine(index, hw_model::hca::Time(0));
            });
        }
    }
}

#[test]
fn every_member_of_a_group_has_a_copy_and_nobody_else() {
    let fabric = Fabric::new();
    let hosts: Vec<Host> = (0..3)
        .map(|seed| Host::new(Box::new(fabric.port()), HcaConfig { seed, engines: 2, ..config() }, 64))
        .collect();
    let sender = Member::new(&hosts[0], 4);
    let others: Vec<(usize, Member)> =
        [0, 1, 1, 1, 2].into_iter().map(|at| (at, Member::new(&hosts[at], 4))).collect();
    let (mine, other) = (group([239, 1, 2, 3]), group([239, 1, 2, 4]));
    let attach = |at: usize, member: &Member, to| hosts[at].hca.attach_multicast(&member.qp, to);
    attach(0, &sender, mine).expect("attached");
    for (at, member) in &others[..3] {
        attach(*at, member, mine).expect("attached");
        attach(*at, member, mine).expect("a second time is as good as once");
    }
    attach(1, &others[3].1, other).expect("attached");
    hosts[0].fill(&sender.memory, 2048, &pattern(1, BYTES));
    sender.send(mine, 9);
    run(&hosts);
    // The sender's own copy and the completion of the send; one at its neighbour; two at the second host.
    assert_eq!(hosts.iter().map(|host| host.take().len()).collect::<Vec<_>>(), [3, 2, 0]);
    for (at, member) in std::iter::once((0, &sender)).chain(others[..3].iter().map(|(at, one)| (*at, one))) {
        assert!(hosts[at].bytes(&member.memory, HEADER, BYTES) == pattern(1, BYTES), "other bytes");
        // The route header that stands before it names the group.
        assert_eq!(hosts[at].bytes(&member.memory, 36, 4), [239, 1, 2, 3]);
    }
    let (at, gone) = &others[1];
    hosts[*at].hca.detach_multicast(&gone.qp, mine).expect("it was attached");
    sender.send(mine, 10);
    sender.send(other, 11);
    run(&hosts);
    assert_eq!(hosts.iter().map(|host| host.take().len()).collect::<Vec<_>>(), [4, 2, 0]);
    drop(others);
    // What was posted to those that go ends with them.
    hosts.iter().for_each(|host| drop(host.take()));
    sender.send(mine, 12);
    run(&hosts);
    assert_eq!(hosts.iter().map(|host| host.take().len()).collect::<Vec<_>>(), [2, 0, 0], "they have left");
}

#[test]
fn only_datagrams_only_groups_and_only_members_are_taken() {
    let fabric = Fabric::new();
    let host = Host::new(Box::new(fabric.port()), config(), 64);
    let foreign = Host::new(Box::new(fabric.port()), config(), 64);
    let (member, group) = (Member::new(&host, 0), group([224, 0, 0, 9]));
    let attach = |qp: &QueuePair, group| host.hca.attach_multicast(qp, group);
    assert!(matches!(attach(&host.qp(), group), Err(MulticastError::Transport { .. })));
    for gid in [host.hca.gid(), Gid(0), Gid(u128::from(Ipv4Addr::LOCALHOST.to_ipv6_mapped()))] {
        assert!(matches!(attach(&member.qp, gid), Err(MulticastError::NoGroup { .. })), "{gid:?}");
    }
    assert!(attach(&member.qp, Gid(0xff0e << 112 | 5)).is_ok(), "a group of IPv6");
    let other = foreign.hca.attach_multicast(&member.qp, group);
    assert!(matches!(other, Err(MulticastError::OtherDevice)));
    let absent = host.hca.detach_multicast(&member.qp, group);
    assert!(matches!(absent, Err(MulticastError::NotAttached { .. })), "{absent:?}");
}

#[test]
fn a_group_reaches_over_the_kernels_udp_to_all_ports_that_have_joined() {
    let links = [0; 3].map(|_| link(|config| config));
    let hosts: Vec<Host> = links.iter().zip(1..).map(|(link, seed)| host(link, seed, 1024)).collect();
    let threads: Vec<_> = hosts.iter().map(|host| host.hca.spawn_engines().expect("threads")).collect();
    let members: Vec<Member> = hosts.iter().map(|host| Member::new(host, 4)).collect();
    // One that no other test of this machine has.
    let number = hosts[0].hca.gid().0 as u32;
    let to = group([239, (number >> 16) as u8, (number >> 8) as u8, number as u8]);
    for (host, member) in hosts.iter().zip(&members) {
        if let Err(MulticastError::Link { source, .. }) = host.hca.attach_multicast(&member.qp, to) {
            println!("SKIPPED multicast over UDP: this machine joins no group: {source}");
            return;
        }
    }
    hosts[0].fill(&members[0].memory, 2048, &pattern(5, BYTES));
    members[0].send(to, 9);
    for (at, (host, member)) in hosts.iter().zip(&members).enumerate() {
        let mut ended = Vec::new();
        while ended.len() < if at == 0 { 2 } else { 1 } {
            assert!(host.cq.wait(LONG), "a member of the group has no copy");
            host.cq.poll(&mut ended, 4).expect("no overrun");
        }
        assert!(ended.iter().all(|one| one.status == Status::Success), "{ended:?}");
        assert!(host.bytes(&member.memory, HEADER, BYTES) == pattern(5, BYTES), "other bytes");
        // The header that stands before it names the group (A17.4.5.1).
        assert_eq!(host.bytes(&member.memory, 36, 4), (to.0 as u32).to_be_bytes());
        assert_eq!(links[at].counts().malformed, 0);
    }
    drop(threads);
}
