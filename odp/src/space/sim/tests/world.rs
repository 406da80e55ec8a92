//! Processes, objects and devices that one seed drives, beside a model that knows only bytes.

use super::device::Device;
use super::*;
use crate::page::Backing;
use crate::space::{Access, FaultError};
use hw_model::bus::{Busy, HostMemory};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::{BTreeMap, BTreeSet};

type Bytes = Vec<u8>;

fn zeroes() -> Bytes {
    vec![0; PAGE_SIZE as usize]
}

/// What a page of a process is, to who knows nothing of frames.
#[derive(Clone, Debug)]
struct ModelPage {
    protection: Protection,
    source: Source,
    /// Its page of the source, for objects.
    index: u64,
    /// The process's own bytes, for what is not shared.
    own: Option<Bytes>,
}

/// Bytes an object's pages hold; absent ones are zero.
#[derive(Clone, Debug, Default)]
struct ModelObject {
    pages: u64,
    bytes: BTreeMap<u64, Bytes>,
}

struct Process {
    space: Arc<SimSpace>,
    device: Device,
    pages: BTreeMap<u64, ModelPage>,
}

/// What happened, to be sure that all of it did.
pub type Counts = BTreeMap<&'static str, u64>;

pub struct World {
    machine: Machine,
    processes: Vec<Process>,
    objects: BTreeMap<ObjectId, ModelObject>,
    dmabufs: Vec<ObjectId>,
    files: Vec<ObjectId>,
    shared: Vec<ObjectId>,
    /// Changes begun and not finished, with the process they belong to.
    open: Vec<(Option<MmId>, SimOp)>,
    /// Write faults that were begun and not seen to their end: the page may become the process's own without being
    /// written, and even after something else was mapped there.
    doubts: BTreeSet<(MmId, u64)>,
    /// Pages that somebody holds where they are, and what a frame held when it was last looked at.
    pins: Vec<SimPin>,
    rng: ChaCha8Rng,
    pub counts: Counts,
}

const MAX_PROCESSES: usize = 4;
const MAX_OPEN: usize = 6;

impl World {
    pub fn new(seed: u64) -> Self {
        let machine = machine(small(seed, FaultMode::Park));
        let mut objects = BTreeMap::new();
        let mut add = |object, pages| {
            objects.insert(object, ModelObject { pages, bytes: BTreeMap::new() });
            object
        };
        let host = &machine.host;
        let files = vec![add(host.new_file(24), 24)];
        let shared = vec![add(host.new_shmem(24), 24), add(host.new_hugetlb(1), HUGE_PAGES)];
        let dmabuf = |first, at| host.new_dmabuf(machine.bar, first, 16, at).expect("room in the BAR");
        let dmabufs = vec![add(dmabuf(0, Residence::System), 16), add(dmabuf(16, Residence::Peer), 16)];
        let space = host.new_space();
        let first = Process { device: Device::new(&space), space, pages: BTreeMap::new() };
        Self {
            machine,
            processes: vec![first],
            objects,
            dmabufs,
            files,
            shared,
            open: Vec::new(),
            doubts: BTreeSet::new(),
            pins: Vec::new(),
            rng: ChaCha8Rng::seed_from_u64(seed),
            counts: Counts::new(),
        }
    }

    /// `steps` random steps; now and then with a burst of some device under way meanwhile.
    pub fn run(&mut self, steps: u32) {
        let mut slot = self.machine.host.epoch().register().expect("first engine");
        let mut left = steps;
        while left > 0 {
            let stretch = self.rng.random_range(1..12).min(left);
            left -= stretch;
            let burst = slot.enter().expect("never closed here");
            let target = self.translate();
            for _ in 0..stretch {
                self.step();
            }
            self.burst(target, burst);
            for _ in 0..self.rng.random_range(0..4) {
                self.step();
            }
            while self.open.len() > 1 && self.chance(80) {
                let (mm, op) = self.open.swap_remove(0);
                self.finish(mm, op);
            }
            self.machine.host.poll_parked();
            // Not under a burst: the end of a process waits for it, and there is only this thread.
            if self.chance(4) {
                self.end_process();
            }
        }
        self.settle();
        self.compare_everything();
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.rng.random_range(0..100) < percent
    }

