//! Memory windows of types 1 and 2B (IBTA volume 1, 10.6.7): what peers may do in a part of a region, until it is taken back.

use crate::cases::{Case, options};
use crate::exchange::{Exchange, whole};
use crate::rig::{End, Pd, Queue, Rig};
use crate::talk::Tries;
use crate::world::{Error, FIRST, LEN, World, everything};
use hw_model::addr::{PAGE_SIZE, RegionAddr};
use hw_model::hca::{Access, Key, Operation, Remote, SendRequest, Status, WindowBind, WindowKind};
use hw_model::sync::Arc;
use mr::device::Window;
#[cfg(feature = "verbs")]
use mr::device::verbs::{Opening, VerbsRegion, VerbsWindow};
use mr::{Mode, Region};

/// A window, and the region that it is to be bound to.
enum Pane {
    Model(Arc<dyn Window>, Arc<dyn Region>),
    #[cfg(feature = "verbs")]
    Verbs(Arc<VerbsWindow>, Arc<VerbsRegion>),
}

/// A part of the region: offset, bytes, rights.
#[derive(Clone, Copy)]
struct Part(i64, u64, Access);

/// What is bound where nothing else is said: begins and ends with pages.
const USUAL: Part =
    Part(3 * PAGE_SIZE as i64, 2 * PAGE_SIZE, Access::REMOTE_WRITE.union(Access::REMOTE_READ));

impl Pane {
    /// Its region is over the memory of the answering end, whose it is.
    fn new(
        rig: &Rig,
        world: &World,
        pd: &Pd,
        kind: WindowKind,
        mode: Mode,
        access: Access,
    ) -> Result<Self, Error> {
        let memory = world.remote.memory.user_range(Arc::clone(&rig.space) as _);
        let part = memory.part(FIRST, LEN).expect("inside the memory");
        Ok(match (pd, &world.remote.pd) {
            (Pd::Model(pd), Pd::Model(own)) => {
                let region = Arc::clone(own).register(&part, options(mode, access))?;
                Self::Model(Arc::clone(pd).alloc_window(kind)?, region)
            }
            #[cfg(feature = "verbs")]
            (Pd::Verbs(pd), Pd::Verbs(own)) => {
                Self::Verbs(pd.alloc_window(kind)?, own.register(&part, options(mode, access))?)
            }
            #[cfg(feature = "verbs")]
            _ => return Err("a domain of the other device".into()),
        })
    }

    fn key(&self) -> Key {
        match self {
            Self::Model(window, _) => window.key(),
            #[cfg(feature = "verbs")]
            Self::Verbs(window, _) => window.key(),
        }
    }

    /// Posts its binding: the key that it has then. `None` if it was not posted.
    fn post(&self, queue: &Queue, key: Key, part: Part) -> Option<Key> {
        let Part(offset, length, access) = part;
        match (self, queue) {
            (Self::Model(_, region), queue) => {
                let address = RegionAddr(region.address().0.wrapping_add_signed(offset));
                // The next, as a library of a real device chooses it.
                let key = Key(key.0 & !0xff | key.0.wrapping_add(1) & 0xff);
                let bind = WindowBind { key, region: region.key(), address, length, access };
                queue.post(&SendRequest::new(1, Operation::Bind(bind), &[])).ok()?;
                Some(key)
            }
            #[cfg(feature = "verbs")]
            (Self::Verbs(window, region), Queue::Verbs(qp, _)) => {
                let address = RegionAddr(region.address().0.wrapping_add_signed(offset));
                qp.bind(1, window, region, Opening { address, length, access }).ok()
            }
            #[cfg(feature = "verbs")]
            _ => None,
        }
    }
}

struct Opened {
    /// Given back before the queue pairs: rdma_rxe waits a minute for one that a window of type 2 is bound to.
    pane: Pane,
    world: World,
    key: Key,
}

impl Opened {
    fn new(rig: &Rig, mode: Mode, kind: WindowKind, access: Access) -> Result<Self, Error> {
        let world = World::new(rig, mode)?;
        let pane = Pane::new(rig, &world, &world.remote.pd, kind, mode, access)?;
        let key = pane.key();
        Ok(Self { world, pane, key })
    }

