//! Copies from memory that vanishes, and signals that are not ours.
//!
//! Unsafe island. Invariant: raw system calls of this file act only on memory that a test mapped for itself, and on the
//! test binary run again as a child.
#![allow(unsafe_code)]

use super::copy::{Copier, CopyMethod, Short};
use super::view::{View, memory_file};
use hw_model::addr::{PAGE_SIZE, VirtAddr};
use hw_model::bus::{AtomicOp, CopyEnd};
use hw_model::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};

fn copiers() -> [Copier; 2] {
    [CopyMethod::Recover, CopyMethod::SystemCall]
        .map(|method| Copier::new(method).expect("both work on Linux"))
}

fn pointer(at: VirtAddr) -> *mut std::ffi::c_void {
    std::ptr::with_exposed_provenance_mut(at.0 as usize)
}

fn protect(at: VirtAddr, flags: MprotectFlags) {
    // SAFETY: a page of the test's own view.
    unsafe { rustix::mm::mprotect(pointer(at), PAGE_SIZE as usize, flags) }.expect("mprotect");
}

/// `pages` pages of memory between inaccessible ones, and the file behind them.
fn island(pages: u64) -> (View, VirtAddr, rustix::fd::OwnedFd) {
    let view = View::reserve((pages + 2) * PAGE_SIZE, PAGE_SIZE).expect("address space");
    let file = memory_file("test", pages * PAGE_SIZE, false).expect("memory");
    view.place(PAGE_SIZE, pages * PAGE_SIZE, (&file, 0), false).expect("one more mapping");
    let at = view.range().start().offset(PAGE_SIZE);
    (view, at, file)
}

#[test]
fn every_size_and_alignment_is_copied_exactly() {
    let (_view, at, _file) = island(2);
    for copier in copiers() {
        for len in (0..40).chain([255, 256, 257, 263, 264, 265, 1000, 4096, 5000]) {
            for shift in 0..9 {
                let data: Vec<u8> = (0..len).map(|byte| (byte * 7 + shift) as u8 | 1).collect();
                let around = [0xaa; 1];
                let to = at.offset(64 + shift as u64);
                copier.write(to.offset(len as u64), &around).expect("mapped");
                copier.write(VirtAddr(to.0 - 1), &around).expect("mapped");
                copier.write(to, &data).expect("mapped");
                let mut back = vec![0; len + 2];
                copier.read(VirtAddr(to.0 - 1), &mut back).expect("mapped");
                assert_eq!(back[1..=len], data, "{len} bytes at {shift}, {copier:?}");
                assert_eq!((back[0], back[len + 1]), (0xaa, 0xaa), "neighbours, {len} bytes at {shift}");
            }
        }
    }
}

#[test]
fn a_copy_stops_where_memory_ends_and_says_how_far_it_came() {
    let (_view, at, file) = island(4);
    let end = at.offset(4 * PAGE_SIZE);
    for copier in copiers() {
        for (before, len) in [(4096, 5000), (4096, 4097), (300, 600), (16, 64), (8, 16), (5, 5 + 8), (1, 2)] {
            let from = VirtAddr(end.0 - before);
            let read = copier.read(from, &mut vec![0; len]);
            let written = copier.write(from, &vec![1; len]);
            for result in [read, written] {
                let copied = result.expect_err("the page after is not accessible").copied;
                // The last move, of up to 8 bytes, happens as a whole or not at all.
                assert!(copied <= before && copied + 8 > before, "{copied} of {before} bytes, {copier:?}");
            }
        }
        assert_eq!(copier.read(end, &mut [0; 8]), Err(Short { copied: 0 }));
        assert_eq!(copier.read(VirtAddr(8), &mut [0; 8]), Err(Short { copied: 0 }), "the null page");
        let wild = VirtAddr(0x8000_0000_0000_0000);
        assert_eq!(copier.read(wild, &mut [0; 64]), Err(Short { copied: 0 }), "no address at all");

        protect(at, MprotectFlags::READ);
        assert_eq!(copier.write(at, &[1; 100]), Err(Short { copied: 0 }), "read-only");
        assert_eq!(copier.read(at, &mut [0; 100]), Ok(()));
        protect(at, MprotectFlags::empty());
        assert_eq!(copier.read(at, &mut [0; 100]), Err(Short { copied: 0 }), "PROT_NONE");
        protect(at, MprotectFlags::READ | MprotectFlags::WRITE);

        rustix::fs::ftruncate(&file, 2 * PAGE_SIZE).expect("ftruncate");
        let across = VirtAddr(at.0 + 2 * PAGE_SIZE - 512);
        assert_eq!(
            copier.read(across, &mut [0; 1024]),
            Err(Short { copied: 512 }),
            "past the end of the file"
        );
        assert_eq!(copier.write(across, &[1; 1024]), Err(Short { copied: 512 }));
        rustix::fs::ftruncate(&file, 4 * PAGE_SIZE).expect("ftruncate");
    }
}

