//! Many regions of one page each: whether they can be had at all, and whether the last cost more than the first.

use super::devices::Registrar;
use super::floor::thread_time_ns;
use super::report::CrowdRow;
use super::round::options;
use super::{BenchError, How, host, setup};
use crate::mixed::{Kind, MixedMemory};
use hw_model::addr::{PAGE_SIZE, page_bytes};
use hw_model::sync::Arc;
use mr::Region;
use odp::space::UserRange;
use odp::space::process::ProcessSpace;
use std::io;
use std::time::Instant;

/// Regions whose cost is looked at, at either end.
const END: u64 = 1000;
/// Mappings that are left to the rest of the process.
const SPARE: u64 = 4096;

/// Registers `count` regions with each device: all in one mapping, and in as many mappings as may be had, each of a page.
pub(super) fn measure(
    devices: &[Registrar],
    space: &Arc<ProcessSpace>,
    count: u64,
    modes: &[How],
) -> Result<Vec<CrowdRow>, BenchError> {
    let mut rows = Vec::new();
    let separate = count.min(host::most_mappings().saturating_sub(SPARE)).max(1);
    for device in devices {
        for &how in modes.iter().filter(|how| **how != How::Prefetch && device.has(**how)) {
            for mappings in [1, separate] {
                let memory = memory(space, count, mappings).map_err(setup("no memory to register"))?;
                rows.push(crowd(device, &memory, how, count, mappings)?);
            }
        }
    }
    Ok(rows)
}

/// One mapping of `count` pages, or `mappings` of one page: neighbours differ in what they ask of huge pages, so the kernel
/// keeps them apart.
fn memory(space: &Arc<ProcessSpace>, count: u64, mappings: u64) -> io::Result<UserRange> {
    let memory = if mappings == 1 {
        MixedMemory::new(&[(Kind::Untouched, page_bytes(count))])?
    } else {
        let kinds = [Kind::Anonymous, Kind::TransparentHuge];
        let parts = (0..mappings).map(|page| (kinds[page as usize % 2], PAGE_SIZE));
        MixedMemory::new(&parts.collect::<Vec<_>>())?
    };
    Ok(Arc::new(memory).user_range(Arc::clone(space) as _))
}

fn crowd(
    device: &Registrar,
    memory: &UserRange,
    how: How,
    count: u64,
    mappings: u64,
) -> Result<CrowdRow, BenchError> {
    let pages = memory.range().page_count();
    let mut kept: Vec<Arc<dyn Region>> = Vec::with_capacity(count as usize);
    let mut costs: Vec<u64> = Vec::with_capacity(count as usize);
    let start = Instant::now();
    for number in 0..count {
        let part = memory.part(page_bytes(number % pages), PAGE_SIZE).expect("a page of it");
        let before = thread_time_ns();
        let registered = device.register(&part, options(how));
        let cost = thread_time_ns() - before;
        match registered {
            Ok(region) => {
                costs.push(cost);
                kept.push(region);
            }
            Err(refused) => {
                return Ok(CrowdRow {
                    refused: Some(refused.to_string()),
                    ..row(device, how, mappings, &costs)
                });
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let start = Instant::now();
    drop(kept);
    let seconds_gone = start.elapsed().as_secs_f64();
    Ok(CrowdRow { seconds, seconds_gone, ..row(device, how, mappings, &costs) })
}

fn row(device: &Registrar, how: How, mappings: u64, costs: &[u64]) -> CrowdRow {
    let end = (END as usize).min(costs.len());
    let mean = |costs: &[u64]| costs.iter().sum::<u64>() as f64 / costs.len().max(1) as f64;
    let median = |costs: &[u64]| {
        let mut costs = costs.to_vec();
        costs.sort_unstable();
        costs.get(costs.len() / 2).copied().unwrap_or(0)
    };
    let (first, last) = (&costs[..end], &costs[costs.len() - end..]);
    CrowdRow {
        device: device.name().to_owned(),
        mode: how.name().to_owned(),
        regions: costs.len() as u64,
        mappings,
        first_ns: median(first),
        last_ns: median(last),
        first_mean_ns: mean(first),
        last_mean_ns: mean(last),
        seconds: 0.0,
        seconds_gone: 0.0,
        refused: None,
    }
}
