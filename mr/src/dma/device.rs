//! One device as the DMA layer sees it: how its addresses are translated, and which ways it has.

use super::iova::{IovaAllocator, IovaError, IovaRange, IovaRequest, IovaSpace, IovaStats};
use super::points;
use super::route::{Case, Policy, Refusal, Target, Translation, route};
use hw_model::addr::{DmaAddr, Iova, PAGE_SIZE};
use hw_model::bus::{DmaPort, PeerRoutes};
use hw_model::fault_plan::Points;
use hw_model::hca::{Backing, Path};
use hw_model::iommu::Domain;
use hw_model::sync::{Arc, Mutex};
use odp::page::PageRun;

/// Where devices write interrupts on x86.
const MSI_WINDOW: Iova = Iova(0xfee0_0000);
/// Bytes of it.
const MSI_WINDOW_LEN: u64 = 0x10_0000;
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
    port: DmaPort,
    iova: Mutex<IovaAllocator>,
    config: DmaConfig,
    /// The table's answer for whole pages of every kind that has no provider. Asked once, not once a page.
    ram: [Result<Path, Refusal>; Backing::ALL.len()],
}

impl DmaDevice {
    /// The DMA side of the device behind `port`.
    #[must_use]
    pub fn new(port: DmaPort, config: DmaConfig) -> Arc<Self> {
        let translation = if port.domain().is_some() { Translation::Iommu } else { Translation::Direct };
        let way = |backing| reachable(route(&config.case(translation, Target::of(backing, None))));
        let ram = Backing::ALL.map(way);
        // Where nothing translates, nothing is ever asked of it.
        let unused = IovaSpace { bits: 48, granule_shift: 12 };
        let iova = iova_space(&port).unwrap_or_else(|| IovaAllocator::new(unused));
        Arc::new(Self { port, iova: Mutex::new(iova), config, ram })
    }

    /// The device's connection to the bus.
    #[must_use]
    pub fn port(&self) -> &DmaPort {
        &self.port
    }
    /// The IOMMU domain that translates for the device, if any does.
    #[must_use]
    pub fn domain(&self) -> Option<&Arc<Domain>> {
        self.port.domain()
    }
    /// Most bytes of one region.
    #[must_use]
    pub fn max_region(&self) -> u64 {
        self.config.max_region
    }
    pub(crate) fn points(&self) -> &Points {
        &self.config.points
    }
    /// How the IOVA space is filled at the moment.
    #[must_use]
    pub fn iova_stats(&self) -> IovaStats {
        self.iova.lock().stats()
    }

    /// Reserves IOVA for a mapping that lies in its 2 MiB as `like` does; `None` where nothing translates.
    pub(super) fn reserve(&self, len: u64, like: u64) -> Result<Option<IovaRange>, IovaError> {
        let Some(domain) = self.domain() else { return Ok(None) };
        let request = IovaRequest::new(len);
        let request =
            if len >= LARGE_LEAF { request.like(like, LARGE_LEAF) } else { request.align(PAGE_SIZE) };
        if self.points().meet(points::RESERVE).fails() {
            let bits = domain.config().width;
            let (size, align) = (request.size, request.align);
            return Err(IovaError::Exhausted {
                size,
                align,
                bits,
                last: request.last,
                free: 0,
                largest_hole: 0,
            });
        }
        self.iova.lock().allocate(request).map(Some)
    }

    /// Takes back what [`DmaDevice::reserve`] gave.
    pub(super) fn give_back(&self, range: IovaRange) {
        self.iova.lock().free(range).expect("a mapping gives its range back once");
    }

    /// The way to the pages of `run`, and the bus address of the first for ways that are not linked. `peers` remembers
    /// the provider that was met last.
    ///
    /// # Errors
    /// Why there is none.
    pub fn route(&self, run: &PageRun, peers: &mut PeerRoutes) -> Result<(Path, DmaAddr), Refusal> {
        let Some(provider) = run.provider else {
            return Ok((self.ram[run.backing as usize]?, run.phys.to_dma_identity()));
        };
        let target = Target::of(run.backing, peers.route(&self.port, provider));
        let path = reachable(route(&self.config.case(self.translates(), target)))?;
        let address = match path {
            Path::BusAddress => {
                let bar = self.port.bus().bar(provider).ok_or(Refusal::PeerUnreachable)?;
                bar.to_bus(run.phys).ok_or(Refusal::PeerUnreachable)?
            }
            _ => run.phys.to_dma_identity(),
        };
        Ok((path, address))
    }

    fn translates(&self) -> Translation {
        if self.domain().is_some() { Translation::Iommu } else { Translation::Direct }
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

/// The IOVA space of a domain, without what must not be mapped: the window that interrupts are written to, and the
/// addresses at which BARs answer below a switch before any IOMMU is asked (drivers/iommu/dma-iommu.c
/// `iova_reserve_pci_windows`).
fn iova_space(port: &DmaPort) -> Option<IovaAllocator> {
    let config = port.domain()?.config();
    let space = IovaSpace { bits: config.width, granule_shift: config.granule_shift };
    let mut iova = IovaAllocator::new(space);
    let (window, len) = port.bus().bus_window();
    for (start, len) in [(MSI_WINDOW, MSI_WINDOW_LEN), (window.to_iova(), len)] {
        // What the space does not hold need not be kept out of it.
        let kept = iova.reserve(start, len);
        tracing::debug!(?kept, %start, len, "window kept out of the IOVA space");
    }
    Some(iova)
}