    /// Over a region that allows everything, not bound.
    fn free(rig: &Rig, mode: Mode, kind: WindowKind) -> Result<Self, Error> {
        Self::new(rig, mode, kind, everything() | Access::WINDOW_BIND)
    }

    fn usual(rig: &Rig, mode: Mode, kind: WindowKind) -> Result<Self, Error> {
        let mut opened = Self::free(rig, mode, kind)?;
        match opened.bind(USUAL)?.as_str() {
            "Success" => Ok(opened),
            other => Err(format!("the window was not bound: {other}").into()),
        }
    }

    fn bind(&mut self, part: Part) -> Result<String, Error> {
        let Some(key) = self.pane.post(&self.world.responder, self.key, part) else {
            return Ok("not posted".to_owned());
        };
        let status = self.world.responder.completion()?.status;
        if status == Status::Success {
            self.key = key;
        }
        Ok(format!("{status:?}"))
    }

    fn writes(&self, offset: i64, len: u32) -> Result<String, Error> {
        self.writes_by(&self.world.requester, self.key, self.world.remote.region.address().0, offset, len)
    }

    /// A write of the peer's by `key`, to `offset` from `base`: how it ended, and what of memory changed.
    fn writes_by(&self, queue: &Queue, key: Key, base: u64, offset: i64, len: u32) -> Result<String, Error> {
        let world = &self.world;
        let before = whole(&world.remote)?;
        let remote = Remote { key, address: RegionAddr(base.wrapping_add_signed(offset)) };
        queue.post(&SendRequest::write(1, &world.local.pieces(&[(0, len)]), remote))?;
        let status = queue.completion()?.status;
        let at = crate::exchange::place(if base == 0 { USUAL.0 + offset } else { offset });
        let mut wanted = before.clone();
        let source = world.local.original(0, len.into());
        wanted[at..][..source.len()].copy_from_slice(&source);
        let now = whole(&world.remote)?;
        let said = match (now == wanted, now == before) {
            (_, true) => "bytes as before",
            (true, false) => "bytes moved",
            (false, false) => "other bytes",
        };
        Ok(format!("{status:?}, {said}"))
    }

    fn reads(&self, offset: i64, len: u32) -> Result<String, Error> {
        let address = RegionAddr(self.world.remote.region.address().0.wrapping_add_signed(offset));
        let to = self.world.local.pieces(&[(0, len)]);
        let remote = Remote { key: self.key, address };
        self.world.requester.post(&SendRequest::read(1, &to, remote))?;
        let status = self.world.requester.completion()?.status;
        let now = self.world.local.read(0, len.into())?;
        let moved = now == self.world.remote.original(offset, len.into());
        let kept = now == self.world.local.original(0, len.into());
        Ok(format!(
            "{status:?}, {}",
            if moved {
                "bytes moved"
            } else if kept {
                "bytes as before"
            } else {
                "other bytes"
            }
        ))
    }

    fn invalidates(&self, queue: &Queue) -> Result<String, Error> {
        if queue.post(&SendRequest::invalidate(2, self.key)).is_err() {
            return Ok("not posted".to_owned());
        }
        Ok(format!("{:?}", queue.completion()?.status))
    }

    /// Another connection of the same domains: answering end first.
    fn pair(&self, rig: &Rig) -> Result<(Queue, Queue), Error> {
        rig.pair(&self.world.remote.pd, &self.world.local.pd)
    }
}

const PAGE: u32 = PAGE_SIZE as u32;

fn used_free(rig: &Rig, mode: Mode, kind: WindowKind) -> Result<String, Error> {
    Opened::free(rig, mode, kind)?.writes(USUAL.0, 64)
}

fn used(rig: &Rig, mode: Mode, kind: WindowKind) -> Result<String, Error> {
    Opened::usual(rig, mode, kind)?.writes(USUAL.0, 2 * PAGE)
}

