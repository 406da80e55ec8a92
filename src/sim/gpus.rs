//! What a device with memory of its own does beside RDMA, and what happens to pages that nobody asked for: pins, changes that
//! may not wait, memory that fails, a driver that goes.

use super::Broken;
use super::changes::pages;
use super::memory::Piece;
use super::world::{Change, World};
use hw_model::addr::VirtAddr;
use hw_model::bus::ProviderId;
use hw_model::sync::Arc;
use odp::page::Backing;
use odp::space::sim::{MmId, SimError, SpaceChange};
use odp::space::{Access, AddressSpace, FaultError};

/// The device whose private memory pages are moved to, and to which pages are lent.
pub(super) const GPU: ProviderId = ProviderId(63);
/// Ranges that are held at a time.
const MOST_PINS: usize = 4;

impl World {
    /// The GPU writes a word of a process's memory, wherever that is: in RAM, in its own memory, lent to it.
    pub(super) fn gpu_writes(&mut self, host: usize) -> Result<(), Broken> {
        let Some(process) = self.some_process(Some(host)) else { return Ok(()) };
        let Some(page) = self.some_page(process) else { return Ok(()) };
        let at = VirtAddr::from_page_number(page).offset(8 * u64::from(self.choices.below(512)));
        let piece = Piece { process, at, len: 8 };
        if !self.memory.allows_device(piece, Access::Write) {
            return Ok(());
        }
        if self.choices.chance(500) {
            // It takes the page to itself first, if nobody is busy with it.
            let memory = self.hosts[host].private;
            let taken =
                self.space(process).try_change(SpaceChange::ToDevice { range: pages(page, 1), memory });
            self.note(|| format!("the GPU takes page {page:#x} of process {process}: {taken:?}"));
            self.disturbances += 1;
        }
        let data = self.fresh_bytes(8);
        let view = self.space(process).seen_by(GPU);
        let mut runs = Vec::new();
        let result = view.fault(pages(page, 1), Access::Write, &mut runs);
        self.note(|| format!("the GPU writes {piece:?}: {result:?}, {runs:?}"));
        self.judge(piece, Access::Write, result)?;
        if let (Ok(()), [run]) = (result, &runs[..]) {
            let written = view.memory().write(run.phys.offset(at.page_offset()), &data);
            written.map_err(|error| Broken::new("a device reaches what a fault gave it", error))?;
            self.memory.write(process, at, &data);
            self.counts.one("writes of a GPU");
            if run.backing == Backing::DevicePrivate {
                self.counts.one("writes of a GPU in its own memory");
            }
        }
        Ok(())
    }

    /// A change is made now or not at all.
    pub(super) fn change_at_once(&mut self, host: usize) -> Result<(), Broken> {
        let Some(process) = self.some_process(Some(host)) else { return Ok(()) };
        let Some(page) = self.some_page(process) else { return Ok(()) };
        let range = pages(page, self.choices.between(1, 8));
        let change = match self.choices.below(4) {
            0 => SpaceChange::Migrate(range),
            1 => SpaceChange::SwapOut(range),
            2 => SpaceChange::Unmap(range),
            _ => SpaceChange::Discard(range),
        };
        let outcome = self.space(process).try_change(change);
        self.note(|| format!("at once: {change:?} of process {process}: {outcome:?}"));
        match outcome {
            Ok(outcome) => {
                self.counts.one("changes made at once");
                self.disturbances += 1;
                self.note_space_change(process, change, outcome);
                self.check_everything()
            }
            Err(SimError::WouldWait { .. }) => {
                // Entries may be hidden, and pages are where they were.
                self.counts.one("changes that could not wait");
                self.check_everything()
            }
            Err(error) => self.refused_change(&error),
        }
    }

    /// Pages are held where they are, or let go.
    pub(super) fn pin_some(&mut self, host: usize) {
        if self.pins.len() == MOST_PINS || self.choices.chance(300) {
            if let Some(index) = self.choices.index(self.pins.len()) {
                drop(self.pins.swap_remove(index));
            }
            return;
        }
        let Some(process) = self.some_process(Some(host)) else { return };
        let Some(page) = self.some_page(process) else { return };
        let range = pages(page, self.choices.between(1, 3));
        let pin = self.space(process).pin(range);
        self.note(|| format!("pin {range} of process {process}: {:?}", pin.as_ref().map(|_| ())));
        match pin {
            Ok(pin) => {
                self.counts.one("ranges pinned");
                self.pins.push(pin);
            }
            Err(FaultError::Busy { .. }) => self.counts.one("pins that had to come again"),
            Err(_) => self.counts.one("pins refused"),
        }
    }

    /// The memory of a page fails.
    pub(super) fn begin_failure(&mut self, host: usize) -> Result<(), Broken> {
        let Some(process) = self.some_process(Some(host)) else { return Ok(()) };
        let Some(page) = self.some_page(process) else { return Ok(()) };
        if !self.memory.is_anonymous(process, page) {
            return Ok(());
        }
        let change = SpaceChange::Poison(VirtAddr::from_page_number(page));
        self.note(|| format!("begin {change:?} of process {process}"));
        match self.space(process).begin(change) {
            Ok(op) => {
                self.counts.one("changes begun");
                self.changes.push(Change { host, process: Some(process), op });
                Ok(())
            }
            Err(error) => self.refused_change(&error),
        }
    }

    /// Whether a failure that is about to happen is one that the oracle can follow: what it meets is nobody's but the
    /// processes' who copied it from each other.
    pub(super) fn can_be_followed(&self, process: Option<usize>, change: Option<SpaceChange>) -> bool {
        match (process, change) {
            (Some(process), Some(SpaceChange::Poison(at))) => {
                self.memory.is_anonymous(process, at.page_number())
            }
            _ => true,
        }
    }

    /// Whose pages they were has lost them.
    pub(super) fn note_failure(&mut self, host: usize, lost: &[(MmId, VirtAddr)]) {
        for (mm, at) in lost {
            let whose = self.processes.iter().position(|process| {
                process.host == host && process.space.as_ref().is_some_and(|space| space.id() == *mm)
            });
            if let Some(process) = whose {
                self.memory.lose(process, at.page_number());
                self.counts.one("pages lost");
            }
        }
    }

    /// The driver of a device goes, and what is in its memory comes back.
    pub(super) fn begin_eviction(&mut self, host: usize) -> Result<(), Broken> {
        let memory = self.choices.of(&[self.hosts[host].coherent, self.hosts[host].private]);
        self.note(|| format!("begin to empty {memory:?} of host {host}"));
        match Arc::clone(&self.hosts[host].sim).evict_device(memory) {
            Ok(op) => {
                self.counts.one("changes: device emptied");
                self.changes.push(Change { host, process: None, op });
                Ok(())
            }
            Err(error) => self.refused_change(&error),
        }
    }
}
