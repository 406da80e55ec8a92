//! Changes of real memory reach interval owners, retire frames, and stop DMA before a dropped page goes.

use crate::mapped::{
    Mapped, RW, Recorder, Told, disk_file, fault, mapping_count, memory_file, open_below_exact, until,
};
use hw_model::addr::{PAGE_SIZE, VirtRange};
use hw_model::bus::MemoryError;
use hw_model::sync::Arc;
use hw_model::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use odp::page::Backing;
use odp::space::process::{Options, ProcessSpace};
use odp::space::{Access, AddressSpace, FaultError, Rung};
use rustix::fd::AsFd;
use rustix::fs::MemfdFlags;
use rustix::mm::{Advice, MapFlags, MprotectFlags};

/// A space on the events rung, or the reason for a skip.
fn events_space(test: &str) -> Option<Arc<ProcessSpace>> {
    let space = open_below_exact(Options::default());
    if space.capabilities().rung > Rung::Events {
        println!("SKIPPED {test}: userfaultfd {}", space.capabilities().userfaultfd);
        return None;
    }
    Some(space)
}

/// Whether DMA through a frame of `page` reported before is refused as stale.
fn is_retired(space: &ProcessSpace, phys: hw_model::addr::PhysAddr) -> bool {
    match space.memory().read(phys, &mut [0; 8]) {
        Err(MemoryError::Retired { at }) => {
            let lent = space.with_address(phys, 8, drop);
            assert_eq!(lent, Err(MemoryError::Retired { at }), "nor is its address lent");
            at == phys
        }
        _ => false,
    }
}

/// What the owner of an interval over all of `memory` is told when `change` changes it; then its frames are compared.
fn told(space: &Arc<ProcessSpace>, memory: &Mapped, changed: VirtRange, change: impl FnOnce()) -> Vec<Told> {
    let _watch = space.watch(memory.range()).expect("mapped");
    assert_eq!(space.rung(memory.range()), space.capabilities().rung);
    let runs = fault(space, memory.range(), Access::Write).expect("faultable");
    let recorder = Recorder::new();
    let interval = space.notifiers().register(memory.range(), recorder.clone());
    let sequence = interval.begin().expect("quiet");
    change();
    // The call returned, so its event was read; the invalidation may still be running.
    until("the owner is told", || !recorder.told_nothing() && interval.begin().is_some());
    assert!(interval.retry(&sequence), "a fault under way must learn that it lost");
    for run in &runs {
        for page in 0..run.pages {
            let at = run.start.offset(page * PAGE_SIZE);
            let phys = run.phys.offset(page * PAGE_SIZE);
            let inside = changed.start() <= at && at < changed.end();
            assert_eq!(is_retired(space, phys), inside, "page at {at}, changed {changed}");
        }
    }
    recorder.take()
}

#[test]
fn drops_removals_unmaps_and_moves_are_told_and_retire_their_frames() {
    let Some(space) = events_space("drops_removals_unmaps_and_moves") else { return };
    let pair = |range| [Told::Clear(range), Told::Unlink(range)];

    let memory = Mapped::anonymous(16);
    let part = memory.part(3, 4);
    assert_eq!(told(&space, &memory, part, || memory.drop_pages(3, 4)), pair(part));

    let file = memory_file(16, MemfdFlags::empty()).expect("memfd");
    let shared = Mapped::shared_file(16, &file);
    let part = shared.part(5, 2);
    let remove = || shared.advise(5, 2, Advice::LinuxRemove).expect("MADV_REMOVE");
    assert_eq!(told(&space, &shared, part, remove), pair(part));

    let memory = Mapped::anonymous(16);
    let part = memory.part(8, 3);
    assert_eq!(told(&space, &memory, part, || memory.unmap(8, 3)), pair(part));

    let memory = Mapped::anonymous(16);
    let part = memory.part(0, 2);
    assert_eq!(told(&space, &memory, part, || memory.replace(0, 2)), pair(part));

    let (memory, other) = (Mapped::anonymous(16), Mapped::anonymous(16));
    let part = memory.part(4, 4);
    let moved = told(&space, &memory, part, || memory.move_to(4, 4, &other, 0));
    // The kernel tells of the move and of the hole it leaves.
    assert!(moved.starts_with(&pair(part)), "{moved:?}");

    let stats = space.stats();
    assert!(stats.removed >= 2 && stats.unmapped >= 2 && stats.moved >= 1, "{stats:?}");
    assert_eq!(stats.watches, 0);
}

