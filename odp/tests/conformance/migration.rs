//! What needs a device with memory of its own, or a kernel that moves pages on demand: the simulated address space only.

use crate::Test;
use crate::device::Device;
use crate::sim::{DEVICE_PAGES, OURS, SimWorld, THEIRS};
use crate::world::{Allow, Area, Cpu, Kind, Verdict, World, fill, holds, is_zero};
use hw_model::addr::PAGE_SIZE;
use odp::page::Backing;
use odp::space::sim::{Encryption, HUGE_PAGES, MapRequest, ObjectChange, SimError, Source, SpaceChange};
use odp::space::{Access, AddressSpace, FaultError};

pub const ALL: &[(&str, Test)] = &[
    ("migrate", Test::Sim(migrate)),
    ("migrate_fault_back", Test::Sim(migrate_fault_back)),
    ("migrate_partial", Test::Sim(migrate_partial)),
    ("migrate_mixed", Test::Sim(migrate_mixed)),
    ("migrate_shared_refused", Test::Sim(migrate_shared)),
    ("migrate_multiple", Test::Sim(migrate_multiple)),
    ("migrate_release", Test::Sim(migrate_release)),
    ("migrate_coherent", Test::Sim(migrate_coherent)),
    ("migrate_foreign_comes_back", Test::Sim(migrate_foreign)),
    ("migrate_allocation_fails_on_the_device", Test::Sim(migrate_device_full)),
    ("migrate_allocation_fails_on_the_way_back", Test::Sim(migrate_host_full)),
    ("migrate_huge", Test::Sim(migrate_huge)),
    ("migrate_huge_empty", Test::Sim(migrate_huge_empty)),
    ("migrate_huge_zero", Test::Sim(migrate_huge_zero)),
    ("migrate_huge_freed", Test::Sim(migrate_huge_freed)),
    ("migrate_huge_partly_unmapped", Test::Sim(migrate_huge_partly_unmapped)),
    ("migrate_huge_moved_by_mremap", Test::Sim(migrate_huge_moved)),
    ("migrate_huge_allocation_fails", Test::Sim(migrate_huge_allocation_fails)),
    ("exclusive_access", Test::Sim(exclusive)),
    ("exclusive_access_revoked_by_mprotect", Test::Sim(exclusive_mprotect)),
    ("exclusive_access_revoked_by_copy_on_write", Test::Sim(exclusive_cow)),
    ("long_term_pin_brings_pages_back", Test::Sim(long_term_pin)),
    ("non_blockable_invalidation_answers_cannot", Test::Sim(non_blockable)),
    ("swap_out_and_in", Test::Sim(swap)),
    ("pages_move_between_nodes", Test::Sim(nodes)),
    ("poisoned_page_is_refused", Test::Sim(poison)),
    ("encrypted_pages_say_so", Test::Sim(encrypted)),
    ("special_memory_is_refused", Test::Sim(special)),
    ("file_write_back_tells_the_device", Test::Sim(write_back)),
];

const PAGES: u64 = 16;

fn anonymous(world: &SimWorld, salt: u64) -> Area {
    let area = world.map(Kind::Anonymous, PAGES).expect("room");
    fill(world, area.range, salt);
    area
}

fn backing(device: &Device, area: &Area, page: u64) -> Backing {
    device.entry(area.page(page)).expect("it has just been used").backing
}

fn free_on_devices(world: &SimWorld) -> u64 {
    world.host.stats().free_device_pages
}

fn migrate(world: &SimWorld) -> Verdict {
    let area = anonymous(world, 1);
    let device = world.ours(&[area.range]);
    assert!(device.holds(area.range, 1));
    assert_eq!(world.migrate(area.range), PAGES);
    assert_eq!(device.present(area.range), 0, "the device was told that they go");
    assert!(device.holds(area.range, 1));
    assert_eq!(backing(&device, &area, 3), Backing::DevicePrivate, "its own memory is as good as present");
    device.fill(area.range, 2);
    assert_eq!(free_on_devices(world), 2 * DEVICE_PAGES + 64 - PAGES, "using it has not brought it back");
    Ok(())
}

