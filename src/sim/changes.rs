//! Memory changes under the regions: begun, polled, finished, with anything between the steps.

use super::Broken;
use super::gpus::GPU;
use super::setup::{HUGE_AT, OBJECT_PAGES};
use super::world::{Change, Host, Process, World};
use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange};
use hw_model::bus::ProviderId;
use hw_model::sync::Arc;
use odp::space::sim::{
    Encryption, HUGE_PAGES, ObjectChange, Outcome, Protection, Residence, SimError, SpaceChange,
};

/// Changes under way on one host. Far fewer than a process has places for.
const MOST_CHANGES: usize = 4;
/// Processes of one host.
const MOST_PROCESSES: usize = 4;

pub(super) fn pages(first: u64, count: u64) -> VirtRange {
    VirtRange::new(VirtAddr::from_page_number(first), count * PAGE_SIZE).expect("user memory")
}

impl World {
    pub(super) fn begin_change(&mut self) -> Result<(), Broken> {
        let host = self.choices.below(self.hosts.len() as u32) as usize;
        if self.changes.iter().filter(|change| change.host == host).count() >= MOST_CHANGES {
            return Ok(());
        }
        let kind = self.choices.below(super::world::CHANGES as u32) as usize;
        if !self.swarm.changes[kind] {
            return Ok(());
        }
        match kind {
            19 => return self.begin_migration(host),
            20 => return self.begin_revocation(host),
            21 => return self.begin_failure(host),
            22 => return self.change_at_once(host),
            23 => return self.begin_eviction(host),
            24 => {
                self.pin_some(host);
                return Ok(());
            }
            25 => return self.gpu_writes(host),
            _ => {}
        }
        let Some(process) = self.some_process(Some(host)) else { return Ok(()) };
        let begun = match self.some_change(kind, process) {
            None => return Ok(()),
            Some(Which::Space(change)) => {
                self.note(|| format!("begin {change:?} of process {process}"));
                let op = self.space(process).begin(change);
                op.map(|op| Change { host, process: Some(process), op })
            }
            Some(Which::Object(change)) => {
                self.note(|| format!("begin {change:?} on host {host}"));
                self.hosts[host].sim.begin(change).map(|op| Change { host, process: None, op })
            }
        };
        match begun {
            Ok(change) => {
                self.counts.one("changes begun");
                self.changes.push(change);
                Ok(())
            }
            Err(error) => self.refused_change(&error),
        }
    }

    pub(super) fn refused_change(&mut self, error: &SimError) -> Result<(), Broken> {
        self.note(|| format!("change refused: {error}"));
        self.counts.one("changes that were refused");
        Ok(())
    }

