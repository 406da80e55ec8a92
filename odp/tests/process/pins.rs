//! What pinned means: populated, locked, pinned for long.

use crate::mapped::{Mapped, disk_file, fault, in_child, open, snapshot};
use hw_model::addr::{PAGE_SIZE, page_bytes};
use hw_model::sync::Mutex;
use odp::space::process::{Options, ProcessSpace};
use odp::space::{Access, AddressSpace, PagePin, PinError, PinKind};
use rustix::fd::AsFd;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use rustix::process::Resource;
use rustix::thread::CapabilitySet;

const PAGES: u64 = 32;
const KEPT: [PinKind; 2] = [PinKind::Mlock, PinKind::RealPin];

/// These tests look at what the whole process has locked and pinned.
static ALONE: Mutex<()> = Mutex::new(());

/// A line of this process's status, in pages.
fn status(name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").expect("a process has one");
    let kib =
        text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse::<u64>().ok());
    kib.expect("the kernel says so") * 1024 / PAGE_SIZE
}

/// Locked and pinned pages.
fn kept() -> [u64; 2] {
    [status("VmLck:"), status("VmPin:")]
}

/// Pages kept as asked, or `None` where this machine refuses that kind, which is said.
fn pin(space: &ProcessSpace, memory: &Mapped, kind: PinKind) -> Option<PagePin> {
    match space.pin_pages(memory.range(), kind) {
        Ok(pin) => Some(pin),
        Err(error @ (PinError::MemlockLimit { .. } | PinError::NoIoUring { .. })) => {
            println!("SKIPPED pages that are {kind}: {error}");
            None
        }
        Err(error) => panic!("{kind}: {error}"),
    }
}

#[test]
fn pages_are_kept_while_a_pin_lives_and_not_longer() {
    let _alone = ALONE.lock();
    let space = open(Options::default());
    let before = kept();
    for kind in [PinKind::Populated, PinKind::Mlock, PinKind::RealPin] {
        let memory = Mapped::anonymous(PAGES);
        // Else a huge page of which a part is pinned is charged whole.
        memory.advise(0, PAGES, Advice::LinuxNoHugepage).expect("our own memory");
        let [locked, pinned] =
            [PinKind::Mlock, PinKind::RealPin].map(|one| if kind == one { PAGES } else { 0 });
        let Some(first) = pin(&space, &memory, kind) else { continue };
        assert_eq!(kept(), [before[0] + locked, before[1] + pinned], "{kind}");
        // Locks do not nest in the kernel: the first to go must not end the second.
        let second = pin(&space, &memory, kind).expect("once more");
        assert_eq!(second.kind(), kind);
        drop(first);
        assert_eq!(kept(), [before[0] + locked, before[1] + pinned], "{kind}: one is left");
        drop(second);
        assert_eq!(kept(), before, "{kind}: none is left");
    }
}

#[test]
fn locks_that_overlap_in_part_end_page_by_page() {
    let _alone = ALONE.lock();
    let space = open(Options::default());
    let memory = Mapped::anonymous(3 * PAGES);
    let before = kept()[0];
    let lock = |page| space.pin_pages(memory.part(page, 2 * PAGES), PinKind::Mlock);
    let (low, high) = match (lock(0), lock(PAGES)) {
        (Ok(low), Ok(high)) => (low, high),
        refused => return println!("SKIPPED locks_that_overlap_in_part_end_page_by_page: {refused:?}"),
    };
    assert_eq!(kept()[0] - before, 3 * PAGES);
    drop(low);
    assert_eq!(kept()[0] - before, 2 * PAGES);
    drop(high);
    assert_eq!(kept()[0], before);
}

/// What would be wrong if this failed: munlock(2) stops at the first hole, and what is beyond it would stay locked for good.
#[test]
fn a_lock_over_memory_that_was_unmapped_in_part_ends_beyond_the_hole() {
    let _alone = ALONE.lock();
    let space = open(Options::default());
    let memory = Mapped::anonymous(PAGES);
    let before = kept()[0];
    let Some(lock) = pin(&space, &memory, PinKind::Mlock) else { return };
    memory.unmap(3, 2);
    assert_eq!(kept()[0] - before, PAGES - 2);
    drop(lock);
    assert_eq!(kept()[0], before);
}

/// What would be wrong if this failed: memory that was mapped anew under a lock would be taken for locked.
#[test]
fn memory_that_was_mapped_anew_is_locked_by_the_next_lock() {
    let _alone = ALONE.lock();
    let space = open(Options::default());
    let memory = Mapped::anonymous(PAGES);
    let before = kept()[0];
    let Some(first) = pin(&space, &memory, PinKind::Mlock) else { return };
    memory.replace(0, 4);
    assert_eq!(kept()[0] - before, PAGES - 4);
    let second = pin(&space, &memory, PinKind::Mlock).expect("once more");
    assert_eq!(kept()[0] - before, PAGES);
    drop((first, second));
    assert_eq!(kept()[0], before);
}

#[test]
fn a_locked_page_is_not_dropped_and_a_pinned_one_is_but_stays_in_use() {
    let _alone = ALONE.lock();
    let space = open(Options::default());
    for kind in KEPT {
        let memory = Mapped::anonymous(PAGES);
        let _watch = space.watch(memory.range()).expect("mapped");
        memory.touch(0, PAGES, 7);
        let Some(pin) = pin(&space, &memory, kind) else { continue };
        let pinned = kept()[1];
        let dropped = memory.advise(0, 1, Advice::LinuxDontNeed);
        match kind {
            PinKind::Mlock => assert_eq!((dropped, memory.byte(0)), (Err(Errno::INVAL), 7)),
            _ => assert_eq!((dropped, memory.byte(0), kept()[1]), (Ok(()), 0, pinned)),
        }
        assert_eq!(memory.byte(1), 7);
        drop(pin);
        memory.advise(1, 1, Advice::LinuxDontNeed).expect("nothing keeps it");
    }
}

