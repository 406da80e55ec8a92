//! Atomics (IBTA volume 1, 9.4.5): a word that is seen and changed as one.

use crate::bytes;
use crate::cases::{Case, options};
use crate::exchange::{Pieces, place, whole};
use crate::rig::{End, Rig};
use crate::talk::Tries;
use crate::world::{Error, LEN, PAGES, World, everything};
use hw_model::addr::{PAGE_SIZE, RegionAddr};
use hw_model::hca::{Access, Key, Operation, Remote, SendRequest, Status};
use hw_model::sync::Arc;
use mr::{Mode, RegisterOptions};
use rustix::mm::MprotectFlags;

#[derive(Clone, Copy, PartialEq)]
enum Word {
    Add,
    Swap,
}

const ADDED: u64 = 0x0102_0304_0506_0708;
const SWAPPED: u64 = 0x1111_2222_3333_4444;

/// One atomic, and what is otherwise about it.
struct Atomic<'a> {
    /// Where the word is, from the start of the region.
    word: i64,
    /// Where what it was goes.
    to: Pieces<'a>,
    key: &'a dyn Fn(Key) -> Key,
    local_key: &'a dyn Fn(Key) -> Key,
    /// What the peer calls the region's first byte; its memory's address if nothing else.
    base: Option<u64>,
    /// What a swap compares with, rather than what is there.
    compare: Option<u64>,
    change: &'a dyn Fn(&World),
}

const AT: i64 = PAGE_SIZE as i64 + 64;
const TO: Pieces<'static> = &[(2 * PAGE_SIZE as i64, 8)];

impl Default for Atomic<'_> {
    fn default() -> Self {
        let same: &'static dyn Fn(Key) -> Key = &|key| key;
        Self { word: AT, to: TO, key: same, local_key: same, base: None, compare: None, change: &|_| {} }
    }
}

fn word_at(memory: &[u8], offset: i64) -> u64 {
    memory
        .get(place(offset)..)
        .and_then(|bytes| bytes.first_chunk())
        .map_or(0, |word| u64::from_ne_bytes(*word))
}

impl Atomic<'_> {
    fn runs(&self, rig: &Rig, mode: Mode, what: Word) -> Result<String, Error> {
        self.on(&World::new(rig, mode)?, what)
    }

    /// Carries it out; says how it ended, and what became of all memory of both ends.
    fn on(&self, world: &World, what: Word) -> Result<String, Error> {
        let earlier = [whole(&world.remote)?, whole(&world.local)?];
        (self.change)(world);
        let [remote, local] = [&world.remote, &world.local].map(whole);
        let before =
            [remote.unwrap_or_else(|_| earlier[0].clone()), local.unwrap_or_else(|_| earlier[1].clone())];
        let was = word_at(&before[0], self.word);
        let base = self.base.unwrap_or(world.remote.region.address().0);
        let remote = Remote {
            key: (self.key)(world.remote.region.key()),
            address: RegionAddr(base.wrapping_add_signed(self.word)),
        };
        let (operation, becomes) = match (what, self.compare.unwrap_or(was)) {
            (Word::Add, _) => (Operation::FetchAdd { remote, add: ADDED }, was.wrapping_add(ADDED)),
            (Word::Swap, compare) => {
                // Another word than was there, also the second time.
                let swap = SWAPPED ^ was;
                (Operation::CompareSwap { remote, compare, swap }, if compare == was { swap } else { was })
            }
        };
        let mut pieces = world.local.pieces(self.to);
        pieces.iter_mut().for_each(|piece| piece.key = (self.local_key)(piece.key));
        if world.requester.post(&SendRequest::new(1, operation, &pieces)).is_err() {
            return Ok("not posted".to_owned());
        }
        let status = world.requester.completion()?.status;
        for side in [&world.remote, &world.local] {
            side.memory.protect(0, PAGES, MprotectFlags::READ | MprotectFlags::WRITE);
        }
        let now = [whole(&world.remote)?, whole(&world.local)?];
        let wanted = [with(&before[0], &[(self.word, 8)], becomes), with(&before[1], self.to, was)];
        if status == Status::LocalProtectionError && now[1] == before[1] {
            return Ok(format!("{status:?}, our words as before"));
        }
        let said = match (now == before, now == wanted, now[1] == before[1]) {
            (true, ..) => "words as before",
            (_, true, _) => "done",
            (.., true) => "the peer's word changed, and ours is as before",
            _ => "other words",
        };
        Ok(format!("{status:?}, {said}"))
    }
}

