//! One device as the DMA layer sees it: how its addresses are translated, and which ways it has.

use super::bounce::Bouncer;
use super::extent::Extent;
use super::iova::{IovaError, IovaRange, IovaRequest, IovaStats, SharedIova};
use super::points;
use super::route::{Case, Policy, Refusal, Row, Target, Translation, route, row};
use super::space::IoSpace;
use hw_model::addr::{DmaAddr, Iova, PAGE_SIZE};
use hw_model::bounce::Split;
use hw_model::bus::{DmaLimits, DmaPort, PeerRoutes};
use hw_model::fault_plan::Points;
use hw_model::hca::{Backing, Path};
use hw_model::iommu::{Domain, LeafSize};
use hw_model::sync::Arc;

/// What a DMA device is built with.
#[derive(Clone, Debug)]
pub struct DmaConfig {
    /// What is asked of coherence.
    pub policy: Policy,
    /// Whether the device's DMA is coherent with CPU caches.
    pub coherent: bool,
    /// Whether the device is trusted with whole granules. One that its bus does not trust is not, whatever this says.
    pub trusted: bool,
    /// Whether mappings lie above 4 GiB where they can. Devices do best with short addresses; large regions had better
    /// leave them to others.
    pub high_first: bool,
    /// The limits of the device's DMA; `None` for those that its bus knows, or the default where there is no bus.
    pub limits: Option<DmaLimits>,
    /// Most bytes of one region.
    pub max_region: u64,
    /// Fault points.
    pub points: Points,
}

impl Default for DmaConfig {
    fn default() -> Self {
        Self {
            policy: Policy::Coherent,
            coherent: true,
            trusted: true,
            high_first: false,
            limits: None,
            max_region: 1 << 46,
            points: Points::OFF,
        }
    }
}

/// A device that memory is mapped for.
pub struct DmaDevice {
    /// `None` for a device of which only its I/O address space is known.
    port: Option<DmaPort>,
    translated: Option<Translated>,
    config: DmaConfig,
    limits: DmaLimits,
    /// There if the policy is `legacy` and the host has a pool.
    bouncer: Option<Bouncer>,
    /// Whether memory bounces for where it lies, not only for what it is: a device that is not trusted, or whose mask does
    /// not hold every address.
    is_picky: bool,
    /// The table's answer for every kind that has no provider, where nothing bounces for where it lies. Asked once, not
    /// once a page.
    ram: [Result<Path, Refusal>; Backing::ALL.len()],
}

/// What translates for a device, and the allocator that it shares with all devices it translates for.
struct Translated {
    space: Arc<dyn IoSpace>,
    iova: Arc<SharedIova>,
}

impl Translated {
    fn by(space: Arc<dyn IoSpace>) -> Self {
        let iova = SharedIova::of(&*space);
        Self { space, iova }
    }
}

impl DmaDevice {
    /// The DMA side of the device behind `port`.
    #[must_use]
    pub fn new(port: DmaPort, config: DmaConfig) -> Arc<Self> {
        let translated = port.domain().map(|domain| {
            let translated = Translated::by(Arc::clone(domain) as Arc<dyn IoSpace>);
            // Addresses at which BARs answer below a switch, before any IOMMU is asked (drivers/iommu/dma-iommu.c
            // `iova_reserve_pci_windows`).
            let (window, len) = port.bus().bus_window();
            translated.iova.keep_out(window.to_iova(), len);
            translated
        });
        Self::build(Some(port), translated, config)
    }

    /// The DMA side of a device behind an IOMMU that is no model: `space` is all that is known of its way to memory, and
    /// no peer's BAR can be reached.
    #[must_use]
    pub fn over(space: Arc<dyn IoSpace>, config: DmaConfig) -> Arc<Self> {
        Self::build(None, Some(Translated::by(space)), config)
    }

    fn build(port: Option<DmaPort>, translated: Option<Translated>, config: DmaConfig) -> Arc<Self> {
        let trusted = config.trusted && port.as_ref().is_none_or(DmaPort::is_trusted);
        let config = DmaConfig { trusted, ..config };
        let of_bus = port.as_ref().map(|port| *port.limits());
        let limits = config.limits.or(of_bus).unwrap_or_default();
        let is_picky = match translated {
            Some(_) => !trusted,
            None => limits.last() != Iova(u64::MAX),
        };
        let bouncer = match config.policy {
            Policy::Coherent => None,
            Policy::Legacy => port.as_ref().and_then(|port| Bouncer::new(port, trusted)),
        };
        let ram = [Err(Refusal::WouldBounce); Backing::ALL.len()];
        let mut device = Self { port, translated, config, limits, bouncer, is_picky, ram };
        let whole = Place { len: u64::MAX, within_mask: true, granule_aligned: true };
        device.ram = Backing::ALL.map(|backing| device.ask(Target::of(backing, None), whole));
        Arc::new(device)
    }

