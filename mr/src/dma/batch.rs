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
use hw_model::addr::{DmaAddr, PAGE_SIZE, PhysAddr};
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
    /// The memory there would have to be bounced, which is not done for several extents as one.
    #[error("the memory at offset {at:#x} would be bounced")]
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

/// A part of the mapping that was linked in one piece.
#[derive(Clone, Copy, Debug)]
struct Link {
    offset: u64,
    len: u64,
}

/// Extents that are mapped for a device. Dropping it unmaps them: the device must be done with them.
pub struct Batch {
    mapping: Option<Mapping>,
    links: Vec<Link>,
    ranges: Vec<MappedRange>,
}

/// Where in the reservation the first byte of `segment` goes if `end` bytes are taken: a granule begins there as in memory.
/// What meets the segment before it on a granule continues it.
fn place(segment: &Segment, end: u64, granule: u64) -> u64 {
    end.next_multiple_of(granule) + (segment.phys.0 & (granule - 1))
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
        if let Some(Segment { at, .. }) = segments.iter().find(|segment| segment.path == Path::Bounce) {
            return Err(BatchError::Bounce { at: *at });
        }
        let granule = granule(device);
        let linked = || segments.iter().filter(|segment| segment.path.is_linked());
        let taken = linked().fold(0, |end, segment| place(segment, end, granule) + segment.len);
        let mut batch = Self { mapping: None, links: Vec::new(), ranges: Vec::new() };
        if let Some(first) = linked().next() {
            let like = first.phys.0 & !(granule - 1);
            batch.mapping = Mapping::try_alloc(device, taken.next_multiple_of(granule), like)?;
        }
        let limits = device.port().map_or_else(DmaLimits::default, |port| *port.limits());
        let mut end = 0;
        for segment in &segments {
            let dma = if segment.path.is_linked() {
                let at = place(segment, end, granule);
                end = at + segment.len;
                batch.link(segment, at, granule)?
            } else {
                segment.unlinked_address(segment.at)
            };
            batch.push(segment, dma, &limits);
        }
        if let Some(mapping) = &batch.mapping {
            mapping.sync(0, mapping.len())?;
        }
        Ok(batch)
    }

    /// Links the granules that hold `segment`, whose first byte goes to offset `at` of the reservation.
    fn link(&mut self, segment: &Segment, at: u64, granule: u64) -> Result<DmaAddr, LinkError> {
        let mapping = self.mapping.as_ref().expect("where a path is linked, something translates");
        let into = at & (granule - 1);
        let link = Link { offset: at - into, len: (into + segment.len).next_multiple_of(granule) };
        let phys = PhysAddr(segment.phys.0 - into);
        mapping.link(link.offset, phys, link.len, LeafSize::Huge)?;
        self.links.push(link);
        Ok(mapping.dma_address(at))
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
        let Some(mapping) = &self.mapping else { return };
        for Link { offset, len } in self.links.drain(..) {
            if let Err(error) = mapping.unlink(offset, len) {
                tracing::error!(%error, "a batch could not unlink what it linked");
            }
        }
    }
}

/// What links are multiples of.
fn granule(device: &DmaDevice) -> u64 {
    device.space().map_or(PAGE_SIZE, |space| PAGE_SIZE.max(1 << space.granule_shift()))
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
