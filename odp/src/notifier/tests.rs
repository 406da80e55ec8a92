use super::*;
use hw_model::addr::VirtAddr;
use hw_model::bus::DmaEpoch;
use hw_model::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use hw_model::sync::{Arc, Mutex, Weak, thread};
use proptest::prelude::*;
use std::time::Duration;

fn range(start: u64, len: u64) -> VirtRange {
    VirtRange::new(VirtAddr(start), len).expect("fits")
}

/// An owner that counts its callbacks.
#[derive(Default)]
struct Owner {
    lock: Mutex<()>,
    clears: AtomicU64,
    unlinks: AtomicU64,
}

impl Notify for Owner {
    fn clear(&self, _range: VirtRange, raise: Raise<'_>) {
        let _lock = self.lock.lock();
        raise.raise();
        self.clears.fetch_add(1, Ordering::Relaxed);
    }
    fn try_clear(&self, range: VirtRange, raise: Raise<'_>) -> bool {
        let free = self.lock.try_lock().is_some();
        if free {
            self.clear(range, raise);
        }
        free
    }
    fn unlink(&self, _range: VirtRange) {
        self.unlinks.fetch_add(1, Ordering::Relaxed);
    }
    fn try_unlink(&self, range: VirtRange) -> bool {
        let free = self.lock.try_lock().is_some();
        if free {
            self.unlink(range);
        }
        free
    }
}

impl Owner {
    fn counts(&self) -> (u64, u64) {
        (self.clears.load(Ordering::Relaxed), self.unlinks.load(Ordering::Relaxed))
    }
}

#[test]
fn stages_come_in_order_and_wait_for_dma_under_way() {
    let epoch = DmaEpoch::new();
    let mut slot = epoch.register().expect("first engine");
    let notifiers = Notifiers::new(Arc::clone(&epoch));
    let owner = Arc::new(Owner::default());
    let interval = notifiers.register(range(0x10000, 0x4000), owner.clone());
    let seq = interval.begin().expect("quiet");

    let burst = slot.enter().expect("open");
    let mut invalidation = notifiers.begin_invalidation(range(0x13000, 0x8000));
    assert_eq!(owner.counts(), (1, 0), "cleared at once");
    assert!(interval.retry(&seq) && interval.begin().is_none());
    assert!(!invalidation.poll(), "a burst is under way");
    assert_eq!(owner.counts(), (1, 0), "unlinked under a burst");
    drop(burst);
    assert!(invalidation.poll() && invalidation.poll());
    assert_eq!(owner.counts(), (1, 1), "unlinked once");
    assert!(interval.begin().is_none(), "a fault began before the page was gone");
    invalidation.end();
    let later = interval.begin().expect("ended");
    assert!(interval.retry(&seq) && !interval.retry(&later));
    assert_eq!(
        notifiers.stats(),
        NotifierStats {
            invalidations: 1,
            bytes: 0x8000,
            drains: 1,
            visits: 1,
            refused: 0,
            intervals: 1,
            running: 0
        }
    );
}

#[test]
fn where_nobody_listens_nothing_is_drained() {
    let notifiers = Notifiers::new(DmaEpoch::new());
    let interval = notifiers.register(range(0x1000, 0x1000), Arc::new(Owner::default()));
    for elsewhere in [range(0, 0x1000), range(0x2000, 0x1000), range(0x1800, 0)] {
        let mut invalidation = notifiers.begin_invalidation(elsewhere);
        assert!(invalidation.poll());
        assert_eq!(invalidation.visited(), 0);
        invalidation.end();
    }
    drop(interval);
    notifiers.invalidate(range(0x1000, 0x1000), || ());
    assert_eq!(notifiers.epoch().drain_count(), 0);
    assert_eq!((notifiers.stats().drains, notifiers.stats().intervals), (0, 0));
}

