//! What holds for every address space.

use crate::Test;
use crate::device::Device;
use crate::world::{Allow, Area, By, Cpu, Kind, Skip, Verdict, World, fill, holds, is_zero, pattern};
use hw_model::addr::{PAGE_SIZE, VirtAddr};
use hw_model::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use odp::page::Backing;
use odp::space::{Access, FaultError};

pub const ALL: &[(&str, Test)] = &[
    ("open_and_close", Test::Any(open_and_close)),
    ("anon_read", Test::Any(anon_read)),
    ("anon_read_untouched", Test::Any(anon_read_untouched)),
    ("anon_write", Test::Any(anon_write)),
    ("anon_write_and_read_by_both", Test::Any(both)),
    ("snapshot_does_not_fault", Test::Any(snapshot_does_not_fault)),
    ("discarded_memory_reads_as_zero", Test::Any(discarded)),
    ("several_devices_on_one_range", Test::Any(several_devices)),
    ("compound_order_huge", Test::Any(huge_write)),
    ("compound_order_small", Test::Mapped(compound_order_small)),
    ("anon_read_zero_page", Test::Mapped(anon_read_zero_page)),
    ("anon_read_prot_none_refused", Test::Mapped(anon_read_prot_none)),
    ("anon_write_read_only_refused_then_allowed", Test::Mapped(anon_write_read_only)),
    ("read_only_pages_fault_read_only", Test::Mapped(read_only_pages)),
    ("mprotect_takes_write_away", Test::Mapped(mprotect_takes_write_away)),
    ("write_after_fork_private", Test::Mapped(write_after_fork_private)),
    ("write_after_fork_private_by_the_child", Test::Mapped(write_after_fork_by_the_child)),
    ("write_after_fork_shared", Test::Mapped(write_after_fork_shared)),
    ("hugetlb_write", Test::Mapped(hugetlb_write)),
    ("huge_page_split_by_mprotect", Test::Mapped(huge_page_split)),
    ("file_read", Test::Mapped(file_read)),
    ("file_write_reaches_the_file", Test::Mapped(file_write)),
    ("file_write_after_write_back_is_dirty_again", Test::Mapped(file_write_back)),
    ("private_file_write_stays_private", Test::Mapped(private_file_write)),
    ("shared_memory_write_is_seen_by_another_process", Test::Mapped(shared_write)),
    ("truncated_file_is_refused", Test::Mapped(truncated)),
    ("file_truncated_by_another_process_is_refused", Test::Mapped(truncated_by_another)),
    ("unmapped_memory_is_refused", Test::Mapped(unmapped)),
    ("map_fixed_over_memory_in_use", Test::Mapped(map_fixed)),
    ("mremap_moves_the_bytes", Test::Mapped(mremap_moves)),
    ("teardown_racing_reads", Test::Mapped(teardown_racing_reads)),
    ("protection_racing_writes", Test::Mapped(protection_racing_writes)),
    ("many_threads_change_their_memory", Test::Mapped(many_threads)),
];

/// Pages of most behaviours.
const PAGES: u64 = 16;

fn anonymous(world: &dyn World) -> Result<Area, Skip> {
    world.map(Kind::Anonymous, PAGES)
}

fn refused(area: &Area, page: u64, access: Access) -> FaultError {
    FaultError::Permission { at: area.page(page), access }
}

/// If this fails, opening a device and closing it again leaves something behind.
fn open_and_close(world: &dyn World) -> Verdict {
    let area = anonymous(world)?;
    let space = world.space();
    let before = space.notifiers().stats().intervals;
    for _ in 0..8 {
        let (first, second) = (world.device(&[area.range]), world.device(&[area.range]));
        assert_eq!(space.notifiers().stats().intervals, before + 2);
        drop(first);
        second.write(area.page(1), 7).expect("open still");
    }
    let stats = space.notifiers().stats();
    assert_eq!((stats.intervals, stats.running), (before, 0));
    Ok(())
}

fn anon_read(world: &dyn World) -> Verdict {
    let area = anonymous(world)?;
    fill(world, area.range, 1);
    let device = world.device(&[area.range]);
    assert!(device.holds(area.range, 1));
    fill(world, area.range, 2);
    assert!(device.holds(area.range, 2), "what the program writes later is seen through the same entries");
    Ok(())
}

