//! Random sequences of calls of the two-step API, legal and not, and what each call says.

use crate::bed::PAGE;
use hw_model::addr::{Iova, PhysAddr, pages_for};
use hw_model::iommu::LeafSize;
use hw_model::sync::Arc;
use mr::dma::{DestroyError, DmaDevice, IoSpace, IovaError, LinkError, Mapping, StillLinked, UnlinkError};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Mappings that a sequence has at a time.
pub const SLOTS: usize = 3;
/// Small pages that links lead to.
pub const SMALL: u64 = 64;
/// Bytes of the large piece behind them.
pub const LARGE: u64 = 2 << 20;
/// Where the large piece begins in the pool, and where the pool ends.
pub const LARGE_AT: u64 = LARGE;
pub const POOL: u64 = LARGE_AT + LARGE;

/// Part of a mapping: the edge of an IO page that it begins at, counted from the mapping's start, how many IO pages it
/// goes on, and how many bytes its start and its length are off. Most are made to fit into the mapping.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    edge: u64,
    pages: u64,
    fits: bool,
    off: u64,
    longer: u64,
}

/// One call.
#[derive(Clone, Debug)]
pub enum Call {
    /// Reserves where nothing is reserved, lying in its pages as `like` does.
    Reserve {
        len: u64,
        like: u64,
    },
    Prepare(Part),
    /// Links to `at` bytes into the pool; `skewed` lies in its page otherwise than the IOVA.
    Link {
        part: Part,
        at: u64,
        skewed: bool,
        largest: LeafSize,
    },
    /// Links one page after the other to these of the pool.
    Scatter {
        part: Part,
        pages: Vec<u64>,
    },
    Sync(Part),
    Unlink(Part),
    Free,
    /// Unlinks this many IO pages from the start, and frees.
    Destroy {
        pages: u64,
    },
}

/// What a call said.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// There is no mapping to call, or one already.
    Skipped,
    Reserved(Iova, u64),
    Done,
    Exhausted(IovaError),
    Link(LinkError),
    Unlink(UnlinkError),
    StillLinked(StillLinked),
    Destroy(DestroyError),
}

/// The calls of sequence `seed`: which mapping, and what.
pub fn sequence(seed: u64) -> Vec<(usize, Call)> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let count = random.random_range(8..40);
    let mut calls = vec![];
    for slot in 0..SLOTS {
        calls.push((slot, reserve(&mut random)));
    }
    for _ in 0..count {
        calls.push((random.random_range(0..SLOTS), call(&mut random)));
    }
    calls
}

fn reserve(random: &mut ChaCha8Rng) -> Call {
    let inside = if random.random_ratio(1, 4) { random.random_range(1..PAGE) } else { 0 };
    match random.random_range(0..8) {
        0 => Call::Reserve { len: 0, like: inside },
        1 => Call::Reserve { len: 1 << 60, like: inside },
        2 | 3 => Call::Reserve { len: LARGE + random.random_range(0..4) * PAGE, like: LARGE_AT },
        4 => Call::Reserve { len: random.random_range(1..8 * PAGE), like: inside },
        _ => Call::Reserve { len: random.random_range(1..12) * PAGE, like: inside },
    }
}

fn part(random: &mut ChaCha8Rng) -> Part {
    let off = if random.random_ratio(1, 16) { random.random_range(1..PAGE) } else { 0 };
    let longer = if random.random_ratio(1, 16) { random.random_range(1..PAGE) } else { 0 };
    let fits = random.random_ratio(7, 8);
    let (edge, pages) = match random.random_range(0..10) {
        0 => (0, LARGE / PAGE),
        1 => (0, 12),
        2 => (random.random_range(0..600), 1),
        _ => (random.random_range(0..12), random.random_range(0..4)),
    };
    Part { edge, pages, fits, off, longer }
}

