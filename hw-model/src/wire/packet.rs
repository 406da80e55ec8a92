//! A packet: the base transport header (IBTA volume 1, 9.2), what its network layer says, and its data.

use super::{Gid, Header, PKey, Payload, Psn, Qpn, Service};

/// What the network layer carries along for the receiver (8.3; A17.4.4 for RoCEv2): a datagram shows it to software.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GlobalRoute {
    /// Of packets that stay in order: 20 bits.
    pub flow_label: u32,
    /// What it is treated as on the way.
    pub traffic_class: u8,
    /// Routers it may pass.
    pub hop_limit: u8,
}

impl GlobalRoute {
    /// Nothing asked for, and 64 hops.
    pub const DEFAULT: Self = Self { flow_label: 0, traffic_class: 0, hop_limit: 64 };
}

impl GlobalRoute {
    /// Whether a router marked the packet because of congestion (RFC 3168, the two lower bits).
    #[must_use]
    pub const fn met_congestion(&self) -> bool {
        self.traffic_class & 3 == 3
    }
}

impl Default for GlobalRoute {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// One packet.
#[derive(Clone, Debug)]
pub struct Packet {
    /// Port that sent it.
    pub source: Gid,
    /// Port it goes to.
    pub destination: Gid,
    /// What else its network header says.
    pub route: GlobalRoute,
    /// Which service carries it.
    pub service: Service,
    /// Queue pair it goes to.
    pub destination_qp: Qpn,
    /// The partition it belongs to.
    pub pkey: PKey,
    /// Sequence number. Of an acknowledgement: of the request it speaks of.
    pub psn: Psn,
    /// The requester wants an acknowledgement of this packet (9.7.3, the AckReq bit).
    pub ack_request: bool,
    /// The receiver's completion is an event for one who waits for solicited ones only (9.2.3).
    pub solicited: bool,
    /// The path has migrated (9.2.4; always set where there is one path).
    pub migrated: bool,
    /// Opcode and extended headers.
    pub header: Header,
    /// Data, at most the path MTU.
    pub payload: Payload,
}

impl Packet {
    /// Bytes of a global route header.
    pub const ROUTE_HEADER_BYTES: usize = 40;

    /// The network header as a datagram's receiver sees it (8.3.1): a global route header, or, between IPv4 addresses, an
    /// IPv4 header in the last 20 bytes (A17.4.5.1).
    #[must_use]
    pub fn route_header(&self) -> [u8; Self::ROUTE_HEADER_BYTES] {
        let mut out = [0; Self::ROUTE_HEADER_BYTES];
        let GlobalRoute { flow_label, traffic_class, hop_limit } = self.route;
        let length = (BTH_BYTES + DETH_BYTES + self.payload.len().next_multiple_of(4) + ICRC_BYTES) as u16;
        if let (Some(source), Some(destination)) = (ipv4(self.source), ipv4(self.destination)) {
            let ip = &mut out[20..];
            ip[0] = 0x45;
            ip[1] = traffic_class;
            ip[2..4].copy_from_slice(&(length + IPV4_BYTES + UDP_BYTES).to_be_bytes());
            ip[6] = 0x40;
            ip[8] = hop_limit;
            ip[9] = UDP;
            ip[12..16].copy_from_slice(&source);
            ip[16..20].copy_from_slice(&destination);
            let sum = checksum(ip);
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
            return out;
        }
        let first = 6 << 28 | u32::from(traffic_class) << 20 | (flow_label & 0xf_ffff);
        out[0..4].copy_from_slice(&first.to_be_bytes());
        out[4..6].copy_from_slice(&length.to_be_bytes());
        out[6] = BTH_FOLLOWS;
        out[7] = hop_limit;
        out[8..24].copy_from_slice(&self.source.0.to_be_bytes());
        out[24..40].copy_from_slice(&self.destination.0.to_be_bytes());
        out
    }

    /// All of it, data too, which it has no more.
    pub(crate) fn take(&mut self) -> Self {
        Self { payload: std::mem::take(&mut self.payload), ..*self }
    }

    /// A packet of a reliable connection in the default partition, without data.
    #[must_use]
    pub const fn reliable(source: Gid, (destination, qp): (Gid, Qpn), psn: Psn, header: Header) -> Self {
        Self {
            source,
            destination,
            route: GlobalRoute::DEFAULT,
            service: Service::ReliableConnection,
            destination_qp: qp,
            pkey: PKey::DEFAULT,
            psn,
            ack_request: false,
            solicited: false,
            migrated: true,
            header,
            payload: Payload::EMPTY,
        }
    }
}

const BTH_BYTES: usize = 12;
const DETH_BYTES: usize = 8;
const ICRC_BYTES: usize = 4;
const IPV4_BYTES: u16 = 20;
const UDP_BYTES: u16 = 8;
/// The protocol number of UDP.
const UDP: u8 = 17;
/// The next-header code of a global route header: a base transport header follows (8.3.1).
const BTH_FOLLOWS: u8 = 0x1b;

/// The IPv4 address that a port's address stands for, if it does (`::ffff:a.b.c.d`).
fn ipv4(Gid(gid): Gid) -> Option<[u8; 4]> {
    std::net::Ipv6Addr::from(gid).to_ipv4_mapped().map(|address| address.octets())
}

/// The checksum of an IPv4 header whose checksum field is 0 (RFC 1071).
fn checksum(header: &[u8]) -> u16 {
    let sum: u32 = header.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !(((folded & 0xffff) + (folded >> 16)) as u16)
}
