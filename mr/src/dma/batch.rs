//! Mapping several extents for one device as one: a block request, the buffers of an RDMA transfer.
//!
//! One reservation of IOVA, one link for each linked segment, ONE sync, and the ranges to hand to the device. Where
//! neighbours meet on granules of the IOMMU they lie behind each other in IOVA and are one range to the device, however
//! scattered the memory is; where they do not, the second begins in a granule of its own, in the same reservation
//! (`blk_rq_dma_map_iter_start` in block/blk-mq-dma.c asks the same question of the merge boundary, once a request). What
//! is reached by bus address takes no IOVA, and a device that nothing translates for reserves and stores nothing.
//!
//! Which way each extent is reached is for [`Segments`] to say.

use super::device::DmaDevice;
use super::extent::Extent;
use super::iova::IovaError;
use super::mapping::{LinkError, Mapping};
use super::page_size::DmaRange;
use super::route::Refusal;
use super::segments::{Segment, Segments};
use hw_model::addr::{DmaAddr, PhysAddr};
use hw_model::bus::DmaLimits;
use hw_model::hca::{Backing, Path};
use hw_model::iommu::LeafSize;
use hw_model::sync::Arc;

/// A range that the device can use, and what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedRange {
    /// Offset of its first byte in what was mapped.
    pub at: u64,
    /// Where it is on the bus.
    pub range: DmaRange,
    /// How DMA reaches it.
    pub path: Path,
    /// What its first byte is made of: one IOVA range may lead to memory of many kinds.
    pub backing: Backing,
}

/// Why extents could not be mapped as one. Nothing of them is mapped then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// There is no extent, or one without a byte.
    #[error("nothing to map at offset {at:#x}")]
    Empty {
        /// Where.
        at: u64,
    },
    /// Extents follow each other without gaps in what is mapped.
    #[error("an extent is for offset {at:#x} where the one before it ends at {end:#x}")]
    NotInOrder {
        /// Offset of the extent.
        at: u64,
        /// Where it should begin.
        end: u64,
    },
    /// The device has no way to the memory there.
    #[error("no way to the memory at offset {at:#x}: {reason}")]
    NoWay {
        /// Offset in what was to be mapped.
        at: u64,
        /// Why.
        reason: Refusal,
    },
    /// The memory there would have to be bounced, but shares its IO pages with no edge of what is mapped, or nothing
    /// translates.
    #[error("the memory at offset {at:#x} would be bounced, and only the edges of an IOVA range are")]
    Bounce {
        /// Offset in what was to be mapped.
        at: u64,
    },
    /// No IOVA.
    #[error(transparent)]
    Iova(#[from] IovaError),
    /// A link or the sync failed.
    #[error(transparent)]
    Link(#[from] LinkError),
}

/// Extents that are mapped for a device. Dropping it unmaps them, and copies back what bounced: the device must be done
/// with them.
pub struct Batch {
    mapping: Option<Mapping>,
    /// Bytes from the start of the mapping that are linked.
    linked: u64,
    ranges: Vec<MappedRange>,
}

/// Where segments go in the reservation, in bytes from the start of its first IO page.
#[derive(Clone, Copy)]
struct Layout {
    granule: u64,
    /// Where in that page the mapping begins.
    inside: u64,
    /// What is taken.
    end: u64,
}

impl Layout {
    /// Takes a place for `segment`, which lies in its IO page there as it does in memory. What meets the segment before it
    /// at the end of an IO page continues it.
    fn place(&mut self, segment: &Segment) -> u64 {
        let start = self.end.next_multiple_of(self.granule) + (segment.phys.0 & (self.granule - 1));
        self.end = start + segment.len;
        start
    }
}

impl Batch {
    /// Maps `extents`, which follow each other without gaps, for `device`. Fails whole: nothing stays mapped.
    ///
    /// # Errors
    /// See [`BatchError`].
    pub fn map<E>(device: &Arc<DmaDevice>, extents: E) -> Result<Self, BatchError>
    where
        E: IntoIterator<Item = Extent, IntoIter: Clone>,
    {
        let extents = extents.into_iter();
        check(extents.clone())?;
        let segments = Segments::new(device, extents);
        let segments: Vec<Segment> =
            segments.collect::<Result<_, _>>().map_err(|(at, reason)| BatchError::NoWay { at, reason })?;
        let mut batch = Self { mapping: None, linked: 0, ranges: Vec::new() };
        let mut layout = batch.reserve(device, &segments)?;
        let limits = device.port().map_or_else(DmaLimits::default, |port| *port.limits());
        for segment in &segments {
            let dma = match &batch.mapping {
                Some(mapping) if segment.path.is_linked() => {
                    let start = layout.place(segment);
                    batch.linked = link(mapping, segment, start, &layout)?;
                    mapping.dma_address(start - layout.inside)
                }
                _ if segment.path.is_linked() => return Err(BatchError::Bounce { at: segment.at }),
                _ => segment.unlinked_address(segment.at),
            };
            batch.push(segment, dma, &limits);
        }
        if let Some(mapping) = &batch.mapping {
            mapping.sync(0, mapping.len())?;
        }
        Ok(batch)
    }

    /// Reserves as much IOVA as `segments` take, if any of them takes any.
    fn reserve(&mut self, device: &Arc<DmaDevice>, segments: &[Segment]) -> Result<Layout, IovaError> {
        let linked = || segments.iter().filter(|segment| segment.path.is_linked());
        let granule = device.space().map_or(1, |space| 1 << space.granule_shift());
        let Some(first) = linked().next() else { return Ok(Layout { granule, inside: 0, end: 0 }) };
        let empty = Layout { granule, inside: first.phys.0 & (granule - 1), end: 0 };
        let mut layout = empty;
        for segment in linked() {
            layout.place(segment);
        }
        self.mapping = Mapping::try_alloc(device, layout.end - layout.inside, first.phys.0)?;
        Ok(empty)
    }

    /// Adds a range, cut where the device wants it cut, or lengthens the last one.
    fn push(&mut self, segment: &Segment, dma: DmaAddr, limits: &DmaLimits) {
        let mut done = 0;
        while done < segment.len {
            let (at, dma) = (segment.at + done, dma.offset(done));
            if let Some(last) = self.ranges.last_mut()
                && last.path == segment.path
                && last.range.dma.checked_add(last.range.len) == Some(dma)
            {
                let room = limits.piece(last.range.dma, u64::MAX).saturating_sub(last.range.len);
                let more = room.min(segment.len - done);
                if more > 0 {
                    last.range.len += more;
                    done += more;
                    continue;
                }
            }
            let len = limits.piece(dma, segment.len - done);
            let range = DmaRange { dma, len };
            self.ranges.push(MappedRange { at, range, path: segment.path, backing: segment.backing });
            done += len;
        }
    }

    /// What the device may use, in order. Ranges that continue each other are one, up to the limits of the device.
    #[must_use]
    pub fn ranges(&self) -> &[MappedRange] {
        &self.ranges
    }

    /// The ranges as the device sees them.
    pub fn dma_ranges(&self) -> impl Iterator<Item = DmaRange> + Clone {
        self.ranges.iter().map(|mapped| mapped.range)
    }

    /// Bytes mapped.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|mapped| mapped.range.len).sum()
    }

    /// Bytes of IOVA reserved: 0 where nothing translates, or nothing needs it.
    #[must_use]
    pub fn reserved(&self) -> u64 {
        self.mapping.as_ref().map_or(0, Mapping::len)
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        if let Some(mapping) = &self.mapping
            && let Err(error) = mapping.destroy(self.linked)
        {
            tracing::error!(%error, "a batch could not take down what it linked");
        }
    }
}

