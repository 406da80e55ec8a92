//! The exact rung: this binary again, with the filter installed before main, in which all tests run once more, and those of
//! this file besides.
//!
//! Unsafe island. Invariant: the constructor runs before any thread is made, and touches nothing of the tests; system
//! calls made here are on memory that the test has mapped for itself.
#![allow(unsafe_code)]

use crate::mapped::{Mapped, Recorder, Told, disk_file, fault, in_child, memory_file, open, system_v, until};
use crate::{assert_passed, is_child, run_child};
use hw_model::addr::{PhysAddr, VirtAddr, VirtRange};
use hw_model::bus::MemoryError;
use hw_model::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use hw_model::sync::{Arc, OnceLock};
use odp::space::process::{Exact, InstallError, Options, ProcessSpace};
use odp::space::{Access, AddressSpace, FaultError, Rung};
use rustix::fs::{FallocateFlags, MemfdFlags};
use rustix::mm::{Advice, MprotectFlags};
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

/// Set in a process that is to install the filter before main.
const EXACT: &str = "ANYPAGE_TEST_EXACT";
/// Set in a process that a test has to itself.
const ALONE: &str = "ANYPAGE_TEST_ALONE_EXACT";

static INSTALLED: OnceLock<Result<Exact, InstallError>> = OnceLock::new();

extern "C" fn before_main() {
    if std::env::var_os(EXACT).is_some() {
        INSTALLED.get_or_init(Exact::install);
    }
    crate::refused::before_main();
}

// SAFETY: the loader calls what is listed in this section, with arguments that the function may ignore.
#[used]
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn() = before_main;

/// The exact rung, in a process that has it.
pub fn installed() -> Option<Exact> {
    INSTALLED.get()?.ok()
}

/// This binary again, on the exact rung, with one test or all of them. A process on the exact rung has no second one below
/// it, so this is for the process that the tests began in.
fn again(test: Option<&str>, variable: &str) -> Option<Output> {
    if is_child() || installed().is_some() || crate::refused::is_refused() {
        return None;
    }
    let run = |test: Option<&str>, variable: &str| {
        let mut command = Command::new(std::env::current_exe().expect("a path"));
        command.args(test.into_iter().flat_map(|test| [test, "--exact"])).env(EXACT, "1").env(variable, "1");
        run_child(command).expect("this binary runs")
    };
    let probe = run(Some("exact::the_rung_can_be_had"), EXACT);
    if let Some(reason) =
        String::from_utf8_lossy(&probe.stdout).lines().find(|line| line.starts_with("REFUSED"))
    {
        let what = test.unwrap_or("everything_passes_on_the_exact_rung");
        println!("SKIPPED {what}: {reason}");
        return None;
    }
    Some(run(test, variable))
}

#[test]
fn the_rung_can_be_had() {
    if let Some(Err(error)) = INSTALLED.get() {
        println!("REFUSED: {error}");
    }
}

#[test]
fn everything_passes_on_the_exact_rung() {
    if let Some(output) = again(None, EXACT) {
        assert_passed(&output);
    }
}

#[test]
fn a_process_with_threads_is_refused_and_says_how_many() {
    if installed().is_some() {
        let again = Exact::install();
        assert_eq!(again, Err(InstallError::Installed));
        return;
    }
    // The test runner's main thread waits for this one.
    match Exact::install() {
        Err(InstallError::Threads { threads }) => assert!(threads >= 2, "{threads}"),
        other => panic!("installed beside other threads: {other:?}"),
    }
}

/// A space on the exact rung, in the child that has it.
fn space() -> Option<Arc<ProcessSpace>> {
    installed()?;
    let space = open(Options::default());
    assert_eq!(space.capabilities().rung, Rung::Exact);
    Some(space)
}

fn is_retired(space: &ProcessSpace, phys: PhysAddr) -> bool {
    matches!(space.memory().read(phys, &mut [0; 8]), Err(MemoryError::Retired { .. }))
}

