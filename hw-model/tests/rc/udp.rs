//! Two HCAs that reach each other through the kernel's UDP, and one that somebody else talks to.

use crate::world::{Host, connect, pattern};
use hw_model::addr::RegionAddr;
use hw_model::hca::{Gid, HcaConfig, PathMtu, Psn, QpAddress, Qpn, SendRequest, Status};
use hw_model::link::{Link, NearbyLink, OpenUdpError, ShmConfig, ShmLink, UdpConfig, UdpLink};
use hw_model::sync::Arc;
use hw_model::sync::atomic::{AtomicU32, Ordering};
use hw_model::wire::{
    Content, Flow, GlobalRoute, Head, Header, Identification, Packet, PayloadPool, ROCE_PORT, Reth, Tail,
    check_icrc, encode, gid_of, ip_of, parse,
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

pub const LONG: Duration = Duration::from_secs(60);

/// An address of this machine that nobody has yet: tests of several processes run at once.
fn unused(mut open: impl FnMut(IpAddr) -> bool) -> IpAddr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    for _ in 0..10_000 {
        let number = std::process::id().wrapping_mul(251) + NEXT.fetch_add(1, Ordering::Relaxed);
        let address = IpAddr::from(Ipv4Addr::from_bits(0x7f01_0000 + number % 0x00fd_0000));
        if open(address) {
            return address;
        }
    }
    panic!("no loopback address has its UDP port {ROCE_PORT} free");
}

/// A link at an address that nobody has yet.
pub fn link(change: impl Fn(UdpConfig) -> UdpConfig) -> Arc<UdpLink> {
    let mut found = None;
    unused(|address| {
        match UdpLink::open(&change(UdpConfig::at(address))) {
            Ok(link) => found = Some(Arc::new(link)),
            Err(OpenUdpError::Bind { .. }) => {}
            Err(error) => panic!("{error}"),
        }
        found.is_some()
    });
    found.expect("opened")
}

pub fn host<L: Link + 'static>(link: &Arc<L>, seed: u64, mtu: u32) -> Host {
    let config = HcaConfig { seed, path_mtu: PathMtu::new(mtu).expect("an MTU"), ..HcaConfig::default() };
    Host::new(Box::new(Arc::clone(link)), config, 2048)
}

/// Waits for one completion of `host`.
fn outcome(host: &Host) -> Status {
    assert!(host.cq.wait(LONG), "no completion");
    let mut out = Vec::new();
    host.cq.poll(&mut out, 1).expect("no overrun");
    out[0].status
}

/// Writes and reads of many sizes from `a` to `b`, every byte verified.
fn move_bytes(a: &Host, b: &Host) {
    let (qa, qb) = (a.qp(), b.qp());
    connect(&qa, &qb);
    let threads = [a.hca.spawn_engines().expect("threads"), b.hca.spawn_engines().expect("threads")];
    const SIZE: u64 = 1 << 20;
    let (local, remote, back) = (a.region(SIZE), b.region(SIZE), a.region(SIZE));
    for (round, length) in [0, 1, 8, 255, 4096, 4097, 65_536, 100_003, SIZE].into_iter().enumerate() {
        let data = pattern(round as u64, length);
        a.fill(&local, 0, &data);
        qa.post_send(&SendRequest::write(1, &[local.sge(0, length as u32)], remote.remote(0)))
            .expect("posted");
        assert_eq!(outcome(a), Status::Success, "write of {length}");
        assert!(b.bytes(&remote, 0, length) == data, "a write of {length} bytes put others there");
        qa.post_send(&SendRequest::read(2, &[back.sge(0, length as u32)], remote.remote(0))).expect("posted");
        assert_eq!(outcome(a), Status::Success, "read of {length}");
        assert!(a.bytes(&back, 0, length) == data, "a read of {length} bytes brought others");
    }
    drop(threads);
}

#[test]
fn bytes_go_through_the_kernel_at_every_path_mtu() {
    for mtu in [256, 512, 1024, 2048, 4096] {
        let (la, lb) = (link(|config| config), link(|config| config));
        let (a, b) = (host(&la, 1, mtu), host(&lb, 2, mtu));
        move_bytes(&a, &b);
        let (sent, received) = (la.counts(), lb.counts());
        assert_eq!((received.malformed, received.checked_in_part), (0, 0), "{received:?}");
        if la.offloads() {
            assert!(sent.send_calls * 2 < sent.sent, "the kernel cut nothing: {sent:?}");
        }
    }
}

