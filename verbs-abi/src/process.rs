//! What a process has once: its address space, its bus, its devices, and what the environment asked for.
//!
//! The C interface is global, so this is the one global of the house. It is made when first asked for, and made anew in a
//! forked child that opens a device: threads and watches of the parent are not there.

use crate::errno::Errno;
use crate::settings::{Settings, complain};
use hw_model::bus::{Acs, Bus, DeviceSpec, PortId};
use hw_model::fault_plan::Points;
use hw_model::hca::HcaConfig;
use hw_model::iommu::{Domain, DomainConfig};
use hw_model::link::Fabric;
use hw_model::sync::{Arc, Mutex, OnceLock};
use mr::device::model::{ModelConfig, ModelDevice};
use mr::dma::DmaConfig;
use odp::space::process::{Exact, Options, ProcessSpace};
use odp::space::{AddressSpace, Rung};
use std::hash::{BuildHasher, RandomState};

/// The exact rung, if it was installed when the library was loaded.
static EXACT: OnceLock<Exact> = OnceLock::new();
static SETTINGS: OnceLock<Settings> = OnceLock::new();
/// The newest, and the process that made it. A child leaves its parent's behind, with whatever threads it had.
static PROCESS: Mutex<Option<(u32, Arc<Process>)>> = Mutex::new(None);

/// What the environment asks for.
pub(crate) fn settings() -> &'static Settings {
    SETTINGS.get_or_init(Settings::from_environment)
}

/// Called when the library is loaded, before the program's first thread: the only moment at which the exact rung can be
/// had.
pub(crate) fn loaded() {
    if settings().rung == Rung::Exact {
        match Exact::install() {
            Ok(exact) => drop(EXACT.set(exact)),
            Err(error) => {
                complain(&format!("the exact rung cannot be had ({error}); a weaker one is in force"))
            }
        }
    }
}

/// The process's memory and devices.
pub(crate) struct Process {
    pub(crate) space: Arc<ProcessSpace>,
    bus: Arc<Bus>,
    root: PortId,
    fabric: Arc<Fabric>,
    /// By index. One that was opened once runs on, asleep, as a device does that nobody has open.
    devices: Mutex<Vec<Option<Arc<ModelDevice>>>>,
}

impl Process {
    /// That of this process.
    pub(crate) fn get() -> Result<Arc<Self>, Errno> {
        let mut made = PROCESS.lock();
        let id = std::process::id();
        match &*made {
            Some((of, process)) if *of == id => Ok(Arc::clone(process)),
            _ => {
                let process = Arc::new(Self::new()?);
                let parents = made.replace((id, Arc::clone(&process)));
                // Nothing of the parent's is dropped here: its threads cannot be joined.
                std::mem::forget(parents);
                Ok(process)
            }
        }
    }

    fn new() -> Result<Self, Errno> {
        let exact = EXACT.get().copied();
        let options = Options { strongest: settings().rung, exact, ..Options::default() };
        let space = ProcessSpace::open(options).map_err(|error| {
            complain(&format!("the memory of this process cannot be watched: {error}"));
            Errno::NODEV
        })?;
        let bus = Bus::new(space.memory());
        let root = bus.add_root_port(bus.first_bridge(), Acs::Off).map_err(|_| Errno::NOMEM)?;
        let devices = Mutex::new(vec![None; settings().devices]);
        Ok(Self { space, bus, root, fabric: Fabric::new(), devices })
    }

    /// The device of a number, started when it is first opened.
    pub(crate) fn device(&self, index: usize) -> Result<Arc<ModelDevice>, Errno> {
        let mut devices = self.devices.lock();
        let slot = devices.get_mut(index).ok_or(Errno::NODEV)?;
        if let Some(device) = slot {
            return Ok(Arc::clone(device));
        }
        let name = device_name(index);
        let device = self.start(&name).map_err(|error| {
            complain(&format!("{name} cannot be started: {error}"));
            Errno::NODEV
        })?;
        *slot = Some(Arc::clone(&device));
        Ok(device)
    }

    fn start(&self, name: &str) -> Result<Arc<ModelDevice>, Box<dyn std::error::Error + Send + Sync>> {
        let domain = Domain::new(DomainConfig::default())?;
        let port = self.bus.attach(DeviceSpec::new(name).under(self.root).domain(&domain))?;
        // Keys must differ from process to process, and be no peer's guess.
        let seed = RandomState::new().hash_one(name);
        let config = ModelConfig {
            hca: HcaConfig { seed, ..HcaConfig::default() },
            dma: DmaConfig { points: Points::OFF, ..DmaConfig::default() },
            ..ModelConfig::default()
        };
        Ok(ModelDevice::threaded(name, port, self.fabric.port(), config)?)
    }
}

/// The name of a device.
pub(crate) fn device_name(index: usize) -> String {
    format!("anypage{index}")
}

/// Its node GUID: locally administered, and the same in every process, since programs compare it.
pub(crate) fn device_guid(index: usize) -> u64 {
    0x0261_6e79_7061_6700 + index as u64
}