    fn some_change(&mut self, kind: usize, process: usize) -> Option<Which> {
        let Process { host, arena, .. } = self.processes[process];
        let Host { shmem, file, dmabuf, coherent, private, .. } = self.hosts[host];
        let in_huge = self.choices.chance(100).then(|| self.some_hugetlb_page(process)).flatten();
        let page = in_huge.or_else(|| self.some_page(process))?;
        let huge = page >= arena + HUGE_AT && self.choices.chance(if in_huge.is_some() { 900 } else { 400 });
        let range = if huge {
            pages(page - page % HUGE_PAGES, HUGE_PAGES)
        } else {
            let longest = if self.choices.chance(200) { 24 } else { 4 };
            pages(page, self.choices.between(1, longest))
        };
        let object = self.choices.of(&[shmem, file]);
        let first = self.choices.between(0, OBJECT_PAGES - 1);
        let end = self.choices.between(first + 1, (first + 8).min(OBJECT_PAGES));
        let space = |change| Some(Which::Space(change));
        match kind {
            0 => space(SpaceChange::Discard(range)),
            1 => space(SpaceChange::Remove(range)),
            2 if huge => space(SpaceChange::Unmap(range)),
            2 => space(SpaceChange::Unmap(pages(page, self.choices.between(1, 3)))),
            3 | 4 if self.choices.chance(250) => {
                space(SpaceChange::Map(self.some_huge_mapping(process, true)))
            }
            3 | 4 => {
                let at = self.some_hole(process).unwrap_or(page);
                let length = self.choices.between(1, 6);
                let request = self.some_mapping(host, length);
                space(SpaceChange::Map(request.fixed(VirtAddr::from_page_number(at))))
            }
            5 => {
                let to = self.choices.of(&[
                    Protection::ReadWrite,
                    Protection::ReadWrite,
                    Protection::Read,
                    Protection::None,
                ]);
                space(SpaceChange::Protect(range, to))
            }
            6 if huge => space(SpaceChange::Remap { from: range, to: self.some_place_for_huge(process) }),
            6 => {
                let to = arena + 256 + self.choices.between(0, 63);
                space(SpaceChange::Remap { from: range, to: VirtAddr::from_page_number(to) })
            }
            7 => space(SpaceChange::Split(range)),
            8 => space(SpaceChange::Collapse(pages(arena + HUGE_AT, HUGE_PAGES))),
            9 if self.choices.chance(500) => space(SpaceChange::Migrate(range)),
            9 => space(SpaceChange::ToNode { range, node: self.choices.below(2) }),
            10 => space(SpaceChange::SwapOut(range)),
            11 => {
                let memory = self.choices.of(&[coherent, private]);
                space(SpaceChange::ToDevice { range, memory })
            }
            12 => space(SpaceChange::FromDevice(range)),
            13 => space(SpaceChange::Exclusive { range, owner: self.choices.of(&[GPU, ProviderId(0)]) }),
            14 => {
                let to = self.choices.of(&[Encryption::Plain, Encryption::Shared, Encryption::Private]);
                space(SpaceChange::Encrypt(pages(page, 1), to))
            }
            15 if self.living(Some(host)).len() < MOST_PROCESSES => space(SpaceChange::Fork),
            15 => None,
            16 | 17 if self.choices.chance(200) => Some(Which::Object(self.some_hugetlb_change(host))),
            16 => Some(Which::Object(ObjectChange::Punch { object, first, end })),
            17 => {
                let change = match self.choices.below(4) {
                    0 => ObjectChange::Truncate {
                        object,
                        pages: if self.choices.chance(300) { first } else { OBJECT_PAGES },
                    },
                    1 => ObjectChange::WriteBack { object: file, first, end },
                    _ => ObjectChange::Evict { object: file, first, end },
                };
                Some(Which::Object(change))
            }
            _ => {
                let to = self.choices.of(&[Residence::System, Residence::Peer]);
                Some(Which::Object(ObjectChange::Move { object: dmabuf, first, end, to }))
            }
        }
    }

    /// A page among those of a process where nothing is mapped.
    fn some_hole(&mut self, process: usize) -> Option<u64> {
        let Process { arena, .. } = self.processes[process];
        let mut expected = arena;
        let mut holes = Vec::new();
        for (page, _) in self.memory.pages(process).take_while(|(page, _)| *page < arena + 256) {
            if page > expected {
                holes.push(expected);
            }
            expected = page + 1;
        }
        self.choices.index(holes.len()).map(|index| holes[index])
    }

    pub(super) fn step_some_change(&mut self) -> Result<(), Broken> {
        let under_way = self.changes.len() + self.buffer_changes.len();
        let Some(index) = self.choices.index(under_way) else { return Ok(()) };
        if let Some(index) = index.checked_sub(self.changes.len()) {
            return self.step_some_buffer_change(index);
        }
        if self.choices.chance(30) {
            // Given up: nothing has changed, and what was hidden comes back when it is asked for.
            drop(self.changes.swap_remove(index));
            self.counts.one("changes given up");
            self.note(|| "a change is given up".to_owned());
            return Ok(());
        }
        self.step_change(index).map(drop)
    }

    /// Whether it was finished.
    pub(super) fn step_change(&mut self, index: usize) -> Result<bool, Broken> {
        if !self.changes[index].op.poll() {
            self.counts.one("changes that waited for a burst");
            return Ok(false);
        }
        let Change { host, process, op } = self.changes.swap_remove(index);
        let (space_change, object_change) = (op.space_change(), op.object_change());
        if !self.can_be_followed(process, space_change) {
            return Ok(true);
        }
        let outcome = op.finish();
        self.note(|| format!("finish {space_change:?} {object_change:?}: {outcome:?}"));
        self.disturbances += 1;
        match (outcome, process, space_change, object_change) {
            (Err(error), ..) => self.refused_change(&error)?,
            (Ok(outcome), Some(process), Some(change), _) => {
                self.note_failure(host, &outcome.lost);
                self.note_space_change(process, change, outcome);
            }
            (Ok(_), _, _, Some(change)) => self.note_object_change(host, change),
            (Ok(_), ..) => {}
        }
        self.check_everything()?;
        Ok(true)
    }