#[test]
fn without_offload_it_is_the_same_only_slower() {
    let plain = |config| UdpConfig { offload: false, ..config };
    let (la, lb) = (link(plain), link(plain));
    assert!(!la.offloads());
    move_bytes(&host(&la, 1, 1024), &host(&lb, 2, 1024));
    assert_eq!(lb.counts().checked_in_part, 0, "{:?}", lb.counts());
    // One end cuts, the other does not join: the kernel numbers the datagrams, and nobody says how.
    let (la, lb) = (link(|config| config), link(plain));
    move_bytes(&host(&la, 1, 1024), &host(&lb, 2, 1024));
    assert_eq!(lb.counts().malformed, 0, "{:?}", lb.counts());
}

#[test]
fn what_is_sent_faster_than_the_line_waits_and_is_not_lost() {
    let slow = |config| UdpConfig { line_rate: 32 << 20, ..config };
    let (la, lb) = (link(slow), link(slow));
    move_bytes(&host(&la, 1, 4096), &host(&lb, 2, 4096));
    assert_eq!((la.counts().dropped, lb.counts().dropped), (0, 0));
}

#[test]
fn ipv6_carries_it_too() {
    let mut opened = UdpLink::open(&UdpConfig::at(Ipv6Addr::LOCALHOST.into()));
    let end = Instant::now() + LONG;
    while matches!(&opened, Err(OpenUdpError::Bind { source, .. }) if source.kind() == std::io::ErrorKind::AddrInUse)
        && Instant::now() < end
    {
        std::thread::sleep(Duration::from_millis(50));
        opened = UdpLink::open(&UdpConfig::at(Ipv6Addr::LOCALHOST.into()));
    }
    let Ok(link) = opened.map(Arc::new) else {
        println!("SKIPPED ipv6_carries_it_too: this machine has no ::1, or somebody else keeps its port");
        return;
    };
    // There is one such address, so the device talks to itself: through the kernel all the same.
    let host = host(&link, 1, 4096);
    let (qa, qb) = (host.qp(), host.qp());
    connect(&qa, &qb);
    let (from, to) = (host.region(100_000), host.region(100_000));
    host.fill(&from, 0, &pattern(1, 100_000));
    qa.post_send(&SendRequest::write(1, &[from.sge(0, 100_000)], to.remote(0))).expect("posted");
    assert_eq!(outcome(&host), Status::Success);
    assert!(host.bytes(&to, 0, 100_000) == pattern(1, 100_000));
    assert!(link.counts().sent >= 25 && link.counts().malformed == 0, "{:?}", link.counts());
}

/// A peer made of a socket and nothing else.
struct Stranger {
    socket: UdpSocket,
    address: IpAddr,
}

const STRANGERS_QP: Qpn = Qpn(0x77);

impl Stranger {
    fn new() -> Self {
        let mut socket = None;
        let address = unused(|address| {
            socket = UdpSocket::bind(SocketAddr::new(address, ROCE_PORT)).ok();
            socket.is_some()
        });
        let socket = socket.expect("bound");
        socket.set_read_timeout(Some(LONG)).expect("a timeout");
        Self { socket, address }
    }

    fn qp(&self) -> QpAddress {
        QpAddress { gid: gid_of(self.address), qpn: STRANGERS_QP, psn: Psn::new(100) }
    }

    fn flow_to(&self, gid: Gid) -> Flow {
        Flow::between(gid_of(self.address), gid, ROCE_PORT).expect("one family")
    }

    fn send(&self, to: Gid, content: &[u8]) {
        let to = SocketAddr::new(hw_model::wire::ip_of(to), ROCE_PORT);
        self.socket.send_to(content, to).expect("sent");
    }

    /// The next packet that comes.
    fn receive(&self, from: Gid) -> Content<'static> {
        let mut bytes = [0; 8192];
        let length = self.socket.recv(&mut bytes).expect("something arrives");
        let flow = Flow::between(from, gid_of(self.address), ROCE_PORT).expect("one family");
        check_icrc(&flow, Identification::Likely(0), &bytes[..length]).expect("the ICRC");
        match parse(&flow, GlobalRoute::DEFAULT, &bytes[..length]).expect("a packet") {
            Content::Packet { packet, .. } => Content::Packet { packet, data: &[] },
            Content::Congestion(qp) => Content::Congestion(qp),
        }
    }
}

