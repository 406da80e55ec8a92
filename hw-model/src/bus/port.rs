//! A device's connection to the bus.
//!
//! The way of an address: a peer's bus address below the same switch is answered there; anything else is translated by
//! the device's domain, if it has one, and goes to RAM or, in the MMIO window, to a BAR through the host bridge. For RAM
//! that is the translation and a comparison or two with constants of the bus: no lock, and nothing per BAR.

use super::device::{DeviceSpec, DmaLimits};
use super::fabric::{Bus, MAX_BARS, Translation};
use super::private::PrivatePages;
use super::topology::{DeviceId, PeerRoute};
use super::{AtomicOp, Bar, BarStorage, DmaEpoch, HostMemory, MemoryError, Outside, ProviderId};
use crate::addr::{DmaAddr, Iova, PAGE_SIZE, PhysAddr};
use crate::bounce::BouncePool;
use crate::iommu::{DmaAccess, Domain, IommuFault};
use crate::sync::Arc;
use crate::sync::atomic::{AtomicU8, Ordering};

/// What one device masters the bus through. Clones are the same device.
#[derive(Clone)]
pub struct DmaPort(Arc<Master>);

/// A device as the bus knows it.
pub(super) struct Master {
    bus: Arc<Bus>,
    memory: Arc<dyn HostMemory>,
    device: DeviceId,
    translation: Translation,
    limits: DmaLimits,
    trusted: bool,
    /// Address bits that the device has no wires for.
    unreachable: u64,
    private: Option<Arc<PrivatePages>>,
    bounce: Option<Arc<BouncePool>>,
    /// Address bits above an IO page: a burst whose first and last byte differ in them needs two translations.
    page_mask: u64,
    /// What this device can reach of each BAR: 0 not yet known, else KNOWN and the bits below.
    reach: [AtomicU8; MAX_BARS],
}

const KNOWN: u8 = 1;
const BY_BUS_ADDRESS: u8 = 1 << 1;
const THROUGH_HOST: u8 = 1 << 2;

impl Master {
    pub(super) fn new(bus: Arc<Bus>, device: DeviceId, spec: DeviceSpec) -> Self {
        let DeviceSpec { translation, limits, trusted, .. } = spec;
        let page_mask = match &translation {
            Translation::Domain(domain) => !(domain.granule() - 1),
            Translation::None | Translation::Bypass => 0,
        };
        let memory = Arc::clone(bus.memory());
        Self {
            device,
            translation,
            limits,
            trusted,
            unreachable: !limits.mask(),
            private: memory.private_pages(),
            bounce: bus.bounce().cloned(),
            page_mask,
            reach: std::array::from_fn(|_| AtomicU8::new(0)),
            memory,
            bus,
        }
    }
}

/// Where a burst goes.
pub(super) enum Target<'a> {
    Memory(PhysAddr),
    Bar(&'a Bar, u64),
    Bounce(&'a BouncePool, u64),
}

impl Target<'_> {
    /// Copies from there; `memory` is the one behind the bus.
    #[inline]
    pub(super) fn read(&self, memory: &Arc<dyn HostMemory>, out: &mut [u8]) -> Result<(), MemoryError> {
        match self {
            Self::Memory(phys) => memory.read(*phys, out),
            Self::Bar(bar, offset) => bar.storage.read(*offset, out).map_err(|e| e.at(bar.base)),
            Self::Bounce(pool, offset) => pool.storage().read(*offset, out).map_err(|e| e.at(pool.base())),
        }
    }

    /// Copies to there.
    #[inline]
    pub(super) fn write(&self, memory: &Arc<dyn HostMemory>, data: &[u8]) -> Result<(), MemoryError> {
        match self {
            Self::Memory(phys) => memory.write(*phys, data),
            Self::Bar(bar, offset) => bar.storage.write(*offset, data).map_err(|e| e.at(bar.base)),
            Self::Bounce(pool, offset) => pool.storage().write(*offset, data).map_err(|e| e.at(pool.base())),
        }
    }
}

