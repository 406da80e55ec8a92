//! What a process has once: its address space, its bus, its devices, and what the environment asked for.
//!
//! The C interface is global, so this is the one global of the house. It is made when first asked for, and made anew in a
//! forked child that opens a device: threads and watches of the parent are not there.

use crate::errno::Errno;
use crate::objects::{Faces, FileName};
use crate::report;
use crate::settings::{LinkChoice, PLAN, Settings, complain};
use hw_model::bus::{Acs, Bus, DeviceSpec, PortId};
use hw_model::fault_plan::Points;
use hw_model::hca::HcaConfig;
use hw_model::iommu::{Domain, DomainConfig};
use hw_model::link::{
    Link, NearbyLink, OpenUdpError, PcapLink, PlannedLink, ShmConfig, ShmLink, UdpConfig, UdpLink,
};
use hw_model::sync::{Arc, Mutex, MutexGuard, OnceLock};
use hw_model::wire::ip_of;
use mr::device::model::{FaultPolicy, ModelConfig, ModelDevice};
use mr::dma::DmaConfig;
use mr::plan::{Plan, ProcessPlan};
use odp::prefetch::PrefetchPolicy;
use odp::space::process::{Exact, Options, ProcessSpace};
use odp::space::{AddressSpace, Rung};
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

/// The exact rung, if it was installed when the library was loaded.
static EXACT: OnceLock<Exact> = OnceLock::new();
static SETTINGS: OnceLock<Settings> = OnceLock::new();
/// The newest, and the process that made it. A child leaves its parent's behind, with whatever threads it had.
static PROCESS: Mutex<Option<(u32, Arc<Process>)>> = Mutex::new(None);

/// What the environment asks for.
pub(crate) fn settings() -> &'static Settings {
    SETTINGS.get_or_init(Settings::from_environment)
}

/// Called when the library is loaded, with whether that is before the program's first thread: the only moment at which
/// the exact rung can be had. In a dlopen(3) the caller holds the dynamic linker's lock, which the supervisor's thread needs
/// while the caller waits for it.
pub(crate) fn loaded(before_main: bool) {
    if settings().rung == Rung::Exact && before_main {
        match Exact::install() {
            Ok(exact) => drop(EXACT.set(exact)),
            Err(error) => {
                complain(&format!("the exact rung cannot be had ({error}); a weaker one is in force"));
            }
        }
    }
}

/// A fault brings in what it is about and no more, so that faults can be counted.
const COLD_FAULTS: FaultPolicy = FaultPolicy { neighbours: 0, prefetch: PrefetchPolicy::Off };

/// A device, and the structs of the program's that its events are about.
type Opened = (Arc<ModelDevice>, Arc<Faces>);

/// The process's memory and devices.
pub(crate) struct Process {
    pub(crate) space: Arc<ProcessSpace>,
    bus: Arc<Bus>,
    root: PortId,
    plan: Option<ProcessPlan>,
    /// By index. One that was opened once runs on, asleep, as a device does that nobody has open.
    devices: Mutex<Vec<Option<Opened>>>,
    /// Which device a descriptor of an open one is of.
    commands: Mutex<HashMap<FileName, usize>>,
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
                report::leave(&process);
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
        let plan = settings().plan.as_deref().map(read_plan).transpose()?;
        let points = plan.as_ref().map_or(Points::OFF, |plan| Points::with(&plan.faults));
        let space = ProcessSpace::with_points(options, points).map_err(|error| {
            complain(&format!("the memory of this process cannot be watched: {error}"));
            Errno::NODEV
        })?;
        let bus = Bus::new(space.memory());
        let root = bus.add_root_port(bus.first_bridge(), Acs::Off).map_err(|_| Errno::NOMEM)?;
        let devices = Mutex::new(vec![None; settings().devices]);
        Ok(Self { space, bus, root, plan, devices, commands: Mutex::default() })
    }

    /// The device of a number, started when it is first opened.
    pub(crate) fn device(&self, index: usize) -> Result<Opened, Errno> {
        let mut devices = self.devices.lock();
        let slot = devices.get_mut(index).ok_or(Errno::NODEV)?;
        if let Some(opened) = slot {
            return Ok(opened.clone());
        }
        let name = device_name(index);
        let device = self.start(&name).map_err(|error| {
            complain(&format!("{name} cannot be started: {error}"));
            Errno::NODEV
        })?;
        Ok(slot.insert((device, Arc::default())).clone())
    }

    fn start(&self, name: &str) -> Result<Arc<ModelDevice>, Box<dyn std::error::Error + Send + Sync>> {
        let domain = Domain::new(DomainConfig::default())?;
        let port = self.bus.attach(DeviceSpec::new(name).under(self.root).domain(&domain))?;
        // Keys must differ from process to process, and be no peer's guess.
        let seed = RandomState::new().hash_one(name);
        let points = self.points();
        let config = ModelConfig {
            hca: HcaConfig { seed, ..HcaConfig::default() },
            dma: DmaConfig { points: points.clone(), ..DmaConfig::default() },
            faults: if settings().cold { COLD_FAULTS } else { FaultPolicy::default() },
        };
        let link: Arc<dyn Link> = Arc::new(PlannedLink::new(link()?, points));
        // Outside of the plan: what it loses is not written down as received, and is as sent.
        let link = match &settings().pcap {
            Some(beginning) => {
                Arc::new(PcapLink::new(link, std::fs::File::create(capture(beginning, name))?)?)
            }
            None => link,
        };
        Ok(ModelDevice::threaded(name, port, link, config)?)
    }

    pub(crate) fn commands(&self) -> MutexGuard<'_, HashMap<FileName, usize>> {
        self.commands.lock()
    }

    fn points(&self) -> Points {
        self.plan.as_ref().map_or(Points::OFF, |plan| Points::with(&plan.faults))
    }

    /// What the fault plan has done here.
    pub(crate) fn plan(&self) -> Option<&ProcessPlan> {
        self.plan.as_ref()
    }

    /// The devices that were opened, if nobody is opening one at this moment.
    pub(crate) fn opened(&self) -> Vec<Arc<ModelDevice>> {
        self.devices.try_lock().map_or_else(Vec::new, |devices| {
            devices.iter().flatten().map(|(device, _)| Arc::clone(device)).collect()
        })
    }
}

