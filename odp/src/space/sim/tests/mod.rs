mod behaviours;
mod device;
mod model;
mod threads;
mod world;

use super::*;
use hw_model::addr::{PAGE_SIZE, PhysAddr, VirtAddr, VirtRange};
use hw_model::bus::{ProviderId, RamStorage};
use hw_model::sync::Arc;

/// A host with a BAR of an exporter and memories of two other devices.
struct Machine {
    host: Arc<SimHost>,
    bar: DeviceMemoryId,
    coherent: DeviceMemoryId,
    private: DeviceMemoryId,
}

const DEVICE_PAGES: u64 = 64;

fn machine(config: SimConfig) -> Machine {
    let host = SimHost::new(config).expect("memory for a small host");
    let add = |kind, number: u64| {
        let storage = RamStorage::new(DEVICE_PAGES * PAGE_SIZE).expect("memory for a small BAR");
        let base = PhysAddr(0x3800_0000_0000 + (number << 30));
        host.add_device(kind, ProviderId(number as u32), base, storage).expect("room for it")
    };
    let (bar, coherent, private) =
        (add(DeviceKind::Peer, 1), add(DeviceKind::Coherent, 2), add(DeviceKind::Private, 3));
    Machine { host, bar, coherent, private }
}

fn small(seed: u64, faults: FaultMode) -> SimConfig {
    SimConfig { ram_pages: 4096, seed, faults, nodes: 2 }
}

/// Pages `first..first + pages` of `range`.
fn part(range: VirtRange, first: u64, pages: u64) -> VirtRange {
    VirtRange::new(range.start().offset(first * PAGE_SIZE), pages * PAGE_SIZE).expect("fits")
}

fn page_at(range: VirtRange, page: u64) -> VirtAddr {
    range.start().offset(page * PAGE_SIZE)
}