#[test]
fn non_blockable_answers_cannot_and_leaves_nothing_running() {
    let epoch = DmaEpoch::new();
    let mut slot = epoch.register().expect("first engine");
    let notifiers = Notifiers::new(Arc::clone(&epoch));
    let interval = notifiers.register(range(0, 0x1000), Arc::new(Owner::default()));
    let burst = slot.enter().expect("open");
    let everything = range(0, 0x1000);
    assert_eq!(notifiers.try_begin(everything).err(), Some(Cannot { range: everything }));
    assert!(interval.begin().is_some() && notifiers.stats().running == 0 && notifiers.stats().refused == 1);
    drop(burst);
    let mut ready = notifiers.try_begin(everything).expect("nothing to wait for");
    assert!(ready.poll() && interval.begin().is_none());
    ready.end();

    let full: Vec<_> = (0..MAX_INVALIDATIONS).map(|_| notifiers.begin_invalidation(everything)).collect();
    assert!(notifiers.try_begin(everything).is_err(), "the table is full");
    drop(full);
    assert!(interval.begin().is_some(), "dropping an invalidation ends it");
}

/// If this fails, a change that may not wait sleeps on a driver's lock: in the kernel, under the out-of-memory reaper.
#[test]
fn non_blockable_does_not_wait_for_an_owner_that_is_busy() {
    let notifiers = Notifiers::new(DmaEpoch::new());
    let (free, busy) = (Arc::new(Owner::default()), Arc::new(Owner::default()));
    let everything = range(0, 0x3000);
    let first = notifiers.register(range(0, 0x1000), free.clone());
    let second = notifiers.register(range(0x1000, 0x1000), busy.clone());
    let third = notifiers.register(range(0x2000, 0x1000), free.clone());
    let seen = second.begin().expect("quiet");
    let held = busy.lock.lock();
    assert_eq!(notifiers.try_begin(everything).err(), Some(Cannot { range: everything }));
    assert_eq!((free.counts(), busy.counts()), ((1, 0), (0, 0)), "those before it are hidden, no more");
    drop(held);
    let quiet = [&first, &second, &third].map(|interval| interval.begin().is_some());
    assert_eq!((quiet, notifiers.stats().running), ([true; 3], 0), "nothing is left running");
    assert!(second.retry(&seen), "a fault that was under way looks again, to be sure");
    let ready = notifiers.try_begin(everything).expect("nobody is busy");
    assert_eq!((free.counts(), busy.counts()), ((3, 2), (1, 1)));
    ready.end();

    /// Says nothing of doing without waiting.
    struct Plain;
    impl Notify for Plain {
        fn clear(&self, _range: VirtRange, raise: Raise<'_>) {
            raise.raise();
        }
        fn unlink(&self, _range: VirtRange) {}
    }
    let interval = notifiers.register(range(0x8000, 0x1000), Arc::new(Plain));
    assert!(notifiers.try_begin(range(0x8000, 0x1000)).is_err(), "who does not say cannot");
    drop((interval, first, second, third));
}

/// One drain for all of them, and each is told once, whatever device it is of.
#[test]
fn several_devices_on_one_range_are_cleared_together_and_drained_once() {
    let epoch = DmaEpoch::new();
    let mut slots: Vec<_> = (0..3).map(|_| epoch.register().expect("an engine")).collect();
    let notifiers = Notifiers::new(Arc::clone(&epoch));
    let devices: Vec<_> = (0..3).map(|_| Arc::new(Owner::default())).collect();
    let shared = range(0x4000, 0x4000);
    let intervals: Vec<_> = devices.iter().map(|device| notifiers.register(shared, device.clone())).collect();
    let mut bursts: Vec<_> = slots.iter_mut().map(|slot| slot.enter().expect("open")).collect();
    let mut invalidation = notifiers.begin_invalidation(range(0x5000, 0x1000));
    while let Some(burst) = bursts.pop() {
        assert!(!invalidation.poll(), "a device still moves data");
        assert!(devices.iter().all(|device| device.counts() == (1, 0)));
        drop(burst);
    }
    assert!(invalidation.poll());
    invalidation.end();
    assert!(devices.iter().all(|device| device.counts() == (1, 1)));
    assert_eq!(notifiers.stats().drains, 1);
    assert!(intervals.iter().all(|interval| interval.begin().is_some()));
}