fn anon_read_untouched(world: &dyn World) -> Verdict {
    let area = anonymous(world)?;
    let device = world.device(&[area.range]);
    assert!(device.is_zero(area.range));
    assert_eq!(device.present(area.range), PAGES);
    fill(world, area.range, 3);
    assert!(device.holds(area.range, 3), "the first write of the program is seen");
    Ok(())
}

fn anon_read_zero_page(world: &dyn World) -> Verdict {
    let area = anonymous(world)?;
    assert!(is_zero(world, area.range), "the program reads first: the page of zeroes is mapped");
    let device = world.device(&[area.range]);
    assert!(device.is_zero(area.range));
    let entry = device.entry(area.page(0)).expect("read just now");
    assert_eq!((entry.backing, entry.writable), (Backing::Zero, false));
    device.fill(area.part(2, 3), 4);
    assert!(holds(world, area.part(2, 3), 4), "a write gets a page of its own");
    assert!(is_zero(world, area.part(5, PAGES - 5)), "and the page of zeroes stays that");
    assert!(device.entry(area.page(2)).is_some_and(|entry| entry.writable));
    Ok(())
}

fn anon_read_prot_none(world: &dyn World) -> Verdict {
    let area = anonymous(world)?;
    fill(world, area.range, 5);
    let device = world.device(&[area.range]);
    world.protect(area.part(4, 2), Allow::Nothing);
    assert_eq!(device.read(area.page(4)), Err(refused(&area, 4, Access::Read)));
    assert_eq!(device.fault(area.range, Access::Read), Err(refused(&area, 4, Access::Read)));
    assert!(device.holds(area.part(0, 4), 5), "those before it can be read");
    world.protect(area.part(4, 2), Allow::ReadWrite);
    assert!(device.holds(area.range, 5), "what was there is there again");
    Ok(())
}

fn anon_write(world: &dyn World) -> Verdict {
    let area = anonymous(world)?;
    let device = world.device(&[area.range]);
    device.fill(area.range, 6);
    assert!(holds(world, area.range, 6));
    Ok(())
}

fn both(world: &dyn World) -> Verdict {
    let area = anonymous(world)?;
    let device = world.device(&[area.range]);
    for salt in 0..20 {
        fill(world, area.range, salt);
        assert!(device.holds(area.range, salt));
        device.fill(area.range, salt + 100);
        assert!(holds(world, area.range, salt + 100));
    }
    Ok(())
}

fn anon_write_read_only(world: &dyn World) -> Verdict {
    let area = anonymous(world)?;
    fill(world, area.range, 7);
    world.protect(area.range, Allow::Read);
    let device = world.device(&[area.range]);
    assert_eq!(device.write(area.page(3), 1), Err(refused(&area, 3, Access::Write)));
    assert!(holds(world, area.range, 7) && device.holds(area.range, 7), "reading goes on");
    world.protect(area.range, Allow::ReadWrite);
    device.fill(area.range, 8);
    assert!(holds(world, area.range, 8));
    Ok(())
}

fn read_only_pages(world: &dyn World) -> Verdict {
    let area = anonymous(world)?;
    fill(world, area.range, 9);
    world.protect(area.range, Allow::Read);
    let device = world.device(&[area.range]);
    device.fault(area.range, Access::Read).expect("it may be read");
    assert!((0..PAGES).all(|page| !device.entry(area.page(page)).expect("faulted").writable));
    Ok(())
}

/// If this fails, a device writes where the program has said that nobody may.
fn mprotect_takes_write_away(world: &dyn World) -> Verdict {
    let area = anonymous(world)?;
    let device = world.device(&[area.range]);
    device.fill(area.range, 10);
    world.protect(area.part(2, 4), Allow::Read);
    assert_eq!(device.write(area.page(2), 1), Err(refused(&area, 2, Access::Write)));
    assert!(holds(world, area.range, 10), "not a byte was written");
    device.write(area.page(6), 11).expect("those beside it stay as they are");
    Ok(())
}

