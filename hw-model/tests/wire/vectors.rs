//! What scapy makes of the same packets: `vectors.txt`, by `vectors.py`.

use hw_model::addr::RegionAddr;
use hw_model::wire::{
    Aeth, AtomicEth, Checked, Content, Deth, Feth, Flow, Gid, GlobalRoute, Head, Header, Identification,
    Immediate, Key, NakCode, PKey, Packet, PayloadPool, Placement, Psn, QKey, Qpn, Reth, RnrTimer,
    Selectivity, Service, Srqn, Syndrome, Tail, check_icrc, encode, encode_datagram, gid_of, parse,
    parse_datagram,
};

const VECTORS: &str = include_str!("vectors.txt");
const RETH: Reth = Reth { address: RegionAddr(0x7f00_0000_1234), key: Key(0x89ab_cdef), length: 100_000 };
const ATOMIC: AtomicEth = AtomicEth {
    address: RegionAddr(0x7f00_0000_1238),
    key: Key(0x89ab_cdef),
    swap_or_add: 0x0102_0304_0506_0708,
    compare: 0x1112_1314_1516_1718,
};
const IMMEDIATE: Immediate = Immediate(0xcafe_f00d);
const KEY: Key = Key(0x89ab_cdef);
const DETH: Deth = Deth { qkey: QKey(0x1111_1111), source_qp: Qpn(0x22_3333) };
const RC: Service = Service::ReliableConnection;
const UC: Service = Service::UnreliableConnection;
const UD: Service = Service::UnreliableDatagram(DETH);

const fn aeth(syndrome: Syndrome) -> Aeth {
    Aeth { syndrome, msn: 0x01_0203 }
}
const ACK: Aeth = aeth(Syndrome::Ack);

/// What each vector means: its service, its header, how much data it has.
fn meanings() -> Vec<(&'static str, Service, Header, usize)> {
    let timer = RnrTimer::from_code(14).expect("a code of five bits");
    let nak = |code| Header::Acknowledge(aeth(Syndrome::Nak(code)));
    let flush = |placement, selectivity| Header::Flush(Feth { placement, selectivity }, RETH);
    let xrc = Service::ExtendedConnection(Some(Srqn(0x44_5555)));
    vec![
        ("send-first", RC, Header::SendFirst, 256),
        ("send-middle", RC, Header::SendMiddle, 4096),
        ("send-last", RC, Header::SendLast, 3),
        ("send-last-immediate", RC, Header::SendLastImmediate(IMMEDIATE), 8),
        ("send-only", RC, Header::SendOnly, 5),
        ("send-only-empty", RC, Header::SendOnly, 0),
        ("send-only-immediate", RC, Header::SendOnlyImmediate(IMMEDIATE), 1),
        ("write-first", RC, Header::WriteFirst(RETH), 1024),
        ("write-middle", RC, Header::WriteMiddle, 1024),
        ("write-last", RC, Header::WriteLast, 2),
        ("write-last-immediate", RC, Header::WriteLastImmediate(IMMEDIATE), 4),
        ("write-only", RC, Header::WriteOnly(RETH), 64),
        ("write-only-immediate", RC, Header::WriteOnlyImmediate(RETH, IMMEDIATE), 7),
        ("read-request", RC, Header::ReadRequest(RETH), 0),
        ("read-response-first", RC, Header::ReadResponseFirst(ACK), 512),
        ("read-response-middle", RC, Header::ReadResponseMiddle, 512),
        ("read-response-last", RC, Header::ReadResponseLast(ACK), 9),
        ("read-response-only", RC, Header::ReadResponseOnly(ACK), 10),
        ("acknowledge", RC, Header::Acknowledge(ACK), 0),
        ("receiver-not-ready", RC, Header::Acknowledge(aeth(Syndrome::RnrNak(timer))), 0),
        ("sequence-error", RC, nak(NakCode::SequenceError), 0),
        ("invalid-request", RC, nak(NakCode::InvalidRequest), 0),
        ("remote-access", RC, nak(NakCode::RemoteAccess), 0),
        ("remote-operational", RC, nak(NakCode::RemoteOperational), 0),
        ("atomic-acknowledge", RC, Header::AtomicAcknowledge(ACK, 0x2122_2324_2526_2728), 0),
        ("compare-swap", RC, Header::CompareSwap(ATOMIC), 0),
        ("fetch-add", RC, Header::FetchAdd(ATOMIC), 0),
        ("send-last-invalidate", RC, Header::SendLastInvalidate(KEY), 11),
        ("send-only-invalidate", RC, Header::SendOnlyInvalidate(KEY), 12),
        ("flush-range", RC, flush(Placement::GLOBAL, Selectivity::Range), 0),
        ("flush-region", RC, flush(Placement::all(), Selectivity::Region), 0),
        ("atomic-write", RC, Header::AtomicWrite(RETH), 8),
        ("uc-send-only", UC, Header::SendOnly, 13),
        ("uc-write-first", UC, Header::WriteFirst(RETH), 256),
        ("ud-send-only", UD, Header::SendOnly, 14),
        ("ud-send-only-immediate", UD, Header::SendOnlyImmediate(IMMEDIATE), 15),
        ("xrc-write-only", xrc, Header::WriteOnly(RETH), 16),
        ("xrc-acknowledge", Service::ExtendedConnection(None), Header::Acknowledge(ACK), 0),
        ("v6-write-only", RC, Header::WriteOnly(RETH), 17),
        ("v6-acknowledge", RC, Header::Acknowledge(ACK), 0),
        ("not-migrated-in-another-partition", RC, Header::SendOnly, 4),
    ]
}

