//! A region under every thread order that shuttle finds: a fault, an invalidation, deregistration and an engine's bursts
//! together, over an address space of two pages behind an IOMMU.
//! `RUSTFLAGS="--cfg shuttle" cargo test -p mr --release --lib shuttle`.

use super::core::{Core, Mode, Snapshot};
use super::register::{How, Mapped};
use super::teardown::Teardown;
use super::two_pages::TwoPages;
use crate::dma::{DmaConfig, DmaDevice};
use hw_model::bus::DmaPort;
use hw_model::iommu::Domain;
use hw_model::sync::{Arc, thread};
use odp::fault::{FaultFailure, Want};
use odp::notifier::Sequence;
use odp::space::{Access, PinKind};
use std::sync::atomic::{AtomicUsize, Ordering};

const EXECUTIONS: usize = 2000;

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
    space.with_first_frame(|frame| {
        let entry = core.list.load(0).expect("a page of the region");
        let leads_to = domain.iova_to_phys(entry.address().to_iova()).map(|phys| phys.page_number());
        entry.is_valid() && leads_to.is_some() && leads_to != frame
    })
}

fn world(check: Check) -> usize {
    let space = TwoPages::new();
    let (port, domain) = space.attach();
    let device = DmaDevice::new(port.clone(), DmaConfig::default());
    let how = How {
        mode: Mode::OnDemand,
        pin: PinKind::Populated,
        snapshot: Snapshot::Resident,
        writable: true,
        hugetlb: false,
    };
    let mapped = Mapped::new(&device, &space.both(), how).expect("registered");
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
    harm + space.check_nothing_is_left(&device, &domain)
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
