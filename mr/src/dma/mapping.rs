//! The two-step DMA API: reserve IOVA once, then link, sync and unlink pieces of it, then free.
//!
//! The contract is that of include/linux/dma-mapping.h (`dma_iova_try_alloc`, `_link`, `_sync`, `_unlink`, `_free`,
//! `_destroy`), with what the kernel leaves to its callers checked here: bounds, alignment, links over live links,
//! unlinking of holes and of parts, freeing while something is linked, and use after that.
//!
//! A device that nothing translates for has no mapping: [`Mapping::try_alloc`] answers `None`, nothing is reserved and
//! nothing is stored, and DMA addresses are physical addresses.
//!
//! A mapping lies in its first IO page as the address it was reserved like, so its first link may begin inside an IO page
//! and its last may end inside one. Every other boundary is that of an IO page.

use super::device::DmaDevice;
use super::iova::{IovaError, IovaRange};
use super::points;
use super::space::IoSpace;
use hw_model::addr::{DmaAddr, Iova, PAGE_SIZE, PhysAddr};
use hw_model::fault_plan::Point;
use hw_model::iommu::{FlushMode, Gather, LeafSize, MapError, Prot};
use hw_model::sync::Arc;
use hw_model::sync::atomic::{AtomicU64, Ordering};

mod bounced;
mod error;

pub use error::{DestroyError, LinkError, RangeError, StillLinked, UnlinkError};

/// A reserved range of IOVA and what is linked in it. 32 bytes, whatever is linked.
pub struct Mapping {
    device: Arc<DmaDevice>,
    /// First IOVA of what is mapped, which may lie inside the first IO page of the range.
    iova: Iova,
    /// The rest of the range: see [`IovaRange::into_parts`].
    extent: u64,
    /// IO pages linked, and above them the fields below.
    word: AtomicU64,
}

// The atomics of a model checker are larger.
#[cfg(not(any(loom, shuttle)))]
const _: () = assert!(size_of::<Mapping>() <= 32, "state of a mapping");

/// IO pages linked.
const LINKED: u64 = (1 << SLACK_SHIFT) - 1;
/// Bytes of the last IO page that are not part of the mapping: 16 bits.
const SLACK_SHIFT: u32 = 40;
const SLACK_MASK: u64 = 0xffff;
/// Something in it bounced at some time. Sticky.
const BOUNCED: u64 = 1 << 62;
/// The IOVA is given back.
const FREED: u64 = 1 << 63;

/// The IO pages that hold a part of a mapping.
#[derive(Clone, Copy)]
struct Span {
    iova: Iova,
    len: u64,
}

impl Mapping {
    /// Reserves IOVA for `len` bytes. `None` is an ordinary answer: the device has no translating IOMMU.
    ///
    /// `like` is an address that the memory has elsewhere: the IOVA lies in its IO page, in its 4 KiB page and, where the
    /// range is large enough for it and there is room, in its 2 MiB or GiB as `like` does, so that large leaves fit.
    ///
    /// # Errors
    /// [`IovaError`] if the space has no such hole, or `len` is 0.
    pub fn try_alloc(device: &Arc<DmaDevice>, len: u64, like: u64) -> Result<Option<Self>, IovaError> {
        let Some(space) = device.space() else { return Ok(None) };
        let granule = 1 << space.granule_shift();
        let inside = like & (granule - 1);
        let Some(whole) = len.checked_add(inside).filter(|_| len > 0) else {
            return Err(IovaError::BadRequest { size: len, align: granule, bits: space.width() });
        };
        let range = device.reserve(whole, like)?;
        let slack = range.len() - whole;
        let (start, extent) = range.into_parts();
        let word = AtomicU64::new(slack << SLACK_SHIFT);
        Ok(Some(Self { device: Arc::clone(device), iova: start.offset(inside), extent, word }))
    }

    fn space(&self) -> &dyn IoSpace {
        &**self.device.space().expect("a mapping exists only where something translates")
    }

    fn range(&self) -> IovaRange {
        let inside = self.iova.0 & (self.granule() - 1);
        IovaRange::from_parts(Iova(self.iova.0 - inside), self.extent)
    }

