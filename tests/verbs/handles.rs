//! A registration that is changed, or made anew, behind a handle that stays.

use super::world::{Case, Error, PAGE, World, ensure};
use hw_model::addr::RegionAddr;
use hw_model::hca::{Access, Status};
use hw_model::sync::Arc;
use mr::device::verbs::{Capability, Change, Outcome, VerbsError, VerbsHandle};
use mr::{Region, RegisterOptions};
use odp::space::process::{ContiguousMemory, OwnedMemory, Piece};

pub const CASES: &[Case] = &[
    Case {
        name: "a pinned registration whose pages changed is stale, and is made anew with another key",
        run: stale,
    },
    Case { name: "a registration on demand is never stale", run: on_demand },
    Case { name: "rights are changed in place or by a fresh registration", run: rights },
    Case { name: "memory is changed in place or by a fresh registration", run: memory },
    Case { name: "memory at an address of the program's choice is a fresh registration", run: addressed },
    Case { name: "a domain is changed in place or by a fresh registration", run: domain },
    Case { name: "a registration that cannot be changed is as it was", run: refused },
];

/// A page of `byte`.
fn page_of(world: &World, byte: u8) -> Result<Arc<OwnedMemory>, Error> {
    let memory = Arc::new(OwnedMemory::new(&world.space, PAGE)?);
    memory.write_at(0, &[byte; PAGE as usize])?;
    Ok(memory)
}

/// That the outcome is the one that the device can have.
fn as_the_device_can(world: &World, outcome: Outcome, before: hw_model::hca::Key) -> Result<(), Error> {
    match outcome {
        Outcome::InPlace(_) => ensure(world.device.capabilities().has(Capability::Rereg), "it has no rereg"),
        Outcome::Fresh(key) => ensure(key != before, "a fresh registration with the old key"),
    }
}

fn stale(world: &World) -> Result<(), Error> {
    let memory = ContiguousMemory::new(&world.space, &[Piece::Anonymous(4 * PAGE)])?;
    memory.write_at(0, &[1; 4 * PAGE as usize])?;
    let handle = VerbsHandle::register(&world.pd, &memory.user_range(), RegisterOptions::pinned())?;
    let at = handle.region().address();
    world.expect("as registered", handle.key(), at, 1)?;
    ensure(handle.is_stale() == Some(false), "stale before anything changed, or not watched")?;
    ensure(handle.refresh_if_stale()?.is_none(), "made anew though nothing changed")?;

    // Private memory becomes a shared file.
    let file = rustix::fs::memfd_create("kind", rustix::fs::MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&file, PAGE)?;
    memory.replace(0, Piece::Shared { file: std::os::fd::AsFd::as_fd(&file), offset: 0, len: PAGE })?;
    memory.write_at(0, &[2; PAGE as usize])?;
    ensure(handle.is_stale() == Some(true), "not told of pages of another kind")?;
    let old = handle.key();
    let new = handle.refresh_if_stale()?.ok_or("not made anew")?;
    ensure(new != old && handle.key() == new, "the key did not change")?;
    world.expect("made anew", new, at, 2)?;
    world.expect("a page that did not change", new, at.offset(PAGE), 1)?;
    world.expect_refused("the old key", old, at)?;
    // What userfaultfd tells of the same change may come late, and says so once more.
    while handle.refresh_if_stale()?.is_some() {}
    let last = handle.key();
    world.expect("as it stays", last, at, 2)?;
    drop(handle);
    world.expect_refused("after the handle has gone", last, at)
}

fn on_demand(world: &World) -> Result<(), Error> {
    let memory = ContiguousMemory::new(&world.space, &[Piece::Anonymous(2 * PAGE)])?;
    let options = RegisterOptions::on_demand();
    let handle = match VerbsHandle::register(&world.pd, &memory.user_range(), options) {
        Err(VerbsError::Lacks { capability: Capability::OnDemand, .. }) => return Ok(()),
        made => made?,
    };
    memory.replace(0, Piece::Anonymous(PAGE))?;
    memory.write_at(0, &[3; PAGE as usize])?;
    ensure(handle.is_stale() == Some(false), "stale, though the kernel keeps it true")?;
    world.expect("pages in the place of others", handle.key(), handle.region().address(), 3)
}

