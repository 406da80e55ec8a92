//! A machine with one device of every sort that the table tells apart.
//!
//! ```text
//! host bridge 0 ─┬─ root port ── switch ─┬─ gpu   (the provider: a BAR that peers may reach)
//!                │                       └─ nic
//!                ├─ root port ── switch ─┬─ gpu-acs (a provider below ports that send all requests up)
//!                │                       └─ nic-acs
//!                ├─ root ports ── nic-root, external, direct, direct32, incoherent
//! host bridge 1 ─┴─ root port ── nic-far  (forwards nothing between peers)
//! ```

use super::USUAL_PLACE;
use super::report::{CaseReport, RowReport};
use hw_model::addr::PhysAddr;
use hw_model::bus::{
    Acs, Bus, DeviceSpec, DmaLimits, DmaPort, Forwarding, PeerRoute, PeerRoutes, PortId, ProviderId,
    TopologyError,
};
use hw_model::hca::Backing;
use hw_model::iommu::{Domain, DomainConfig};
use hw_model::sync::Arc;
use mr::dma::{DmaConfig, DmaDevice, Extent, Policy};
use odp::space::AddressSpace;
use odp::space::sim::{SimConfig, SimHost};
use std::error::Error;

/// Bytes of a provider's BAR.
const BAR_BYTES: u64 = 16 << 20;

/// A device that may be asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DeviceName {
    /// Behind an IOMMU, below one switch with the memory's provider.
    Nic,
    /// Behind an IOMMU, below one switch with the provider, whose ports send all requests up (ACS).
    NicAcs,
    /// Behind an IOMMU, on a root port of its own.
    NicRoot,
    /// Behind an IOMMU, on a host bridge that forwards nothing between peers.
    NicFar,
    /// Behind an IOMMU and not trusted: plugged into an external port.
    External,
    /// Without an IOMMU, reaching all memory.
    Direct,
    /// Without an IOMMU, reaching the first 4 GiB.
    Direct32,
    /// Behind an IOMMU, not coherent with CPU caches.
    Incoherent,
}

/// The machine.
pub struct Machine {
    devices: Vec<(DeviceName, DmaPort, ProviderId)>,
    bus: Arc<Bus>,
}

impl Machine {
    /// Builds it.
    ///
    /// # Errors
    /// If the host has no memory for it.
    pub fn new() -> Result<Self, Box<dyn Error>> {
        let host = SimHost::new(SimConfig { ram_pages: 1024, ..SimConfig::default() })
            .ok_or("no memory for a host")?;
        let memory = host.new_space().memory();
        let bus = Bus::new(memory);
        let near = bus.first_bridge();
        let far = bus.add_host_bridge(Forwarding::None);
        let below_switch = |acs: Acs| -> Result<[PortId; 2], TopologyError> {
            let switch = bus.add_switch(bus.add_root_port(near, Acs::Off)?)?;
            Ok([bus.add_downstream_port(switch, acs)?, bus.add_downstream_port(switch, acs)?])
        };
        let provider = |name: &str, port: PortId| -> Result<ProviderId, Box<dyn Error>> {
            let gpu = bus.attach(DeviceSpec::new(name).under(port))?;
            Ok(bus.add_ram_bar(gpu.device(), BAR_BYTES)?.provider())
        };
        let [gpu, nic] = below_switch(Acs::Off)?;
        let [gpu_acs, nic_acs] = below_switch(Acs::Redirect)?;
        let (plain, redirected) = (provider("gpu", gpu)?, provider("gpu-acs", gpu_acs)?);
        let root = |bridge: PortId| bus.add_root_port(bridge, Acs::Off);
        let places = [
            (DeviceName::Nic, nic, plain),
            (DeviceName::NicAcs, nic_acs, redirected),
            (DeviceName::NicRoot, root(near)?, plain),
            (DeviceName::NicFar, root(far)?, plain),
            (DeviceName::External, root(near)?, plain),
            (DeviceName::Direct, root(near)?, plain),
            (DeviceName::Direct32, root(near)?, plain),
            (DeviceName::Incoherent, root(near)?, plain),
        ];
        let mut devices = Vec::new();
        for (name, port, provider) in places {
            let spec = DeviceSpec::new(name.name()).under(port);
            let spec = match name {
                DeviceName::Direct => spec,
                DeviceName::Direct32 => spec.limits(DmaLimits { mask_bits: 32, ..DmaLimits::default() }),
                DeviceName::External => spec.domain(&Domain::new(DomainConfig::default())?).untrusted(),
                _ => spec.domain(&Domain::new(DomainConfig::default())?),
            };
            devices.push((name, bus.attach(spec)?, provider));
        }
        Ok(Self { devices, bus })
    }

    /// How `device` reaches `len` bytes of `backing` at `at`: a physical address, or an offset in the provider's BAR.
    ///
    /// # Errors
    /// If the range is not in the BAR, or passes the top of the address space.
    pub fn ask(
        &self,
        device: DeviceName,
        backing: Backing,
        policy: Policy,
        at: Option<u64>,
        len: u64,
    ) -> Result<CaseReport, Box<dyn Error>> {
        let (_, port, provider) =
            self.devices.iter().find(|(known, ..)| *known == device).expect("every name is attached");
        let in_bar = matches!(backing, Backing::DmabufPeer | Backing::DeviceCoherent);
        let phys = if in_bar {
            let bar = self.bus.bar(*provider).expect("a provider has a BAR");
            let offset = at.unwrap_or(0);
            if offset.checked_add(len).is_none_or(|end| end > bar.size()) {
                let size = bar.size();
                return Err(format!("{len:#x} bytes at {offset:#x} of a BAR of {size:#x} bytes").into());
            }
            bar.base().offset(offset)
        } else {
            PhysAddr(at.unwrap_or(USUAL_PLACE))
        };
        if phys.checked_add(len).is_none() {
            return Err(format!("{len:#x} bytes at {phys} pass the top of the address space").into());
        }
        let config = DmaConfig { policy, coherent: device != DeviceName::Incoherent, ..DmaConfig::default() };
        let extent =
            Extent { at: 0, phys, len, backing, provider: in_bar.then_some(*provider), writable: true };
        let row = DmaDevice::new(port.clone(), config).explain(&extent, &mut PeerRoutes::default());
        Ok(CaseReport {
            backing: backing.name(),
            device: device.name(),
            about: device.about(),
            phys: phys.0,
            len,
            peer: extent.provider.and_then(|provider| port.peer_route(provider)).map(peer_name),
            answer: RowReport::of(row),
        })
    }
}

fn peer_name(route: PeerRoute) -> &'static str {
    match route {
        PeerRoute::BusAddress => "bus address",
        PeerRoute::HostBridge => "through the host bridge",
        PeerRoute::NotSupported => "not supported",
    }
}

impl DeviceName {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Nic,
        Self::NicAcs,
        Self::NicRoot,
        Self::NicFar,
        Self::External,
        Self::Direct,
        Self::Direct32,
        Self::Incoherent,
    ];

    /// As on the command line.
    pub fn name(self) -> String {
        let value = clap::ValueEnum::to_possible_value(&self).expect("no name is hidden");
        value.get_name().to_owned()
    }
    /// What it is, in a line.
    pub fn about(self) -> String {
        let value = clap::ValueEnum::to_possible_value(&self).expect("no name is hidden");
        value.get_help().map(ToString::to_string).unwrap_or_default()
    }
}
