//! Each kind of memory and of change, one at a time, as the program and as a device that faults see it.

use super::*;
use crate::page::{Backing, PageRun};
use crate::space::{Access, AddressSpace, FaultError, Rung, WatchError};
use hw_model::addr::PhysAddr;
use hw_model::bus::{AtomicOp, Bus, DeviceSpec, DmaError, HostMemory, MemoryError};

fn world() -> (Machine, Arc<SimSpace>) {
    let machine = machine(small(7, FaultMode::Wait));
    let space = machine.host.new_space();
    (machine, space)
}

/// The one page at `at`, faulted in for `access`.
fn fault(space: &SimSpace, at: VirtAddr, access: Access) -> Result<PageRun, FaultError> {
    let mut runs = Vec::new();
    space.fault(VirtRange::new(at, PAGE_SIZE).expect("fits"), access, &mut runs)?;
    assert_eq!(runs.len(), 1);
    Ok(runs[0])
}

fn kind(space: &SimSpace, at: VirtAddr, access: Access) -> (Backing, bool) {
    let run = fault(space, at, access).expect("it can be faulted");
    (run.backing, run.writable)
}

fn byte(space: &SimSpace, at: VirtAddr) -> u8 {
    let mut out = [0];
    space.cpu_read(at, &mut out).expect("mapped");
    out[0]
}

fn done(host: &SimHost) {
    host.check().expect("the host agrees with itself");
}

#[test]
fn anonymous_memory_reads_as_zero_and_becomes_its_own_when_written() {
    let (machine, space) = world();
    let range = space.map(MapRequest::anonymous(4)).expect("room");
    assert_eq!(space.rung(range), Rung::Exact);
    let mut runs = Vec::new();
    space.snapshot(range, &mut runs).expect("mapped");
    assert!(runs.is_empty(), "a snapshot faults nothing in");
    assert_eq!(kind(&space, range.start(), Access::Read), (Backing::Zero, false));
    assert_eq!(kind(&space, range.start(), Access::Write), (Backing::Anonymous, true));
    assert_eq!(kind(&space, range.start(), Access::Read), (Backing::Anonymous, true));
    space.cpu_write(page_at(range, 1).offset(4090), b"across pages").expect("mapped");
    space.snapshot(range, &mut runs).expect("mapped");
    assert_eq!(runs.iter().map(|run| run.pages).sum::<u64>(), 3);
    let mut seen = [0; 12];
    space.cpu_read(page_at(range, 1).offset(4090), &mut seen).expect("mapped");
    assert_eq!(&seen, b"across pages");
    done(&machine.host);
}

#[test]
fn permissions_are_those_of_the_mapping() {
    let (machine, space) = world();
    let range = space.map(MapRequest::anonymous(2).protected(Protection::Read)).expect("room");
    let refused = |access| Err(FaultError::Permission { at: range.start(), access });
    assert_eq!(fault(&space, range.start(), Access::Write), refused(Access::Write));
    assert!(space.cpu_write(range.start(), &[1]).is_err());
    space.protect(range, Protection::ReadWrite).expect("mapped");
    space.cpu_write(range.start(), &[1]).expect("allowed now");
    space.protect(range, Protection::None).expect("mapped");
    assert_eq!(fault(&space, range.start(), Access::Read), refused(Access::Read));
    let mut runs = Vec::new();
    space.snapshot(range, &mut runs).expect("mapped");
    assert!(runs.is_empty(), "what cannot be read is not present for a device");
    space.protect(range, Protection::Read).expect("mapped");
    assert_eq!((byte(&space, range.start()), kind(&space, range.start(), Access::Read).1), (1, false));
    done(&machine.host);
}