/// Clean pages of a file are the first that the kernel takes back.
#[test]
fn reclaim_leaves_locked_pages_where_they_are() {
    let _alone = ALONE.lock();
    let space = open(Options::default());
    let file = disk_file(PAGES, 9);
    file.sync_all().expect("room on the disk");
    let memory = Mapped::map(PAGES, ProtFlags::READ, MapFlags::SHARED, Some(file.as_fd())).expect("memory");
    let Some(lock) = pin(&space, &memory, PinKind::Mlock) else { return };
    let pages = |runs: Vec<odp::page::PageRun>| runs.iter().map(|run| run.pages).sum::<u64>();
    assert_eq!(pages(fault(&space, memory.range(), Access::Read).expect("readable")), PAGES);
    // Whether it is refused or has nothing to take is the kernel's affair.
    let _ = memory.advise(0, PAGES, Advice::LinuxPageOut);
    assert_eq!(pages(snapshot(&space, memory.range())), PAGES);
    drop(lock);
}

#[test]
fn what_cannot_be_pinned_for_long_is_named() {
    let _alone = ALONE.lock();
    let space = open(Options::default());
    let before = kept();
    let file = disk_file(PAGES, 1);
    let tracked = Mapped::shared_file(PAGES, &file);
    let closed = Mapped::map(PAGES, ProtFlags::READ, MapFlags::PRIVATE, None).expect("memory");
    let refusal = |memory: &Mapped| space.pin_pages(memory.range(), PinKind::RealPin).map(drop);
    if let Err(error @ PinError::NoIoUring { .. }) = refusal(&closed) {
        return println!("SKIPPED what_cannot_be_pinned_for_long_is_named: {error}");
    }
    assert_eq!(refusal(&closed), Err(PinError::NotWritable { at: closed.range().start() }));
    // A folder in memory tracks nothing, and there is nothing to refuse.
    match rustix::fs::fstatfs(&file).expect("open").f_type {
        0x0102_1994 => {
            println!("SKIPPED a file that tracks what is written: the temporary folder is a tmpfs")
        }
        _ => assert_eq!(refusal(&tracked), Err(PinError::DirtyTracking { at: tracked.range().start() })),
    }
    assert_eq!(kept(), before);
}

/// Runs `work` on a thread whose MEMLOCK limit binds it.
fn without_privilege<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let work = || {
        let mut sets = rustix::thread::capabilities(None).expect("our own");
        sets.effective.remove(CapabilitySet::IPC_LOCK);
        rustix::thread::set_capabilities(None, sets).expect("fewer can be had");
        work()
    };
    std::thread::scope(|scope| scope.spawn(work).join().expect("it does not panic"))
}

#[test]
fn a_limit_is_named_with_what_is_needed_and_how_to_raise_it() {
    let _alone = ALONE.lock();
    let space = open(Options::default());
    let limit = rustix::process::getrlimit(Resource::Memlock).current;
    let Some(limit) = limit.filter(|limit| *limit <= 64 << 20) else {
        return println!("SKIPPED a_limit_is_named_with_what_is_needed_and_how_to_raise_it: limit {limit:?}");
    };
    let pages = limit / PAGE_SIZE + 1;
    let memory = Mapped::anonymous(pages);
    let before = kept();
    for (kind, held) in KEPT.into_iter().zip(before) {
        let refused = without_privilege(|| space.pin_pages(memory.range(), kind).map(drop));
        let Err(error) = refused else { panic!("{kind}: {pages} pages within {limit} bytes") };
        if matches!(error, PinError::NoIoUring { .. }) {
            println!("SKIPPED the limit of pages that are {kind}: {error}");
            continue;
        }
        let (needed, held) = (page_bytes(pages), page_bytes(held));
        assert_eq!(error, PinError::MemlockLimit { kind, needed, held, limit });
        let raise = format!("`ulimit -l {}`", (needed + held).div_ceil(1024));
        assert!(error.to_string().contains(&raise), "{error}");
        assert_eq!(kept(), before, "{kind}: nothing is kept");
    }
}

#[test]
fn where_io_uring_is_refused_that_is_said_and_locks_are_to_be_had() {
    let _alone = ALONE.lock();
    let space = open(Options::default());
    let memory = Mapped::anonymous(PAGES);
    let before = kept();
    let refused = std::thread::scope(|scope| {
        let work = || {
            crate::refuse::calls(&[libc::SYS_io_uring_setup], None).expect("fewer system calls can be had");
            space.pin_pages(memory.range(), PinKind::RealPin).map(drop)
        };
        scope.spawn(work).join().expect("it does not panic")
    });
    let Err(PinError::NoIoUring { reason }) = &refused else { panic!("{refused:?}") };
    assert_eq!(*reason, Errno::PERM.to_string());
    drop(pin(&space, &memory, PinKind::Mlock));
    assert_eq!(kept(), before);
}

/// What would be wrong if this failed: a child that forgets what it inherited would end its parent's pins.
#[test]
fn a_child_ends_no_pin_of_its_parent() {
    let _alone = ALONE.lock();
    let space = open(Options::default());
    let memory = Mapped::anonymous(PAGES);
    let before = kept();
    let pins: Vec<_> = KEPT.into_iter().filter_map(|kind| pin(&space, &memory, kind)).collect();
    let with = kept();
    let mut pins = Some(pins);
    let ended = in_child(|| {
        drop(pins.take());
        0
    });
    assert_eq!((ended, kept()), (Some(0), with));
    drop(pins);
    assert_eq!(kept(), before);
}
