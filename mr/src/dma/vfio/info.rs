//! What a container says of its IOMMU: which addresses can be mapped, in which sizes, and how often.

use hw_model::addr::Iova;

/// `VFIO_IOMMU_INFO_CAPS`: there is a chain of capabilities.
const HAS_CAPABILITIES: u32 = 1 << 1;
/// Offset of the chain's beginning in struct vfio_iommu_type1_info.
const CHAIN: usize = 16;
const CAP_IOVA_RANGE: u16 = 1;
const CAP_DMA_AVAILABLE: u16 = 3;
/// Capabilities that are looked at before a chain is taken for a circle.
const MOST_CAPABILITIES: usize = 64;

/// The answer of `VFIO_IOMMU_GET_INFO`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IommuInfo {
    /// Sizes of IO pages in bytes, one bit each: bit 12 is 4 KiB.
    pub page_sizes: u64,
    /// The addresses that can be mapped, first and last of each range, in ascending order. What the devices of the group
    /// must not have mapped, such as the window of interrupts, is left out.
    pub ranges: Vec<(Iova, Iova)>,
    /// Mappings that can still be made: the limit is the parameter `dma_entry_limit` of the kernel module
    /// vfio_iommu_type1. `None` from kernels before 5.10.
    pub entries_left: Option<u32>,
}

/// An answer that does not parse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InfoError {
    /// A field or capability lies past the end.
    #[error("a field at {offset} of an answer of {size} bytes")]
    Truncated {
        /// Where the field should be.
        offset: usize,
        /// Bytes of the answer.
        size: usize,
    },
    /// The chain of capabilities does not end.
    #[error("a chain of more than {MOST_CAPABILITIES} capabilities")]
    Endless,
    /// Which addresses can be mapped is not said: the kernel is older than 5.4.
    #[error("the kernel does not say which addresses can be mapped; 5.4 and later do")]
    NoRanges,
}

fn field<const N: usize>(bytes: &[u8], offset: usize) -> Result<[u8; N], InfoError> {
    let truncated = InfoError::Truncated { offset, size: bytes.len() };
    let end = offset.checked_add(N).ok_or(truncated)?;
    bytes.get(offset..end).and_then(|field| field.try_into().ok()).ok_or(truncated)
}
fn u16_at(bytes: &[u8], offset: usize) -> Result<u16, InfoError> {
    field(bytes, offset).map(u16::from_ne_bytes)
}
fn u32_at(bytes: &[u8], offset: usize) -> Result<u32, InfoError> {
    field(bytes, offset).map(u32::from_ne_bytes)
}
fn u64_at(bytes: &[u8], offset: usize) -> Result<u64, InfoError> {
    field(bytes, offset).map(u64::from_ne_bytes)
}

impl IommuInfo {
    /// Reads struct vfio_iommu_type1_info and the capabilities behind it.
    ///
    /// # Errors
    /// See [`InfoError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, InfoError> {
        let mut info = Self { page_sizes: u64_at(bytes, 8)?, ranges: Vec::new(), entries_left: None };
        let mut at = 0;
        if u32_at(bytes, 4)? & HAS_CAPABILITIES != 0 {
            at = u32_at(bytes, CHAIN)? as usize;
        }
        let mut seen = 0;
        while at != 0 {
            seen += 1;
            if seen > MOST_CAPABILITIES {
                return Err(InfoError::Endless);
            }
            match u16_at(bytes, at)? {
                CAP_IOVA_RANGE => info.ranges = ranges(bytes, at)?,
                CAP_DMA_AVAILABLE => info.entries_left = Some(u32_at(bytes, at + 8)?),
                _ => {}
            }
            at = u32_at(bytes, at + 4)? as usize;
        }
        if info.ranges.is_empty() { Err(InfoError::NoRanges) } else { Ok(info) }
    }

    /// log2 of the smallest IO page.
    #[must_use]
    pub fn granule_shift(&self) -> u32 {
        self.page_sizes.trailing_zeros()
    }

    /// Bits of the highest address that can be mapped, at most `most`.
    #[must_use]
    pub fn width(&self, most: u32) -> u32 {
        let last = self.ranges.iter().map(|(_, last)| last.0).max().unwrap_or(0);
        (u64::BITS - last.leading_zeros()).min(most)
    }

    /// The gaps between the ranges below `1 << width`: start and bytes of each.
    #[must_use]
    pub fn holes(&self, width: u32) -> Vec<(Iova, u64)> {
        let end = 1u64 << width;
        let mut holes = Vec::new();
        let mut next = 0;
        for &(first, last) in &self.ranges {
            if first.0 > next && next < end {
                holes.push((Iova(next), first.0.min(end) - next));
            }
            next = last.0.saturating_add(1);
        }
        if next < end {
            holes.push((Iova(next), end - next));
        }
        holes
    }
}