#[test]
fn what_is_not_mapped_is_named() {
    let (machine, space) = world();
    let range = space.map(MapRequest::anonymous(4)).expect("room");
    space.cpu_write(range.start(), &[7]).expect("mapped");
    space.unmap(part(range, 2, 1)).expect("mapped");
    let at = page_at(range, 2);
    let mut runs = Vec::new();
    assert_eq!(space.fault(range, Access::Read, &mut runs), Err(FaultError::NoMapping { at }));
    assert_eq!(runs.iter().map(|run| run.pages).sum::<u64>(), 2, "those before it are reported");
    assert_eq!(space.snapshot(range, &mut runs), Err(FaultError::NoMapping { at }));
    assert_eq!(space.watch(range).err(), Some(WatchError::NotMapped { range, at }));
    let odd = VirtRange::new(range.start().offset(1), PAGE_SIZE).expect("fits");
    assert_eq!(space.watch(odd).err(), Some(WatchError::BadRange { range: odd }));
    assert!(space.watch(part(range, 0, 2)).is_ok());
    for change in [SpaceChange::Discard(range), SpaceChange::Protect(range, Protection::Read)] {
        assert_eq!(space.change(change).err(), Some(SimError::NotMapped { at }));
    }
    assert_eq!(space.change(SpaceChange::Unmap(odd)).err(), Some(SimError::BadRange { range: odd }));
    let special = space.map(MapRequest::anonymous(1).of(Source::Special)).expect("room").start();
    assert_eq!(fault(&space, special, Access::Read), Err(FaultError::Special { at: special }));
    done(&machine.host);
}

/// If this fails, a stale translation moves bytes silently.
#[test]
fn a_frame_that_was_given_back_refuses_dma() {
    let (machine, space) = world();
    let range = space.map(MapRequest::anonymous(1)).expect("room");
    let run = fault(&space, range.start(), Access::Write).expect("mapped");
    machine.host.write(run.phys.offset(8), b"by dma").expect("present");
    assert_eq!(byte(&space, range.start().offset(8)), b'b');
    assert_eq!(machine.host.atomic(run.phys, AtomicOp::FetchAdd(3)), Ok(0));
    let swap = AtomicOp::CompareSwap { compare: 3, swap: 9 };
    assert_eq!(space.cpu_atomic(range.start(), swap), Ok(3));
    let at = run.phys.offset(4);
    assert_eq!(machine.host.atomic(at, AtomicOp::FetchAdd(1)), Err(MemoryError::Misaligned { at }));
    space.change(SpaceChange::Discard(range)).expect("mapped");
    let at = run.phys;
    assert_eq!(machine.host.read(at, &mut [0; 8]), Err(MemoryError::Retired { at }));
    assert_eq!(machine.host.write(at, &[0; 8]), Err(MemoryError::Retired { at }));
    let nowhere = PhysAddr(1 << 46);
    assert_eq!(machine.host.read(nowhere, &mut [0]), Err(MemoryError::Unbacked { at: nowhere }));
    assert_eq!(byte(&space, range.start()), 0, "discarded memory reads as zero");
    done(&machine.host);
}

#[test]
fn fork_shares_until_either_side_writes() {
    let (machine, parent) = world();
    let shmem = machine.host.new_shmem(1);
    let own = parent.map(MapRequest::anonymous(2)).expect("room").start();
    let shared =
        parent.map(MapRequest::anonymous(1).of(Source::Shared { object: shmem, first: 0 })).expect("room");
    parent.cpu_write(own, &[1]).expect("mapped");
    parent.cpu_write(shared.start(), &[1]).expect("mapped");
    let before = fault(&parent, own, Access::Write).expect("mapped");
    let child = parent.fork().expect("memory");
    assert_eq!(fault(&child, own, Access::Read).expect("mapped").phys, before.phys);
    child.cpu_write(own, &[2]).expect("mapped");
    child.cpu_write(shared.start(), &[2]).expect("mapped");
    assert_eq!((byte(&parent, own), byte(&child, own)), (1, 2));
    assert_eq!((byte(&parent, shared.start()), byte(&child, shared.start())), (2, 2));
    assert_eq!(fault(&parent, own, Access::Write).expect("mapped").phys, before.phys, "alone again: no copy");
    let frames = machine.host.stats().free_frames;
    drop(child);
    assert_eq!(machine.host.stats().free_frames, frames + 1, "the child's one copy came back");
    done(&machine.host);
}

