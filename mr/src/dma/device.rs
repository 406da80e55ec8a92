//! One device as the DMA layer sees it: how its addresses are translated, and which ways it has.

use super::extent::Extent;
use super::iova::{IovaError, IovaRange, IovaRequest, IovaStats, SharedIova};
use super::points;
use super::route::{Case, Policy, Refusal, Target, Translation, route};
use super::space::IoSpace;
use hw_model::addr::{DmaAddr, PAGE_SIZE};
use hw_model::bus::{DmaPort, PeerRoutes};
use hw_model::fault_plan::Points;
use hw_model::hca::{Backing, Path};
use hw_model::iommu::Domain;
use hw_model::sync::Arc;

/// Bytes of the large IOMMU leaf that mappings are laid out for.
const LARGE_LEAF: u64 = 2 << 20;

/// What a DMA device is built with.
#[derive(Clone, Debug)]
pub struct DmaConfig {
    /// What is asked of coherence.
    pub policy: Policy,
    /// Whether the device's DMA is coherent with CPU caches.
    pub coherent: bool,
    /// Whether the device is trusted with whole granules.
    pub trusted: bool,
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
    /// The table's answer for whole pages of every kind that has no provider. Asked once, not once a page.
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
        let translation = if translated.is_some() { Translation::Iommu } else { Translation::Direct };
        let way = |backing| reachable(route(&config.case(translation, Target::of(backing, None))));
        let ram = Backing::ALL.map(way);
        Arc::new(Self { port, translated, config, ram })
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
    pub(crate) fn points(&self) -> &Points {
        &self.config.points
    }
    /// How the IOVA space is filled at the moment, by all devices that share it. All zero where nothing translates.
    #[must_use]
    pub fn iova_stats(&self) -> IovaStats {
        self.translated.as_ref().map(|translated| translated.iova.stats()).unwrap_or_default()
    }

    /// Reserves IOVA for a mapping that lies in its 2 MiB as `like` does; `None` where nothing translates.
    pub(super) fn reserve(&self, len: u64, like: u64) -> Result<Option<IovaRange>, IovaError> {
        let Some(Translated { space, iova }) = &self.translated else { return Ok(None) };
        let request = IovaRequest::new(len);
        let request =
            if len >= LARGE_LEAF { request.like(like, LARGE_LEAF) } else { request.align(PAGE_SIZE) };
        if self.points().meet(points::RESERVE).fails() {
            let IovaRequest { size, align, last, .. } = request;
            let bits = space.width();
            return Err(IovaError::Exhausted { size, align, bits, last, free: 0, largest_hole: 0 });
        }
        iova.allocate(request).map(Some)
    }

    /// Takes back what [`DmaDevice::reserve`] gave.
    pub(super) fn give_back(&self, range: IovaRange) {
        let translated = self.translated.as_ref().expect("ranges come from what translates");
        translated.iova.free(range);
    }

    /// The way to `extent`, and the bus address of its first byte for ways that are not linked. `peers` remembers the
    /// provider that was met last.
    ///
    /// # Errors
    /// Why there is none.
    pub fn route(&self, extent: &Extent, peers: &mut PeerRoutes) -> Result<(Path, DmaAddr), Refusal> {
        let Some(provider) = extent.provider else {
            return Ok((self.ram[extent.backing as usize]?, extent.phys.to_dma_identity()));
        };
        let reach = self.port.as_ref().and_then(|port| peers.route(port, provider));
        let path = reachable(route(&self.config.case(self.translates(), Target::of(extent.backing, reach))))?;
        let address = match (path, &self.port) {
            (Path::BusAddress, Some(port)) => {
                let bar = port.bus().bar(provider).ok_or(Refusal::PeerUnreachable)?;
                bar.to_bus(extent.phys).ok_or(Refusal::PeerUnreachable)?
            }
            _ => extent.phys.to_dma_identity(),
        };
        Ok((path, address))
    }

    fn translates(&self) -> Translation {
        if self.translated.is_some() { Translation::Iommu } else { Translation::Direct }
    }
}

/// Regions have no bounce buffers behind them: what would need one is refused under either policy, rather than linked to
/// memory that the device must not see.
fn reachable(answer: Result<Path, Refusal>) -> Result<Path, Refusal> {
    match answer {
        Ok(Path::Bounce) => Err(Refusal::WouldBounce),
        answer => answer,
    }
}

impl DmaConfig {
    /// The question for whole pages of `target`.
    fn case(&self, translation: Translation, target: Target) -> Case {
        Case {
            target,
            translation,
            coherent_device: self.coherent,
            trusted_device: self.trusted,
            within_mask: true,
            granule_aligned: true,
            policy: self.policy,
        }
    }
}
