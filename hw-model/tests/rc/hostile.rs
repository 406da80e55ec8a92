//! A peer that means harm: whatever it sends, no byte lands where it has no right to, and others go on.

use crate::victim::{OPEN, Victim};
use hw_model::addr::RegionAddr;
use hw_model::hca::{Key, Psn, QpState};
use hw_model::wire::{Aeth, Header, Immediate, NakCode, Packet, PayloadPool, Reth, Syndrome, encode};
use proptest::prelude::*;

/// The bytes of a packet to the victim.
fn bytes(victim: &Victim, psn: Psn, header: Header, data: &[u8]) -> Vec<u8> {
    let to = (victim.host.hca.gid(), victim.qp.address().qpn);
    let mut packet = Packet::reliable(crate::victim::attacker(), to, psn, header);
    packet.ack_request = true;
    packet.payload = PayloadPool::new(4096, 0).take(data.len());
    packet.payload.copy_from_slice(data);
    let mut out = Vec::new();
    encode(&packet, &victim.flow(), 0, &mut out);
    out
}

fn reth(victim: &Victim, at: u64, length: u32) -> Reth {
    Reth { address: RegionAddr(victim.open.base.wrapping_add(at)), key: victim.open.key, length }
}

/// Sends one packet that must change nothing, and looks whether it did.
fn changes_nothing(what: &str, make: impl FnOnce(&Victim) -> Vec<u8>) {
    let mut victim = Victim::new();
    let before = victim.open_bytes();
    let content = make(&victim);
    victim.take(&content);
    assert!(victim.open_bytes() == before, "{what}: bytes landed");
    victim.check_rest();
    victim.check_others_go_on();
}

#[test]
fn a_good_packet_does_land() {
    let mut victim = Victim::new();
    let good = bytes(&victim, victim.next, Header::WriteOnly(reth(&victim, 16, 5)), b"hello");
    assert!(victim.take(&good));
    assert_eq!(victim.host.bytes(&victim.open, 16, 5), b"hello", "or the other tests here show nothing");
    assert_eq!(victim.next, Psn::new(1001));
}

#[test]
fn forged_sequence_numbers_keys_lengths_and_opcodes_land_nowhere() {
    let data = &[0xee; 256][..];
    for ahead in [1, 2, 1000, Psn::WINDOW - 1, Psn::WINDOW, u32::MAX] {
        changes_nothing("a sequence number that is not the next", |victim| {
            bytes(victim, victim.next.offset(ahead), Header::WriteOnly(reth(victim, 0, 256)), data)
        });
    }
    for flip in 0..32 {
        changes_nothing("a key that is not the region's", |victim| {
            let key = Key(victim.open.key.0 ^ 1 << flip);
            let reth = Reth { key, ..reth(victim, 0, 256) };
            bytes(victim, victim.next, Header::WriteOnly(reth), data)
        });
    }
    changes_nothing("a region that is not for peers", |victim| {
        let reth = Reth { address: RegionAddr(victim.closed.base), key: victim.closed.key, length: 256 };
        bytes(victim, victim.next, Header::WriteOnly(reth), data)
    });
    for (at, length) in [
        (OPEN - 255, 256),
        (OPEN, 256),
        (1_u64.wrapping_neg(), 256),
        (0_u64.wrapping_sub(0x7f00_0000_1000).wrapping_sub(128), 256),
        (0, 255),
        (0, 257),
        (0, 0),
        (0, u32::MAX),
        (0, (OPEN + 1) as u32),
    ] {
        changes_nothing("bounds or a length that are not so", |victim| {
            bytes(victim, victim.next, Header::WriteOnly(reth(victim, at, length)), data)
        });
        changes_nothing("the same as a first of several", |victim| {
            let first = Header::WriteFirst(reth(victim, at, length.min(300)));
            bytes(victim, victim.next, first, &[0xee; 4096])
        });
    }
    for header in [
        Header::WriteMiddle,
        Header::WriteLast,
        Header::WriteLastImmediate(Immediate(1)),
        Header::SendMiddle,
        Header::SendLast,
        Header::SendOnlyInvalidate(Key(1)),
        Header::ReadResponseMiddle,
        Header::ReadResponseOnly(Aeth { syndrome: Syndrome::Ack, msn: 1 }),
        Header::ReadResponseFirst(Aeth { syndrome: Syndrome::Ack, msn: 1 }),
    ] {
        changes_nothing("an opcode out of its order", |victim| {
            bytes(victim, victim.next, header, &[0xee; 4096])
        });
    }
    for syndrome in
        [Syndrome::Ack, Syndrome::Nak(NakCode::RemoteAccess), Syndrome::Nak(NakCode::SequenceError)]
    {
        let mut victim = Victim::new();
        let answer = Header::Acknowledge(Aeth { syndrome, msn: 9 });
        let answer = bytes(&victim, victim.qp.address().psn, answer, &[]);
        victim.take(&answer);
        assert_eq!(victim.qp.state(), QpState::ReadyToSend, "an answer to nothing ended the connection");
    }
}