#[test]
fn huge_pages_split_and_collapse() {
    let (machine, space) = world();
    let range = space.map(MapRequest::anonymous(2 * HUGE_PAGES).huge()).expect("room");
    let run = fault(&space, page_at(range, 5), Access::Write).expect("mapped");
    assert_eq!((run.backing, run.order_shift), (Backing::TransparentHuge, 21));
    space.cpu_write(page_at(range, 5), &[5]).expect("mapped");
    let mut runs = Vec::new();
    space.snapshot(range, &mut runs).expect("mapped");
    assert_eq!((runs.len(), runs[0].pages), (1, HUGE_PAGES), "one run a huge page");
    assert_eq!(space.change(SpaceChange::Split(part(range, 7, 1))).expect("mapped").pages, 1);
    let split = fault(&space, page_at(range, 5), Access::Write).expect("mapped");
    assert_eq!((split.phys, split.order_shift), (run.phys, 12), "the frames stay");
    space.change(SpaceChange::Discard(part(range, 9, 3))).expect("mapped");
    let huge = part(range, 0, HUGE_PAGES);
    assert_eq!(space.change(SpaceChange::Collapse(huge)).expect("a free block").pages, 1);
    assert_eq!(kind(&space, page_at(range, 9), Access::Read).0, Backing::TransparentHuge);
    assert_eq!((byte(&space, page_at(range, 5)), byte(&space, page_at(range, 9))), (5, 0));
    done(&machine.host);

    // A hole in the middle splits; a move by whole huge pages does not.
    space.unmap(part(range, 100, 1)).expect("mapped");
    assert_eq!(fault(&space, page_at(range, 5), Access::Read).expect("mapped").order_shift, 12);
    let second = part(range, HUGE_PAGES, HUGE_PAGES);
    space.cpu_write(second.start(), &[6]).expect("mapped");
    let to = VirtAddr::from_page_number(1 << 30);
    space.change(SpaceChange::Remap { from: second, to }).expect("room");
    assert_eq!((byte(&space, to), fault(&space, to, Access::Read).expect("moved").order_shift), (6, 21));
    let moved = VirtRange::new(to, HUGE_PAGES * PAGE_SIZE).expect("fits");
    let odd = VirtAddr::from_page_number((1 << 30) + 4099);
    space.change(SpaceChange::Remap { from: moved, to: odd }).expect("room");
    assert_eq!((byte(&space, odd), fault(&space, odd, Access::Read).expect("moved").order_shift), (6, 12));
    done(&machine.host);
}

#[test]
fn files_are_written_back_evicted_and_privately_copied() {
    let (machine, space) = world();
    let file = machine.host.new_file(4);
    let map = |source| space.map(MapRequest::anonymous(4).of(source)).expect("room");
    let shared = map(Source::Shared { object: file, first: 0 });
    let private = map(Source::Private { object: file, first: 0 });
    assert_eq!(kind(&space, shared.start(), Access::Read), (Backing::File, false), "clean until written");
    space.cpu_write(shared.start(), &[1]).expect("mapped");
    assert_eq!(kind(&space, shared.start(), Access::Read), (Backing::File, true));
    assert_eq!(byte(&space, private.start()), 1);
    space.cpu_write(private.start(), &[2]).expect("mapped");
    assert_eq!((byte(&space, shared.start()), byte(&space, private.start())), (1, 2));
    let evict = ObjectChange::Evict { object: file, first: 0, end: 4 };
    assert_eq!(machine.host.change(evict).expect("a file").pages, 0, "dirty pages stay");
    let write_back = ObjectChange::WriteBack { object: file, first: 0, end: 4 };
    assert_eq!(machine.host.change(write_back).expect("a file").pages, 1);
    assert_eq!(kind(&space, shared.start(), Access::Read), (Backing::File, false), "clean again");
    assert_eq!(machine.host.change(evict).expect("a file").pages, 1);
    assert_eq!((byte(&space, shared.start()), byte(&space, private.start())), (1, 2), "read from disk");

    machine.host.change(ObjectChange::Truncate { object: file, pages: 0 }).expect("a file");
    for range in [shared, private] {
        let at = range.start();
        assert_eq!(fault(&space, at, Access::Read), Err(FaultError::NoMapping { at }));
    }
    machine.host.change(ObjectChange::Truncate { object: file, pages: 4 }).expect("a file");
    assert_eq!((byte(&space, shared.start()), byte(&space, private.start())), (0, 0));
    done(&machine.host);
}

