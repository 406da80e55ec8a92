//! Random sequences of calls to the two-step API, legal and not, and what comes of them: over any I/O address space.
//!
//! Public interface only, and nothing of this crate's tests: other test binaries include this file.

use hw_model::addr::{PAGE_SIZE, PhysAddr};
use hw_model::fault_plan::FaultPlan;
use hw_model::iommu::{LeafSize, MapError, UnmapError};
use hw_model::sync::Arc;
use mr::dma::{DestroyError, DmaDevice, IovaError, LinkError, Mapping, UnlinkError};

/// Mappings that a sequence has at a time.
pub const SLOTS: usize = 3;
/// Bytes of contiguous memory that a sequence maps: two leaves of 2 MiB.
pub const MEMORY: u64 = 4 << 20;
/// IO pages of memory that bounces in one call, at most.
const BOUNCED_PAGES: u64 = 6;

/// What is called, before it is known what the mapping is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Which mapping.
    pub slot: usize,
    /// Which step of the call fails, from 1; 0 for none.
    pub fail: u64,
    pub verb: Verb,
}

/// Where in a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// From one edge of an IO page on, that many IO pages, or less where the mapping ends.
    Edges(u64, u64),
    /// Bytes, wherever they lie.
    Odd(u64, u64),
    /// All of it.
    All,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// So many bytes, lying as the byte at this offset of the memory does. Only where the slot is empty or freed.
    Alloc {
        len: u64,
        like: u64,
    },
    Prepare(Place),
    /// From this IO page of the memory on; `askew` bytes off from where it would be legal.
    Link {
        place: Place,
        frame: u64,
        askew: u64,
        largest: LeafSize,
    },
    LinkBounced {
        place: Place,
        frame: u64,
    },
    /// As many pages of 4 KiB, each so many pages behind the one before, going round.
    LinkScattered {
        place: Place,
        count: u64,
        stride: u64,
    },
    Sync(Place),
    Copy {
        place: Place,
        for_cpu: bool,
    },
    Unlink {
        place: Place,
        discard: bool,
    },
    Destroy {
        pages: u64,
    },
    Free,
}

/// Takes a word apart: the next of `n` choices.
struct Choices(u64);

impl Choices {
    fn of(&mut self, n: u64) -> u64 {
        let choice = self.0 % n;
        self.0 /= n;
        choice
    }
    fn place(&mut self) -> Place {
        match self.of(8) {
            0 => Place::Odd(self.of(5) * 0x400, self.of(4) * 0x800 + self.of(3)),
            1 | 2 => Place::All,
            _ => Place::Edges(self.of(7), 1 + self.of(4)),
        }
    }
}

impl Call {
    /// The call that `word` stands for, where IO pages have `granule` bytes. Every word stands for one.
    pub fn decode(word: u64, granule: u64) -> Self {
        let mut choices = Choices(word);
        let slot = choices.of(SLOTS as u64) as usize;
        let fail = choices.of(16).saturating_sub(12);
        let verb = match choices.of(20) {
            0..4 => {
                let pages = [1, 2, 4, 7, 512, 512, 600][choices.of(7) as usize];
                let len = match choices.of(24) {
                    0 => 0,
                    1 => 1 << 50,
                    short => (pages * granule).min(MEMORY / 2) - if short < 8 { 0x33 } else { 0 },
                };
                Verb::Alloc { len, like: [0, 0, 0, 0x210, granule + 0x10][choices.of(5) as usize] }
            }
            4 => Verb::Prepare(choices.place()),
            5..9 => {
                let largest = LeafSize::ALL[choices.of(3) as usize];
                let place = choices.place();
                let askew = if choices.of(10) == 0 { 8 } else { 0 };
                Verb::Link { place, frame: choices.of(64) * choices.of(2), askew, largest }
            }
            9 => Verb::LinkBounced { place: choices.place(), frame: choices.of(64) },
            10..12 => {
                let place = choices.place();
                Verb::LinkScattered { place, count: choices.of(6), stride: 1 + choices.of(50) }
            }
            12 => Verb::Sync(choices.place()),
            13 => Verb::Copy { place: choices.place(), for_cpu: choices.of(2) == 0 },
            14..18 => Verb::Unlink { place: choices.place(), discard: choices.of(2) == 0 },
            18 => Verb::Destroy { pages: choices.of(6) },
            _ => Verb::Free,
        };
        Self { slot, fail, verb }
    }
}

/// What a call came to, whatever the addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// There is no mapping to call, or there is one already.
    Skipped,
    /// The step that was to fail did.
    Injected,
    BadRequest,
    Exhausted,
    Range,
    Unaligned,
    Granule,
    Misaligned,
    AlreadyMapped,
    Hole,
    PartOfLeaf,
    NoPool,
    StillLinked(u64),
    Freed,
    /// Something that no sequence should bring about.
    Unexpected,
}

