//! The invariant CRC of RoCEv2 (IBTA volume 1, 7.8.1; A17.3.3): the CRC of Ethernet over what no router changes.
//!
//! ```text
//!   8 bytes of ones | IP header | UDP header | BTH | extended headers, data, padding
//! ```
//!
//! with ones in place of what may change on the way: traffic class, hop limit, flow label, the checksums, and the byte of the
//! BTH that holds the congestion bits. **The IPv4 identification is covered**, and a program that receives through a UDP
//! socket never sees it. So there are two ways to check: [`Flow::icrc`] where it is known or can be guessed, and
//! [`Flow::solve`], which finds the one identification with which the CRC would be right. That there is one is a check
//! of 16 bits instead of 32.

use super::layout::{Bth, DO_NOT_FRAGMENT, ICRC_BYTES, Ipv4, Ipv6, PROTOCOL_UDP, Udp};
use super::{Gid, ROCE_PORT};
use crc32fast::Hasher;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use zerocopy::IntoBytes;

/// Who sends to whom, over UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Address that sends.
    pub source: IpAddr,
    /// Address that it goes to, of the same family.
    pub destination: IpAddr,
    /// UDP port that sends. It goes to [`ROCE_PORT`].
    pub source_port: u16,
}

/// The address that a GID stands for: IPv4 if it is a mapped one (A17.5.2).
#[must_use]
pub fn ip_of(gid: Gid) -> IpAddr {
    Ipv6Addr::from(gid.0).to_canonical()
}

/// The GID of an address.
#[must_use]
pub fn gid_of(address: IpAddr) -> Gid {
    match address {
        IpAddr::V4(address) => Gid(address.to_ipv6_mapped().to_bits()),
        IpAddr::V6(address) => Gid(address.to_bits()),
    }
}

impl Flow {
    /// From port to port. `None` if one is an IPv4 address and the other is not.
    #[must_use]
    pub fn between(source: Gid, destination: Gid, source_port: u16) -> Option<Self> {
        let (source, destination) = (ip_of(source), ip_of(destination));
        (source.is_ipv4() == destination.is_ipv4()).then_some(Self { source, destination, source_port })
    }

    /// The ICRC of a packet: `parts` are its base transport header with all that follows, up to the CRC; the first part
    /// begins with the whole base transport header. `identification` is that of an IPv4 header.
    ///
    /// # Panics
    /// If the first part is shorter than a base transport header.
    #[must_use]
    pub fn icrc(&self, identification: u16, parts: &[&[u8]]) -> u32 {
        let bytes = parts.iter().map(|part| part.len()).sum::<usize>() + ICRC_BYTES;
        let mut hasher = Hasher::new();
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                hasher.update(V4Prefix::new(source, destination, identification, self, bytes).as_bytes());
            }
            (source, destination) => {
                let (source, destination) = (gid_of(source), gid_of(destination));
                hasher.update(V6Prefix::new(source, destination, self, bytes).as_bytes());
            }
        }
        let (bth, rest) = parts[0].split_at(size_of::<Bth>());
        let mut masked = [0; size_of::<Bth>()];
        masked.copy_from_slice(bth);
        masked[std::mem::offset_of!(Bth, congestion)] = 0xff;
        hasher.update(&masked);
        hasher.update(rest);
        parts[1..].iter().for_each(|part| hasher.update(part));
        hasher.finalize()
    }

    /// The only identification with which `found` is the ICRC of `body` (all of the packet up to the CRC), if there is one.
    ///
    /// `computed` is [`Flow::icrc`] of the same bytes for identification `assumed`.
    #[must_use]
    pub fn solve(&self, body: usize, (assumed, computed): (u16, u32), found: u32) -> Option<u16> {
        if !self.source.is_ipv4() {
            return None;
        }
        // A CRC is linear: the difference of the two is the difference of the identifications, as a polynomial, times x to
        // the power of what comes after it, and of the 32 zeros that a CRC ends with.
        let after =
            (size_of::<Ipv4>() - std::mem::offset_of!(Ipv4, identification) - 2) + size_of::<Udp>() + body;
        let difference = multiply(computed ^ found, inverse_power(8 * after as u32 + 32));
        // The coefficient of x^0 is the top bit: a difference of 16 bits leaves the lower half of the register empty.
        let [low, high, third, fourth] = difference.to_le_bytes();
        ((low, high) == (0, 0)).then(|| assumed ^ u16::from_be_bytes([third, fourth]))
    }
}

/// What the CRC covers before the base transport header, over IPv4.
#[derive(IntoBytes, zerocopy::Immutable)]
#[repr(C)]
struct V4Prefix {
    ones: [u8; 8],
    ip: Ipv4,
    udp: Udp,
}

