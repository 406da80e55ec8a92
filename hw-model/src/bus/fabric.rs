//! The bus as a whole: what hangs from it, and where the BARs are.

use super::bar::{Bar, BarStorage, RamStorage};
use super::device::DeviceSpec;
use super::port::{DmaPort, Master};
use super::topology::{Acs, DeviceId, Forwarding, NodeKind, PeerRoute, PortId, Topology, TopologyError};
use super::{HostMemory, ProviderId};
use crate::addr::{DmaAddr, PAGE_SIZE, PhysAddr};
use crate::bounce::{BounceConfig, BouncePool};
use crate::iommu::Domain;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Arc, Mutex, OnceLock};
use hashbrown::HashMap;

/// BARs that one bus can have.
pub const MAX_BARS: usize = 64;

/// Where a bus has its BARs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusConfig {
    /// First physical address of the window that all BARs lie in.
    pub mmio_base: PhysAddr,
    /// Bytes of that window.
    pub mmio_size: u64,
    /// What the host bridge adds to a bus address to make a physical address of the window, wrapping. 0 on most machines.
    pub bus_offset: u64,
    /// What the first host bridge forwards.
    pub forwarding: Forwarding,
    /// The host's bounce pool, if it has one.
    pub bounce: Option<BounceConfig>,
}

impl Default for BusConfig {
    /// 8 TiB of 64-bit MMIO at 56 TiB, where servers have it; bus addresses equal to physical ones; forwarding allowed; no
    /// bounce pool.
    fn default() -> Self {
        Self {
            mmio_base: PhysAddr(0x3800_0000_0000),
            mmio_size: 0x0800_0000_0000,
            bus_offset: 0,
            forwarding: Forwarding::Any,
            bounce: None,
        }
    }
}

/// What stands between a device and memory.
#[derive(Clone, Debug, Default)]
pub enum Translation {
    /// No IOMMU: DMA addresses are physical addresses.
    #[default]
    None,
    /// An IOMMU in pass-through for this device: DMA addresses are physical addresses.
    Bypass,
    /// An IOMMU: DMA addresses are IOVAs of this domain.
    Domain(Arc<Domain>),
}

/// Why a BAR cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BarError {
    /// BARs are powers of two, and here at least a page.
    #[error("a BAR of {size:#x} bytes; powers of two from 4096 are possible")]
    Size {
        /// Bytes asked for.
        size: u64,
    },
    /// The MMIO window is full.
    #[error("no room for a BAR of {size:#x} bytes in an MMIO window with {left:#x} bytes left")]
    WindowFull {
        /// Bytes asked for.
        size: u64,
        /// Bytes behind the last BAR.
        left: u64,
    },
    /// The bus has [`MAX_BARS`] already.
    #[error("this bus has its {MAX_BARS} BARs already")]
    TooMany,
    /// No such device.
    #[error("{device} is not on this bus")]
    NoDevice {
        /// The device named.
        device: DeviceId,
    },
    /// The host has no memory for the storage.
    #[error("no memory for a BAR of {size:#x} bytes")]
    OutOfMemory {
        /// Bytes asked for.
        size: u64,
    },
}

/// Host memory, a PCI tree, and the devices on it. Ports, devices and BARs can be added at any time, never taken away.
///
/// Lock order: `tree` alone. It is never taken on the way of a DMA to RAM.
pub struct Bus {
    memory: Arc<dyn HostMemory>,
    config: BusConfig,
    bounce: Option<Arc<BouncePool>>,
    bars: [OnceLock<Arc<Bar>>; MAX_BARS],
    tree: Mutex<Tree>,
    first_bridge: PortId,
    route_lookups: AtomicU64,
    routes_computed: AtomicU64,
}

struct Tree {
    topology: Topology,
    /// Place and name of each device, by its number.
    devices: Vec<(PortId, String)>,
    bars: usize,
    /// End of the last BAR, from the start of the window.
    used: u64,
    routes: HashMap<(ProviderId, DeviceId), PeerRoute>,
}

impl Bus {
    /// A bus with one host bridge and nothing on it.
    #[must_use]
    pub fn new(memory: Arc<dyn HostMemory>) -> Arc<Self> {
        Self::with_config(memory, BusConfig::default())
    }

    /// As [`Bus::new`], with BARs elsewhere, or with a bounce pool.
    ///
    /// # Panics
    /// If the host has no memory for the bounce pool, or it cannot be where it should be ([`BouncePool::new`]).
    #[must_use]
    pub fn with_config(memory: Arc<dyn HostMemory>, config: BusConfig) -> Arc<Self> {
        let mut topology = Topology::default();
        let first_bridge = topology.host_bridge(config.forwarding);
        let tree = Tree { topology, devices: Vec::new(), bars: 0, used: 0, routes: HashMap::new() };
        Arc::new(Self {
            memory,
            config,
            bounce: config.bounce.map(|pool| BouncePool::new(pool).expect("memory for the bounce pool")),
            bars: std::array::from_fn(|_| OnceLock::new()),
            tree: Mutex::new(tree),
            first_bridge,
            route_lookups: AtomicU64::new(0),
            routes_computed: AtomicU64::new(0),
        })
    }