fn migrate_fault_back(world: &SimWorld) -> Verdict {
    let area = anonymous(world, 3);
    let device = world.ours(&[area.range]);
    world.migrate(area.range);
    device.fill(area.range, 4);
    assert!(holds(world, area.range, 4), "the program sees what the device wrote in its own memory");
    assert_eq!(device.present(area.range), 0, "and the device was told that the pages left");
    assert_eq!(free_on_devices(world), 2 * DEVICE_PAGES + 64);
    device.fill(area.range, 5);
    assert!(holds(world, area.range, 5));
    assert_eq!(backing(&device, &area, 0), Backing::Anonymous);
    Ok(())
}

fn migrate_partial(world: &SimWorld) -> Verdict {
    let area = anonymous(world, 6);
    let device = world.ours(&[area.range]);
    assert_eq!(world.migrate(area.part(4, 5)), 5);
    assert!(device.holds(area.range, 6));
    let kinds: Vec<_> = (0..PAGES).map(|page| backing(&device, &area, page)).collect();
    let there = |page: u64| (4..9).contains(&page);
    let expected = |page| if there(page) { Backing::DevicePrivate } else { Backing::Anonymous };
    assert_eq!(kinds, (0..PAGES).map(expected).collect::<Vec<_>>());
    // One page comes back; the others stay.
    world.put(area.page(5), 9);
    assert_eq!(free_on_devices(world), 2 * DEVICE_PAGES + 64 - 4);
    assert_eq!(device.read(area.page(5)), Ok(9));
    Ok(())
}

/// A mapping of each kind in one range: what can go goes, and every byte is where the program looks for it.
fn migrate_mixed(world: &SimWorld) -> Verdict {
    let area = anonymous(world, 7);
    world.replace(area.part(2, 2));
    world.protect(area.part(4, 2), Allow::Read);
    world.protect(area.part(6, 1), Allow::Nothing);
    let object = world.host.new_shmem(2);
    let shared = MapRequest::anonymous(2).of(Source::Shared { object, first: 0 }).fixed(area.page(8));
    world.sim.map(shared).expect("room");
    fill(world, area.part(8, 2), 8);
    world.unmap(area.part(12, 1));
    assert_eq!(
        world.migrate(area.range),
        2 + 2 + 2 + 1 + 2 + 3,
        "all but what is closed, shared, or not there"
    );
    let device = world.ours(&[area.part(0, 12)]);
    assert!(device.is_zero(area.part(2, 2)), "what was never touched went as zeroes");
    assert!(device.holds(area.part(8, 2), 8));
    assert_eq!(backing(&device, &area, 8), Backing::Shared);
    let refused = FaultError::Permission { at: area.page(5), access: Access::Write };
    assert_eq!(device.write(area.page(5), 1), Err(refused), "read-only there as here");
    assert_eq!(device.read(area.page(5)).ok(), Some(world.get(area.page(5))));
    assert!(is_zero(world, area.part(2, 2)) && holds(world, area.part(0, 2), 7));
    Ok(())
}

fn migrate_shared(world: &SimWorld) -> Verdict {
    let area = anonymous(world, 9);
    let child = world.sim.fork().expect("memory");
    assert_eq!(world.migrate(area.range), 0, "two processes have them");
    drop(child);
    assert_eq!(world.migrate(area.range), PAGES, "and now one");
    let shared = world.map(Kind::Shared, PAGES)?;
    fill(world, shared.range, 10);
    assert_eq!(world.migrate(shared.range), 0);
    assert!(holds(world, shared.range, 10) && holds(world, area.range, 9));
    Ok(())
}

