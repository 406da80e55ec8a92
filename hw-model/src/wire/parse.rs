//! From bytes to meaning. The bytes are hostile: every length is checked, nothing in here panics, and what comes out is a
//! packet that some honest peer could have sent. Whether it was asked for is the transport's question.

use super::encode::sum;
use super::icrc::Flow;
use super::layout::{
    self, ACK_REQUEST, Bth, CNP, CnpPadding, DO_NOT_FRAGMENT, MIGRATED, OPERATION, PROTOCOL_UDP, SOLICITED,
    VERSION,
};
use super::layout::{ICRC_BYTES, Ipv4, Ipv6, Udp};
use super::{
    Aeth, AtomicEth, Deth, Feth, Gid, GlobalRoute, Header, Immediate, Key, Malformed, NakCode, PKey, Packet,
    Payload, PayloadPool, Placement, Psn, QKey, Qpn, ROCE_PORT, Reth, RnrTimer, Selectivity, Service, Srqn,
    Syndrome, WholeBuffer, gid_of,
};
use crate::addr::RegionAddr;
use crate::sync::Arc;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

/// How the invariant CRC of a packet was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checked {
    /// All 32 bits.
    Whole,
    /// 16 bits: it is right for this identification in the IPv4 header, which nobody told us.
    ButFor(u16),
}

/// What is known of the IPv4 identification, which the invariant CRC covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identification {
    /// It is this one.
    Known(u16),
    /// It was not seen; this one is likely.
    Likely(u16),
}

/// What a datagram held.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "nearly all are packets, and none is kept")]
pub enum Content<'a> {
    /// A packet for a queue pair. Its payload is still empty; `data` is what belongs there.
    Packet {
        /// The packet.
        packet: Packet,
        /// Its data.
        data: &'a [u8],
    },
    /// A congestion notification for a queue pair (A17.9.3).
    Congestion(Qpn),
}

impl Content<'_> {
    /// The packet with its data, in a buffer of `pool`. `None` for a congestion notification.
    ///
    /// # Errors
    /// [`Malformed::TooLong`] if the data does not fit in the pool's buffers.
    pub fn into_packet(self, pool: &Arc<PayloadPool>) -> Result<Option<Packet>, Malformed> {
        let Self::Packet { mut packet, data } = self else { return Ok(None) };
        if data.len() > pool.buffer_bytes() {
            return Err(Malformed::TooLong);
        }
        packet.payload = pool.take(data.len());
        packet.payload.copy_from_slice(data);
        Ok(Some(packet))
    }

    /// The packet with its data in a part of `whole`, where `content` was parsed from; `None` if it was a notification.
    #[must_use]
    pub fn into_part(self, whole: &WholeBuffer) -> Option<Packet> {
        let Self::Packet { mut packet, data } = self else { return None };
        let from = data.as_ptr().addr() - whole.bytes().as_ptr().addr();
        packet.payload = whole.part(from..from + data.len());
        Some(packet)
    }
}

/// Checks the invariant CRC at the end of `content`, the content of a UDP datagram.
///
/// # Errors
/// [`Malformed::Truncated`], [`Malformed::Icrc`].
pub fn check_icrc(flow: &Flow, identification: Identification, content: &[u8]) -> Result<Checked, Malformed> {
    let (body, icrc) = content.split_last_chunk::<ICRC_BYTES>().ok_or(Malformed::Truncated)?;
    if body.len() < size_of::<Bth>() {
        return Err(Malformed::Truncated);
    }
    let found = u32::from_le_bytes(*icrc);
    let (Identification::Known(assumed) | Identification::Likely(assumed)) = identification;
    let computed = flow.icrc(assumed, &[body]);
    if computed == found {
        return Ok(Checked::Whole);
    }
    match identification {
        Identification::Known(_) => Err(Malformed::Icrc),
        Identification::Likely(_) => {
            let solved = flow.solve(body.len(), (assumed, computed), found);
            solved.map(Checked::ButFor).ok_or(Malformed::Icrc)
        }
    }
}

