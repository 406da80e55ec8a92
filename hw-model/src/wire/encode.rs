//! From meaning to bytes.

use super::icrc::{Flow, gid_of, udp};
use super::layout::{
    self, ACK_REQUEST, Bth, CNP, CnpPadding, DO_NOT_FRAGMENT, MIGRATED, PROTOCOL_UDP, SOLICITED,
};
use super::layout::{BECN, ICRC_BYTES, Ipv4, Ipv6, U24, Udp};
use super::opcode::opcode;
use super::{GlobalRoute, Header, NakCode, PKey, Packet, Qpn, Selectivity, Service, Syndrome};
use std::net::IpAddr;
use zerocopy::{Immutable, IntoBytes};

/// Bytes of the longest headers: base, XRC and atomic.
const MAX_HEAD: usize = size_of::<Bth>() + size_of::<layout::XrcEth>() + size_of::<layout::AtomicEth>();
/// Bytes of the longest padding.
const MAX_PADDING: usize = 3;

/// Headers of a packet, from the base transport header on: what comes before its data.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    bytes: [u8; MAX_HEAD],
    length: u8,
}

/// What comes after the data of a packet: padding to a multiple of four, and the ICRC.
#[derive(Clone, Copy, Debug)]
pub struct Tail {
    bytes: [u8; MAX_PADDING + ICRC_BYTES],
    length: u8,
}

impl Head {
    const EMPTY: Self = Self { bytes: [0; MAX_HEAD], length: 0 };

    /// All of a congestion notification for queue pair `to`: that what it sends meets congestion (A17.9.3).
    #[must_use]
    pub fn congestion(to: Qpn) -> Self {
        let mut head = Self::EMPTY;
        head.put(Bth {
            opcode: CNP,
            flags: 0,
            pkey: PKey::DEFAULT.0.into(),
            congestion: BECN,
            destination_qp: U24::new(to.0),
            ack_request: 0,
            psn: U24::new(0),
        });
        head.put(CnpPadding { reserved: [0; 16] });
        head
    }

    /// The headers of `packet`.
    #[must_use]
    pub fn of(packet: &Packet) -> Self {
        let mut flags = (padding(packet.payload.len()) as u8) << 4;
        flags |= if packet.solicited { SOLICITED } else { 0 };
        flags |= if packet.migrated { MIGRATED } else { 0 };
        let mut head = Self::EMPTY;
        head.put(Bth {
            opcode: opcode(packet.service, &packet.header),
            flags,
            pkey: packet.pkey.0.into(),
            congestion: 0,
            destination_qp: U24::new(packet.destination_qp.0),
            ack_request: if packet.ack_request { ACK_REQUEST } else { 0 },
            psn: U24::new(packet.psn.get()),
        });
        match packet.service {
            Service::UnreliableDatagram(deth) => head.put(layout::Deth {
                qkey: deth.qkey.0.into(),
                reserved: 0,
                source_qp: U24::new(deth.source_qp.0),
            }),
            Service::ExtendedConnection(Some(queue)) => {
                head.put(layout::XrcEth { reserved: 0, queue: U24::new(queue.0) });
            }
            Service::ExtendedConnection(None)
            | Service::ReliableConnection
            | Service::UnreliableConnection => {}
        }
        head.extend(&packet.header);
        head
    }

    /// The extended headers, in the order of the specification.
    fn extend(&mut self, header: &Header) {
        if let Header::Flush(feth, _) = header {
            let level = match feth.selectivity {
                Selectivity::Range => 0,
                Selectivity::Region => 1,
            };
            self.put(layout::Feth { bits: (u32::from(feth.placement.bits()) | level << 4).into() });
        }
        if let Some(reth) = header.reth() {
            self.put(layout::Reth {
                address: reth.address.0.into(),
                key: reth.key.0.into(),
                length: reth.length.into(),
            });
        }
        if let Header::CompareSwap(atomic) | Header::FetchAdd(atomic) = header {
            self.put(layout::AtomicEth {
                address: atomic.address.0.into(),
                key: atomic.key.0.into(),
                swap_or_add: atomic.swap_or_add.into(),
                compare: atomic.compare.into(),
            });
        }
        if let Some(aeth) = header.aeth() {
            self.put(layout::Aeth { syndrome: syndrome(aeth.syndrome), msn: U24::new(aeth.msn) });
        }
        if let Header::AtomicAcknowledge(_, original) = header {
            self.put(layout::AtomicAckEth { original: (*original).into() });
        }
        if let Some(immediate) = header.immediate() {
            self.put(layout::ImmDt { data: immediate.0.to_be_bytes() });
        }
        if let Some(key) = header.invalidates() {
            self.put(layout::Ieth { key: key.0.into() });
        }
    }

