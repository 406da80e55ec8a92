//! What a device is like: its name, its place, and the limits of its DMA.

use super::fabric::Translation;
use super::topology::PortId;
use crate::addr::{DmaAddr, Iova};
use crate::iommu::Domain;
use crate::sync::Arc;

/// The limits of a device's DMA (`struct device_dma_parameters`, and the DMA mask).
///
/// The bus refuses addresses beyond the mask: the device has no wires for them. Segment and boundary bind software, which
/// cuts what it hands to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaLimits {
    /// Bits of an address that the device can put on the bus: 1 to 64 (`dma_set_mask`).
    pub mask_bits: u32,
    /// Bytes of the longest contiguous piece that the device takes (`dma_set_max_seg_size`).
    pub max_segment: u64,
    /// No piece may cross a multiple of this, a power of two; 0 is no such limit (`dma_set_seg_boundary`, as a size
    /// instead of a mask).
    pub boundary: u64,
}

impl Default for DmaLimits {
    /// As RDMA devices set theirs: 64 bits, segments of 2 GiB, no boundary.
    fn default() -> Self {
        Self { mask_bits: 64, max_segment: 2 << 30, boundary: 0 }
    }
}

impl DmaLimits {
    /// The highest address that the device reaches.
    #[must_use]
    pub fn last(&self) -> Iova {
        Iova(self.mask())
    }

    pub(crate) fn mask(&self) -> u64 {
        u64::MAX.checked_shr(64_u32.saturating_sub(self.mask_bits)).unwrap_or(0)
    }

    /// Whether the device reaches all of `len` bytes at `at`.
    #[must_use]
    pub fn reaches(&self, at: DmaAddr, len: u64) -> bool {
        at.checked_add(len.saturating_sub(1)).is_some_and(|last| last.0 <= self.mask())
    }

    /// Bytes from `at` on that can be one piece, `len` at most.
    #[must_use]
    pub fn piece(&self, at: DmaAddr, len: u64) -> u64 {
        let to_boundary = match self.boundary {
            0 => u64::MAX,
            boundary => boundary - (at.0 & (boundary - 1)),
        };
        len.min(self.max_segment).min(to_boundary)
    }
}

/// A device to be attached.
#[derive(Clone, Debug)]
pub struct DeviceSpec {
    pub(super) name: String,
    pub(super) under: Option<PortId>,
    pub(super) translation: Translation,
    pub(super) limits: DmaLimits,
    pub(super) trusted: bool,
}

impl DeviceSpec {
    /// A trusted device without an IOMMU, on a root port of its own.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            under: None,
            translation: Translation::None,
            limits: DmaLimits::default(),
            trusted: true,
        }
    }
    /// Below this root port or switch downstream port.
    #[must_use]
    pub fn under(self, port: PortId) -> Self {
        Self { under: Some(port), ..self }
    }
    /// Behind this.
    #[must_use]
    pub fn translation(self, translation: Translation) -> Self {
        Self { translation, ..self }
    }
    /// Behind an IOMMU, in this domain.
    #[must_use]
    pub fn domain(self, domain: &Arc<Domain>) -> Self {
        self.translation(Translation::Domain(Arc::clone(domain)))
    }
    /// With these limits.
    #[must_use]
    pub fn limits(self, limits: DmaLimits) -> Self {
        Self { limits, ..self }
    }
    /// Not trusted with what else lies in an IO page (`dev_is_untrusted`: behind an external port).
    #[must_use]
    pub fn untrusted(self) -> Self {
        Self { trusted: false, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_is_the_last_address_the_device_reaches() {
        let limits = DmaLimits { mask_bits: 32, ..DmaLimits::default() };
        assert_eq!(limits.last(), Iova(0xffff_ffff));
        assert!(limits.reaches(DmaAddr(0xffff_f000), 0x1000));
        assert!(!limits.reaches(DmaAddr(0xffff_f000), 0x1001));
        assert_eq!(DmaLimits::default().last(), Iova(u64::MAX));
        assert!(!DmaLimits::default().reaches(DmaAddr(u64::MAX), 2), "past the top of the address space");
    }

    #[test]
    fn pieces_end_at_boundaries_and_at_the_longest_segment() {
        let limits = DmaLimits { max_segment: 0x3000, boundary: 0x1_0000, ..DmaLimits::default() };
        assert_eq!(limits.piece(DmaAddr(0x1_0000), 0x10_0000), 0x3000);
        assert_eq!(limits.piece(DmaAddr(0x1_f000), 0x10_0000), 0x1000);
        assert_eq!(limits.piece(DmaAddr(0x1_f000), 0x800), 0x800);
    }
}
