//! A modelled machine: two HCAs, and a GPU whose BAR one of them reaches by bus address, because both are below one
//! switch. What the demo, the examples, the tests and the benches run on.

use hw_model::bus::{Acs, Bar, BarStorage, Bus, DeviceSpec, DmaPort, HostMemory, PortId};
use hw_model::fault_plan::Points;
use hw_model::hca::{AckTimeout, HcaConfig};
use hw_model::iommu::{Domain, DomainConfig};
use hw_model::link::Fabric;
use hw_model::sync::Arc;
use mr::device::model::{FaultPolicy, ModelConfig, ModelDevice};
use mr::dma::DmaConfig;
use mr::{CompletionQueue, Device, ProtectionDomain, QueuePair, Region, RegisterOptions};
use odp::space::UserRange;

/// Anything that can go wrong while a machine is put together.
pub type BuildError = Box<dyn std::error::Error + Send + Sync>;

/// How to build a [`Machine`].
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// What keys and sequence numbers come from.
    pub seed: u64,
    /// Whether the HCAs are behind an IOMMU.
    pub iommu: bool,
    /// The HCAs.
    pub hca: HcaConfig,
    /// Fault points of the near HCA.
    pub points: Points,
    /// Whether the devices have threads; else they move in steps.
    pub threads: bool,
    /// How page faults are answered.
    pub faults: FaultPolicy,
}

impl Default for MachineConfig {
    fn default() -> Self {
        // The link in this process loses nothing, so a missing acknowledgement means that a thread has not had its turn
        // on a busy machine: wait for it (1.07 s, seven times) rather than send again.
        let ack_timeout = AckTimeout::from_code(18).expect("five bits");
        let hca = HcaConfig { ack_timeout, ..HcaConfig::default() };
        Self { seed: 1, iommu: true, hca, points: Points::OFF, threads: true, faults: FaultPolicy::default() }
    }
}

/// The machine's devices.
pub struct Machine {
    /// The bus.
    pub bus: Arc<Bus>,
    /// The HCA that shares a switch with the GPU.
    pub near: Arc<ModelDevice>,
    /// The HCA at the other end.
    pub far: Arc<ModelDevice>,
    /// The GPU's BAR, if it has one.
    pub bar: Option<Arc<Bar>>,
}

impl Machine {
    /// A machine whose host memory is `memory` and whose GPU, if there is one, keeps its BAR in `storage`.
    ///
    /// # Errors
    /// What any part said.
    pub fn new(
        memory: Arc<dyn HostMemory>,
        storage: Option<Arc<dyn BarStorage>>,
        config: &MachineConfig,
    ) -> Result<Self, BuildError> {
        let bus = Bus::new(memory);
        let root = bus.add_root_port(bus.first_bridge(), Acs::Off)?;
        let switch = bus.add_switch(root)?;
        let below_first = bus.add_downstream_port(switch, Acs::Off)?;
        let below_second = bus.add_downstream_port(switch, Acs::Off)?;
        let elsewhere = bus.add_root_port(bus.first_bridge(), Acs::Off)?;
        let bar = match storage {
            Some(storage) => {
                let gpu = bus.attach(DeviceSpec::new("gpu0").under(below_second))?;
                Some(bus.add_bar(gpu.device(), storage)?)
            }
            None => None,
        };
        let fabric = Fabric::new();
        let near = hca("hca0", attach(&bus, "hca0", below_first, config.iommu)?, &fabric, config, 0)?;
        let far = hca("hca1", attach(&bus, "hca1", elsewhere, config.iommu)?, &fabric, config, 1)?;
        Ok(Self { bus, near, far, bar })
    }
}

fn attach(bus: &Arc<Bus>, name: &str, port: PortId, iommu: bool) -> Result<DmaPort, BuildError> {
    let spec = DeviceSpec::new(name).under(port);
    let spec = if iommu { spec.domain(&Domain::new(DomainConfig::default())?) } else { spec };
    Ok(bus.attach(spec)?)
}

fn hca(
    name: &str,
    port: DmaPort,
    fabric: &Arc<Fabric>,
    config: &MachineConfig,
    index: u64,
) -> Result<Arc<ModelDevice>, BuildError> {
    let points = if index == 0 { config.points.clone() } else { Points::OFF };
    let model = ModelConfig {
        hca: HcaConfig { seed: config.seed.wrapping_add(index), ..config.hca },
        dma: DmaConfig { points, ..DmaConfig::default() },
        faults: config.faults,
    };
    let link = fabric.port();
    Ok(if config.threads {
        ModelDevice::threaded(name, port, link, model)?
    } else {
        ModelDevice::stepped(name, port, link, model)?
    })
}

/// One end of a connection: a region, and a queue pair that completes to its own queue.
pub struct End {
    /// The protection domain of both.
    pub pd: Arc<dyn ProtectionDomain>,
    /// The region.
    pub region: Arc<dyn Region>,
    /// The queue pair.
    pub qp: Arc<dyn QueuePair>,
    /// Where it completes.
    pub cq: Arc<dyn CompletionQueue>,
}

impl End {
    /// Registers `memory` on `device` and makes a queue pair beside it.
    ///
    /// # Errors
    /// What the device said.
    pub fn new(
        device: &Arc<ModelDevice>,
        memory: &UserRange,
        options: RegisterOptions,
    ) -> Result<Self, BuildError> {
        let pd = Arc::clone(device).alloc_pd()?;
        let cq = Arc::clone(device).create_cq(1024)?;
        let qp = Arc::clone(&pd).create_qp(Arc::clone(&cq), 256)?;
        let region = Arc::clone(&pd).register(memory, options)?;
        Ok(Self { pd, region, qp, cq })
    }

    /// Connects the two.
    ///
    /// # Errors
    /// If either is connected already.
    pub fn connect(&self, other: &Self) -> Result<(), BuildError> {
        self.qp.connect(other.qp.endpoint())?;
        other.qp.connect(self.qp.endpoint())?;
        Ok(())
    }
}
