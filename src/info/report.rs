//! The report, for people and as JSON.

use super::kernel::{self, HugePages, Limit, RdmaDevice};
use super::verbs::Verbs;
use crate::machine::{Machine, MachineConfig};
use comfy_table::{ContentArrangement, Table, presets};
use hw_model::hca::{Capabilities, DeviceAttributes, Gid, OnDemandOperations, PORT};
use hw_model::sync::Arc;
use mr::Device;
use odp::space::process::{self, Exact, InstallError, Options, ProcessSpace, Support};
use odp::space::{AddressSpace, Rung};
use schemars::JsonSchema;
use serde::Serialize;
use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;

/// What `--json` prints; docs/info.schema.json describes it.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Report {
    /// The version of anypage.
    pub version: &'static str,
    /// How well changes of memory are seen.
    pub ladder: Ladder,
    /// What the kernel gives.
    pub kernel: Kernel,
    /// The devices of anypage.
    pub devices: Vec<DeviceReport>,
    /// The RDMA devices of the kernel.
    pub rdma_devices: Vec<RdmaDevice>,
    /// What the backend of real devices makes of them.
    pub verbs: Verbs,
}

/// The rungs of the ladder.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Ladder {
    /// The rung of a program that does nothing for it.
    pub in_force: String,
    /// The best rung of a program that installs it first thing in main.
    pub best: String,
    /// Every rung, strongest first.
    pub rungs: Vec<RungReport>,
}

/// One rung.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct RungReport {
    /// Its name.
    pub rung: String,
    /// Whether it can be had here.
    pub available: bool,
    /// What it promises if it can be had, and if not why not.
    pub why: String,
}

/// What the kernel gives.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Kernel {
    /// Its name and release.
    pub release: String,
    /// What was asked of it, and what it answered: `yes`, or why not.
    pub features: BTreeMap<&'static str, String>,
    /// Limits of this process and of the machine.
    pub limits: Vec<Limit>,
    /// The mode of transparent huge pages.
    pub transparent_huge_pages: Option<String>,
    /// The pools of hugetlbfs.
    pub huge_pages: Vec<HugePages>,
}

/// One device of anypage.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct DeviceReport {
    /// Its name.
    pub name: String,
    /// Its firmware's version.
    pub firmware: String,
    /// The number of its node.
    pub node_guid: String,
    /// Whether an IOMMU translates for it.
    pub iommu: bool,
    /// What it can do.
    pub capabilities: Vec<String>,
    /// What its atomics are atomic with.
    pub atomics: String,
    /// For each transport service, the operations whose memory may be on demand.
    pub on_demand: BTreeMap<&'static str, Vec<String>>,
    /// How many objects of each kind there may be, and how large.
    pub limits: BTreeMap<&'static str, u64>,
    /// Its port.
    pub port: PortReport,
}

/// The port of a device.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct PortReport {
    /// Its state.
    pub state: String,
    /// Bytes of payload of the largest packet that its link carries.
    pub active_mtu: u32,
    /// Bytes of the largest message.
    pub max_message: u32,
    /// Its addresses.
    pub gids: Vec<String>,
    /// Its partition keys.
    pub pkeys: Vec<String>,
}

impl Report {
    /// Looks at this machine. Tries the exact rung by installing it.
    ///
    /// # Errors
    /// If the memory of this process cannot be used in any way.
    pub fn new() -> Result<Self, Box<dyn Error>> {
        Self::with(Exact::install())
    }

    fn with(exact: Result<Exact, InstallError>) -> Result<Self, Box<dyn Error>> {
        let space = ProcessSpace::open(Options::default())?;
        let capabilities = space.capabilities();
        Ok(Self {
            version: env!("CARGO_PKG_VERSION"),
            ladder: Ladder::new(&exact, capabilities),
            kernel: Kernel::new(&exact, capabilities),
            devices: vec![DeviceReport::model(&space)?],
            rdma_devices: kernel::rdma_devices(),
            verbs: Verbs::look(),
        })
    }
}