/// A word in memory, in pieces.
fn with(memory: &[u8], pieces: Pieces<'_>, word: u64) -> Vec<u8> {
    let mut after = memory.to_vec();
    let mut bytes = word.to_ne_bytes().into_iter();
    for (offset, len) in pieces {
        let Some(there) = after.get_mut(place(*offset)..) else { continue };
        there.iter_mut().zip(bytes.by_ref().take(*len as usize)).for_each(|(there, byte)| *there = byte);
    }
    after
}

fn nobody(key: Key) -> Key {
    Key(key.0 ^ 0x0055_5500)
}

/// The key of another region over the same memory, which `make` makes something of.
fn another(
    rig: &Rig,
    mode: Mode,
    what: Word,
    end: End,
    make: impl Fn(&World) -> Result<Arc<dyn mr::Region>, Error>,
) -> Result<String, Error> {
    let world = World::new(rig, mode)?;
    let region = make(&world)?;
    let other = |_| region.key();
    if end == End::Responder {
        Atomic { key: &other, ..Atomic::default() }.on(&world, what)
    } else {
        Atomic { local_key: &other, ..Atomic::default() }.on(&world, what)
    }
}

fn foreign(rig: &Rig, mode: Mode, what: Word, end: End) -> Result<String, Error> {
    let other = rig.domain(end)?;
    another(rig, mode, what, end, |world| {
        let side = if end == End::Responder { &world.remote } else { &world.local };
        side.another(rig, &other, options(mode, everything()))
    })
}

fn gone(rig: &Rig, mode: Mode, what: Word) -> Result<String, Error> {
    another(rig, mode, what, End::Responder, |world| {
        let region = world.remote.another(rig, &world.remote.pd, options(mode, everything()))?;
        region.deregister();
        Ok(region)
    })
}

fn granted(rig: &Rig, mode: Mode, what: Word, granted: Access) -> Result<String, Error> {
    let world = World::with(rig, options(mode, granted), options(mode, everything()))?;
    Atomic::default().on(&world, what)
}

fn kept_here(rig: &Rig, mode: Mode, what: Word) -> Result<String, Error> {
    let world = World::with(rig, options(mode, everything()), options(mode, Access::REMOTE_READ))?;
    Atomic::default().on(&world, what)
}

/// A queue pair that grants its peer no atomics, over a region that does.
fn ungranted(rig: &Rig, mode: Mode, what: Word) -> Result<String, Error> {
    let access = Access::REMOTE_WRITE | Access::REMOTE_READ;
    Atomic::default().on(&World::on(rig, mode, Tries { access, ..Tries::default() })?, what)
}

/// The devices have seen the page, and then something happens to it.
fn changed(rig: &Rig, mode: Mode, what: Word, change: impl Fn(&World)) -> Result<String, Error> {
    let world = World::new(rig, mode)?;
    Atomic::default().on(&world, what)?;
    Atomic { change: &change, ..Atomic::default() }.on(&world, what)
}

/// Its page and that of our end, in pages of the memory: the regions begin with the second.
const TOUCHED: u64 = 2;
const TOUCHED_HERE: u64 = 3;

fn renamed(rig: &Rig, mode: Mode, what: Word, at: u64) -> Result<String, Error> {
    let remote = RegisterOptions { address: Some(RegionAddr(at)), ..options(mode, everything()) };
    let world = World::with(rig, remote, options(mode, everything()))?;
    Atomic { base: Some(at), ..Atomic::default() }.on(&world, what)
}