fn migrate_multiple(world: &SimWorld) -> Verdict {
    let area = anonymous(world, 0);
    let device = world.ours(&[area.range]);
    for round in 1..200 {
        assert_eq!(world.migrate(area.range), PAGES);
        device.fill(area.range, round);
        assert!(holds(world, area.range, round), "round {round}");
        fill(world, area.range, round + 1000);
        assert!(device.holds(area.range, round + 1000));
    }
    Ok(())
}

/// The device closes, and then its driver goes, with pages in its memory.
fn migrate_release(world: &SimWorld) -> Verdict {
    let area = anonymous(world, 11);
    let device = world.ours(&[area.range]);
    world.migrate(area.range);
    device.fill(area.range, 12);
    drop(device);
    let back = world.host.evict_device(world.private).and_then(odp::space::sim::SimOp::run);
    assert_eq!(back.expect("free frames").pages, PAGES);
    assert_eq!(free_on_devices(world), 2 * DEVICE_PAGES + 64);
    assert!(holds(world, area.range, 12));
    Ok(())
}

fn migrate_coherent(world: &SimWorld) -> Verdict {
    let area = anonymous(world, 13);
    let (owner, other) = (
        Device::open(std::sync::Arc::new(world.sim.seen_by(THEIRS)), &[area.range]),
        world.device(&[area.range]),
    );
    let memory = world.coherent;
    assert_eq!(world.change(SpaceChange::ToDevice { range: area.range, memory }), PAGES);
    for device in [&owner, &other] {
        assert!(device.holds(area.range, 13));
        assert_eq!(backing(device, &area, 1), Backing::DeviceCoherent);
    }
    other.fill(area.range, 14);
    assert!(holds(world, area.range, 14), "the program reaches it where it is");
    assert_eq!(free_on_devices(world), 2 * DEVICE_PAGES + 64 - PAGES);
    assert_eq!(world.change(SpaceChange::FromDevice(area.range)), PAGES);
    assert_eq!((owner.present(area.range), other.present(area.range)), (0, 0));
    assert!(owner.holds(area.range, 14));
    Ok(())
}

fn migrate_foreign(world: &SimWorld) -> Verdict {
    let area = anonymous(world, 15);
    world.migrate(area.range);
    let (ours, theirs) = (world.ours(&[area.range]), world.device(&[area.range]));
    ours.fill(area.range, 16);
    assert!(theirs.holds(area.range, 16), "for anybody else it comes back");
    assert_eq!(backing(&theirs, &area, 2), Backing::Anonymous);
    assert_eq!(free_on_devices(world), 2 * DEVICE_PAGES + 64);
    assert!(ours.holds(area.range, 16));
    Ok(())
}

fn migrate_device_full(world: &SimWorld) -> Verdict {
    let area = world.map(Kind::Anonymous, 100)?;
    fill(world, area.range, 17);
    let change = SpaceChange::ToDevice { range: area.range, memory: world.small };
    assert_eq!(world.change(change), 64, "as many as there is room for");
    assert_eq!(world.change(change), 0);
    let device = world.ours(&[area.range]);
    assert!(device.holds(area.range, 17));
    assert!(holds(world, area.range, 17));
    Ok(())
}

/// The host has no frame for what has to come back. If this fails, the page is lost on the way.
fn migrate_host_full(world: &SimWorld) -> Verdict {
    let area = anonymous(world, 18);
    let device = world.ours(&[area.range]);
    world.migrate(area.range);
    let hog = world.sim.map(MapRequest::anonymous(16 * HUGE_PAGES)).expect("address space");
    let mut taken = 0;
    while world.sim.cpu_write(hog.start().offset(taken * PAGE_SIZE), &[1]).is_ok() {
        taken += 1;
    }
    let at = area.page(4);
    let mut word = [0; 8];
    assert_eq!(world.sim.cpu_read(at, &mut word), Err(FaultError::OutOfMemory { at }));
    assert!(matches!(world.sim.pin(area.part(4, 1)), Err(FaultError::OutOfMemory { .. })));
    assert!(device.holds(area.range, 18), "the pages are where they were");
    world.unmap(hog);
    assert!(holds(world, area.range, 18));
    Ok(())
}