    /// What a device reads of its page list when a burst begins.
    fn translate(&mut self) -> Option<(MmId, u64, PhysAddr)> {
        let process = self.rng.random_range(0..self.processes.len());
        let process = &self.processes[process];
        let entries = process.device.list.entries.lock();
        let nth = self.rng.random_range(0..entries.len().max(1));
        let (page, entry) = entries.iter().nth(nth)?;
        let plain = entry.backing != Backing::EncryptedPrivate;
        plain.then_some((process.space.id(), *page, entry.phys))
    }

    /// The bytes move at last, through a translation that may have been cleared meanwhile. Whatever was begun since, the
    /// page must not have gone: nobody has ended the wait for this burst.
    fn burst(&mut self, target: Option<(MmId, u64, PhysAddr)>, burst: Busy<'_>) {
        if let Some((mm, page, phys)) = target {
            let mut seen = zeroes();
            self.machine.host.read(phys, &mut seen).expect("the frame went under a burst");
            if let Some(process) = self.processes.iter().position(|p| p.space.id() == mm) {
                self.settle_doubts();
                if let Ok(expected) = self.expected(process, page, Access::Read) {
                    assert!(seen == expected, "a burst saw other bytes than page {page:#x} holds");
                    self.count("bursts across steps");
                }
            }
        }
        drop(burst);
    }

    /// Ends everything that is open, and brings everything parked to its end.
    fn settle(&mut self) {
        while let Some((mm, op)) = self.open.pop() {
            self.finish(mm, op);
        }
        assert_eq!(self.machine.host.poll_parked(), 0, "with nothing under way nothing waits");
        self.machine.host.check().expect("the host agrees with itself");
    }

    /// Looks which pages that may have been copied have been. They no longer follow their object.
    fn settle_doubts(&mut self) {
        if self.doubts.is_empty() {
            return;
        }
        // While something is parked there may be more to come.
        let all_seen = self.machine.host.stats().parked == 0;
        let kernel = self.machine.host.kernel.lock();
        for process in &mut self.processes {
            let mm = process.space.id();
            for (_, page) in self.doubts.range((mm, 0)..=(mm, u64::MAX)) {
                let (Some(known), Some(pte)) = (process.pages.get_mut(page), kernel.pte(mm, *page)) else {
                    continue;
                };
                let private = matches!(known.source, Source::Private { .. });
                if private && known.own.is_none() && kernel.cached(pte.place).is_none() {
                    known.own = Some(match pte.place {
                        kernel::Place::Swap(slot) => kernel.swap[&slot].bytes.to_vec(),
                        place => kernel.store.page(place).to_vec(),
                    });
                }
            }
        }
        drop(kernel);
        if all_seen {
            self.doubts.clear();
        }
    }

    /// What a process should see of a page.
    fn expected(&self, process: usize, page: u64, access: Access) -> Result<Bytes, FaultError> {
        let at = VirtAddr::from_page_number(page);
        let known = self.processes[process].pages.get(&page).ok_or(FaultError::NoMapping { at })?;
        if known.source == Source::Special {
            return Err(FaultError::Special { at });
        }
        if !known.protection.allows(access) {
            return Err(FaultError::Permission { at, access });
        }
        let object = match known.source {
            Source::Shared { object, .. } | Source::Private { object, .. } => {
                let object = &self.objects[&object];
                if known.index >= object.pages {
                    return Err(FaultError::NoMapping { at });
                }
                object.bytes.get(&known.index)
            }
            Source::Anonymous | Source::Special => None,
        };
        Ok(known.own.as_ref().or(object).cloned().unwrap_or_else(zeroes))
    }

    /// What a write does to the model.
    fn note_write(&mut self, process: usize, page: u64, offset: usize, data: &[u8]) {
        let mut bytes = self.expected(process, page, Access::Write).expect("it could be written");
        bytes[offset..offset + data.len()].copy_from_slice(data);
        let known = self.processes[process].pages.get_mut(&page).expect("it is mapped");
        match known.source {
            Source::Shared { object, .. } => {
                let object = self.objects.get_mut(&object).expect("objects stay");
                object.bytes.insert(known.index, bytes);
            }
            _ => known.own = Some(bytes),
        }
    }

    fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..50 => self.access(),
            50..53 => self.prefetch(),
            53..55 => self.pin(),
            55..79 => self.begin_space_change(),
            79..87 => self.begin_object_change(),
            87..96 => self.finish_some(),
            _ => drop(self.machine.host.poll_parked()),
        }
    }

    /// A page that is mapped, if there is one; sometimes one that is not.
    fn some_page(&mut self, process: usize) -> u64 {
        let count = self.processes[process].pages.len();
        if count == 0 || self.chance(2) {
            return self.rng.random_range(16..1 << 20);
        }
        // Favour pages near each other, so that things meet.
        let nth = self.rng.random_range(0..count.min(48));
        let nth = if self.chance(70) { nth } else { self.rng.random_range(0..count) };
        *self.processes[process].pages.keys().nth(nth).expect("counted")
    }

    /// The program or its device reads or writes part of a page, and sees what it should.
    fn access(&mut self) {
        let process = self.rng.random_range(0..self.processes.len());
        let page = self.some_page(process);
        let access = if self.chance(50) { Access::Write } else { Access::Read };
        self.settle_doubts();
        let expected = self.expected(process, page, access);
        let offset = self.rng.random_range(0..PAGE_SIZE as usize);
        let len = self.rng.random_range(1..=(PAGE_SIZE as usize - offset).min(64));
        let data: Bytes = (0..len).map(|_| self.rng.random()).collect();
        let result = if self.chance(50) {
            self.cpu_access(process, page, access, offset, &data)
        } else {
            self.device_access(process, page, access, offset, &data)
        };
        match (result, expected) {
            (Err(FaultError::Busy { .. } | FaultError::OutOfMemory { .. }), _) => {
                if access == Access::Write {
                    self.doubts.insert((self.processes[process].space.id(), page));
                }
                self.count("busy");
            }
            (Ok(seen), Ok(expected)) if access == Access::Read => {
                let part = &expected[offset..offset + len];
                assert!(seen == part, "page {page:#x} of process {process}: read wrong bytes");
            }
            (Ok(_), Ok(_)) => self.note_write(process, page, offset, &data),
            (Err(refused), Err(expected)) => {
                assert_eq!(refused, expected);
                self.count("refused accesses");
            }
            (result, expected) => panic!(
                "page {page:#x} of process {process}: {access:?} gave {:?}, expected {:?}",
                result.map(drop),
                expected.map(drop)
            ),
        }
    }

    fn cpu_access(
        &mut self,
        process: usize,
        page: u64,
        access: Access,
        offset: usize,
        data: &[u8],
    ) -> Result<Bytes, FaultError> {
        self.count("cpu accesses");
        let at = VirtAddr::from_page_number(page).offset(offset as u64);
        let mut seen = vec![0; data.len()];
        let space = &self.processes[process].space;
        // A fault names the page, as a signal names the address.
        let done = match access {
            Access::Read => space.cpu_read(at, &mut seen),
            Access::Write => space.cpu_write(at, data),
        };
        done.map(|()| seen)
    }

    fn device_access(
        &mut self,
        process: usize,
        page: u64,
        access: Access,
        offset: usize,
        data: &[u8],
    ) -> Result<Bytes, FaultError> {
        let Process { space, device, .. } = &self.processes[process];
        let entry = device.entry(space, page, access)?;
        let at = entry.phys.offset(offset as u64);
        // A bus keeps devices from it; whoever copies for them, as to a bounce buffer, is the CPU.
        let private = self.machine.host.private_pages().expect("a host knows them").is_private(at);
        assert_eq!(private, entry.backing == Backing::EncryptedPrivate, "page {page:#x} of {process}");
        let mut seen = vec![0; data.len()];
        let host = &self.machine.host;
        let moved = match access {
            Access::Read => host.read(at, &mut seen),
            Access::Write => host.write(at, data),
        };
        moved.expect("a translation that was told stays good");
        self.count("device accesses");
        *self.counts.entry(backing_name(entry.backing)).or_default() += 1;
        Ok(seen)
    }

    fn prefetch(&mut self) {
        let process = self.rng.random_range(0..self.processes.len());
        let page = self.some_page(process);
        let pages = self.rng.random_range(1..40);
        let range = VirtRange::new(VirtAddr::from_page_number(page), pages * PAGE_SIZE).expect("fits");
        let Process { space, device, .. } = &self.processes[process];
        device.prefetch(space, range);
        self.count("prefetches");
    }

    /// A page is held where it is, or let go of, or looked at: a frame that is held is in use.
    fn pin(&mut self) {
        const MOST: usize = 4;
        if let Some(run) = self.pins.first().and_then(|pin| pin.runs().first()) {
            self.machine.host.read(run.phys, &mut zeroes()).expect("a pinned frame stays in use");
        }
        if self.pins.len() == MOST || self.chance(30) {
            let nth = self.rng.random_range(0..self.pins.len().max(1));
            if nth < self.pins.len() {
                drop(self.pins.swap_remove(nth));
            }
            return;
        }
        let process = self.rng.random_range(0..self.processes.len());
        let page = self.some_page(process);
        let range = VirtRange::new(VirtAddr::from_page_number(page), PAGE_SIZE).expect("fits");
        let space = &self.processes[process].space;
        self.doubts.insert((space.id(), page));
        match space.pin(range) {
            Ok(pin) => {
                self.pins.push(pin);
                self.count("pinned");
            }
            Err(_) => self.count("pins refused"),
        }
    }

    fn begin_space_change(&mut self) {
        if self.open.len() >= MAX_OPEN {
            return self.finish_some();
        }
        let process = self.rng.random_range(0..self.processes.len());
        let change = self.some_space_change(process);
        let space = Arc::clone(&self.processes[process].space);
        match space.begin(change) {
            Ok(op) if self.chance(60) => self.open.push((Some(space.id()), op)),
            Ok(mut op) => {
                if op.poll() {
                    self.finish(Some(space.id()), op);
                } else {
                    self.open.push((Some(space.id()), op));
                }
            }
            Err(_) => self.count("refused changes"),
        }
    }

    fn some_space_change(&mut self, process: usize) -> SpaceChange {
        let page = self.some_page(process);
        let huge = self.chance(15);
        let page = if huge { page - page % HUGE_PAGES } else { page };
        let most = if self.chance(50) { 3 } else { 12 };
        let pages = if huge { HUGE_PAGES } else { self.rng.random_range(1..most) };
        let range = VirtRange::new(VirtAddr::from_page_number(page), pages * PAGE_SIZE).expect("fits");
        match self.rng.random_range(0..100) {
            0..22 => SpaceChange::Map(self.some_mapping(range)),
            22..28 => SpaceChange::Unmap(range),
            28..34 => {
                let all = [Protection::None, Protection::Read, Protection::ReadWrite, Protection::ReadWrite];
                SpaceChange::Protect(range, all[self.rng.random_range(0..all.len())])
            }
            34..40 => SpaceChange::Discard(range),
            40..45 => SpaceChange::Remove(range),
            45..51 => {
                let to = self.rng.random_range(16..1_u64 << 20);
                let to = if huge || self.chance(30) { to - to % HUGE_PAGES } else { to };
                SpaceChange::Remap { from: range, to: VirtAddr::from_page_number(to) }
            }
            51..56 => SpaceChange::Split(self.some_huge_range(process).unwrap_or(range)),
            56..62 => SpaceChange::Collapse(self.some_huge_range(process).unwrap_or(range)),
            62..66 => SpaceChange::Migrate(range),
            66..70 => SpaceChange::ToNode { range, node: self.rng.random_range(0..3) },
            70..78 => SpaceChange::SwapOut(range),
            78..84 => {
                let memory = if self.chance(50) { self.machine.coherent } else { self.machine.private };
                SpaceChange::ToDevice { range, memory }
            }
            84..88 => SpaceChange::FromDevice(range),
            88..91 => {
                let owner = ProviderId(self.rng.random_range(2..4));
                SpaceChange::Exclusive { range, owner }
            }
            91..96 => {
                let all = [Encryption::Private, Encryption::Shared, Encryption::Plain];
                SpaceChange::Encrypt(range, all[self.rng.random_range(0..all.len())])
            }
            _ if self.processes.len() < MAX_PROCESSES => SpaceChange::Fork,
            _ => SpaceChange::Discard(range),
        }
    }

    /// Anonymous memory in which a huge page fits.
    fn some_huge_range(&mut self, process: usize) -> Option<VirtRange> {
        let pages = &self.processes[process].pages;
        let fits = |page: u64| {
            let ends = [page, page + HUGE_PAGES - 1].map(|page| pages.get(&page));
            ends.iter().all(|known| known.is_some_and(|known| known.source == Source::Anonymous))
        };
        let heads: Vec<u64> =
            pages.keys().copied().filter(|page| page.is_multiple_of(HUGE_PAGES) && fits(*page)).collect();
        let head = *heads.get(self.rng.random_range(0..heads.len().max(1)))?;
        VirtRange::new(VirtAddr::from_page_number(head), HUGE_PAGES * PAGE_SIZE)
    }

    fn some_mapping(&mut self, near: VirtRange) -> MapRequest {
        let pages = self.rng.random_range(1..20);
        let first = self.rng.random_range(0..12);
        let mut one_of = |all: &[ObjectId]| all[self.rng.random_range(0..all.len())];
        let (file, shared, dmabuf) = (one_of(&self.files), one_of(&self.shared), one_of(&self.dmabufs));
        let request = MapRequest::anonymous(pages);
        let request = match self.rng.random_range(0..12) {
            0..3 => request,
            3 => MapRequest { pages: HUGE_PAGES, ..request }.huge(),
            4..6 => request.of(Source::Private { object: file, first }),
            6 => request.of(Source::Shared { object: file, first }),
            7 => request.of(Source::Private { object: self.shared[0], first }),
            8..10 if self.objects[&shared].pages.is_multiple_of(HUGE_PAGES) => {
                MapRequest { pages: HUGE_PAGES, ..request }.of(Source::Shared { object: shared, first: 0 })
            }
            8..10 => request.of(Source::Shared { object: shared, first }),
            10 => request.of(Source::Shared { object: dmabuf, first: first % 4 }),
            _ if self.chance(20) => request.of(Source::Special),
            _ => request,
        };
        if self.chance(15) { request.fixed(near.start()) } else { request }
    }

    fn begin_object_change(&mut self) {
        if self.open.len() >= MAX_OPEN {
            return self.finish_some();
        }
        let mut one_of = |all: &[ObjectId]| all[self.rng.random_range(0..all.len())];
        let (file, shared, dmabuf) = (one_of(&self.files), one_of(&self.shared), one_of(&self.dmabufs));
        let object = if self.chance(50) { file } else { shared };
        let first = self.rng.random_range(0..16);
        let end = first + self.rng.random_range(1..8);
        let change = match self.rng.random_range(0..12) {
            0 | 1 => ObjectChange::Punch { object, first, end },
            2 => ObjectChange::Truncate { object, pages: self.rng.random_range(8..32) },
            3 => ObjectChange::Truncate { object: self.shared[1], pages: HUGE_PAGES },
            4..6 => ObjectChange::WriteBack { object: file, first, end },
            6..8 => ObjectChange::Evict { object: file, first, end },
            _ => {
                let to = if self.chance(50) { Residence::System } else { Residence::Peer };
                ObjectChange::Move { object: dmabuf, first, end: end.min(16), to }
            }
        };
        match self.machine.host.begin(change) {
            Ok(op) => self.open.push((None, op)),
            Err(_) => self.count("refused changes"),
        }
    }

    /// Finishes one of the open changes, if it is ready: while a burst is under way it may not be.
    fn finish_some(&mut self) {
        if self.open.is_empty() {
            return;
        }
        let nth = self.rng.random_range(0..self.open.len());
        if self.chance(5) {
            // Given up: nothing must have changed.
            drop(self.open.swap_remove(nth));
            self.count("abandoned changes");
        } else if self.open[nth].1.poll() {
            let (mm, op) = self.open.swap_remove(nth);
            self.finish(mm, op);
        } else {
            self.count("waits for a burst");
        }
    }

    fn finish(&mut self, mm: Option<MmId>, op: SimOp) {
        self.settle_doubts();
        let (space_change, object_change) = (op.space_change(), op.object_change());
        match (op.finish(), space_change, object_change) {
            (Err(_), ..) => self.count("refused changes"),
            (Ok(outcome), Some(change), _) => {
                let process = self.processes.iter().position(|p| Some(p.space.id()) == mm);
                let process = process.expect("a process that ended refuses changes");
                self.note_space_change(process, change, outcome);
            }
            (Ok(_), None, Some(change)) => self.note_object_change(change),
            (Ok(_), None, None) => unreachable!("it was begun here"),
        }
        if self.chance(20) {
            self.machine.host.check().expect("the host agrees with itself");
        }
    }

    fn note_space_change(&mut self, process: usize, change: SpaceChange, outcome: Outcome) {
        self.count(change_name(change, outcome.pages));
        let pages = &mut self.processes[process].pages;
        let span = |range: VirtRange| {
            let first = range.start().page_number();
            first..first + range.page_count()
        };
        match change {
            SpaceChange::Map(request) => {
                let first = match request.source {
                    Source::Shared { first, .. } | Source::Private { first, .. } => first,
                    Source::Anonymous | Source::Special => 0,
                };
                for (n, page) in span(outcome.at.expect("a mapping is somewhere")).enumerate() {
                    let known = ModelPage {
                        protection: request.protection,
                        source: request.source,
                        index: first + n as u64,
                        own: None,
                    };
                    pages.insert(page, known);
                }
            }
            SpaceChange::Unmap(range) => pages.retain(|page, _| !span(range).contains(page)),
            SpaceChange::Protect(range, to) => {
                pages.range_mut(span(range)).for_each(|(_, page)| page.protection = to);
            }
            SpaceChange::Discard(range) => pages.range_mut(span(range)).for_each(|(_, page)| page.own = None),
            SpaceChange::Remove(range) => {
                for (_, page) in pages.range(span(range)) {
                    if let Source::Shared { object, .. } = page.source {
                        self.objects.get_mut(&object).expect("objects stay").bytes.remove(&page.index);
                    }
                }
            }
            SpaceChange::Remap { from, .. } => {
                let to = outcome.at.expect("moved somewhere");
                let moved: Vec<_> =
                    span(from).map(|page| pages.remove(&page).expect("it was mapped")).collect();
                pages.extend(span(to).zip(moved));
            }
            SpaceChange::Fork => {
                let pages = pages.clone();
                let space = outcome.child.expect("a fork has a child");
                self.processes.push(Process { device: Device::new(&space), space, pages });
            }
            // None of the others changes a byte.
            SpaceChange::Split(_)
            | SpaceChange::Collapse(_)
            | SpaceChange::Migrate(_)
            | SpaceChange::ToNode { .. }
            | SpaceChange::SwapOut(_)
            | SpaceChange::ToDevice { .. }
            | SpaceChange::FromDevice(_)
            | SpaceChange::Exclusive { .. }
            | SpaceChange::Encrypt(..) => {}
            SpaceChange::Poison(_) => unreachable!("not done here"),
        }
    }

    fn note_object_change(&mut self, change: ObjectChange) {
        match change {
            ObjectChange::Punch { object, first, end } => {
                let object = self.objects.get_mut(&object).expect("objects stay");
                object.bytes.retain(|index, _| !(first..end).contains(index));
                self.count("punched");
            }
            ObjectChange::Truncate { object: id, pages } => {
                let object = self.objects.get_mut(&id).expect("objects stay");
                let before = object.pages;
                object.pages = pages;
                object.bytes.retain(|index, _| *index < pages);
                for process in &mut self.processes {
                    for page in process.pages.values_mut() {
                        let cut = matches!(page.source, Source::Private { object, .. } if object == id);
                        if cut && (pages..before).contains(&page.index) {
                            page.own = None;
                        }
                    }
                }
                self.count("truncated");
            }
            ObjectChange::WriteBack { .. } => self.count("written back"),
            ObjectChange::Evict { .. } => self.count("evicted"),
            ObjectChange::Move { to: Residence::Peer, .. } => self.count("moved to the BAR"),
            ObjectChange::Move { to: Residence::System, .. } => self.count("moved to system memory"),
        }
    }

    fn end_process(&mut self) {
        if self.processes.len() > 1 {
            let nth = self.rng.random_range(0..self.processes.len());
            let process = self.processes.swap_remove(nth);
            let (theirs, rest) = std::mem::take(&mut self.open)
                .into_iter()
                .partition(|(mm, _)| *mm == Some(process.space.id()));
            self.open = rest;
            drop::<Vec<_>>(theirs);
            drop(process.space);
            assert!(process.device.list.entries.lock().is_empty(), "entries outlived the process");
            self.count("ended processes");
        }
    }

    /// Every page of every process, by program and by device.
    fn compare_everything(&mut self) {
        for process in 0..self.processes.len() {
            let pages: Vec<u64> = self.processes[process].pages.keys().copied().collect();
            for page in pages {
                self.settle_doubts();
                let expected = self.expected(process, page, Access::Read);
                let space = &self.processes[process].space;
                let mut seen = zeroes();
                let result = space.cpu_read(VirtAddr::from_page_number(page), &mut seen);
                match (result, expected) {
                    (Ok(()), Ok(expected)) => {
                        assert!(seen == expected, "page {page:#x} of {process} differs")
                    }
                    (Err(FaultError::OutOfMemory { .. }), _) => self.count("busy"),
                    (result, expected) => assert_eq!(result, expected.map(drop)),
                }
                self.machine.host.poll_parked();
            }
        }
        let before = self.machine.host.stats();
        assert_eq!(before.poisoned_frames, 0);
        self.machine.host.check().expect("the host agrees with itself");
    }

    /// Ends all processes and empties all objects; gives the host's counts.
    pub fn tear_down(mut self) -> (HostStats, Counts) {
        self.pins.clear();
        self.processes.clear();
        for object in self.files.iter().chain(&self.shared) {
            self.machine
                .host
                .change(ObjectChange::Truncate { object: *object, pages: 0 })
                .expect("nobody maps it any more");
        }
        self.machine.host.check().expect("the host agrees with itself");
        (self.machine.host.stats(), self.counts)
    }
}

