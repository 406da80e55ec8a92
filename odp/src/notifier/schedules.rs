//! The registry under every thread order that shuttle finds: faults, invalidations, registrations and removals together.
//! `RUSTFLAGS="--cfg shuttle" cargo test -p odp --release --lib shuttle`.

use super::*;
use hw_model::addr::VirtAddr;
use hw_model::bus::DmaEpoch;
use hw_model::sync::atomic::{AtomicU64, Ordering};
use hw_model::sync::{Arc, Mutex, thread};
use std::sync::atomic::AtomicUsize;

fn page(index: u64, pages: u64) -> VirtRange {
    VirtRange::new(VirtAddr(index * 4096), pages * 4096).expect("fits")
}

/// A page's frame, replaced by each invalidation, and one owner's entry for it.
#[derive(Default)]
struct Owner {
    entry: Mutex<Option<u64>>,
}

impl Notify for Owner {
    fn clear(&self, _range: VirtRange, raise: Raise<'_>) {
        let mut entry = self.entry.lock();
        raise.raise();
        *entry = None;
    }
    fn unlink(&self, _range: VirtRange) {
        assert_eq!(*self.entry.lock(), None, "a stale entry between clear and unlink");
    }
}

/// Where the retry check of a fault stands.
#[derive(Clone, Copy, PartialEq)]
enum Check {
    UnderTheLock,
    BeforeTheLock,
}

/// Publishes what is seen of the frame, as a fault does.
fn fault(frame: &AtomicU64, owner: &Owner, interval: &Interval, check: Check) {
    let Some(seq) = interval.begin() else { return };
    let seen = frame.load(Ordering::SeqCst);
    let stale_outside = interval.retry(&seq);
    let mut entry = owner.entry.lock();
    if !(if check == Check::UnderTheLock { interval.retry(&seq) } else { stale_outside }) {
        *entry = Some(seen);
    }
}

fn explore(check: Check, iterations: usize) -> usize {
    let executions = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&executions);
    let world = move || {
        counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let notifiers = Notifiers::new(DmaEpoch::new());
        let frame = Arc::new(AtomicU64::new(1));
        let old = (Arc::new(Owner::default()), page(0, 4));
        let registered = notifiers.register(old.1, old.0.clone());
        let mut threads = Vec::new();
        for _ in 0..2 {
            let (notifiers, frame, owner) = (Arc::clone(&notifiers), Arc::clone(&frame), old.0.clone());
            threads.push(thread::spawn(move || {
                notifiers.invalidate(page(1, 2), || {
                    assert_eq!(*owner.entry.lock(), None, "a stale entry: the page goes under it");
                    frame.fetch_add(1, Ordering::SeqCst)
                });
            }));
        }
        {
            // One that is born and dies while invalidations run.
            let (notifiers, frame) = (Arc::clone(&notifiers), Arc::clone(&frame));
            threads.push(thread::spawn(move || {
                let owner = Arc::new(Owner::default());
                let interval = notifiers.register(page(2, 1), owner.clone());
                fault(&frame, &owner, &interval, check);
                // Stale entries are looked for under the owner's lock while no invalidation can be past its clear.
                if let Some(seq) = interval.begin() {
                    let now = frame.load(Ordering::SeqCst);
                    let entry = owner.entry.lock();
                    if !interval.retry(&seq) {
                        assert!(entry.is_none_or(|seen| seen == now), "a stale entry in a young interval");
                    }
                }
                drop(interval);
            }));
        }
        fault(&frame, &old.0, &registered, check);
        for thread in threads {
            thread.join().expect("no thread failed");
        }
        assert!(registered.begin().is_some(), "an invalidation is running for ever");
        let entry = *old.0.entry.lock();
        assert!(entry.is_none_or(|seen| seen == frame.load(Ordering::SeqCst)), "a stale entry is left");
        drop(registered);
        let stats = notifiers.stats();
        assert_eq!((stats.running, stats.intervals, stats.invalidations), (0, 0, 2));
    };
    shuttle::check_random(world.clone(), iterations);
    shuttle::check_pct(world, iterations, 3);
    executions.load(std::sync::atomic::Ordering::Relaxed)
}

#[test]
fn shuttle_intervals_come_and_go_while_pages_do() {
    let executions = explore(Check::UnderTheLock, 20_000);
    println!("shuttle explored {executions} executions of notifiers");
    assert!(executions > 0);
}

#[test]
#[should_panic(expected = "a stale entry")]
fn shuttle_catches_a_check_made_before_the_lock() {
    explore(Check::BeforeTheLock, 20_000);
}