/// A huge page, written.
fn huge(world: &SimWorld, salt: u64) -> Area {
    let area = world.map(Kind::Huge, HUGE_PAGES).expect("room");
    fill(world, area.range, salt);
    area
}

fn order(device: &Device, area: &Area, page: u64) -> (Backing, u8) {
    let entry = device.entry(area.page(page)).expect("it has just been used");
    (entry.backing, entry.order_shift)
}

const ON_DEVICE: (Backing, u8) = (Backing::DevicePrivate, 21);

fn migrate_huge(world: &SimWorld) -> Verdict {
    let area = huge(world, 19);
    let device = world.ours(&[area.range]);
    assert_eq!(world.migrate(area.range), HUGE_PAGES);
    assert!(device.holds(area.range, 19));
    assert_eq!(order(&device, &area, 77), ON_DEVICE, "it went as one");
    device.fill(area.range, 20);
    assert_eq!(world.get(area.page(5)), device.read(area.page(5)).expect("readable"));
    assert!(device.holds(area.range, 20) && holds(world, area.range, 20));
    assert_eq!(order(&device, &area, 77), (Backing::TransparentHuge, 21), "and came back as one");
    assert_eq!(free_on_devices(world), 2 * DEVICE_PAGES + 64);
    Ok(())
}

fn migrate_huge_empty(world: &SimWorld) -> Verdict {
    let area = world.map(Kind::Huge, HUGE_PAGES)?;
    assert_eq!(world.migrate(area.range), HUGE_PAGES, "what was never touched");
    let device = world.ours(&[area.range]);
    assert!(device.is_zero(area.range));
    assert_eq!(order(&device, &area, 1), ON_DEVICE);
    device.fill(area.range, 21);
    assert!(holds(world, area.range, 21));
    Ok(())
}

fn migrate_huge_zero(world: &SimWorld) -> Verdict {
    let area = world.map(Kind::Huge, HUGE_PAGES)?;
    assert!(is_zero(world, area.range), "the program has read it: it is the page of zeroes");
    let device = world.ours(&[area.range]);
    assert!(device.is_zero(area.range));
    assert_eq!(world.migrate(area.range), HUGE_PAGES);
    assert!(device.is_zero(area.range));
    assert_eq!(order(&device, &area, 1), ON_DEVICE);
    device.fill(area.range, 22);
    assert!(holds(world, area.range, 22));
    Ok(())
}

fn migrate_huge_freed(world: &SimWorld) -> Verdict {
    let area = huge(world, 23);
    let device = world.ours(&[area.range]);
    world.migrate(area.range);
    assert!(device.holds(area.range, 23));
    world.discard(area.range);
    assert_eq!(free_on_devices(world), 2 * DEVICE_PAGES + 64, "its pages are given back");
    assert!(device.is_zero(area.range) && is_zero(world, area.range));
    Ok(())
}

fn migrate_huge_partly_unmapped(world: &SimWorld) -> Verdict {
    let area = huge(world, 24);
    let device = world.ours(&[area.range]);
    world.migrate(area.range);
    assert!(device.holds(area.range, 24));
    world.unmap(area.part(100, 200));
    assert_eq!(free_on_devices(world), 2 * DEVICE_PAGES + 64 - HUGE_PAGES + 200);
    assert!(device.holds(area.part(0, 100), 24), "the rest is where it was");
    assert_eq!(order(&device, &area, 0), (Backing::DevicePrivate, 12), "in small pages");
    assert!(holds(world, area.part(0, 100), 24), "and comes back page by page");
    let gone = FaultError::NoMapping { at: area.page(150) };
    assert_eq!(device.read(area.page(150)), Err(gone));
    Ok(())
}