/// Links the IO pages that hold `segment`, at `start` in the layout. Gives how far the mapping is linked then.
fn link(mapping: &Mapping, segment: &Segment, start: u64, layout: &Layout) -> Result<u64, BatchError> {
    let granule = layout.granule;
    // The mapping itself may begin and end inside an IO page; everything else in it is whole ones.
    let from = (start & !(granule - 1)).max(layout.inside) - layout.inside;
    let to = (layout.end.next_multiple_of(granule) - layout.inside).min(mapping.len());
    let (before, len) = (start - layout.inside - from, to - from);
    // What an untrusted device must not see beside the memory is bounced, which the edges of a link are.
    if segment.path == Path::Bounce && len != segment.len {
        return Err(BatchError::Bounce { at: segment.at });
    }
    let phys = PhysAddr(segment.phys.0 - before);
    match segment.path {
        Path::HostBridge => mapping.link_mmio(from, phys, len, LeafSize::Huge)?,
        _ => mapping.link(from, phys, len, LeafSize::Huge)?,
    }
    Ok(to)
}

/// That there is something, without gaps.
fn check(extents: impl Iterator<Item = Extent>) -> Result<(), BatchError> {
    let mut end = None;
    for Extent { at, len, .. } in extents {
        let start = end.unwrap_or(at);
        if len == 0 {
            return Err(BatchError::Empty { at });
        }
        let next = at.checked_add(len).filter(|_| at == start);
        end = Some(next.ok_or(BatchError::NotInOrder { at, end: start })?);
    }
    end.map(|_| ()).ok_or(BatchError::Empty { at: 0 })
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
