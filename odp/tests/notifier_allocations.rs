//! An invalidation runs where nothing may allocate or free: inside the application's own munmap, with its allocator's
//! lock held. A counting allocator watches the thread that invalidates.
//!
//! Unsafe island. Invariant: every call is passed on to the system's allocator unchanged.
#![allow(unsafe_code)]

use hw_model::addr::{VirtAddr, VirtRange};
use hw_model::bus::DmaEpoch;
use hw_model::sync::Arc;
use odp::notifier::{Notifiers, Notify, Raise};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

thread_local! {
    static CALLS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    // Not counted while the thread ends: nothing is asserted then.
    let _ = CALLS.try_with(|calls| calls.set(calls.get() + 1));
}

// SAFETY: every method passes its arguments to `System` unchanged, which keeps the contract of the trait.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's contract is that of the callee.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count();
        // SAFETY: `at` came from `System` with this layout.
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: `at` came from `System` with this layout.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Calls of the allocator that `run` makes on this thread.
fn allocator_calls<R>(run: impl FnOnce() -> R) -> (u64, R) {
    let before = CALLS.get();
    let result = run();
    (CALLS.get() - before, result)
}

struct Owner;

impl Notify for Owner {
    fn clear(&self, _range: VirtRange, raise: Raise<'_>) {
        raise.raise();
    }
    fn try_clear(&self, range: VirtRange, raise: Raise<'_>) -> bool {
        self.clear(range, raise);
        true
    }
    fn unlink(&self, _range: VirtRange) {}
    fn try_unlink(&self, _range: VirtRange) -> bool {
        true
    }
}

#[test]
fn invalidating_neither_allocates_nor_frees() {
    assert!(allocator_calls(|| drop(std::hint::black_box(Box::new(1)))).0 >= 2, "the counter does not count");
    let epoch = DmaEpoch::new();
    let mut slot = epoch.register().expect("first engine");
    let notifiers = Notifiers::new(Arc::clone(&epoch));
    let range = |page: u64, pages: u64| VirtRange::new(VirtAddr(page * 4096), pages * 4096).expect("fits");
    let intervals: Vec<_> =
        (0..1000).map(|page| notifiers.register(range(page, 3), Arc::new(Owner))).collect();

    let (calls, ()) = allocator_calls(|| notifiers.invalidate(range(10, 500), || ()));
    assert_eq!(calls, 0, "a blocking invalidation called the allocator");

    let (calls, ()) = allocator_calls(|| {
        let burst = slot.enter().expect("open");
        let mut outer = notifiers.begin_invalidation(range(0, 1000));
        assert!(!outer.poll());
        assert!(notifiers.try_begin(range(5, 1)).is_err());
        let mut inner = notifiers.begin_invalidation(range(5, 1));
        drop(burst);
        assert!(outer.poll() && inner.poll());
        outer.end();
        inner.end();
        drop(notifiers.begin_invalidation(range(5, 1)));
    });
    assert_eq!(calls, 0, "a stepped invalidation called the allocator");

    // Several devices on one range, invalidations that overlap, and one that may not wait among them.
    let others: Vec<_> = (0..8).map(|_| notifiers.register(range(100, 50), Arc::new(Owner))).collect();
    let (calls, ()) = allocator_calls(|| {
        let mut overlapping = [(90, 20), (100, 50), (120, 100), (0, 1000)]
            .map(|(page, pages)| notifiers.begin_invalidation(range(page, pages)));
        notifiers.try_begin(range(110, 5)).expect("nobody is busy").end();
        overlapping.iter_mut().for_each(|one| one.wait());
        overlapping.into_iter().rev().for_each(|one| one.end());
    });
    assert_eq!(calls, 0, "overlapping invalidations called the allocator");

    // Removing a watch frees it, but not under the lock that invalidations take: one that runs beside it, from the
    // middle of its walk, is not held up by that and frees nothing itself.
    let mut running = notifiers.begin_invalidation(range(100, 50));
    drop(others);
    let (calls, ()) = allocator_calls(|| {
        running.wait();
        running.end();
    });
    assert_eq!(calls, 0, "an invalidation freed an interval that was removed while it ran");
    drop(intervals);
}