/// Parses the content of a UDP datagram whose invariant CRC has been checked.
///
/// # Errors
/// See [`Malformed`].
pub fn parse<'a>(flow: &Flow, route: GlobalRoute, content: &'a [u8]) -> Result<Content<'a>, Malformed> {
    let body = content.get(..content.len().saturating_sub(ICRC_BYTES)).unwrap_or_default();
    let mut rest = Rest(body);
    let bth: Bth = rest.take()?;
    if bth.opcode == CNP && bth.flags & VERSION == 0 {
        let CnpPadding { .. } = rest.take()?;
        let destination_qp = Qpn(bth.destination_qp.get());
        return if rest.0.is_empty() {
            Ok(Content::Congestion(destination_qp))
        } else {
            Err(Malformed::Length)
        };
    }
    let (service, header) = rest.headers(&bth)?;
    if !rest.0.len().is_multiple_of(4) {
        return Err(Malformed::Padding);
    }
    let padding = usize::from(bth.flags >> 4 & 3);
    let data = rest.0.len().checked_sub(padding).ok_or(Malformed::Padding)?;
    if !may_carry(&header, data, rest.0.len()) {
        return Err(Malformed::Length);
    }
    let packet = packet((gid_of(flow.source), gid_of(flow.destination)), route, &bth, (service, header));
    Ok(Content::Packet { packet, data: &rest.0[..data] })
}

/// Parses the headers of a packet from `source` to `destination` whose `data` bytes of data lie elsewhere, without padding
/// and without ICRC. Its payload is still empty.
///
/// # Errors
/// See [`Malformed`].
pub fn parse_parts((source, destination): (Gid, Gid), head: &[u8], data: usize) -> Result<Packet, Malformed> {
    let mut rest = Rest(head);
    let bth: Bth = rest.take()?;
    let (service, header) = rest.headers(&bth)?;
    if !rest.0.is_empty() || !may_carry(&header, data, data) {
        return Err(Malformed::Length);
    }
    Ok(packet((source, destination), GlobalRoute::DEFAULT, &bth, (service, header)))
}

fn packet(
    (source, destination): (Gid, Gid),
    route: GlobalRoute,
    bth: &Bth,
    (service, header): (Service, Header),
) -> Packet {
    Packet {
        source,
        destination,
        route,
        service,
        destination_qp: Qpn(bth.destination_qp.get()),
        pkey: PKey(bth.pkey.get()),
        psn: Psn::new(bth.psn.get()),
        ack_request: bth.ack_request & ACK_REQUEST != 0,
        solicited: bth.flags & SOLICITED != 0,
        migrated: bth.flags & MIGRATED != 0,
        header,
        payload: Payload::EMPTY,
    }
}

/// Whether a packet may have so much data, and so much with its padding.
fn may_carry(header: &Header, data: usize, padded: usize) -> bool {
    match header {
        Header::SendFirst
        | Header::SendMiddle
        | Header::WriteFirst(_)
        | Header::WriteMiddle
        | Header::ReadResponseFirst(_)
        | Header::ReadResponseMiddle => data >= 256 && data.is_power_of_two(),
        Header::SendLast
        | Header::SendLastImmediate(_)
        | Header::SendLastInvalidate(_)
        | Header::WriteLast
        | Header::WriteLastImmediate(_)
        | Header::ReadResponseLast(_) => data > 0,
        Header::SendOnly
        | Header::SendOnlyImmediate(_)
        | Header::SendOnlyInvalidate(_)
        | Header::WriteOnly(_)
        | Header::WriteOnlyImmediate(..)
        | Header::ReadResponseOnly(_) => true,
        Header::AtomicWrite(_) => data == 8,
        Header::ReadRequest(_)
        | Header::Acknowledge(_)
        | Header::AtomicAcknowledge(..)
        | Header::CompareSwap(_)
        | Header::FetchAdd(_)
        | Header::Flush(..) => padded == 0,
    }
}