#[test]
fn holes_in_shared_memory_reach_every_process_and_leave_private_copies() {
    let (machine, space) = world();
    let shmem = machine.host.new_shmem(4);
    let map = |source| space.map(MapRequest::anonymous(4).of(source)).expect("room");
    let shared = map(Source::Shared { object: shmem, first: 0 });
    let private = map(Source::Private { object: shmem, first: 0 });
    space.cpu_write(shared.start(), &[1]).expect("mapped");
    space.cpu_write(private.start(), &[2]).expect("mapped");
    let other = space.fork().expect("memory");
    assert_eq!(kind(&other, shared.start(), Access::Read), (Backing::Shared, true));
    other.change(SpaceChange::Remove(part(shared, 0, 1))).expect("shared memory");
    for process in [&space, &other] {
        assert_eq!((byte(process, shared.start()), byte(process, private.start())), (0, 2));
    }
    let at = private.start();
    let refused = space.change(SpaceChange::Remove(part(private, 0, 1)));
    assert_eq!(refused.err(), Some(SimError::WrongKind { at }));
    done(&machine.host);
}

#[test]
fn pages_move_to_other_frames_to_swap_and_back() {
    let (machine, space) = world();
    let range = space.map(MapRequest::anonymous(3)).expect("room");
    space.cpu_write(range.start(), &[1]).expect("mapped");
    let child = space.fork().expect("memory");
    let before = fault(&space, range.start(), Access::Read).expect("mapped");
    assert_eq!(space.change(SpaceChange::Migrate(range)).expect("a free frame").pages, 1);
    let after = fault(&space, range.start(), Access::Read).expect("mapped");
    assert_ne!(before.phys, after.phys);
    assert_eq!(fault(&child, range.start(), Access::Read).expect("mapped").phys, after.phys);
    assert_eq!(space.change(SpaceChange::SwapOut(range)).expect("swap").pages, 1);
    assert_eq!(machine.host.stats().swap_slots, 1);
    let mut runs = Vec::new();
    child.snapshot(range, &mut runs).expect("mapped");
    assert!(runs.is_empty(), "swapped out of both");
    space.cpu_write(range.start(), &[2]).expect("swapped in");
    assert_eq!((byte(&space, range.start()), byte(&child, range.start())), (2, 1));
    assert_eq!(machine.host.stats().swap_slots, 0);
    done(&machine.host);
}

#[test]
fn dmabuf_pages_move_between_the_bar_and_system_memory_one_by_one() {
    let (machine, space) = world();
    let object = machine.host.new_dmabuf(machine.bar, 3, 4, Residence::System).expect("room");
    let source = Source::Shared { object, first: 0 };
    let range = space.map(MapRequest::anonymous(4).of(source)).expect("room");
    space.cpu_write(page_at(range, 1), &[1]).expect("mapped");
    assert_eq!(kind(&space, page_at(range, 1), Access::Write), (Backing::DmabufSystem, true));
    let free = machine.host.stats().free_frames;
    let to = |to| ObjectChange::Move { object, first: 1, end: 2, to };
    assert_eq!(machine.host.change(to(Residence::Peer)).expect("a dmabuf").pages, 1);
    assert_eq!(machine.host.stats().free_frames, free + 1);
    let run = fault(&space, page_at(range, 1), Access::Write).expect("mapped");
    let device = machine.host.device(machine.bar);
    assert_eq!((run.backing, run.provider), (Backing::DmabufPeer, Some(device.provider())));
    assert_eq!(run.phys, device.base().offset(4 * PAGE_SIZE), "page 1 of a buffer at page 3");
    machine.host.write(run.phys, &[2]).expect("without a bus the host answers");
    let mut seen = [0];
    device.storage().read(4 * PAGE_SIZE, &mut seen).expect("inside");
    assert_eq!((seen, byte(&space, page_at(range, 1))), ([2], 2));
    assert_eq!(kind(&space, page_at(range, 2), Access::Read).0, Backing::DmabufSystem);
    machine.host.change(to(Residence::System)).expect("a free frame");
    assert_eq!(byte(&space, page_at(range, 1)), 2);
    let beyond = machine.host.new_dmabuf(machine.bar, 60, 5, Residence::Peer).err();
    assert_eq!(beyond, Some(SimError::BadPages { first: 60, end: 65, pages: DEVICE_PAGES }));
    done(&machine.host);
}

