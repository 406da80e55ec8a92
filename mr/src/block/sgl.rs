//! Scatter-gather lists (NVM Express Base Specification 2.1, 4.3.2 "Scatter Gather List").
//!
//! A descriptor says address and length, so memory of any size and place can be said. The command holds one descriptor:
//! the data itself if it is one block; else where a segment of descriptors is. The last descriptor of a segment says where
//! the next segment is, and whether that is the last one.

use crate::dma::page_size::DmaRange;
use hw_model::addr::DmaAddr;

/// Bytes of a descriptor.
pub const DESCRIPTOR: usize = 16;
/// Bytes of the memory that a segment may fill: a page of the controller.
pub const SEGMENT: usize = 4096;
/// Descriptors of a full segment.
const FULL: usize = SEGMENT / DESCRIPTOR;

/// What a descriptor describes, as the code in its upper nibble; the sub type in the lower is "address".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum DescriptorKind {
    /// Data.
    DataBlock = 0x0,
    /// A segment of descriptors, the last of which says where the next segment is.
    Segment = 0x2,
    /// The last segment.
    LastSegment = 0x3,
}

/// One descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// What it describes.
    pub kind: DescriptorKind,
    /// Where that is.
    pub dma: DmaAddr,
    /// Its bytes.
    pub length: u32,
}

impl Descriptor {
    /// As the controller reads it.
    #[must_use]
    pub fn to_bytes(self) -> [u8; DESCRIPTOR] {
        let mut bytes = [0; DESCRIPTOR];
        bytes[..8].copy_from_slice(&self.dma.0.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[15] = (self.kind as u8) << 4;
        bytes
    }

    /// What the controller makes of the bytes; `None` if it is none of the kinds here or has reserved bits set.
    #[must_use]
    pub fn from_bytes(bytes: [u8; DESCRIPTOR]) -> Option<Self> {
        let [a, b, c, d, e, f, g, h, k, l, m, n, 0, 0, 0, code] = bytes else { return None };
        let kind = match code {
            0x00 => DescriptorKind::DataBlock,
            0x20 => DescriptorKind::Segment,
            0x30 => DescriptorKind::LastSegment,
            _ => return None,
        };
        let dma = DmaAddr(u64::from_le_bytes([a, b, c, d, e, f, g, h]));
        Some(Self { kind, dma, length: u32::from_le_bytes([k, l, m, n]) })
    }
}

/// Why memory cannot be said as an SGL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SglError {
    /// There is no byte.
    #[error("a request without data has no SGL")]
    Empty,
    /// More than the controller moves in one command.
    #[error("{bytes:#x} bytes, the controller moves at most {max:#x} in a command (MDTS)")]
    TooLong {
        /// Of the request.
        bytes: u64,
        /// Of the controller.
        max: u64,
    },
    /// Too few pages for the segments, or one that is not a page.
    #[error("the list needs {needed} segments of {SEGMENT} bytes, {given} were given")]
    Segments {
        /// Segments needed.
        needed: usize,
        /// Pages, aligned, among those given.
        given: usize,
    },
}

/// The data of one command as descriptors, before it is known where they will be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SglPlan {
    blocks: Vec<Descriptor>,
    bytes: u64,
}

/// What goes into the command, and into the memory of the segments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sgl {
    /// The descriptor in the command.
    pub first: Descriptor,
    /// The segments: where each is, and its descriptors.
    pub segments: Vec<(DmaAddr, Vec<Descriptor>)>,
}

impl SglPlan {
    /// The descriptors for `ranges` on a controller that moves at most `max_bytes` a command. Longer ranges than a
    /// descriptor can say take several.
    ///
    /// # Errors
    /// See [`SglError`].
    pub fn new(ranges: impl IntoIterator<Item = DmaRange>, max_bytes: u64) -> Result<Self, SglError> {
        // A multiple of every page size, so that the pieces of a long range stay aligned.
        const LONGEST: u64 = 1 << 31;
        let mut plan = Self { blocks: Vec::new(), bytes: 0 };
        for DmaRange { dma, len } in ranges.into_iter().filter(|range| range.len > 0) {
            plan.bytes = plan.bytes.saturating_add(len);
            if plan.bytes > max_bytes {
                return Err(SglError::TooLong { bytes: plan.bytes, max: max_bytes });
            }
            let mut done = 0;
            while done < len {
                let length = (len - done).min(LONGEST) as u32;
                let kind = DescriptorKind::DataBlock;
                plan.blocks.push(Descriptor { kind, dma: dma.offset(done), length });
                done += u64::from(length);
            }
        }
        if plan.blocks.is_empty() { Err(SglError::Empty) } else { Ok(plan) }
    }

    /// Bytes of the data.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The data blocks.
    #[must_use]
    pub fn blocks(&self) -> &[Descriptor] {
        &self.blocks
    }

    /// Segments that the descriptors take, a page of 4 KiB each: none if the command holds the only one.
    #[must_use]
    pub fn segments(&self) -> usize {
        match self.blocks.len() {
            0 | 1 => 0,
            // Every segment but the last gives up a place to say where the next is.
            blocks => 1 + blocks.saturating_sub(FULL).div_ceil(FULL - 1),
        }
    }

    /// The list with its segments in `pages`, pages of 4 KiB that the controller can reach, of which as many as
    /// [`SglPlan::segments`] says are used.
    ///
    /// # Errors
    /// [`SglError::Segments`].
    pub fn build(&self, pages: &[DmaAddr]) -> Result<Sgl, SglError> {
        let needed = self.segments();
        let given = pages.iter().take_while(|page| page.is_aligned(SEGMENT as u64)).count();
        if given < needed {
            return Err(SglError::Segments { needed, given });
        }
        if needed == 0 {
            return Ok(Sgl { first: self.blocks[0], segments: Vec::new() });
        }
        // From the last back, as each says how long the one after it is.
        let mut segments = Vec::with_capacity(needed);
        let mut after: Option<Descriptor> = None;
        for (number, at) in pages[..needed].iter().enumerate().rev() {
            let from = number * (FULL - 1);
            let to = if after.is_some() { from + FULL - 1 } else { self.blocks.len() };
            let mut descriptors = self.blocks[from..to].to_vec();
            descriptors.extend(after);
            let kind = if after.is_some() { DescriptorKind::Segment } else { DescriptorKind::LastSegment };
            let length = (descriptors.len() * DESCRIPTOR) as u32;
            after = Some(Descriptor { kind, dma: *at, length });
            segments.push((*at, descriptors));
        }
        segments.reverse();
        let first = after.expect("there is a segment");
        Ok(Sgl { first, segments })
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