/// What `change` tells the owner of `memory`: all of it before it returns, and every frame in `gone` is retired.
fn told(space: &ProcessSpace, memory: VirtRange, gone: VirtRange, change: impl FnOnce()) {
    let watch = space.watch(memory).expect("mapped");
    assert_eq!(space.rung(memory), Rung::Exact);
    let frames = fault(space, memory, Access::Read).expect("faultable");
    let recorder = Recorder::new();
    let interval = space.notifiers().register(memory, recorder.clone());
    let sequence = interval.begin().expect("quiet");
    change();
    assert!(interval.retry(&sequence), "a fault under way must learn that it lost");
    let told = recorder.take();
    let [Told::Clear(cleared), .., Told::Unlink(_)] = told[..] else { panic!("told {told:?}") };
    assert!(cleared.contains(gone), "{cleared} was cleared, {gone} has gone");
    for run in frames.iter().filter(|run| gone.contains(run.range())) {
        assert!(is_retired(space, run.phys), "{:?} is still to be had", run.range());
    }
    drop((interval, watch));
}

#[test]
fn every_call_that_takes_pages_away_is_bracketed() {
    let Some(space) = space() else { return };
    let memory = || Mapped::anonymous(8);
    let m = memory();
    told(&space, m.range(), m.range(), || m.drop_pages(0, 8));
    told(&space, m.range(), m.range(), || m.advise(0, 8, Advice::LinuxFree).expect("MADV_FREE"));
    told(&space, m.range(), m.range(), || m.protect(0, 8, MprotectFlags::READ));
    m.protect(0, 8, MprotectFlags::READ | MprotectFlags::WRITE);
    told(&space, m.range(), m.range(), || m.replace(0, 8));
    let other = memory();
    told(&space, m.range(), m.range(), || m.move_to(0, 8, &other, 0));
    told(&space, other.range(), other.range(), || other.unmap(0, 8));

    let file = memory_file(8, MemfdFlags::empty()).expect("memfd");
    let shared = Mapped::shared_file(8, &file);
    told(&space, shared.range(), shared.range(), || {
        shared.advise(0, 8, Advice::LinuxRemove).expect("MADV_REMOVE");
    });
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    told(&space, shared.range(), shared.part(2, 3), || {
        rustix::fs::fallocate(&file, flags, 2 * 4096, 3 * 4096).expect("a hole");
    });
    told(&space, shared.range(), shared.part(4, 4), || {
        rustix::fs::ftruncate(&file, 4 * 4096).expect("truncation");
    });
    assert!(matches!(fault(&space, shared.part(4, 1), Access::Read), Err(FaultError::NoMapping { .. })));
    let disk = disk_file(8, 7);
    let mapped = Mapped::shared_file(8, &disk);
    told(&space, mapped.range(), mapped.part(3, 5), || {
        rustix::fs::ftruncate(&disk, 3 * 4096).expect("truncation");
    });
    match system_v(4) {
        Some(segment) => {
            let range = segment.range();
            let at = std::ptr::with_exposed_provenance(range.start().0 as usize);
            told(&space, range, range, || {
                // SAFETY: the segment attached there, and nobody has references to it.
                assert_eq!(unsafe { libc::shmdt(at) }, 0);
            });
            std::mem::forget(segment);
        }
        None => println!("SKIPPED every_call_that_takes_pages_away (System V): no segment to be had"),
    }
    let stats = space.stats();
    assert!(
        stats.removed >= 6 && stats.unmapped >= 3 && stats.moved >= 1 && stats.protected >= 2,
        "{stats:?}"
    );
}

#[test]
fn the_heap_is_bracketed_when_it_shrinks() {
    if std::env::var_os(ALONE).is_none() {
        // In a process of its own: other tests use the heap.
        if let Some(output) = again(Some("exact::the_heap_is_bracketed_when_it_shrinks"), ALONE) {
            assert_passed(&output);
        }
        return;
    }
    let Some(space) = space() else { return };
    // SAFETY: asks where the heap ends.
    let end = unsafe { libc::sbrk(0) } as u64;
    let whole = end.next_multiple_of(4096);
    // SAFETY: grows the heap by pages that nobody else is given, since the allocator asks for the end anew.
    let grown = unsafe { libc::brk(std::ptr::with_exposed_provenance_mut((whole + 8 * 4096) as usize)) };
    assert_eq!(grown, 0);
    let range = VirtRange::new(VirtAddr(whole), 8 * 4096).expect("user memory");
    let before = space.stats().unmapped;
    let watch = space.watch(range).expect("mapped");
    let recorder = Recorder::new();
    let interval = space.notifiers().register(range, recorder.clone());
    // SAFETY: gives back what was taken above.
    let shrunk = unsafe { libc::brk(std::ptr::with_exposed_provenance_mut(whole as usize)) };
    assert_eq!(shrunk, 0);
    assert!(space.stats().unmapped > before);
    assert!(recorder.take().contains(&Told::Clear(range)));
    drop((interval, watch));
}