/// A call with numbers in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resolved {
    pub offset: u64,
    pub len: u64,
    pub phys: PhysAddr,
}

/// What one step did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    pub outcome: Outcome,
    pub resolved: Resolved,
    /// Bytes linked in each mapping.
    pub linked: [u64; SLOTS],
    /// Units at the start of some IO pages of each mapping.
    pub units: [Vec<u64>; SLOTS],
}

/// A device and what its calls are about.
pub struct Stage {
    pub device: Arc<DmaDevice>,
    /// The plan that the device was made with.
    pub plan: Arc<FaultPlan>,
    /// [`MEMORY`] bytes, contiguous, beginning at a multiple of 2 MiB.
    pub memory: PhysAddr,
}

/// A sequence under way.
pub struct Run {
    stage: Stage,
    pub slots: [Option<Mapping>; SLOTS],
}

/// Offsets whose units are looked at.
pub fn looked_at(mapping: &Mapping) -> Vec<u64> {
    let inside = mapping.iova().0 & (mapping.granule() - 1);
    let edges = (0..12).chain([511, 512, 513]).map(|page| (page * mapping.granule()).saturating_sub(inside));
    edges.filter(|edge| *edge < mapping.len()).collect()
}

impl Run {
    pub fn new(stage: Stage) -> Self {
        Self { stage, slots: [const { None }; SLOTS] }
    }

    fn granule(&self) -> u64 {
        1 << self.stage.device.space().expect("something translates").granule_shift()
    }

    /// What `verb` means for the mapping it is called on.
    fn resolve(&self, call: &Call) -> Resolved {
        let nowhere = Resolved { offset: 0, len: 0, phys: self.stage.memory };
        let Some(mapping) = &self.slots[call.slot] else { return nowhere };
        let granule = self.granule();
        let inside = mapping.iova().0 & (granule - 1);
        let range = |place| match place {
            Place::All => (0, mapping.len()),
            Place::Odd(offset, len) => (offset, len),
            Place::Edges(first, pages) => {
                let edge = |page: u64| (page * granule).saturating_sub(inside);
                let (start, end) = (edge(first), edge(first + pages));
                (start, if start < mapping.len() { end.min(mapping.len()) } else { end } - start)
            }
        };
        let at = |place, frame: u64, askew| {
            let (offset, len) = range(place);
            let inside = (mapping.iova().0 + offset) & (granule - 1);
            // The last IO page of the range lies in the memory too.
            let last = MEMORY.saturating_sub((inside + len).next_multiple_of(granule) + granule);
            let phys = self.stage.memory.offset((frame * granule).min(last) + inside + askew);
            Resolved { offset, len, phys }
        };
        match call.verb {
            Verb::Link { place, frame, askew, .. } => at(place, frame, askew),
            Verb::LinkBounced { place, frame } => {
                let resolved = at(place, frame, 0);
                let most = BOUNCED_PAGES * granule;
                Resolved { len: resolved.len.min(most), ..resolved }
            }
            Verb::LinkScattered { place, count, .. } => {
                Resolved { offset: range(place).0, len: count * PAGE_SIZE, ..nowhere }
            }
            Verb::Prepare(place)
            | Verb::Sync(place)
            | Verb::Copy { place, .. }
            | Verb::Unlink { place, .. } => {
                let (offset, len) = range(place);
                Resolved { offset, len, ..nowhere }
            }
            Verb::Destroy { pages } => Resolved { len: range(Place::Edges(0, pages)).1, ..nowhere },
            Verb::Alloc { .. } | Verb::Free => nowhere,
        }
    }

    /// Makes one call.
    pub fn step(&mut self, call: &Call) -> Step {
        let resolved = self.resolve(call);
        if call.fail > 0 {
            self.stage.plan.fail_nth_from_now(call.fail);
        }
        let outcome = self.call(call, resolved);
        let failed = self.stage.plan.failed_at().is_some() && call.fail > 0;
        self.stage.plan.disarm();
        let outcome = if failed && outcome != Outcome::Done { Outcome::Injected } else { outcome };
        let linked = self.slots.each_ref().map(|slot| slot.as_ref().map_or(0, Mapping::linked));
        let units = |mapping: &Mapping| looked_at(mapping).iter().map(|at| mapping.unit_at(*at)).collect();
        // A freed mapping says what is there now, which may be somebody else's.
        let live = |mapping: &&Mapping| !mapping.is_freed();
        let units =
            self.slots.each_ref().map(|slot| slot.as_ref().filter(live).map(units).unwrap_or_default());
        Step { outcome, resolved, linked, units }
    }