/// Three, one behind the other, each of which sees what the one before it left.
fn in_a_row(rig: &Rig, mode: Mode, what: Word) -> Result<String, Error> {
    let world = World::new(rig, mode)?;
    let mut was = word_at(&whole(&world.remote)?, AT);
    let remote = Remote {
        key: world.remote.region.key(),
        address: RegionAddr(world.remote.region.address().0.wrapping_add_signed(AT)),
    };
    let mut wanted = Vec::new();
    for id in 0..3 {
        let (operation, becomes) = match what {
            Word::Add => (Operation::FetchAdd { remote, add: ADDED + id }, was.wrapping_add(ADDED + id)),
            Word::Swap => (Operation::CompareSwap { remote, compare: was, swap: SWAPPED + id }, SWAPPED + id),
        };
        let to = world.local.pieces(&[(64 * id as i64, 8)]);
        world.requester.post(&SendRequest::new(id, operation, &to))?;
        wanted.push(was);
        was = becomes;
    }
    let mut ended = Vec::new();
    for _ in 0..3 {
        let completion = world.requester.completion()?;
        ended.push((completion.id.0, completion.status));
    }
    let local = whole(&world.local)?;
    let seen: Vec<_> = (0..3).map(|id| word_at(&local, 64 * id)).collect();
    let right = seen == wanted && word_at(&whole(&world.remote)?, AT) == was;
    Ok(format!("{ended:?}, words {}", if right { "one after the other" } else { "otherwise" }))
}

/// What is added wraps around.
fn wraps(rig: &Rig, mode: Mode, what: Word) -> Result<String, Error> {
    let world = World::new(rig, mode)?;
    bytes::write(world.remote.at(AT), &u64::MAX.to_ne_bytes())?;
    Atomic::default().on(&world, what)
}

type Act = fn(&Rig, Mode, Word) -> Result<String, Error>;

