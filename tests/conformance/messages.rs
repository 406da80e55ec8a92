//! Sends and RDMA writes with immediate data (IBTA volume 1, 9.4.1 and 9.4.3), and the receives that they go to.

use crate::bytes;
use crate::cases::{Case, options};
use crate::exchange::{Exchange, Pieces, told};
use crate::objects::PATIENCE;
use crate::rig::{End, Rig};
use crate::talk::Tries;
use crate::world::{Error, LEN, World, everything};
use hw_model::addr::PAGE_SIZE;
use hw_model::hca::{Access, Key, Operation, RecvRequest, Remote, SendRequest, Sge, Status};
use hw_model::wire::Immediate;
use mr::Mode;
use rustix::mm::MprotectFlags;
use std::time::Duration;

const PAGE: u32 = PAGE_SIZE as u32;
const DATA: Immediate = Immediate(0x0102_0304);
const SEND: Operation = Operation::Send;
const WITH_DATA: Operation = Operation::SendImmediate(DATA);

fn page(number: i64) -> i64 {
    number * PAGE_SIZE as i64
}

/// A message between two new ends, nothing else.
fn plain(
    rig: &Rig,
    mode: Mode,
    operation: Operation,
    from: Pieces<'_>,
    into: Pieces<'_>,
) -> Result<String, Error> {
    Exchange::new(operation, from, into).runs(&World::new(rig, mode)?)
}

fn inline(rig: &Rig, mode: Mode, operation: Operation, from: Pieces<'_>) -> Result<String, Error> {
    let world = World::new(rig, mode)?;
    Exchange { inline: true, ..Exchange::new(operation, from, &[(page(2), PAGE)]) }.runs(&world)
}

/// A page from the start of one to the start of another, and something happens before it is sent.
fn changed(rig: &Rig, mode: Mode, change: impl Fn(&World)) -> Result<String, Error> {
    let world = World::new(rig, mode)?;
    let pieces = [(page(1), PAGE)];
    let exchange = Exchange::new(SEND, &pieces, &pieces);
    // Both devices have seen the pages: what they then know of them must not be used.
    exchange.runs(&world)?;
    bytes::write(world.remote.at(0), &world.remote.original(0, LEN))?;
    Exchange { change: &change, ..exchange }.runs(&world)
}

/// The pages of `changed`, in pages of the memory: the region begins with the second.
const TOUCHED: (u64, u64) = (2, 1);

fn protected(rig: &Rig, mode: Mode, flags: MprotectFlags) -> Result<String, Error> {
    changed(rig, mode, |world| world.remote.memory.protect(TOUCHED.0, TOUCHED.1, flags))
}

/// A send whose list has another key, or a receive whose list has.
fn by_keys(rig: &Rig, mode: Mode, send: fn(Key) -> Key, receive: fn(Key) -> Key) -> Result<String, Error> {
    let world = World::new(rig, mode)?;
    let [mut from, mut into] = [&world.local, &world.remote].map(|side| side.pieces(&[(0, 64)])[0]);
    (from.key, into.key) = (send(from.key), receive(into.key));
    answered(&world, &[from], &[into])
}

fn nobody(key: Key) -> Key {
    Key(key.0 ^ 0x0055_5500)
}

fn same(key: Key) -> Key {
    key
}

/// How both ends end, when no byte is to move.
fn answered(world: &World, from: &[Sge], into: &[Sge]) -> Result<String, Error> {
    let before = crate::exchange::whole(&world.remote)?;
    world.responder.post_recv(&RecvRequest::new(7, into))?;
    world.requester.post(&SendRequest::send(1, from))?;
    let sent = world.requester.completion()?;
    world.responder.fail()?;
    let told = told(&world.responder.completion()?);
    let kept = crate::exchange::whole(&world.remote)? == before;
    Ok(format!("{:?}; {told}, {}", sent.status, if kept { "bytes as before" } else { "other bytes" }))
}

/// A list whose key is that of a region of another domain.
fn foreign(rig: &Rig, mode: Mode, end: End) -> Result<String, Error> {
    let other = rig.domain(end)?;
    let world = World::new(rig, mode)?;
    let side = if end == End::Responder { &world.remote } else { &world.local };
    let region = side.another(rig, &other, options(mode, everything()))?;
    let [mut from, mut into] = [&world.local, &world.remote].map(|side| side.pieces(&[(0, 64)])[0]);
    if end == End::Responder {
        into.key = region.key();
    } else {
        from.key = region.key();
    }
    answered(&world, &[from], &[into])
}