fn read(rig: &Rig, mode: Mode, kind: WindowKind) -> Result<String, Error> {
    Opened::usual(rig, mode, kind)?.reads(USUAL.0, 2 * PAGE)
}

fn used_at(rig: &Rig, mode: Mode, kind: WindowKind, offset: i64, len: u32) -> Result<String, Error> {
    Opened::usual(rig, mode, kind)?.writes(offset, len)
}

fn old_key(rig: &Rig, mode: Mode, kind: WindowKind) -> Result<String, Error> {
    let mut opened = Opened::free(rig, mode, kind)?;
    let old = opened.key;
    opened.bind(USUAL)?;
    let base = opened.world.remote.region.address().0;
    opened.writes_by(&opened.world.requester, old, base, USUAL.0, 64)
}

fn granted(rig: &Rig, mode: Mode, kind: WindowKind, access: Access) -> Result<Opened, Error> {
    let mut opened = Opened::free(rig, mode, kind)?;
    opened.bind(Part(USUAL.0, USUAL.1, access))?;
    Ok(opened)
}

fn elsewhere(rig: &Rig, mode: Mode, kind: WindowKind) -> Result<String, Error> {
    let opened = Opened::usual(rig, mode, kind)?;
    let (_responder, requester) = opened.pair(rig)?;
    let base = opened.world.remote.region.address().0;
    opened.writes_by(&requester, opened.key, base, USUAL.0, 64)
}

/// What a bind ends with.
fn bound_to(rig: &Rig, mode: Mode, kind: WindowKind, part: Part) -> Result<String, Error> {
    Opened::free(rig, mode, kind)?.bind(part)
}

fn moved(rig: &Rig, mode: Mode, kind: WindowKind) -> Result<String, Error> {
    let mut opened = Opened::usual(rig, mode, kind)?;
    let bound = opened.bind(Part(7 * PAGE_SIZE as i64, PAGE_SIZE, USUAL.2))?;
    if bound != "Success" {
        return Ok(bound);
    }
    Ok(format!("{bound}; {}", opened.writes(7 * PAGE_SIZE as i64, 64)?))
}

fn emptied(rig: &Rig, mode: Mode, kind: WindowKind) -> Result<String, Error> {
    let mut opened = Opened::usual(rig, mode, kind)?;
    let bound = opened.bind(Part(0, 0, USUAL.2))?;
    if bound != "Success" {
        return Ok(bound);
    }
    Ok(format!("{bound}; {}", opened.writes(USUAL.0, 64)?))
}

fn without_right(rig: &Rig, mode: Mode, kind: WindowKind) -> Result<String, Error> {
    Opened::new(rig, mode, kind, everything())?.bind(USUAL)
}

fn for_more(rig: &Rig, mode: Mode, kind: WindowKind) -> Result<String, Error> {
    Opened::new(rig, mode, kind, Access::REMOTE_READ | Access::WINDOW_BIND)?.bind(USUAL)
}

fn foreign(rig: &Rig, mode: Mode, kind: WindowKind) -> Result<String, Error> {
    let other = rig.domain(End::Responder)?;
    let mut opened = Opened::free(rig, mode, kind)?;
    let all = everything() | Access::WINDOW_BIND;
    opened.pane = Pane::new(rig, &opened.world, &other, kind, mode, all)?;
    opened.key = opened.pane.key();
    opened.bind(USUAL)
}

fn invalidated(rig: &Rig, mode: Mode, kind: WindowKind) -> Result<String, Error> {
    let opened = Opened::usual(rig, mode, kind)?;
    let ended = opened.invalidates(&opened.world.responder)?;
    if ended != "Success" {
        return Ok(ended);
    }
    Ok(format!("{ended}; {}", opened.writes(USUAL.0, 64)?))
}

fn invalidated_and_bound(rig: &Rig, mode: Mode, kind: WindowKind) -> Result<String, Error> {
    let mut opened = Opened::usual(rig, mode, kind)?;
    let ended = opened.invalidates(&opened.world.responder)?;
    if ended != "Success" {
        return Ok(ended);
    }
    Ok(format!("{ended}, {}; {}", opened.bind(USUAL)?, opened.writes(USUAL.0, 64)?))
}

