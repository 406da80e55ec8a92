//! The process space tells every kind of page from every other, and refuses what has none.

use crate::mapped::{Mapped, RW, disk_file, fault, memory_file, open, snapshot};
use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange};
use hw_model::bus::{AtomicOp, MemoryError};
use odp::page::{Backing, PageRun};
use odp::space::process::{CopyMethod, Options, OwnedMemory, ProcessSpace};
use odp::space::{Access, AddressSpace, FaultError, Rung, WatchError};
use rustix::fd::AsFd;
use rustix::fs::MemfdFlags;
use rustix::mm::{Advice, MapFlags, MprotectFlags};

/// Every way of finding out what is mapped and present, so that none of them rots.
fn ways() -> Vec<Options> {
    let mut ways = Vec::new();
    for strongest in [Rung::Exact, Rung::Poll] {
        for pagemap_scan in [true, false] {
            for procmap_query in [true, false] {
                ways.push(Options { strongest, pagemap_scan, procmap_query, copy: None, exact: None });
            }
        }
    }
    ways
}

/// Kind, pages and right of each stretch. On the exact rung, what other threads unmapped there before makes frames of several
/// generations, and so runs, of one stretch.
fn kinds(runs: &[PageRun]) -> Vec<(Backing, u64, bool)> {
    let alike = |a: &PageRun, b: &PageRun| {
        (a.backing, a.writable, a.range().end()) == (b.backing, b.writable, b.start)
    };
    let pages = |stretch: &[PageRun]| stretch.iter().map(|run| run.pages).sum();
    runs.chunk_by(alike).map(|stretch| (stretch[0].backing, pages(stretch), stretch[0].writable)).collect()
}

fn one(space: &ProcessSpace, memory: &Mapped, access: Access) -> (Backing, u64, bool) {
    let runs = fault(space, memory.range(), access).expect("faultable");
    let [kind] = kinds(&runs)[..] else { panic!("{runs:?}") };
    assert_eq!((runs[0].start, kind.1), (memory.range().start(), memory.range().page_count()));
    kind
}

#[test]
fn every_kind_of_mapping_is_reported_as_what_it_is() {
    for way in ways() {
        let space = open(way);
        let anonymous = Mapped::anonymous(4);
        assert_eq!(one(&space, &anonymous, Access::Write), (Backing::Anonymous, 4, true), "{way:?}");

        let file = memory_file(4, MemfdFlags::empty()).expect("memfd");
        let shared = Mapped::shared_file(4, &file);
        assert_eq!(one(&space, &shared, Access::Read), (Backing::Shared, 4, true), "{way:?}");

        let shared_anonymous = Mapped::map(4, RW, MapFlags::SHARED, None).expect("shared anonymous memory");
        assert_eq!(one(&space, &shared_anonymous, Access::Write), (Backing::Shared, 4, true), "{way:?}");

        match crate::mapped::system_v(4) {
            Some(segment) => {
                assert_eq!(one(&space, &segment, Access::Write), (Backing::Shared, 4, true), "{way:?}");
            }
            None => println!("SKIPPED every_kind_of_mapping (System V): no segment to be had"),
        }

        let disk = disk_file(4, 7);
        let shared_file = Mapped::shared_file(4, &disk);
        assert_eq!(one(&space, &shared_file, Access::Write), (Backing::File, 4, true), "{way:?}");

        let private_file =
            Mapped::map(4, RW, MapFlags::PRIVATE, Some(disk.as_fd())).expect("a private mapping of a file");
        assert_eq!(
            one(&space, &private_file, Access::Read),
            (Backing::File, 4, false),
            "the page cache is not to be written through a private mapping; {way:?}"
        );
        assert_eq!(one(&space, &private_file, Access::Write), (Backing::File, 4, true), "{way:?}");
    }
}

#[test]
fn the_zero_page_and_huge_pages_are_told_apart_where_the_kernel_scans() {
    let space = open(Options::default());
    if !space.capabilities().pagemap_scan.is_yes() {
        println!("SKIPPED the_zero_page_and_huge_pages: no PAGEMAP_SCAN");
        return;
    }
    let zero = Mapped::anonymous(4);
    assert_eq!(one(&space, &zero, Access::Read), (Backing::Zero, 4, false));
    assert_eq!(one(&space, &zero, Access::Write), (Backing::Anonymous, 4, true));

    let huge = Mapped::aligned(1024, 2 << 20);
    huge.advise(0, 1024, Advice::LinuxHugepage).expect("MADV_HUGEPAGE");
    let runs = fault(&space, huge.range(), Access::Write).expect("faultable");
    if runs.iter().all(|run| run.backing != Backing::TransparentHuge) {
        println!("SKIPPED the_zero_page_and_huge_pages (huge part): the host gave no huge page");
        return;
    }
    assert_eq!(kinds(&runs), [(Backing::TransparentHuge, 1024, true)]);
    assert_eq!(runs[0].order_shift, 21);
    assert!(runs[0].phys.is_aligned(2 << 20), "a frame is aligned as its page is");
    huge.protect(3, 1, MprotectFlags::READ);
    let runs = snapshot(&space, huge.range());
    let split: u64 = runs.iter().filter(|run| run.backing == Backing::Anonymous).map(|run| run.pages).sum();
    assert_eq!(split, 512, "protecting one page splits its huge page: {runs:?}");
    assert!(runs.iter().any(|run| run.pages == 1 && !run.writable), "{runs:?}");
}

