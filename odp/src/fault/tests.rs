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
}

impl Scripted {
    fn answer(&self, want: Want, range: VirtRange, out: &mut Vec<PageRun>) -> Result<(), FaultError> {
        self.asked.lock().push(want);
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
