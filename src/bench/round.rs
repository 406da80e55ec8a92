//! One round over a piece of memory: every device in every mode, the floor and the real pin, each once.

use super::devices::Registrar;
use super::floor::{Floor, thread_time_ns};
use super::pin::RealPin;
use super::plan::Group;
use super::{Before, How, Pages};
use crate::mixed::{HUGE, Kind, MixedMemory};
use hdrhistogram::Histogram;
use hw_model::addr::PAGE_SIZE;
use hw_model::sync::{Arc, Barrier};
use mr::{Region, RegisterOptions, Snapshot};
use odp::fault::Want;
use odp::space::process::ProcessSpace;
use odp::space::{Access, UserRange};
use std::io;
use std::time::Instant;

/// Significant digits.
const DIGITS: u8 = 3;
/// The longest that is told from longer: ten minutes.
const LONGEST_NS: u64 = 600_000_000_000;

/// Who takes part.
#[derive(Clone, Copy)]
pub(super) enum Contender<'a> {
    Region(&'a Registrar, How),
    Floor,
    RealPin,
}

/// What was seen of one of them.
pub(super) struct Seen {
    pub latency: Histogram<u64>,
    pub processor: Histogram<u64>,
    pub gone: Histogram<u64>,
    pub flushes: u64,
    pub flushes_gone: u64,
    pub list_bytes: Option<u64>,
    pub table_bytes: Option<u64>,
    pub present: Option<u64>,
    pub refused: Option<String>,
}

impl Seen {
    pub(super) fn new() -> Self {
        let histogram =
            || Histogram::new_with_bounds(1, LONGEST_NS, DIGITS).expect("such bounds are possible");
        Self {
            latency: histogram(),
            processor: histogram(),
            gone: histogram(),
            flushes: 0,
            flushes_gone: 0,
            list_bytes: None,
            table_bytes: None,
            present: None,
            refused: None,
        }
    }

    /// What a thread saw besides.
    pub(super) fn merge(&mut self, other: Self) {
        for (mine, theirs) in [
            (&mut self.latency, &other.latency),
            (&mut self.processor, &other.processor),
            (&mut self.gone, &other.gone),
        ] {
            mine.add(theirs).expect("both hold any value");
        }
        self.flushes += other.flushes;
        self.flushes_gone += other.flushes_gone;
        self.list_bytes = self.list_bytes.or(other.list_bytes);
        self.table_bytes = self.table_bytes.or(other.table_bytes);
        self.present = self.present.or(other.present);
        self.refused = self.refused.take().or(other.refused);
    }
}

/// The memory of one thread, and what it is measured with.
pub(super) struct Place {
    memory: Arc<MixedMemory>,
    range: UserRange,
    before: Before,
    floor: Option<Floor>,
    pin: Option<RealPin>,
}

impl Place {
    pub(super) fn new(space: &Arc<ProcessSpace>, group: Group) -> io::Result<Self> {
        let memory = Arc::new(MixedMemory::new(&parts(group.pages, group.size))?);
        let range = memory.user_range(Arc::clone(space) as _);
        let floor = Floor::new(memory.range());
        Ok(Self { memory, range, before: group.before, floor, pin: RealPin::new() })
    }

    /// Brings the memory to the state that is asked for.
    fn reset(&self) -> io::Result<()> {
        if self.before == Before::Warm {
            return Ok(());
        }
        for part in self.memory.parts() {
            self.memory.discard(part.offset / PAGE_SIZE, part.len / PAGE_SIZE)?;
        }
        Ok(())
    }

    /// Has every page in memory, as a device leaves it that registers it pinned.
    pub(super) fn warm(&self) {
        if let Some(floor) = &self.floor {
            floor.populate(self.memory.range());
        }
    }

    /// Bytes in huge pages, when all of it is in memory.
    pub(super) fn huge_bytes(&mut self) -> Option<u64> {
        self.floor.as_mut()?.huge_bytes(self.memory.range())
    }