impl DmaPort {
    /// As [`DmaPort::read`], to where another process sees the bytes.
    ///
    /// # Errors
    /// See [`DmaError`].
    pub fn read_to(&self, at: DmaAddr, to: Outside<'_>) -> Result<(), DmaError> {
        if self.crosses(at, to.len()) {
            let head = self.left_in_page(at);
            self.read_to(at, to.part(0..head))?;
            return self.read_to(at.offset(head as u64), to.part(head..to.len()));
        }
        match self.target(at, DmaAccess::Read)? {
            Target::Memory(phys) => Ok(self.memory().read_to(phys, to)?),
            other => {
                let mut buffer = [0; PAGE_SIZE as usize];
                let bytes = &mut buffer[..to.len()];
                other.read(self.memory(), bytes)?;
                to.copy_in(bytes);
                Ok(())
            }
        }
    }

    /// As [`DmaPort::write`], of bytes that another process may change meanwhile.
    ///
    /// # Errors
    /// See [`DmaError`].
    pub fn write_from(&self, at: DmaAddr, from: Outside<'_>) -> Result<(), DmaError> {
        if self.crosses(at, from.len()) {
            let head = self.left_in_page(at);
            self.write_from(at, from.part(0..head))?;
            return self.write_from(at.offset(head as u64), from.part(head..from.len()));
        }
        match self.target(at, DmaAccess::Write)? {
            Target::Memory(phys) => Ok(self.memory().write_from(phys, from)?),
            other => {
                let mut buffer = [0; PAGE_SIZE as usize];
                let bytes = &mut buffer[..from.len()];
                from.copy_out(bytes);
                Ok(other.write(self.memory(), bytes)?)
            }
        }
    }

    pub(super) fn new(master: Master) -> Self {
        Self(Arc::new(master))
    }

    /// A device without an IOMMU, alone with host memory: DMA addresses are physical addresses.
    ///
    /// # Panics
    /// Never: an empty bus has room for a device.
    #[must_use]
    pub fn direct(memory: Arc<dyn HostMemory>) -> Self {
        Bus::new(memory).attach(DeviceSpec::new("device")).expect("an empty bus has room for a device")
    }

    /// Copies from the bus. The range lies in one 4 KiB page; the caller is inside [`DmaEpoch`].
    ///
    /// # Errors
    /// See [`DmaError`].
    #[inline]
    pub fn read(&self, at: DmaAddr, out: &mut [u8]) -> Result<(), DmaError> {
        if self.crosses(at, out.len()) {
            let (head, tail) = out.split_at_mut(self.left_in_page(at));
            self.read(at, head)?;
            return self.read(at.offset(head.len() as u64), tail);
        }
        Ok(self.target(at, DmaAccess::Read)?.read(self.memory(), out)?)
    }

    /// Copies to the bus. The range lies in one 4 KiB page; the caller is inside [`DmaEpoch`].
    ///
    /// # Errors
    /// See [`DmaError`].
    #[inline]
    pub fn write(&self, at: DmaAddr, data: &[u8]) -> Result<(), DmaError> {
        if self.crosses(at, data.len()) {
            let (head, tail) = data.split_at(self.left_in_page(at));
            self.write(at, head)?;
            return self.write(at.offset(head.len() as u64), tail);
        }
        Ok(self.target(at, DmaAccess::Write)?.write(self.memory(), data)?)
    }

    /// A locked operation on an aligned 64-bit word.
    ///
    /// # Errors
    /// See [`DmaError`].
    pub fn atomic(&self, at: DmaAddr, op: AtomicOp) -> Result<u64, DmaError> {
        match self.target(at, DmaAccess::Atomic)? {
            Target::Memory(phys) => Ok(self.0.memory.atomic(phys, op)?),
            Target::Bar(bar, offset) => Ok(bar.storage.atomic(offset, op).map_err(|e| e.at(bar.base))?),
            Target::Bounce(pool, offset) => {
                Ok(pool.storage().atomic(offset, op).map_err(|e| e.at(pool.base()))?)
            }
        }
    }

    /// Whether the burst leaves the IO page it begins in.
    #[inline]
    pub(super) fn crosses(&self, at: DmaAddr, len: usize) -> bool {
        let last = at.0.wrapping_add((len as u64).saturating_sub(1));
        (at.0 ^ last) & self.0.page_mask != 0
    }

    pub(super) fn left_in_page(&self, at: DmaAddr) -> usize {
        let page = !self.0.page_mask + 1;
        (page - (at.0 & !self.0.page_mask)) as usize
    }