    fn call(&mut self, call: &Call, resolved: Resolved) -> Outcome {
        let Resolved { offset, len, phys } = resolved;
        if let Verb::Alloc { len, like } = call.verb {
            return self.alloc(call.slot, len, like);
        }
        let Some(mapping) = &self.slots[call.slot] else { return Outcome::Skipped };
        match call.verb {
            Verb::Alloc { .. } => Outcome::Skipped,
            Verb::Prepare(_) => of_link(mapping.prepare(offset, len)),
            Verb::Link { largest, .. } => of_link(mapping.link(offset, phys, len, largest)),
            Verb::LinkBounced { .. } => of_link(mapping.link_bounced(offset, phys, len)),
            Verb::LinkScattered { count, stride, .. } => {
                let frames = scattered(self.stage.memory, count, stride);
                of_link(mapping.link_scattered(offset, frames))
            }
            Verb::Sync(_) => of_link(mapping.sync(offset, len)),
            Verb::Copy { for_cpu: true, .. } => of_link(mapping.sync_for_cpu(offset, len)),
            Verb::Copy { for_cpu: false, .. } => of_link(mapping.sync_for_device(offset, len)),
            Verb::Unlink { discard: true, .. } => of_unlink(mapping.unlink_and_discard(offset, len)),
            Verb::Unlink { discard: false, .. } => of_unlink(mapping.unlink(offset, len)),
            Verb::Destroy { .. } => match mapping.destroy(len) {
                Ok(()) => Outcome::Done,
                Err(DestroyError::Unlink(error)) => of_unlink(Err(error)),
                Err(DestroyError::StillLinked(still)) => Outcome::StillLinked(still.linked),
            },
            Verb::Free => match mapping.free() {
                Ok(()) => Outcome::Done,
                Err(still) => Outcome::StillLinked(still.linked),
            },
        }
    }

    fn alloc(&mut self, slot: usize, len: u64, like: u64) -> Outcome {
        let place = &mut self.slots[slot];
        if place.as_ref().is_some_and(|mapping| !mapping.is_freed()) {
            return Outcome::Skipped;
        }
        match Mapping::try_alloc(&self.stage.device, len, self.stage.memory.offset(like).0) {
            Ok(mapping) => {
                *place = mapping;
                Outcome::Done
            }
            Err(IovaError::BadRequest { .. }) => Outcome::BadRequest,
            Err(_) => Outcome::Exhausted,
        }
    }

    /// Unlinks every unit and frees. What is left in the space after this is a leak.
    pub fn finish(self) {
        for mapping in self.slots.into_iter().flatten() {
            let inside = mapping.iova().0 & (mapping.granule() - 1);
            let mut at = 0;
            while at < mapping.len() && mapping.linked() > 0 {
                let unit = mapping.unit_at(at);
                // The first and the last unit may reach beyond the mapping.
                let next = ((at + inside) / mapping.granule() * mapping.granule()
                    + unit.max(mapping.granule()))
                .saturating_sub(inside);
                if unit > 0 {
                    mapping.unlink(at, next.min(mapping.len()) - at).expect("a whole unit");
                }
                at = next;
            }
            mapping.free().expect("every unit is unlinked");
        }
    }
}

/// `count` pages of the memory at `memory`, each `stride` pages behind the one before, going round.
pub fn scattered(
    memory: PhysAddr,
    count: u64,
    stride: u64,
) -> impl ExactSizeIterator<Item = PhysAddr> + Clone {
    let page = move |index: usize| memory.offset(index as u64 * stride * PAGE_SIZE % MEMORY);
    (0..count as usize).map(page)
}

fn of_link(outcome: Result<(), LinkError>) -> Outcome {
    use mr::dma::BounceError;
    match outcome {
        Ok(()) => Outcome::Done,
        Err(LinkError::Range(_)) => Outcome::Range,
        Err(LinkError::Unaligned { .. }) => Outcome::Unaligned,
        Err(LinkError::Granule { .. }) => Outcome::Granule,
        Err(LinkError::Map(MapError::Misaligned { .. })) => Outcome::Misaligned,
        Err(LinkError::Map(MapError::AlreadyMapped { .. })) => Outcome::AlreadyMapped,
        Err(LinkError::Bounce(BounceError::NoPool)) => Outcome::NoPool,
        Err(LinkError::Freed { .. }) => Outcome::Freed,
        Err(_) => Outcome::Unexpected,
    }
}

fn of_unlink(outcome: Result<(), UnlinkError>) -> Outcome {
    match outcome {
        Ok(()) => Outcome::Done,
        Err(UnlinkError::Range(_)) => Outcome::Range,
        Err(UnlinkError::Unmap(UnmapError::Hole { .. })) => Outcome::Hole,
        Err(UnlinkError::Unmap(UnmapError::PartOfLeaf { .. })) => Outcome::PartOfLeaf,
        Err(UnlinkError::Freed { .. }) => Outcome::Freed,
        Err(UnlinkError::Unmap(_)) => Outcome::Unexpected,
    }
}