impl Ladder {
    fn new(exact: &Result<Exact, InstallError>, capabilities: &process::Capabilities) -> Self {
        let events = capabilities.userfaultfd.is_yes() || capabilities.dev_userfaultfd.is_yes();
        let rung = |rung: Rung, refused: Option<String>, promise: &str| RungReport {
            rung: rung.to_string(),
            available: refused.is_none(),
            why: refused.unwrap_or_else(|| promise.to_owned()),
        };
        let no_events = || {
            let Support::Refused(device) = capabilities.dev_userfaultfd else {
                return format!("userfaultfd(2): {}", capabilities.userfaultfd);
            };
            format!("userfaultfd(2): {}; /dev/userfaultfd: no: {device}", capabilities.userfaultfd)
        };
        let rungs = vec![
            rung(
                Rung::Exact,
                exact.as_ref().err().map(ToString::to_string),
                "as a kernel notifier, for this process's own calls; a program installs it first thing in main",
            ),
            rung(Rung::Owned, None, "exact, for memory that is changed through anypage"),
            rung(
                Rung::Events,
                (!events).then(no_events),
                "drops are seen before the page goes, unmaps and moves after; other changes when a copy meets them",
            ),
            rung(Rung::Poll, None, "mappings are compared before each burst; weak"),
        ];
        let best = if exact.is_ok() { Rung::Exact } else { capabilities.rung };
        Self { in_force: capabilities.rung.to_string(), best: best.to_string(), rungs }
    }
}

impl Kernel {
    fn new(exact: &Result<Exact, InstallError>, capabilities: &process::Capabilities) -> Self {
        let actions = kernel::seccomp_actions();
        let notifies = actions.iter().any(|action| action == "user_notif");
        let exact = match exact {
            Ok(_) => "yes".to_owned(),
            Err(error) if notifies => format!("the kernel has it; {error}"),
            Err(error) => error.to_string(),
        };
        let features = BTreeMap::from([
            ("userfaultfd", capabilities.userfaultfd.to_string()),
            ("/dev/userfaultfd", capabilities.dev_userfaultfd.to_string()),
            ("PAGEMAP_SCAN", capabilities.pagemap_scan.to_string()),
            ("PROCMAP_QUERY", capabilities.procmap_query.to_string()),
            ("membarrier", capabilities.membarrier.to_string()),
            ("seccomp user notification", exact),
            ("copying", capabilities.copy.to_string()),
        ]);
        Self {
            release: kernel::release(),
            features,
            limits: kernel::limits(),
            transparent_huge_pages: kernel::transparent_huge_pages(),
            huge_pages: kernel::huge_pages(),
        }
    }
}

impl DeviceReport {
    /// The modelled device, as the other commands make it.
    fn model(space: &Arc<ProcessSpace>) -> Result<Self, Box<dyn Error>> {
        let config = MachineConfig { threads: false, ..MachineConfig::default() };
        let machine = Machine::new(space.memory(), None, &config).map_err(|error| error as Box<dyn Error>)?;
        let device = &machine.near;
        let said = device.query().ok_or("the modelled device says nothing of itself")?;
        let port = device.query_port(PORT)?;
        let gids = (0..port.gids).map(|index| device.query_gid(PORT, index));
        let pkeys = (0..port.pkeys).map(|index| device.query_pkey(PORT, index));
        let address = |gid: Gid| std::net::Ipv6Addr::from(gid.0).to_string();
        let port = PortReport {
            state: format!("{:?}", port.state).to_lowercase(),
            active_mtu: port.active_mtu.bytes(),
            max_message: port.max_message,
            gids: gids.map(|gid| gid.map(address)).collect::<Result<_, _>>()?,
            pkeys: pkeys.map(|pkey| pkey.map(|pkey| format!("{:#06x}", pkey.0))).collect::<Result<_, _>>()?,
        };
        let attributes = device.attributes();
        Ok(Self {
            name: "model".to_owned(),
            firmware: said.firmware.to_owned(),
            node_guid: format!("{:016x}", said.node_guid),
            iommu: attributes.iommu,
            capabilities: said.capabilities.iter_names().map(|(name, _)| lower(name)).collect(),
            atomics: format!("{:?}", said.atomics).to_lowercase(),
            on_demand: on_demand(&said),
            limits: limits(&said),
            port,
        })
    }

    /// Whether it can do that.
    #[must_use]
    pub fn can(&self, capability: Capabilities) -> bool {
        let names: Vec<_> = capability.iter_names().map(|(name, _)| lower(name)).collect();
        names.iter().all(|name| self.capabilities.contains(name))
    }
}

fn lower(name: &str) -> String {
    name.to_lowercase().replace('_', " ")
}

fn on_demand(said: &DeviceAttributes) -> BTreeMap<&'static str, Vec<String>> {
    let names =
        |operations: OnDemandOperations| operations.iter_names().map(|(name, _)| lower(name)).collect();
    let odp = &said.on_demand;
    BTreeMap::from([
        ("rc", names(odp.rc)),
        ("uc", names(odp.uc)),
        ("ud", names(odp.ud)),
        ("xrc", names(odp.xrc)),
    ])
}

