//! The registry under every thread order that shuttle finds: faults, invalidations, registrations and removals together.
//! `RUSTFLAGS="--cfg shuttle" cargo test -p odp --release --lib shuttle`.

use super::*;
use hw_model::addr::VirtAddr;
use hw_model::bus::DmaEpoch;
use hw_model::sync::atomic::{AtomicU64, Ordering};
use hw_model::sync::outside::{AtomicUsize, Ordering as Count};
use hw_model::sync::{Arc, Mutex, thread};

fn page(index: u64, pages: u64) -> VirtRange {
    VirtRange::new(VirtAddr(index * 4096), pages * 4096).expect("fits")
}

/// Where the retry check of a fault stands.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Check {
    #[default]
    UnderTheLock,
    BeforeTheLock,
}

/// What is seen of stale entries. The right protocol must show none; the broken one shows some, and is only counted: a
/// panic would have to unwind through guards in the middle of a schedule.
#[derive(Default)]
struct Witness {
    check: Check,
    executions: AtomicUsize,
    stale: AtomicUsize,
}

impl Witness {
    fn expect(&self, holds: bool, what: &str) {
        if !holds {
            self.stale.fetch_add(1, Count::Relaxed);
            assert_eq!(self.check, Check::BeforeTheLock, "a stale entry: {what}");
        }
    }
}

/// A page's frame is replaced by each invalidation; this is one owner's entry for it.
struct Owner {
    entry: Mutex<Option<u64>>,
    witness: Arc<Witness>,
}

impl Owner {
    fn new(witness: &Arc<Witness>) -> Arc<Self> {
        Arc::new(Self { entry: Mutex::new(None), witness: Arc::clone(witness) })
    }
    fn entry(&self) -> Option<u64> {
        *self.entry.lock()
    }
}

impl Notify for Owner {
    fn clear(&self, _range: VirtRange, raise: Raise<'_>) {
        let mut entry = self.entry.lock();
        raise.raise();
        *entry = None;
    }
    fn try_clear(&self, _range: VirtRange, raise: Raise<'_>) -> bool {
        let Some(mut entry) = self.entry.try_lock() else { return false };
        raise.raise();
        *entry = None;
        true
    }
    fn unlink(&self, _range: VirtRange) {
        self.witness.expect(self.entry().is_none(), "published between clear and unlink");
    }
    fn try_unlink(&self, _range: VirtRange) -> bool {
        let Some(entry) = self.entry.try_lock() else { return false };
        self.witness.expect(entry.is_none(), "published between clear and unlink");
        true
    }
}

/// Publishes what is seen of the frame, as a fault does.
fn fault(frame: &AtomicU64, owner: &Owner, interval: &Interval) {
    let Some(seq) = interval.begin() else { return };
    let seen = frame.load(Ordering::SeqCst);
    let stale_outside = interval.retry(&seq);
    let mut entry = owner.entry.lock();
    let under = owner.witness.check == Check::UnderTheLock;
    if !(if under { interval.retry(&seq) } else { stale_outside }) {
        *entry = Some(seen);
    }
}

fn execution(witness: &Arc<Witness>) {
    witness.executions.fetch_add(1, Count::Relaxed);
    let notifiers = Notifiers::new(DmaEpoch::new());
    let frame = Arc::new(AtomicU64::new(1));
    let old = Owner::new(witness);
    let registered = notifiers.register(page(0, 4), old.clone());
    let mut threads = Vec::new();
    for _ in 0..2 {
        let (notifiers, frame, owner) = (Arc::clone(&notifiers), Arc::clone(&frame), old.clone());
        threads.push(thread::spawn(move || {
            notifiers.invalidate(page(1, 2), || {
                owner.witness.expect(owner.entry().is_none(), "the page goes under it");
                frame.fetch_add(1, Ordering::SeqCst)
            });
        }));
    }
    {
        // One that may not wait, in the middle of the others.
        let (notifiers, frame, owner) = (Arc::clone(&notifiers), Arc::clone(&frame), old.clone());
        threads.push(thread::spawn(move || {
            if let Ok(ready) = notifiers.try_begin(page(1, 2)) {
                owner.witness.expect(owner.entry().is_none(), "the page goes under it, at once");
                frame.fetch_add(1, Ordering::SeqCst);
                ready.end();
            }
        }));
    }
    {
        // One that is born and dies while invalidations run.
        let (notifiers, frame, owner) = (Arc::clone(&notifiers), Arc::clone(&frame), Owner::new(witness));
        threads.push(thread::spawn(move || {
            let interval = notifiers.register(page(2, 1), owner.clone());
            fault(&frame, &owner, &interval);
            if let Some(seq) = interval.begin() {
                let now = frame.load(Ordering::SeqCst);
                let entry = owner.entry.lock();
                if !interval.retry(&seq) {
                    owner.witness.expect(entry.is_none_or(|seen| seen == now), "in a young interval");
                }
            }
            drop(interval);
        }));
    }
    fault(&frame, &old, &registered);
    for thread in threads {
        thread.join().expect("no thread failed");
    }
    assert!(registered.begin().is_some(), "an invalidation is running for ever");
    witness.expect(old.entry().is_none_or(|seen| seen == frame.load(Ordering::SeqCst)), "left at the end");
    drop(registered);
    let stats = notifiers.stats();
    assert_eq!((stats.running, stats.intervals, stats.invalidations), (0, 0, 3));
}

/// Executions explored, and stale entries seen.
fn explore(check: Check, iterations: usize) -> (usize, usize) {
    let witness = Arc::new(Witness { check, ..Witness::default() });
    let (random, pct) = (Arc::clone(&witness), Arc::clone(&witness));
    shuttle::check_random(move || execution(&random), iterations);
    shuttle::check_pct(move || execution(&pct), iterations, 3);
    (witness.executions.load(Count::Relaxed), witness.stale.load(Count::Relaxed))
}

#[test]
fn shuttle_intervals_come_and_go_while_pages_do() {
    let (executions, _) = explore(Check::UnderTheLock, 20_000);
    println!("shuttle explored {executions} executions of notifiers");
    assert!(executions > 0);
}

#[test]
fn shuttle_catches_a_check_made_before_the_lock() {
    let (executions, stale) = explore(Check::BeforeTheLock, 5_000);
    println!("shuttle explored {executions} executions of the broken protocol: {stale} stale entries");
    assert!(stale > 0, "the schedules would not have found it");
}
