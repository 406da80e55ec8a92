//! Buffers of a driver, imported as DMABUFs: their pages migrate, and now and then one is revoked and its memory exported
//! anew, while regions over the old one are still registered.
//!
//! To the oracle a buffer is a process that maps an object; nobody runs in it.

use super::Broken;
use super::setup::{OBJECT_PAGES, setup};
use super::world::{Place, Process, World};
use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange};
use hw_model::fault_plan::{Action as FaultAction, FaultPlan, Points, Rule};
use hw_model::sync::Arc;
use odp::fault::Progress;
use odp::space::dmabuf::{
    AccessError, BarPart, DmabufSpace, ImportMode, ImportOptions, Migrating, MigratingOptions, Migration,
    MigrationError, MoveError, PagePlace, SystemPages, Withdrawal,
};
use odp::space::sim::{ObjectId, Protection};
use odp::space::{AddressSpace, FaultError, UserRange, Withdrawn};
use std::time::Duration;

/// Migrations and withdrawals under way on one host.
const MOST_UNDER_WAY: usize = 3;
/// Buffers that one host exports, one after the other. Each keeps an engine.
const MOST_EXPORTS: usize = 8;
/// The points of exporters that may fail: none that a request would feel.
const FALLIBLE: [&str; 2] = ["odp.dmabuf.move", "odp.dmabuf.copy"];

/// Memory that is exported again and again.
#[derive(Clone)]
pub struct Exportable {
    pub(super) system: SystemPages,
    pub(super) part: BarPart,
    /// Whether moves and copies fail now and then.
    pub(super) fails: bool,
}

/// A buffer.
pub struct Buffer {
    gpu: Arc<Migrating>,
    /// An attachment that only looks.
    view: Arc<DmabufSpace>,
}

/// Something that happens to a buffer, which is known by its process.
pub enum BufferChange {
    Migrate(usize, Migration),
    Withdraw(usize, Box<Withdrawal>),
}

impl BufferChange {
    fn process(&self) -> usize {
        match self {
            Self::Migrate(process, _) | Self::Withdraw(process, _) => *process,
        }
    }
}

fn whole() -> VirtRange {
    VirtRange::new(VirtAddr(0), OBJECT_PAGES * PAGE_SIZE).expect("from 0 on anything fits")
}

fn importer(mode: ImportMode) -> ImportOptions {
    ImportOptions::new(mode).with_patience(Duration::ZERO)
}

impl World {
    /// Exports the memory of a host, zeroed; regions can be made of it from now on.
    pub(super) fn export(&mut self, host: usize) -> Result<(), Broken> {
        let memory = self.hosts[host].exportable.clone();
        let place = self.choices.of(&[PagePlace::System, PagePlace::Peer]);
        let seed = u64::from(self.choices.below(u32::MAX));
        let rule = |point| Rule { probability: 0.02, ..Rule::always(point, FaultAction::Fail) };
        let points = match memory.fails {
            true => Points::with(&FaultPlan::new(seed, FALLIBLE.into_iter().map(rule).collect())),
            false => Points::OFF,
        };
        let options = MigratingOptions { place, revokes: true, points, ..MigratingOptions::default() };
        let gpu = setup(Migrating::export(memory.system, memory.part, options))?;
        let view = setup(gpu.buffer().attach(importer(ImportMode::Dynamic)))?;
        let process = self.processes.len();
        let object = (host, ObjectId(u32::MAX - process as u32));
        self.memory.add_process(process);
        self.memory.add_object(object, OBJECT_PAGES);
        self.memory.map_object(process, whole(), (object, 0), false, Protection::ReadWrite);
        self.processes.push(Process { host, space: None, buffer: Some(Buffer { gpu, view }), arena: 0 });
        self.hosts[host].exports.push(process);
        self.counts.one("buffers exported");
        Ok(())
    }

    /// The buffer that a host exports now.
    pub(super) fn exported(&self, host: usize) -> usize {
        *self.hosts[host].exports.last().expect("a host exports a buffer from its set-up on")
    }

