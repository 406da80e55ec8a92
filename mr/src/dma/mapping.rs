//! The two-step DMA API: reserve IOVA once, then link, sync and unlink pieces of it, then free.
//!
//! The contract is that of include/linux/dma-mapping.h (`dma_iova_try_alloc`, `_link`, `_sync`, `_unlink`, `_free`),
//! with what the kernel leaves to its callers checked here: bounds, alignment, links over live links, unlinking of
//! holes and of parts, and freeing while something is linked.
//!
//! A device that nothing translates for has no mapping: [`Mapping::try_alloc`] answers `None`, nothing is reserved and
//! nothing is stored, and DMA addresses are physical addresses.

use super::device::DmaDevice;
use super::iova::{IovaError, IovaRange};
use super::points;
use super::space::IoSpace;
use hw_model::addr::{DmaAddr, Iova, PAGE_SIZE, PhysAddr};
use hw_model::iommu::{LeafSize, MapError, Prot, UnmapError};
use hw_model::sync::Arc;
use hw_model::sync::atomic::{AtomicU64, Ordering};

/// A reserved range of IOVA and what is linked in it. 32 bytes, whatever is linked.
pub struct Mapping {
    device: Arc<DmaDevice>,
    range: IovaRange,
    /// Bytes linked; [`FREED`] once the IOVA is given back.
    linked: AtomicU64,
}

/// No number of linked bytes: they are whole pages.
const FREED: u64 = u64::MAX;

/// An offset and a length that do not lie in the mapping in whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{len:#x} bytes at offset {offset:#x} are not whole pages of a mapping of {reserved:#x} bytes")]
pub struct RangeError {
    /// Offset asked for.
    pub offset: u64,
    /// Bytes asked for.
    pub len: u64,
    /// Bytes of the mapping.
    pub reserved: u64,
}

/// Why a link or sync failed. Nothing of that call stays; earlier links do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// Out of bounds or not in whole pages.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// The IOMMU refused, over a live link for instance.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The flush that makes links usable failed; the caller unlinks what it linked.
    #[error("the IOTLB flush for {iova} failed")]
    Sync {
        /// First IOVA of the batch.
        iova: Iova,
    },
    /// The IOVA was given back.
    #[error("the mapping at {iova} was freed")]
    Freed {
        /// Its first IOVA.
        iova: Iova,
    },
}

/// Why an unlink was refused: always a mistake of the caller. Nothing was unlinked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnlinkError {
    /// Out of bounds or not in whole pages.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// A hole, or part of a unit.
    #[error(transparent)]
    Unmap(#[from] UnmapError),
    /// The IOVA was given back: what is there now is somebody else's.
    #[error("the mapping at {iova} was freed")]
    Freed {
        /// Its first IOVA.
        iova: Iova,
    },
}

/// The IOVA was not given back, because this many bytes are still linked in it (invariant 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{linked:#x} bytes are still linked at {iova}")]
pub struct StillLinked {
    /// First IOVA.
    pub iova: Iova,
    /// Bytes linked.
    pub linked: u64,
}

impl Mapping {
    /// Reserves `len` bytes of IOVA (whole pages). `None` is an ordinary answer: the device has no translating IOMMU.
    ///
    /// `like` is an address that the memory has elsewhere: where the range is large enough for it, the IOVA lies in its
    /// 2 MiB as `like` does, so that large leaves fit.
    ///
    /// # Errors
    /// [`IovaError`] if the space has no such hole, or `len` is 0.
    pub fn try_alloc(device: &Arc<DmaDevice>, len: u64, like: u64) -> Result<Option<Self>, IovaError> {
        let Some(range) = device.reserve(len, like)? else { return Ok(None) };
        Ok(Some(Self { device: Arc::clone(device), range, linked: AtomicU64::new(0) }))
    }

    fn space(&self) -> &dyn IoSpace {
        &**self.device.space().expect("a mapping exists only where something translates")
    }