impl V4Prefix {
    fn new(source: Ipv4Addr, destination: Ipv4Addr, identification: u16, flow: &Flow, bytes: usize) -> Self {
        let udp = udp(flow.source_port, bytes, 0xffff);
        let ip = Ipv4 {
            version_and_length: 0x45,
            traffic_class: 0xff,
            total_length: ((size_of::<Ipv4>() + size_of::<Udp>() + bytes) as u16).into(),
            identification: identification.into(),
            fragment: DO_NOT_FRAGMENT.into(),
            hop_limit: 0xff,
            protocol: PROTOCOL_UDP,
            checksum: 0xffff.into(),
            source: source.octets(),
            destination: destination.octets(),
        };
        Self { ones: [0xff; 8], ip, udp }
    }
}

/// What the CRC covers before the base transport header, over IPv6.
#[derive(IntoBytes, zerocopy::Immutable)]
#[repr(C)]
struct V6Prefix {
    ones: [u8; 8],
    ip: Ipv6,
    udp: Udp,
}

impl V6Prefix {
    fn new(source: Gid, destination: Gid, flow: &Flow, bytes: usize) -> Self {
        let ip = Ipv6 {
            version_class_flow: 0x6fff_ffff.into(),
            payload_length: ((size_of::<Udp>() + bytes) as u16).into(),
            next_header: PROTOCOL_UDP,
            hop_limit: 0xff,
            source: source.0.to_be_bytes(),
            destination: destination.0.to_be_bytes(),
        };
        Self { ones: [0xff; 8], ip, udp: udp(flow.source_port, bytes, 0xffff) }
    }
}

/// The UDP header in front of `bytes` bytes.
pub(super) fn udp(source_port: u16, bytes: usize, checksum: u16) -> Udp {
    Udp {
        source: source_port.into(),
        destination: ROCE_PORT.into(),
        length: ((size_of::<Udp>() + bytes) as u16).into(),
        checksum: checksum.into(),
    }
}

/// The polynomial of Ethernet's CRC, as it is kept in a register: the top bit is the coefficient of x^0.
const POLYNOMIAL: u32 = 0xedb8_8320;
const ONE: u32 = 1 << 31;

/// The product of two polynomials, modulo [`POLYNOMIAL`].
const fn multiply(a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    let mut bit = ONE;
    while bit != 0 {
        if a & bit != 0 {
            product ^= b;
        }
        // Times x: to the right, as the register has its lowest coefficient on top.
        b = (b >> 1) ^ if b & 1 == 1 { POLYNOMIAL } else { 0 };
        bit >>= 1;
    }
    product
}

/// Powers of 1/x with exponents 2^0, 2^1, ...: 1/x is x^(2^32 - 2), because the polynomial is primitive.
const INVERSE_POWERS: [u32; 20] = {
    let mut inverse = ONE;
    let mut power = ONE >> 1;
    let mut bit = 1;
    while bit < 32 {
        power = multiply(power, power);
        inverse = multiply(inverse, power);
        bit += 1;
    }
    let mut table = [inverse; 20];
    let mut index = 1;
    while index < table.len() {
        table[index] = multiply(table[index - 1], table[index - 1]);
        index += 1;
    }
    table
};

/// x to the power of minus `exponent`, which is below 2^20.
fn inverse_power(exponent: u32) -> u32 {
    let bits = (0..INVERSE_POWERS.len()).filter(|bit| exponent >> bit & 1 == 1);
    bits.fold(ONE, |power, bit| multiply(power, INVERSE_POWERS[bit]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_polynomial_times_its_inverse_is_one() {
        let x = ONE >> 1;
        assert_eq!(multiply(x, INVERSE_POWERS[0]), ONE);
        let square = multiply(multiply(x, x), INVERSE_POWERS[1]);
        assert_eq!(square, ONE);
    }

    #[test]
    fn the_identification_is_found_from_the_crc_and_only_if_there_is_one() {
        let flow = Flow {
            source: "10.0.0.1".parse().expect("an address"),
            destination: "10.0.0.2".parse().expect("an address"),
            source_port: 49152,
        };
        for length in [12, 16, 28, 1040, 4112, 65000] {
            let body: Vec<u8> = (0..length).map(|at| (at * 7 % 251) as u8).collect();
            let computed = flow.icrc(0, &[&body]);
            for identification in [0, 1, 0x1234, 0xffff] {
                let found = flow.icrc(identification, &[&body]);
                assert_eq!(flow.solve(length, (0, computed), found), Some(identification));
                assert_eq!(flow.solve(length, (0, computed), found ^ 0x0001_0000), None, "{length} bytes");
            }
        }
    }

    #[test]
    fn what_a_router_changes_does_not_change_the_crc() {
        let flow = Flow {
            source: "fd00::1".parse().expect("an address"),
            destination: "fd00::2".parse().expect("an address"),
            source_port: 49152,
        };
        let mut body = [0x11_u8; 64];
        let before = flow.icrc(0, &[&body]);
        body[4] = 0xc0;
        assert_eq!(flow.icrc(0, &[&body]), before, "the congestion bits are covered");
        body[5] ^= 1;
        assert_ne!(flow.icrc(0, &[&body]), before);
    }
}
