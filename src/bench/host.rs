//! The machine that something was measured on.

use super::report::Host;
use crate::info::kernel;
use odp::space::AddressSpace;
use odp::space::process::ProcessSpace;
use std::fs;

impl Host {
    /// This machine, now.
    pub(super) fn here(space: &ProcessSpace) -> Self {
        let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let line = |name: &str| {
            let mut lines = processor.lines().filter_map(|line| line.split_once(':'));
            lines.find(|(field, _)| field.trim() == name).map(|(_, value)| value.trim().to_owned())
        };
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        Self {
            kernel: kernel::release(),
            processor: line("model name").unwrap_or_else(|| "unknown".to_owned()),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            is_virtual: line("flags").is_some_and(|flags| flags.split(' ').any(|flag| flag == "hypervisor")),
            memory: memory("MemTotal:").unwrap_or(0),
            transparent_huge_pages: kernel::transparent_huge_pages(),
            rung: space.rung(space.addresses()).to_string(),
            load: load.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(0.0),
        }
    }
}

/// Bytes that /proc/meminfo says of `field`.
pub(super) fn memory(field: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(field))?;
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}

/// Mappings that a process may have.
pub(super) fn most_mappings() -> u64 {
    let limit = fs::read_to_string("/proc/sys/vm/max_map_count").ok();
    limit.and_then(|text| text.trim().parse().ok()).unwrap_or(65_530)
}
