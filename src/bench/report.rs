//! What a measurement came to, for people and as JSON.

use super::plan::Group;
use super::round::{Contender, Seen};
use super::{Before, How, Pages};
use crate::perf::Latency;
use comfy_table::{CellAlignment, Table, presets};
use hw_model::addr::PAGE_SIZE;
use odp::space::process::ProcessSpace;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

/// The result. The fields are the JSON of `--json`; docs/bench.schema.json describes them.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Report {
    /// The version of anypage.
    pub version: String,
    /// The machine.
    pub host: Host,
    /// The devices, in the order of their turns.
    pub devices: Vec<String>,
    /// One for each who took part in each set of rounds.
    pub rows: Vec<Row>,
    /// With --crowd, one for each device, mode and layout.
    pub crowds: Vec<CrowdRow>,
}

/// The machine that was measured on.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Host {
    /// Its kernel.
    pub kernel: String,
    /// Its processors, by name.
    pub processor: String,
    /// Processors that this process may use.
    pub processors: usize,
    /// Whether it is a virtual one.
    pub is_virtual: bool,
    /// Bytes of memory.
    pub memory: u64,
    /// The mode of transparent huge pages.
    pub transparent_huge_pages: Option<String>,
    /// How the model learns of changes of memory.
    pub rung: String,
    /// Programs that wanted to run, over the minute before: with more than there are processors, look at processor time.
    pub load: f64,
}

/// One device in one mode, or the floor, or the real pin, over one kind and size of memory.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Row {
    /// The device; or `floor`, populating and scanning; or `real pin`, io_uring's registered buffers.
    pub what: String,
    /// `pinned`, `on-demand`, `empty` or `prefetch`.
    pub mode: Option<String>,
    /// The pages.
    pub pages: Pages,
    /// Bytes of one region.
    pub size: u64,
    /// What was in memory before.
    pub before: Before,
    /// Threads, each with its own memory.
    pub threads: usize,
    /// Regions of one page that each device had already.
    pub regions: u64,
    /// Why nothing was measured.
    pub refused: Option<String>,
    /// How often.
    pub samples: u64,
    /// From the call until it returned.
    pub latency: Option<Latency>,
    /// Median of the processor time of the thread.
    pub processor_ns: u64,
    /// Median of the time that giving it back took.
    pub gone_ns: u64,
    /// Pages of 4 KiB a second of all threads, at the median.
    pub pages_per_second: f64,
    /// Bytes a second of all threads, at the median.
    pub bytes_per_second: f64,
    /// The median over the floor's in the same rounds.
    pub times_floor: Option<f64>,
    /// The same in processor time.
    pub times_floor_processor: Option<f64>,
    /// Bytes of the page list.
    pub list_bytes: Option<u64>,
    /// Bytes of IO page tables that it took besides, at most.
    pub table_bytes: Option<u64>,
    /// Pages that the device saw when the call returned.
    pub present: Option<u64>,
    /// Invalidations of the IOTLB that one registration took.
    pub flushes: Option<f64>,
    /// Those of giving it back.
    pub flushes_gone: Option<f64>,
    /// Bytes of the memory that were in huge pages.
    pub huge_bytes: Option<u64>,
}

/// Many regions of one page.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct CrowdRow {
    /// The device.
    pub device: String,
    /// `pinned`, `on-demand` or `empty`.
    pub mode: String,
    /// Regions that there were at the end.
    pub regions: u64,
    /// Mappings that they lay in.
    pub mappings: u64,
    /// Median of the processor time of the first thousand.
    pub first_ns: u64,
    /// Of the last thousand.
    pub last_ns: u64,
    /// Mean of the first thousand.
    pub first_mean_ns: f64,
    /// Of the last thousand.
    pub last_mean_ns: f64,
    /// Seconds that all of them took.
    pub seconds: f64,
    /// Seconds that giving all of them back took.
    pub seconds_gone: f64,
    /// Why there are not more.
    pub refused: Option<String>,
}

impl How {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Pinned => "pinned",
            Self::OnDemand => "on-demand",
            Self::Empty => "empty",
            Self::Prefetch => "prefetch",
        }
    }
}

impl Report {
    pub(super) fn new(devices: Vec<String>, space: &ProcessSpace) -> Self {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Self { version, host: Host::here(space), devices, rows: Vec::new(), crowds: Vec::new() }
    }
}

