//! Memory windows of both types.

use super::world::{Case, Error, PAGE, Pair, World, ensure};
use hw_model::addr::RegionAddr;
use hw_model::hca::{Access, Key, OperationCode, Status, WindowKind};
use hw_model::sync::Arc;
use mr::device::verbs::{Capability, Change, Opening, VerbsError, VerbsHandle, VerbsRegion, VerbsWindow};
use mr::{Region, RegisterOptions};
use odp::space::process::OwnedMemory;

pub const CASES: &[Case] = &[
    Case { name: "a window of type 1 opens what it is bound to, and no more", run: type_one },
    Case { name: "a window of type 2 is bound once and invalidated", run: type_two },
    Case { name: "deregistration ends the windows of a region", run: deregistration },
    Case { name: "a region that a window is bound to is not changed", run: change },
    Case { name: "a window and a region of two domains are not bound", run: foreign },
];

const PAGES: u64 = 4;
const BIND: Access =
    Access::LOCAL_WRITE.union(Access::REMOTE_READ).union(Access::REMOTE_WRITE).union(Access::WINDOW_BIND);

/// A window of `kind`; `None` from a device that lacks them and says so.
fn window(world: &World, kind: WindowKind) -> Result<Option<Arc<VerbsWindow>>, Error> {
    let capability = match kind {
        WindowKind::One => Capability::WindowType1,
        WindowKind::TwoB => Capability::WindowType2,
    };
    match world.pd.alloc_window(kind) {
        Ok(window) => Ok(Some(window)),
        Err(VerbsError::Lacks { device, capability: lacked }) => {
            ensure(device == world.device.name() && lacked == capability, "another lack")?;
            println!("{device} has no {capability}: that is what was tested");
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// Page `n` holds `n + 1`.
fn region(world: &World) -> Result<Arc<VerbsRegion>, Error> {
    let memory = Arc::new(OwnedMemory::new(&world.space, PAGES * PAGE)?);
    for page in 0..PAGES {
        memory.write_at(page * PAGE, &[page as u8 + 1; PAGE as usize])?;
    }
    let options = RegisterOptions::pinned().with_access(BIND);
    Ok(world.pd.register(&memory.user_range(), options)?)
}

fn opening(address: RegionAddr, pages: u64) -> Opening {
    Opening { address, length: pages * PAGE, access: Access::REMOTE_READ }
}

/// That the request has ended well.
fn done(pair: &Pair, what: OperationCode) -> Result<(), Error> {
    let ended = pair.completion()?;
    let right = ended.status == Status::Success && ended.operation == what;
    ensure(right, &format!("{:?} ended with {:?}", ended.operation, ended.status))
}

/// That the window does not reach a page of its region that it is not bound to. rdma_rxe keeps no bounds of windows, only those
/// of the region (docs/rxe.md): that is held against it, so that it is found when it does.
fn outside(world: &World, what: &str, key: Key, at: RegionAddr, byte: u8) -> Result<(), Error> {
    if world.device.name().starts_with("rxe") {
        return world.expect(what, key, at, byte);
    }
    world.expect_refused(what, key, at)
}

fn type_one(world: &World) -> Result<(), Error> {
    let Some(window) = window(world, WindowKind::One)? else { return Ok(()) };
    let (region, pair) = (region(world)?, world.pair()?);
    let at = region.address();
    let key = pair.responder.bind(2, &window, &region, opening(at.offset(PAGE), 1))?;
    done(&pair, OperationCode::Bind)?;
    ensure(key == window.key() && key != region.key(), "not the window's key")?;
    world.expect("through the window", key, at.offset(PAGE), 2)?;
    outside(world, "before the window", key, at, 1)?;
    outside(world, "after the window", key, at.offset(2 * PAGE), 3)?;
    ensure(world.write(key, at.offset(PAGE), 0)? == Status::RemoteAccessError, "written through it")?;

    // Bound again, elsewhere and with another key.
    let second = pair.responder.bind(3, &window, &region, opening(at.offset(2 * PAGE), 2))?;
    done(&pair, OperationCode::Bind)?;
    ensure(second != key, "the key did not change")?;
    world.expect("through the window as it is now", second, at.offset(3 * PAGE), 4)?;
    world.expect_refused("by the former key", key, at.offset(PAGE))?;
    ensure(region.try_deregister().is_err(), "a region with a window was deregistered")?;

    let third = pair.responder.unbind(4, &window)?;
    done(&pair, OperationCode::Bind)?;
    world.expect_refused("when unbound", third, at.offset(2 * PAGE))?;
    world.expect_refused("when unbound, by the former key", second, at.offset(2 * PAGE))?;
    let again = pair.responder.unbind(5, &window);
    ensure(matches!(again, Err(VerbsError::WindowFree { .. })), "a window that is free was unbound")?;

    // Bound to the same region once more, it is one window.
    pair.responder.bind(6, &window, &region, opening(at, 1))?;
    done(&pair, OperationCode::Bind)?;
    let refused = region.try_deregister().map_err(|error| error.to_string());
    ensure(
        refused.as_ref().is_err_and(|said| said.starts_with("1 memory windows")),
        &format!("{refused:?}"),
    )?;
    window.end();
    region.try_deregister()?;
    Ok(())
}

fn type_two(world: &World) -> Result<(), Error> {
    let Some(window) = window(world, WindowKind::TwoB)? else { return Ok(()) };
    let (region, pair) = (region(world)?, world.pair()?);
    let at = region.address();
    let key = pair.responder.bind(2, &window, &region, opening(at, 2))?;
    done(&pair, OperationCode::Bind)?;
    let (status, bytes) = world.read_by(&pair, key, at.offset(PAGE))?;
    ensure(status == Status::Success && bytes[0] == 2, "not read through the queue pair that bound it")?;
    // Type 2B serves that queue pair alone (10.6.7.2.2).
    world.expect_refused("through another queue pair", key, at)?;
    pair.responder.invalidate(3, &window)?;
    done(&pair, OperationCode::Invalidate)?;
    let (status, _) = world.read_by(&pair, key, at)?;
    ensure(status == Status::RemoteAccessError, "read after the invalidation")?;
    region.try_deregister()?;
    let again = pair.responder.invalidate(4, &window);
    ensure(matches!(again, Err(VerbsError::WindowFree { .. })), "a window that is free was invalidated")?;
    ensure(pair.responder.unbind(5, &window).is_err(), "type 2 is not bound to nothing")
}

fn deregistration(world: &World) -> Result<(), Error> {
    let Some(window) = window(world, WindowKind::One)? else { return Ok(()) };
    let (region, pair) = (region(world)?, world.pair()?);
    let at = region.address();
    let key = pair.responder.bind(2, &window, &region, opening(at, 1))?;
    done(&pair, OperationCode::Bind)?;
    world.expect("through the window", key, at, 1)?;
    region.deregister();
    world.expect_refused("through the window of a region that is gone", key, at)?;
    world.expect_refused("the region's own key", region.key(), at)?;
    let said = pair.responder.bind(3, &window, &region, opening(at, 1));
    ensure(matches!(said, Err(VerbsError::Deregistered { .. })), "bound to a region that is gone")?;
    let other = self::region(world)?;
    let said = pair.responder.bind(3, &window, &other, opening(other.address(), 1));
    ensure(matches!(said, Err(VerbsError::WindowEnded { .. })), "a window that was ended was bound")
}

fn change(world: &World) -> Result<(), Error> {
    let Some(window) = window(world, WindowKind::One)? else { return Ok(()) };
    let memory = Arc::new(OwnedMemory::new(&world.space, PAGE)?);
    let options = RegisterOptions::pinned().with_access(BIND);
    let handle = VerbsHandle::register(&world.pd, &memory.user_range(), options)?;
    let (region, pair) = (handle.region(), world.pair()?);
    pair.responder.bind(2, &window, &region, opening(region.address(), 1))?;
    done(&pair, OperationCode::Bind)?;
    let less = Change { access: Some(Access::REMOTE_READ), ..Change::default() };
    let said = handle.change(less.clone());
    ensure(matches!(said, Err(VerbsError::WindowsBound { windows: 1, .. })), &format!("{said:?}"))?;
    window.end();
    handle.change(less)?;
    Ok(())
}

fn foreign(world: &World) -> Result<(), Error> {
    let Some(window) = window(world, WindowKind::One)? else { return Ok(()) };
    let (other, pair) = (world.device.alloc_pd()?, world.pair()?);
    let memory = Arc::new(OwnedMemory::new(&world.space, PAGE)?);
    let options = RegisterOptions::pinned().with_access(BIND);
    let region = other.register(&memory.user_range(), options)?;
    let said = pair.responder.bind(2, &window, &region, opening(region.address(), 1));
    ensure(matches!(said, Err(VerbsError::Foreign { .. })), "bound across domains")
}