/// What has not been looked at yet.
struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    fn take<T: FromBytes + KnownLayout + Immutable + Unaligned + Copy>(&mut self) -> Result<T, Malformed> {
        let (header, rest) = T::read_from_prefix(self.0).map_err(|_| Malformed::Truncated)?;
        self.0 = rest;
        Ok(header)
    }

    /// The service and the operation, if one has the other.
    fn headers(&mut self, bth: &Bth) -> Result<(Service, Header), Malformed> {
        if bth.flags & VERSION != 0 {
            return Err(Malformed::Version);
        }
        let service = self.service(bth.opcode)?;
        let header = self.header(bth.opcode & OPERATION)?;
        if header.is_of(service) { Ok((service, header)) } else { Err(Malformed::Opcode) }
    }

    /// The service, with the header that it adds to this operation.
    fn service(&mut self, opcode: u8) -> Result<Service, Malformed> {
        match opcode >> 5 {
            0 => Ok(Service::ReliableConnection),
            1 => Ok(Service::UnreliableConnection),
            3 => {
                let deth: layout::Deth = self.take()?;
                let source_qp = Qpn(deth.source_qp.get());
                Ok(Service::UnreliableDatagram(Deth { qkey: QKey(deth.qkey.get()), source_qp }))
            }
            // A response names no receive queue (A14.3.1).
            5 if matches!(opcode & OPERATION, 0x0d..=0x12) => Ok(Service::ExtendedConnection(None)),
            5 => {
                let xrceth: layout::XrcEth = self.take()?;
                Ok(Service::ExtendedConnection(Some(Srqn(xrceth.queue.get()))))
            }
            _ => Err(Malformed::Opcode),
        }
    }

    /// The operation with its extended headers.
    fn header(&mut self, operation: u8) -> Result<Header, Malformed> {
        Ok(match operation {
            0x00 => Header::SendFirst,
            0x01 => Header::SendMiddle,
            0x02 => Header::SendLast,
            0x03 => Header::SendLastImmediate(self.immediate()?),
            0x04 => Header::SendOnly,
            0x05 => Header::SendOnlyImmediate(self.immediate()?),
            0x06 => Header::WriteFirst(self.reth()?),
            0x07 => Header::WriteMiddle,
            0x08 => Header::WriteLast,
            0x09 => Header::WriteLastImmediate(self.immediate()?),
            0x0a => Header::WriteOnly(self.reth()?),
            0x0b => Header::WriteOnlyImmediate(self.reth()?, self.immediate()?),
            0x0c => Header::ReadRequest(self.reth()?),
            0x0d => Header::ReadResponseFirst(self.aeth()?),
            0x0e => Header::ReadResponseMiddle,
            0x0f => Header::ReadResponseLast(self.aeth()?),
            0x10 => Header::ReadResponseOnly(self.aeth()?),
            0x11 => Header::Acknowledge(self.aeth()?),
            0x12 => {
                let aeth = self.aeth()?;
                let layout::AtomicAckEth { original } = self.take()?;
                Header::AtomicAcknowledge(aeth, original.get())
            }
            0x13 => Header::CompareSwap(self.atomic()?),
            0x14 => Header::FetchAdd(self.atomic()?),
            0x16 => Header::SendLastInvalidate(self.key()?),
            0x17 => Header::SendOnlyInvalidate(self.key()?),
            0x1c => Header::Flush(self.feth()?, self.reth()?),
            0x1d => Header::AtomicWrite(self.reth()?),
            _ => return Err(Malformed::Opcode),
        })
    }

    fn reth(&mut self) -> Result<Reth, Malformed> {
        let reth: layout::Reth = self.take()?;
        let address = RegionAddr(reth.address.get());
        Ok(Reth { address, key: Key(reth.key.get()), length: reth.length.get() })
    }

    fn atomic(&mut self) -> Result<AtomicEth, Malformed> {
        let atomic: layout::AtomicEth = self.take()?;
        Ok(AtomicEth {
            address: RegionAddr(atomic.address.get()),
            key: Key(atomic.key.get()),
            swap_or_add: atomic.swap_or_add.get(),
            compare: atomic.compare.get(),
        })
    }

    fn aeth(&mut self) -> Result<Aeth, Malformed> {
        let aeth: layout::Aeth = self.take()?;
        let code = aeth.syndrome & 0x1f;
        let syndrome = match aeth.syndrome >> 5 {
            0 => Syndrome::Ack,
            1 => Syndrome::RnrNak(RnrTimer::from_code(code).ok_or(Malformed::Reserved)?),
            3 => Syndrome::Nak(match code {
                0 => NakCode::SequenceError,
                1 => NakCode::InvalidRequest,
                2 => NakCode::RemoteAccess,
                3 => NakCode::RemoteOperational,
                _ => return Err(Malformed::Reserved),
            }),
            _ => return Err(Malformed::Reserved),
        };
        Ok(Aeth { syndrome, msn: aeth.msn.get() })
    }

    fn feth(&mut self) -> Result<Feth, Malformed> {
        let layout::Feth { bits } = self.take()?;
        let bits = bits.get();
        let placement = Placement::from_bits((bits & 0x0f) as u8).ok_or(Malformed::Reserved)?;
        let selectivity = match bits >> 4 & 3 {
            0 => Selectivity::Range,
            1 => Selectivity::Region,
            _ => return Err(Malformed::Reserved),
        };
        Ok(Feth { placement, selectivity })
    }

    fn immediate(&mut self) -> Result<Immediate, Malformed> {
        let layout::ImmDt { data } = self.take()?;
        Ok(Immediate(u32::from_be_bytes(data)))
    }

    fn key(&mut self) -> Result<Key, Malformed> {
        let layout::Ieth { key } = self.take()?;
        Ok(Key(key.get()))
    }
}

