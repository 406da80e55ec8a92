//! A buffer between system memory and a BAR: each page moves alone, its owners are told before, its bytes come along,
//! and devices and the CPU see the same bytes wherever it is.

use crate::mapped::{Mapped, Recorder, Told, fault, open, snapshot};
use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange};
use hw_model::bus::{Bar, Bus, DeviceSpec, MemoryError};
use hw_model::sync::Arc;
use hw_model::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use odp::page::Backing;
use odp::space::dmabuf::{ImportMode, ImportOptions, MoveError, OutsideBar, PagePlace};
use odp::space::process::{BarMemory, DmabufError, DmabufMapping, Options, PeerPart, ProcessSpace};
use odp::space::{Access, AddressSpace, FaultError, Rung};
use std::time::Duration;

const PAGES: u64 = 8;
/// The buffer's part of the BAR begins here.
const OFFSET: u64 = 2 * PAGE_SIZE;

/// A GPU's BAR, and the memory behind it.
fn bar(space: &ProcessSpace) -> (Arc<BarMemory>, Arc<Bar>) {
    let memory = BarMemory::new(space, 2 * PAGES * PAGE_SIZE).expect("memory");
    let bus = Bus::new(space.memory());
    let gpu = bus.attach(DeviceSpec::new("gpu")).expect("room");
    let bar = bus.add_bar(gpu.device(), Arc::clone(&memory) as _).expect("room");
    (memory, bar)
}

fn peer(space: &ProcessSpace) -> PeerPart {
    let (memory, bar) = bar(space);
    PeerPart::new(&memory, &bar, OFFSET, PAGES * PAGE_SIZE).expect("in the BAR")
}

fn buffer() -> (Arc<ProcessSpace>, Arc<Bar>, DmabufMapping) {
    let space = open(Options::default());
    let (memory, bar) = bar(&space);
    let peer = PeerPart::new(&memory, &bar, OFFSET, PAGES * PAGE_SIZE).expect("in the BAR");
    let buffer = DmabufMapping::new(&space, peer).expect("a buffer");
    (space, bar, buffer)
}

fn page(buffer: &DmabufMapping, page: u64, pages: u64) -> VirtRange {
    let start = buffer.range().start().offset(page * PAGE_SIZE);
    VirtRange::new(start, pages * PAGE_SIZE).expect("in the buffer")
}

#[test]
fn pages_move_one_by_one_with_their_bytes_and_only_their_owners_are_told() {
    let (space, bar, buffer) = buffer();
    assert_eq!(space.rung(buffer.range()), Rung::Owned);
    let _watch = space.watch(buffer.range()).expect("mapped");
    for number in 0..PAGES {
        buffer.write_at(number * PAGE_SIZE, &[number as u8 + 1; 100]).expect("in the buffer");
    }
    let whole = fault(&space, buffer.range(), Access::Write).expect("faultable");
    assert_eq!((whole.len(), whole[0].backing, whole[0].provider), (1, Backing::DmabufSystem, None));
    let recorder = Recorder::new();
    let interval = space.notifiers().register(buffer.range(), recorder.clone());

    assert_eq!(buffer.move_to_peer(2..4), Ok(2));
    assert_eq!(
        crate::mapped::once(recorder.take()),
        [Told::Clear(page(&buffer, 2, 2)), Told::Unlink(page(&buffer, 2, 2))]
    );
    let runs = snapshot(&space, buffer.range());
    let seen: Vec<_> = runs.iter().map(|run| (run.pages, run.backing, run.provider)).collect();
    let system = |pages| (pages, Backing::DmabufSystem, None);
    let in_bar = |pages| (pages, Backing::DmabufPeer, Some(bar.provider()));
    assert_eq!(seen, [system(2), in_bar(2), system(4)]);
    assert_eq!(runs[0].phys, whole[0].phys, "pages that stay keep their frames");
    assert_eq!(runs[1].phys, bar.base().offset(OFFSET + 2 * PAGE_SIZE));
    assert_eq!(runs[2].phys, whole[0].phys.offset(4 * PAGE_SIZE));

    let mut byte = [0];
    bar.storage().read(OFFSET + 3 * PAGE_SIZE + 99, &mut byte).expect("in the BAR");
    assert_eq!(byte, [4], "the bytes came along");
    bar.storage().write(OFFSET + 3 * PAGE_SIZE, &[0xee]).expect("in the BAR");
    buffer.read_at(3 * PAGE_SIZE, &mut byte).expect("in the buffer");
    assert_eq!(byte, [0xee], "the CPU sees what a device wrote in the BAR");
    space.memory().read(whole[0].phys.offset(3 * PAGE_SIZE), &mut byte).expect("frames are never refused");
    assert_eq!(byte, [0], "a stale frame gives the wrong bytes");

    assert_eq!(buffer.move_to_peer(0..PAGES), Ok(6), "two are there");
    let told = crate::mapped::once(recorder.take());
    assert_eq!(told.len(), 4, "two runs, not the pages between: {told:?}");
    assert!(
        !told.iter().any(|told| matches!(told, Told::Clear(range) if range.overlaps(page(&buffer, 2, 2))))
    );
    assert_eq!(buffer.move_to_system(3..4), Ok(1));
    assert_eq!((buffer.place(2), buffer.place(3)), (Some(PagePlace::Peer), Some(PagePlace::System)));
    assert_eq!(buffer.move_to_system(0..PAGES), Ok(7));
    for number in 0..PAGES {
        buffer.read_at(number * PAGE_SIZE, &mut byte).expect("in the buffer");
        let expected = if number == 3 { 0xee } else { number as u8 + 1 };
        assert_eq!(byte, [expected], "page {number}");
    }
    let beyond = MoveError::NoSuchPages { pages: 0..PAGES + 1, size: PAGES };
    assert_eq!(buffer.move_to_peer(0..PAGES + 1), Err(beyond.into()));
    drop(interval);
}