    pub(super) fn note_space_change(&mut self, process: usize, change: SpaceChange, outcome: Outcome) {
        self.counts.one(name_of(&change));
        match change {
            SpaceChange::Map(request) => {
                if let Some(range) = outcome.at {
                    self.note_mapping(process, range, &request);
                }
            }
            SpaceChange::Unmap(range) => self.memory.unmap(process, range),
            SpaceChange::Protect(range, to) => self.memory.protect(process, range, to),
            SpaceChange::Discard(range) => self.memory.discard(process, range),
            SpaceChange::Remove(range) => self.memory.remove(process, range),
            SpaceChange::Remap { from, .. } => {
                if let Some(to) = outcome.at {
                    self.memory.remap(process, from, to);
                }
            }
            SpaceChange::Encrypt(range, mode) => {
                self.memory.encrypt(process, range, mode == Encryption::Private);
            }
            SpaceChange::Fork => {
                if let Some(space) = outcome.child {
                    let child = self.processes.len();
                    let Process { host, arena, .. } = self.processes[process];
                    self.memory.fork(process, child);
                    self.processes.push(Process { host, space: Some(space), buffer: None, arena });
                }
            }
            // None of the others changes a byte.
            _ => {}
        }
    }

    fn note_object_change(&mut self, host: usize, change: ObjectChange) {
        match change {
            ObjectChange::Punch { object, first, end } => {
                self.memory.punch((host, object), first, end);
                self.counts.one("changes: hole punched");
            }
            ObjectChange::Truncate { object, pages } => {
                self.memory.truncate((host, object), pages);
                self.counts.one("changes: truncated");
            }
            ObjectChange::WriteBack { .. } => self.counts.one("changes: written back"),
            ObjectChange::Evict { .. } => self.counts.one("changes: evicted"),
            ObjectChange::Move { .. } => self.counts.one("changes: DMABUF moved"),
        }
    }

    /// A process that no region is made of ends.
    pub(super) fn end_some_process(&mut self) -> Result<(), Broken> {
        let Some(process) = self.some_process(None) else { return Ok(()) };
        let host = self.processes[process].host;
        let used = self.changes.iter().any(|change| change.process == Some(process));
        if used || self.living(Some(host)).len() < 2 || Arc::strong_count(self.space(process)) > 1 {
            return Ok(());
        }
        self.finish_bursts(host)?;
        self.note(|| format!("process {process} ends"));
        self.counts.one("processes ended");
        self.memory.end_process(process);
        drop(self.processes[process].space.take());
        Ok(())
    }

    /// Steps the devices of a host until none is in the middle of a burst: what waits for bursts does not wait then.
    pub(super) fn finish_bursts(&mut self, host: usize) -> Result<(), Broken> {
        const TRIES: usize = 64;
        let devices = self.hosts[host].devices.clone();
        for n in 0..TRIES {
            if self.epoch(host).drain().poll(self.epoch(host)) {
                return Ok(());
            }
            self.step_engine(devices[n % devices.len()])?;
        }
        Err(Broken { rule: "bursts", detail: format!("a burst on host {host} does not end") })
    }
}

enum Which {
    Space(SpaceChange),
    Object(ObjectChange),
}

fn name_of(change: &SpaceChange) -> &'static str {
    match change {
        SpaceChange::Map(_) => "changes: mapped",
        SpaceChange::Unmap(_) => "changes: unmapped",
        SpaceChange::Protect(..) => "changes: protected",
        SpaceChange::Remap { .. } => "changes: remapped",
        SpaceChange::Discard(_) => "changes: discarded",
        SpaceChange::Remove(_) => "changes: removed",
        SpaceChange::Split(_) => "changes: split",
        SpaceChange::Collapse(_) => "changes: collapsed",
        SpaceChange::Migrate(_) => "changes: migrated",
        SpaceChange::ToNode { .. } => "changes: moved to a node",
        SpaceChange::SwapOut(_) => "changes: swapped out",
        SpaceChange::ToDevice { .. } => "changes: moved to a device",
        SpaceChange::FromDevice(_) => "changes: moved from a device",
        SpaceChange::Exclusive { .. } => "changes: lent",
        SpaceChange::Poison(_) => "changes: poisoned",
        SpaceChange::Encrypt(..) => "changes: encrypted",
        SpaceChange::Fork => "changes: forked",
    }
}