/// A datagram of RoCEv2 with what its IP and UDP headers said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram<'a> {
    /// Who sent it to whom.
    pub flow: Flow,
    /// Of an IPv4 header; 0 for IPv6.
    pub identification: u16,
    /// What else the header said.
    pub route: GlobalRoute,
    /// What it carries.
    pub content: &'a [u8],
}

/// Parses a whole IP packet: as captured, or as carried by a network of ours.
///
/// # Errors
/// [`Malformed::Truncated`], [`Malformed::Network`], [`Malformed::Fragment`].
pub fn parse_datagram(bytes: &[u8]) -> Result<Datagram<'_>, Malformed> {
    let version = bytes.first().ok_or(Malformed::Truncated)? >> 4;
    let mut rest = Rest(bytes);
    let (source, destination, identification, route, length): (IpAddr, IpAddr, _, _, _) = match version {
        4 => {
            let ip: Ipv4 = rest.take()?;
            let is_udp = ip.version_and_length == 0x45 && ip.protocol == PROTOCOL_UDP;
            if !is_udp || sum(0, &bytes[..size_of::<Ipv4>()]) != 0xffff {
                return Err(Malformed::Network);
            }
            // The ICRC covers a header that says "do not fragment" (A17.3.2).
            match ip.fragment.get() {
                DO_NOT_FRAGMENT => {}
                _ => return Err(Malformed::Fragment),
            }
            let total = usize::from(ip.total_length.get());
            let length = total.checked_sub(size_of::<Ipv4>()).ok_or(Malformed::Network)?;
            let route =
                GlobalRoute { flow_label: 0, traffic_class: ip.traffic_class, hop_limit: ip.hop_limit };
            let (from, to) = (Ipv4Addr::from(ip.source), Ipv4Addr::from(ip.destination));
            (from.into(), to.into(), ip.identification.get(), route, length)
        }
        6 => {
            let ip: Ipv6 = rest.take()?;
            if ip.next_header != PROTOCOL_UDP {
                return Err(Malformed::Network);
            }
            let bits = ip.version_class_flow.get();
            let route = GlobalRoute {
                flow_label: bits & 0xf_ffff,
                traffic_class: (bits >> 20 & 0xff) as u8,
                hop_limit: ip.hop_limit,
            };
            let (from, to) = (Ipv6Addr::from(ip.source), Ipv6Addr::from(ip.destination));
            // These stand for IPv4 addresses, and would make one GID of two different senders.
            if from.to_ipv4_mapped().is_some() || to.to_ipv4_mapped().is_some() {
                return Err(Malformed::Network);
            }
            (from.into(), to.into(), 0, route, usize::from(ip.payload_length.get()))
        }
        _ => return Err(Malformed::Network),
    };
    // What a link layer pads short frames with is cut off.
    rest.0 = rest.0.get(..length).ok_or(Malformed::Truncated)?;
    let udp: Udp = rest.take()?;
    if udp.destination.get() != ROCE_PORT || usize::from(udp.length.get()) != length {
        return Err(Malformed::Network);
    }
    let flow = Flow { source, destination, source_port: udp.source.get() };
    Ok(Datagram { flow, identification, route, content: rest.0 })
}
