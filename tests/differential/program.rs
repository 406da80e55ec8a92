//! Programs from seeds.
//!
//! A step names regions by slot, so that a program says the same on every device, and any part of it is a program too: what
//! names a slot that is empty does nothing. That is what shrinking lives on.

use hw_model::addr::PAGE_SIZE;
use hw_model::hca::Access;
use mr::Mode;
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Pages of the memory of each end.
pub const PAGES: u64 = 8;
/// Regions of each end at a time.
pub const SLOTS: usize = 3;
const BYTES: u64 = PAGES * PAGE_SIZE;

/// Which end: the one that asks, or its peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Asking,
    Peer,
}

/// What a program may do with its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum May {
    Nothing,
    Read,
    Write,
}

/// Which key is used for a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyOf {
    /// Its own.
    Region,
    /// One that nobody has, though the region's is near.
    Nobody,
    /// That of a region of the other end, and so of another domain.
    OtherEnd,
    /// The last that was given back at that end.
    GivenBack,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Write,
    Read,
    FetchAdd,
    CompareSwap,
    /// Into a receive over the peer's region.
    Send,
}

/// Bytes of a region, as a step names them: they may lie outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub slot: usize,
    pub key: KeyOf,
    pub offset: i64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// In place of the one of that slot.
    Register {
        side: Side,
        slot: usize,
        mode: Mode,
        access: Access,
        start: u64,
        len: u64,
        address: Option<u64>,
    },
    Deregister {
        side: Side,
        slot: usize,
    },
    /// Pages dropped: they read as zeroes afterwards.
    Drop {
        side: Side,
        page: u64,
        pages: u64,
    },
    /// Pages unmapped, and others put in their place.
    Replace {
        side: Side,
        page: u64,
        pages: u64,
    },
    /// What the program may do with pages from now on.
    Protect {
        side: Side,
        page: u64,
        pages: u64,
        may: May,
    },
    /// The program writes its memory.
    Store {
        side: Side,
        at: u64,
        len: u64,
        seed: u8,
    },
    Ask {
        operation: Operation,
        from: Place,
        to: Place,
        len: u64,
    },
    /// Requests for the same, posted one behind the other.
    AskMany {
        operation: Operation,
        from: Place,
        to: Place,
        len: u64,
        count: u64,
    },
}

/// What the generator knows of a region that it had made.
#[derive(Clone, Copy)]
struct Known {
    mode: Mode,
    start: u64,
    len: u64,
}

struct Maker {
    random: ChaCha8Rng,
    /// Whether known differences are kept out of the way, so that programs get further.
    careful: bool,
    known: [[Option<Known>; SLOTS]; 2],
}

/// The program of `seed`.
pub fn of(seed: u64) -> Vec<Step> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let careful = random.random_range(0..8) != 0;
    let steps = random.random_range(6..24);
    let mut maker = Maker { random, careful, known: [[None; SLOTS]; 2] };
    // Something to talk with, mostly.
    let mut program = vec![maker.register(Side::Asking), maker.register(Side::Peer)];
    program.extend((0..steps).map(|_| maker.step()));
    program
}

impl Maker {
    fn one_in(&mut self, n: u32) -> bool {
        self.random.random_range(0..n) == 0
    }

    fn side(&mut self) -> Side {
        if self.one_in(2) { Side::Asking } else { Side::Peer }
    }

    fn step(&mut self) -> Step {
        let side = self.side();
        match self.random.random_range(0..20) {
            0..3 => self.register(side),
            3 => {
                let slot = self.random.random_range(0..SLOTS);
                self.known[side as usize][slot] = None;
                Step::Deregister { side, slot }
            }
            4..7 => self.change(side),
            7 => {
                let (at, len) =
                    (self.random.random_range(0..BYTES), self.random.random_range(1..2 * PAGE_SIZE));
                Step::Store { side, at, len: len.min(BYTES - at), seed: self.random.random() }
            }
            _ => self.ask(),
        }
    }