#[test]
fn hugetlb_pages_are_reported_with_their_size() {
    let space = open(Options::default());
    let file = memory_file(512, MemfdFlags::HUGETLB);
    let huge = file
        .map_err(std::io::Error::from)
        .and_then(|file| Mapped::map(512, RW, MapFlags::SHARED, Some(file.as_fd())));
    let Ok(huge) = huge else {
        println!("SKIPPED hugetlb_pages_are_reported: the host has no hugetlb page to spare");
        return;
    };
    let runs = fault(&space, huge.range(), Access::Write).expect("reserved at mmap");
    assert_eq!(kinds(&runs), [(Backing::Hugetlb, 512, true)]);
    assert_eq!(runs[0].order_shift, 21);
}

#[test]
fn what_was_never_touched_is_not_in_a_snapshot() {
    for way in ways() {
        let space = open(way);
        let memory = Mapped::anonymous(8);
        memory.touch(2, 1, 1);
        memory.touch(5, 2, 1);
        let pages: Vec<_> = snapshot(&space, memory.range())
            .iter()
            .map(|run| ((run.start.0 - memory.range().start().0) / PAGE_SIZE, run.pages))
            .collect();
        assert_eq!(pages, [(2, 1), (5, 2)], "{way:?}");
    }
}

/// If this fails, a page is missing from what was asked for, or is not one's own to write, because others were there before.
#[test]
fn what_is_missing_among_pages_that_are_there_is_brought_in() {
    let usable = |runs: &[PageRun]| runs.iter().filter(|run| run.writable).map(|run| run.pages).sum::<u64>();
    for way in ways() {
        let space = open(way);
        let memory = Mapped::anonymous(4096);
        memory.advise(0, 4096, Advice::LinuxNoHugepage).expect("MADV_NOHUGEPAGE");
        // Pages that are there, pages of zeroes and nothing at all in turns, then much of each.
        for page in (0..900).step_by(3) {
            memory.touch(page, 1, 7);
            assert_eq!(memory.byte(page + 1), 0);
        }
        memory.touch(1000, 1000, 7);
        (2000..3000).for_each(|page| assert_eq!(memory.byte(page), 0));
        assert_eq!(
            usable(&fault(&space, memory.range(), Access::Write).expect("faultable")),
            4096,
            "{way:?}"
        );
        let there = kinds(&snapshot(&space, memory.range()));
        assert_eq!(there, [(Backing::Anonymous, 4096, true)], "{way:?}");
        assert_eq!([0, 1, 2, 1999, 2000].map(|page| memory.byte(page)), [7, 0, 0, 7, 0]);

        let disk = disk_file(512, 7);
        let private =
            Mapped::map(512, RW, MapFlags::PRIVATE, Some(disk.as_fd())).expect("a private mapping of a file");
        (0..512).for_each(|page| assert_eq!(private.byte(page), 7));
        (0..512).step_by(5).for_each(|page| private.touch(page, 1, 8));
        let shared = Mapped::shared_file(512, &disk);
        (0..512).for_each(|page| assert_eq!(shared.byte(page), 7));
        for file in [&private, &shared] {
            assert_eq!(
                usable(&fault(&space, file.range(), Access::Write).expect("faultable")),
                512,
                "{way:?}"
            );
        }
        shared.touch(1, 1, 9);
        assert_eq!(
            [0, 1, 5].map(|page| private.byte(page)),
            [8, 7, 8],
            "the file's pages are not the mapping's"
        );
    }
}

