//! How the host names its devices and their IOMMU groups.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Where a PCI function is, written `0000:00:01.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PciAddress {
    /// Segment group, which Linux calls domain.
    pub segment: u32,
    /// Bus.
    pub bus: u8,
    /// Device on the bus, below 32.
    pub device: u8,
    /// Function of the device, below 8.
    pub function: u8,
}

/// Text that is not a PCI address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a PCI address; one looks like 0000:00:01.0")]
pub struct BadAddress {
    /// The text.
    pub text: String,
}

impl FromStr for PciAddress {
    type Err = BadAddress;

    fn from_str(text: &str) -> Result<Self, BadAddress> {
        let parse = || {
            let (segment, rest) = text.split_once(':')?;
            let (bus, rest) = rest.split_once(':')?;
            let (device, function) = rest.split_once('.')?;
            let hex = |digits: &str, most: u32| {
                let plain = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
                u32::from_str_radix(digits, 16).ok().filter(|number| plain && *number <= most)
            };
            let byte = |digits, most| hex(digits, most).and_then(|number| u8::try_from(number).ok());
            Some(Self {
                segment: hex(segment, u32::MAX)?,
                bus: byte(bus, 0xff)?,
                device: byte(device, 0x1f)?,
                function: byte(function, 7)?,
            })
        };
        parse().ok_or_else(|| BadAddress { text: text.to_owned() })
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { segment, bus, device, function } = self;
        write!(f, "{segment:04x}:{bus:02x}:{device:02x}.{function}")
    }
}

/// An IOMMU group: devices that the IOMMU cannot tell apart, which change hands together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VfioGroup(pub u32);

impl VfioGroup {
    /// The file that stands for it.
    #[must_use]
    pub fn path(self) -> PathBuf {
        PathBuf::from(format!("/dev/vfio/{}", self.0))
    }

    /// The group of a device; `None` if there is no such device, or no IOMMU translates for it.
    #[must_use]
    pub fn of(device: PciAddress) -> Option<Self> {
        let link = std::fs::read_link(format!("/sys/bus/pci/devices/{device}/iommu_group")).ok()?;
        link.file_name()?.to_str()?.parse().ok().map(Self)
    }
}

impl fmt::Display for VfioGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_reads_back_as_it_was_written_and_nothing_else_is_one() {
        for text in ["0000:00:01.0", "10000:ff:1f.7", "0001:a0:00.3"] {
            assert_eq!(text.parse::<PciAddress>().expect(text).to_string(), text);
        }
        let bad = ["", "00:01.0", "0000:00:20.0", "0000:00:01.8", "0000:100:01.0", "0000:+1:01.0", "../../x"];
        for text in bad {
            assert_eq!(text.parse::<PciAddress>(), Err(BadAddress { text: text.to_owned() }));
        }
    }

    #[test]
    fn a_device_that_is_not_there_has_no_group() {
        assert_eq!(VfioGroup::of("fffffff0:00:00.0".parse().expect("well formed")), None);
    }
}