    /// The memory behind the host bridges.
    #[must_use]
    pub fn memory(&self) -> &Arc<dyn HostMemory> {
        &self.memory
    }

    /// What the bus was made with.
    #[must_use]
    pub fn config(&self) -> &BusConfig {
        &self.config
    }

    /// The bounce pool, if the host has one.
    #[must_use]
    pub fn bounce(&self) -> Option<&Arc<BouncePool>> {
        self.bounce.as_ref()
    }

    /// The host bridge that every bus has.
    #[must_use]
    pub fn first_bridge(&self) -> PortId {
        self.first_bridge
    }

    /// Adds another host bridge.
    pub fn add_host_bridge(&self, forwarding: Forwarding) -> PortId {
        self.tree.lock().topology.host_bridge(forwarding)
    }

    /// Adds a root port to a host bridge.
    ///
    /// # Errors
    /// [`TopologyError`] if `bridge` is not one.
    pub fn add_root_port(&self, bridge: PortId, acs: Acs) -> Result<PortId, TopologyError> {
        self.tree.lock().topology.add(NodeKind::RootPort, bridge, acs)
    }

    /// Puts a switch below a root port or another switch's downstream port. Gives its upstream port.
    ///
    /// # Errors
    /// [`TopologyError`] if no switch fits there.
    pub fn add_switch(&self, port: PortId) -> Result<PortId, TopologyError> {
        self.tree.lock().topology.add(NodeKind::Switch, port, Acs::Off)
    }

    /// Adds a downstream port to a switch.
    ///
    /// # Errors
    /// [`TopologyError`] if `switch` is not one.
    pub fn add_downstream_port(&self, switch: PortId, acs: Acs) -> Result<PortId, TopologyError> {
        self.tree.lock().topology.add(NodeKind::DownstreamPort, switch, acs)
    }

    /// Attaches a device.
    ///
    /// # Errors
    /// [`TopologyError`] if no device fits there.
    pub fn attach(self: &Arc<Self>, spec: DeviceSpec) -> Result<DmaPort, TopologyError> {
        let mut tree = self.tree.lock();
        let port = match spec.under {
            Some(port) => port,
            None => tree.topology.add(NodeKind::RootPort, self.first_bridge, Acs::Off)?,
        };
        let place = tree.topology.add(NodeKind::Device, port, Acs::Off)?;
        let device = DeviceId(u32::try_from(tree.devices.len()).expect("fewer than 2^32 devices"));
        tree.devices.push((place, spec.name.clone()));
        drop(tree);
        Ok(DmaPort::new(Master::new(Arc::clone(self), device, spec)))
    }

    /// Gives `device` a BAR with `storage` behind it.
    ///
    /// # Errors
    /// See [`BarError`].
    pub fn add_bar(&self, device: DeviceId, storage: Arc<dyn BarStorage>) -> Result<Arc<Bar>, BarError> {
        let size = storage.size();
        if !size.is_power_of_two() || size < PAGE_SIZE {
            return Err(BarError::Size { size });
        }
        let mut tree = self.tree.lock();
        if tree.devices.get(device.0 as usize).is_none() {
            return Err(BarError::NoDevice { device });
        }
        let slot = self.bars.get(tree.bars).ok_or(BarError::TooMany)?;
        // Naturally aligned, as BARs are.
        let full = BarError::WindowFull { size, left: self.config.mmio_size - tree.used };
        let first = self.config.mmio_base.0.checked_add(tree.used).ok_or(full)?;
        let base = first.checked_next_multiple_of(size).ok_or(full)?;
        let used = (base - self.config.mmio_base.0).checked_add(size).ok_or(full)?;
        if used > self.config.mmio_size {
            return Err(full);
        }
        let base = PhysAddr(base);
        let bar = Arc::new(Bar {
            provider: ProviderId(u32::try_from(tree.bars).expect("at most MAX_BARS")),
            device,
            base,
            bus_base: self.bus_address(base),
            size,
            storage,
            by_bus_address: AtomicU64::new(0),
            through_host_bridge: AtomicU64::new(0),
        });
        tree.bars += 1;
        tree.used = used;
        let fresh = slot.set(Arc::clone(&bar));
        assert!(fresh.is_ok(), "slots are taken in order under the tree's lock");
        Ok(bar)
    }