#[test]
fn the_first_bad_address_is_named_and_what_is_before_it_reported() {
    for way in ways() {
        let space = open(way);
        let memory = Mapped::anonymous(300);
        memory.touch(0, 300, 1);
        memory.unmap(200, 1);
        let at = |page: u64| memory.part(page, 1).start();
        let mut out = Vec::new();
        assert_eq!(
            space.snapshot(memory.range(), &mut out),
            Err(FaultError::NoMapping { at: at(200) }),
            "{way:?}"
        );
        assert_eq!(out.iter().map(|run| run.pages).sum::<u64>(), 200);
        out.clear();
        let failed = space.fault(memory.range(), Access::Write, &mut out);
        assert_eq!(failed, Err(FaultError::NoMapping { at: at(200) }), "{way:?}");
        assert_eq!(out.iter().map(|run| run.pages).sum::<u64>(), 200);

        memory.protect(150, 1, MprotectFlags::READ);
        out.clear();
        let failed = space.fault(memory.range(), Access::Write, &mut out);
        assert_eq!(failed, Err(FaultError::Permission { at: at(150), access: Access::Write }), "{way:?}");
        assert_eq!(out.iter().map(|run| run.pages).sum::<u64>(), 150);
        assert!(fault(&space, memory.part(0, 200), Access::Read).is_ok());

        memory.protect(100, 1, MprotectFlags::empty());
        let failed = fault(&space, memory.range(), Access::Read);
        assert_eq!(failed, Err(FaultError::Permission { at: at(100), access: Access::Read }), "{way:?}");

        let file = memory_file(8, MemfdFlags::empty()).expect("memfd");
        let shared = Mapped::shared_file(8, &file);
        rustix::fs::ftruncate(&file, 5 * PAGE_SIZE).expect("ftruncate");
        let failed = fault(&space, shared.range(), Access::Write);
        assert_eq!(failed, Err(FaultError::NoMapping { at: shared.part(5, 1).start() }), "{way:?}");
    }
}

#[test]
fn special_memory_and_kernel_addresses_are_refused() {
    let space = open(Options::default());
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    match maps.lines().find(|line| line.ends_with("[vvar]")) {
        Some(line) => {
            let start = line.split('-').next().and_then(|start| u64::from_str_radix(start, 16).ok());
            let at = VirtAddr(start.expect("a start"));
            let range = VirtRange::new(at, PAGE_SIZE).expect("a page");
            assert_eq!(fault(&space, range, Access::Read), Err(FaultError::Special { at }));
        }
        None => println!("SKIPPED special_memory_and_kernel_addresses (vvar): not mapped here"),
    }
    for (start, len) in [(1 << 47, PAGE_SIZE), (u64::MAX - 4095, 4096), (0xffff_ffff_ff60_0000, 4096)] {
        let range = VirtRange::new(VirtAddr(start), len).expect("fits");
        assert!(matches!(fault(&space, range, Access::Read), Err(FaultError::NoMapping { .. })), "{range}");
        assert_eq!(space.watch(range).unwrap_err(), WatchError::BadRange { range });
    }
    let memory = Mapped::anonymous(2);
    let odd = VirtRange::new(memory.range().start().offset(1), PAGE_SIZE).expect("fits");
    assert_eq!(space.watch(odd).unwrap_err(), WatchError::BadRange { range: odd });
    memory.unmap(1, 1);
    let at = memory.part(1, 1).start();
    assert_eq!(space.watch(memory.range()).unwrap_err(), WatchError::NotMapped { range: memory.range(), at });
}

#[test]
fn a_frame_reads_and_writes_what_the_program_sees() {
    for copy in [CopyMethod::Recover, CopyMethod::SystemCall] {
        let space = open(Options { copy: Some(copy), ..Options::default() });
        let memory = Mapped::anonymous(4);
        let runs = fault(&space, memory.range(), Access::Write).expect("faultable");
        let host = space.memory();
        let data: Vec<u8> = (0..3 * PAGE_SIZE).map(|at| (at % 251) as u8).collect();
        host.write(runs[0].phys.offset(100), &data).expect("mapped");
        let mut back = vec![0; data.len()];
        host.read(runs[0].phys.offset(100), &mut back).expect("mapped");
        assert_eq!(back, data);
        memory.touch(3, 1, 0x5a);
        let mut byte = [0];
        host.read(runs[0].phys.offset(3 * PAGE_SIZE), &mut byte).expect("mapped");
        assert_eq!(byte, [0x5a]);
        let word = runs[0].phys.offset(8);
        assert_eq!(
            host.atomic(word.offset(4), AtomicOp::FetchAdd(1)),
            Err(MemoryError::Misaligned { at: word.offset(4) })
        );
        if copy == CopyMethod::Recover {
            host.write(word, &41_u64.to_ne_bytes()).expect("mapped");
            assert_eq!(host.atomic(word, AtomicOp::FetchAdd(1)), Ok(41));
            assert_eq!(host.atomic(word, AtomicOp::CompareSwap { compare: 42, swap: 7 }), Ok(42));
            assert_eq!(host.atomic(word, AtomicOp::CompareSwap { compare: 42, swap: 8 }), Ok(7));
        }
        let nobody = hw_model::addr::PhysAddr(1 << 62 | 0x1234_5000);
        assert_eq!(host.read(nobody, &mut byte), Err(MemoryError::Unbacked { at: nobody }));
    }
}