#[test]
#[should_panic(expected = "ended before it was ready")]
fn ending_early_is_our_mistake() {
    let epoch = DmaEpoch::new();
    let mut slot = epoch.register().expect("first engine");
    let notifiers = Notifiers::new(Arc::clone(&epoch));
    let _interval = notifiers.register(range(0, 0x1000), Arc::new(Owner::default()));
    let _burst = slot.enter().expect("open");
    notifiers.begin_invalidation(range(0, 0x1000)).end();
}

/// If this fails, the sixty-fifth invalidation is lost, or waits for ever.
#[test]
fn one_more_invalidation_than_there_is_room_for_waits_for_room() {
    let notifiers = Notifiers::new(DmaEpoch::new());
    let _interval = notifiers.register(range(0, 0x1000), Arc::new(Owner::default()));
    let full: Vec<_> = (0..MAX_INVALIDATIONS).map(|_| notifiers.begin_invalidation(range(0, 1))).collect();
    let (late, done) = (Arc::clone(&notifiers), Arc::new(AtomicBool::new(false)));
    let flag = Arc::clone(&done);
    let thread = thread::spawn(move || {
        late.invalidate(range(0, 1), || flag.store(true, Ordering::Release));
    });
    // The clear callbacks of the late one cannot have run: it has no place.
    assert_eq!(notifiers.stats().invalidations, MAX_INVALIDATIONS as u64);
    assert!(!done.load(Ordering::Acquire));
    drop(full);
    thread.join().expect("it got its place");
    assert!(done.load(Ordering::Acquire) && notifiers.stats().running == 0);
}

/// An owner whose clear runs another invalidation over itself, as an owner of memory that lies in the range would.
struct Nesting {
    notifiers: Weak<Notifiers>,
    depth: AtomicU64,
}

impl Notify for Nesting {
    fn clear(&self, range: VirtRange, raise: Raise<'_>) {
        raise.raise();
        if self.depth.fetch_add(1, Ordering::Relaxed) < 3
            && let Some(notifiers) = self.notifiers.upgrade()
        {
            notifiers.invalidate(range, || ());
        }
    }
    fn unlink(&self, _range: VirtRange) {}
}

/// Known mistake of mlx5: an invalidation inside an invalidation deadlocked.
#[test]
fn an_invalidation_may_run_inside_another() {
    let notifiers = Notifiers::new(DmaEpoch::new());
    let owner = Arc::new(Nesting { notifiers: Arc::downgrade(&notifiers), depth: AtomicU64::new(0) });
    let interval = notifiers.register(range(0, 0x1000), owner.clone());
    notifiers.invalidate(range(0, 0x1000), || ());
    assert_eq!(owner.depth.load(Ordering::Relaxed), 4);
    assert!(interval.begin().is_some());
}

/// An owner that stays in its callback until let go.
#[derive(Default)]
struct Slow {
    inside: AtomicBool,
    go: AtomicBool,
    left: AtomicBool,
}

impl Notify for Slow {
    fn clear(&self, _range: VirtRange, raise: Raise<'_>) {
        raise.raise();
        self.inside.store(true, Ordering::Release);
        while !self.go.load(Ordering::Acquire) {
            thread::yield_now();
        }
        self.left.store(true, Ordering::Release);
    }
    fn unlink(&self, _range: VirtRange) {}
}

/// If this fails, a callback runs on an owner that believes it has none any more.
#[test]
fn removal_waits_for_the_callback_that_runs() {
    let notifiers = Notifiers::new(DmaEpoch::new());
    let owner = Arc::new(Slow::default());
    let interval = notifiers.register(range(0, 0x1000), owner.clone());
    let invalidator = {
        let notifiers = Arc::clone(&notifiers);
        thread::spawn(move || notifiers.invalidate(range(0, 0x1000), || ()))
    };
    while !owner.inside.load(Ordering::Acquire) {
        thread::yield_now();
    }
    let removing = {
        let owner = owner.clone();
        thread::spawn(move || {
            drop(interval);
            assert!(owner.left.load(Ordering::Acquire), "removed under a running callback");
        })
    };
    while notifiers.stats().intervals > 0 {
        thread::yield_now();
    }
    assert!(!removing.is_finished());
    owner.go.store(true, Ordering::Release);
    removing.join().expect("removed after the callback");
    invalidator.join().expect("ended though the interval went");
    assert_eq!(Arc::strong_count(&owner), 1, "the owner is not held any more");
}

