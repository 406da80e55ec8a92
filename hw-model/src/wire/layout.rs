//! Headers as they lie on the wire: big-endian, packed, nothing checked (IBTA volume 1, 9.2 and 9.3; A14.3, A17.3, A19.3).

use zerocopy::byteorder::network_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A number of 24 bits.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct U24([u8; 3]);

impl U24 {
    pub(super) const fn new(value: u32) -> Self {
        let [_, high, middle, low] = value.to_be_bytes();
        Self([high, middle, low])
    }
    pub(super) const fn get(self) -> u32 {
        let [high, middle, low] = self.0;
        u32::from_be_bytes([0, high, middle, low])
    }
}

macro_rules! headers {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty),* $(,)? })*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
            #[repr(C)]
            pub(super) struct $name {
                $($(#[$field_doc])* pub(super) $field: $type,)*
            }
        )*
    };
}

headers! {
    /// Base transport header (9.2).
    Bth {
        /// Service in the upper three bits, operation in the lower five.
        opcode: u8,
        /// [`SOLICITED`], [`MIGRATED`], pad count in bits 5 and 4, version in the lower four.
        flags: u8,
        pkey: U16,
        /// FECN and BECN in the upper two bits, the rest reserved. Not covered by the ICRC.
        congestion: u8,
        destination_qp: U24,
        /// [`ACK_REQUEST`], the rest reserved.
        ack_request: u8,
        psn: U24,
    }
    /// RDMA extended transport header (9.3.3).
    Reth { address: U64, key: U32, length: U32 }
    /// Atomic extended transport header (9.3.4).
    AtomicEth { address: U64, key: U32, swap_or_add: U64, compare: U64 }
    /// ACK extended transport header (9.3.5).
    Aeth { syndrome: u8, msn: U24 }
    /// What was at an atomic's address (9.3.5.3), an immediate (9.3.6) and a key (9.3.7) are plain numbers.
    AtomicAckEth { original: U64 }
    /// Immediate data (9.3.6): four bytes that are handed on as they are.
    ImmDt { data: [u8; 4] }
    /// Invalidate extended transport header (9.3.7).
    Ieth { key: U32 }
    /// Datagram extended transport header (9.3.2).
    Deth { qkey: U32, reserved: u8, source_qp: U24 }
    /// XRC extended transport header (A14.3.1).
    XrcEth { reserved: u8, queue: U24 }
    /// Flush extended transport header (A19.3.1).
    Feth { bits: U32 }
    /// What a congestion notification carries besides its base transport header (A17.9.3): nothing, 16 bytes of it.
    CnpPadding { reserved: [u8; 16] }
    /// Internet header without options (RFC 791).
    Ipv4 {
        version_and_length: u8,
        traffic_class: u8,
        total_length: U16,
        identification: U16,
        /// [`DO_NOT_FRAGMENT`], more fragments, and the offset of a fragment.
        fragment: U16,
        hop_limit: u8,
        protocol: u8,
        checksum: U16,
        source: [u8; 4],
        destination: [u8; 4],
    }
    /// IPv6 header (RFC 8200).
    Ipv6 {
        /// Version (4 bits), traffic class (8), flow label (20).
        version_class_flow: U32,
        payload_length: U16,
        next_header: u8,
        hop_limit: u8,
        source: [u8; 16],
        destination: [u8; 16],
    }
    /// UDP header (RFC 768).
    Udp { source: U16, destination: U16, length: U16, checksum: U16 }
}

/// Solicited event: bit of [`Bth::flags`].
pub(super) const SOLICITED: u8 = 0x80;
/// The version, which is 0: bits of [`Bth::flags`].
pub(super) const VERSION: u8 = 0x0f;
/// The path has migrated: bit of [`Bth::flags`].
pub(super) const MIGRATED: u8 = 0x40;
/// The peer wants an acknowledgement: bit of [`Bth::ack_request`].
pub(super) const ACK_REQUEST: u8 = 0x80;
/// Backward notification: bit of [`Bth::congestion`].
pub(super) const BECN: u8 = 0x40;
/// Bit of [`Ipv4::fragment`].
pub(super) const DO_NOT_FRAGMENT: u16 = 0x4000;

/// The operation in [`Bth::opcode`]; the service is above it.
pub(super) const OPERATION: u8 = 0x1f;
/// The opcode of a congestion notification (A17.9.3).
pub(super) const CNP: u8 = 0x81;
/// The IP protocol number of UDP.
pub(super) const PROTOCOL_UDP: u8 = 17;

/// Bytes of the invariant CRC at the end (7.8.1).
pub(super) const ICRC_BYTES: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_as_long_as_the_specification_says() {
        let sizes = [
            (size_of::<Bth>(), 12),
            (size_of::<Reth>(), 16),
            (size_of::<AtomicEth>(), 28),
            (size_of::<Aeth>(), 4),
            (size_of::<AtomicAckEth>(), 8),
            (size_of::<ImmDt>(), 4),
            (size_of::<Ieth>(), 4),
            (size_of::<Deth>(), 8),
            (size_of::<XrcEth>(), 4),
            (size_of::<Feth>(), 4),
            (size_of::<CnpPadding>(), 16),
            (size_of::<Ipv4>(), 20),
            (size_of::<Ipv6>(), 40),
            (size_of::<Udp>(), 8),
        ];
        for (size, specified) in sizes {
            assert_eq!(size, specified);
        }
        assert_eq!(U24::new(0x0102_0304).get(), 0x02_0304);
    }
}