fn write_after_fork_private(world: &dyn World) -> Verdict {
    let area = anonymous(world)?;
    fill(world, area.range, 11);
    let device = world.device(&[area.range]);
    device.fault(area.range, Access::Write).expect("writable");
    let child = |cpu: &dyn Cpu| holds(cpu, area.range, 11);
    let kept = world.fork(&child, &mut || {
        assert!(device.holds(area.range, 11));
        device.fill(area.range, 12);
        assert!(holds(world, area.range, 12), "the parent's device writes the parent's pages");
    });
    assert!(kept, "the child saw what its parent's device wrote");
    Ok(())
}

fn write_after_fork_by_the_child(world: &dyn World) -> Verdict {
    let area = anonymous(world)?;
    fill(world, area.range, 13);
    let device = world.device(&[area.range]);
    device.fault(area.range, Access::Write).expect("writable");
    let child = |cpu: &dyn Cpu| {
        fill(cpu, area.range, 14);
        holds(cpu, area.range, 14)
    };
    assert!(world.fork(&child, &mut || ()));
    assert!(device.holds(area.range, 13) && holds(world, area.range, 13), "the child has written its own");
    device.fill(area.range, 15);
    assert!(holds(world, area.range, 15));
    Ok(())
}

fn write_after_fork_shared(world: &dyn World) -> Verdict {
    let area = world.map(Kind::Shared, PAGES)?;
    fill(world, area.range, 16);
    let device = world.device(&[area.range]);
    let child = |cpu: &dyn Cpu| {
        let seen = holds(cpu, area.range, 17);
        fill(cpu, area.range, 18);
        seen
    };
    assert!(world.fork(&child, &mut || device.fill(area.range, 17)), "shared is shared");
    assert!(device.holds(area.range, 18), "what the child wrote is seen");
    Ok(())
}

/// 2 MiB of memory, written by the device; the size of the pages it is told of.
fn huge(world: &dyn World, kind: Kind) -> Result<(Area, Device), Skip> {
    let area = world.map(kind, 1024)?;
    fill(world, area.part(0, 1), 1);
    let device = world.device(&[area.range]);
    device.fault(area.range, Access::Write).expect("memory");
    device.fill(area.range, 19);
    assert!(holds(world, area.range, 19));
    if device.entry(area.page(0)).is_none_or(|entry| entry.order_shift == 12) {
        return Err(Skip("the host gave no huge page".to_owned()));
    }
    for page in 0..1024 {
        let entry = device.entry(area.page(page)).expect("written");
        assert!(entry.writable && entry.order_shift == 21, "page {page}: {entry:?}");
        let head = device.entry(area.page(page - page % 512)).expect("written");
        assert!(head.phys.is_aligned(512 * PAGE_SIZE), "the first page of a huge page lies on its size");
        assert_eq!(entry.phys, head.phys.offset(page % 512 * PAGE_SIZE), "and the others follow");
    }
    Ok((area, device))
}

fn huge_write(world: &dyn World) -> Verdict {
    huge(world, Kind::Huge).map(drop)
}

fn hugetlb_write(world: &dyn World) -> Verdict {
    let (area, device) = huge(world, Kind::Hugetlb)?;
    assert_eq!(device.entry(area.page(700)).expect("written").backing, Backing::Hugetlb);
    Ok(())
}

fn huge_page_split(world: &dyn World) -> Verdict {
    let (area, device) = huge(world, Kind::Huge)?;
    world.protect(area.part(3, 1), Allow::Read);
    assert_eq!(device.write(area.page(3), 1), Err(refused(&area, 3, Access::Write)));
    device.fault(area.part(4, 600), Access::Write).expect("writable still");
    assert!(device.holds(area.range, 19), "the bytes are where they were");
    let order = |page| device.entry(area.page(page)).expect("faulted").order_shift;
    assert_eq!((order(4), order(511), order(512)), (12, 12, 21), "only the one that was cut is split");
    Ok(())
}

fn compound_order_small(world: &dyn World) -> Verdict {
    let area = anonymous(world)?;
    let device = world.device(&[area.range]);
    device.fault(area.range, Access::Write).expect("writable");
    assert!((0..PAGES).all(|page| device.entry(area.page(page)).expect("faulted").order_shift == 12));
    Ok(())
}