#[test]
fn device_memory_coherent_is_reached_and_private_comes_back() {
    let (machine, space) = world();
    let range = space.map(MapRequest::anonymous(2)).expect("room");
    let migrate = |memory| space.change(SpaceChange::ToDevice { range, memory }).expect("room").pages;
    space.cpu_write(range.start(), &[1]).expect("mapped");
    assert_eq!(migrate(machine.coherent), 2, "the untouched page goes too, as zeroes");
    assert_eq!(kind(&space, range.start(), Access::Write), (Backing::DeviceCoherent, true));
    assert_eq!(byte(&space, range.start()), 1);
    assert_eq!(space.change(SpaceChange::FromDevice(range)).expect("a free frame").pages, 2);
    assert_eq!(migrate(machine.private), 2);
    let mut runs = Vec::new();
    space.snapshot(range, &mut runs).expect("mapped");
    assert!(runs.is_empty(), "nobody else reaches private device memory");
    assert_eq!(kind(&space, range.start(), Access::Read).0, Backing::Anonymous);
    assert_eq!((byte(&space, range.start()), byte(&space, page_at(range, 1))), (1, 0));
    assert_eq!(machine.host.stats().free_device_pages, 2 * DEVICE_PAGES);
    let child = space.fork().expect("memory");
    assert_eq!(migrate(machine.private), 0, "shared pages are refused");
    drop(child);
    done(&machine.host);
}

#[test]
fn lent_pages_are_absent_until_touched() {
    let (machine, space) = world();
    let range = space.map(MapRequest::anonymous(1)).expect("room");
    space.cpu_write(range.start(), &[1]).expect("mapped");
    let lend = SpaceChange::Exclusive { range, owner: ProviderId(9) };
    assert_eq!(space.change(lend).expect("mapped").pages, 1);
    let mut runs = Vec::new();
    space.snapshot(range, &mut runs).expect("mapped");
    assert!(runs.is_empty());
    assert_eq!(byte(&space, range.start()), 1);
    space.snapshot(range, &mut runs).expect("mapped");
    assert_eq!(runs.len(), 1);
    done(&machine.host);
}

#[test]
fn failed_memory_is_lost_to_everybody_and_can_be_replaced() {
    let (machine, space) = world();
    let range = space.map(MapRequest::anonymous(2)).expect("room");
    space.cpu_write(range.start(), &[1]).expect("mapped");
    let run = fault(&space, range.start(), Access::Read).expect("mapped");
    let child = space.fork().expect("memory");
    space.change(SpaceChange::Poison(range.start())).expect("present");
    for process in [&space, &child] {
        let lost = Err(FaultError::NoMapping { at: range.start() });
        assert_eq!(fault(process, range.start(), Access::Read), lost);
    }
    assert!(machine.host.read(run.phys, &mut [0]).is_err());
    space.change(SpaceChange::Discard(range)).expect("mapped");
    assert_eq!(byte(&space, range.start()), 0);
    assert_eq!(machine.host.stats().poisoned_frames, 1);

    let shmem = machine.host.new_shmem(1);
    let source = Source::Shared { object: shmem, first: 0 };
    let shared = space.map(MapRequest::anonymous(1).of(source)).expect("room");
    space.cpu_write(shared.start(), &[1]).expect("mapped");
    space.change(SpaceChange::Poison(shared.start())).expect("present");
    space.change(SpaceChange::Discard(shared)).expect("mapped");
    assert!(space.cpu_read(shared.start(), &mut [0]).is_err(), "the object has lost it, not the mapping");
    space.change(SpaceChange::Remove(shared)).expect("shared memory");
    assert_eq!(byte(&space, shared.start()), 0);
    done(&machine.host);
}