fn ranges(bytes: &[u8], at: usize) -> Result<Vec<(Iova, Iova)>, InfoError> {
    let count = u32_at(bytes, at + 8)? as usize;
    let mut ranges = Vec::new();
    for index in 0..count {
        let range = at + 16 + index * 16;
        ranges.push((Iova(u64_at(bytes, range)?), Iova(u64_at(bytes, range + 8)?)));
    }
    ranges.sort_unstable();
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer with these capabilities: id, and what follows the header.
    fn answer(capabilities: &[(u16, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = vec![0; 24];
        bytes[4..8].copy_from_slice(&(1u32 | HAS_CAPABILITIES).to_ne_bytes());
        bytes[8..16].copy_from_slice(&(1u64 << 12 | 1 << 21).to_ne_bytes());
        let mut link = CHAIN;
        for (id, body) in capabilities {
            let at = bytes.len();
            bytes[link..link + 4].copy_from_slice(&(at as u32).to_ne_bytes());
            bytes.extend(id.to_ne_bytes());
            bytes.extend(1u16.to_ne_bytes());
            bytes.extend(0u32.to_ne_bytes());
            bytes.extend(body);
            link = at + 4;
        }
        bytes
    }

    fn ranges_of(ranges: &[(u64, u64)]) -> Vec<u8> {
        let mut body = (ranges.len() as u32).to_ne_bytes().to_vec();
        body.extend([0; 4]);
        for (first, last) in ranges {
            body.extend(first.to_ne_bytes());
            body.extend(last.to_ne_bytes());
        }
        body
    }

    #[test]
    fn ranges_limits_and_sizes_are_read_and_the_gaps_are_what_must_not_be_mapped() {
        let ranges = ranges_of(&[(0xfef0_0000, (1 << 39) - 1), (0x1000, 0xfedf_ffff)]);
        let unknown = (9, vec![1, 2, 3, 4]);
        let available = (CAP_DMA_AVAILABLE, 65_535u32.to_ne_bytes().to_vec());
        let info = IommuInfo::parse(&answer(&[unknown, (CAP_IOVA_RANGE, ranges), available])).expect("whole");
        assert_eq!(info.entries_left, Some(65_535));
        assert_eq!(info.granule_shift(), 12);
        assert_eq!(info.ranges[0], (Iova(0x1000), Iova(0xfedf_ffff)));
        assert_eq!(info.width(48), 39);
        assert_eq!(info.holes(39), [(Iova(0), 0x1000), (Iova(0xfee0_0000), 0x10_0000)]);
        assert_eq!(info.holes(40).last(), Some(&(Iova(1 << 39), 1 << 39)), "what no range holds is a gap");
        assert_eq!(info.holes(12), [(Iova(0), 0x1000)], "gaps end with the space");
    }

    #[test]
    fn a_range_to_the_top_leaves_no_gap_above() {
        let info =
            IommuInfo::parse(&answer(&[(CAP_IOVA_RANGE, ranges_of(&[(0, u64::MAX)]))])).expect("whole");
        assert_eq!((info.width(48), info.holes(48)), (48, vec![]));
    }

    #[test]
    fn answers_that_are_cut_endless_or_silent_are_refused_and_never_a_panic() {
        assert_eq!(IommuInfo::parse(&answer(&[])), Err(InfoError::NoRanges));
        let whole = answer(&[(CAP_IOVA_RANGE, ranges_of(&[(0, 1)]))]);
        for cut in 0..whole.len() {
            let refused = IommuInfo::parse(&whole[..cut]);
            assert!(matches!(refused, Err(InfoError::Truncated { .. })), "{cut}: {refused:?}");
        }
        let mut circle = whole;
        circle[28..32].copy_from_slice(&24u32.to_ne_bytes());
        assert_eq!(IommuInfo::parse(&circle), Err(InfoError::Endless));
    }
}
