//! A region under every thread order that shuttle finds: a fault, an invalidation, deregistration and an engine's bursts
//! together, over an address space of two pages behind an IOMMU.
//! `RUSTFLAGS="--cfg shuttle" cargo test -p mr --release --lib shuttle`.
//!
//! Unsafe island. Invariant: the addresses of its address space are numbers that nothing dereferences.
#![allow(unsafe_code)]

use super::core::{Core, Mode};
use super::register::{How, Mapped};
use super::teardown::Teardown;
use crate::dma::{DmaConfig, DmaDevice};
use hw_model::addr::{PAGE_SIZE, PhysAddr, VirtAddr, VirtRange, page_bytes};
use hw_model::bus::{AtomicOp, Bus, DeviceSpec, DmaEpoch, DmaPort, HostMemory, MemoryError};
use hw_model::iommu::{Domain, DomainConfig, IotlbConfig};
use hw_model::sync::{Arc, Mutex, thread};
use odp::fault::{FaultFailure, Want};
use odp::notifier::{Notifiers, Sequence};
use odp::page::{Backing, PageRun};
use odp::space::{Access, AddressSpace, FaultError, PinKind, Rung, UserRange, Watch, WatchError};
use std::sync::atomic::{AtomicUsize, Ordering};

const FIRST: VirtAddr = VirtAddr(0x10_0000);
const PAGES: u64 = 2;
const EXECUTIONS: usize = 2000;

/// Frames are numbers that are used once; which of them live is all there is to memory.
struct Frames {
    live: Mutex<Vec<u64>>,
    epoch: Arc<DmaEpoch>,
}

impl HostMemory for Frames {
    fn read(&self, at: PhysAddr, _out: &mut [u8]) -> Result<(), MemoryError> {
        let live = self.live.lock().contains(&at.page_number());
        if live { Ok(()) } else { Err(MemoryError::Retired { at }) }
    }
    fn write(&self, at: PhysAddr, _data: &[u8]) -> Result<(), MemoryError> {
        self.read(at, &mut [])
    }
    fn atomic(&self, at: PhysAddr, _op: AtomicOp) -> Result<u64, MemoryError> {
        self.read(at, &mut []).map(|()| 0)
    }
    fn epoch(&self) -> &Arc<DmaEpoch> {
        &self.epoch
    }
}

#[derive(Default)]
struct Table {
    frames: [Option<u64>; PAGES as usize],
    used: u64,
}

/// Two pages that are faulted in on touch, and go when they are told to.
struct TwoPages {
    memory: Arc<Frames>,
    notifiers: Arc<Notifiers>,
    table: Mutex<Table>,
}

impl TwoPages {
    fn new() -> Arc<Self> {
        let epoch = DmaEpoch::new();
        Arc::new(Self {
            notifiers: Notifiers::new(Arc::clone(&epoch)),
            memory: Arc::new(Frames { live: Mutex::new(Vec::new()), epoch }),
            table: Mutex::new(Table::default()),
        })
    }

    /// The first page goes, as an invalidation takes it.
    fn drop_first(&self) {
        let range = VirtRange::new(FIRST, PAGE_SIZE).expect("a page");
        self.notifiers.invalidate(range, || {
            let gone = self.table.lock().frames[0].take();
            self.memory.live.lock().retain(|frame| Some(*frame) != gone);
        });
    }
}

impl AddressSpace for TwoPages {
    fn memory(&self) -> Arc<dyn HostMemory> {
        Arc::clone(&self.memory) as _
    }
    fn notifiers(&self) -> &Arc<Notifiers> {
        &self.notifiers
    }
    fn watch(&self, range: VirtRange) -> Result<Watch, WatchError> {
        Ok(Watch::new(range, || ()))
    }
    fn snapshot(&self, _range: VirtRange, _out: &mut Vec<PageRun>) -> Result<(), FaultError> {
        Ok(())
    }
    fn fault(&self, range: VirtRange, _access: Access, out: &mut Vec<PageRun>) -> Result<(), FaultError> {
        let mut table = self.table.lock();
        for n in 0..range.page_count() {
            let start = range.start().offset(page_bytes(n));
            let page = (start.page_number() - FIRST.page_number()) as usize;
            if table.frames[page].is_none() {
                table.used += 1;
                // Never neighbours, so that each page is a run of its own.
                let frame = table.used * 2;
                table.frames[page] = Some(frame);
                self.memory.live.lock().push(frame);
            }
            let phys = PhysAddr::from_page_number(table.frames[page].expect("it is there now"));
            let backing = Backing::Anonymous;
            let run =
                PageRun { start, pages: 1, phys, backing, writable: true, order_shift: 12, provider: None };
            PageRun::push(out, run);
        }
        Ok(())
    }
    fn rung(&self, _range: VirtRange) -> Rung {
        Rung::Exact
    }
}

/// Where the question stands whether what a fault saw is still true.
#[derive(Clone, Copy, PartialEq)]
enum Check {
    UnderTheLock,
    BeforeTheLock,
}

fn fault(core: &Arc<Core>, sequence: &Arc<Sequence>, check: Check) {
    if check == Check::UnderTheLock {
        match core.bring(sequence, core.pages, Want::Fault(Access::Write)) {
            Ok(_) | Err(FaultFailure::Publish(_)) => {}
            Err(failure) => panic!("the fault failed: {failure}"),
        }
        return;
    }
    let Some(seq) = sequence.begin() else { return };
    let mut runs = Vec::new();
    core.space.fault(core.pages, Access::Write, &mut runs).expect("there is memory");
    let good = !sequence.retry(seq);
    // The window is a few instructions wide; here it is wide enough to be met often.
    (0..4).for_each(|_| thread::yield_now());
    // Refused once the region is closing: nothing was published then.
    let _ = core.publish(&runs, || good);
}