    /// Gives `device` a BAR of plain memory.
    ///
    /// # Errors
    /// See [`BarError`].
    pub fn add_ram_bar(&self, device: DeviceId, size: u64) -> Result<Arc<Bar>, BarError> {
        if !size.is_power_of_two() || size < PAGE_SIZE {
            return Err(BarError::Size { size });
        }
        self.add_bar(device, RamStorage::new(size).ok_or(BarError::OutOfMemory { size })?)
    }

    /// The BAR of a provider.
    #[must_use]
    pub fn bar(&self, provider: ProviderId) -> Option<&Arc<Bar>> {
        self.bars.get(provider.0 as usize)?.get()
    }

    /// The BAR that holds a physical address.
    #[must_use]
    pub fn bar_at(&self, phys: PhysAddr) -> Option<&Arc<Bar>> {
        self.bars.iter().map_while(OnceLock::get).find(|bar| phys.0.wrapping_sub(bar.base.0) < bar.size)
    }

    fn bus_address(&self, phys: PhysAddr) -> DmaAddr {
        DmaAddr(phys.0.wrapping_sub(self.config.bus_offset))
    }

    /// The MMIO window as devices see it: what an IOVA allocator must keep clear, because switches below the IOMMU take
    /// these addresses for a peer's (`iova_reserve_pci_windows` in drivers/iommu/dma-iommu.c).
    #[must_use]
    pub fn bus_window(&self) -> (DmaAddr, u64) {
        (self.bus_address(self.config.mmio_base), self.config.mmio_size)
    }

    /// Whether the MMIO window is longer than `len` bytes.
    pub(super) fn mmio_is_longer_than(&self, len: usize) -> bool {
        self.config.mmio_size > len as u64
    }

    #[inline]
    pub(super) fn is_mmio(&self, phys: PhysAddr) -> bool {
        phys.0.wrapping_sub(self.config.mmio_base.0) < self.config.mmio_size
    }

    /// The physical address that a bus address of the MMIO window stands for.
    #[inline]
    pub(super) fn mmio_from_bus(&self, at: DmaAddr) -> Option<PhysAddr> {
        let phys = PhysAddr(at.0.wrapping_add(self.config.bus_offset));
        self.is_mmio(phys).then_some(phys)
    }

    /// How `device` reaches the pages of `provider`. One answer for all pages of a provider: ask once and keep it
    /// ([`PeerRoutes`](super::PeerRoutes)). `None` if there is no such provider or device.
    #[must_use]
    pub fn peer_route(&self, provider: ProviderId, device: DeviceId) -> Option<PeerRoute> {
        self.route_lookups.fetch_add(1, Ordering::Relaxed);
        let mut tree = self.tree.lock();
        if let Some(route) = tree.routes.get(&(provider, device)) {
            return Some(*route);
        }
        let (owner, client) = tree.places(self.bar(provider)?.device, device)?;
        let route = tree.topology.route(owner, client);
        self.routes_computed.fetch_add(1, Ordering::Relaxed);
        tree.routes.insert((provider, device), route);
        Some(route)
    }

    /// Whether a switch between `device` and `bar` takes the request before any host bridge sees it.
    pub(super) fn reaches_by_bus_address(&self, bar: &Bar, device: DeviceId) -> bool {
        let tree = self.tree.lock();
        let places = tree.places(bar.device, device);
        places.is_some_and(|(owner, client)| tree.topology.route(owner, client) == PeerRoute::BusAddress)
    }

    /// Whether what `device` sends up comes down again to `bar`, wanted or not.
    pub(super) fn host_bridges_forward(&self, bar: &Bar, device: DeviceId) -> bool {
        let tree = self.tree.lock();
        let places = tree.places(bar.device, device);
        places.is_some_and(|(owner, client)| tree.topology.host_bridges_forward(owner, client))
    }

    /// Questions asked with [`Bus::peer_route`].
    #[must_use]
    pub fn route_lookups(&self) -> u64 {
        self.route_lookups.load(Ordering::Relaxed)
    }

    /// Of these, how many needed a search of the tree.
    #[must_use]
    pub fn routes_computed(&self) -> u64 {
        self.routes_computed.load(Ordering::Relaxed)
    }

    /// The name a device was attached with.
    #[must_use]
    pub fn device_name(&self, device: DeviceId) -> Option<String> {
        self.tree.lock().devices.get(device.0 as usize).map(|(_, name)| name.clone())
    }
}

impl Tree {
    fn places(&self, owner: DeviceId, client: DeviceId) -> Option<(PortId, PortId)> {
        let place = |device: DeviceId| self.devices.get(device.0 as usize).map(|(place, _)| *place);
        Some((place(owner)?, place(client)?))
    }
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tree = self.tree.lock();
        f.debug_struct("Bus")
            .field("config", &self.config)
            .field("devices", &tree.devices)
            .field("bars", &tree.bars)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