    fn put(&mut self, header: impl IntoBytes + Immutable) {
        let bytes = header.as_bytes();
        let at = usize::from(self.length);
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self.length += bytes.len() as u8;
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

impl Tail {
    /// Nothing.
    pub const EMPTY: Self = Self { bytes: [0; MAX_PADDING + ICRC_BYTES], length: 0 };

    /// Bytes of what comes after a payload of `length` bytes.
    #[must_use]
    pub const fn bytes_after(length: usize) -> usize {
        padding(length) + ICRC_BYTES
    }

    /// What comes after `payload`, which comes after `head`. `identification` is that of the IPv4 header it will have.
    #[must_use]
    pub fn of(flow: &Flow, identification: u16, head: &Head, payload: &[u8]) -> Self {
        let pad = padding(payload.len());
        let mut bytes = [0; MAX_PADDING + ICRC_BYTES];
        let icrc = flow.icrc(identification, &[head.bytes(), payload, &bytes[..pad]]);
        bytes[pad..pad + ICRC_BYTES].copy_from_slice(&icrc.to_le_bytes());
        Self { bytes, length: (pad + ICRC_BYTES) as u8 }
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

const fn padding(length: usize) -> usize {
    length.wrapping_neg() % 4
}

fn syndrome(syndrome: Syndrome) -> u8 {
    /// An acknowledgement without a count of credits (table 45).
    const NO_CREDITS: u8 = 0x1f;
    match syndrome {
        Syndrome::Ack => NO_CREDITS,
        Syndrome::RnrNak(timer) => 0x20 | timer.code(),
        Syndrome::Nak(NakCode::SequenceError) => 0x60,
        Syndrome::Nak(NakCode::InvalidRequest) => 0x61,
        Syndrome::Nak(NakCode::RemoteAccess) => 0x62,
        Syndrome::Nak(NakCode::RemoteOperational) => 0x63,
    }
}

/// Appends the contents of the UDP datagram that carries `packet`: from the base transport header to the ICRC.
pub fn encode(packet: &Packet, flow: &Flow, identification: u16, out: &mut Vec<u8>) {
    let head = Head::of(packet);
    out.extend_from_slice(head.bytes());
    out.extend_from_slice(&packet.payload);
    out.extend_from_slice(Tail::of(flow, identification, &head, &packet.payload).bytes());
}

/// Appends the IP and UDP headers of a datagram whose content is `content`, and the content. `identification` is for IPv4.
///
/// # Panics
/// If the content is longer than a datagram can be.
pub fn encode_datagram(
    flow: &Flow,
    identification: u16,
    route: GlobalRoute,
    content: &[u8],
    out: &mut Vec<u8>,
) {
    let GlobalRoute { flow_label, traffic_class, hop_limit } = route;
    let udp_length = size_of::<Udp>() + content.len();
    let total = u16::try_from(udp_length + size_of::<Ipv4>()).expect("a datagram of less than 64 KiB");
    match (flow.source, flow.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut ip = Ipv4 {
                version_and_length: 0x45,
                traffic_class,
                total_length: total.into(),
                identification: identification.into(),
                fragment: DO_NOT_FRAGMENT.into(),
                hop_limit,
                protocol: PROTOCOL_UDP,
                checksum: 0.into(),
                source: source.octets(),
                destination: destination.octets(),
            };
            ip.checksum = (!sum(0, ip.as_bytes())).into();
            out.extend_from_slice(ip.as_bytes());
            // Zero: no checksum, as the ICRC covers more (A17.3.2).
            out.extend_from_slice(udp(flow.source_port, content.len(), 0).as_bytes());
        }
        (source, destination) => {
            let ip = Ipv6 {
                version_class_flow: (6 << 28 | u32::from(traffic_class) << 20 | flow_label & 0xf_ffff).into(),
                payload_length: (udp_length as u16).into(),
                next_header: PROTOCOL_UDP,
                hop_limit,
                source: gid_of(source).0.to_be_bytes(),
                destination: gid_of(destination).0.to_be_bytes(),
            };
            let mut udp = udp(flow.source_port, content.len(), 0);
            let pseudo = sum(udp_length as u16, &ip.as_bytes()[8..]);
            let sum = sum(sum(pseudo, &[0, PROTOCOL_UDP]), udp.as_bytes());
            // Over IPv6 there must be one, and zero is written as its other form (RFC 8200, 8.1).
            udp.checksum = Some(!self::sum(sum, content)).filter(|sum| *sum != 0).unwrap_or(0xffff).into();
            out.extend_from_slice(ip.as_bytes());
            out.extend_from_slice(udp.as_bytes());
        }
    }
    out.extend_from_slice(content);
}

/// The ones-complement sum of the internet checksum (RFC 1071), gone on with from `sum`.
pub(super) fn sum(sum: u16, bytes: &[u8]) -> u16 {
    let mut wide = u64::from(sum);
    let (words, rest) = bytes.as_chunks::<2>();
    wide += words.iter().map(|word| u64::from(u16::from_be_bytes(*word))).sum::<u64>();
    wide += rest.first().map_or(0, |last| u64::from(*last) << 8);
    while wide > 0xffff {
        wide = (wide & 0xffff) + (wide >> 16);
    }
    wide as u16
}