/// The receive's region, or the send's, allows the peer or the device nothing.
fn rightless(rig: &Rig, mode: Mode, end: End) -> Result<String, Error> {
    let rights = |of| if of == end { Access::REMOTE_READ } else { everything() };
    let [remote, local] = [End::Responder, End::Requester].map(|end| options(mode, rights(end)));
    let world = World::with(rig, remote, local)?;
    Exchange::new(SEND, &[(0, 64)], &[(0, 64)]).runs(&world)
}

/// No receive is there, and how often it is tried again is said.
fn unready(rig: &Rig, mode: Mode, rnr_retries: u8) -> Result<String, Error> {
    let world = World::on(rig, mode, Tries { rnr_retries, ..Tries::default() })?;
    Exchange { into: None, ..Exchange::new(SEND, &[(0, 64)], &[]) }.runs(&world)
}

/// The receive comes while the send is tried again and again.
fn late(rig: &Rig, mode: Mode) -> Result<String, Error> {
    let world = World::new(rig, mode)?;
    let [from, into] = [&world.local, &world.remote].map(|side| side.pieces(&[(0, 64)]));
    world.requester.post(&SendRequest::send(1, &from))?;
    // Long enough to be refused a few times; nothing rests on it.
    std::thread::sleep(Duration::from_millis(30));
    world.responder.post_recv(&RecvRequest::new(7, &into))?;
    let sent = world.requester.completion()?.status;
    let moved = world.remote.read(0, 64)? == world.local.original(0, 64);
    let bytes = if moved { "bytes as sent" } else { "other bytes" };
    Ok(format!("{sent:?}; {}, {bytes}", told(&world.responder.completion()?)))
}

/// Three messages find three receives, in order.
fn ordered(rig: &Rig, mode: Mode) -> Result<String, Error> {
    let world = World::new(rig, mode)?;
    for id in 0..3 {
        world.responder.post_recv(&RecvRequest::new(id, &world.remote.pieces(&[(page(id as i64), PAGE)])))?;
    }
    for id in 0..3 {
        world
            .requester
            .post(&SendRequest::send(10 + id, &world.local.pieces(&[(page(id as i64), 100 + id as u32)])))?;
    }
    let mut said = Vec::new();
    for id in 0..3 {
        let (sent, received) = (world.requester.completion()?, world.responder.completion()?);
        let moved = world.remote.read(page(id), received.bytes.into())?
            == world.local.original(page(id), 100 + id as u64);
        said.push(format!("{:?} {} {} {moved}", sent.status, sent.id.0, received.id.0));
    }
    Ok(said.join(", "))
}

/// Of two sends only the second asked for a completion.
fn silent(rig: &Rig, mode: Mode) -> Result<String, Error> {
    let world = World::new(rig, mode)?;
    for id in 0..2 {
        world.responder.post_recv(&RecvRequest::new(id, &world.remote.pieces(&[(page(id as i64), PAGE)])))?;
    }
    let from = world.local.pieces(&[(0, 64)]);
    world.requester.post(&SendRequest { signaled: false, ..SendRequest::send(1, &from) })?;
    world.requester.post(&SendRequest::send(2, &from))?;
    let first = world.requester.completion()?;
    let received = [world.responder.completion()?.id.0, world.responder.completion()?.id.0];
    Ok(format!("{:?} of request {}, receives {received:?}", first.status, first.id.0))
}

/// What is posted behind a message that is too long, at both ends.
fn behind(rig: &Rig, mode: Mode) -> Result<String, Error> {
    let world = World::new(rig, mode)?;
    // Before anything is sent: rdma_rxe's library tells the kernel of no receive that comes when all has failed.
    for id in 0..2 {
        world.responder.post_recv(&RecvRequest::new(id, &world.remote.pieces(&[(0, 32)])))?;
    }
    for id in 0..2 {
        world.requester.post(&SendRequest::send(id, &world.local.pieces(&[(0, 64 - 32 * id as u32)])))?;
    }
    let mut said = Vec::new();
    for queue in [&world.requester, &world.responder] {
        for _ in 0..2 {
            let ended = queue.completion_within(PATIENCE)?;
            said.push(ended.map_or("nothing".to_owned(), |ended| format!("{:?}", ended.status)));
        }
    }
    Ok(said.join(", "))
}