fn migrate_huge_moved(world: &SimWorld) -> Verdict {
    let (area, to) = (huge(world, 25), world.map(Kind::Huge, HUGE_PAGES)?);
    let device = world.ours(&[area.range, to.range]);
    world.migrate(area.range);
    assert!(device.holds(area.range, 25));
    world.remap(area.range, to.page(0));
    assert!(device.holds(to.range, 25));
    assert_eq!(order(&device, &to, 9), ON_DEVICE, "it was moved as one, on the device");
    assert_eq!(device.read(area.page(9)), Err(FaultError::NoMapping { at: area.page(9) }));
    assert!(holds(world, to.range, 25));
    Ok(())
}

fn migrate_huge_allocation_fails(world: &SimWorld) -> Verdict {
    // One small page of each block of the device's memory is in use, so no huge page is free there.
    let hog = world.map(Kind::Anonymous, HUGE_PAGES + 1)?;
    fill(world, hog.range, 1);
    assert_eq!(world.migrate(hog.range), HUGE_PAGES + 1);
    let area = huge(world, 26);
    let device = world.ours(&[area.range]);
    assert_eq!(world.migrate(area.range), HUGE_PAGES - 1, "by small pages, as many as there is room for");
    assert!(device.holds(area.range, 26));
    assert_eq!(order(&device, &area, 3), (Backing::DevicePrivate, 12));
    assert!(holds(world, area.range, 26) && holds(world, hog.range, 1));
    Ok(())
}

fn lend(world: &SimWorld, area: &Area) -> u64 {
    world.change(SpaceChange::Exclusive { range: area.range, owner: OURS })
}

/// If this fails, a program and a device do atomics on one word at the same time, each by its own means.
fn exclusive(world: &SimWorld) -> Verdict {
    let area = anonymous(world, 27);
    let (ours, theirs) = (world.ours(&[area.range]), world.device(&[area.range]));
    assert!(ours.holds(area.range, 27) && theirs.holds(area.range, 27));
    assert_eq!(lend(world, &area), PAGES);
    assert_eq!(theirs.present(area.range), 0, "everybody else has let go");
    assert!(theirs.snapshot(area.range).is_empty());
    ours.fill(area.range, 28);
    assert_eq!(ours.present(area.range), PAGES);
    assert_eq!(lend(world, &area), PAGES, "again, which is harmless");
    assert!(ours.holds(area.range, 28));
    let clears = ours.clears();
    assert!(holds(world, area.range, 28), "the program touches it, and has it back");
    assert!(ours.clears() > clears, "whom it was lent to was told first");
    assert_eq!(ours.present(area.range), 0);
    assert!(theirs.holds(area.range, 28) && ours.holds(area.range, 28));
    Ok(())
}

fn exclusive_mprotect(world: &SimWorld) -> Verdict {
    let area = anonymous(world, 29);
    let device = world.ours(&[area.range]);
    lend(world, &area);
    device.fill(area.range, 30);
    world.protect(area.range, Allow::Read);
    assert_eq!(device.present(area.range), 0);
    let refused = FaultError::Permission { at: area.page(2), access: Access::Write };
    assert_eq!(device.write(area.page(2), 1), Err(refused));
    let lent = world.sim.change(SpaceChange::Exclusive { range: area.range, owner: OURS });
    let refused = FaultError::Permission { at: area.page(0), access: Access::Write };
    assert_eq!(lent.err(), Some(SimError::Fault(refused)), "what may not be written is not lent");
    assert!(holds(world, area.range, 30) && device.holds(area.range, 30));
    Ok(())
}