fn call(random: &mut ChaCha8Rng) -> Call {
    let part = part(random);
    match random.random_range(0..20) {
        0 => reserve(random),
        1 => Call::Prepare(part),
        2..=7 => link(random, part),
        8..=10 => {
            let count = if random.random_ratio(1, 8) { part.pages + 1 } else { part.pages.min(12) };
            let page = |random: &mut ChaCha8Rng| match random.random_ratio(1, 40) {
                true => 2 * POOL / PAGE,
                false => random.random_range(0..SMALL),
            };
            Call::Scatter { part, pages: (0..count).map(|_| page(random)).collect() }
        }
        11 | 12 => Call::Sync(part),
        13..=17 => Call::Unlink(part),
        18 => Call::Free,
        _ => Call::Destroy { pages: random.random_range(0..6) },
    }
}

fn link(random: &mut ChaCha8Rng, part: Part) -> Call {
    let large = part.pages * PAGE >= LARGE;
    let at = match random.random_range(0..24) {
        // Past the end of the pool, or over it.
        0 => 2 * POOL,
        1 => POOL - PAGE,
        _ if large => LARGE_AT,
        _ => random.random_range(0..SMALL) * PAGE,
    };
    let skewed = random.random_ratio(1, 24);
    // A large piece page by page is 512 mappings of the kernel: rarely.
    let largest = match random.random_range(0..8) {
        0 => LeafSize::Huge,
        1 if !large => LeafSize::Page,
        2..=6 if !large => LeafSize::Page,
        7 if large => LeafSize::Page,
        _ => LeafSize::Large,
    };
    Call::Link { part, at, skewed, largest }
}

/// One of the two address spaces, and the mappings of the sequence that runs.
pub struct Side {
    pub space: Arc<dyn IoSpace>,
    pub device: Arc<DmaDevice>,
    pub mappings: [Option<Mapping>; SLOTS],
    freed: [bool; SLOTS],
    pool: PhysAddr,
}

impl Side {
    /// A device behind `space`; links lead into the pool at `pool`.
    pub fn new(space: Arc<dyn IoSpace>, device: Arc<DmaDevice>, pool: PhysAddr) -> Self {
        Self { space, device, mappings: Default::default(), freed: [true; SLOTS], pool }
    }

    /// Makes one call of the mapping in `slot`.
    pub fn run(&mut self, slot: usize, call: &Call) -> Answer {
        if let Call::Reserve { len, like } = call {
            return self.reserve(slot, *len, *like);
        }
        let Some(mapping) = &self.mappings[slot] else { return Answer::Skipped };
        let link = |result: Result<(), LinkError>| result.map_or_else(Answer::Link, |()| Answer::Done);
        match call {
            Call::Reserve { .. } => unreachable!("done above"),
            Call::Prepare(part) => {
                let (offset, len) = place(mapping, *part);
                link(mapping.prepare(offset, len))
            }
            Call::Link { part, at, skewed, largest } => {
                let (offset, len) = place(mapping, *part);
                let inside = mapping.iova().0.wrapping_add(offset) & (PAGE - 1);
                let phys = self.pool.offset(at + inside + if *skewed { 8 } else { 0 });
                link(mapping.link(offset, phys, len, *largest))
            }
            Call::Scatter { part, pages } => {
                let (offset, pages) = scattered(mapping, *part, pages);
                let frames = pages.iter().map(|page| self.pool.offset(page * PAGE));
                link(mapping.link_scattered(offset, frames))
            }
            Call::Sync(part) => {
                let (offset, len) = place(mapping, *part);
                link(mapping.sync(offset, len))
            }
            Call::Unlink(part) => {
                let (offset, len) = place(mapping, *part);
                mapping.unlink(offset, len).map_or_else(Answer::Unlink, |()| Answer::Done)
            }
            Call::Free => match mapping.free() {
                Ok(()) => self.free_slot(slot),
                Err(error) => Answer::StillLinked(error),
            },
            Call::Destroy { pages } => {
                let end = edge(mapping, *pages).min(mapping.len());
                match mapping.destroy(end) {
                    Ok(()) => self.free_slot(slot),
                    Err(error) => Answer::Destroy(error),
                }
            }
        }
    }

    fn free_slot(&mut self, slot: usize) -> Answer {
        self.freed[slot] = true;
        Answer::Done
    }