/// An RDMA write with immediate data of `from` to `to`, by the key that `change` makes of the right one.
fn write_with(
    rig: &Rig,
    mode: Mode,
    from: Pieces<'_>,
    to: i64,
    change: fn(Key) -> Key,
    rnr: Option<u8>,
) -> Result<String, Error> {
    let tries = Tries { rnr_retries: rnr.unwrap_or(7), ..Tries::default() };
    let world = World::on(rig, mode, tries)?;
    let transfer =
        world.transfer(crate::world::What::Write, to, from.iter().map(|piece| u64::from(piece.1)).sum());
    if rnr.is_none() {
        world.responder.post_recv(&RecvRequest::new(7, &[]))?;
    }
    let address = hw_model::addr::RegionAddr(transfer.base.wrapping_add_signed(to));
    let remote = Remote { key: change(transfer.remote_key), address };
    world.requester.post(&SendRequest::new(
        1,
        Operation::WriteImmediate(remote, DATA),
        &world.local.pieces(from),
    ))?;
    let sent = world.requester.completion()?.status;
    let mut said = format!("{sent:?}");
    if rnr.is_none() {
        if sent != Status::Success {
            world.responder.fail()?;
        }
        said += &format!("; {}", told(&world.responder.completion()?));
    }
    let source = from.first().map_or(Vec::new(), |piece| world.local.original(piece.0, transfer.len));
    Ok(format!("{said}, {}", world.became(transfer, &source)?))
}

type Act = fn(&Rig, Mode) -> Result<String, Error>;