fn limits(said: &DeviceAttributes) -> BTreeMap<&'static str, u64> {
    let limits = &said.limits;
    BTreeMap::from([
        ("bytes of a region", said.max_region),
        ("protection domains", u64::from(limits.pds)),
        ("memory keys, windows among them", u64::from(limits.keys)),
        ("entries of a fast registration", u64::from(limits.fast_entries)),
        ("completion queues", u64::from(limits.cqs)),
        ("entries of a completion queue", u64::from(limits.cq_entries)),
        ("completions of a moderated event", u64::from(said.moderation.max_count)),
        ("microseconds of a moderated event", u64::from(said.moderation.max_period_us)),
        ("queue pairs", u64::from(limits.qps)),
        ("requests of a send queue", u64::from(limits.send_requests)),
        ("scatter-gather entries of a request", u64::from(limits.sges)),
        ("bytes of a message", u64::from(limits.message_bytes)),
        ("reads and atomics outstanding on a queue pair", u64::from(limits.reads)),
        ("requests of a receive queue", u64::from(limits.recv_requests)),
        ("shared receive queues", u64::from(limits.srqs)),
        ("bytes of a request inline", u64::from(limits.inline_bytes)),
        ("address handles", u64::from(limits.ahs)),
        ("bytes of device memory", limits.device_memory),
        ("partition keys", u64::from(said.max_pkeys)),
    ])
}

fn table(header: &str) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    if table.width().is_none() {
        table.set_width(120);
    }
    table.set_header([header, ""]);
    table
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { version, ladder, kernel, devices, rdma_devices, verbs } = self;
        writeln!(f, "anypage {version} on {}\n", kernel.release)?;
        let mut rungs = table(&format!("rung in force: {}", ladder.in_force));
        for RungReport { rung, available, why } in &ladder.rungs {
            rungs.add_row([rung.clone(), if *available { why.clone() } else { format!("not here: {why}") }]);
        }
        writeln!(f, "{rungs}\n")?;
        let mut features = table("kernel");
        for (feature, answer) in &kernel.features {
            features.add_row([feature, answer.as_str()]);
        }
        let modes = kernel.transparent_huge_pages.as_deref().unwrap_or("none");
        features.add_row(["transparent huge pages", modes]);
        for HugePages { bytes, pages, free } in &kernel.huge_pages {
            features
                .add_row([format!("hugetlb of {} KiB", bytes >> 10), format!("{pages} pages, {free} free")]);
        }
        for Limit { name, value, bounds } in &kernel.limits {
            let value = value.map_or("unlimited or not said".to_owned(), |value| value.to_string());
            features.add_row([(*name).to_owned(), format!("{value} ({bounds})")]);
        }
        writeln!(f, "{features}\n")?;
        devices.iter().try_for_each(|device| writeln!(f, "{device}\n"))?;
        let mut kernels = table("RDMA devices of the kernel");
        for RdmaDevice { name, firmware, ports, .. } in rdma_devices {
            let firmware = firmware.as_deref().unwrap_or("no version");
            kernels.add_row([name.clone(), format!("{firmware}; ports: {}", ports.join(", "))]);
        }
        if rdma_devices.is_empty() {
            kernels.add_row(["none", "/sys/class/infiniband is empty or not there"]);
        }
        writeln!(f, "{kernels}")?;
        if !verbs.built {
            return writeln!(f, "\nWhat these cannot do is told by a build with the feature verbs.");
        }
        for device in &verbs.devices {
            let mut rows = table(&format!("verbs device {}", device.name));
            rows.add_rows(device.rows());
            writeln!(f, "\n{rows}")?;
        }
        Ok(())
    }
}

impl fmt::Display for DeviceReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows = table(&format!("device {}", self.name));
        rows.add_row(["node GUID", &self.node_guid]);
        rows.add_row(["IOMMU", if self.iommu { "translates" } else { "none" }]);
        rows.add_row(["capabilities", &self.capabilities.join(", ")]);
        rows.add_row(["atomics with", &self.atomics]);
        for (service, operations) in &self.on_demand {
            let operations = if operations.is_empty() { "nothing".to_owned() } else { operations.join(", ") };
            rows.add_row([format!("on demand, {service}"), operations]);
        }
        for (limit, value) in &self.limits {
            rows.add_row([(*limit).to_owned(), value.to_string()]);
        }
        let PortReport { state, active_mtu, gids, pkeys, .. } = &self.port;
        rows.add_row(["port 1".to_owned(), format!("{state}, packets of {active_mtu} bytes")]);
        rows.add_row(["its addresses", &gids.join(", ")]);
        rows.add_row(["its partition keys", &pkeys.join(", ")]);
        write!(f, "{rows}")
    }
}

#[cfg(test)]
mod tests;
