//! Reregistration: the key stays, everything else may change, whole or not at all.

use crate::bed::{Bed, hears_of_drops, space};
use crate::checks::{Counts, protocol_kept};
use crate::races::Stop;
use crate::remapped::{Remapped, anywhere};
use anypage::machine::MachineConfig;
use hw_model::addr::{PAGE_SIZE, RegionAddr, VirtAddr, VirtRange, page_bytes};
use hw_model::hca::{Access, OperationCode, Remote, Status};
use hw_model::sync::Arc;
use hw_model::sync::atomic::{AtomicBool, Ordering};
use mr::device::ReregError;
use mr::{Device, MapRegionError, RegisterOptions, Rereg};
use odp::space::process::OwnedMemory;

const PAGES: u64 = 8;

/// The far end does something to `address` of the near region's key.
fn far(bed: &Bed, what: OperationCode, address: RegionAddr) -> Status {
    bed.far_does(what, 0, 64, Remote { key: bed.near.region.key(), address })
}

#[test]
fn other_memory_comes_behind_the_same_key_and_the_old_is_reached_no_more() {
    for options in [RegisterOptions::on_demand(), RegisterOptions::pinned()] {
        // One of its own: the engines of the round before may still be on their way out of it.
        let space = space();
        let [old, new] =
            [(); 2].map(|()| Arc::new(OwnedMemory::new(&space, page_bytes(PAGES)).expect("memory")));
        let mut bed = Bed::new(&space, &old.user_range(), options, &MachineConfig::default());
        bed.mirror.write_at(0, &[5; 64]).expect("our own memory");
        let region = Arc::clone(&bed.near.region);
        let (key, was) = (region.key(), region.address());
        assert_eq!(far(&bed, OperationCode::Write, was), Status::Success);
        let counts = Counts::of(&bed.machine, &bed.space);

        // Less memory, that begins inside a page, at an address of our choice.
        let part = new.user_range().part(100, 3 * PAGE_SIZE).expect("in it");
        let memory = Some((part, Some(RegionAddr(0x7000))));
        region.rereg(Rereg { memory, ..Rereg::default() }).expect("possible");
        assert_eq!((region.key(), region.address(), region.len()), (key, RegionAddr(0x7000), 3 * PAGE_SIZE));
        assert_eq!(far(&bed, OperationCode::Write, RegionAddr(0x7000)), Status::Success);
        let mut seen = [0; 64];
        new.read_at(100, &mut seen).expect("our own memory");
        assert_eq!(seen, [5; 64]);
        for gone in [was, RegionAddr(0x7000 + 3 * PAGE_SIZE - 8), RegionAddr(0x6fff)] {
            assert_eq!(far(&bed, OperationCode::Write, gone), Status::RemoteAccessError, "{gone:?}");
            bed.reconnect();
        }
        // And back, at its own address.
        region.rereg(Rereg { memory: Some((old.user_range(), None)), ..Rereg::default() }).expect("possible");
        assert_eq!((region.key(), region.address()), (key, was));
        assert_eq!(far(&bed, OperationCode::Read, was), Status::Success);
        counts.are_back(&bed.machine, &bed.space).expect("what was replaced is gone");
        region.deregister();
        let memory = Some((new.user_range(), None));
        assert_eq!(region.rereg(Rereg { memory, ..Rereg::default() }), Err(ReregError::Deregistered));
        protocol_kept(&bed.machine, &bed.space).expect("all in order");
    }
}

#[test]
fn rights_and_domain_change_where_the_region_is() {
    let space = space();
    let memory = Arc::new(OwnedMemory::new(&space, page_bytes(PAGES)).expect("memory"));
    let read = RegisterOptions::on_demand().with_access(Access::REMOTE_READ);
    let mut bed = Bed::new(&space, &memory.user_range(), read, &MachineConfig::default());
    let region = Arc::clone(&bed.near.region);
    let (key, at) = (region.key(), region.address());
    assert_eq!(far(&bed, OperationCode::Read, at), Status::Success);
    assert_eq!(far(&bed, OperationCode::Write, at), Status::RemoteAccessError);
    bed.reconnect();
    let all = Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ;
    let to = |access| Rereg { access: Some(access), ..Rereg::default() };
    region.rereg(to(all)).expect("possible");
    assert_eq!((region.key(), region.address(), region.access()), (key, at, all));
    assert_eq!(far(&bed, OperationCode::Write, at), Status::Success);
    // Rights that write as much as before: not a page is touched.
    let before = region.counters();
    region.rereg(to(Access::LOCAL_WRITE | Access::REMOTE_READ)).expect("possible");
    assert_eq!(region.counters(), before);
    assert_eq!(far(&bed, OperationCode::Write, at), Status::RemoteAccessError);
    bed.reconnect();

    // Another domain: the queue pair of this one reaches it no more, and the old one is free to go.
    let other = Arc::clone(&bed.machine.near).alloc_pd().expect("a domain");
    region.rereg(Rereg { pd: Some(Arc::clone(&other)), ..Rereg::default() }).expect("possible");
    assert_eq!(far(&bed, OperationCode::Read, at), Status::RemoteAccessError);
    bed.reconnect();
    let home = Arc::clone(&bed.near.pd);
    region.rereg(Rereg { pd: Some(home), access: Some(all), memory: None }).expect("possible");
    assert_eq!(far(&bed, OperationCode::Write, at), Status::Success);
    let pds = bed.machine.near.hca().live_objects().pds;
    drop(other);
    assert_eq!(bed.machine.near.hca().live_objects().pds, pds - 1, "nothing is in it any more");
}