/// A region is deregistered while an invalidation runs on it: its faults were never told that the invalidation had ended,
/// and waited for as long as they could.
#[test]
fn a_fault_does_not_wait_for_an_invalidation_that_outlived_its_interval() {
    let notifiers = Notifiers::new(DmaEpoch::new());
    let interval = notifiers.register(range(0, 4096), Arc::new(Owner::default()));
    let sequence = interval.sequence();
    let seen = sequence.begin().expect("quiet");
    let running = notifiers.begin_invalidation(range(0, 4096));
    assert!(sequence.begin().is_none());
    drop(interval);
    assert!(sequence.begin().is_some(), "nobody is left to say that the invalidation has ended");
    assert!(sequence.retry(seen), "what was seen before it is worthless all the same");
    let mut running = running;
    assert!(running.poll());
    running.end();
    assert!(sequence.begin().is_some());
    assert_eq!(notifiers.stats().running, 0);
}

#[test]
fn a_waiting_fault_is_woken_at_the_end_and_gives_up_in_time() {
    let notifiers = Notifiers::new(DmaEpoch::new());
    let interval = notifiers.register(range(0, 0x1000), Arc::new(Owner::default()));
    let mut invalidation = notifiers.begin_invalidation(range(0, 0x1000));
    assert!(invalidation.poll());
    assert_eq!(interval.begin_blocking(Duration::ZERO), None);
    assert_eq!(interval.begin_blocking(Duration::from_millis(1)), None);
    let waiting = thread::spawn(move || interval.begin_blocking(Duration::from_secs(60)).is_some());
    invalidation.end();
    assert!(waiting.join().expect("no panic"), "the fault was not woken");
}

#[test]
fn a_callback_that_panics_leaves_the_registry_balanced() {
    struct Broken;
    impl Notify for Broken {
        fn clear(&self, _range: VirtRange, _raise: Raise<'_>) {
            panic!("an owner's bug");
        }
        fn unlink(&self, _range: VirtRange) {}
    }
    let notifiers = Notifiers::new(DmaEpoch::new());
    let first = notifiers.register(range(0, 0x1000), Arc::new(Owner::default()));
    let broken = notifiers.register(range(0, 0x1000), Arc::new(Broken));
    let never_reached = notifiers.register(range(0, 0x1000), Arc::new(Owner::default()));
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        notifiers.begin_invalidation(range(0, 0x1000)).end();
    }));
    assert!(result.is_err());
    assert!([&first, &broken, &never_reached].iter().all(|interval| interval.begin().is_some()));
    drop(broken);
    notifiers.invalidate(range(0, 0x1000), || ());
    assert!(first.begin().is_some() && notifiers.stats().running == 0);
}

#[derive(Clone, Debug)]
enum Step {
    Register(u64, u64),
    Unregister(usize),
    Begin(u64, u64),
    TryBegin(u64, u64),
    Poll(usize),
    End(usize),
    Abandon(usize),
}

fn any_step() -> impl Strategy<Value = Step> {
    let pages = || (0_u64..24, 1_u64..8);
    prop_oneof![
        3 => pages().prop_map(|(start, len)| Step::Register(start, len)),
        1 => any::<usize>().prop_map(Step::Unregister),
        4 => pages().prop_map(|(start, len)| Step::Begin(start, len)),
        1 => pages().prop_map(|(start, len)| Step::TryBegin(start, len)),
        2 => any::<usize>().prop_map(Step::Poll),
        4 => any::<usize>().prop_map(Step::End),
        1 => any::<usize>().prop_map(Step::Abandon),
    ]
}