#[test]
fn what_takes_the_place_of_a_watched_mapping_is_watched_before_it_is_reported() {
    let Some(space) = events_space("what_takes_the_place_of_a_watched_mapping") else { return };
    let memory = Mapped::anonymous(16);
    let _watch = space.watch(memory.range()).expect("mapped");
    let recorder = Recorder::new();
    let interval = space.notifiers().register(memory.range(), recorder.clone());
    memory.replace(0, 8);
    let file = memory_file(4, MemfdFlags::empty()).expect("memfd");
    memory.replace_by(8, 4, &file, 0);
    until("both replacements are told", || recorder.calls.load(Ordering::Relaxed) >= 4);
    until("they have ended", || interval.begin().is_some());
    let _ = recorder.take();
    let runs = fault(&space, memory.range(), Access::Write).expect("faultable");
    assert!(runs.iter().any(|run| run.backing == Backing::Shared && run.pages == 4), "{runs:?}");
    let before = recorder.calls.load(Ordering::Relaxed);
    memory.drop_pages(2, 1);
    shared_remove(&memory, 9);
    until("the new mappings' drops are told", || recorder.calls.load(Ordering::Relaxed) >= before + 4);
    until("they have ended", || interval.begin().is_some());
    let told = recorder.take();
    assert!(told.contains(&Told::Clear(memory.part(2, 1))) && told.contains(&Told::Clear(memory.part(9, 1))));
}

fn shared_remove(memory: &Mapped, page: u64) {
    memory.advise(page, 1, Advice::LinuxRemove).expect("MADV_REMOVE");
}

/// A device reads a page over and over while the program drops it and writes it again. Through one frame it may see what
/// was there when the frame was reported, or be refused; were DMA not stopped before the event is read, it would see the
/// zeroes that the drop left.
#[test]
fn dma_stops_before_a_dropped_page_goes() {
    let Some(space) = events_space("dma_stops_before_a_dropped_page_goes") else { return };
    let memory = Mapped::anonymous(1);
    let _watch = space.watch(memory.range()).expect("mapped");
    let interval = space.notifiers().register(memory.range(), Recorder::new());
    let frame = AtomicU64::new(0);
    let (stop, reads, zeroes) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let host = space.memory();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut slot = host.epoch().register().expect("a slot");
            while !stop.load(Ordering::Relaxed) {
                let Ok(_burst) = slot.enter() else { continue };
                let phys = hw_model::addr::PhysAddr(frame.load(Ordering::Acquire));
                let mut byte = [0xff];
                match host.read(phys, &mut byte) {
                    Ok(()) => {
                        reads.fetch_add(1, Ordering::Relaxed);
                        zeroes.fetch_add(u64::from(byte == [0]), Ordering::Relaxed);
                    }
                    Err(MemoryError::Retired { .. } | MemoryError::Unbacked { .. }) => {}
                    Err(other) => panic!("{other}"),
                }
            }
        });
        for _ in 0..500 {
            memory.touch(0, 1, 0x77);
            let seen = reads.load(Ordering::Relaxed);
            let mut settled = None;
            // The drop's event was read, or its call had not returned; its invalidation may run still, and then what was
            // reported is worthless.
            until("the device has read", || {
                if settled.is_none_or(|sequence| interval.retry(&sequence)) {
                    settled = interval.begin();
                    let runs = fault(&space, memory.range(), Access::Write).expect("faultable");
                    frame.store(runs[0].phys.0, Ordering::Release);
                }
                reads.load(Ordering::Relaxed) > seen
            });
            memory.drop_pages(0, 1);
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(reads.load(Ordering::Relaxed) >= 500);
    assert_eq!(
        zeroes.load(Ordering::Relaxed),
        0,
        "a device read a page after it was dropped, through its old frame"
    );
    until("every drop is told", || space.stats().removed == 500);
}