#[test]
fn dropping_a_buffer_tells_its_owners_and_takes_its_frames_away() {
    let (space, _bar, buffer) = buffer();
    let range = buffer.range();
    let runs = fault(&space, range, Access::Write).expect("faultable");
    let recorder = Recorder::new();
    let _interval = space.notifiers().register(range, recorder.clone());
    drop(buffer);
    // What comes after is of another test, which may have mapped and unmapped memory at these addresses by now.
    let told = crate::mapped::once(recorder.take());
    assert_eq!(told.get(..2), Some(&[Told::Clear(range), Told::Unlink(range)][..]), "{told:?}");
    let at = runs[0].phys;
    assert_eq!(space.memory().read(at, &mut [0]), Err(MemoryError::Unbacked { at }));
    // Another test may have mapped something there by now.
    let after = fault(&space, range, Access::Read).unwrap_or_default();
    assert!(after.iter().all(|run| run.phys != at && run.backing != Backing::DmabufSystem), "{after:?}");
}

#[test]
fn a_buffer_can_take_the_place_of_part_of_a_mapping() {
    let space = open(Options::default());
    let memory = Mapped::anonymous(PAGES + 8);
    memory.touch(0, PAGES + 8, 7);
    let _watch = space.watch(memory.range()).expect("mapped");
    let before = fault(&space, memory.range(), Access::Write).expect("faultable");
    let range = memory.part(4, PAGES);
    let buffer = DmabufMapping::at(&space, memory.lend(4, PAGES), peer(&space)).expect("a buffer");
    assert_eq!(buffer.range(), range);
    let other = DmabufMapping::at(&space, memory.lend(6, PAGES), peer(&space)).unwrap_err();
    assert_eq!(other, DmabufError::Taken { range: memory.part(6, PAGES), other: range });
    buffer.move_to_peer(1..2).expect("in the buffer");
    let runs = fault(&space, memory.range(), Access::Write).expect("faultable");
    let kinds: Vec<_> = runs.iter().map(|run| (run.pages, run.backing)).collect();
    let (anonymous, system) = (Backing::Anonymous, Backing::DmabufSystem);
    let expected =
        [(4, anonymous), (1, system), (1, Backing::DmabufPeer), (PAGES - 2, system), (4, anonymous)];
    assert_eq!(kinds, expected);
    let host = space.memory();
    let stale = before[0].phys.offset(4 * PAGE_SIZE);
    assert_eq!(host.read(stale, &mut [0]), Err(MemoryError::Retired { at: stale }));
    assert_eq!(host.read(before[0].phys, &mut [0]), Ok(()), "what is beside it stays as it was");
    let expected = space.capabilities().rung.max(Rung::Owned);
    assert_eq!(space.rung(memory.range()), expected, "as weak as its weakest part");
    drop(buffer);
    let failed = fault(&space, memory.range(), Access::Read);
    assert_eq!(failed, Err(FaultError::Permission { at: range.start(), access: Access::Read }));
}