fn file_read(world: &dyn World) -> Verdict {
    for kind in [Kind::File, Kind::PrivateFile] {
        let area = world.map(kind, PAGES)?;
        fill(world, area.range, 20);
        let device = world.device(&[area.range]);
        assert!(device.holds(area.range, 20));
        // The temporary directory may be in memory.
        let backing = device.entry(area.page(0)).expect("read").backing;
        assert!(matches!(backing, Backing::File | Backing::Shared), "{backing:?}");
    }
    Ok(())
}

/// If this fails, what RDMA wrote to a mapped file is lost.
fn file_write(world: &dyn World) -> Verdict {
    let area = world.map(Kind::File, PAGES)?;
    let device = world.device(&[area.range]);
    device.fill(area.range, 21);
    let (_, first) = pattern(area.part(0, 1), 21).next().expect("a word");
    assert_eq!(world.in_file(&area, 0), first);
    assert!(holds(world, area.range, 21));
    Ok(())
}

fn file_write_back(world: &dyn World) -> Verdict {
    let area = world.map(Kind::File, PAGES)?;
    let device = world.device(&[area.range]);
    for word in 1..6 {
        device.write(area.page(2), word).expect("writable");
        world.write_back(&area);
        assert_eq!(device.read(area.page(2)), Ok(word));
        assert_eq!(world.in_file(&area, 2), word, "what was clean became dirty again");
    }
    Ok(())
}

fn private_file_write(world: &dyn World) -> Verdict {
    let area = world.map(Kind::PrivateFile, PAGES)?;
    let device = world.device(&[area.range]);
    let before = world.in_file(&area, 1);
    assert_eq!(device.read(area.page(1)), Ok(before));
    assert!(!device.entry(area.page(1)).expect("read").writable, "the page cache is not ours to write");
    device.fill(area.range, 22);
    assert!(holds(world, area.range, 22));
    assert_eq!(world.in_file(&area, 1), before, "the file keeps what it had");
    Ok(())
}

fn shared_write(world: &dyn World) -> Verdict {
    for kind in [Kind::Shared, Kind::File] {
        let area = world.map(kind, PAGES)?;
        let device = world.device(&[area.range]);
        let seen = world.fork(&|cpu| holds(cpu, area.range, 23), &mut || device.fill(area.range, 23));
        assert!(seen, "{kind:?}");
    }
    Ok(())
}

fn truncation(world: &dyn World, by: By) -> Verdict {
    for kind in [Kind::File, Kind::Shared] {
        let area = world.map(kind, PAGES)?;
        fill(world, area.range, 24);
        let device = world.device(&[area.range]);
        assert!(device.holds(area.range, 24));
        world.truncate(&area, 5, by);
        let beyond = Err(FaultError::NoMapping { at: area.page(7) });
        assert_eq!(device.read(area.page(7)), beyond, "{kind:?}");
        assert!(device.holds(area.part(0, 5), 24), "{kind:?}: what is left is left");
        world.truncate(&area, PAGES, by);
        assert!(device.is_zero(area.part(5, PAGES - 5)), "{kind:?}: what comes back is empty");
        device.fill(area.range, 25);
        assert!(holds(world, area.range, 25));
    }
    Ok(())
}

fn truncated(world: &dyn World) -> Verdict {
    truncation(world, By::ThisProcess)
}

fn truncated_by_another(world: &dyn World) -> Verdict {
    truncation(world, By::AnotherProcess)
}

fn unmapped(world: &dyn World) -> Verdict {
    let area = anonymous(world)?;
    fill(world, area.range, 26);
    let device = world.device(&[area.range]);
    assert!(device.holds(area.range, 26));
    world.unmap(area.part(3, 2));
    let nothing = |page| FaultError::NoMapping { at: area.page(page) };
    assert_eq!(device.read(area.page(3)), Err(nothing(3)));
    assert_eq!(device.write(area.page(4), 1), Err(nothing(4)));
    assert_eq!(device.fault(area.range, Access::Read), Err(nothing(3)), "the first hole is named");
    assert_eq!(device.read(area.page(5)).ok(), Some(world.get(area.page(5))));
    Ok(())
}

fn discarded(world: &dyn World) -> Verdict {
    let area = anonymous(world)?;
    let device = world.device(&[area.range]);
    device.fill(area.range, 27);
    world.discard(area.part(4, 4));
    assert!(device.is_zero(area.part(4, 4)) && is_zero(world, area.part(4, 4)));
    assert!(device.holds(area.part(0, 4), 27));
    device.write(area.page(5), 28).expect("writable");
    assert_eq!(world.get(area.page(5)), 28);
    Ok(())
}