    /// Bytes of an IO page.
    #[must_use]
    pub fn granule(&self) -> u64 {
        1 << self.space().granule_shift()
    }
    /// First IOVA.
    #[must_use]
    pub fn iova(&self) -> Iova {
        self.iova
    }
    /// Bytes reserved: as many as were asked for.
    #[must_use]
    #[expect(
        clippy::len_without_is_empty,
        reason = "nothing is reserved empty; what is linked is another question"
    )]
    pub fn len(&self) -> u64 {
        let slack = self.word.load(Ordering::Relaxed) >> SLACK_SHIFT & SLACK_MASK;
        let range = self.range();
        range.len() - slack - (self.iova.0 - range.start().0)
    }
    /// Bytes linked at the moment, in whole IO pages.
    #[must_use]
    pub fn linked(&self) -> u64 {
        (self.word.load(Ordering::Relaxed) & LINKED) << self.space().granule_shift()
    }
    /// What the device puts on the bus for `offset`.
    #[must_use]
    pub fn dma_address(&self, offset: u64) -> DmaAddr {
        self.iova.offset(offset).to_dma()
    }
    /// Whether the byte at `offset` is linked to the byte at `phys`, directly or through a bounce buffer.
    #[must_use]
    pub fn leads_to(&self, offset: u64, phys: PhysAddr) -> bool {
        let iova = self.iova.offset(offset);
        let Some(target) = self.space().iova_to_phys(iova) else { return false };
        match self.device.bouncer() {
            Some(bouncer) if bouncer.holds(target) => {
                bouncer.origin_of(target, iova.0 & (self.granule() - 1)) == Some(phys)
            }
            _ => target == phys,
        }
    }
    /// Bytes of the unit that is linked at `offset`: what has to be unlinked as a whole. 0 for a hole.
    #[must_use]
    pub fn unit_at(&self, offset: u64) -> u64 {
        self.space().leaf_at(self.iova.offset(offset)).unwrap_or(0)
    }

    /// The IO pages of `[offset, offset + len)`, which begins and ends with an IO page or with the mapping.
    fn check(&self, offset: u64, len: u64) -> Result<Span, RangeError> {
        let (granule, reserved) = (self.granule(), self.len());
        let error = RangeError { offset, len, reserved, granule };
        let end = offset.checked_add(len).filter(|end| len > 0 && *end <= reserved).ok_or(error)?;
        let is_edge = |at: u64| (self.iova.0 + at) & (granule - 1) == 0;
        if !(offset == 0 || is_edge(offset)) || !(end == reserved || is_edge(end)) {
            return Err(error);
        }
        let (first, last) = (self.iova.0 + offset, self.iova.0 + (end - 1));
        let (first, last) = (first & !(granule - 1), last | (granule - 1));
        Ok(Span { iova: Iova(first), len: last - first + 1 })
    }

    /// The start of the IO page that holds `phys`, if that lies in it as `offset` does in its own.
    fn page_of(&self, offset: u64, phys: PhysAddr) -> Result<PhysAddr, LinkError> {
        let (granule, iova) = (self.granule(), self.iova.offset(offset));
        if (phys.0 ^ iova.0) & (granule - 1) != 0 {
            return Err(LinkError::Unaligned { phys, iova, granule });
        }
        Ok(PhysAddr(phys.0 & !(granule - 1)))
    }

    /// Whether the IOVA was given back: every call but [`Mapping::free`] is refused.
    #[must_use]
    pub fn is_freed(&self) -> bool {
        self.word.load(Ordering::Acquire) & FREED != 0
    }

    fn freed(&self) -> LinkError {
        LinkError::Freed { iova: self.iova }
    }

    fn meet(&self, point: Point, iova: Iova) -> Result<(), LinkError> {
        if self.device.points().meet(point).fails() {
            return Err(MapError::OutOfMemory { iova }.into());
        }
        Ok(())
    }

    /// Counts `len` bytes as linked before they are, so that a free that comes in between refuses. Sets `flags`.
    fn count(&self, len: u64, flags: u64) -> Result<(), LinkError> {
        let pages = len >> self.space().granule_shift();
        let counted = |word: u64| (word & FREED == 0).then(|| (word + pages) | flags);
        match self.word.fetch_update(Ordering::AcqRel, Ordering::Acquire, counted) {
            Ok(_) => Ok(()),
            Err(_) => Err(self.freed()),
        }
    }

    fn uncount(&self, len: u64) {
        self.word.fetch_sub(len >> self.space().granule_shift(), Ordering::AcqRel);
    }

    /// Allocates what linking `[offset, offset + len)` will need, so that [`Mapping::link`] there does not allocate. For
    /// callers that link under a lock which invalidations take.
    ///
    /// # Errors
    /// [`LinkError::Range`], [`LinkError::Freed`], or no memory for tables.
    pub fn prepare(&self, offset: u64, len: u64) -> Result<(), LinkError> {
        let span = self.check(offset, len)?;
        if self.is_freed() {
            return Err(self.freed());
        }
        self.meet(points::PREPARE, span.iova)?;
        Ok(self.space().prepare(span.iova, span.len)?)
    }

    /// Maps physical `[phys, phys + len)` at `offset` in leaves of at most `largest`. Does not flush: call
    /// [`Mapping::sync`] once after a batch, before the device may use it. Fails whole: what this call had mapped is
    /// unmapped again, earlier links stay.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn link(&self, offset: u64, phys: PhysAddr, len: u64, largest: LeafSize) -> Result<(), LinkError> {
        self.link_as(offset, phys, len, largest, Prot::READ_WRITE)
    }

    /// As [`Mapping::link`], for a BAR behind the host bridge (`DMA_ATTR_MMIO`).
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn link_mmio(
        &self,
        offset: u64,
        phys: PhysAddr,
        len: u64,
        largest: LeafSize,
    ) -> Result<(), LinkError> {
        self.link_as(offset, phys, len, largest, Prot::READ_WRITE | Prot::MMIO)
    }

    fn link_as(
        &self,
        offset: u64,
        phys: PhysAddr,
        len: u64,
        largest: LeafSize,
        prot: Prot,
    ) -> Result<(), LinkError> {
        let span = self.check(offset, len)?;
        let page = self.page_of(offset, phys)?;
        self.meet(points::LINK, span.iova)?;
        self.count(span.len, 0)?;
        // Both directions always: the page list decides what the device may do, so that a permission upgrade of the
        // same page touches nothing here (mm/hmm.c maps DMA_BIDIRECTIONAL for the same reason).
        let mapped = self.space().map(span.iova, page, span.len, prot, largest);
        if mapped.is_err() {
            self.uncount(span.len);
        }
        Ok(mapped?)
    }

    /// Maps a page of 4 KiB for each address of `frames`, in order, from `offset` on: one call and one table walk a table
    /// for pages that lie anywhere. As many [`Mapping::link`] calls of one page otherwise, of which all fail if one does.
    ///
    /// # Errors
    /// See [`LinkError`]; [`LinkError::Granule`] if an IO page is larger than 4 KiB.
    pub fn link_scattered<I>(&self, offset: u64, frames: I) -> Result<(), LinkError>
    where
        I: IntoIterator<Item = PhysAddr, IntoIter: ExactSizeIterator>,
    {
        let granule = self.granule();
        if granule > PAGE_SIZE {
            return Err(LinkError::Granule { page: PAGE_SIZE, granule });
        }
        let mut frames = frames.into_iter();
        // More than can be counted is more than any mapping holds.
        let len = (frames.len() as u64).saturating_mul(PAGE_SIZE);
        let span = self.check(offset, len)?;
        if span.len != len {
            // Whole pages fill whole IO pages; a mapping that begins inside one has none at its start.
            return Err(RangeError { offset, len, reserved: self.len(), granule }.into());
        }
        self.meet(points::LINK, span.iova)?;
        self.count(span.len, 0)?;
        let space = self.space();
        let mapped = if granule == PAGE_SIZE {
            space.map_scattered(span.iova, &mut frames, Prot::READ_WRITE)
        } else {
            let pieces =
                move |frame: PhysAddr| (0..PAGE_SIZE / granule).map(move |i| frame.offset(i * granule));
            space.map_scattered(span.iova, &mut frames.flat_map(pieces), Prot::READ_WRITE)
        };
        if mapped.is_err() {
            self.uncount(span.len);
        }
        Ok(mapped?)
    }

    /// Makes everything linked in `[offset, offset + len)` usable by the device: once a batch.
    ///
    /// # Errors
    /// See [`LinkError`]. The caller then unlinks.
    pub fn sync(&self, offset: u64, len: u64) -> Result<(), LinkError> {
        let span = self.check(offset, len)?;
        if self.is_freed() {
            return Err(self.freed());
        }
        if self.device.points().meet(points::SYNC).fails() {
            return Err(LinkError::Sync { iova: span.iova });
        }
        self.space().sync_map(span.iova, span.len);
        Ok(())
    }

    /// Whether a part of a large leaf can be unlinked, after [`Mapping::split`].
    #[must_use]
    pub fn can_split(&self) -> bool {
        self.space().can_split()
    }

    /// Has 512 leaves lead where a large one leads, where `[offset, offset + len)` begins or ends inside one: the part can be
    /// unlinked then, and the rest stays. Devices see no difference.
    ///
    /// # Errors
    /// [`RangeError`].
    pub fn split(&self, offset: u64, len: u64) -> Result<(), RangeError> {
        let span = self.check(offset, len)?;
        self.space().split(span.iova, span.len);
        Ok(())
    }

    /// Takes down exactly what was linked in `[offset, offset + len)` and flushes the IOTLB at once. The device must not
    /// be using it any more. What bounced is copied back.
    ///
    /// # Errors
    /// See [`UnlinkError`].
    pub fn unlink(&self, offset: u64, len: u64) -> Result<(), UnlinkError> {
        self.unlink_span(self.check(offset, len)?, true)
    }

    /// As [`Mapping::unlink`], without copying back what bounced: the device only read, or the memory is going away
    /// (`DMA_ATTR_SKIP_CPU_SYNC`).
    ///
    /// # Errors
    /// See [`UnlinkError`].
    pub fn unlink_and_discard(&self, offset: u64, len: u64) -> Result<(), UnlinkError> {
        self.unlink_span(self.check(offset, len)?, false)
    }

    fn unlink_span(&self, span: Span, copy: bool) -> Result<(), UnlinkError> {
        let gather = self.unmap(span, copy)?;
        self.space().flush(gather);
        self.uncount(span.len);
        Ok(())
    }

    /// Unmaps without flushing, but for what bounced.
    fn unmap(&self, span: Span, copy: bool) -> Result<Gather, UnlinkError> {
        let word = self.word.load(Ordering::Acquire);
        if word & FREED != 0 {
            return Err(UnlinkError::Freed { iova: self.iova });
        }
        let gather = if word & BOUNCED == 0 {
            self.space().unmap(span.iova, span.len)?
        } else {
            self.unmap_bounced(span, copy)?
        };
        #[cfg(feature = "planted-bugs")]
        let gather =
            if hw_model::planted::Bug::IovaBeforeFlush.is_planted() { Gather::EMPTY } else { gather };
        Ok(gather)
    }

    /// Gives the IOVA back. What is linked must have been unlinked. A second call does nothing.
    ///
    /// # Errors
    /// [`StillLinked`]; the mapping stays.
    pub fn free(&self) -> Result<(), StillLinked> {
        if self.close()? {
            self.device.give_back(self.range());
        }
        Ok(())
    }

    /// Marks the mapping as freed if nothing is linked. Gives whether it was not before.
    fn close(&self) -> Result<bool, StillLinked> {
        let closed = |word: u64| (word & (LINKED | FREED) == 0).then_some(word | FREED);
        match self.word.fetch_update(Ordering::AcqRel, Ordering::Acquire, closed) {
            Ok(_) => Ok(true),
            Err(word) if word & FREED != 0 => Ok(false),
            Err(_) => Err(StillLinked { iova: self.iova, linked: self.linked() }),
        }
    }

    /// Unlinks the prefix `[0, mapped)` and frees, in one: for a mapping that was filled from its start and is not used
    /// piecewise. `mapped` 0 only frees. Where the space flushes lazily, this is what is lazy: the IOVA waits with others
    /// for one flush of everything ([`DmaDevice::poll_flush`]), and until then the device can still reach the memory.
    ///
    /// # Errors
    /// [`DestroyError`]; the IOVA stays reserved.
    pub fn destroy(&self, mapped: u64) -> Result<(), DestroyError> {
        if mapped == 0 {
            return Ok(self.free()?);
        }
        let span = self.check(0, mapped).map_err(UnlinkError::from)?;
        if self.space().flush_mode() == FlushMode::Strict {
            self.unlink_span(span, true)?;
            return Ok(self.free()?);
        }
        let gather = self.unmap(span, true)?;
        self.uncount(span.len);
        match self.close() {
            Ok(_) => self.device.give_back_unflushed(self.range()),
            Err(still) => {
                self.space().flush(gather);
                return Err(still.into());
            }
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