#[test]
fn a_packet_that_met_congestion_is_answered_with_a_notification_for_its_sender() {
    let link = link(|config| config);
    let host = host(&link, 1, 1024);
    let stranger = Stranger::new();
    let qp = host.qp();
    qp.connect(stranger.qp()).expect("connects");
    let region = host.region(4096);
    let reth = Reth { address: RegionAddr(region.base), key: region.key, length: 8 };
    let to = (link.address(), qp.address().qpn);
    let mut packet = Packet::reliable(gid_of(stranger.address), to, Psn::new(100), Header::WriteOnly(reth));
    packet.payload = PayloadPool::new(8, 1).take(8);
    packet.payload.copy_from_slice(b"congest!");
    let mut content = Vec::new();
    encode(&packet, &stranger.flow_to(link.address()), 0, &mut content);
    socket2::SockRef::from(&stranger.socket).set_tos_v4(3).expect("marked as by a router");
    stranger.send(link.address(), &content);
    let told = stranger.receive(link.address());
    assert!(matches!(told, Content::Congestion(STRANGERS_QP)), "{told:?}");
    let end = Instant::now() + LONG;
    while host.bytes(&region, 0, 8) != b"congest!" {
        assert!(Instant::now() < end, "the packet itself was lost");
        std::thread::yield_now();
    }
    assert_eq!(link.counts().notifications_sent, 1);
}

#[test]
fn a_notification_from_a_peer_is_heard() {
    let link = link(|config| config);
    let host = host(&link, 1, 1024);
    let stranger = Stranger::new();
    let qp = host.qp();
    qp.connect(stranger.qp()).expect("connects");
    let region = host.region(1 << 20);
    // Told of congestion before it sends: only those to whom something was sent are listened to, so one packet goes first.
    qp.post_send(&SendRequest::write(1, &[region.sge(0, 8)], region.remote(0))).expect("posted");
    stranger.receive(link.address());
    let head = Head::congestion(qp.address().qpn);
    let mut content = head.bytes().to_vec();
    content.extend_from_slice(Tail::of(&stranger.flow_to(link.address()), 0, &head, &[]).bytes());
    stranger.send(link.address(), &content);
    let end = Instant::now() + LONG;
    while link.counts().notifications_received == 0 {
        assert!(Instant::now() < end, "the notification was lost: {:?}", link.counts());
        std::thread::yield_now();
    }
    assert_eq!((link.counts().malformed, link.counts().dropped), (0, 0));
}

/// A link that goes through shared memory where it can.
fn nearby() -> Arc<NearbyLink> {
    let udp = Arc::into_inner(link(|config| config)).expect("nobody else has it");
    let near =
        ShmLink::open(&ShmConfig::at(ip_of(udp.address()))).expect("whoever has the port has the name");
    Arc::new(NearbyLink::new(udp, near))
}

#[test]
fn peers_of_one_host_share_memory_and_the_others_are_sent_datagrams() {
    let (la, lb, lc) = (nearby(), nearby(), link(|config| config));
    let (a, b, c) = (host(&la, 1, 4096), host(&lb, 2, 4096), host(&lc, 3, 4096));
    move_bytes(&a, &b);
    let (near, far) = (la.near().counts(), la.far().counts());
    assert!(near.sent > 0 && far.sent == 0, "{near:?} {far:?}");
    move_bytes(&a, &c);
    move_bytes(&c, &b);
    assert!(la.far().counts().sent > 0 && lb.far().counts().sent > 0, "{:?}", la.far().counts());
    assert_eq!(
        la.near().counts().sent,
        near.sent,
        "nobody reads what is put into a ring for one who has none"
    );
    assert_eq!(la.near().counts().dropped + lb.near().counts().dropped, 0);
}

#[test]
fn a_peer_that_has_gone_is_sent_datagrams_and_one_that_comes_again_shares_memory() {
    let (la, lb) = (nearby(), nearby());
    let (to, from) = (lb.address(), la.address());
    let packet = || Packet::reliable(from, (to, Qpn(2)), Psn::new(0), Header::ReadResponseMiddle);
    la.send(packet());
    assert_eq!((la.near().counts().sent, la.far().counts().sent), (1, 0));
    drop(lb);
    let begun = Instant::now();
    while la.far().counts().sent == 0 {
        assert!(begun.elapsed() < LONG, "packets go to one who is not there any more");
        std::thread::sleep(Duration::from_millis(1));
        la.send(packet());
        la.flush();
    }
    let near = la.near().counts().sent;
    let again = ShmLink::open(&ShmConfig::at(ip_of(to))).expect("free again");
    while la.near().counts().sent == near {
        assert!(begun.elapsed() < LONG, "one who came again is not seen");
        std::thread::sleep(Duration::from_millis(1));
        la.send(packet());
        la.flush();
    }
    drop(again);
}
