//! Nothing is allocated or freed inside a burst, and nothing at all once traffic has settled.
//!
//! A thread in a burst holds up invalidations; if it allocated, it could wait for a thread that waits for the
//! invalidation (see `hca::engine`). One thread does everything here: an allocation of that thread while a slot of the
//! epoch is busy is an allocation inside a burst.
//!
//! Unsafe island. Invariant: the allocator below hands every call to the system's unchanged; it only counts.
#![allow(unsafe_code)]

use crate::world::{Pair, config, pattern};
use hw_model::bus::DmaEpoch;
use hw_model::hca::{FaultOutcome, HcaConfig, PathMtu, SendRequest, Status};
use hw_model::sync::{Arc, OnceLock};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static WATCHING: Cell<bool> = const { Cell::new(false) };
    static CALLS: Cell<u64> = const { Cell::new(0) };
    static IN_BURST: Cell<u64> = const { Cell::new(0) };
    static BYTES: Cell<i64> = const { Cell::new(0) };
}
/// Of the first pair of hosts of the test below, the only thread that watches.
static EPOCHS: OnceLock<[Arc<DmaEpoch>; 2]> = OnceLock::new();

struct Counting;

fn count(bytes: i64) {
    BYTES.set(BYTES.get() + bytes);
    if !WATCHING.get() {
        return;
    }
    CALLS.set(CALLS.get() + 1);
    for epoch in EPOCHS.get().into_iter().flatten() {
        if !epoch.drain().poll(epoch) {
            IN_BURST.set(IN_BURST.get() + 1);
        }
    }
}

// SAFETY: every call is passed on to the system's allocator as it came, and counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller's promises are those of `System.alloc`.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: the caller's promises are those of `System.dealloc`, and `at` came from `System`.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that this thread has allocated, less those that it has freed.
pub fn bytes_in_use() -> i64 {
    BYTES.get()
}

#[test]
fn a_burst_neither_allocates_nor_frees_and_settled_traffic_does_neither() {
    for mtu in [256, 65536] {
        let mtu = PathMtu::new(mtu).expect("an MTU");
        let mut pair = Pair::new(HcaConfig { path_mtu: mtu, ..config() });
        let epochs = EPOCHS.get_or_init(|| [&pair.a, &pair.b].map(|host| host.hca.port().epoch().clone()));
        let epochs_of_pair = [&pair.a, &pair.b].map(|host| host.hca.port().epoch().clone());
        // The second round has memories of its own; it is watched for settled traffic only.
        let first_round = Arc::ptr_eq(&epochs[0], &epochs_of_pair[0]);
        let (local, remote) = (pair.a.region(200_000), pair.b.region(200_000));
        let mut done = Vec::with_capacity(64);
        // Pages missing on both sides the first time around, so that faults happen inside watched bursts too.
        for round in 0..8 {
            let settled = round >= 4;
            pair.a.fill(&local, 0, &pattern(round, 200_000));
            if !settled {
                local.absent(3);
                remote.absent(7);
            }
            done.clear();
            CALLS.set(0);
            WATCHING.set(true);
            let sges = [local.sge(5, 150_000)];
            for id in 0..8 {
                let request = match id % 2 {
                    0 => SendRequest::write(id, &sges, remote.remote(9)),
                    _ => SendRequest { fence: true, ..SendRequest::read(id, &sges, remote.remote(9)) },
                };
                pair.qa.post_send(&request).expect("posted");
            }
            pair.run(|_, fault| {
                let region = if fault.key == local.key { &local } else { &remote };
                region.present(region.page_of(fault), true);
                FaultOutcome::Resolved
            });
            WATCHING.set(false);
            let calls = CALLS.get();
            pair.a.cq.poll(&mut done, 64).expect("no overrun");
            assert!(done.len() == 8 && done.iter().all(|c| c.status == Status::Success), "{done:?}");
            assert_eq!(IN_BURST.get(), 0, "a burst allocated or freed");
            if round == 0 && first_round {
                assert!(calls > 0, "the first round fills pools and queues: is anything counted at all?");
            }
            if settled && round > 4 {
                assert_eq!(calls, 0, "settled traffic allocates");
            }
        }
    }
}