#[test]
fn calls_that_fail_fail_as_they_would() {
    if installed().is_none() {
        return;
    }
    // SAFETY: no mapping begins inside a page; refused.
    let refused = unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(0x1001), 4096) };
    assert_eq!(refused, -1);
    assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EINVAL));
    // SAFETY: no such descriptor.
    assert_eq!(unsafe { libc::ftruncate(-1, 0) }, -1);
    assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EBADF));
}

#[test]
fn children_and_what_they_become_go_on() {
    let Some(exact) = installed() else { return };
    let before = exact.calls();
    let memory = Mapped::anonymous(4);
    memory.touch(0, 4, 9);
    // A forked child's memory is its own.
    let code = in_child(|| {
        memory.unmap(0, 4);
        0
    });
    assert_eq!((code, memory.byte(3)), (Some(0), 9));
    // A spawned program (posix_spawn), which shares our memory until it execs.
    let output = Command::new("/bin/sh").args(["-c", "ls / | wc -l; exit 3"]).output().expect("a shell");
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(!output.stdout.is_empty());
    assert!(exact.calls() >= before);
}

#[test]
fn a_program_that_this_process_becomes_goes_on_and_so_does_what_it_leaves_behind() {
    if std::env::var_os(ALONE).is_none() {
        let name = "exact::a_program_that_this_process_becomes_goes_on_and_so_does_what_it_leaves_behind";
        if let Some(output) = again(Some(name), ALONE) {
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(text.contains("a shell, a child of it, and an orphan"), "{output:?}");
        }
        return;
    }
    // The supervisor goes with this program. Every shell and every program that it runs makes calls that are filtered.
    let script = "printf 'a shell, '; (sleep 0.2; ls / >/dev/null && echo 'and an orphan') & \
                  ls / >/dev/null && printf 'a child of it, '";
    let error = Command::new("/bin/sh").args(["-c", script]).exec();
    panic!("exec: {error}");
}

/// A device reads the page over and over through the frame it was last given, while the page is dropped and filled again.
/// Past the moment that the drop begins, the frame gives nothing.
#[test]
fn nothing_is_read_through_a_frame_once_its_page_goes() {
    let Some(space) = space() else { return };
    let memory = Mapped::anonymous(1);
    let _watch = space.watch(memory.range()).expect("mapped");
    let _interval = space.notifiers().register(memory.range(), Recorder::new());
    let (frame, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let (reads, zeroes) = (AtomicU64::new(0), AtomicU64::new(0));
    let host = space.memory();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut slot = host.epoch().register().expect("a slot");
            while !stop.load(Ordering::Relaxed) {
                let Ok(_burst) = slot.enter() else { continue };
                let mut byte = [0xff];
                if host.read(PhysAddr(frame.load(Ordering::Acquire)), &mut byte).is_ok() {
                    reads.fetch_add(1, Ordering::Relaxed);
                    zeroes.fetch_add(u64::from(byte == [0]), Ordering::Relaxed);
                }
            }
        });
        for _ in 0..500 {
            memory.touch(0, 1, 0x77);
            let runs = fault(&space, memory.range(), Access::Write).expect("faultable");
            let seen = reads.load(Ordering::Relaxed);
            frame.store(runs[0].phys.0, Ordering::Release);
            until("the device has read", || reads.load(Ordering::Relaxed) > seen);
            memory.drop_pages(0, 1);
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(zeroes.load(Ordering::Relaxed), 0, "a device read a page after it was dropped");
}