    fn buffer(&self, process: usize) -> &Buffer {
        self.processes[process].buffer.as_ref().expect("the process of a buffer")
    }

    /// Memory of a process, or of a buffer, with whichever kind of importer.
    pub(super) fn user_range(&mut self, place: &Place) -> Option<UserRange> {
        if self.processes[place.process].buffer.is_none() {
            return Some(UserRange::simulated(self.space(place.process), place.range()));
        }
        let mode = self.choices.of(&[
            ImportMode::Dynamic,
            ImportMode::Dynamic,
            ImportMode::Dynamic,
            ImportMode::PinnedRevocable,
        ]);
        let attachment = self.buffer(place.process).gpu.buffer().attach(importer(mode)).ok()?;
        attachment.user_range()?.part(place.at.0, place.len)
    }

    /// Where the pages of a process or a buffer are.
    pub(super) fn address_space(&self, process: usize) -> Option<&dyn AddressSpace> {
        let Process { space, buffer, .. } = &self.processes[process];
        let of_buffer = buffer.as_ref().map(|buffer| &*buffer.view as &dyn AddressSpace);
        space.as_ref().map(|space| &**space as &dyn AddressSpace).or(of_buffer)
    }

    /// Reads as a program does, or as a driver does in its buffer.
    pub(super) fn cpu_read(&self, process: usize, at: VirtAddr, out: &mut [u8]) -> Result<(), FaultError> {
        match &self.processes[process].buffer {
            None => self.space(process).cpu_read(at, out),
            Some(buffer) => driver(buffer, at, |gpu| gpu.read_at(at.0, out)),
        }
    }

    /// The same for writing. Pages before the one that could not be had have been written.
    pub(super) fn cpu_write(&self, process: usize, at: VirtAddr, data: &[u8]) -> Result<(), FaultError> {
        match &self.processes[process].buffer {
            None => self.space(process).cpu_write(at, data),
            Some(buffer) => driver(buffer, at, |gpu| gpu.write_at(at.0, data)),
        }
    }

    pub(super) fn begin_migration(&mut self, host: usize) -> Result<(), Broken> {
        let process = self.exported(host);
        if !self.has_room(host) {
            return Ok(());
        }
        let first = self.choices.between(0, OBJECT_PAGES - 1);
        let end = self.choices.between(first + 1, (first + 6).min(OBJECT_PAGES));
        let to = self.choices.of(&[PagePlace::System, PagePlace::Peer]);
        self.note(|| format!("migrate pages {first}..{end} of buffer {process} to {to:?}"));
        let migration = setup(self.buffer(process).gpu.begin_migration(first..end, to))?;
        self.counts.one("migrations begun");
        self.buffer_changes.push(BufferChange::Migrate(process, migration));
        Ok(())
    }

    pub(super) fn begin_revocation(&mut self, host: usize) -> Result<(), Broken> {
        let process = self.exported(host);
        // Seldom: a buffer that is hardly used is nothing to take back.
        if !self.has_room(host) || self.hosts[host].exports.len() >= MOST_EXPORTS || !self.choices.chance(300)
        {
            return Ok(());
        }
        let buffer = Arc::clone(self.buffer(process).gpu.buffer());
        let withdrawal = match buffer.begin_revoke() {
            Ok(withdrawal) => withdrawal,
            // It is being revoked already. Nothing else is in the way of who may revoke.
            Err(_) if buffer.is_there().is_err() => return Ok(()),
            Err(error) => return Err(Broken::new("revocation", error)),
        };
        self.note(|| format!("revoke buffer {process}"));
        self.counts.one("buffers revoked");
        self.disturbances += 1;
        // From now on nobody is given a page of it.
        self.memory.unmap(process, whole());
        self.buffer_changes.push(BufferChange::Withdraw(process, Box::new(withdrawal)));
        Ok(())
    }

    fn has_room(&self, host: usize) -> bool {
        let of_host = |change: &&BufferChange| self.processes[change.process()].host == host;
        self.buffer_changes.iter().filter(of_host).count() < MOST_UNDER_WAY
    }