    /// Where a burst in one IO page goes.
    #[inline]
    pub(super) fn target(&self, at: DmaAddr, access: DmaAccess) -> Result<Target<'_>, DmaError> {
        let master = &*self.0;
        if at.0 & master.unreachable != 0 {
            return Err(DmaError::BeyondMask { at, bits: master.limits.mask_bits });
        }
        if let Some(phys) = master.bus.mmio_from_bus(at)
            && let Some(target) = self.peer(phys)
        {
            return Ok(target);
        }
        let phys = match &master.translation {
            Translation::Domain(domain) => {
                let iova = at.to_iova();
                let fault = |reason| DmaError::Iommu { iova, reason };
                domain.translate(master.device, iova, access).map_err(fault)?
            }
            Translation::None | Translation::Bypass => at.to_phys_identity(),
        };
        if master.bus.is_mmio(phys) {
            return self.behind_host_bridge(at, phys);
        }
        if master.bounce.is_some() || master.private.is_some() {
            return self.guarded(phys);
        }
        Ok(Target::Memory(phys))
    }

    /// Where a burst goes, and how many of its `len` bytes go there: RAM as far as one translation leads, anything else to the
    /// end of its page.
    #[inline]
    pub(super) fn stretch(
        &self,
        at: DmaAddr,
        len: usize,
        access: DmaAccess,
    ) -> Result<(Target<'_>, usize), DmaError> {
        let master = &*self.0;
        let last = |len: usize| (len as u64).saturating_sub(1);
        let end = at.0.wrapping_add(last(len));
        // Both ends outside of the window, and the burst shorter than it: all of it is outside.
        let outside = |first: bool, last: bool| !first && !last && master.bus.mmio_is_longer_than(len);
        let plain = master.bounce.is_none() && master.private.is_none();
        let reached = end >= at.0 && (at.0 | end) & master.unreachable == 0;
        let bus = |at: u64| master.bus.mmio_from_bus(DmaAddr(at)).is_some();
        if plain && reached && outside(bus(at.0), bus(end)) {
            let (phys, left) = match &master.translation {
                Translation::Domain(domain) => {
                    let iova = at.to_iova();
                    let fault = |reason| DmaError::Iommu { iova, reason };
                    domain.translate_stretch(master.device, iova, access).map_err(fault)?
                }
                Translation::None | Translation::Bypass => (at.to_phys_identity(), u64::MAX),
            };
            let len = left.min(len as u64) as usize;
            let end = phys.offset(last(len));
            if outside(master.bus.is_mmio(phys), master.bus.is_mmio(end)) {
                return Ok((Target::Memory(phys), len));
            }
        }
        let in_page = (PAGE_SIZE - at.page_offset()) as usize;
        let in_io_page = if self.crosses(at, len) { self.left_in_page(at) } else { len };
        Ok((self.target(at, access)?, len.min(in_page).min(in_io_page)))
    }

    /// RAM of a host that has a bounce pool or private pages.
    fn guarded(&self, phys: PhysAddr) -> Result<Target<'_>, DmaError> {
        if let Some(pool) = &self.0.bounce {
            let offset = phys.0.wrapping_sub(pool.base().0);
            if offset < pool.size() {
                return Ok(Target::Bounce(pool, offset));
            }
        }
        match &self.0.private {
            Some(private) if private.is_private(phys) => {
                private.count_refused();
                Err(DmaError::Private { at: phys })
            }
            _ => Ok(Target::Memory(phys)),
        }
    }

    /// The BAR of a peer that sees this device's requests before the host bridge does.
    #[cold]
    fn peer(&self, phys: PhysAddr) -> Option<Target<'_>> {
        let bar = self.0.bus.bar_at(phys)?;
        if self.reach(bar) & BY_BUS_ADDRESS == 0 {
            return None;
        }
        bar.by_bus_address.fetch_add(1, Ordering::Relaxed);
        Some(Target::Bar(bar, phys.0 - bar.base.0))
    }

    #[cold]
    fn behind_host_bridge(&self, at: DmaAddr, phys: PhysAddr) -> Result<Target<'_>, DmaError> {
        let bar = self.0.bus.bar_at(phys).ok_or(DmaError::Unrouted { at })?;
        if self.reach(bar) & THROUGH_HOST == 0 {
            return Err(DmaError::Unrouted { at });
        }
        bar.through_host_bridge.fetch_add(1, Ordering::Relaxed);
        Ok(Target::Bar(bar, phys.0 - bar.base.0))
    }

    fn reach(&self, bar: &Bar) -> u8 {
        let known = &self.0.reach[bar.provider.0 as usize];
        match known.load(Ordering::Relaxed) {
            0 => {
                let mut reach = KNOWN;
                if bar.device == self.0.device {
                    // What a device asks of its own memory does not leave it.
                    reach |= BY_BUS_ADDRESS;
                }
                // Asked of the tree, not of the software's cache of answers: a DMA is not a look-up to be counted.
                if self.0.bus.reaches_by_bus_address(bar, self.0.device) {
                    reach |= BY_BUS_ADDRESS;
                }
                if self.0.bus.host_bridges_forward(bar, self.0.device) {
                    reach |= THROUGH_HOST;
                }
                known.store(reach, Ordering::Relaxed);
                reach
            }
            reach => reach,
        }
    }

    /// The memory behind the bus.
    pub(super) fn memory(&self) -> &Arc<dyn HostMemory> {
        &self.0.memory
    }

    /// The epoch that engines of this device move data in.
    #[must_use]
    pub fn epoch(&self) -> &Arc<DmaEpoch> {
        self.0.memory.epoch()
    }

    /// Which device this is.
    #[must_use]
    pub fn device(&self) -> DeviceId {
        self.0.device
    }

    /// The bus it is on.
    #[must_use]
    pub fn bus(&self) -> &Arc<Bus> {
        &self.0.bus
    }

    /// What stands between it and memory.
    #[must_use]
    pub fn translation(&self) -> &Translation {
        &self.0.translation
    }

    /// The limits of its DMA.
    #[must_use]
    pub fn limits(&self) -> &DmaLimits {
        &self.0.limits
    }

    /// Whether it is trusted with whole IO pages.
    #[must_use]
    pub fn is_trusted(&self) -> bool {
        self.0.trusted
    }

    /// The domain it is in, if it is behind an IOMMU that translates.
    #[must_use]
    pub fn domain(&self) -> Option<&Arc<Domain>> {
        match &self.0.translation {
            Translation::Domain(domain) => Some(domain),
            Translation::None | Translation::Bypass => None,
        }
    }

    /// How this device reaches the pages of `provider`. `None` if the bus has no such provider.
    #[must_use]
    pub fn peer_route(&self, provider: ProviderId) -> Option<PeerRoute> {
        self.0.bus.peer_route(provider, self.0.device)
    }
}