fn exclusive_cow(world: &SimWorld) -> Verdict {
    let area = anonymous(world, 31);
    let device = world.ours(&[area.range]);
    lend(world, &area);
    device.fill(area.range, 32);
    let child = |cpu: &dyn Cpu| {
        let seen = holds(cpu, area.range, 32);
        fill(cpu, area.range, 33);
        seen
    };
    let seen = world.fork(&child, &mut || {
        assert_eq!(device.present(area.range), 0, "a fork takes back what was lent");
        // What is shared becomes the parent's own before it is lent again.
        assert_eq!(lend(world, &area), PAGES);
        device.fill(area.range, 34);
    });
    assert!(!seen || holds(world, area.range, 34), "the parent's device has written its own");
    assert!(holds(world, area.range, 34));
    Ok(())
}

fn long_term_pin(world: &SimWorld) -> Verdict {
    let (private, coherent) = (anonymous(world, 35), anonymous(world, 36));
    world.migrate(private.range);
    world.change(SpaceChange::ToDevice { range: coherent.range, memory: world.coherent });
    for (area, salt) in [(private, 35), (coherent, 36)] {
        let device = world.ours(&[area.range]);
        assert!(device.holds(area.range, salt));
        let pin = world.sim.pin(area.range).expect("free frames");
        assert_eq!(device.present(area.range), 0, "the device was told that they go");
        assert!(pin.runs().iter().all(|run| run.backing == Backing::Anonymous && run.writable));
        let places: Vec<_> = pin.runs().iter().map(|run| (run.phys, run.pages)).collect();
        for change in [
            SpaceChange::Migrate(area.range),
            SpaceChange::SwapOut(area.range),
            SpaceChange::ToDevice { range: area.range, memory: world.private },
        ] {
            assert_eq!(world.change(change), 0, "{change:?} has moved a pinned page");
        }
        assert!(device.holds(area.range, salt));
        assert_eq!(device.entry(area.page(0)).expect("read").phys, places[0].0);
        // The child gets copies: what comes in by DMA later is the parent's.
        let host = world.space().memory();
        let kept = world.fork(&|cpu| holds(cpu, area.range, salt), &mut || {
            host.write(places[0].0, &9_u64.to_ne_bytes()).expect("pinned");
        });
        assert!(kept && world.get(area.page(0)) == 9);
        world.unmap(area.range);
        host.write(places[0].0, &[1; 8]).expect("the frames are in use still, though nothing maps them");
        let free = world.host.stats().free_frames;
        drop(pin);
        assert_eq!(world.host.stats().free_frames, free + PAGES);
        assert!(host.write(places[0].0, &[1; 8]).is_err(), "and now they are free");
    }
    assert_eq!(free_on_devices(world), 2 * DEVICE_PAGES + 64);
    let file = world.map(Kind::File, 1)?;
    let refused = world.sim.pin(file.range).map(drop);
    assert!(matches!(refused, Err(FaultError::Permission { .. })), "a shared file has to know who writes");
    Ok(())
}

fn non_blockable(world: &SimWorld) -> Verdict {
    let area = anonymous(world, 37);
    let device = world.device(&[area.range]);
    assert!(device.holds(area.range, 37));
    let discard = SpaceChange::Discard(area.range);
    let cannot = device.in_a_burst(|| world.sim.try_change(discard).map(drop));
    assert_eq!(cannot, Err(SimError::WouldWait { range: area.range }));
    assert!(device.holds(area.range, 37) && holds(world, area.range, 37), "nothing has changed");
    assert_eq!(world.sim.try_change(discard).expect("nothing to wait for").pages, PAGES);
    assert!(device.is_zero(area.range));
    let stats = world.sim.notifiers().stats();
    assert_eq!((stats.running, stats.refused), (0, 1));
    Ok(())
}

fn swap(world: &SimWorld) -> Verdict {
    let area = anonymous(world, 38);
    let device = world.device(&[area.range]);
    assert!(device.holds(area.range, 38));
    assert_eq!(world.change(SpaceChange::SwapOut(area.range)), PAGES);
    assert_eq!(device.present(area.range), 0);
    assert!(device.holds(area.range, 38), "the device's fault brings them in");
    device.fill(area.range, 39);
    world.change(SpaceChange::SwapOut(area.range));
    assert!(holds(world, area.range, 39));
    assert_eq!(world.host.stats().swap_slots, 0);
    Ok(())
}

