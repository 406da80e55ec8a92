//! An anchored range under every thread order that shuttle finds: a mapping is replaced while faults are under way.
//! `RUSTFLAGS="--cfg shuttle" cargo test -p odp --release --lib shuttle`.

use super::Anchored;
use crate::notifier::{Event, Interval, Notifiers, Notify, Raise};
use crate::page::{Backing, PageRun};
use crate::space::{Access, AddressSpace, FaultError, Rung, Watch, WatchError};
use hw_model::addr::{PAGE_SIZE, PhysAddr, VirtAddr, VirtRange};
use hw_model::bus::{DmaEpoch, HostMemory};
use hw_model::sync::atomic::{AtomicU64, Ordering};
use hw_model::sync::outside::{AtomicUsize, Ordering as Count};
use hw_model::sync::{Arc, Mutex, thread};

fn page() -> VirtRange {
    VirtRange::new(VirtAddr(PAGE_SIZE), PAGE_SIZE).expect("fits")
}

/// One page, which leads to the frame of the mapping that is there.
struct OnePage {
    notifiers: Arc<Notifiers>,
    mapping: AtomicU64,
}

/// The mapping that is there when the range is anchored.
const FIRST: u64 = 1;

impl AddressSpace for OnePage {
    fn memory(&self) -> Arc<dyn HostMemory> {
        unreachable!("no byte is moved here")
    }
    fn notifiers(&self) -> &Arc<Notifiers> {
        &self.notifiers
    }
    fn watch(&self, range: VirtRange) -> Result<Watch, WatchError> {
        Ok(Watch::new(range, || ()))
    }
    fn snapshot(&self, range: VirtRange, out: &mut Vec<PageRun>) -> Result<(), FaultError> {
        self.fault(range, Access::Read, out)
    }
    fn fault(&self, range: VirtRange, _access: Access, out: &mut Vec<PageRun>) -> Result<(), FaultError> {
        let phys = PhysAddr(self.mapping.load(Ordering::SeqCst) * PAGE_SIZE);
        let backing = Backing::Anonymous;
        out.push(PageRun {
            start: range.start(),
            pages: 1,
            phys,
            backing,
            writable: true,
            order_shift: 12,
            provider: None,
        });
        Ok(())
    }
    fn rung(&self, _range: VirtRange) -> Rung {
        Rung::Exact
    }
}

/// What a device was told of the page.
#[derive(Default)]
struct Owner(Mutex<Option<PhysAddr>>);

impl Notify for Owner {
    fn clear(&self, _range: VirtRange, raise: Raise<'_>) {
        let mut entry = self.0.lock();
        raise.raise();
        *entry = None;
    }
    fn unlink(&self, _range: VirtRange) {}
}

fn fault(space: &dyn AddressSpace, owner: &Owner, interval: &Interval) {
    let Some(seq) = interval.begin() else { return };
    let mut runs = Vec::new();
    let seen = space.fault(page(), Access::Write, &mut runs).is_ok().then(|| runs[0].phys);
    let mut entry = owner.0.lock();
    if !interval.retry(&seq) {
        *entry = seen;
    }
}

/// Whether the device was led to a mapping that came later.
fn execution(anchored: bool) -> bool {
    let notifiers = Notifiers::new(DmaEpoch::new());
    let inner = Arc::new(OnePage { notifiers: Arc::clone(&notifiers), mapping: AtomicU64::new(FIRST) });
    let owner = Arc::new(Owner::default());
    let space: Arc<dyn AddressSpace> = if anchored {
        Arc::new(Anchored::new(inner.clone(), page()).expect("mapped"))
    } else {
        inner.clone()
    };
    let interval = Arc::new(notifiers.register(page(), owner.clone()));
    let mut threads = Vec::new();
    for event in [Event::Clear, Event::Unmap] {
        let (notifiers, inner) = (Arc::clone(&notifiers), Arc::clone(&inner));
        threads.push(thread::spawn(move || {
            notifiers.invalidate_event(page(), event, || {
                let comes = u64::from(event == Event::Unmap);
                inner.mapping.fetch_add(comes, Ordering::SeqCst);
            });
        }));
    }
    for _ in 0..2 {
        let (space, owner, interval) = (Arc::clone(&space), Arc::clone(&owner), Arc::clone(&interval));
        threads.push(thread::spawn(move || fault(&*space, &owner, &interval)));
    }
    for thread in threads {
        thread.join().expect("no thread failed");
    }
    fault(&*space, &owner, &interval);
    let entry = *owner.0.lock();
    entry.is_some_and(|phys| phys != PhysAddr(FIRST * PAGE_SIZE))
}

/// Executions explored, and those that led to new memory.
fn explore(anchored: bool, iterations: usize) -> (usize, usize) {
    let counts = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
    let run = |counts: &Arc<(AtomicUsize, AtomicUsize)>| {
        let counts = Arc::clone(counts);
        move || {
            counts.0.fetch_add(1, Count::Relaxed);
            counts.1.fetch_add(usize::from(execution(anchored)), Count::Relaxed);
        }
    };
    shuttle::check_random(run(&counts), iterations);
    shuttle::check_pct(run(&counts), iterations, 3);
    (counts.0.load(Count::Relaxed), counts.1.load(Count::Relaxed))
}

#[test]
fn shuttle_an_anchored_range_never_leads_to_what_came_later() {
    let (executions, wrong) = explore(true, 10_000);
    println!("shuttle explored {executions} executions of an anchored range");
    assert!(executions > 0 && wrong == 0, "{wrong} of {executions} led to new memory");
}

#[test]
fn shuttle_a_range_that_is_not_anchored_follows() {
    let (executions, followed) = explore(false, 1_000);
    println!("shuttle explored {executions} executions of a range that follows: {followed} did");
    assert!(followed > 0, "the schedules would not have found it");
}
