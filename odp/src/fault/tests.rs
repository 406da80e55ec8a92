use super::*;
use crate::notifier::{Notifiers, Notify, Raise};
use crate::page::Backing;
use crate::space::{Rung, Watch, WatchError};
use hw_model::addr::{PhysAddr, VirtAddr};
use hw_model::bus::{DmaEpoch, HostMemory};
use hw_model::sync::Mutex;
use std::convert::Infallible;

/// A space that answers from a script, then with one page for ever.
struct Scripted {
    notifiers: Arc<Notifiers>,
    errors: Mutex<Vec<FaultError>>,
    asked: Mutex<Vec<Want>>,
    /// Whether looks wait, and whether one has come.
    gate: Arc<Mutex<(bool, bool)>>,
}

impl Scripted {
    fn answer(&self, want: Want, range: VirtRange, out: &mut Vec<PageRun>) -> Result<(), FaultError> {
        self.asked.lock().push(want);
        self.gate.lock().1 = true;
        while self.gate.lock().0 {
            std::thread::yield_now();
        }
        if let Some(error) = self.errors.lock().pop() {
            return Err(error);
        }
        out.push(PageRun {
            start: range.start(),
            pages: range.page_count(),
            phys: PhysAddr(0x7000),
            backing: Backing::Anonymous,
            writable: true,
            order_shift: 12,
            provider: None,
        });
        Ok(())
    }
}

impl AddressSpace for Scripted {
    fn memory(&self) -> Arc<dyn HostMemory> {
        panic!("a fault never touches memory")
    }
    fn notifiers(&self) -> &Arc<Notifiers> {
        &self.notifiers
    }
    fn watch(&self, range: VirtRange) -> Result<Watch, WatchError> {
        Err(WatchError::BadRange { range })
    }
    fn snapshot(&self, range: VirtRange, out: &mut Vec<PageRun>) -> Result<(), FaultError> {
        self.answer(Want::Snapshot, range, out)
    }
    fn fault(&self, range: VirtRange, access: Access, out: &mut Vec<PageRun>) -> Result<(), FaultError> {
        self.answer(Want::Fault(access), range, out)
    }
    fn rung(&self, _range: VirtRange) -> Rung {
        Rung::Exact
    }
}

struct Owner;
impl Notify for Owner {
    fn clear(&self, _range: VirtRange, raise: Raise<'_>) {
        raise.raise();
    }
    fn unlink(&self, _range: VirtRange) {}
}

fn page() -> VirtRange {
    VirtRange::new(VirtAddr(0x1000), 0x1000).expect("fits")
}

fn space(errors: &[FaultError]) -> Scripted {
    Scripted {
        notifiers: Notifiers::new(DmaEpoch::new()),
        errors: Mutex::new(errors.to_vec()),
        asked: Mutex::default(),
        gate: Arc::default(),
    }
}

fn publish(runs: &[PageRun], check: RetryCheck<'_>) -> Result<Publication<u64>, Infallible> {
    Ok(if check.retry() { Publication::Retry } else { Publication::Published(runs[0].pages) })
}

type Step = Result<Progress<u64>, FaultFailure<Infallible>>;

fn step(work: &mut FaultWork, space: &Scripted) -> Step {
    work.poll(space, publish)
}

#[test]
fn steps_are_begin_resolve_publish() {
    let space = space(&[]);
    let interval = space.notifiers.register(page(), Arc::new(Owner));
    let mut work = FaultWork::new(interval.sequence(), page(), Access::Write);
    assert_eq!(step(&mut work, &space), Ok(Progress::Again));
    assert!(space.asked.lock().is_empty(), "begin looks at no page");
    assert_eq!(step(&mut work, &space), Ok(Progress::Again));
    assert_eq!(step(&mut work, &space), Ok(Progress::Done(1)));
    work.restart(page(), Want::Snapshot);
    assert_eq!(work.run(&space, Duration::ZERO, publish), Ok(1));
    assert_eq!(*space.asked.lock(), [Want::Fault(Access::Write), Want::Snapshot]);
}

/// Invariant 6. If this fails, what was seen before an invalidation is published after it.
#[test]
fn an_invalidation_between_any_two_steps_starts_the_fault_over() {
    for steps in 1..3 {
        let space = space(&[]);
        let interval = space.notifiers.register(page(), Arc::new(Owner));
        let mut work = FaultWork::new(interval.sequence(), page(), Access::Read);
        for _ in 0..steps {
            assert_eq!(step(&mut work, &space), Ok(Progress::Again));
        }
        let mut invalidation = space.notifiers.begin_invalidation(page());
        assert!(invalidation.poll());
        for _ in steps..3 {
            assert_eq!(step(&mut work, &space), Ok(Progress::Again));
        }
        assert_eq!((step(&mut work, &space), work.attempts()), (Ok(Progress::Blocked), 1));
        invalidation.end();
        assert_eq!(work.run(&space, Duration::ZERO, publish), Ok(1));
        assert_eq!(space.asked.lock().len(), 2, "resolved again");
    }
}

#[test]
fn a_fault_that_never_settles_ends_and_says_so() {
    let space = space(&[]);
    let interval = space.notifiers.register(page(), Arc::new(Owner));
    let notifiers = Arc::clone(&space.notifiers);
    let mut work = FaultWork::new(interval.sequence(), page(), Access::Read);
    let result = work.run(&space, Duration::ZERO, |runs, check| {
        notifiers.invalidate(page(), || ());
        publish(runs, check)
    });
    assert_eq!(result, Err(FaultFailure::Unsettled { range: page(), attempts: DEFAULT_ATTEMPTS }));
    assert_eq!(space.asked.lock().len(), DEFAULT_ATTEMPTS as usize);

    let mut invalidation = notifiers.begin_invalidation(page());
    assert!(invalidation.poll());
    let mut work = work.with_attempts(3);
    let result = work.run(&space, Duration::ZERO, publish);
    assert_eq!(result, Err(FaultFailure::Unsettled { range: page(), attempts: 3 }), "waits count too");
}

