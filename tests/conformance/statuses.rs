//! Every status that a completion can have (IBTA volume 1, 11.6.2): how it is reached, on every device that can.

use crate::cases::{Case, options};
use crate::exchange::whole;
use crate::rig::{End, Rig};
use crate::talk::Tries;
use crate::world::{Error, LEN, Transfer, What, World, everything};
use hw_model::addr::RegionAddr;
use hw_model::hca::{Access, Key, Operation, RecvRequest, Remote, SendRequest, Status};
use hw_model::wire::Immediate;
use mr::Mode;

/// A request of the requester's, the queue pairs afterwards, and that no byte moved that should not have.
fn ended(world: &World, before: &[Vec<u8>; 2], status: Status) -> Result<String, Error> {
    let now = [whole(&world.remote)?, whole(&world.local)?];
    let kept = if now == *before { "" } else { ", other bytes" };
    Ok(format!("{status:?}, {:?} and {:?}{kept}", world.requester.state()?, world.responder.state()?))
}

fn both(world: &World) -> Result<[Vec<u8>; 2], Error> {
    Ok([whole(&world.remote)?, whole(&world.local)?])
}

fn asks(rig: &Rig, what: What, change: impl Fn(&mut Transfer), tries: Tries) -> Result<String, Error> {
    let world = World::on(rig, Mode::Pinned, tries)?;
    let mut transfer = world.transfer(what, 0, 64);
    change(&mut transfer);
    let before = both(&world)?;
    let status = world.ends(transfer)?;
    ended(&world, &before, status)
}

fn sends(rig: &Rig, receive: Option<(i64, u32)>, tries: Tries, end: End) -> Result<String, Error> {
    let world = World::on(rig, Mode::Pinned, tries)?;
    if let Some(receive) = receive {
        world.responder.post_recv(&RecvRequest::new(7, &world.remote.pieces(&[receive])))?;
    }
    let before = both(&world)?;
    world.requester.post(&SendRequest::send(1, &world.local.pieces(&[(0, 64)])))?;
    let sent = world.requester.completion()?.status;
    let status = if end == End::Responder { world.responder.completion()?.status } else { sent };
    ended(&world, &before, status)
}

fn success(rig: &Rig) -> Result<String, Error> {
    asks(rig, What::Write, |transfer| transfer.len = 0, Tries::default())
}

fn local_protection(rig: &Rig) -> Result<String, Error> {
    asks(rig, What::Read, |transfer| transfer.local_key.0 ^= 0x0055_5500, Tries::default())
}

fn remote_access(rig: &Rig) -> Result<String, Error> {
    asks(rig, What::Write, |transfer| transfer.remote_key.0 ^= 0x0055_5500, Tries::default())
}

fn invalid_request(rig: &Rig) -> Result<String, Error> {
    asks(rig, What::Write, |_| {}, Tries { access: Access::REMOTE_READ, ..Tries::default() })
}

fn flush(rig: &Rig) -> Result<String, Error> {
    let world = World::new(rig, Mode::Pinned)?;
    let before = both(&world)?;
    world.requester.fail()?;
    let status = world.ends(world.transfer(What::Write, 0, 64))?;
    ended(&world, &before, status)
}

fn remote_operation(rig: &Rig) -> Result<String, Error> {
    sends(rig, Some((LEN as i64 - 8, 64)), Tries::default(), End::Requester)
}

fn local_length(rig: &Rig) -> Result<String, Error> {
    sends(rig, Some((0, 8)), Tries::default(), End::Responder)
}

fn not_ready(rig: &Rig) -> Result<String, Error> {
    sends(rig, None, Tries { rnr_retries: 1, ..Tries::default() }, End::Requester)
}

/// The peer has gone.
fn no_answer(rig: &Rig) -> Result<String, Error> {
    // 134 ms, twice.
    let world = World::on(rig, Mode::Pinned, Tries { timeout: 15, retries: 1, ..Tries::default() })?;
    let transfer = world.transfer(What::Write, 0, 64);
    let World { local, responder, requester, .. } = world;
    drop(responder);
    let piece = local.pieces(&[(0, 64)]);
    let to = Remote { key: transfer.remote_key, address: RegionAddr(transfer.base) };
    requester.post(&SendRequest::write(1, &piece, to))?;
    Ok(format!("{:?}, {:?}", requester.completion()?.status, requester.state()?))
}

/// A receive that a write with immediate data would have completed, had it been allowed.
fn local_access(rig: &Rig) -> Result<String, Error> {
    let world =
        World::with(rig, options(Mode::Pinned, Access::REMOTE_READ), options(Mode::Pinned, everything()))?;
    let before = both(&world)?;
    world.responder.post_recv(&RecvRequest::new(7, &[]))?;
    let key = world.remote.region.key();
    let to = Remote { key, address: world.remote.region.address() };
    let write = Operation::WriteImmediate(to, Immediate(1));
    world.requester.post(&SendRequest::new(1, write, &world.local.pieces(&[(0, 64)])))?;
    let sent = world.requester.completion()?.status;
    let kept = both(&world)? == before;
    // If it has not been taken by now it never will be.
    world.responder.fail()?;
    let status = world.responder.completion()?.status;
    Ok(format!("{status:?}, {sent:?} at the other end{}", if kept { "" } else { ", other bytes" }))
}

/// An invalidation that is not allowed, of a key that nobody has.
fn memory_management(rig: &Rig) -> Result<String, Error> {
    let world = World::new(rig, Mode::Pinned)?;
    let before = both(&world)?;
    let key = Key(world.local.region.key().0 ^ 0x0055_5500);
    world.requester.post(&SendRequest::invalidate(1, key))?;
    let status = world.requester.completion()?.status;
    ended(&world, &before, status)
}

type Act = fn(&Rig) -> Result<String, Error>;

/// How a status is reached with a device and a peer that work as they should.
fn way(status: Status) -> Option<(&'static str, Act)> {
    Some(match status {
        Status::Success => ("Success, ReadyToSend and ReadyToSend", success),
        Status::LocalProtectionError => ("LocalProtectionError, Error and ReadyToSend", local_protection),
        Status::FlushError => ("FlushError, Error and ReadyToSend", flush),
        Status::RemoteInvalidRequestError => ("RemoteInvalidRequestError, Error and Error", invalid_request),
        Status::RemoteAccessError => ("RemoteAccessError, Error and Error", remote_access),
        Status::RemoteOperationError => ("RemoteOperationError, Error and Error", remote_operation),
        Status::RetryExceeded => ("RetryExceeded, Error", no_answer),
        Status::RnrRetryExceeded => ("RnrRetryExceeded, Error and ReadyToSend", not_ready),
        Status::MemoryManagementError => ("MemoryManagementError, Error and ReadyToSend", memory_management),
        Status::LocalLengthError => ("LocalLengthError, Error and Error", local_length),
        Status::LocalAccessError => ("LocalAccessError, RemoteAccessError at the other end", local_access),
        // A responder that answers what it was not asked, a bus that refuses, and a sender that dies in the middle of a
        // message: tests of the model make them (hw-model/tests/), and no verb of a real device does.
        Status::BadResponseError | Status::LocalQpOperationError | Status::RemoteAbortedError => return None,
    })
}

pub fn all() -> Vec<Case> {
    let ways = Status::ALL.into_iter().filter_map(|status| Some((status, way(status)?)));
    let case = |(status, (expected, act)): (Status, (&'static str, Act))| Case {
        name: format!("status, {status:?}"),
        mode: Mode::Pinned,
        changes_memory: false,
        expected,
        run: Box::new(act),
    };
    ways.map(case).collect()
}