fn nodes(world: &SimWorld) -> Verdict {
    let area = anonymous(world, 40);
    let device = world.device(&[area.range]);
    for node in [1, 0, 1] {
        world.change(SpaceChange::ToNode { range: area.range, node });
        assert!(device.holds(area.range, 40));
        let on = |page| world.host.node_of(device.entry(area.page(page)).expect("read").phys);
        assert!((0..PAGES).all(|page| on(page) == Some(node)));
        assert_eq!(
            world.change(SpaceChange::ToNode { range: area.range, node }),
            0,
            "they are there already"
        );
    }
    let nowhere = world.sim.change(SpaceChange::ToNode { range: area.range, node: 2 }).err();
    assert_eq!(nowhere, Some(SimError::Gone));
    Ok(())
}

fn poison(world: &SimWorld) -> Verdict {
    let area = anonymous(world, 41);
    let device = world.device(&[area.range]);
    assert!(device.holds(area.range, 41));
    world.change(SpaceChange::Poison(area.page(6)));
    assert_eq!(device.read(area.page(6)), Err(FaultError::NoMapping { at: area.page(6) }));
    assert!(device.holds(area.part(0, 6), 41), "the others are as they were");
    world.discard(area.part(6, 1));
    assert!(device.is_zero(area.part(6, 1)));
    Ok(())
}

fn encrypted(world: &SimWorld) -> Verdict {
    let area = anonymous(world, 42);
    let device = world.device(&[area.range]);
    device.fault(area.range, Access::Read).expect("mapped");
    for (mode, kind) in [
        (Encryption::Private, Backing::EncryptedPrivate),
        (Encryption::Shared, Backing::EncryptedShared),
        (Encryption::Private, Backing::EncryptedPrivate),
    ] {
        world.change(SpaceChange::Encrypt(area.range, mode));
        assert_eq!(device.present(area.range), 0, "it has to ask again");
        device.fault(area.range, Access::Write).expect("mapped");
        assert_eq!(backing(&device, &area, 3), kind);
        let phys = device.entry(area.page(3)).expect("faulted").phys;
        let private = world.space().memory().private_pages().expect("a host knows them");
        assert_eq!(private.is_private(phys), kind == Backing::EncryptedPrivate);
        assert!(holds(world, area.range, 42), "the guest sees what it saw");
    }
    Ok(())
}

fn special(world: &SimWorld) -> Verdict {
    let range = world.sim.map(MapRequest::anonymous(4).of(Source::Special)).expect("room");
    let device = world.device(&[range]);
    let at = range.start();
    assert_eq!(device.read(at), Err(FaultError::Special { at }));
    assert_eq!(device.write(at, 1), Err(FaultError::Special { at }));
    Ok(())
}

/// If this fails, what a device writes after a write-back never reaches the disk.
fn write_back(world: &SimWorld) -> Verdict {
    let area = world.map(Kind::File, PAGES)?;
    let object = world.object(&area);
    let device = world.device(&[area.range]);
    device.fill(area.range, 43);
    assert!(device.entry(area.page(1)).expect("written").writable);
    world.write_back(&area);
    assert_eq!(
        device.present(area.range),
        0,
        "the page is clean, and the device has to say before it writes"
    );
    assert!(device.holds(area.range, 43));
    assert!(!device.entry(area.page(1)).expect("read").writable);
    device.fill(area.range, 44);
    let evict = ObjectChange::Evict { object, first: 0, end: PAGES };
    assert_eq!(world.host.change(evict).expect("a file").pages, 0, "dirty pages stay");
    world.write_back(&area);
    assert_eq!(world.host.change(evict).expect("a file").pages, PAGES);
    assert!(device.holds(area.range, 44), "read from the disk");
    Ok(())
}