/// Called when the process ends.
pub(crate) fn leaving() {
    // A thread that is in the middle of something may hold the lock, and will not come back.
    let Some(made) = PROCESS.try_lock() else { return };
    if let Some((id, process)) = &*made
        && *id == std::process::id()
    {
        report::leave(process);
    }
}

/// The plan of this process, from its file.
fn read_plan(file: &Path) -> Result<ProcessPlan, Errno> {
    let text = std::fs::read_to_string(file).map_err(|error| {
        complain(&format!("{PLAN}: {} cannot be read: {error}", file.display()));
        Errno::INVAL
    })?;
    let plan = Plan::read(&text).map_err(|error| {
        let line = text[..error.span.start].matches('\n').count() + 1;
        complain(&format!("{PLAN}: {}:{line}: {error}", file.display()));
        Errno::INVAL
    })?;
    Ok(plan.for_process(&program_name()))
}

/// The file name of the program that this process runs.
pub(crate) fn program_name() -> String {
    let program = std::env::current_exe().unwrap_or_default();
    program.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The file for the packets of a device of this process.
fn capture(beginning: &Path, device: &str) -> std::path::PathBuf {
    let mut name = beginning.as_os_str().to_owned();
    name.push(format!("{}-{device}.pcap", std::process::id()));
    name.into()
}

/// A link of its own: over UDP, and through shared memory to other processes of this host that have our library, unless
/// the environment says otherwise.
fn link() -> Result<Arc<dyn Link>, OpenUdpError> {
    let udp = next_free_address()?;
    if settings().link == LinkChoice::Udp {
        return Ok(Arc::new(udp));
    }
    match ShmLink::open(&ShmConfig::at(ip_of(udp.address()))) {
        Ok(shm) => Ok(Arc::new(NearbyLink::new(udp, shm))),
        Err(error) => {
            complain(&format!("no memory is shared with other processes: {error}"));
            Ok(Arc::new(udp))
        }
    }
}

/// The first loopback address whose RoCE port nobody has, from 127.0.0.2 on.
fn next_free_address() -> Result<UdpLink, OpenUdpError> {
    let mut refusal = None;
    for number in 2..=u8::MAX {
        let address = IpAddr::V4(Ipv4Addr::new(127, 0, 0, number));
        match UdpLink::open(&UdpConfig::at(address)) {
            Err(OpenUdpError::Bind { address, source }) if source.kind() == io::ErrorKind::AddrInUse => {
                refusal = Some(OpenUdpError::Bind { address, source });
            }
            other => return other,
        }
    }
    // At least one was tried.
    Err(refusal.unwrap_or(OpenUdpError::Resources {
        address: IpAddr::V4(Ipv4Addr::LOCALHOST),
        source: io::ErrorKind::AddrInUse.into(),
    }))
}

/// The name of a device.
pub(crate) fn device_name(index: usize) -> String {
    format!("anypage{index}")
}

/// Its node GUID: locally administered, and the same in every process, since programs compare it.
pub(crate) fn device_guid(index: usize) -> u64 {
    0x0261_6e79_7061_6700 + index as u64
}