fn map_fixed(world: &dyn World) -> Verdict {
    let area = anonymous(world)?;
    let device = world.device(&[area.range]);
    device.fill(area.range, 29);
    world.replace(area.part(6, 5));
    assert!(device.is_zero(area.part(6, 5)), "the old bytes are gone with the old mapping");
    fill(world, area.part(6, 5), 30);
    assert!(device.holds(area.part(6, 5), 30));
    device.fill(area.part(6, 5), 31);
    assert!(holds(world, area.part(6, 5), 31));
    assert!(holds(world, area.part(0, 6), 29), "what is beside it stays");
    Ok(())
}

fn mremap_moves(world: &dyn World) -> Verdict {
    let (from, to) = (anonymous(world)?, anonymous(world)?);
    fill(world, from.range, 32);
    fill(world, to.range, 33);
    let device = world.device(&[from.range, to.range]);
    assert!(device.holds(from.range, 32) && device.holds(to.range, 33));
    world.remap(from.part(4, 6), to.page(2));
    let old = FaultError::NoMapping { at: from.page(5) };
    assert_eq!(device.read(from.page(5)), Err(old), "nothing is left behind");
    for page in 0..6 {
        assert_eq!(device.read(to.page(2 + page)).ok(), Some(world.get(to.page(2 + page))));
    }
    let (_, first) = pattern(from.range, 32).nth(8).expect("the fifth page's");
    assert_eq!(device.read(to.page(2)), Ok(first), "what was moved came along");
    assert!(device.holds(to.part(0, 2), 33));
    device.write(to.page(3), 34).expect("writable");
    assert_eq!(world.get(to.page(3)), 34);
    Ok(())
}

fn snapshot_does_not_fault(world: &dyn World) -> Verdict {
    let area = anonymous(world)?;
    let device = world.device(&[area.range]);
    let pages = || -> Vec<u64> {
        let runs = device.snapshot(area.range);
        let first = |at: VirtAddr| (at.0 - area.range.start().0) / PAGE_SIZE;
        runs.iter()
            .flat_map(|run| (first(run.start)..first(run.start) + run.pages).collect::<Vec<_>>())
            .collect()
    };
    assert_eq!(pages(), [0; 0], "nothing was touched yet");
    fill(world, area.part(3, 1), 35);
    device.write(area.page(9), 1).expect("writable");
    assert_eq!((pages(), pages()), (vec![3, 9], vec![3, 9]), "and looking brings nothing in");
    Ok(())
}

fn several_devices(world: &dyn World) -> Verdict {
    let area = anonymous(world)?;
    let devices = [world.device(&[area.range]), world.device(&[area.range]), world.device(&[area.range])];
    devices[0].fill(area.range, 36);
    assert!(devices.iter().all(|device| device.holds(area.range, 36)));
    let place = |device: &Device| device.entry(area.page(1)).expect("read").phys;
    assert!(devices.iter().all(|device| place(device) == place(&devices[0])), "one page, one place");
    let before = devices.each_ref().map(Device::clears);
    world.discard(area.range);
    assert!(devices.iter().all(|device| device.is_zero(area.range)));
    let told = devices.iter().zip(before).all(|(device, before)| device.clears() > before);
    assert!(told || world.space().rung(area.range) == odp::space::Rung::Poll, "each is told");
    devices[2].fill(area.range, 37);
    assert!(devices[1].holds(area.range, 37));
    Ok(())
}