    fn register(&mut self, side: Side) -> Step {
        let slot = self.random.random_range(0..SLOTS);
        let mode = if self.one_in(2) { Mode::Pinned } else { Mode::OnDemand };
        let on_pages = self.careful && mode == Mode::OnDemand;
        let start = match self.random.random_range(0..3) {
            0 => 0,
            1 if !on_pages => self.random.random_range(0..BYTES / 2),
            _ => self.random.random_range(0..PAGES / 2) * PAGE_SIZE,
        };
        let lengths = if self.one_in(16) { 0..1 } else { 1..BYTES - start + 1 };
        let len = self.random.random_range(lengths);
        let access = match self.random.random_range(0..4) {
            // Any rights at all, those among them that go together with none other.
            0 => Access::from_bits_truncate(self.random.next_u32() & 0xf),
            1 => Access::LOCAL_WRITE | Access::REMOTE_READ,
            _ => Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ | Access::REMOTE_ATOMIC,
        };
        let renamed = !on_pages && self.one_in(4);
        // Begins where in a page its memory does, or elsewhere.
        let address = renamed.then(|| self.random.random_range(0..1 << 30) * PAGE_SIZE + start % PAGE_SIZE);
        self.known[side as usize][slot] = Some(Known { mode, start, len });
        Step::Register { side, slot, mode, access, start, len, address }
    }

    /// Pages go. With care, none that is pinned.
    fn change(&mut self, side: Side) -> Step {
        let page = self.random.random_range(0..PAGES);
        let mut pages = self.random.random_range(1..=2.min(PAGES - page));
        if self.careful {
            let pinned =
                self.known[side as usize].iter().flatten().filter(|known| known.mode == Mode::Pinned);
            let last = |known: &Known| (known.start + known.len.max(1) - 1) / PAGE_SIZE;
            let is_pinned = |page: u64| {
                pinned.clone().any(|known| (known.start / PAGE_SIZE..=last(known)).contains(&page))
            };
            let free = (page..page + pages).take_while(|page| !is_pinned(*page)).count() as u64;
            pages = free;
        }
        if self.one_in(4) {
            let may = [May::Nothing, May::Read, May::Write, May::Write][self.random.random_range(0..4)];
            return Step::Protect { side, page, pages, may };
        }
        if self.one_in(3) { Step::Replace { side, page, pages } } else { Step::Drop { side, page, pages } }
    }

    fn ask(&mut self) -> Step {
        let operation = match self.random.random_range(0..10) {
            0..4 => Operation::Write,
            4..7 => Operation::Read,
            7 => Operation::FetchAdd,
            8 => Operation::CompareSwap,
            _ => Operation::Send,
        };
        let atomic = matches!(operation, Operation::FetchAdd | Operation::CompareSwap);
        let len = match self.random.random_range(0..8) {
            _ if atomic => 8,
            0 => 0,
            1 => self.random.random_range(1..16),
            2..5 => PAGE_SIZE,
            _ => self.random.random_range(1..3 * PAGE_SIZE),
        };
        let (from, to) = (self.place(Side::Asking, len, atomic), self.place(Side::Peer, len, atomic));
        if self.one_in(8) && !atomic && operation != Operation::Send {
            return Step::AskMany { operation, from, to, len, count: self.random.random_range(2..6) };
        }
        Step::Ask { operation, from, to, len }
    }

    fn place(&mut self, side: Side, len: u64, atomic: bool) -> Place {
        let known = self.known[side as usize];
        let slot = self.random.random_range(0..SLOTS);
        // A region that is there, if there is one.
        let there = |slot: &usize| known[*slot].is_some();
        let slot = (0..SLOTS).map(|next| (slot + next) % SLOTS).find(there).unwrap_or(slot);
        let key = match self.random.random_range(0..24) {
            0 => KeyOf::Nobody,
            1 => KeyOf::OtherEnd,
            2 => KeyOf::GivenBack,
            _ => KeyOf::Region,
        };
        let Some(Known { mode, len: region, .. }) = known[slot] else {
            return Place { slot, key, offset: 0 };
        };
        let room = region.saturating_sub(len) as i64;
        let mut offset = match self.random.random_range(0..12) {
            0 => -self.random.random_range(1..64),
            1 => room + self.random.random_range(1..64),
            2 => room,
            _ => self.random.random_range(0..=room),
        };
        if self.careful && mode == Mode::OnDemand && len > 0 && !atomic {
            offset &= -(PAGE_SIZE as i64);
        }
        if atomic && !self.one_in(8) {
            offset &= -8;
        }
        Place { slot, key, offset }
    }
}
