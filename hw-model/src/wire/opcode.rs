//! The byte that says what a packet is (IBTA volume 1, 9.2.1, table 38; A14.3, A19.3).

use super::{Header, Service};

/// The opcode of `header` over `service`.
pub(super) const fn opcode(service: Service, header: &Header) -> u8 {
    service_bits(service) << 5 | operation(header)
}

const fn service_bits(service: Service) -> u8 {
    match service {
        Service::ReliableConnection => 0,
        Service::UnreliableConnection => 1,
        Service::UnreliableDatagram(_) => 3,
        Service::ExtendedConnection(_) => 5,
    }
}

/// The lower five bits. [`super::parse`] has the other direction, with the extended headers that each asks for.
const fn operation(header: &Header) -> u8 {
    match header {
        Header::SendFirst => 0x00,
        Header::SendMiddle => 0x01,
        Header::SendLast => 0x02,
        Header::SendLastImmediate(_) => 0x03,
        Header::SendOnly => 0x04,
        Header::SendOnlyImmediate(_) => 0x05,
        Header::WriteFirst(_) => 0x06,
        Header::WriteMiddle => 0x07,
        Header::WriteLast => 0x08,
        Header::WriteLastImmediate(_) => 0x09,
        Header::WriteOnly(_) => 0x0a,
        Header::WriteOnlyImmediate(..) => 0x0b,
        Header::ReadRequest(_) => 0x0c,
        Header::ReadResponseFirst(_) => 0x0d,
        Header::ReadResponseMiddle => 0x0e,
        Header::ReadResponseLast(_) => 0x0f,
        Header::ReadResponseOnly(_) => 0x10,
        Header::Acknowledge(_) => 0x11,
        Header::AtomicAcknowledge(..) => 0x12,
        Header::CompareSwap(_) => 0x13,
        Header::FetchAdd(_) => 0x14,
        Header::SendLastInvalidate(_) => 0x16,
        Header::SendOnlyInvalidate(_) => 0x17,
        Header::Flush(..) => 0x1c,
        Header::AtomicWrite(_) => 0x1d,
    }
}