    /// One after the other; a thread waits for the others before each. Who was refused once is left out.
    pub(super) fn round(
        &mut self,
        contenders: &[Contender<'_>],
        seen: &mut [Seen],
        all: &Barrier,
    ) -> io::Result<()> {
        for (contender, seen) in contenders.iter().zip(seen) {
            self.reset()?;
            all.wait();
            if seen.refused.is_none() {
                self.once(*contender, seen);
            }
        }
        Ok(())
    }

    fn once(&mut self, contender: Contender<'_>, seen: &mut Seen) {
        match contender {
            Contender::Region(device, how) => self.register(device, how, seen),
            Contender::Floor => {
                let range = self.memory.range();
                let Some(floor) = &mut self.floor else {
                    seen.refused = Some("the kernel has no PAGEMAP_SCAN".to_owned());
                    return;
                };
                let clocks = Clocks::start();
                floor.populate(range);
                floor.scan(range);
                clocks.stop(seen);
            }
            Contender::RealPin => {
                let clocks = Clocks::start();
                let pinned = self.pin.as_ref().is_some_and(|pin| pin.pinned(self.memory.range()));
                clocks.stop(seen);
                let start = Instant::now();
                if !pinned || !self.pin.as_ref().is_some_and(RealPin::unpinned) {
                    seen.refused = Some("io_uring refuses (RLIMIT_MEMLOCK, or a GiB and more)".to_owned());
                }
                seen.gone.saturating_record(start.elapsed().as_nanos() as u64);
            }
        }
    }

    fn register(&self, device: &Registrar, how: How, seen: &mut Seen) {
        let before = device.iommu();
        let clocks = Clocks::start();
        let registered = self.registered(device, how);
        clocks.stop(seen);
        let region = match registered {
            Ok(region) => region,
            Err(refused) => {
                seen.refused = Some(with_causes(&*refused));
                return;
            }
        };
        let with = device.iommu();
        let report = region.report();
        let start = Instant::now();
        drop(region);
        seen.gone.saturating_record(start.elapsed().as_nanos() as u64);
        if let (Some((flushes, tables)), Some((then, grown)), Some((last, _))) =
            (before, with, device.iommu())
        {
            seen.flushes += then - flushes;
            seen.flushes_gone += last - then;
            // The first region makes the tables; those that stay are found there by the next.
            let grown = grown.saturating_sub(tables);
            seen.table_bytes = Some(seen.table_bytes.unwrap_or(0).max(grown));
            seen.list_bytes = Some(report.list_bytes);
            seen.present = Some(report.present);
        }
    }

    fn registered(&self, device: &Registrar, how: How) -> Result<Arc<dyn Region>, super::devices::Refused> {
        let options = options(how);
        let region = device.register(&self.range, options)?;
        if how == How::Prefetch {
            region.advise(0, region.len(), Want::Fault(Access::Write))?;
        }
        Ok(region)
    }
}

pub(super) fn options(how: How) -> RegisterOptions {
    match how {
        How::Pinned => RegisterOptions::pinned(),
        How::OnDemand | How::Prefetch => RegisterOptions::on_demand(),
        How::Empty => RegisterOptions::on_demand().with_snapshot(Snapshot::Nothing),
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut said = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        said = format!("{said}: {error}");
        cause = error.source();
    }
    said
}

/// Time, of the clock and of this thread.
struct Clocks {
    start: Instant,
    processor: u64,
}

impl Clocks {
    fn start() -> Self {
        let processor = thread_time_ns();
        Self { start: Instant::now(), processor }
    }

    fn stop(self, seen: &mut Seen) {
        let taken = self.start.elapsed();
        seen.processor.saturating_record(thread_time_ns().saturating_sub(self.processor));
        seen.latency.saturating_record(taken.as_nanos() as u64);
    }
}

/// What a piece of `size` bytes is laid out of.
fn parts(pages: Pages, size: u64) -> Vec<(Kind, u64)> {
    match pages {
        Pages::Small => vec![(Kind::Anonymous, size)],
        Pages::Thp => vec![(Kind::TransparentHuge, size)],
        Pages::File => vec![(Kind::File, size)],
        Pages::Shared => vec![(Kind::Shared, size)],
        Pages::Mixed => {
            // Quarters of whole huge pages where they are that large; the last takes the rest.
            let quarter = (size / 4) & !(if size / 4 >= HUGE { HUGE - 1 } else { PAGE_SIZE - 1 });
            let kinds = [Kind::TransparentHuge, Kind::Anonymous, Kind::File];
            let mut parts: Vec<_> = kinds.into_iter().map(|kind| (kind, quarter)).collect();
            parts.push((Kind::Shared, size - 3 * quarter));
            parts.retain(|(_, len)| *len > 0);
            parts
        }
    }
}