    /// The device's connection to the modelled bus, if that is where it is.
    #[must_use]
    pub fn port(&self) -> Option<&DmaPort> {
        self.port.as_ref()
    }
    /// The modelled IOMMU domain that translates for the device, if one does.
    #[must_use]
    pub fn domain(&self) -> Option<&Arc<Domain>> {
        self.port.as_ref()?.domain()
    }
    /// The I/O address space that translates for the device, if any does.
    #[must_use]
    pub fn space(&self) -> Option<&Arc<dyn IoSpace>> {
        Some(&self.translated.as_ref()?.space)
    }
    /// Most bytes of one region.
    #[must_use]
    pub fn max_region(&self) -> u64 {
        self.config.max_region
    }
    /// The limits of its DMA.
    #[must_use]
    pub fn limits(&self) -> &DmaLimits {
        &self.limits
    }
    pub(super) fn bouncer(&self) -> Option<&Bouncer> {
        self.bouncer.as_ref()
    }
    pub(crate) fn points(&self) -> &Points {
        &self.config.points
    }
    /// How the IOVA space is filled at the moment, by all devices that share it. All zero where nothing translates.
    #[must_use]
    pub fn iova_stats(&self) -> IovaStats {
        self.translated.as_ref().map(|translated| translated.iova.stats()).unwrap_or_default()
    }

    /// Cuts `len` bytes at `at` into pieces that the device takes: none longer than its longest segment, none over its
    /// boundary. What a list of DMA addresses is made of; [`Segments`](super::Segments) that are not linked are cut so
    /// already.
    pub fn pieces(&self, at: DmaAddr, len: u64) -> impl Iterator<Item = (DmaAddr, u64)> {
        let (limits, mut done) = (self.limits, 0);
        std::iter::from_fn(move || {
            let at = at.offset(done);
            let piece = (done < len).then(|| limits.piece(at, len - done))?;
            done += piece;
            Some((at, piece))
        })
    }

    /// Reserves IOVA for a mapping of a device that something translates for. It lies in its 4 KiB page as `like` does, and
    /// in the largest leaf that it can hold as well, if there is such a place: leaves are not worth a refusal.
    pub(super) fn reserve(&self, len: u64, like: u64) -> Result<IovaRange, IovaError> {
        let Translated { space, iova } = self.translating();
        let request = IovaRequest::new(len).last(self.limits.last());
        let request = IovaRequest { low_first: !self.config.high_first, ..request };
        if self.points().meet(points::RESERVE).fails() {
            let IovaRequest { size, align, last, .. } = request;
            let bits = space.width();
            return Err(IovaError::Exhausted { size, align, bits, last, free: 0, largest_hole: 0 });
        }
        let leaf = |size: LeafSize| 1 << size.shift(space.granule_shift());
        for size in [LeafSize::Huge, LeafSize::Large].into_iter().filter(|size| len >= leaf(*size)) {
            if let Ok(range) = iova.allocate(request.like(like, leaf(size)), &**space) {
                return Ok(range);
            }
        }
        iova.allocate(request.like(like, PAGE_SIZE), &**space)
    }

    fn translating(&self) -> &Translated {
        self.translated.as_ref().expect("ranges come from what translates")
    }

    /// Takes back what [`DmaDevice::reserve`] gave; every translation of it was flushed.
    pub(super) fn give_back(&self, range: IovaRange) {
        self.translating().iova.free(range);
    }

    /// The same, flushed or not.
    pub(super) fn give_back_unflushed(&self, range: IovaRange) {
        let Translated { space, iova } = self.translating();
        iova.free_unflushed(range, &**space);
    }

    /// Lets IOVA that waits for a flush have it, if it has waited long enough at `now_ns`. Gives whether it had. Only a
    /// space that flushes lazily has something to do here; call it every few milliseconds.
    pub fn poll_flush(&self, now_ns: u64) -> bool {
        let Some(Translated { space, iova }) = &self.translated else { return false };
        iova.poll(now_ns, &**space)
    }

