//! The cases, and those of one-sided operations: each for RDMA write and read, each over pinned regions and over regions on demand.

use crate::rig::{End, Rig};
use crate::world::{Error, LEN, Transfer, What, World, everything};
use hw_model::addr::{PAGE_SIZE, RegionAddr};
use hw_model::hca::{Access, Key};
use mr::{Mode, RegisterOptions};
use rustix::mm::MprotectFlags;

pub type Run = Box<dyn Fn(&Rig) -> Result<String, Error> + Send + Sync>;

pub struct Case {
    pub name: String,
    pub mode: Mode,
    /// Whether it changes what is mapped while regions are over it.
    pub changes_memory: bool,
    pub expected: &'static str,
    pub run: Run,
}

/// What a case does on a world, for an operation.
type Act = fn(&Rig, Mode, What) -> Result<String, Error>;

const OTHERS: &str = "Success, other bytes";
const MOVED: &str = "Success, bytes moved";
const REFUSED: &str = "RemoteAccessError, bytes as before";
const LOCAL: &str = "LocalProtectionError, bytes as before";

/// A transfer of `len` bytes at `offset` of both regions, nothing else.
fn plain(rig: &Rig, mode: Mode, what: What, offset: i64, len: u64) -> Result<String, Error> {
    let world = World::new(rig, mode)?;
    let transfer = world.transfer(what, offset, len);
    world.runs(transfer, &world.source(transfer))
}

/// The same with something changed about it.
fn with(
    rig: &Rig,
    mode: Mode,
    what: What,
    change: impl FnOnce(&World, &mut Transfer),
) -> Result<String, Error> {
    let world = World::new(rig, mode)?;
    let mut transfer = world.transfer(what, PAGE_SIZE as i64, PAGE_SIZE);
    change(&world, &mut transfer);
    world.runs(transfer, &world.source(transfer))
}

pub fn options(mode: Mode, access: Access) -> RegisterOptions {
    RegisterOptions { access, mode, ..RegisterOptions::on_demand() }
}

/// A peer's region that grants `granted` only.
fn granted(rig: &Rig, mode: Mode, what: What, granted: Access) -> Result<String, Error> {
    let world = World::with(rig, options(mode, granted), options(mode, everything()))?;
    let transfer = world.transfer(what, 0, PAGE_SIZE);
    world.runs(transfer, &world.source(transfer))
}

fn needed(what: What) -> Access {
    match what {
        What::Write => Access::LOCAL_WRITE | Access::REMOTE_WRITE,
        What::Read => Access::REMOTE_READ,
    }
}

/// The peer's region at another address than its memory's.
fn renamed(
    rig: &Rig,
    mode: Mode,
    what: What,
    at: u64,
    base: impl FnOnce(&World) -> u64,
) -> Result<String, Error> {
    let remote = RegisterOptions { address: Some(RegionAddr(at)), ..options(mode, everything()) };
    let world = World::with(rig, remote, options(mode, everything()))?;
    let transfer = Transfer { base: base(&world), ..world.transfer(what, PAGE_SIZE as i64, 2 * PAGE_SIZE) };
    world.runs(transfer, &world.source(transfer))
}

/// The pages that the transfer is about, in pages of the memory: the region begins with the second.
const TOUCHED: (u64, u64) = (2, 1);

/// Something happens to a page of the peer's between registration and request.
fn changed(
    rig: &Rig,
    mode: Mode,
    what: What,
    change: impl FnOnce(&World),
) -> Result<(World, Transfer), Error> {
    let world = World::new(rig, mode)?;
    // The device has seen the page: what it then knows of it must not be used.
    world.ends(world.transfer(What::Read, PAGE_SIZE as i64, PAGE_SIZE))?;
    crate::bytes::write(world.local.at(0), &world.local.original(0, LEN))?;
    change(&world);
    let transfer = world.transfer(what, PAGE_SIZE as i64, PAGE_SIZE);
    Ok((world, transfer))
}