/// What the naive model knows of an interval: everything that runs on it, by name.
struct Known {
    interval: Interval,
    owner: Arc<Owner>,
    running: Vec<u64>,
    clears: u64,
    unlinks: u64,
}

/// What it knows of an invalidation: whom it cleared.
struct Begun {
    id: u64,
    invalidation: Invalidation,
    cleared: Vec<Arc<Owner>>,
    ready: bool,
}

proptest! {
    /// Intervals and invalidations that come and go in any order, against a model that remembers everything. If this
    /// fails, a fault gets a number while its pages are going away, or never gets one again.
    #[test]
    fn counts_agree_with_a_model_that_names_everything(steps in prop::collection::vec(any_step(), 1..120)) {
        let notifiers = Notifiers::new(DmaEpoch::new());
        let mut known: Vec<Known> = Vec::new();
        let mut begun: Vec<Begun> = Vec::new();
        let pages = |start: u64, len: u64| range(start * 4096, len * 4096);
        for (id, step) in steps.into_iter().enumerate() {
            let id = id as u64;
            match step {
                Step::Register(start, len) => {
                    let owner = Arc::new(Owner::default());
                    let interval = notifiers.register(pages(start, len), owner.clone());
                    let overlapping = begun.iter().filter(|b| b.invalidation.range().overlaps(interval.range()));
                    let running = overlapping.map(|b| b.id).collect();
                    known.push(Known { interval, owner, running, clears: 0, unlinks: 0 });
                }
                Step::Unregister(n) if !known.is_empty() => {
                    drop(known.swap_remove(n % known.len()));
                }
                Step::Begin(start, len) | Step::TryBegin(start, len) => {
                    let blocking = matches!(step, Step::Begin(..));
                    if blocking && begun.len() == MAX_INVALIDATIONS {
                        continue;
                    }
                    let range = pages(start, len);
                    let invalidation =
                        if blocking { Ok(notifiers.begin_invalidation(range)) } else { notifiers.try_begin(range) };
                    let Ok(invalidation) = invalidation else {
                        prop_assert_eq!(begun.len(), MAX_INVALIDATIONS);
                        continue;
                    };
                    let mut cleared = Vec::new();
                    for known in known.iter_mut().filter(|k| k.interval.range().overlaps(range)) {
                        known.running.push(id);
                        known.clears += 1;
                        known.unlinks += u64::from(!blocking);
                        cleared.push(known.owner.clone());
                    }
                    prop_assert_eq!(invalidation.visited(), cleared.len() as u64);
                    begun.push(Begun { id, invalidation, cleared, ready: !blocking });
                }
                Step::Poll(n) | Step::End(n) | Step::Abandon(n) if !begun.is_empty() => {
                    let n = n % begun.len();
                    if !matches!(step, Step::Abandon(_)) {
                        let one = &mut begun[n];
                        prop_assert!(one.invalidation.poll());
                        if !one.ready {
                            for known in &mut known {
                                known.unlinks += u64::from(one.cleared.iter().any(|o| Arc::ptr_eq(o, &known.owner)));
                            }
                        }
                        one.ready = true;
                    }
                    if !matches!(step, Step::Poll(_)) {
                        let one = begun.swap_remove(n);
                        for known in &mut known {
                            known.running.retain(|id| *id != one.id);
                        }
                        if one.ready { one.invalidation.end() } else { drop(one.invalidation) }
                    }
                }
                Step::Unregister(_) | Step::Poll(_) | Step::End(_) | Step::Abandon(_) => {}
            }
            for known in &known {
                prop_assert_eq!(known.interval.begin().is_some(), known.running.is_empty());
                prop_assert_eq!(known.owner.counts(), (known.clears, known.unlinks));
            }
            prop_assert_eq!(notifiers.stats().running, begun.len() as u64);
            prop_assert_eq!(notifiers.stats().intervals, known.len() as u64);
        }
    }
}