#[test]
fn devices_do_not_reach_private_memory_and_the_cpu_does() {
    let (machine, space) = world();
    let range = space.map(MapRequest::anonymous(1)).expect("room");
    space.cpu_write(range.start(), b"plain text").expect("mapped");
    let encrypt = |mode| space.change(SpaceChange::Encrypt(range, mode)).expect("own memory");
    let bus = Bus::new(Arc::clone(&machine.host) as Arc<dyn HostMemory>);
    let device = bus.attach(DeviceSpec::new("nic")).expect("room on the bus");
    let seen = || {
        let run = fault(&space, range.start(), Access::Read).expect("mapped");
        let (mut by_cpu, mut by_device) = ([0; 10], [0; 10]);
        machine.host.read(run.phys, &mut by_cpu).expect("present");
        assert_eq!(&by_cpu, b"plain text");
        let by_device = device.read(run.phys.to_dma_identity(), &mut by_device).map(|()| by_device);
        (run.backing, by_device, run.phys)
    };
    let refused = |(backing, outcome, phys): (Backing, Result<[u8; 10], DmaError>, PhysAddr)| {
        assert_eq!((backing, outcome), (Backing::EncryptedPrivate, Err(DmaError::Private { at: phys })));
    };
    encrypt(Encryption::Private);
    refused(seen());
    space.change(SpaceChange::Migrate(range)).expect("a free frame");
    refused(seen());
    space.change(SpaceChange::SwapOut(range)).expect("swap");
    refused(seen());
    encrypt(Encryption::Shared);
    let (backing, outcome, _) = seen();
    assert_eq!((backing, outcome), (Backing::EncryptedShared, Ok(*b"plain text")));
    drop(device);
    done(&machine.host);
}

#[test]
fn hugetlb_comes_whole_and_is_never_cut() {
    let (machine, space) = world();
    let object = machine.host.new_hugetlb(2);
    let source = Source::Shared { object, first: 0 };
    let range = space.map(MapRequest::anonymous(2 * HUGE_PAGES).of(source)).expect("room");
    let run = fault(&space, page_at(range, 9), Access::Read).expect("mapped");
    assert_eq!((run.backing, run.order_shift, run.writable), (Backing::Hugetlb, 21, true));
    let cut = part(range, 1, 1);
    assert_eq!(space.unmap(cut).err(), Some(SimError::BadRange { range: cut }));
    assert!(space.change(SpaceChange::Split(range)).is_err());
    space.cpu_write(page_at(range, 9), &[9]).expect("mapped");
    assert_eq!(space.change(SpaceChange::Migrate(cut)).expect("a free block").pages, HUGE_PAGES);
    assert_eq!(byte(&space, page_at(range, 9)), 9);
    machine.host.change(ObjectChange::Truncate { object, pages: HUGE_PAGES }).expect("whole pages");
    assert_eq!(byte(&space, page_at(range, 9)), 9);
    done(&machine.host);
}

/// If this fails, running out of memory loses or changes something.
#[test]
fn out_of_memory_is_an_error_that_changes_nothing() {
    let machine = machine(SimConfig { ram_pages: 1, seed: 1, faults: FaultMode::Wait, nodes: 1 });
    let space = machine.host.new_space();
    let range = space.map(MapRequest::anonymous(HUGE_PAGES).huge()).expect("room");
    let mut pages = 0;
    while space.cpu_write(page_at(range, pages), &[pages as u8]).is_ok() {
        pages += 1;
    }
    assert_eq!(pages, HUGE_PAGES - 2, "all but the host's own two");
    let at = page_at(range, pages);
    assert_eq!(fault(&space, at, Access::Write), Err(FaultError::OutOfMemory { at }));
    assert_eq!(kind(&space, at, Access::Read), (Backing::Zero, false), "the page of zeroes costs nothing");
    for change in [SpaceChange::Migrate(range), SpaceChange::Collapse(range)] {
        assert_eq!(space.change(change).err(), Some(SimError::OutOfMemory));
    }
    assert!((0..pages).all(|page| byte(&space, page_at(range, page)) == page as u8));
    done(&machine.host);
    space.change(SpaceChange::SwapOut(part(range, 0, 10))).expect("swap");
    space.cpu_write(at, &[1]).expect("there is room again");
    done(&machine.host);
}

#[test]
fn one_seed_gives_one_host() {
    let layout = |seed| {
        let host = machine(small(seed, FaultMode::Wait)).host;
        let space = host.new_space();
        let range = space.map(MapRequest::anonymous(8)).expect("room");
        let mut runs = Vec::new();
        space.fault(range, Access::Write, &mut runs).expect("memory");
        runs.into_iter().map(|run| (run.start, run.phys)).collect::<Vec<_>>()
    };
    assert_eq!(layout(3), layout(3));
    assert_ne!(layout(3), layout(4));
    assert!(layout(3).len() > 4, "frames are scattered");
}