#[test]
fn errors_of_the_space_end_a_fault_unless_the_range_was_changing() {
    let (busy, none) =
        (FaultError::Busy { at: VirtAddr(0x1000) }, FaultError::NoMapping { at: VirtAddr(0x1000) });
    let space = space(&[none, busy]);
    let interval = space.notifiers.register(page(), Arc::new(Owner));
    let mut work = FaultWork::new(interval.sequence(), page(), Access::Read);
    assert_eq!(
        work.run(&space, Duration::ZERO, publish),
        Err(FaultFailure::Space(none)),
        "busy is not an error"
    );

    // The same error, but the page was being unmapped and mapped anew: what counts is the new one.
    space.errors.lock().push(none);
    work.restart(page(), Access::Read);
    assert_eq!(step(&mut work, &space), Ok(Progress::Again));
    space.notifiers.invalidate(page(), || ());
    assert_eq!(work.run(&space, Duration::ZERO, publish), Ok(1));
}

#[test]
fn a_publisher_may_refuse() {
    let space = space(&[]);
    let interval = space.notifiers.register(page(), Arc::new(Owner));
    let mut work = FaultWork::new(interval.sequence(), page(), Access::Read);
    let result: Result<(), _> = work.run(&space, Duration::ZERO, |_, _| Err(page()));
    assert_eq!(result, Err(FaultFailure::Publish(page())));
}

/// What would be wrong if this failed: devices that share a buffer would each walk its pages on a fault that both have.
#[test]
fn what_two_devices_want_at_one_time_is_looked_at_once() {
    let space = Arc::new(space(&[]));
    let two = [(); 2].map(|()| space.notifiers.register(page(), Arc::new(Owner)));
    let [mut first, mut second] =
        [&two[0], &two[1]].map(|interval| FaultWork::new(interval.sequence(), page(), Access::Write));
    let gate = Arc::clone(&space.gate);
    gate.lock().0 = true;
    let looking = {
        let space = Arc::clone(&space);
        std::thread::spawn(move || first.run(&*space, Duration::ZERO, publish))
    };
    while !gate.lock().1 {
        std::thread::yield_now();
    }
    assert_eq!(step(&mut second, &space), Ok(Progress::Again));
    assert_eq!(step(&mut second, &space), Ok(Progress::Blocked), "another is looking");
    gate.lock().0 = false;
    assert_eq!(looking.join().expect("it did not fail"), Ok(1));
    assert_eq!(second.run(&*space, Duration::from_secs(20), publish), Ok(1));
    assert_eq!(space.asked.lock().len(), 1, "one look for both");
    assert_eq!(space.notifiers.resolutions().joined(), 1);
}

#[test]
fn what_another_saw_before_an_invalidation_is_not_taken_from_him() {
    let space = Arc::new(space(&[]));
    let two = [(); 2].map(|()| space.notifiers.register(page(), Arc::new(Owner)));
    let [mut first, mut second] =
        [&two[0], &two[1]].map(|interval| FaultWork::new(interval.sequence(), page(), Access::Write));
    let gate = Arc::clone(&space.gate);
    gate.lock().0 = true;
    let looking = {
        let space = Arc::clone(&space);
        std::thread::spawn(move || first.run(&*space, Duration::ZERO, publish))
    };
    while !gate.lock().1 {
        std::thread::yield_now();
    }
    // The page goes while it is being looked at, and who comes after that waits for a look that is worth nothing.
    space.notifiers.invalidate(page(), || ());
    assert_eq!(step(&mut second, &space), Ok(Progress::Again));
    assert_eq!(step(&mut second, &space), Ok(Progress::Blocked));
    gate.lock().0 = false;
    assert_eq!(looking.join().expect("it did not fail"), Ok(1));
    assert_eq!(second.run(&*space, Duration::from_secs(20), publish), Ok(1));
    assert_eq!(space.notifiers.resolutions().joined(), 0);
    assert_eq!(space.asked.lock().len(), 3, "the first looked twice, the second for himself");
}

#[test]
fn neighbours_come_with_a_fault_as_far_as_they_can_be_had() {
    let three = VirtRange::new(VirtAddr(0), 0x3000).expect("fits");
    let space = space(&[]);
    let interval = space.notifiers.register(three, Arc::new(Owner));
    let mut work = FaultWork::new(interval.sequence(), page(), Access::Write).with_neighbours(three);
    assert_eq!(work.run(&space, Duration::ZERO, publish), Ok(3));

    let none = FaultError::NoMapping { at: VirtAddr(0x2000) };
    space.errors.lock().push(none);
    work.restart(page(), Access::Write);
    let mut work = work.with_neighbours(three);
    assert_eq!(work.run(&space, Duration::ZERO, publish), Ok(1), "the page alone, the neighbour has none");

    space.errors.lock().extend([FaultError::NoMapping { at: VirtAddr(0x1000) }, none]);
    work.restart(page(), Access::Write);
    let mut work = work.with_neighbours(three);
    let missing = FaultError::NoMapping { at: VirtAddr(0x1000) };
    assert_eq!(work.run(&space, Duration::ZERO, publish), Err(FaultFailure::Space(missing)));
}