#[test]
fn owned_memory_has_frames_of_its_own_and_a_stale_one_moves_bytes() {
    let space = open(Options::default());
    let owned = OwnedMemory::new(&space, 3 * PAGE_SIZE + 1).expect("memory");
    assert_eq!(owned.size(), 4 * PAGE_SIZE);
    assert_eq!(space.rung(owned.range()), Rung::Owned);
    let _watch = space.watch(owned.range()).expect("mapped");
    let runs = fault(&space, owned.range(), Access::Write).expect("faultable");
    assert_eq!(kinds(&runs), [(Backing::Shared, 4, true)]);
    assert_eq!(runs[0].phys, owned.physical_base());
    owned.write_at(PAGE_SIZE, b"program").expect("in range");
    let host = space.memory();
    let mut seen = [0; 7];
    host.read(runs[0].phys.offset(PAGE_SIZE), &mut seen).expect("owned");
    assert_eq!(&seen, b"program");
    host.write(runs[0].phys.offset(PAGE_SIZE), b"devices").expect("owned");
    owned.read_at(PAGE_SIZE, &mut seen).expect("in range");
    assert_eq!(&seen, b"devices");

    let recorder = crate::mapped::Recorder::new();
    let interval = space.notifiers().register(owned.range(), recorder.clone());
    owned.discard(PAGE_SIZE, PAGE_SIZE).expect("whole pages");
    let page = VirtRange::new(owned.range().start().offset(PAGE_SIZE), PAGE_SIZE).expect("a page");
    assert_eq!(
        crate::mapped::once(recorder.take()),
        [crate::mapped::Told::Clear(page), crate::mapped::Told::Unlink(page)]
    );
    assert_eq!(snapshot(&space, owned.range()).iter().map(|run| run.pages).sum::<u64>(), 3);
    host.write(runs[0].phys.offset(PAGE_SIZE), b"wronged").expect("frames of owned memory are never refused");
    owned.read_at(PAGE_SIZE, &mut seen).expect("in range");
    assert_eq!(&seen, b"wronged", "a stale translation moves the wrong bytes");

    let (range, base) = (owned.range(), owned.physical_base());
    drop(owned);
    assert_eq!(
        crate::mapped::once(recorder.take()),
        [crate::mapped::Told::Clear(range), crate::mapped::Told::Unlink(range)]
    );
    assert_eq!(host.read(base, &mut seen), Err(MemoryError::Unbacked { at: base }));
    // Another test may have mapped something there by now.
    let after = fault(&space, range, Access::Read).unwrap_or_default();
    assert!(after.iter().all(|run| run.phys != base), "{after:?}");
    drop(interval);
}

/// A kernel that pins what it finds at an address must be handed the address of the frame's own memory, and none for a
/// frame that is another's by now.
#[test]
fn the_address_of_a_frame_is_lent_while_the_frame_is_reported_and_not_after() {
    let space = open(Options::default());
    let anonymous = Mapped::anonymous(2);
    let _watch = space.watch(anonymous.range()).expect("mapped");
    let runs = fault(&space, anonymous.range(), Access::Write).expect("faultable");
    let second = runs[0].phys.offset(PAGE_SIZE);
    let lent = |at, len| space.with_address(at, len, |address| address);
    assert_eq!(lent(second, PAGE_SIZE), Ok(anonymous.range().start().offset(PAGE_SIZE)));

    let owned = OwnedMemory::new(&space, 2 * PAGE_SIZE).expect("memory");
    let base = owned.physical_base();
    assert!(lent(base, 2 * PAGE_SIZE).is_ok());
    assert_eq!(lent(base, 3 * PAGE_SIZE), Err(MemoryError::Unbacked { at: base }));
    drop(owned);
    assert_eq!(lent(base, PAGE_SIZE), Err(MemoryError::Unbacked { at: base }));
}

#[test]
fn capabilities_say_what_is_in_force_and_why_not() {
    let weak = open(Options {
        strongest: Rung::Poll,
        pagemap_scan: false,
        procmap_query: false,
        copy: Some(CopyMethod::SystemCall),
        exact: None,
    });
    let text = weak.capabilities().to_string();
    assert!(text.contains("rung in force     poll") && text.contains("not used, by option"), "{text}");
    assert!(text.contains("no atomics"), "{text}");
    println!("{}", open(Options::default()).capabilities());
}