/// What would be wrong if this failed: a change that cannot be made would cost the region that there was.
#[test]
fn what_cannot_be_changed_leaves_the_region_as_it_was() {
    let space = space();
    let memory = Arc::new(OwnedMemory::new(&space, page_bytes(PAGES)).expect("memory"));
    let bed = Bed::new(&space, &memory.user_range(), RegisterOptions::pinned(), &MachineConfig::default());
    let region = &bed.near.region;
    assert_eq!(far(&bed, OperationCode::Write, region.address()), Status::Success);
    let (entries, counts) = (region.raw_entries(), Counts::of(&bed.machine, &bed.space));
    let nowhere = VirtRange::new(VirtAddr(PAGE_SIZE), PAGE_SIZE).expect("fits");
    let nothing = memory.user_range().part(0, 0).expect("in it");
    let foreign = Arc::clone(&bed.machine.far).alloc_pd().expect("a domain");
    let of = |memory| Rereg { memory: Some((memory, None)), ..Rereg::default() };
    let refused = [
        region.rereg(of(anywhere(&(Arc::clone(&space) as _), nowhere))),
        region.rereg(of(nothing)),
        region.rereg(Rereg { pd: Some(foreign), ..Rereg::default() }),
        // Remote writing without local writing.
        region.rereg(Rereg { access: Some(Access::REMOTE_WRITE), ..Rereg::default() }),
        region.rereg(Rereg {
            memory: Some((memory.user_range(), Some(RegionAddr(u64::MAX - 8)))),
            ..Rereg::default()
        }),
    ];
    assert!(matches!(refused[0], Err(ReregError::Map(MapRegionError::Watch(_)))), "{refused:?}");
    assert_eq!(refused[1], Err(ReregError::Map(MapRegionError::Empty)));
    assert_eq!(refused[2], Err(ReregError::ForeignPd));
    assert!(matches!(refused[3], Err(ReregError::Key(_))), "{refused:?}");
    assert!(matches!(refused[4], Err(ReregError::Key(_))), "{refused:?}");
    assert_eq!(region.raw_entries(), entries, "not an entry was written");
    counts.are_back(&bed.machine, &bed.space).expect("nothing is left of what was tried");
    assert_eq!(far(&bed, OperationCode::Write, region.address()), Status::Success);
}

/// Each write lands whole in one of the two memories, and none after the change that took it away.
#[test]
fn a_peer_that_writes_meanwhile_reaches_one_memory_or_the_other() {
    if !hears_of_drops("a_peer_that_writes_meanwhile_reaches_one_memory_or_the_other") {
        return;
    }
    let space = space();
    let two = [(); 2].map(|()| Remapped::new(PAGES));
    let ranges = [&two[0], &two[1]].map(|memory| memory.user_range(Arc::clone(&space) as _));
    let options = RegisterOptions { address: Some(RegionAddr(0)), ..RegisterOptions::on_demand() };
    let bed = Bed::new(&space, &ranges[0], options, &MachineConfig::default());
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = Stop(&over);
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                two.iter().for_each(|memory| memory.discard(0, PAGES));
            }
        });
        scope.spawn(|| {
            let mut turn = 1;
            while !over.load(Ordering::Acquire) {
                let memory = Some((ranges[turn % 2].clone(), Some(RegionAddr(0))));
                bed.near.region.rereg(Rereg { memory, ..Rereg::default() }).expect("possible");
                turn += 1;
            }
        });
        for round in 0..300 {
            let at = RegionAddr(page_bytes(round % PAGES));
            assert_eq!(far(&bed, OperationCode::Write, at), Status::Success, "round {round}");
        }
    });
    bed.near.region.deregister();
    protocol_kept(&bed.machine, &bed.space).expect("all in order");
}