#[test]
fn from_memory_to_memory_every_size_and_alignment_is_copied_exactly() {
    let (_from_view, from, _from_file) = island(2);
    let (_to_view, to, _to_file) = island(2);
    let data: Vec<u8> = (0..2 * PAGE_SIZE).map(|byte| (byte % 251) as u8 | 1).collect();
    for copier in copiers() {
        copier.write(from, &data).expect("mapped");
        for len in (0..20).chain([255, 256, 257, 300, 320, 335, 1000, 4096, 5000]) {
            for (skip, shift) in [(0, 0), (0, 1), (1, 0), (7, 8), (16, 15), (3, 64)] {
                let to = to.offset(64 + shift);
                copier.write(VirtAddr(to.0 - 1), &vec![0; len + 2]).expect("mapped");
                assert_eq!(copier.copy(from.offset(skip), to, len), Ok(()));
                let mut back = vec![0xaa; len + 2];
                copier.read(VirtAddr(to.0 - 1), &mut back).expect("mapped");
                assert_eq!(back[1..=len], data[skip as usize..][..len], "{len} bytes at {shift}, {copier:?}");
                assert_eq!((back[0], back[len + 1]), (0, 0), "neighbours, {len} bytes at {shift}");
            }
        }
    }
}

#[test]
fn a_copy_from_memory_to_memory_says_which_end_stopped_it_and_where() {
    let (_from_view, from, _from_file) = island(2);
    let (_to_view, to, _to_file) = island(2);
    for copier in copiers() {
        for (skip, shift) in [(0, 0), (8, 0), (0, 8), (5, 3)] {
            for (gone, end) in [(from, CopyEnd::Source), (to, CopyEnd::Target)] {
                protect(gone.offset(PAGE_SIZE), MprotectFlags::empty());
                let (stopped, Short { copied }) =
                    copier.copy(from.offset(skip), to.offset(shift), 6000).expect_err("a page is gone");
                let left = PAGE_SIZE - if end == CopyEnd::Source { skip } else { shift };
                assert_eq!((stopped, copied), (end, left), "{skip} {shift} {copier:?}");
                protect(gone.offset(PAGE_SIZE), MprotectFlags::READ | MprotectFlags::WRITE);
            }
        }
        protect(to, MprotectFlags::READ);
        let read_only = copier.copy(from, to, 8);
        assert_eq!(read_only, Err((CopyEnd::Target, Short { copied: 0 })));
        protect(to, MprotectFlags::READ | MprotectFlags::WRITE);
    }
}

#[test]
fn atomics_are_locked_and_fail_where_memory_cannot_be_written() {
    let (_view, at, _file) = island(1);
    let [copier, _] = copiers();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..50_000 {
                    copier.atomic(at, AtomicOp::FetchAdd(1)).expect("mapped");
                }
            });
        }
    });
    let compare_swap = |compare, swap| copier.atomic(at, AtomicOp::CompareSwap { compare, swap });
    assert_eq!(compare_swap(100_000, 5), Some(100_000), "an addition was lost");
    assert_eq!(compare_swap(100_000, 6), Some(5));
    protect(at, MprotectFlags::READ);
    assert_eq!(copier.atomic(at, AtomicOp::FetchAdd(1)), None);
    assert_eq!(compare_swap(5, 6), None);
    assert_eq!(copier.atomic(at.offset(PAGE_SIZE), AtomicOp::FetchAdd(1)), None);
}

#[test]
fn memory_that_comes_and_goes_under_a_copy_kills_nobody() {
    let (view, at, file) = island(4);
    let (stop, whole, short) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let [copier, _] = copiers();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut buffer = vec![0; 4 * PAGE_SIZE as usize];
            while !stop.load(Ordering::Relaxed) {
                let results = [copier.read(at, &mut buffer), copier.write(at, &buffer)];
                for result in results {
                    let counter = if result.is_ok() { &whole } else { &short };
                    counter.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let enough = |counter: &AtomicU64| counter.load(Ordering::Relaxed) >= 200;
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while !(enough(&whole) && enough(&short)) && std::time::Instant::now() < deadline {
            let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
            let hole = pointer(at.offset(2 * PAGE_SIZE));
            // SAFETY: a page of the test's own view.
            unsafe { rustix::mm::mmap_anonymous(hole, PAGE_SIZE as usize, ProtFlags::empty(), flags) }
                .expect("mmap");
            std::thread::yield_now();
            view.place(3 * PAGE_SIZE, PAGE_SIZE, (&file, 2 * PAGE_SIZE), false).expect("mmap");
            std::thread::yield_now();
        }
        stop.store(true, Ordering::Relaxed);
    });
    let (whole, short) = (whole.into_inner(), short.into_inner());
    assert!(whole >= 200 && short >= 200, "{whole} whole copies, {short} short ones");
}