#[test]
fn a_silent_change_is_found_by_the_copy_and_invalidates_the_page() {
    for options in [Options::default(), Options { strongest: Rung::Poll, ..Options::default() }] {
        let space = open_below_exact(options);
        let memory = Mapped::anonymous(4);
        let _watch = space.watch(memory.range()).expect("mapped");
        let runs = fault(&space, memory.range(), Access::Write).expect("faultable");
        let recorder = Recorder::new();
        let interval = space.notifiers().register(memory.range(), recorder.clone());
        memory.protect(2, 1, MprotectFlags::READ);
        let phys = runs[0].phys.offset(2 * PAGE_SIZE);
        let host = space.memory();
        assert_eq!(host.write(phys, &[1; 64]), Err(MemoryError::Vanished { at: phys }));
        until("the page is invalidated", || {
            recorder.calls.load(Ordering::Relaxed) >= 2 && interval.begin().is_some()
        });
        assert_eq!(recorder.take(), [Told::Clear(memory.part(2, 1)), Told::Unlink(memory.part(2, 1))]);
        assert!(is_retired(&space, phys));
        let failed = fault(&space, memory.range(), Access::Write);
        let at = memory.part(2, 1).start();
        assert_eq!(failed, Err(FaultError::Permission { at, access: Access::Write }));
        assert_eq!(host.write(runs[0].phys, &[1; 64]), Ok(()), "the others are as they were");
    }
}

#[test]
fn the_poll_rung_sees_another_file_in_the_place_of_the_first() {
    let space = open_below_exact(Options { strongest: Rung::Poll, ..Options::default() });
    if !space.capabilities().procmap_query.is_yes() {
        println!("SKIPPED the_poll_rung_sees_another_file: no PROCMAP_QUERY");
        return;
    }
    let (first, second) = (
        memory_file(4, MemfdFlags::empty()).expect("memfd"),
        memory_file(4, MemfdFlags::empty()).expect("memfd"),
    );
    let memory = Mapped::shared_file(4, &first);
    memory.touch(0, 4, 1);
    let watch = space.watch(memory.range()).expect("mapped");
    assert_eq!(space.rung(memory.range()), Rung::Poll);
    let runs = fault(&space, memory.range(), Access::Write).expect("faultable");
    let host = space.memory();
    assert_eq!(host.write(runs[0].phys, &[9; 8]), Ok(()));
    memory.replace_by(0, 4, &second, 0);
    assert_eq!(host.write(runs[0].phys, &[7; 8]), Err(MemoryError::Vanished { at: runs[0].phys }));
    assert_eq!(memory.byte(0), 0, "not one byte may land in the other file");
    // The copy that found another file has the page looked into, which retires what is reported before that is over.
    let looked_into = || {
        let stats = space.notifiers().stats();
        stats.invalidations > 0 && stats.running == 0
    };
    until("the page is looked into", looked_into);
    let again = fault(&space, memory.range(), Access::Write).expect("faultable");
    assert_ne!(again[0].phys, runs[0].phys, "another mapping, another frame");
    assert!(is_retired(&space, runs[0].phys.offset(PAGE_SIZE)));
    assert_eq!(host.write(again[0].phys, &[7; 8]), Ok(()));
    assert_eq!(memory.byte(0), 7);
    drop(watch);
    assert_eq!(space.weaknesses(memory.range()), []);
}

