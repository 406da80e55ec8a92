use crate::fault::{FaultFailure, FaultWork, Progress, Publication};
use crate::notifier::{Notify, Raise};
use crate::space::sim::{MapRequest, SimConfig, SimHost, SimSpace, SpaceChange};
use crate::space::{Access, AddressSpace, FaultError, UserRange, WatchError};
use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange};
use hw_model::sync::Arc;
use std::convert::Infallible;

fn world() -> (Arc<SimSpace>, VirtRange, UserRange) {
    let host = SimHost::new(SimConfig { ram_pages: 512, ..SimConfig::default() }).expect("memory");
    let space = host.new_space();
    let range = space.map(MapRequest::anonymous(100)).expect("room");
    let anchored = UserRange::simulated(&space, range).anchored().expect("mapped");
    (space, range, anchored)
}

fn part(range: VirtRange, page: u64, pages: u64) -> VirtRange {
    VirtRange::new(range.start().offset(page * PAGE_SIZE), pages * PAGE_SIZE).expect("part of the range")
}

fn fault(anchored: &UserRange, range: VirtRange) -> (u64, Result<(), FaultError>) {
    let mut runs = Vec::new();
    let result = anchored.space().fault(range, Access::Write, &mut runs);
    (runs.iter().map(|run| run.pages).sum(), result)
}

#[test]
fn what_took_the_place_of_anchored_memory_is_not_reached() {
    let (space, range, anchored) = world();
    assert_eq!(fault(&anchored, range), (100, Ok(())));
    let nothing = |page| Err(FaultError::NoMapping { at: part(range, page, 1).start() });
    // In one call, by an unmap and a map, by a move onto it, and by a move away.
    let map = |page, pages| {
        let at = part(range, page, pages).start();
        space.map(MapRequest::anonymous(pages).fixed(at)).expect("room");
    };
    map(70, 2);
    assert_eq!(fault(&anchored, range), (70, nothing(70)), "those before it are had");
    assert_eq!(fault(&anchored, part(range, 72, 28)), (28, Ok(())), "and those behind it");
    space.unmap(part(range, 50, 1)).expect("mapped");
    map(50, 1);
    assert_eq!(fault(&anchored, range), (50, nothing(50)));
    let other = space.map(MapRequest::anonymous(4)).expect("room");
    space.change(SpaceChange::Remap { from: other, to: part(range, 30, 4).start() }).expect("mapped");
    assert_eq!(fault(&anchored, range), (30, nothing(30)));
    let away = space.map(MapRequest::anonymous(1)).expect("room").start();
    space.change(SpaceChange::Remap { from: part(range, 10, 1), to: away }).expect("mapped");
    map(10, 1);
    assert_eq!(fault(&anchored, range), (10, nothing(10)));
    let mut runs = Vec::new();
    assert_eq!(anchored.space().snapshot(part(range, 10, 1), &mut runs), nothing(10));
    let refused = anchored.space().watch(range).err();
    assert_eq!(refused, Some(WatchError::NotMapped { range, at: part(range, 10, 1).start() }));

    let mut plain = Vec::new();
    space.fault(range, Access::Write, &mut plain).expect("to whoever registers it now, it is memory");
    let again = UserRange::simulated(&space, range).anchored().expect("mapped");
    assert_eq!(fault(&again, range), (100, Ok(())));
}

#[test]
fn what_happens_within_its_mapping_anchored_memory_follows() {
    let (space, range, anchored) = world();
    for change in [
        SpaceChange::Discard(range),
        SpaceChange::Migrate(range),
        SpaceChange::SwapOut(range),
        SpaceChange::Fork,
    ] {
        assert_eq!(fault(&anchored, range), (100, Ok(())));
        drop(space.change(change).expect("mapped"));
    }
    assert_eq!(fault(&anchored, range), (100, Ok(())));
    let beyond = VirtRange::new(range.end(), PAGE_SIZE).expect("fits");
    assert_eq!(fault(&anchored, beyond).1, Err(FaultError::NoMapping { at: beyond.start() }));
    let low = VirtRange::new(VirtAddr(range.start().0 - PAGE_SIZE), 2 * PAGE_SIZE).expect("fits");
    assert_eq!(fault(&anchored, low).1, Err(FaultError::NoMapping { at: low.start() }));
    assert_eq!(anchored.space().watch(low).err(), Some(WatchError::BadRange { range: low }));
}

struct Owner;

impl Notify for Owner {
    fn clear(&self, _range: VirtRange, raise: Raise<'_>) {
        raise.raise();
    }
    fn unlink(&self, _range: VirtRange) {}
}

/// The page goes, and another comes, between the look and the publication, in either order of the two owners. If this fails,
/// the old key leads to the new page.
#[test]
fn a_fault_that_was_under_way_when_the_mapping_went_does_not_publish_the_new_one() {
    for owner_first in [true, false] {
        let host = SimHost::new(SimConfig { ram_pages: 512, ..SimConfig::default() }).expect("memory");
        let space = host.new_space();
        let range = space.map(MapRequest::anonymous(4)).expect("room");
        let register = || space.notifiers().register(range, Arc::new(Owner));
        let early = owner_first.then(register);
        let anchored = UserRange::simulated(&space, range).anchored().expect("mapped");
        let interval = early.unwrap_or_else(register);
        for steps in 0..4 {
            let mut work = FaultWork::new(interval.sequence(), part(range, steps, 1), Access::Write);
            let mut published = false;
            let mut step = || {
                work.poll(&**anchored.space(), |_, check| -> Result<_, Infallible> {
                    published |= !check.retry();
                    Ok(if check.retry() { Publication::Retry } else { Publication::Published(()) })
                })
            };
            for _ in 0..steps.min(2) {
                assert_eq!(step(), Ok(Progress::Again));
            }
            let request = MapRequest::anonymous(1).fixed(part(range, steps, 1).start());
            space.map(request).expect("room");
            let end = loop {
                match step() {
                    Ok(Progress::Again) => {}
                    other => break other,
                }
            };
            let at = part(range, steps, 1).start();
            assert_eq!(end, Err(FaultFailure::Space(FaultError::NoMapping { at })));
            assert!(!published);
        }
    }
}