fn backing_name(backing: Backing) -> &'static str {
    match backing {
        Backing::Anonymous => "dma to anonymous",
        Backing::TransparentHuge => "dma to transparent huge",
        Backing::Hugetlb => "dma to hugetlb",
        Backing::File => "dma to file",
        Backing::Shared => "dma to shared",
        Backing::Zero => "dma from the zero page",
        Backing::DmabufSystem => "dma to dmabuf in system memory",
        Backing::DmabufPeer => "dma to dmabuf in the BAR",
        Backing::DevicePrivate => "dma to private device memory",
        Backing::DeviceCoherent => "dma to coherent device memory",
        Backing::EncryptedPrivate => "dma to private encrypted memory",
        Backing::EncryptedShared => "dma to shared encrypted memory",
    }
}

fn change_name(change: SpaceChange, pages: u64) -> &'static str {
    if pages == 0 {
        return "changes of nothing";
    }
    match change {
        SpaceChange::Map(_) => "mapped",
        SpaceChange::Unmap(_) => "unmapped",
        SpaceChange::Protect(..) => "protected",
        SpaceChange::Remap { .. } => "moved mappings",
        SpaceChange::Discard(_) => "discarded",
        SpaceChange::Remove(_) => "removed",
        SpaceChange::Split(_) => "split",
        SpaceChange::Collapse(_) => "collapsed",
        SpaceChange::Migrate(_) => "migrated",
        SpaceChange::ToNode { .. } => "moved to another node",
        SpaceChange::SwapOut(_) => "swapped out",
        SpaceChange::ToDevice { .. } => "moved to a device",
        SpaceChange::FromDevice(_) => "moved from a device",
        SpaceChange::Exclusive { .. } => "lent",
        SpaceChange::Poison(_) => "poisoned",
        SpaceChange::Encrypt(..) => "encrypted",
        SpaceChange::Fork => "forked",
    }
}