    fn reserve(&mut self, slot: usize, len: u64, like: u64) -> Answer {
        if !self.freed[slot] {
            return Answer::Skipped;
        }
        match Mapping::try_alloc(&self.device, len, like) {
            Ok(mapping) => {
                let mapping = mapping.expect("an address space translates");
                let answer = Answer::Reserved(mapping.iova(), mapping.len());
                self.mappings[slot] = Some(mapping);
                self.freed[slot] = false;
                answer
            }
            Err(error) => Answer::Exhausted(error),
        }
    }

    /// Takes back a link that only this side made.
    pub fn undo(&self, slot: usize, call: &Call) {
        let mapping = self.mappings[slot].as_ref().expect("it was linked");
        let (offset, len) = match call {
            Call::Link { part, .. } => place(mapping, *part),
            Call::Scatter { part, pages } => {
                let (offset, pages) = scattered(mapping, *part, pages);
                (offset, pages.len() as u64 * PAGE)
            }
            other => unreachable!("{other:?} links nothing"),
        };
        mapping.unlink(offset, len).expect("just linked as a whole");
    }

    /// Every IO page of the mapping in `slot`: its address, where it leads, and the unit that it belongs to.
    pub fn pages(&self, slot: usize) -> Vec<(Iova, Option<PhysAddr>, u64)> {
        let mapping = self.mappings[slot].as_ref().filter(|_| !self.freed[slot]);
        mapping.map(|mapping| self.pages_of(mapping)).unwrap_or_default()
    }

    fn pages_of(&self, mapping: &Mapping) -> Vec<(Iova, Option<PhysAddr>, u64)> {
        let mut pages = vec![];
        let mut at = mapping.iova().page_start();
        while at.0 < mapping.iova().0 + mapping.len() {
            pages.push((at, self.space.iova_to_phys(at), self.space.leaf_at(at).unwrap_or(0)));
            at = at.offset(PAGE);
        }
        pages
    }

    /// Bytes linked in `slot`.
    pub fn linked(&self, slot: usize) -> u64 {
        self.mappings[slot].as_ref().map_or(0, Mapping::linked)
    }

    /// Unlinks what is left, and frees.
    pub fn close(&mut self) {
        for slot in 0..SLOTS {
            let pages = self.pages(slot);
            let Some(mapping) = self.mappings[slot].take() else { continue };
            let mut next = 0;
            for (iova, phys, unit) in pages {
                if phys.is_some() && iova.0 >= next {
                    let offset = iova.0.saturating_sub(mapping.iova().0);
                    let end = (iova.0 + unit).min(mapping.iova().0 + mapping.len());
                    mapping.unlink(offset, end - mapping.iova().0 - offset).expect("a whole unit");
                    next = iova.0 + unit;
                }
            }
            let left = self.pages_of(&mapping);
            assert_eq!(mapping.free(), Ok(()), "slot {slot}: {left:x?}");
            self.freed[slot] = true;
        }
    }
}

/// Offset of the edge of an IO page, counted from the mapping's start, which is the first whatever it lies on.
fn edge(mapping: &Mapping, edge: u64) -> u64 {
    (edge * PAGE).saturating_sub(mapping.iova().page_offset())
}

/// Offset and length of a part of `mapping`. A part that would end in the page that the mapping ends in ends with it.
fn place(mapping: &Mapping, mut part: Part) -> (u64, u64) {
    if part.fits {
        let count = pages_for(mapping.len() + mapping.iova().page_offset());
        part.edge %= count;
        part.pages = part.pages.clamp(1, count - part.edge);
    }
    let (start, mut end) = (edge(mapping, part.edge), edge(mapping, part.edge + part.pages));
    if end > mapping.len() && end - mapping.len() < PAGE {
        end = mapping.len();
    }
    (start + part.off, end.saturating_sub(start) + part.longer)
}

/// Where scattered pages are linked, and those of `pages` that are.
fn scattered<'a>(mapping: &Mapping, part: Part, pages: &'a [u64]) -> (u64, &'a [u64]) {
    let (offset, len) = place(mapping, part);
    let count = if part.fits { pages.len().min(pages_for(len) as usize) } else { pages.len() };
    (offset, &pages[..count])
}