#[test]
fn bad_parts_and_ranges_are_refused() {
    let space = open(Options::default());
    let (memory, bar) = bar(&space);
    let (size, whole) = (bar.size(), PAGES * PAGE_SIZE);
    for (offset, bytes) in [(size - whole + PAGE_SIZE, whole), (1, PAGE_SIZE), (0, 0)] {
        let refused = PeerPart::new(&memory, &bar, offset, bytes).unwrap_err();
        assert_eq!(refused, DmabufError::OutsideBar(OutsideBar { offset, bytes, size }));
    }
    let other = BarMemory::new(&space, size).expect("memory");
    assert_eq!(PeerPart::new(&other, &bar, 0, whole).unwrap_err(), DmabufError::OtherMemory);
    let memory = Mapped::anonymous(PAGES + 1);
    let uneven = DmabufMapping::at(&space, memory.lend(0, PAGES + 1), peer(&space)).unwrap_err();
    assert_eq!(uneven, DmabufError::BadRange { range: memory.range(), pages: PAGES });
}

#[test]
fn importers_of_the_buffer_and_owners_of_its_addresses_follow_the_same_move() {
    let (space, _bar, buffer) = buffer();
    let importer = buffer.buffer().attach(ImportOptions::new(ImportMode::Dynamic)).expect("it lives");
    let (by_address, by_offset) = (Recorder::new(), Recorder::new());
    let _one = space.notifiers().register(buffer.range(), by_address.clone());
    let _other = importer.notifiers().register(buffer.buffer().range(), by_offset.clone());
    assert_eq!(buffer.move_to_peer(1..3), Ok(2));
    assert_eq!(
        crate::mapped::once(by_address.take()),
        [Told::Clear(page(&buffer, 1, 2)), Told::Unlink(page(&buffer, 1, 2))]
    );
    let offsets = VirtRange::new(VirtAddr(PAGE_SIZE), 2 * PAGE_SIZE).expect("fits");
    assert_eq!(by_offset.take(), [Told::Clear(offsets), Told::Unlink(offsets)]);
    let runs = |space: &dyn AddressSpace, range| {
        let mut runs = Vec::new();
        space.fault(range, Access::Write, &mut runs).expect("there");
        runs.into_iter().map(|run| (run.pages, run.phys, run.backing, run.provider)).collect::<Vec<_>>()
    };
    assert_eq!(runs(&*space, buffer.range()), runs(&*importer, buffer.buffer().range()), "the same pages");
    let pinned = buffer.buffer().attach(ImportOptions::new(ImportMode::Pinned)).expect("it lives");
    let pin = pinned.watch(offsets).expect("nothing moves");
    let refused = MoveError::Pinned { pages: 1..3, by: 1 };
    assert_eq!(buffer.move_to_system(0..PAGES), Err(refused.into()));
    assert!(by_address.take().is_empty(), "nobody is told of a move that does not happen");
    drop(pin);
    assert_eq!(buffer.move_to_system(0..PAGES), Ok(2));
}

#[test]
fn a_move_waits_for_the_cpu_and_an_access_may_nest() {
    let (_space, _bar, buffer) = buffer();
    let (moved, asked) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let access = buffer.cpu_access();
        scope.spawn(|| {
            asked.store(1, Ordering::Release);
            buffer.move_to_peer(0..1).expect("in the buffer");
            moved.store(true, Ordering::Release);
        });
        crate::mapped::until("the mover has come", || asked.load(Ordering::Acquire) == 1);
        std::thread::sleep(Duration::from_millis(5));
        let mut byte = [1];
        buffer.read_at(0, &mut byte).expect("an access inside an access does not wait for the move");
        assert!(!moved.load(Ordering::Acquire), "a page moved under the CPU's pointer");
        drop(access);
    });
    assert_eq!(buffer.place(0), Some(PagePlace::Peer));
}
