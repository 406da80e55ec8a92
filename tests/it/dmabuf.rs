//! Regions over DMABUFs: traffic while pages move, are pinned, and are taken back.

mod failures;
mod files;
mod moves;
mod revocation;

use crate::bed::{Bed, space};
use crate::checks::{Counts, Verdict, protocol_kept, until};
use anypage::machine::{Machine, MachineConfig};
use hw_model::addr::{PAGE_SIZE, page_bytes};
use hw_model::bus::{Bar, BarStorage, RamStorage};
use hw_model::fault_plan::{FaultPlan, Points};
use hw_model::hca::{Backing, Path, Status};
use hw_model::sync::Arc;
use mr::{MapEntry, Region, RegisterOptions};
use odp::space::dmabuf::{
    BarPart, Dmabuf, DmabufStats, ImportMode, ImportOptions, Migrating, MigratingOptions, PagePlace,
    SystemPages,
};
use odp::space::process::{OwnedMemory, ProcessSpace};
use odp::space::{AddressSpace, UserRange};

/// A machine with a GPU that exports a buffer: the near HCA shares a switch with it, the far one reaches it through the host
/// bridge.
struct Stand {
    space: Arc<ProcessSpace>,
    machine: Option<Machine>,
    gpu: Arc<Migrating>,
    pages: u64,
}

/// A buffer of this many pages, system pages being contiguous nowhere.
fn export(
    space: &Arc<ProcessSpace>,
    bar: &Arc<Bar>,
    pages: u64,
    options: MigratingOptions,
) -> Result<Arc<Migrating>, String> {
    let system: SystemPages =
        Arc::new(OwnedMemory::new(space, page_bytes(pages)).expect("memory")).system_pages().reversed();
    let part = BarPart::new(bar, 0, page_bytes(pages)).expect("in the BAR");
    Migrating::export(system, part, options).map_err(|error| error.to_string())
}

impl Stand {
    fn new(pages: u64, config: &MachineConfig, options: MigratingOptions) -> Self {
        let space = space();
        let storage: Arc<dyn BarStorage> = RamStorage::new(page_bytes(pages)).expect("memory");
        let machine = Machine::new(space.memory(), Some(storage), config).expect("a machine");
        let bar = machine.bar.as_ref().expect("the GPU has one");
        let gpu = export(&space, bar, pages, options).expect("a buffer");
        Self { space, machine: Some(machine), gpu, pages }
    }

    fn buffer(&self) -> &Arc<Dmabuf> {
        self.gpu.buffer()
    }

    /// The whole buffer as an importer of this kind sees it.
    fn import(&self, mode: ImportMode) -> UserRange {
        import(self.buffer(), mode)
    }

    /// A near region over `memory`, and a far one over as much owned memory.
    fn bed(&mut self, memory: &UserRange, options: RegisterOptions) -> Bed {
        let machine = self.machine.take().expect("one bed a stand");
        Bed::on(machine, &self.space, memory, options, page_bytes(self.pages))
    }
}

fn import(buffer: &Arc<Dmabuf>, mode: ImportMode) -> UserRange {
    let attachment = buffer.attach(ImportOptions::new(mode)).expect("it lives");
    attachment.user_range().expect("an exporter of ours")
}

/// Bytes that differ from page to page and from round to round.
fn pattern(round: u64, len: u64) -> Vec<u8> {
    (0..len).map(|at| (at / PAGE_SIZE * 31 + at % 251 + round * 17) as u8).collect()
}

/// What the page map says of each page.
fn entries(region: &dyn Region) -> Vec<Option<(Backing, Path)>> {
    let runs = region.page_map().expect("the model shows its list");
    let of = |entry: MapEntry| (entry.backing, entry.path);
    runs.iter().flat_map(|run| std::iter::repeat_n(run.entry.map(of), run.pages as usize)).collect()
}

/// Everything of a buffer that can leak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    attachments: u64,
    watches: u64,
    pins: u64,
    moving: u64,
    intervals: u64,
    running: u64,
}

impl Held {
    fn of(buffer: &Dmabuf) -> Self {
        let DmabufStats { attachments, watches, pins, moving, .. } = buffer.stats();
        let notifiers = buffer.notifiers().stats();
        Self {
            attachments,
            watches,
            pins,
            moving,
            intervals: notifiers.intervals,
            running: notifiers.running,
        }
    }
}

/// Nothing is left of anything, and nothing was broken.
fn calm(machine: &Machine, space: &ProcessSpace, before: &Counts) -> Verdict {
    before.are_back(machine, space)?;
    protocol_kept(machine, space)
}