fn rights(world: &World) -> Result<(), Error> {
    let memory = page_of(world, 4)?;
    let reading = Access::REMOTE_READ;
    let options = RegisterOptions::pinned().with_access(reading);
    let handle = VerbsHandle::register(&world.pd, &memory.user_range(), options)?;
    let (before, at) = (handle.key(), handle.region().address());
    ensure(world.write(before, at, 5)? == Status::RemoteAccessError, "written without a right")?;
    let writing = reading | Access::LOCAL_WRITE | Access::REMOTE_WRITE;
    let outcome = handle.change(Change { access: Some(writing), ..Change::default() })?;
    as_the_device_can(world, outcome, before)?;
    ensure(handle.region().access() == writing && handle.key() == outcome.key(), "not what was asked for")?;
    ensure(world.write(handle.key(), at, 5)? == Status::Success, "not written, with the right")?;
    world.expect("what was written", handle.key(), at, 5)?;
    if let Outcome::Fresh(_) = outcome {
        world.expect_refused("the old key", before, at)?;
    }
    Ok(())
}

fn memory(world: &World) -> Result<(), Error> {
    let (first, second) = (page_of(world, 6)?, page_of(world, 7)?);
    let handle = VerbsHandle::register(&world.pd, &first.user_range(), RegisterOptions::pinned())?;
    let (before, at) = (handle.key(), handle.region().address());
    let change = Change { memory: Some((second.user_range(), None)), ..Change::default() };
    let outcome = handle.change(change)?;
    as_the_device_can(world, outcome, before)?;
    let now = handle.region().address();
    ensure(now.0 == second.range().start().0, "not at the address of the other memory")?;
    world.expect("the other memory", handle.key(), now, 7)?;
    world.expect_refused("the former memory by the key of now", handle.key(), at)?;
    world.expect_refused("the former memory by the former key", before, at)?;
    // It holds the new memory, and the old one no more.
    ensure(Arc::strong_count(&first) == 1, "the former memory is held")?;
    ensure(Arc::strong_count(&second) > 1, "the other memory is not held")
}

fn addressed(world: &World) -> Result<(), Error> {
    let (first, second) = (page_of(world, 10)?, page_of(world, 11)?);
    let handle = VerbsHandle::register(&world.pd, &first.user_range(), RegisterOptions::pinned())?;
    let (before, at) = (handle.key(), handle.region().address());
    // ibv_rereg_mr(3) has no word for it.
    let chosen = RegionAddr(0x5000);
    let outcome =
        handle.change(Change { memory: Some((second.user_range(), Some(chosen))), ..Change::default() })?;
    ensure(matches!(outcome, Outcome::Fresh(key) if key != before), &format!("{outcome:?}"))?;
    world.expect("the other memory", handle.key(), chosen, 11)?;
    world.expect_refused("the former memory by the former key", before, at)?;
    ensure(Arc::strong_count(&first) == 1, "the former memory is held")
}

fn domain(world: &World) -> Result<(), Error> {
    let memory = page_of(world, 8)?;
    let other = world.device.alloc_pd()?;
    let handle = VerbsHandle::register(&other, &memory.user_range(), RegisterOptions::pinned())?;
    let (before, at) = (handle.key(), handle.region().address());
    world.expect_refused("from another domain", before, at)?;
    let outcome = handle.change(Change { pd: Some(Arc::clone(&world.pd)), ..Change::default() })?;
    as_the_device_can(world, outcome, before)?;
    drop(other);
    world.expect("in the domain of the reader", handle.key(), at, 8)
}

fn refused(world: &World) -> Result<(), Error> {
    let memory = page_of(world, 9)?;
    let handle = VerbsHandle::register(&world.pd, &memory.user_range(), RegisterOptions::pinned())?;
    let (key, at) = (handle.key(), handle.region().address());
    // Nobody may write from outside what this side may not (IBTA volume 1, 10.6.3.1).
    let change = Change { access: Some(Access::REMOTE_WRITE), ..Change::default() };
    let said = handle.change(change);
    ensure(matches!(said, Err(VerbsError::Refused { .. })), &format!("{said:?}"))?;
    let nothing = super::world::nothing(&world.space);
    let said = handle.change(Change { memory: Some((nothing, None)), ..Change::default() });
    ensure(said.is_err(), "memory that is not there was taken")?;
    ensure(handle.key() == key, "another key")?;
    world.expect("as it was", key, at, 9)
}