    pub(super) fn step_some_buffer_change(&mut self, index: usize) -> Result<(), Broken> {
        if matches!(self.buffer_changes[index], BufferChange::Migrate(..)) && self.choices.chance(20) {
            drop(self.buffer_changes.swap_remove(index));
            self.counts.one("migrations given up");
            self.note(|| "a migration is given up".to_owned());
            return Ok(());
        }
        self.step_buffer_change(index).map(drop)
    }

    /// Whether it did something.
    pub(super) fn step_buffer_change(&mut self, index: usize) -> Result<bool, Broken> {
        let (process, progress) = match &mut self.buffer_changes[index] {
            BufferChange::Migrate(process, migration) => (*process, migration.poll()),
            BufferChange::Withdraw(process, withdrawal) => {
                let process = *process;
                if !withdrawal.poll() {
                    self.counts.one("revocations that waited for a burst");
                    return Ok(false);
                }
                return self.finish_revocation(index, process).map(|()| true);
            }
        };
        match progress {
            Ok(Progress::Blocked) => {
                self.counts.one("migrations that waited for a burst");
                return Ok(false);
            }
            Ok(Progress::Again) => return Ok(true),
            Ok(Progress::Done(moved)) => {
                self.note(|| format!("migrated {moved} pages of buffer {process}"));
                self.counts.add("pages migrated", moved);
            }
            Err(error) => {
                self.note(|| format!("migration of buffer {process} failed: {error}"));
                self.counts.one(failure_name(&error));
            }
        }
        drop(self.buffer_changes.swap_remove(index));
        self.disturbances += 1;
        self.check_everything()?;
        Ok(true)
    }

    /// Every importer has let go: the memory becomes another buffer. Regions over the old one stay.
    fn finish_revocation(&mut self, index: usize, process: usize) -> Result<(), Broken> {
        drop(self.buffer_changes.swap_remove(index));
        // The driver ends what it was doing with the memory first.
        self.buffer_changes.retain(|change| change.process() != process);
        self.note(|| format!("buffer {process} is revoked"));
        self.check_everything()?;
        self.export(self.processes[process].host)
    }

    /// The bytes of buffers that are exported, as their drivers see them.
    pub(super) fn buffers(&self) -> Vec<usize> {
        (0..self.hosts.len()).map(|host| self.exported(host)).collect()
    }

    /// At the end of a run: whether nothing is left on any buffer.
    pub(super) fn check_buffers(&self) -> Result<(), Broken> {
        for (process, buffer) in self.processes.iter().enumerate() {
            let Some(buffer) = &buffer.buffer else { continue };
            let (stats, notifiers) = (buffer.gpu.buffer().stats(), buffer.view.notifiers().stats());
            let left = [stats.watches, stats.pins, stats.moving, notifiers.intervals, notifiers.running];
            if left != [0; 5] || stats.attachments != 1 {
                let detail = format!("buffer {process}: {stats:?}, {notifiers:?}");
                return Err(Broken { rule: "nothing is left", detail });
            }
        }
        Ok(())
    }
}

fn failure_name(error: &MigrationError) -> &'static str {
    match error {
        MigrationError::Move(MoveError::Pinned { .. }) => "migrations refused because of a pin",
        MigrationError::Move(_) => "migrations that could not go on",
        MigrationError::Copy { .. } => "migrations whose copy failed",
    }
}

/// An access of a driver, in the words of a program's.
fn driver(
    buffer: &Buffer,
    at: VirtAddr,
    access: impl FnOnce(&Migrating) -> Result<(), AccessError>,
) -> Result<(), FaultError> {
    if buffer.gpu.buffer().is_there().is_err() {
        return Err(FaultError::Withdrawn { at, why: Withdrawn::Revoked });
    }
    access(&buffer.gpu).map_err(|error| match error {
        AccessError::Moving { page } => FaultError::Busy { at: VirtAddr::from_page_number(page).max(at) },
        _ => FaultError::NoMapping { at },
    })
}