/// A thread of the device reads while the program takes the memory apart. Each read gives what was there, zeroes of what
/// took its place, or an error that says why; never a crash, never anything else.
fn teardown_racing_reads(world: &dyn World) -> Verdict {
    const ROUNDS: u64 = 60;
    let area = anonymous(world)?;
    let device = world.device(&[area.range]);
    let (stop, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut page = 0;
            while !stop.load(Ordering::Relaxed) {
                page = (page + 1) % PAGES;
                match device.read(area.page(page)) {
                    Ok(0 | 0x77 | 0x78) => drop(reads.fetch_add(1, Ordering::Relaxed)),
                    Ok(other) => panic!("{other:#x} was never there"),
                    Err(
                        FaultError::NoMapping { .. }
                        | FaultError::Busy { .. }
                        | FaultError::Permission { .. },
                    ) => {}
                    Err(other) => panic!("{other}"),
                }
            }
        });
        let _stops = StopOnDrop(&stop);
        for round in 0..ROUNDS {
            (0..PAGES).for_each(|page| world.put(area.page(page), 0x77 + round % 2));
            let seen = reads.load(Ordering::Relaxed);
            wait_for(|| reads.load(Ordering::Relaxed) > seen);
            let first = round % 8;
            match round % 3 {
                0 => world.discard(area.part(first, 8)),
                1 => world.replace(area.part(first, 8)),
                _ => {
                    world.protect(area.part(first, 8), Allow::Nothing);
                    world.protect(area.part(first, 8), Allow::ReadWrite);
                }
            }
        }
    });
    Ok(())
}

/// What the device wrote, or was refused, is what the program finds: no write is lost that was said to be done, and none
/// lands that was refused.
fn protection_racing_writes(world: &dyn World) -> Verdict {
    const ROUNDS: u64 = 60;
    let area = anonymous(world)?;
    fill(world, area.range, 0);
    let device = world.device(&[area.range]);
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut next = 1;
            while !stop.load(Ordering::Relaxed) {
                match device.write(area.page(1), next) {
                    Ok(()) => {
                        written.store(next, Ordering::Release);
                        next += 1;
                    }
                    Err(FaultError::Permission { .. } | FaultError::Busy { .. }) => {}
                    Err(other) => panic!("{other}"),
                }
            }
        });
        let _stops = StopOnDrop(&stop);
        for _ in 0..ROUNDS {
            let seen = written.load(Ordering::Acquire);
            wait_for(|| written.load(Ordering::Acquire) > seen);
            world.protect(area.range, Allow::Read);
            // One that was on its way when the call began may have landed, and not been told yet.
            let before = (world.get(area.page(1)), written.load(Ordering::Acquire));
            assert!(before.0 >= before.1, "a write that was done is lost: {before:?}");
            std::thread::yield_now();
            assert_eq!(world.get(area.page(1)), before.0, "written after nobody was allowed to");
            world.protect(area.range, Allow::ReadWrite);
        }
    });
    Ok(())
}

/// Many threads, each with memory and a device of its own in one address space, change it by every call there is. If this
/// fails, one thread's change is another's, or the calls of several wait for each other.
fn many_threads(world: &dyn World) -> Verdict {
    const THREADS: u64 = 6;
    const ROUNDS: u64 = 25;
    let areas: Result<Vec<_>, Skip> = (0..THREADS).map(|_| anonymous(world)).collect();
    let areas = areas?;
    std::thread::scope(|scope| {
        for (thread, area) in areas.iter().enumerate() {
            scope.spawn(move || {
                let device = world.device(&[area.range]);
                for round in 0..ROUNDS {
                    let salt = thread as u64 * 1000 + round;
                    device.fill(area.range, salt);
                    assert!(holds(world, area.range, salt));
                    let page = (round + thread as u64) % (PAGES - 4);
                    match round % 4 {
                        0 => world.discard(area.part(page, 4)),
                        1 => world.replace(area.part(page, 4)),
                        2 => {
                            world.protect(area.part(page, 4), Allow::Read);
                            assert_eq!(
                                device.write(area.page(page), 1),
                                Err(refused(area, page, Access::Write))
                            );
                            world.protect(area.part(page, 4), Allow::ReadWrite);
                        }
                        _ => {
                            let other = world.device(&[area.part(page, 4)]);
                            other.fill(area.part(page, 4), salt + 1);
                            assert!(device.holds(area.part(page, 4), salt + 1));
                        }
                    }
                    assert!(round % 4 > 1 || device.is_zero(area.part(page, 4)));
                    fill(world, area.range, salt + 2);
                    assert!(device.holds(area.range, salt + 2));
                }
            });
        }
    });
    Ok(())
}

/// A panic of the one that waits must end the others too.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn wait_for(mut condition: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(120);
    while !condition() {
        assert!(std::time::Instant::now() < deadline, "the device does not get on");
        std::thread::yield_now();
    }
}