    /// First IOVA.
    #[must_use]
    pub fn iova(&self) -> Iova {
        self.range.start()
    }
    /// Reserved bytes. Never 0.
    #[must_use]
    #[expect(
        clippy::len_without_is_empty,
        reason = "nothing is reserved empty; what is linked is another question"
    )]
    pub fn len(&self) -> u64 {
        self.range.len()
    }
    /// Bytes linked at the moment.
    #[must_use]
    pub fn linked(&self) -> u64 {
        match self.linked.load(Ordering::Relaxed) {
            FREED => 0,
            linked => linked,
        }
    }
    /// What the device puts on the bus for `offset`.
    #[must_use]
    pub fn dma_address(&self, offset: u64) -> DmaAddr {
        self.iova().offset(offset).to_dma()
    }
    /// Whether the page at `offset` is linked to the page at `phys`.
    #[must_use]
    pub fn leads_to(&self, offset: u64, phys: PhysAddr) -> bool {
        self.space().iova_to_phys(self.iova().offset(offset)) == Some(phys)
    }
    /// Bytes of the unit that is linked at `offset`: what has to be unlinked as a whole. 0 for a hole.
    #[must_use]
    pub fn unit_at(&self, offset: u64) -> u64 {
        self.space().leaf_at(self.iova().offset(offset)).unwrap_or(0)
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), RangeError> {
        let error = RangeError { offset, len, reserved: self.len() };
        let end = offset.checked_add(len).ok_or(error)?;
        let aligned = (offset | len) & (PAGE_SIZE - 1) == 0;
        if len == 0 || !aligned || end > self.len() { Err(error) } else { Ok(()) }
    }

    fn is_freed(&self) -> bool {
        self.linked.load(Ordering::Acquire) == FREED
    }

    /// Counts `len` bytes as linked before they are, so that a free that comes in between refuses.
    fn count(&self, len: u64) -> Result<(), LinkError> {
        let counted = |linked: u64| (linked != FREED).then(|| linked + len);
        match self.linked.fetch_update(Ordering::AcqRel, Ordering::Acquire, counted) {
            Ok(_) => Ok(()),
            Err(_) => Err(LinkError::Freed { iova: self.iova() }),
        }
    }

    /// Allocates what linking `[offset, offset + len)` will need, so that [`Mapping::link`] there does not allocate. For
    /// callers that link under a lock which invalidations take.
    ///
    /// # Errors
    /// [`LinkError::Range`], or no memory for tables.
    pub fn prepare(&self, offset: u64, len: u64) -> Result<(), LinkError> {
        self.check(offset, len)?;
        let iova = self.iova().offset(offset);
        if self.device.points().meet(points::PREPARE).fails() {
            return Err(MapError::OutOfMemory { iova }.into());
        }
        Ok(self.space().prepare(iova, len)?)
    }

    /// Maps physical `[phys, phys + len)` at `offset` in leaves of at most `largest`. Does not flush: call
    /// [`Mapping::sync`] once after a batch, before the device may use it. Fails whole: what this call had mapped is
    /// unmapped again, earlier links stay.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn link(&self, offset: u64, phys: PhysAddr, len: u64, largest: LeafSize) -> Result<(), LinkError> {
        self.check(offset, len)?;
        let iova = self.iova().offset(offset);
        if self.device.points().meet(points::LINK).fails() {
            return Err(MapError::OutOfMemory { iova }.into());
        }
        self.count(len)?;
        // Both directions always: the page list decides what the device may do, so that a permission upgrade of the
        // same page touches nothing here (mm/hmm.c maps DMA_BIDIRECTIONAL for the same reason).
        let mapped = self.space().map(iova, phys, len, Prot::READ | Prot::WRITE, largest);
        if mapped.is_err() {
            self.linked.fetch_sub(len, Ordering::AcqRel);
        }
        Ok(mapped?)
    }

    /// Makes everything linked in `[offset, offset + len)` usable by the device: once a batch.
    ///
    /// # Errors
    /// See [`LinkError`]. The caller then unlinks.
    pub fn sync(&self, offset: u64, len: u64) -> Result<(), LinkError> {
        self.check(offset, len)?;
        let iova = self.iova().offset(offset);
        if self.is_freed() {
            return Err(LinkError::Freed { iova: self.iova() });
        }
        if self.device.points().meet(points::SYNC).fails() {
            return Err(LinkError::Sync { iova });
        }
        self.space().sync_map(iova, len);
        Ok(())
    }

    /// Takes down exactly what was linked in `[offset, offset + len)` and flushes the IOTLB at once. The device must not
    /// be using it any more.
    ///
    /// # Errors
    /// See [`UnlinkError`].
    pub fn unlink(&self, offset: u64, len: u64) -> Result<(), UnlinkError> {
        self.check(offset, len)?;
        if self.is_freed() {
            return Err(UnlinkError::Freed { iova: self.iova() });
        }
        let gather = self.space().unmap(self.iova().offset(offset), len)?;
        #[cfg(feature = "planted-bugs")]
        let gather = if hw_model::planted::Bug::IovaBeforeFlush.is_planted() {
            hw_model::iommu::Gather::EMPTY
        } else {
            gather
        };
        self.space().flush(gather);
        self.linked.fetch_sub(len, Ordering::AcqRel);
        Ok(())
    }

    /// Gives the IOVA back. What is linked must have been unlinked. A second call does nothing.
    ///
    /// # Errors
    /// [`StillLinked`]; the mapping stays.
    pub fn free(&self) -> Result<(), StillLinked> {
        match self.linked.compare_exchange(0, FREED, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => self.device.give_back(self.range),
            Err(FREED) => {}
            Err(linked) => return Err(StillLinked { iova: self.iova(), linked }),
        }
        Ok(())
    }
}

impl Drop for Mapping {
    /// IOVA with something linked in it is lost rather than given to somebody else.
    fn drop(&mut self) {
        if let Err(error) = self.free() {
            tracing::error!(%error, "mapping dropped while linked; its IOVA is not used again");
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
