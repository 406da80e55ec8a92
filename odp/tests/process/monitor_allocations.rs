//! The monitor thread does not allocate or free, whatever it is told: if it did, it could wait for itself.
//!
//! Unsafe island. Invariant: the allocator hands everything on to the system's, and counts.
#![allow(unsafe_code)]

use super::{assert_passed, run_child};
use crate::mapped::{Mapped, Recorder, fault, memory_file, open, until};
use hw_model::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use odp::space::process::Options;
use odp::space::{Access, AddressSpace, Rung};
use rustix::fs::MemfdFlags;
use rustix::mm::{Advice, MprotectFlags};
use std::alloc::{GlobalAlloc, Layout, System};
use std::process::Command;

/// Set in the process that the test has to itself.
const ALONE: &str = "ANYPAGE_TEST_ALONE";

/// The thread whose calls are counted.
static WATCHED: AtomicI32 = AtomicI32::new(0);
static CALLS: AtomicU64 = AtomicU64::new(0);

struct Counting;

fn note() {
    let watched = WATCHED.load(Ordering::Relaxed);
    if watched != 0 && rustix::thread::gettid().as_raw_nonzero().get() == watched {
        CALLS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: every call is handed on as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: the caller's promise, handed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        note();
        // SAFETY: the caller's promise, handed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The monitor of the only space of this process.
fn monitor_thread() -> Option<i32> {
    let tasks = std::fs::read_dir("/proc/self/task").expect("tasks");
    let named = tasks.filter_map(Result::ok).find(|task| {
        std::fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim() == "anypage-monitor")
    });
    named.and_then(|task| task.file_name().to_string_lossy().parse().ok())
}

#[test]
fn the_monitor_neither_allocates_nor_frees() {
    // In a process of its own: other tests have monitors too.
    if std::env::var_os(ALONE).is_none() {
        let mut command = Command::new(std::env::current_exe().expect("a path"));
        command
            .args(["monitor_allocations::the_monitor_neither_allocates_nor_frees", "--exact"])
            .env(ALONE, "1");
        return assert_passed(&run_child(command).expect("this binary runs"));
    }
    let space = open(Options::default());
    if space.capabilities().rung > Rung::Events {
        println!(
            "SKIPPED the_monitor_neither_allocates_nor_frees: userfaultfd {}",
            space.capabilities().userfaultfd
        );
        return;
    }
    let (memory, place) = (Mapped::anonymous(64), Mapped::anonymous(64));
    let file = memory_file(64, MemfdFlags::empty()).expect("memfd");
    let shared = Mapped::shared_file(64, &file);
    let _watches = [&memory, &shared].map(|mapped| space.watch(mapped.range()).expect("mapped"));
    let recorder = Recorder::new();
    let _intervals =
        [&memory, &shared].map(|mapped| space.notifiers().register(mapped.range(), recorder.clone()));
    // A thread allocates before it runs what it was made for: it has begun once it has reported something.
    fault(&space, memory.range(), Access::Write).expect("faultable");
    memory.drop_pages(0, 1);
    until("the monitor has begun", || recorder.calls.load(Ordering::Relaxed) > 0);
    WATCHED.store(monitor_thread().expect("the monitor has its name"), Ordering::Relaxed);
    for round in 0..200 {
        let before = recorder.calls.load(Ordering::Relaxed);
        let runs = fault(&space, memory.range(), Access::Write).expect("faultable");
        fault(&space, shared.range(), Access::Write).expect("faultable");
        memory.drop_pages(round % 60, 3);
        shared.advise(round % 60, 2, Advice::LinuxRemove).expect("MADV_REMOVE");
        memory.replace(0, 2);
        memory.move_to(8, 2, &place, 8);
        memory.replace(8, 2);
        memory.protect(20, 1, MprotectFlags::READ);
        let at = runs[0].start.offset(20 * hw_model::addr::PAGE_SIZE);
        let run = runs.iter().find(|run| run.range().overlaps(memory.part(20, 1))).expect("faulted in");
        let _ = space.memory().write(run.phys.offset(at.0 - run.start.0), &[1]);
        memory.protect(20, 1, MprotectFlags::READ | MprotectFlags::WRITE);
        until("owners are told", || recorder.calls.load(Ordering::Relaxed) >= before + 8);
    }
    until("suspects are looked into", || space.stats().suspected > 0);
    WATCHED.store(0, Ordering::Relaxed);
    let stats = space.stats();
    assert!(stats.removed >= 400 && stats.unmapped >= 200 && stats.moved >= 200, "{stats:?}");
    assert_eq!(CALLS.load(Ordering::Relaxed), 0, "calls of the allocator by the monitor");
}