fn invalidated_elsewhere(rig: &Rig, mode: Mode, kind: WindowKind) -> Result<String, Error> {
    let opened = Opened::usual(rig, mode, kind)?;
    let (responder, _requester) = opened.pair(rig)?;
    opened.invalidates(&responder)
}

/// The peer gives the window back with a message.
fn given_back(rig: &Rig, mode: Mode, kind: WindowKind) -> Result<String, Error> {
    let opened = Opened::usual(rig, mode, kind)?;
    let operation = Operation::SendInvalidate(opened.key);
    let told = Exchange::new(operation, &[(0, 64)], &[(0, 64)]).runs(&opened.world)?;
    if !told.starts_with("Success") {
        return Ok(told);
    }
    let now = opened.writes(USUAL.0, 64)?;
    Ok(format!("{told}; then {now}"))
}

/// The key of a window that is gone.
fn gone(rig: &Rig, mode: Mode, kind: WindowKind) -> Result<String, Error> {
    let mut opened = Opened::usual(rig, mode, kind)?;
    let other = Opened::free(rig, mode, kind)?.pane;
    drop(std::mem::replace(&mut opened.pane, other));
    opened.writes(USUAL.0, 64)
}

fn counted_from_0(rig: &Rig, mode: Mode, kind: WindowKind) -> Result<String, Error> {
    let mut opened = Opened::free(rig, mode, kind)?;
    let bound = opened.bind(Part(USUAL.0, USUAL.1, USUAL.2 | Access::ZERO_BASED))?;
    if bound != "Success" {
        return Ok(bound);
    }
    Ok(format!("{bound}; {}", opened.writes_by(&opened.world.requester, opened.key, 0, 0, PAGE)?))
}

/// A word of the window.
fn added_to(rig: &Rig, mode: Mode, kind: WindowKind, access: Access) -> Result<String, Error> {
    let opened = granted(rig, mode, kind, access)?;
    let address = RegionAddr(opened.world.remote.region.address().0.wrapping_add_signed(USUAL.0));
    let was = opened.world.remote.read(USUAL.0, 8)?;
    let operation = Operation::FetchAdd { remote: Remote { key: opened.key, address }, add: 1 };
    opened.world.requester.post(&SendRequest::new(1, operation, &opened.world.local.pieces(&[(0, 8)])))?;
    let status = opened.world.requester.completion()?.status;
    let changed = opened.world.remote.read(USUAL.0, 8)? != was;
    Ok(format!("{status:?}, {}", if changed { "the word changed" } else { "the word as before" }))
}

/// A queue pair that grants its peer nothing, through a window that does.
fn ungranted(rig: &Rig, mode: Mode, kind: WindowKind) -> Result<String, Error> {
    let access = Access::REMOTE_READ;
    let world = World::on(rig, mode, Tries { access, ..Tries::default() })?;
    let pane = Pane::new(rig, &world, &world.remote.pd, kind, mode, everything() | Access::WINDOW_BIND)?;
    let key = pane.key();
    let mut opened = Opened { world, pane, key };
    let bound = opened.bind(USUAL)?;
    Ok(format!("{bound}; {}", opened.writes(USUAL.0, 64)?))
}

type Act = fn(&Rig, Mode, WindowKind) -> Result<String, Error>;

