//! What the kernel says in /proc and /sys.

use schemars::JsonSchema;
use serde::Serialize;
use std::fs;
use std::path::Path;

/// A limit of this process or of the machine.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Limit {
    /// Its name.
    pub name: &'static str,
    /// Its value; none if there is no limit, or the kernel does not say.
    pub value: Option<u64>,
    /// What it bounds here.
    pub bounds: &'static str,
}

/// Pages of hugetlbfs of one size.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct HugePages {
    /// Bytes of one.
    pub bytes: u64,
    /// How many there are.
    pub pages: u64,
    /// How many are free.
    pub free: u64,
}

/// An RDMA device of the kernel.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct RdmaDevice {
    /// Its name.
    pub name: String,
    /// Its firmware's version, or the driver's.
    pub firmware: Option<String>,
    /// The number of its node.
    pub node_guid: Option<String>,
    /// The states of its ports, in order.
    pub ports: Vec<String>,
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

fn number(path: impl AsRef<Path>) -> Option<u64> {
    read(path)?.parse().ok()
}

/// Names in a directory, in order; none if it is not there.
fn names(path: &str) -> Vec<String> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// `Linux 6.18.1`.
pub fn release() -> String {
    read("/proc/sys/kernel/osrelease")
        .map_or_else(|| "unknown".to_owned(), |release| format!("Linux {release}"))
}

/// The limits that matter.
pub fn limits() -> Vec<Limit> {
    use rustix::process::{Resource, getrlimit};
    let sysctl = |name, path, bounds| Limit { name, value: number(path), bounds };
    let process = |name, resource, bounds| Limit { name, value: getrlimit(resource).current, bounds };
    vec![
        process("RLIMIT_MEMLOCK", Resource::Memlock, "bytes of mlock and of io_uring's pins"),
        process("RLIMIT_NOFILE", Resource::Nofile, "completion channels and event streams"),
        sysctl(
            "vm.max_map_count",
            "/proc/sys/vm/max_map_count",
            "mappings; watching a range may split the mappings at its ends",
        ),
        sysctl(
            "vm.unprivileged_userfaultfd",
            "/proc/sys/vm/unprivileged_userfaultfd",
            "0: faults in the kernel are not ours to handle, which is not needed",
        ),
        sysctl(
            "vm.overcommit_memory",
            "/proc/sys/vm/overcommit_memory",
            "2: page lists of huge ranges may be refused",
        ),
    ]
}

/// What seccomp can do with a call.
pub fn seccomp_actions() -> Vec<String> {
    let actions = read("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default();
    actions.split_whitespace().map(str::to_owned).collect()
}

/// The mode of transparent huge pages: what is in brackets.
pub fn transparent_huge_pages() -> Option<String> {
    let modes = read("/sys/kernel/mm/transparent_hugepage/enabled")?;
    let (_, rest) = modes.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

/// The pools of hugetlbfs.
pub fn huge_pages() -> Vec<HugePages> {
    const POOLS: &str = "/sys/kernel/mm/hugepages";
    let pool = |name: String| {
        let kilobytes: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
        let count = |what| number(format!("{POOLS}/{name}/{what}"));
        Some(HugePages {
            bytes: kilobytes << 10,
            pages: count("nr_hugepages")?,
            free: count("free_hugepages")?,
        })
    };
    names(POOLS).into_iter().filter_map(pool).collect()
}

/// The RDMA devices of the kernel.
pub fn rdma_devices() -> Vec<RdmaDevice> {
    const DEVICES: &str = "/sys/class/infiniband";
    let device = |name: String| {
        let attribute = |what: &str| read(format!("{DEVICES}/{name}/{what}")).filter(|text| !text.is_empty());
        let ports = names(&format!("{DEVICES}/{name}/ports"));
        let ports = ports.iter().filter_map(|port| attribute(&format!("ports/{port}/state"))).collect();
        RdmaDevice { firmware: attribute("fw_ver"), node_guid: attribute("node_guid"), ports, name }
    };
    names(DEVICES).into_iter().map(device).collect()
}