impl Row {
    /// The rows of one set of rounds.
    pub(super) fn of_group(
        group: Group,
        contenders: &[Contender<'_>],
        seen: &[Seen],
        huge_bytes: Option<u64>,
    ) -> Vec<Self> {
        let floor = contenders.iter().zip(seen).find(|(who, _)| matches!(who, Contender::Floor));
        let floor = floor.map(|(_, seen)| seen).filter(|seen| seen.refused.is_none());
        let rows = contenders.iter().zip(seen);
        rows.map(|(who, seen)| Self::of(group, *who, seen, floor, huge_bytes)).collect()
    }

    fn of(group: Group, who: Contender<'_>, seen: &Seen, floor: Option<&Seen>, huge: Option<u64>) -> Self {
        let (what, mode) = match who {
            Contender::Region(device, how) => (device.name(), Some(how.name().to_owned())),
            Contender::Floor => ("floor", None),
            Contender::RealPin => ("real pin", None),
        };
        let measured = seen.refused.is_none() && !seen.latency.is_empty();
        let [taken, processor_ns, gone_ns] =
            [&seen.latency, &seen.processor, &seen.gone].map(|times| times.value_at_quantile(0.5));
        let over = |mine: u64, floor: Option<u64>| {
            floor.filter(|floor| measured && *floor > 0).map(|floor| mine as f64 / floor as f64)
        };
        let rate = if measured { 1e9 * group.threads as f64 / taken.max(1) as f64 } else { 0.0 };
        let samples = if measured { seen.latency.len() } else { 0 };
        let flushes = |count: u64| seen.list_bytes.map(|_| count as f64 / samples.max(1) as f64);
        // With more threads than one, the flushes of one are counted by all.
        let alone = group.threads == 1;
        Self {
            what: what.to_owned(),
            mode,
            pages: group.pages,
            size: group.size,
            before: group.before,
            threads: group.threads,
            regions: group.regions,
            refused: seen.refused.clone(),
            samples,
            latency: measured.then(|| Latency::of(&seen.latency)),
            processor_ns,
            gone_ns,
            pages_per_second: rate * (group.size / PAGE_SIZE) as f64,
            bytes_per_second: rate * group.size as f64,
            times_floor: over(taken, floor.map(|floor| floor.latency.value_at_quantile(0.5))),
            times_floor_processor: over(
                processor_ns,
                floor.map(|floor| floor.processor.value_at_quantile(0.5)),
            ),
            list_bytes: seen.list_bytes,
            table_bytes: seen.table_bytes.filter(|_| alone),
            present: seen.present,
            flushes: flushes(seen.flushes).filter(|_| alone),
            flushes_gone: flushes(seen.flushes_gone).filter(|_| alone),
            huge_bytes: huge,
        }
    }

    /// Who, and how.
    pub(super) fn name(&self) -> String {
        let mode = self.mode.as_ref().map(|mode| format!(" {mode}")).unwrap_or_default();
        format!("{}: {}{mode}", self.group_name(), self.what)
    }

    /// Over what.
    pub(super) fn group_name(&self) -> String {
        let pages = format!("{:?}", self.pages).to_lowercase();
        let before = format!("{:?}", self.before).to_lowercase();
        let threads = if self.threads > 1 { format!(", {} threads", self.threads) } else { String::new() };
        let regions =
            if self.regions > 0 { format!(", beside {} regions", self.regions) } else { String::new() };
        format!("{pages}, {before}, {}{threads}{regions}", size(self.size))
    }
}

/// `64 MiB`.
fn size(bytes: u64) -> String {
    match bytes {
        bytes if bytes % (1 << 30) == 0 => format!("{} GiB", bytes >> 30),
        bytes if bytes % (1 << 20) == 0 => format!("{} MiB", bytes >> 20),
        bytes => format!("{} KiB", bytes >> 10),
    }
}

pub(super) fn micros(ns: u64) -> String {
    format!("{:.2} us", ns as f64 / 1e3)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = &self.host;
        let huge = host.transparent_huge_pages.as_deref().unwrap_or("none");
        let kind = if host.is_virtual { "virtual machine" } else { "machine" };
        writeln!(f, "{} x {}, {kind}, {}", host.processors, host.processor, host.kernel)?;
        writeln!(f, "transparent huge pages: {huge}; rung: {}; load before: {}", host.rung, host.load)?;
        if !self.rows.is_empty() {
            write!(f, "{}", rows(&self.rows))?;
        }
        if !self.crowds.is_empty() {
            write!(f, "{}", crowds(&self.crowds))?;
        }
        Ok(())
    }
}

fn rows(rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([
        "",
        "times",
        "50 %",
        "99 %",
        "processor",
        "floors",
        "Mpages/s",
        "GB/s",
        "gone",
        "metadata",
        "flushes",
    ]);
    let mut group = String::new();
    for row in rows {
        if row.group_name() != group {
            group = row.group_name();
            table.add_row([group.clone()]);
        }
        let name =
            format!("  {}{}", row.what, row.mode.as_ref().map(|m| format!(" {m}")).unwrap_or_default());
        let Some(latency) = &row.latency else {
            let why = row.refused.clone().unwrap_or_default();
            table.add_row([format!("{name}: {why}")]);
            continue;
        };
        let or_blank = |value: Option<String>| value.unwrap_or_default();
        table.add_row([
            name,
            row.samples.to_string(),
            micros(latency.p50_ns),
            micros(latency.p99_ns),
            micros(row.processor_ns),
            or_blank(row.times_floor_processor.map(|times| format!("{times:.2}"))),
            format!("{:.2}", row.pages_per_second / 1e6),
            format!("{:.2}", row.bytes_per_second / 1e9),
            micros(row.gone_ns),
            or_blank(row.list_bytes.map(|bytes| (bytes + row.table_bytes.unwrap_or(0)).to_string())),
            or_blank(row.flushes.map(|flushes| format!("{flushes:.1}"))),
        ]);
    }
    aligned(table)
}

fn crowds(rows: &[CrowdRow]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["", "regions", "mappings", "first 1000", "last 1000", "ratio", "all", "all gone"]);
    for row in rows {
        let ratio = row.last_ns as f64 / row.first_ns.max(1) as f64;
        let refused = row.refused.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
        table.add_row([
            format!("{} {}{refused}", row.device, row.mode),
            row.regions.to_string(),
            row.mappings.to_string(),
            micros(row.first_ns),
            micros(row.last_ns),
            format!("{ratio:.2}"),
            format!("{:.1} s", row.seconds),
            format!("{:.1} s", row.seconds_gone),
        ]);
    }
    aligned(table)
}

fn aligned(mut table: Table) -> String {
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}