/// Name, what is expected of type 1 and of type 2B, what is done.
type Row = (&'static str, &'static str, &'static str, Act);

const MOVED: &str = "Success, bytes moved";
const REFUSED: &str = "RemoteAccessError, bytes as before";
const UNBOUND: &str = "MemoryManagementError";
const PAGE_BEFORE: i64 = USUAL.0 - PAGE_SIZE as i64;

const ROWS: [Row; 26] = [
    ("used before it is bound", REFUSED, REFUSED, used_free),
    ("written through", MOVED, MOVED, used),
    ("read through", MOVED, MOVED, read),
    ("its second page", MOVED, MOVED, |r, m, k| used_at(r, m, k, USUAL.0 + PAGE_SIZE as i64, PAGE)),
    ("a byte past its end", REFUSED, REFUSED, |r, m, k| {
        used_at(r, m, k, USUAL.0 + PAGE_SIZE as i64, PAGE + 1)
    }),
    ("wholly past its end", REFUSED, REFUSED, |r, m, k| used_at(r, m, k, USUAL.0 + USUAL.1 as i64, 64)),
    ("before its start", REFUSED, REFUSED, |r, m, k| used_at(r, m, k, PAGE_BEFORE, 64)),
    ("past the end of its region", REFUSED, REFUSED, |r, m, k| used_at(r, m, k, LEN as i64, 32)),
    ("by the key of before it was bound", REFUSED, REFUSED, old_key),
    ("written without the right", REFUSED, REFUSED, |r, m, k| {
        granted(r, m, k, Access::REMOTE_READ)?.writes(USUAL.0, 64)
    }),
    ("read without the right", REFUSED, REFUSED, |r, m, k| {
        granted(r, m, k, Access::REMOTE_WRITE)?.reads(USUAL.0, 64)
    }),
    ("a word of it", "Success, the word changed", "Success, the word changed", |r, m, k| {
        added_to(r, m, k, Access::REMOTE_ATOMIC)
    }),
    (
        "a word of it without the right",
        "RemoteAccessError, the word as before",
        "RemoteAccessError, the word as before",
        |r, m, k| added_to(r, m, k, USUAL.2),
    ),
    ("through another queue pair", MOVED, REFUSED, elsewhere),
    (
        "through a queue pair without the right",
        "Success; RemoteInvalidRequestError, bytes as before",
        "Success; RemoteInvalidRequestError, bytes as before",
        ungranted,
    ),
    ("bound elsewhere while it is bound", "Success; Success, bytes moved", UNBOUND, moved),
    ("bound to nothing", "Success; RemoteAccessError, bytes as before", UNBOUND, emptied),
    ("over a region without the right to bind", UNBOUND, UNBOUND, without_right),
    ("for writing over a region that may only be read", UNBOUND, UNBOUND, for_more),
    ("bound past the end of its region", UNBOUND, UNBOUND, |r, m, k| {
        bound_to(r, m, k, Part(PAGE_SIZE as i64, LEN, USUAL.2))
    }),
    ("bound before the start of its region", UNBOUND, UNBOUND, |r, m, k| {
        bound_to(r, m, k, Part(-64, 128, USUAL.2))
    }),
    ("of another domain", UNBOUND, UNBOUND, foreign),
    ("invalidated", UNBOUND, "Success; RemoteAccessError, bytes as before", invalidated),
    ("invalidated and bound again", UNBOUND, "Success, Success; Success, bytes moved", invalidated_and_bound),
    ("invalidated through another queue pair", UNBOUND, UNBOUND, invalidated_elsewhere),
    ("of which there is none any more", REFUSED, REFUSED, gone),
];

/// Of type 2B alone.
const OF_TYPE_2: [(&str, &str, Act); 2] = [
    (
        "invalidated by a message",
        "Success; Receive of 64 bytes and a key that is invalid now, bytes as sent; then RemoteAccessError, bytes as before",
        given_back,
    ),
    ("counted from 0", "Success; Success, bytes moved", counted_from_0),
];

pub fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    for (mode, kept) in [(Mode::Pinned, "pinned"), (Mode::OnDemand, "on demand")] {
        for (kind, number) in [(WindowKind::One, 1), (WindowKind::TwoB, 2)] {
            let rows = ROWS.iter().map(|(name, first, second, act)| {
                (*name, if kind == WindowKind::One { *first } else { *second }, *act)
            });
            let more = OF_TYPE_2.into_iter().filter(|_| kind == WindowKind::TwoB);
            for (name, expected, act) in rows.chain(more) {
                cases.push(Case {
                    name: format!("window of type {number}, {kept}, {name}"),
                    mode,
                    changes_memory: false,
                    expected,
                    run: Box::new(move |rig| act(rig, mode, kind)),
                });
            }
        }
    }
    cases
}