#[test]
fn a_packet_that_is_played_again_does_not_land_again() {
    let mut victim = Victim::new();
    let good = bytes(&victim, victim.next, Header::WriteOnly(reth(&victim, 0, 4)), b"once");
    assert!(victim.take(&good));
    victim.host.fill(&victim.open, 0, b"mine");
    assert!(victim.take(&good), "it is a packet");
    assert_eq!(victim.host.bytes(&victim.open, 0, 4), b"mine", "a replay overwrote what came later");
    assert!(victim.host.hca.stats().duplicates > 0);
    victim.check_rest();
}

#[test]
fn every_truncation_and_every_flipped_bit_is_dropped() {
    let mut victim = Victim::new();
    let before = victim.open_bytes();
    let good = bytes(&victim, victim.next, Header::WriteOnly(reth(&victim, 0, 40)), &[0xee; 40]);
    for length in 0..good.len() {
        assert!(!victim.take(&good[..length]), "{length} bytes of a packet were one");
    }
    for bit in (0..good.len() * 8).filter(|bit| bit / 8 != 4) {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(!victim.take(&bad), "bit {bit}");
    }
    assert!(victim.open_bytes() == before);
    assert!(victim.take(&good), "and the connection is as it was");
}

#[test]
fn a_packet_of_a_stranger_is_not_the_peers() {
    let mut victim = Victim::new();
    let before = victim.open_bytes();
    let to = (victim.host.hca.gid(), victim.qp.address().qpn);
    let stranger = hw_model::wire::gid_of([10, 0, 0, 67].into());
    let mut packet = Packet::reliable(stranger, to, victim.next, Header::WriteOnly(reth(&victim, 0, 4)));
    packet.payload = PayloadPool::new(8, 0).take(4);
    packet.payload.copy_from_slice(b"evil");
    victim.deliver(packet);
    assert!(victim.open_bytes() == before, "somebody else wrote");
    assert!(victim.host.hca.stats().packets_dropped > 0);
    victim.check_others_go_on();
}

#[test]
fn a_flood_leaves_nothing_behind_and_others_go_on() {
    let mut victim = Victim::new();
    let before = victim.open_bytes();
    let psn = victim.next.offset(5);
    let bad = bytes(&victim, psn, Header::WriteOnly(reth(&victim, 0, 4096)), &[0xee; 4096]);
    for round in 0..20_000_u32 {
        let mut noise = bad.clone();
        if round % 3 == 0 {
            noise[(round % 4000) as usize] ^= 0x55;
        }
        victim.take(&noise);
    }
    assert!(victim.open_bytes() == before);
    victim.check_rest();
    victim.check_others_go_on();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// The fuzz target of the responder, for as long as a test may take.
    #[test]
    fn no_packets_of_a_peer_make_a_byte_land_elsewhere(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let mut victim = Victim::new();
        victim.feed(&bytes);
        victim.check_rest();
        victim.check_others_go_on();
    }

    /// Mostly the opcodes of a write, a read and atomics in their order: so that messages of many packets come about.
    #[test]
    fn no_messages_of_a_peer_make_a_byte_land_elsewhere(
        packets in proptest::collection::vec((0_usize..12, any::<u8>(), any::<[u8; 4]>()), 1..80)
    ) {
        const OPCODES: [u8; 12] = [6, 7, 7, 8, 10, 12, 0x13, 0x14, 0x1d, 4, 0x11, 9];
        let mut bytes = Vec::new();
        for (opcode, psn, [low, high, length, extra]) in packets {
            // Enough for a whole packet of the path MTU now and then.
            let psn = if psn < 200 { 0 } else { psn };
            bytes.extend([OPCODES[opcode], 0, psn, low % 6, low, high % 72, length, extra, 0xee]);
        }
        let mut victim = Victim::new();
        victim.feed(&bytes);
        victim.check_rest();
        victim.check_others_go_on();
    }
}
