//! Bytes from somebody who means harm, or from a bad cable: whatever they are, the parser says what they are or why not.

use hw_model::wire::{
    Checked, Content, Datagram, GlobalRoute, Identification, Malformed, MalformedCounts, Packet, PayloadPool,
    check_icrc, encode, parse, parse_datagram,
};
use proptest::prelude::*;

use super::vectors::{names, vector};

/// A whole packet, as a receiver takes it.
fn take(bytes: &[u8]) -> Result<(Datagram<'_>, Content<'_>), Malformed> {
    let datagram = parse_datagram(bytes)?;
    check_icrc(&datagram.flow, Identification::Known(datagram.identification), datagram.content)?;
    Ok((datagram, parse(&datagram.flow, datagram.route, datagram.content)?))
}

/// Bytes of an IPv4 packet that the ICRC leaves out, because routers change them: class, hop limit, UDP checksum,
/// congestion bits. The checksum of the header stands for itself.
const CHANGED_V4: [usize; 5] = [1, 8, 26, 27, 32];
/// The same of an IPv6 packet: class, flow label, hop limit, UDP checksum, congestion bits.
const CHANGED_V6: [usize; 8] = [0, 1, 2, 3, 7, 46, 47, 52];

#[test]
fn every_flipped_bit_that_the_crc_covers_is_seen() {
    for name in names() {
        let good = vector(name);
        let v6 = good[0] >> 4 == 6;
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let changed = if v6 { &CHANGED_V6[..] } else { &CHANGED_V4 };
            let uncovered = changed.contains(&(bit / 8));
            // The header's own checksum sees a change that was not made by a router.
            if !uncovered || (!v6 && bit / 8 < 20) {
                assert!(take(&bad).is_err(), "{name}: bit {bit} can be flipped without anybody noticing");
            }
        }
    }
}

#[test]
fn a_packet_cut_short_anywhere_is_no_packet() {
    for name in names() {
        let whole = vector(name);
        for length in 0..whole.len() {
            assert!(take(&whole[..length]).is_err(), "{name} cut to {length} bytes");
        }
    }
}

#[test]
fn frames_that_a_link_layer_padded_are_taken() {
    let mut padded = vector("acknowledge");
    padded.extend([0; 10]);
    assert!(take(&padded).is_ok());
}

#[test]
fn fragments_options_and_other_ports_are_refused_by_name() {
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = vector("write-only");
        change(&mut bytes);
        // The internet checksum, made right again.
        bytes[10..12].fill(0);
        let words = bytes[..20].as_chunks::<2>().0.iter().map(|word| u32::from(u16::from_be_bytes(*word)));
        let sum = words.sum::<u32>();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        bytes[10..12].copy_from_slice(&sum.to_be_bytes());
        take(&bytes).map(|_| ()).unwrap_err()
    };
    assert_eq!(with(&|bytes| bytes[6] = 0x20), Malformed::Fragment);
    assert_eq!(with(&|bytes| bytes[0] = 0x46), Malformed::Network);
    assert_eq!(with(&|bytes| bytes[9] = 6), Malformed::Network);
    assert_eq!(with(&|bytes| bytes[23] ^= 1), Malformed::Network);
    assert_eq!(with(&|bytes| bytes[25] ^= 4), Malformed::Network);
    assert_eq!(with(&|bytes| bytes[15] ^= 1), Malformed::Icrc);
}

/// Parses transport bytes as if their ICRC had been right.
fn meaning(transport: &[u8]) -> Result<Packet, Malformed> {
    let datagram = vector("write-only");
    let flow = parse_datagram(&datagram)?.flow;
    let mut content = transport.to_vec();
    content.extend([0; 4]);
    let pool = PayloadPool::new(4096, 0);
    Ok(parse(&flow, GlobalRoute::DEFAULT, &content)?.into_packet(&pool)?.expect("no notification"))
}

/// A base transport header and what follows.
fn transport(opcode: u8, flags: u8, rest: &[u8]) -> Vec<u8> {
    let mut bytes = vec![opcode, flags, 0xff, 0xff, 0, 0, 0, 1, 0, 0, 0, 0];
    bytes.extend_from_slice(rest);
    bytes
}