/// Name, what is expected, what of pinned regions if that is something else, what is done.
type Row = (&'static str, &'static str, Option<&'static str>, Act);

const DONE: &str = "Success, done";
const REFUSED: &str = "RemoteAccessError, words as before";
const INVALID: &str = "RemoteInvalidRequestError, words as before";
/// The peer may have done it: what it answers comes too late, and nothing is promised of a request that failed.
const LOCAL: &str = "LocalProtectionError, our words as before";
const IN_A_ROW: &str = "[(0, Success), (1, Success), (2, Success)], words one after the other";

const ROWS: [Row; 33] = [
    ("a word", DONE, None, |r, m, w| Atomic::default().runs(r, m, w)),
    ("the first word", DONE, None, |r, m, w| Atomic { word: 0, ..Atomic::default() }.runs(r, m, w)),
    ("the last word", DONE, None, |r, m, w| {
        Atomic { word: LEN as i64 - 8, ..Atomic::default() }.runs(r, m, w)
    }),
    ("a word that wraps around", DONE, None, wraps),
    ("another word than is compared with", DONE, None, |r, m, w| {
        Atomic { compare: Some(7), ..Atomic::default() }.runs(r, m, w)
    }),
    ("three in a row", IN_A_ROW, None, in_a_row),
    ("into two pieces", DONE, None, |r, m, w| {
        Atomic { to: &[(2 * PAGE_SIZE as i64, 3), (4 * PAGE_SIZE as i64, 5)], ..Atomic::default() }
            .runs(r, m, w)
    }),
    ("into an odd place", DONE, None, |r, m, w| {
        Atomic { to: &[(2 * PAGE_SIZE as i64 + 13, 8)], ..Atomic::default() }.runs(r, m, w)
    }),
    ("into less than a word", "not posted", None, |r, m, w| {
        Atomic { to: &[(2 * PAGE_SIZE as i64, 4)], ..Atomic::default() }.runs(r, m, w)
    }),
    ("into more than a word", "not posted", None, |r, m, w| {
        Atomic { to: &[(2 * PAGE_SIZE as i64, 16)], ..Atomic::default() }.runs(r, m, w)
    }),
    ("a byte from a word", INVALID, None, |r, m, w| {
        Atomic { word: AT + 1, ..Atomic::default() }.runs(r, m, w)
    }),
    ("half a word from a word", INVALID, None, |r, m, w| {
        Atomic { word: AT + 4, ..Atomic::default() }.runs(r, m, w)
    }),
    ("across pages", INVALID, None, |r, m, w| {
        Atomic { word: 2 * PAGE_SIZE as i64 - 4, ..Atomic::default() }.runs(r, m, w)
    }),
    ("the word past the end", REFUSED, None, |r, m, w| {
        Atomic { word: LEN as i64, ..Atomic::default() }.runs(r, m, w)
    }),
    ("the word before the start", REFUSED, None, |r, m, w| {
        Atomic { word: -8, ..Atomic::default() }.runs(r, m, w)
    }),
    ("a key nobody has", REFUSED, None, |r, m, w| Atomic { key: &nobody, ..Atomic::default() }.runs(r, m, w)),
    ("a key with another lowest byte", REFUSED, None, |r, m, w| {
        Atomic { key: &|key| Key(key.0 ^ 1), ..Atomic::default() }.runs(r, m, w)
    }),
    ("the key of a region that is gone", REFUSED, None, gone),
    ("the key of another domain", REFUSED, None, |r, m, w| foreign(r, m, w, End::Responder)),
    ("no right to atomics", REFUSED, None, |r, m, w| granted(r, m, w, everything() - Access::REMOTE_ATOMIC)),
    ("just the right", DONE, None, |r, m, w| granted(r, m, w, Access::LOCAL_WRITE | Access::REMOTE_ATOMIC)),
    ("a queue pair without the right", INVALID, None, ungranted),
    ("a local key nobody has", LOCAL, None, |r, m, w| {
        Atomic { local_key: &nobody, ..Atomic::default() }.runs(r, m, w)
    }),
    ("a local key of another domain", LOCAL, None, |r, m, w| foreign(r, m, w, End::Requester)),
    ("a local region that may only be read", LOCAL, None, kept_here),
    ("past the local end", LOCAL, None, |r, m, w| {
        Atomic { to: &[(LEN as i64 - 4, 8)], ..Atomic::default() }.runs(r, m, w)
    }),
    ("an address other than the memory's", DONE, None, |r, m, w| renamed(r, m, w, 0x7000_0000_0000)),
    ("a word of a page that was dropped", DONE, Some(UNSEEN), |r, m, w| {
        changed(r, m, w, |world| world.remote.memory.discard(TOUCHED, 1))
    }),
    ("a word of a page with another in its place", DONE, Some(UNSEEN), |r, m, w| {
        changed(r, m, w, |world| world.remote.memory.replace(TOUCHED, 1))
    }),
    ("into our own page that was dropped", DONE, Some(UNSEEN_HERE), |r, m, w| {
        changed(r, m, w, |world| world.local.memory.discard(TOUCHED_HERE, 1))
    }),
    ("a word of a page that may only be read", REFUSED, Some(DONE), |r, m, w| {
        changed(r, m, w, |world| world.remote.memory.protect(TOUCHED, 1, MprotectFlags::READ))
    }),
    ("a word of a page that may not be touched", REFUSED, Some(DONE), |r, m, w| {
        changed(r, m, w, |world| world.remote.memory.protect(TOUCHED, 1, MprotectFlags::empty()))
    }),
    ("into our own page that may only be read", LOCAL, Some(DONE), |r, m, w| {
        changed(r, m, w, |world| world.local.memory.protect(TOUCHED_HERE, 1, MprotectFlags::READ))
    }),
];

/// Of pinned regions: what the device changed is in the page that the program has no more.
const UNSEEN: &str = "Success, other words";
const UNSEEN_HERE: &str = "Success, the peer's word changed, and ours is as before";

pub fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    for (what, verb) in [(Word::Add, "fetch and add"), (Word::Swap, "compare and swap")] {
        for (mode, kept) in [(Mode::Pinned, "pinned"), (Mode::OnDemand, "on demand")] {
            for (name, expected, pinned, act) in ROWS {
                let compared = ["a word that wraps around", "another word than is compared with"]
                    .iter()
                    .position(|of| *of == name);
                // Of the one only adding can be asked, of the other only swapping.
                if compared.is_some_and(|at| (at == 0) != (what == Word::Add)) {
                    continue;
                }
                cases.push(Case {
                    name: format!("{verb}, {kept}, {name}"),
                    mode,
                    changes_memory: name.contains("page that") || name.contains("in its place"),
                    expected: pinned.filter(|_| mode == Mode::Pinned).unwrap_or(expected),
                    run: Box::new(move |rig| act(rig, mode, what)),
                });
            }
        }
    }
    cases
}
