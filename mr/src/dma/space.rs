//! What mappings are made in: an I/O address space, whoever translates.

use hw_model::addr::{Iova, PhysAddr};
use hw_model::iommu::{Cookie, Domain, FlushMode, Gather, LeafSize, MapError, Prot, UnmapError};

/// An I/O address space: a page table that devices are translated by. [`Domain`] is one; so is a VFIO container.
///
/// Who maps and unmaps keeps a contract that the space may check: nothing is mapped over a live mapping, what is unmapped
/// is exactly what was mapped in whole leaves, and what was unmapped is flushed before its page is released or its IOVA
/// used again. Calls on disjoint ranges may run at once. Source: `struct iommu_domain_ops` in include/linux/iommu.h.
pub trait IoSpace: Send + Sync {
    /// Bits of an IOVA, 48 at most.
    fn width(&self) -> u32;

    /// log2 of the IO page, 11 to 16. Everything mapped is a multiple of it.
    fn granule_shift(&self) -> u32;

    /// First IOVA and bytes of each window that must not be mapped (`iommu_get_resv_regions`).
    fn reserved(&self) -> Vec<(Iova, u64)>;

    /// Where the DMA layer keeps what all devices of the space share.
    fn cookie(&self) -> &Cookie;

    /// Whether IOVA may be given back before it was flushed and wait for a flush of everything.
    fn flush_mode(&self) -> FlushMode;

    /// Allocates what mapping `[iova, iova + len)` will need, so that mapping there does not allocate.
    ///
    /// # Errors
    /// [`MapError::BeyondWidth`], [`MapError::OutOfMemory`].
    fn prepare(&self, iova: Iova, len: u64) -> Result<(), MapError>;

    /// Maps `len` bytes in leaves of at most `largest`, as large as alignment and length allow.
    ///
    /// # Errors
    /// [`MapError`]; nothing of the range is mapped then.
    fn map(
        &self,
        iova: Iova,
        phys: PhysAddr,
        len: u64,
        prot: Prot,
        largest: LeafSize,
    ) -> Result<(), MapError>;

    /// Maps one IO page for each address of `frames`, in order, at consecutive IOVAs.
    ///
    /// # Errors
    /// [`MapError`]; nothing is mapped then.
    fn map_scattered(
        &self,
        iova: Iova,
        frames: &mut dyn Iterator<Item = PhysAddr>,
        prot: Prot,
    ) -> Result<(), MapError>;

    /// Makes what was mapped in the range sure to be seen (`iotlb_sync_map`).
    fn sync_map(&self, iova: Iova, len: u64);

    /// Whether [`IoSpace::split`] does anything.
    fn can_split(&self) -> bool {
        false
    }

    /// Has pages lead where the large leaves lead that the ends of the range cut: it can be unmapped by itself then. Devices
    /// see no difference. Allocates nothing.
    fn split(&self, _iova: Iova, _len: u64) {}

    /// Unmaps the range, which consists of whole live leaves. [`IoSpace::flush`] what it gives; a space that has flushed
    /// already gives [`Gather::EMPTY`].
    ///
    /// # Errors
    /// [`UnmapError`]; nothing was unmapped then.
    fn unmap(&self, iova: Iova, len: u64) -> Result<Gather, UnmapError>;

    /// Invalidates what was unmapped. When this returns, no DMA that begins later uses it.
    fn flush(&self, gather: Gather);

    /// Invalidates everything.
    fn flush_all(&self);

    /// Bytes of the leaf that maps `iova`: what has to be unmapped as a whole. `None` for a hole.
    fn leaf_at(&self, iova: Iova) -> Option<u64>;

    /// Where the table leads `iova`.
    fn iova_to_phys(&self, iova: Iova) -> Option<PhysAddr>;
}

/// Where devices write interrupts on x86, and bytes of it (drivers/iommu/intel/iommu.c `IOAPIC_RANGE_START`).
const MSI_WINDOW: (Iova, u64) = (Iova(0xfee0_0000), 0x10_0000);

impl IoSpace for Domain {
    fn width(&self) -> u32 {
        self.config().width
    }
    fn granule_shift(&self) -> u32 {
        self.config().granule_shift
    }
    fn reserved(&self) -> Vec<(Iova, u64)> {
        vec![MSI_WINDOW]
    }
    fn cookie(&self) -> &Cookie {
        Self::cookie(self)
    }
    fn flush_mode(&self) -> FlushMode {
        self.config().mode
    }
    fn prepare(&self, iova: Iova, len: u64) -> Result<(), MapError> {
        Self::prepare(self, iova, len)
    }
    fn map(
        &self,
        iova: Iova,
        phys: PhysAddr,
        len: u64,
        prot: Prot,
        largest: LeafSize,
    ) -> Result<(), MapError> {
        self.map_up_to(iova, phys, len, prot, largest)
    }
    fn map_scattered(
        &self,
        iova: Iova,
        frames: &mut dyn Iterator<Item = PhysAddr>,
        prot: Prot,
    ) -> Result<(), MapError> {
        Self::map_scattered(self, iova, frames, prot)
    }
    fn sync_map(&self, iova: Iova, len: u64) {
        Self::sync_map(self, iova, len);
    }
    fn can_split(&self) -> bool {
        true
    }
    fn split(&self, iova: Iova, len: u64) {
        Self::split(self, iova, len);
    }
    fn unmap(&self, iova: Iova, len: u64) -> Result<Gather, UnmapError> {
        Self::unmap(self, iova, len)
    }
    fn flush(&self, gather: Gather) {
        Self::flush(self, gather);
    }
    fn flush_all(&self) {
        Self::flush_all(self);
    }
    fn leaf_at(&self, iova: Iova) -> Option<u64> {
        Self::leaf_at(self, iova).map(|leaf| 1 << leaf.shift(self.config().granule_shift))
    }
    fn iova_to_phys(&self, iova: Iova) -> Option<PhysAddr> {
        Self::iova_to_phys(self, iova)
    }
}