#[test]
fn what_the_kernel_will_not_watch_is_on_the_poll_rung_with_the_reason() {
    let Some(space) = events_space("what_the_kernel_will_not_watch") else { return };
    let file = disk_file(2, 3);
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let read_only = std::fs::File::open(path).expect("our own file");
    let shared = Mapped::map(2, rustix::mm::ProtFlags::READ, MapFlags::SHARED, Some(read_only.as_fd()))
        .expect("mapped");
    let watch = space.watch(shared.range()).expect("polled");
    assert_eq!(space.rung(shared.range()), Rung::Poll);
    assert_eq!(space.weaknesses(shared.range()).len(), 1);
    assert!(space.weaknesses(shared.range())[0].reason.contains("permitted"));
    let runs = fault(&space, shared.range(), Access::Read).expect("readable");
    let mut byte = [0];
    space.memory().read(runs[0].phys, &mut byte).expect("mapped");
    assert_eq!(byte, [3]);
    drop(watch);

    let memory = Mapped::anonymous(2);
    let other = open_below_exact(Options::default());
    let _theirs = other.watch(memory.range()).expect("mapped");
    let _ours = space.watch(memory.range()).expect("polled");
    assert_eq!((other.rung(memory.range()), space.rung(memory.range())), (Rung::Events, Rung::Poll));
    assert!(space.weaknesses(memory.range())[0].reason.contains("busy"));
}

#[test]
fn ten_thousand_watched_pages_do_not_split_a_mapping_ten_thousand_times() {
    let Some(space) = events_space("ten_thousand_watched_pages") else { return };
    let memory = Mapped::map(20_002, RW, MapFlags::PRIVATE, None).expect("anonymous memory");
    let before = mapping_count();
    let watches: Vec<_> =
        (0..10_000).map(|page| space.watch(memory.part(page * 2 + 1, 1)).expect("mapped")).collect();
    assert_eq!(space.stats().watches, 10_000);
    assert!(space.stats().registrations <= 1500, "{:?}", space.stats());
    // Other tests map and unmap meanwhile; ten thousand they do not.
    assert!(mapping_count() < before + 3000, "{before} mappings became {}", mapping_count());
    memory.touch(0, 20_002, 1);
    let removed = space.stats().removed;
    for watch in watches.into_iter().rev() {
        drop(watch);
    }
    assert_eq!(space.stats().watches, 0);
    memory.drop_pages(0, 20_002);
    assert_eq!(space.stats().removed, removed, "the last watch takes the registration with it");
}

#[test]
fn overlapping_watches_are_counted() {
    let Some(space) = events_space("overlapping_watches_are_counted") else { return };
    let memory = Mapped::anonymous(64);
    let (first, second) = (space.watch(memory.range()), space.watch(memory.part(10, 20)));
    drop(first);
    memory.touch(0, 64, 1);
    memory.drop_pages(12, 1);
    until("the second still watches", || space.stats().removed == 1);
    drop(second);
    memory.drop_pages(12, 1);
    assert_eq!(space.stats().removed, 1);
}

#[test]
fn closing_a_space_leaves_no_caller_waiting() {
    let memory = Mapped::anonymous(512);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                memory.drop_pages(0, 256);
                memory.replace(256, 256);
            }
        });
        for _ in 0..200 {
            let space = open_below_exact(Options::default());
            let watch = space.watch(memory.range()).expect("mapped");
            let _ = fault(&space, memory.part(0, 256), Access::Write);
            drop(watch);
            drop(space);
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_forked_child_can_unmap_and_exit() {
    let Some(space) = events_space("a_forked_child_can_unmap_and_exit") else { return };
    let memory = Mapped::anonymous(16);
    memory.touch(0, 16, 1);
    let _watch = space.watch(memory.range()).expect("mapped");
    let ended = crate::mapped::in_child(|| {
        memory.drop_pages(0, 4);
        memory.unmap(4, 4);
        let refused = space.watch(memory.part(8, 1)).is_err();
        drop(space.clone());
        i32::from(!refused)
    });
    assert_eq!(ended, Some(0), "the child must neither hang nor watch");
    memory.drop_pages(0, 1);
    until("the parent goes on as before", || space.stats().removed == 1);
}