#[test]
fn what_no_honest_peer_sends_is_refused_by_name() {
    let reason =
        |opcode, flags, rest: &[u8]| meaning(&transport(opcode, flags, rest)).map(|_| ()).unwrap_err();
    assert_eq!(reason(0x04, 0x01, &[]), Malformed::Version);
    for opcode in [0x15, 0x18, 0x1b, 0x1e, 0x1f, 0x2c, 0x31, 0x33, 0x36, 0x44, 0x60, 0x6a, 0x80, 0xe4, 0xff] {
        assert_eq!(reason(opcode, 0, &[0; 64]), Malformed::Opcode, "{opcode:#x}");
    }
    assert_eq!(reason(0x04, 0x10, &[]), Malformed::Padding, "padding without data");
    assert_eq!(reason(0x04, 0, &[1, 2, 3]), Malformed::Padding, "not a multiple of four");
    assert_eq!(reason(0x07, 0, &[0; 260]), Malformed::Length, "a middle that is no full packet");
    assert_eq!(reason(0x07, 0x10, &[0; 256]), Malformed::Length, "a middle with padding");
    assert_eq!(reason(0x07, 0, &[0; 128]), Malformed::Length, "smaller than the smallest path MTU");
    assert_eq!(reason(0x08, 0, &[]), Malformed::Length, "a last without data");
    assert_eq!(reason(0x0c, 0, &[0; 20]), Malformed::Length, "a read request with data");
    assert_eq!(reason(0x0a, 0, &[0; 12]), Malformed::Truncated);
    assert_eq!(reason(0x11, 0, &[0x80, 0, 0, 0]), Malformed::Reserved, "a reserved syndrome");
    assert_eq!(reason(0x11, 0, &[0x65, 0, 0, 0]), Malformed::Reserved, "a reserved NAK code");
    assert_eq!(reason(0x1d, 0, &[0; 16]), Malformed::Length, "an atomic write of nothing");
    assert_eq!(reason(0x1d, 0, &[0; 28]), Malformed::Length, "an atomic write of 12 bytes");
    assert_eq!(reason(0x1c, 0, &[0xff; 20]), Malformed::Reserved, "a reserved flush");
    assert_eq!(reason(0x04, 0, &[0; 4100]), Malformed::TooLong);
    assert_eq!(reason(0x81, 0, &[0; 20]), Malformed::Length, "a notification that carries more than nothing");
}

#[test]
fn drops_are_counted_by_reason() {
    let counts = MalformedCounts::default();
    counts.add(Malformed::Icrc);
    counts.add(Malformed::Icrc);
    counts.add(Malformed::TooLong);
    assert_eq!((counts.of(Malformed::Icrc), counts.of(Malformed::Opcode), counts.total()), (2, 0, 3));
    assert_eq!(format!("{counts:?}"), "{Icrc: 2, TooLong: 1}");
}

proptest! {
    #[test]
    fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = take(&bytes);
        let _ = parse(&flow(), GlobalRoute::DEFAULT, &bytes);
        let _ = check_icrc(&flow(), Identification::Likely(0), &bytes);
    }

    /// As above, but past the checks that random bytes never pass.
    #[test]
    fn no_headers_make_the_parser_panic_and_what_is_taken_is_written_back_the_same(
        opcode: u8, pad in 0_u8..4, rest in proptest::collection::vec(any::<u8>(), 0..320)
    ) {
        let bytes = with_tail(&transport(opcode, pad << 4, &rest));
        let Ok(Content::Packet { packet, data }) = parse(&flow(), GlobalRoute::DEFAULT, &bytes) else {
            return Ok(());
        };
        let pool = PayloadPool::new(4096, 0);
        let copy = Content::Packet { packet, data }.into_packet(&pool).expect("it fits").expect("a packet");
        let mut again = Vec::new();
        encode(&copy, &flow(), 0, &mut again);
        let flow = flow();
        prop_assert_eq!(check_icrc(&flow, Identification::Known(0), &again), Ok(Checked::Whole));
        let twice = parse(&flow, GlobalRoute::DEFAULT, &again).expect("what we wrote");
        let twice = twice.into_packet(&pool).expect("it fits").expect("a packet");
        prop_assert_eq!(format!("{:?}", copy), format!("{:?}", twice));
        prop_assert_eq!(&copy.payload[..], &twice.payload[..]);
    }

    #[test]
    fn a_mangled_vector_is_never_taken(index in 0_usize..41, at: prop::sample::Index, with: u8, more in 0_usize..4) {
        let name = names()[index];
        let mut bytes = vector(name);
        let at = 20 + at.index(bytes.len() - 20);
        let covered = !(26..28).contains(&at) && at != 32 && !(45..53).contains(&at);
        prop_assume!(covered && bytes[at] != with);
        bytes[at] = with;
        bytes.extend(std::iter::repeat_n(0, more));
        prop_assert!(take(&bytes).is_err());
    }
}

fn with_tail(transport: &[u8]) -> Vec<u8> {
    [transport, &[0; 4]].concat()
}

fn flow() -> hw_model::wire::Flow {
    parse_datagram(&vector("write-only")).expect("a good packet").flow
}