impl std::fmt::Debug for DmaPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DmaPort")
            .field("device", &self.0.device)
            .field("translation", &self.0.translation)
            .finish_non_exhaustive()
    }
}

/// The route of the provider met last (`struct pci_p2pdma_map_state`): a walk over pages asks the bus once a provider, not
/// once a page, and not at all if it meets no peer's page.
#[derive(Clone, Copy, Debug, Default)]
pub struct PeerRoutes {
    last: Option<(ProviderId, Option<PeerRoute>)>,
}

impl PeerRoutes {
    /// How `port` reaches the pages of `provider`. Always ask with the same port.
    pub fn route(&mut self, port: &DmaPort, provider: ProviderId) -> Option<PeerRoute> {
        match self.last {
            Some((known, route)) if known == provider => route,
            _ => {
                let route = port.peer_route(provider);
                self.last = Some((provider, route));
                route
            }
        }
    }
}

/// Why a DMA was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DmaError {
    /// The IOMMU has no translation, or none for this access. It is in the domain's fault log.
    #[error("IOMMU fault at {iova}: {reason}")]
    Iommu {
        /// The IOVA used.
        iova: Iova,
        /// Why.
        reason: IommuFault,
    },
    /// The memory behind the translation refused.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The device has not that many address lines.
    #[error("DMA address {at} is beyond the device's {bits} bits")]
    BeyondMask {
        /// The address it was told to use.
        at: DmaAddr,
        /// Bits of its DMA mask.
        bits: u32,
    },
    /// The page is private memory of an encrypted guest.
    #[error("private memory at {at} cannot be reached by a device")]
    Private {
        /// The physical address used.
        at: PhysAddr,
    },
    /// Nothing on the bus answers to the address: no BAR there, or a host bridge that does not forward to it.
    #[error("nothing answers to bus address {at}")]
    Unrouted {
        /// The bus address used.
        at: DmaAddr,
    },
}