const CHILD: &str = "ANYPAGE_TEST_CHILD";

/// This test binary again, running only `test`, with [`CHILD`] set.
fn child(test: &str) -> Output {
    Command::new(std::env::current_exe().expect("a path"))
        .args([&format!("space::process::tests::{test}"), "--exact", "--nocapture", "--test-threads=1"])
        .env(CHILD, "1")
        .output()
        .expect("the test binary runs")
}

fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

#[test]
fn a_stray_access_elsewhere_still_kills_with_its_signal() {
    if is_child() {
        let [copier, _] = copiers();
        assert!(copier.read(VirtAddr(8), &mut [0; 8]).is_err(), "recovery is in place");
        // SAFETY: not at all; the process is to die of it.
        unsafe { pointer(VirtAddr(8)).cast::<u8>().write_volatile(1) };
        unreachable!("the null page was written");
    }
    let signal = child("a_stray_access_elsewhere_still_kills_with_its_signal").status.signal();
    assert_eq!(signal, Some(libc::SIGSEGV));
}

#[test]
fn a_fault_past_the_end_of_a_file_elsewhere_still_kills_with_its_signal() {
    if is_child() {
        let (_view, at, file) = island(1);
        let _ = copiers();
        rustix::fs::ftruncate(&file, 0).expect("ftruncate");
        // SAFETY: not at all; the process is to die of it.
        unsafe { pointer(at).cast::<u8>().write_volatile(1) };
        unreachable!("memory past the end of its file was written");
    }
    let signal =
        child("a_fault_past_the_end_of_a_file_elsewhere_still_kills_with_its_signal").status.signal();
    assert_eq!(signal, Some(libc::SIGBUS));
}

#[test]
fn a_signal_that_was_sent_is_not_taken_for_a_fault() {
    if is_child() {
        let _ = copiers();
        for _ in 0..2 {
            // SAFETY: Rust's own handler lets one pass and puts the default back; the process is to die of the second.
            unsafe { libc::raise(libc::SIGSEGV) };
        }
        unreachable!("survived two SIGSEGV");
    }
    let signal = child("a_signal_that_was_sent_is_not_taken_for_a_fault").status.signal();
    assert_eq!(signal, Some(libc::SIGSEGV));
}

#[test]
fn the_stack_overflow_handler_of_rust_still_speaks() {
    #[expect(unconditional_recursion, reason = "to overflow the stack")]
    fn deeper(depth: u64) -> u64 {
        let frame = std::hint::black_box([depth; 64]);
        deeper(frame[3] + 1) + frame[7]
    }
    if is_child() {
        let _ = copiers();
        println!("{}", deeper(0));
        unreachable!("endless recursion ended");
    }
    let output = child("the_stack_overflow_handler_of_rust_still_speaks");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("has overflowed its stack"), "{text}");
    assert_eq!(output.status.signal(), Some(libc::SIGABRT));
}

static CAUGHT: AtomicU64 = AtomicU64::new(0);

extern "C" fn catch(_signal: libc::c_int) {
    CAUGHT.fetch_add(1, Ordering::Relaxed);
}

/// Puts `handler` with `flags` before ours, sends two signals, and says how often it was called; exits with that.
fn chained(handler: usize, flags: libc::c_int) -> ! {
    // SAFETY: all zeroes is a valid sigaction.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    // SAFETY: the structure lives through the call, and `catch` is async-signal-safe.
    unsafe { libc::sigaction(libc::SIGSEGV, &raw const action, std::ptr::null_mut()) };
    let [copier, _] = copiers();
    for _ in 0..2 {
        // SAFETY: handled, ignored, or deadly, as the test wants.
        unsafe { libc::raise(libc::SIGSEGV) };
        assert!(copier.read(VirtAddr(8), &mut [0; 8]).is_err(), "recovery goes on working");
    }
    std::process::exit(40 + CAUGHT.load(Ordering::Relaxed) as i32)
}

#[test]
fn a_handler_that_was_there_before_is_called_for_what_is_not_ours() {
    if is_child() {
        chained(catch as *const () as usize, 0);
    }
    let status = child("a_handler_that_was_there_before_is_called_for_what_is_not_ours").status;
    assert_eq!(status.code(), Some(42));
}

#[test]
fn a_one_shot_handler_is_called_once_and_then_the_default_applies() {
    if is_child() {
        chained(catch as *const () as usize, libc::SA_RESETHAND);
    }
    let status = child("a_one_shot_handler_is_called_once_and_then_the_default_applies").status;
    assert_eq!(status.signal(), Some(libc::SIGSEGV));
}

#[test]
fn an_ignored_signal_stays_ignored() {
    if is_child() {
        chained(libc::SIG_IGN, 0);
    }
    let status = child("an_ignored_signal_stays_ignored").status;
    assert_eq!(status.code(), Some(40));
}
