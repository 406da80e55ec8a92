//! The slow path of a mapping in which something bounced (`dma_iova_link` with swiotlb,
//! `iommu_dma_iova_unlink_range_slow` in drivers/iommu/dma-iommu.c).
//!
//! Every bounced IO page has a buffer of its own, parked in the pool, which the IOMMU's leaf finds again: nothing is stored
//! beside the table but one sticky bit.

use super::{BOUNCED, LinkError, Mapping, Span, UnlinkError};
use crate::dma::bounce::{BounceError, Bouncer, SyncDirection};
use crate::dma::points;
use crate::dma::segments::Segment;
use hw_model::addr::{Iova, PhysAddr};
use hw_model::hca::Path;
use hw_model::iommu::{Gather, LeafSize, Prot};
use hw_model::sync::atomic::Ordering;

impl Mapping {
    /// Links a segment at its place in what is mapped, by its path: as memory, as MMIO, through bounce buffers. A segment
    /// whose path is not linked is left a hole.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn link_segment(&self, segment: &Segment, largest: LeafSize) -> Result<(), LinkError> {
        let Segment { at, phys, len, .. } = *segment;
        match segment.path {
            Path::Iova => self.link(at, phys, len, largest),
            Path::HostBridge => self.link_mmio(at, phys, len, largest),
            Path::Bounce => self.link_bounced(at, phys, len),
            Path::Direct | Path::BusAddress => Ok(()),
        }
    }

    /// As [`Mapping::link`], through bounce buffers: the device gets a copy of the memory as it is now, and
    /// [`Mapping::sync_for_device`] and [`Mapping::sync_for_cpu`] say when to copy again.
    ///
    /// # Errors
    /// See [`LinkError`]; [`LinkError::Bounce`] if the pool is full or there is none.
    pub fn link_bounced(&self, offset: u64, phys: PhysAddr, len: u64) -> Result<(), LinkError> {
        let span = self.check(offset, len)?;
        self.page_of(offset, phys)?;
        let bouncer = self.device.bouncer().ok_or(BounceError::NoPool)?;
        self.meet(points::LINK, span.iova)?;
        self.count(span.len, BOUNCED)?;
        let (granule, mut done) = (self.granule(), 0);
        let mut linked = Span { iova: span.iova, len: 0 };
        while done < len {
            let at = phys.offset(done);
            let piece = (granule - (at.0 & (granule - 1))).min(len - done);
            if let Err(error) = self.bounce_page(bouncer, span.iova.offset(linked.len), at, piece) {
                self.take_down(linked);
                self.uncount(span.len);
                return Err(error);
            }
            linked.len += granule;
            done += piece;
        }
        Ok(())
    }

    /// Leads one IO page to a buffer with `len` bytes of `phys`.
    fn bounce_page(&self, bouncer: &Bouncer, iova: Iova, phys: PhysAddr, len: u64) -> Result<(), LinkError> {
        if self.device.points().meet(points::BOUNCE).fails() {
            return Err(BounceError::Held.into());
        }
        let page = bouncer.bring(phys, len, self.granule())?;
        let mapped = self.space().map(iova, page, self.granule(), Prot::READ_WRITE, LeafSize::Page);
        if mapped.is_err() {
            bouncer.release(page, false)?;
        }
        Ok(mapped?)
    }

    fn take_down(&self, linked: Span) {
        if linked.len > 0 {
            let gather = self.unmap_bounced(linked, false).expect("what this call linked is there to unlink");
            self.space().flush(gather);
        }
    }

    /// Unmaps `span`, which consists of whole leaves. Bounced pages are flushed one by one, because their buffers go back
    /// at once; what it gives is for the others.
    pub(super) fn unmap_bounced(&self, span: Span, mut copy: bool) -> Result<Gather, UnlinkError> {
        let (space, bouncer) = (self.space(), self.device.bouncer());
        let end = span.iova.0 + span.len;
        let whole =
            |at: u64| space.leaf_at(Iova(at)).filter(|leaf| at.is_multiple_of(*leaf) && *leaf <= end - at);
        let mut at = span.iova.0;
        while at < end {
            let Some(leaf) = whole(at) else {
                // A hole or part of a leaf. The space says which, and unmaps nothing.
                return Ok(space.unmap(span.iova, span.len)?);
            };
            at += leaf;
        }
        let mut gather = Gather::EMPTY;
        at = span.iova.0;
        while at < end {
            let iova = Iova(at);
            let leaf = whole(at).expect("looked at above; links of disjoint ranges do not touch it");
            let page = space.iova_to_phys(iova);
            let unmapped = space.unmap(iova, leaf)?;
            match (bouncer, page) {
                (Some(bouncer), Some(page)) if bouncer.holds(page) => {
                    space.flush(unmapped);
                    // Waiting once is enough: whoever holds DMA up is changing the memory.
                    copy &= bouncer.release(page, copy) != Err(BounceError::Held);
                }
                _ => gather = gather.merge(unmapped),
            }
            at += leaf;
        }
        Ok(gather)
    }

    /// Whether something in it bounced at some time: then the sync calls matter, and unlinking copies.
    #[must_use]
    pub fn has_bounced(&self) -> bool {
        self.word.load(Ordering::Relaxed) & BOUNCED != 0
    }

    /// Copies what the device wrote to bounced pages of `[offset, offset + len)` to the memory they stand for
    /// (`dma_sync_single_for_cpu`). Does nothing where nothing bounced. Who unlinks the same pages at the same time does not
    /// know whether they were copied before.
    ///
    /// # Errors
    /// [`LinkError::Range`], [`LinkError::Bounce`]; a part may have been copied.
    pub fn sync_for_cpu(&self, offset: u64, len: u64) -> Result<(), LinkError> {
        self.copy(offset, len, SyncDirection::ForCpu)
    }

    /// Copies what the CPU wrote to the memory that bounced pages of `[offset, offset + len)` stand for to where the device
    /// reads it (`dma_sync_single_for_device`). Does nothing where nothing bounced.
    ///
    /// # Errors
    /// [`LinkError::Range`], [`LinkError::Bounce`]; a part may have been copied.
    pub fn sync_for_device(&self, offset: u64, len: u64) -> Result<(), LinkError> {
        self.copy(offset, len, SyncDirection::ForDevice)
    }

    /// Unlike what is linked, what is copied may begin and end anywhere.
    fn copy(&self, offset: u64, len: u64, direction: SyncDirection) -> Result<(), LinkError> {
        let (granule, reserved) = (self.granule(), self.len());
        let range = super::RangeError { offset, len, reserved, granule };
        let end = offset.checked_add(len).filter(|end| *end <= reserved).ok_or(range)?;
        if self.is_freed() {
            return Err(self.freed());
        }
        if !self.has_bounced() {
            return Ok(());
        }
        let bouncer = self.device.bouncer().ok_or(BounceError::NoPool)?;
        let (mut at, end) = (self.iova.0 + offset, self.iova.0 + end);
        while at < end {
            let page = at & !(granule - 1);
            let next = (page + granule).min(end);
            if let Some(target) =
                self.space().iova_to_phys(Iova(page)).filter(|target| bouncer.holds(*target))
            {
                bouncer.sync(target, at - page, next - page, direction)?;
            }
            at = next;
        }
        Ok(())
    }
}