/// The page is replaced by zeroes, in one way or another.
fn zeroed(rig: &Rig, mode: Mode, what: What, change: impl FnOnce(&World)) -> Result<String, Error> {
    let (world, transfer) = changed(rig, mode, what, change)?;
    let source = match what {
        What::Write => world.source(transfer),
        What::Read => vec![0; PAGE_SIZE as usize],
    };
    world.runs(transfer, &source)
}

/// The same of our own page: what a write sends is what is there, and a read comes where the program sees it.
fn zeroed_here(rig: &Rig, mode: Mode, what: What, change: impl FnOnce(&World)) -> Result<String, Error> {
    let world = World::new(rig, mode)?;
    world.ends(world.transfer(What::Write, PAGE_SIZE as i64, PAGE_SIZE))?;
    crate::bytes::write(world.remote.at(0), &world.remote.original(0, LEN))?;
    change(&world);
    let transfer = world.transfer(what, PAGE_SIZE as i64, PAGE_SIZE);
    let source = match what {
        What::Write => vec![0; PAGE_SIZE as usize],
        What::Read => world.source(transfer),
    };
    world.runs(transfer, &source)
}

/// The page allows less than it did. Looked at once it allows everything again.
fn forbidden(rig: &Rig, mode: Mode, what: What, allowed: MprotectFlags) -> Result<String, Error> {
    let protect = |world: &World, flags| world.remote.memory.protect(TOUCHED.0, TOUCHED.1, flags);
    let (world, transfer) = changed(rig, mode, what, |world| protect(world, allowed))?;
    let status = world.ends(transfer)?;
    protect(&world, MprotectFlags::READ | MprotectFlags::WRITE);
    Ok(format!("{status:?}, {}", world.became(transfer, &world.source(transfer))?))
}

/// After a request that is refused, the next ends with a flush.
fn flushed(rig: &Rig, mode: Mode, what: What) -> Result<String, Error> {
    let world = World::new(rig, mode)?;
    let good = world.transfer(what, 0, PAGE_SIZE);
    let bad = Transfer { remote_key: Key(good.remote_key.0 ^ 0x5500), ..good };
    let first = world.ends(bad)?;
    let second = world.ends(good)?;
    Ok(format!("{first:?} and {second:?}, {}", world.became(good, &world.source(good))?))
}

/// Four requests end in the order in which they were posted.
fn ordered(rig: &Rig, mode: Mode, what: What) -> Result<String, Error> {
    let world = World::new(rig, mode)?;
    for id in 0..4 {
        world.post(id, world.transfer(what, (id * PAGE_SIZE) as i64, PAGE_SIZE))?;
    }
    let mut ids = Vec::new();
    for _ in 0..4 {
        let ended = world.requester.completion()?;
        ids.push((ended.id.0, format!("{:?}", ended.status)));
    }
    let all = world.transfer(what, 0, 4 * PAGE_SIZE);
    let in_order = ids.iter().enumerate().all(|(at, (id, status))| *id == at as u64 && status == "Success");
    let said = if in_order { "Success" } else { "out of order" };
    Ok(format!("{said}, {}", world.became(all, &world.source(all))?))
}

/// A key of a region that was deregistered.
fn gone(rig: &Rig, mode: Mode, what: What) -> Result<String, Error> {
    with(rig, mode, what, |world, transfer| {
        let region = world.remote.another(rig, &world.remote.pd, options(mode, everything()));
        let region = region.expect("a second region over the same memory");
        transfer.remote_key = region.key();
        region.deregister();
    })
}

/// A key of a region of another domain.
fn foreign(rig: &Rig, mode: Mode, what: What, end: End) -> Result<String, Error> {
    let other = rig.domain(end)?;
    let world = World::new(rig, mode)?;
    let side = if end == End::Responder { &world.remote } else { &world.local };
    let region = side.another(rig, &other, options(mode, everything()))?;
    let mut transfer = world.transfer(what, PAGE_SIZE as i64, PAGE_SIZE);
    if end == End::Responder {
        transfer.remote_key = region.key();
    } else {
        transfer.local_key = region.key();
    }
    world.runs(transfer, &world.source(transfer))
}

