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