/// Bursts of an engine: translates by the page list, then moves bytes. Gives how many the bus refused.
fn bursts(core: &Core, port: &DmaPort) -> usize {
    let mut slot = port.epoch().register().expect("room for an engine");
    let mut refused = 0;
    for _ in 0..2 {
        let _busy = slot.enter().expect("nobody closes it");
        let entry = core.list.load(0).expect("a page of the region");
        if entry.is_valid() {
            thread::yield_now();
            refused += usize::from(port.read(entry.address(), &mut [0; 8]).is_err());
        }
    }
    refused
}

/// Whether the entry of the first page is valid and leads to another frame than the page has. An
/// invalidation hides the entry before it takes the frame, so there is no moment at which that may be.
fn leads_elsewhere(space: &TwoPages, core: &Core, domain: &Domain) -> bool {
    let table = space.table.lock();
    let entry = core.list.load(0).expect("a page of the region");
    let leads_to = domain.iova_to_phys(entry.address().to_iova()).map(|phys| phys.page_number());
    entry.is_valid() && leads_to.is_some() && leads_to != table.frames[0]
}

fn world(check: Check) -> usize {
    let space = TwoPages::new();
    let iotlb = IotlbConfig { sets: 1, ways: 2, caches_not_present: true };
    let config = DomainConfig { width: 32, iotlb: Some(iotlb), audit: true, ..DomainConfig::default() };
    let domain = Domain::new(config).expect("a small domain");
    let bus = Bus::new(space.memory());
    let port = bus.attach(DeviceSpec::new("hca").domain(&domain)).expect("an empty bus has room");
    let device = DmaDevice::new(port.clone(), DmaConfig::default());
    let range = VirtRange::new(FIRST, page_bytes(PAGES)).expect("user memory");
    // SAFETY: there is no memory at these addresses to which a reference could exist: frames are only counted.
    let memory = unsafe { UserRange::from_raw(Arc::clone(&space) as Arc<dyn AddressSpace>, range) };
    let how = How { mode: Mode::OnDemand, pin: PinKind::Populated, writable: true, hugetlb: false };
    let mapped = Mapped::new(&device, &memory, how).expect("registered");
    let (core, sequence) = (Arc::clone(&mapped.core), mapped.interval.sequence());

    let faulting = {
        let (space, core, domain) = (Arc::clone(&space), Arc::clone(&core), Arc::clone(&domain));
        thread::spawn(move || {
            fault(&core, &sequence, check);
            usize::from(leads_elsewhere(&space, &core, &domain))
        })
    };
    let changing = {
        let (space, core, domain) = (Arc::clone(&space), Arc::clone(&core), Arc::clone(&domain));
        thread::spawn(move || {
            (0..2)
                .map(|_| {
                    space.drop_first();
                    usize::from(leads_elsewhere(&space, &core, &domain))
                })
                .sum::<usize>()
        })
    };
    let engine = {
        let (core, port) = (Arc::clone(&core), port.clone());
        thread::spawn(move || bursts(&core, &port))
    };
    // As deregistration does it once the key is gone.
    let close = move || Teardown::begin(mapped).wait();
    let join = || {
        let refused = engine.join().expect("the engine did not fail");
        let stale = changing.join().expect("the change did not fail");
        refused + stale + faulting.join().expect("the fault did not fail")
    };
    let harm = if check == Check::UnderTheLock {
        let closing = thread::spawn(close);
        let harm = join();
        closing.join().expect("the teardown did not fail");
        harm
    } else {
        // Closing would hide the harm.
        let harm = join();
        close();
        harm
    };
    let state = core.state.lock();
    assert_eq!((state.present, state.linked), (0, 0), "something is left of the region");
    drop(state);
    assert_eq!(device.iova_stats().live_ranges, 0, "IOVA is left");
    let stats = domain.stats();
    assert_eq!((stats.mapped_bytes, stats.violations), (0, 0), "the IOMMU's contract was broken: {stats:?}");
    let notifiers = space.notifiers.stats();
    assert_eq!((notifiers.intervals, notifiers.running), (0, 0));
    harm + stats.stale_hits as usize
}

/// How many schedules were tried, and how many DMAs went to pages that were gone.
fn explore(check: Check) -> (usize, usize) {
    let counts = std::sync::Arc::new([const { AtomicUsize::new(0) }; 2]);
    let counted = std::sync::Arc::clone(&counts);
    let run = move || {
        let stale = world(check);
        counted[0].fetch_add(1, Ordering::Relaxed);
        counted[1].fetch_add(stale, Ordering::Relaxed);
    };
    shuttle::check_random(run.clone(), EXECUTIONS);
    shuttle::check_pct(run, EXECUTIONS, 4);
    (counts[0].load(Ordering::Relaxed), counts[1].load(Ordering::Relaxed))
}

#[test]
fn shuttle_fault_invalidation_and_deregistration_never_meet_a_stale_page() {
    let (executions, stale) = explore(Check::UnderTheLock);
    println!("shuttle explored {executions} executions of a fault, an invalidation and a deregistration");
    assert!(executions > 0);
    assert_eq!(stale, 0, "DMA reached pages that were gone");
}

#[test]
fn shuttle_catches_a_check_made_before_the_lock() {
    let (executions, stale) = explore(Check::BeforeTheLock);
    println!("shuttle explored {executions} executions of the broken protocol, {stale} stale");
    assert!(stale > 0, "in {executions} executions the broken protocol did no harm");
}