/// Our own region may only be read.
fn read_only_here(rig: &Rig, mode: Mode, what: What) -> Result<String, Error> {
    let local = options(mode, Access::REMOTE_READ);
    let world = World::with(rig, options(mode, everything()), local)?;
    let transfer = world.transfer(what, 0, PAGE_SIZE);
    world.runs(transfer, &world.source(transfer))
}

/// Name, what is expected of a write and of a read, whether memory changes, what is done.
type Row = (&'static str, &'static str, &'static str, bool, Act);

const ROWS: [Row; 37] = [
    ("one page", MOVED, MOVED, false, |r, m, w| plain(r, m, w, 0, PAGE_SIZE)),
    ("a page in the middle", MOVED, MOVED, false, |r, m, w| plain(r, m, w, 5 * PAGE_SIZE as i64, PAGE_SIZE)),
    ("several pages", MOVED, MOVED, false, |r, m, w| plain(r, m, w, PAGE_SIZE as i64, 7 * PAGE_SIZE)),
    ("the whole region", MOVED, MOVED, false, |r, m, w| plain(r, m, w, 0, LEN)),
    ("the first byte", MOVED, MOVED, false, |r, m, w| plain(r, m, w, 0, 1)),
    ("the end of a page and of the region", MOVED, MOVED, false, |r, m, w| {
        plain(r, m, w, (LEN - LEN % PAGE_SIZE) as i64, LEN % PAGE_SIZE)
    }),
    ("a page and one byte", MOVED, MOVED, false, |r, m, w| plain(r, m, w, 0, PAGE_SIZE + 1)),
    ("nothing", MOVED, MOVED, false, |r, m, w| plain(r, m, w, 0, 0)),
    ("an odd start", MOVED, MOVED, false, |r, m, w| plain(r, m, w, 1001, 333)),
    ("an odd start across pages", MOVED, MOVED, false, |r, m, w| plain(r, m, w, 4000, 9001)),
    ("an odd start, the last byte", MOVED, MOVED, false, |r, m, w| plain(r, m, w, LEN as i64 - 1, 1)),
    ("a byte past the end", REFUSED, REFUSED, false, |r, m, w| {
        with(r, m, w, |_, transfer| {
            transfer.remote = (LEN - LEN % PAGE_SIZE) as i64;
            transfer.len = LEN % PAGE_SIZE + 1;
        })
    }),
    ("wholly past the end", REFUSED, REFUSED, false, |r, m, w| {
        with(r, m, w, |_, transfer| (transfer.remote, transfer.len) = (LEN as i64, 8))
    }),
    ("a page before the start", REFUSED, REFUSED, false, |r, m, w| {
        with(r, m, w, |_, transfer| (transfer.remote, transfer.len) = (-(PAGE_SIZE as i64) + 16, 64))
    }),
    ("across the start", REFUSED, REFUSED, false, |r, m, w| {
        with(r, m, w, |_, transfer| (transfer.remote, transfer.len) = (-64, 128))
    }),
    ("a key nobody has", REFUSED, REFUSED, false, |r, m, w| {
        with(r, m, w, |_, transfer| transfer.remote_key.0 ^= 0x0055_5500)
    }),
    ("a key with another lowest byte", REFUSED, REFUSED, false, |r, m, w| {
        with(r, m, w, |_, transfer| transfer.remote_key.0 ^= 1)
    }),
    ("the key 0", REFUSED, REFUSED, false, |r, m, w| {
        with(r, m, w, |_, transfer| transfer.remote_key = Key(0))
    }),
    ("the key of a region that is gone", REFUSED, REFUSED, false, gone),
    ("the key of another domain", REFUSED, REFUSED, false, |r, m, w| foreign(r, m, w, End::Responder)),
    ("a right that is not granted", REFUSED, REFUSED, false, |r, m, w| {
        let other = if w == What::Write { What::Read } else { What::Write };
        granted(r, m, w, needed(other))
    }),
    ("just the right", MOVED, MOVED, false, |r, m, w| granted(r, m, w, needed(w))),
    ("no remote right", REFUSED, REFUSED, false, |r, m, w| granted(r, m, w, Access::LOCAL_WRITE)),
    ("a local key nobody has", LOCAL, LOCAL, false, |r, m, w| {
        with(r, m, w, |_, transfer| transfer.local_key.0 ^= 0x0055_5500)
    }),
    ("a local key of another domain", LOCAL, LOCAL, false, |r, m, w| foreign(r, m, w, End::Requester)),
    ("a byte past the local end", LOCAL, LOCAL, false, |r, m, w| {
        with(r, m, w, |_, transfer| {
            transfer.local = (LEN - LEN % PAGE_SIZE) as i64;
            transfer.len = LEN % PAGE_SIZE + 1;
        })
    }),
    ("a local region that may only be read", MOVED, LOCAL, false, read_only_here),
    ("an address other than the memory's", MOVED, MOVED, false, |r, m, w| {
        renamed(r, m, w, 0x7000_0000_0000, |_| 0x7000_0000_0000)
    }),
    ("the memory's address where it has another", REFUSED, REFUSED, false, |r, m, w| {
        renamed(r, m, w, 0x7000_0000_0000, |world| world.remote.at(0))
    }),
    ("counted from 0", MOVED, MOVED, false, |r, m, w| renamed(r, m, w, 0, |_| 0)),
    (
        "after a refusal",
        "RemoteAccessError and FlushError, bytes as before",
        "RemoteAccessError and FlushError, bytes as before",
        false,
        flushed,
    ),
    ("four in a row", MOVED, MOVED, false, ordered),
    ("a page that was dropped", MOVED, MOVED, true, |r, m, w| {
        zeroed(r, m, w, |world| world.remote.memory.discard(TOUCHED.0, TOUCHED.1))
    }),
    ("a page with another in its place", MOVED, MOVED, true, |r, m, w| {
        zeroed(r, m, w, |world| world.remote.memory.replace(TOUCHED.0, TOUCHED.1))
    }),
    ("our own page that was dropped", MOVED, MOVED, true, |r, m, w| {
        zeroed_here(r, m, w, |world| world.local.memory.discard(TOUCHED.0, TOUCHED.1))
    }),
    ("a page that may only be read", REFUSED, MOVED, true, |r, m, w| forbidden(r, m, w, MprotectFlags::READ)),
    ("a page that may not be touched", REFUSED, REFUSED, true, |r, m, w| {
        forbidden(r, m, w, MprotectFlags::empty())
    }),
];

/// What is expected of pinned regions where memory changes: that the device keeps the pages which it was given, whatever the
/// program has there now.
const PINNED: [(&str, &str, &str); 5] = [
    ("a page that was dropped", OTHERS, OTHERS),
    ("a page with another in its place", OTHERS, OTHERS),
    ("our own page that was dropped", OTHERS, OTHERS),
    ("a page that may only be read", MOVED, MOVED),
    ("a page that may not be touched", MOVED, MOVED),
];

/// Every case.
pub fn all() -> Vec<Case> {
    let mut cases = one_sided();
    cases.extend(crate::messages::all());
    cases.extend(crate::atomics::all());
    cases.extend(crate::events::all());
    cases.extend(crate::shared::all());
    cases.extend(crate::windows::all());
    cases.extend(crate::statuses::all());
    cases
}

/// For every operation and mode.
fn one_sided() -> Vec<Case> {
    let mut cases = Vec::new();
    for (what, mode) in [
        (What::Write, Mode::Pinned),
        (What::Read, Mode::Pinned),
        (What::Write, Mode::OnDemand),
        (What::Read, Mode::OnDemand),
    ] {
        for (name, write, read, changes_memory, act) in ROWS {
            let pinned = PINNED.iter().find(|(of, ..)| mode == Mode::Pinned && *of == name);
            let (write, read) = pinned.map_or((write, read), |(_, write, read)| (*write, *read));
            let (verb, expected) = match what {
                What::Write => ("write", write),
                What::Read => ("read", read),
            };
            let kept = if mode == Mode::Pinned { "pinned" } else { "on demand" };
            let name = format!("{verb}, {kept}, {name}");
            let run: Run = Box::new(move |rig| act(rig, mode, what));
            cases.push(Case { name, mode, changes_memory, expected, run });
        }
    }
    cases
}