/// The packet that a vector means, without its data.
fn packet(name: &str, service: Service, header: Header) -> Packet {
    let gid = |text: &str| gid_of(text.parse().expect("an address"));
    let (from, to) = if name.starts_with("v6") { ("fd00::1", "fd00::2") } else { ("10.0.0.1", "10.0.0.2") };
    let mut packet = Packet::reliable(gid(from), (gid(to), Qpn(0x0a_0b0c)), Psn::new(0xfe_dcba), header);
    packet.service = service;
    if name.starts_with("v6") {
        packet.route = GlobalRoute { flow_label: 0x1_2345, traffic_class: 2, hop_limit: 64 };
    }
    packet.solicited = name == "send-last-immediate";
    packet.ack_request = matches!(
        name,
        "send-only" | "write-last" | "write-only" | "read-request" | "compare-swap" | "fetch-add"
    );
    if name.starts_with("not-migrated") {
        packet.migrated = false;
        packet.pkey = PKey(0x8001);
    }
    packet
}

/// The names of all packets among the vectors.
pub fn names() -> Vec<&'static str> {
    meanings().into_iter().map(|(name, ..)| name).collect()
}

/// The whole IP packet of this name.
pub fn vector(name: &str) -> Vec<u8> {
    let line = VECTORS.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let hex = line.expect("a vector of this name").as_bytes().as_chunks::<2>().0;
    let digit = |byte: u8| char::from(byte).to_digit(16).expect("a digit") as u8;
    hex.iter().map(|[high, low]| digit(*high) << 4 | digit(*low)).collect()
}

fn data(length: usize) -> Vec<u8> {
    (0..length).map(|at| ((at * 31 + at / 251) % 255) as u8 + 1).collect()
}

#[test]
fn what_we_write_is_what_scapy_writes() {
    let pool = PayloadPool::new(4096, 1);
    for (name, service, header, length) in meanings() {
        let mut packet = packet(name, service, header);
        packet.payload = pool.take(length);
        packet.payload.copy_from_slice(&data(length));
        let flow = Flow::between(packet.source, packet.destination, 0xc123).expect("one family");
        let (mut content, mut whole) = (Vec::new(), Vec::new());
        encode(&packet, &flow, 0x1234, &mut content);
        encode_datagram(&flow, 0x1234, packet.route, &content, &mut whole);
        assert_eq!(hex(&whole), hex(&vector(name)), "{name}");
    }
}

#[test]
fn what_scapy_writes_is_read_with_its_meaning() {
    let pool = PayloadPool::new(4096, 1);
    for (name, service, header, length) in meanings() {
        let expected = packet(name, service, header);
        let bytes = vector(name);
        let datagram = parse_datagram(&bytes).expect(name);
        let known = Identification::Known(datagram.identification);
        assert_eq!(check_icrc(&datagram.flow, known, datagram.content), Ok(Checked::Whole), "{name}");
        let content = parse(&datagram.flow, datagram.route, datagram.content).expect(name);
        let found = content.into_packet(&pool).expect(name).expect("no congestion notification");
        assert_eq!(&found.payload[..], &data(length), "{name}");
        let found = Packet { payload: hw_model::wire::Payload::EMPTY, ..found };
        assert_eq!(format!("{found:?}"), format!("{expected:?}"), "{name}");
    }
}

#[test]
fn a_congestion_notification_is_what_scapy_says_it_is() {
    let gid = |text: &str| -> Gid { gid_of(text.parse().expect("an address")) };
    let flow = Flow::between(gid("10.0.0.1"), gid("10.0.0.2"), 0xc123).expect("one family");
    let (mut content, mut whole) = (Vec::new(), Vec::new());
    let head = Head::congestion(Qpn(0x0a_0b0c));
    content.extend_from_slice(head.bytes());
    content.extend_from_slice(Tail::of(&flow, 0x1234, &head, &[]).bytes());
    encode_datagram(&flow, 0x1234, GlobalRoute::DEFAULT, &content, &mut whole);
    assert_eq!(hex(&whole), hex(&vector("congestion")));
    let found = parse(&flow, GlobalRoute::DEFAULT, &content);
    assert!(matches!(found, Ok(Content::Congestion(Qpn(0x0a_0b0c)))), "{found:?}");
}

#[test]
fn every_vector_is_looked_at() {
    let named: Vec<_> = meanings().into_iter().map(|(name, ..)| name).chain(["congestion"]).collect();
    let there: Vec<_> = VECTORS.lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(named, there);
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
