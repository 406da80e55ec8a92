//! An implicit region under every thread order that shuttle finds: first touches make the child, invalidations empty it, it is
//! taken away when it is empty, and an engine's bursts go through whatever there is.
//! `RUSTFLAGS="--cfg shuttle" cargo test -p mr --release --lib shuttle`.

use super::region::ImplicitRegion;
use crate::RegisterOptions;
use crate::device::Region;
use crate::device::model::target::FaultTarget;
use crate::device::model::{FaultPolicy, ModelConfig, ModelDevice};
use crate::dma::DmaConfig;
use crate::region::two_pages::{FIRST, TwoPages};
use hw_model::addr::{PAGE_SIZE, VirtRange};
use hw_model::bus::DmaPort;
use hw_model::hca::HcaConfig;
use hw_model::link::Fabric;
use hw_model::sync::{Arc, thread};
use odp::fault::Want;
use odp::space::Access;
use std::sync::atomic::{AtomicUsize, Ordering};

const EXECUTIONS: usize = 150;

/// Bursts of an engine: finds the child that there is, translates by its list, moves bytes. Gives how many the bus refused.
fn bursts(region: &ImplicitRegion, port: &DmaPort) -> usize {
    let mut slot = port.epoch().register().expect("room for an engine");
    let mut refused = 0;
    for _ in 0..2 {
        let _busy = slot.enter().expect("nobody closes it");
        let list = region.first_list();
        let entry = list.and_then(|list| list.load(0)).filter(|entry| entry.is_valid());
        if let Some(entry) = entry {
            thread::yield_now();
            refused += usize::from(port.read(entry.address(), &mut [0; 8]).is_err());
        }
    }
    refused
}

/// DMAs that went to pages that were gone, and children made.
fn world() -> (usize, u64) {
    let space = TwoPages::new();
    let (port, domain) = space.attach();
    let (hca, dma) = (HcaConfig::simulated(7), DmaConfig::default());
    let config = ModelConfig { hca, dma, faults: FaultPolicy::default() };
    let device = ModelDevice::stepped("hca", port.clone(), Fabric::new().port(), config).expect("a device");
    let pd = device.alloc_model_pd().expect("a domain");
    let region = pd.register_implicit(&space.both(), RegisterOptions::implicit()).expect("registered");
    let page = VirtRange::new(FIRST, PAGE_SIZE).expect("a page");

    let touching = {
        let target = FaultTarget::implicit(region.children(), pd.handle());
        thread::spawn(move || {
            for _ in 0..2 {
                // Whoever takes parts away leaves those alone that somebody brings pages into.
                target.bring(page, Want::Fault(Access::Write)).expect("there is memory");
            }
        })
    };
    let changing = {
        let space = Arc::clone(&space);
        thread::spawn(move || (0..2).for_each(|_| space.drop_first()))
    };
    let reclaiming = {
        let device = Arc::clone(&device);
        thread::spawn(move || (0..2).for_each(|_| _ = device.reclaim()))
    };
    let engine = {
        let (region, port) = (Arc::clone(&region), port.clone());
        thread::spawn(move || bursts(&region, &port))
    };
    let refused = engine.join().expect("the engine did not fail");
    for thread in [touching, changing, reclaiming] {
        thread.join().expect("no thread failed");
    }
    let made = region.children_made();
    region.deregister();
    drop(region);
    assert_eq!(device.hca().live_objects().keys, 0, "a key is left");
    let stale = space.check_nothing_is_left(device.dma(), &domain);
    (refused + stale, made)
}

#[test]
fn shuttle_children_of_an_implicit_region_come_and_go_and_no_burst_meets_a_stale_page() {
    let counts = std::sync::Arc::new([const { AtomicUsize::new(0) }; 3]);
    let counted = std::sync::Arc::clone(&counts);
    let run = move || {
        let (stale, made) = world();
        counted[0].fetch_add(1, Ordering::Relaxed);
        counted[1].fetch_add(stale, Ordering::Relaxed);
        counted[2].fetch_add(usize::from(made > 1), Ordering::Relaxed);
    };
    shuttle::check_random(run.clone(), EXECUTIONS);
    shuttle::check_pct(run, EXECUTIONS, 4);
    let [executions, stale, again] = [0, 1, 2].map(|n: usize| counts[n].load(Ordering::Relaxed));
    println!(
        "shuttle explored {executions} executions of an implicit region; in {again} a child was made again"
    );
    assert_eq!(stale, 0, "DMA reached pages that were gone");
    assert!(again > 0, "no child was ever taken away while others used the region");
}