    /// The way to the first bytes of `extent`: how many, by which path, and the bus address of the first for ways that are
    /// not linked. The rest may go another way. `peers` remembers the provider that was met last.
    ///
    /// # Errors
    /// Why there is none.
    pub fn route(&self, extent: &Extent, peers: &mut PeerRoutes) -> Result<Way, Refusal> {
        if extent.provider.is_none() && !self.is_picky {
            let path = self.ram[extent.backing as usize]?;
            return Ok(self.cut(Way { len: extent.len, path, bus: extent.phys.to_dma_identity() }));
        }
        let place = self.place(extent);
        let path = self.ask(self.target(extent, peers), place)?;
        let mut bus = extent.phys.to_dma_identity();
        if path == Path::BusAddress {
            bus = self.bus_address(extent).ok_or(Refusal::PeerUnreachable)?;
            if !self.limits.reaches(bus, place.len) {
                return Err(Refusal::BounceOfMmio);
            }
        }
        Ok(self.cut(Way { len: place.len, path, bus }))
    }

    /// The row of the table that answers for the first bytes of `extent`: which way, or why none, and by which rule of the
    /// kernel. [`DmaDevice::route`] follows it, unless there is no pool for what should bounce.
    pub fn explain(&self, extent: &Extent, peers: &mut PeerRoutes) -> &'static Row {
        row(&self.case(self.target(extent, peers), self.place(extent)))
    }

    fn target(&self, extent: &Extent, peers: &mut PeerRoutes) -> Target {
        let reach = match (extent.provider, &self.port) {
            (Some(provider), Some(port)) => peers.route(port, provider),
            _ => None,
        };
        Target::of(extent.backing, reach)
    }

    fn bus_address(&self, extent: &Extent) -> Option<DmaAddr> {
        self.port.as_ref()?.bus().bar(extent.provider?)?.to_bus(extent.phys)
    }

    /// The part of a way that the device takes in one piece. What is linked is cut where its IOVA is known.
    fn cut(&self, way: Way) -> Way {
        match way.path {
            Path::Direct | Path::BusAddress => Way { len: self.limits.piece(way.bus, way.len), ..way },
            Path::Iova | Path::HostBridge | Path::Bounce => way,
        }
    }

    /// How the first bytes of `extent` lie, and how many lie so.
    fn place(&self, extent: &Extent) -> Place {
        let Extent { phys, len, .. } = *extent;
        let plain = Place { len, within_mask: true, granule_aligned: true };
        match &self.translated {
            Some(_) if self.config.trusted => plain,
            Some(Translated { space, .. }) => {
                let split = Split::new(phys, len, 1 << space.granule_shift());
                let first = split.head.or(split.middle).or(split.tail);
                let granule_aligned = split.head.is_none() && split.middle.is_some();
                Place { len: first.map_or(len, |piece| piece.len), granule_aligned, ..plain }
            }
            None => match self.limits.last().0.checked_sub(phys.0) {
                Some(left) => Place { len: len.min(left.saturating_add(1)), ..plain },
                None => Place { within_mask: false, ..plain },
            },
        }
    }

    /// The question to the table.
    fn case(&self, target: Target, place: Place) -> Case {
        let DmaConfig { coherent, trusted, policy, .. } = self.config;
        Case {
            target,
            translation: if self.translated.is_some() { Translation::Iommu } else { Translation::Direct },
            coherent_device: coherent,
            trusted_device: trusted,
            within_mask: place.within_mask,
            granule_aligned: place.granule_aligned,
            policy,
        }
    }

    /// What the table says, and whether there is a pool if it says bounce.
    fn ask(&self, target: Target, place: Place) -> Result<Path, Refusal> {
        let path = route(&self.case(target, place))?;
        if path == Path::Bounce && self.bouncer.is_none() {
            return Err(Refusal::WouldBounce);
        }
        Ok(path)
    }
}

/// The way to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// Bytes that it holds for.
    pub len: u64,
    /// By which path.
    pub path: Path,
    /// Bus address of the first byte, for paths that are not linked.
    pub bus: DmaAddr,
}

/// How memory lies for a device.
#[derive(Clone, Copy)]
struct Place {
    len: u64,
    within_mask: bool,
    granule_aligned: bool,
}