/// Name, what is expected, what of pinned regions if that is something else, what is done.
type Row = (&'static str, &'static str, Option<&'static str>, Act);

const TOO_LONG: &str = "RemoteInvalidRequestError; receive LocalLengthError, bytes as before";
const LOCAL: &str = "LocalProtectionError; receive FlushError, bytes as before";
const BAD_RECEIVE: &str = "RemoteOperationError; receive LocalProtectionError, bytes as before";
const PAGE_SENT: &str = "Success; Receive of 4096 bytes, bytes as sent";
const OTHERS: &str = "Success; Receive of 4096 bytes, other bytes";
const UNSEEN: &str = "Success; Receive of 4096 bytes, bytes as before";

const SENDS: [Row; 43] = [
    ("a page", PAGE_SENT, None, |r, m| plain(r, m, SEND, &[(page(1), PAGE)], &[(page(3), PAGE)])),
    ("a byte", "Success; Receive of 1 bytes, bytes as sent", None, |r, m| {
        plain(r, m, SEND, &[(page(1), 1)], &[(page(3), PAGE)])
    }),
    ("several packets", "Success; Receive of 12388 bytes, bytes as sent", None, |r, m| {
        plain(r, m, SEND, &[(page(1), 3 * PAGE + 100)], &[(page(2), 5 * PAGE)])
    }),
    ("inside pages", "Success; Receive of 333 bytes, bytes as sent", None, |r, m| {
        plain(r, m, SEND, &[(1001, 333)], &[(page(1) + 77, 400)])
    }),
    ("no byte", "Success; Receive of 0 bytes, bytes as before", None, |r, m| {
        plain(r, m, SEND, &[], &[(page(3), PAGE)])
    }),
    ("no byte, into no room", "Success; Receive of 0 bytes, bytes as before", None, |r, m| {
        plain(r, m, SEND, &[], &[])
    }),
    ("as long as the receive", PAGE_SENT, None, |r, m| {
        plain(r, m, SEND, &[(page(1), PAGE)], &[(page(3), 4000), (page(5), 96)])
    }),
    ("with immediate data", "Success; Receive of 4096 bytes and 0x1020304, bytes as sent", None, |r, m| {
        plain(r, m, WITH_DATA, &[(page(1), PAGE)], &[(page(3), PAGE)])
    }),
    (
        "no byte, with immediate data",
        "Success; Receive of 0 bytes and 0x1020304, bytes as before",
        None,
        |r, m| plain(r, m, WITH_DATA, &[], &[]),
    ),
    (
        "several packets, with immediate data",
        "Success; Receive of 8193 bytes and 0x1020304, bytes as sent",
        None,
        |r, m| plain(r, m, WITH_DATA, &[(page(1), 2 * PAGE + 1)], &[(page(2), 5 * PAGE)]),
    ),
    (
        "with the invalidation of a key nobody has",
        "Success; receive RemoteInvalidRequestError, bytes as sent",
        None,
        |r, m| {
            let world = World::new(r, m)?;
            let operation = Operation::SendInvalidate(nobody(world.remote.region.key()));
            Exchange::new(operation, &[(page(1), PAGE)], &[(page(3), PAGE)]).runs(&world)
        },
    ),
    (
        "with the invalidation of a region's key",
        "Success; receive RemoteInvalidRequestError, bytes as sent",
        None,
        |r, m| {
            let world = World::new(r, m)?;
            let another = world.remote.another(r, &world.remote.pd, options(m, everything()))?;
            let operation = Operation::SendInvalidate(another.key());
            Exchange::new(operation, &[(page(1), PAGE)], &[(page(3), PAGE)]).runs(&world)
        },
    ),
    ("inline", "Success; Receive of 64 bytes, bytes as sent", None, |r, m| {
        inline(r, m, SEND, &[(page(1), 64)])
    }),
    (
        "inline, with immediate data",
        "Success; Receive of 64 bytes and 0x1020304, bytes as sent",
        None,
        |r, m| inline(r, m, WITH_DATA, &[(page(1), 64)]),
    ),
    ("inline, more than the queue pair was made for", "not posted", None, |r, m| {
        inline(r, m, SEND, &[(page(1), PAGE)])
    }),
    ("a list of three", "Success; Receive of 350 bytes, bytes as sent", None, |r, m| {
        plain(r, m, SEND, &[(page(1), 100), (page(4), 200), (page(2), 50)], &[(page(3), PAGE)])
    }),
    ("into a list of three", "Success; Receive of 350 bytes, bytes as sent", None, |r, m| {
        plain(r, m, SEND, &[(page(1), 350)], &[(page(3), 128), (page(6), 1), (page(5), 500)])
    }),
    (
        "a list of three into a list of three",
        "Success; Receive of 9000 bytes, bytes as sent",
        None,
        |r, m| {
            let from = [(page(1), PAGE), (page(4), PAGE), (page(2), 808)];
            plain(r, m, SEND, &from, &[(page(7), PAGE), (page(9), 1), (page(5), 2 * PAGE)])
        },
    ),
    ("a list with a piece of no byte", "Success; Receive of 200 bytes, bytes as sent", None, |r, m| {
        plain(r, m, SEND, &[(page(1), 100), (page(4), 0), (page(2), 100)], &[(page(3), PAGE)])
    }),
    ("more pieces than the queue pair was made for", "not posted", None, |r, m| {
        plain(r, m, SEND, &[(page(1), 1); 64], &[(page(3), PAGE)])
    }),
    ("too long for the receive", TOO_LONG, None, |r, m| {
        plain(r, m, SEND, &[(page(1), 65)], &[(page(3), 64)])
    }),
    ("too long for a receive without room", TOO_LONG, None, |r, m| plain(r, m, SEND, &[(page(1), 1)], &[])),
    ("too long by a packet", TOO_LONG, None, |r, m| {
        plain(r, m, SEND, &[(page(1), 2 * PAGE + 1)], &[(page(3), 2 * PAGE)])
    }),
    ("nothing posted, not tried again", "RnrRetryExceeded, bytes as before", None, |r, m| unready(r, m, 0)),
    ("nothing posted, tried twice again", "RnrRetryExceeded, bytes as before", None, |r, m| unready(r, m, 2)),
    ("a receive that is posted late", "Success; Receive of 64 bytes, bytes as sent", None, late),
    ("three in a row", "Success 10 0 true, Success 11 1 true, Success 12 2 true", None, ordered),
    ("one that asks for no completion", "Success of request 2, receives [0, 1]", None, silent),
    (
        "behind one that is too long",
        "RemoteInvalidRequestError, FlushError, LocalLengthError, FlushError",
        None,
        behind,
    ),
    ("a local key nobody has", LOCAL, None, |r, m| by_keys(r, m, nobody, same)),
    ("a local key of another domain", LOCAL, None, |r, m| foreign(r, m, End::Requester)),
    ("a byte past the local end", LOCAL, None, |r, m| {
        plain(r, m, SEND, &[(LEN as i64 - 63, 64)], &[(page(3), 64)])
    }),
    ("a local region that may only be read", "Success; Receive of 64 bytes, bytes as sent", None, |r, m| {
        rightless(r, m, End::Requester)
    }),
    ("a receive by a key nobody has", BAD_RECEIVE, None, |r, m| by_keys(r, m, same, nobody)),
    ("a receive by a key of another domain", BAD_RECEIVE, None, |r, m| foreign(r, m, End::Responder)),
    ("a receive past its region's end", BAD_RECEIVE, None, |r, m| {
        plain(r, m, SEND, &[(0, 64)], &[(LEN as i64 - 63, 64)])
    }),
    ("a receive in a region that may only be read", BAD_RECEIVE, None, |r, m| {
        rightless(r, m, End::Responder)
    }),
    ("into a page that was dropped", PAGE_SENT, Some(UNSEEN), |r, m| {
        changed(r, m, |world| world.remote.memory.discard(TOUCHED.0, TOUCHED.1))
    }),
    ("into a page with another in its place", PAGE_SENT, Some(UNSEEN), |r, m| {
        changed(r, m, |world| world.remote.memory.replace(TOUCHED.0, TOUCHED.1))
    }),
    ("our own page that was dropped", PAGE_SENT, Some(OTHERS), |r, m| {
        changed(r, m, |world| world.local.memory.discard(TOUCHED.0, TOUCHED.1))
    }),
    ("our own page with another in its place", PAGE_SENT, Some(OTHERS), |r, m| {
        changed(r, m, |world| world.local.memory.replace(TOUCHED.0, TOUCHED.1))
    }),
    ("into a page that may only be read", BAD_RECEIVE, Some(PAGE_SENT), |r, m| {
        protected(r, m, MprotectFlags::READ)
    }),
    ("into a page that may not be touched", BAD_RECEIVE, Some(PAGE_SENT), |r, m| {
        protected(r, m, MprotectFlags::empty())
    }),
];

const WRITES: [Row; 7] = [
    ("a page", "Success; ReceiveWrite of 4096 bytes and 0x1020304, bytes moved", None, |r, m| {
        write_with(r, m, &[(page(1), PAGE)], page(3), same, None)
    }),
    ("several packets", "Success; ReceiveWrite of 8292 bytes and 0x1020304, bytes moved", None, |r, m| {
        write_with(r, m, &[(page(1), 2 * PAGE + 100)], page(3), same, None)
    }),
    ("no byte", "Success; ReceiveWrite of 0 bytes and 0x1020304, bytes moved", None, |r, m| {
        write_with(r, m, &[], page(3), same, None)
    }),
    ("nothing posted", "RnrRetryExceeded, bytes as before", None, |r, m| {
        write_with(r, m, &[(page(1), 64)], page(3), same, Some(0))
    }),
    (
        "a remote key nobody has",
        "RemoteAccessError; receive LocalAccessError, bytes as before",
        None,
        |r, m| write_with(r, m, &[(page(1), PAGE)], page(3), nobody, None),
    ),
    ("past the remote end", "RemoteAccessError; receive LocalAccessError, bytes as before", None, |r, m| {
        write_with(r, m, &[(page(1), 64)], LEN as i64 - 63, same, None)
    }),
    (
        "no byte, by a remote key nobody has",
        "Success; ReceiveWrite of 0 bytes and 0x1020304, bytes moved",
        None,
        |r, m| write_with(r, m, &[], page(3), nobody, None),
    ),
];

/// Rows whose pages change under a region.
fn changes_memory(name: &str) -> bool {
    name.contains("a page that") || name.contains("page with another") || name.contains("page that was")
}

pub fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    for (mode, kept) in [(Mode::Pinned, "pinned"), (Mode::OnDemand, "on demand")] {
        let sends = SENDS.iter().map(|row| ("send", row));
        for (verb, (name, expected, pinned, act)) in
            sends.chain(WRITES.iter().map(|row| ("write with data", row)))
        {
            let expected = pinned.filter(|_| mode == Mode::Pinned).unwrap_or(expected);
            let act = *act;
            cases.push(Case {
                name: format!("{verb}, {kept}, {name}"),
                mode,
                changes_memory: changes_memory(name),
                expected,
                run: Box::new(move |rig| act(rig, mode)),
            });
        }
    }
    cases
}
