//! Reregistration under every thread order that shuttle finds: a key goes to other memory and back while an engine's bursts,
//! faults and invalidations meet it.
//! `RUSTFLAGS="--cfg shuttle" cargo test -p mr --release --lib shuttle`.

use super::super::target::Backed;
use crate::device::model::{FaultPolicy, ModelConfig, ModelDevice};
use crate::device::{AdviseError, Region};
use crate::dma::DmaConfig;
use crate::region::Core;
use crate::region::two_pages::TwoPages;
use crate::{RegisterOptions, Rereg};
use hw_model::addr::PAGE_SIZE;
use hw_model::bus::DmaPort;
use hw_model::hca::{HcaConfig, Key};
use hw_model::link::Fabric;
use hw_model::sync::{Arc, Mutex, thread};
use odp::fault::{FaultFailure, Want};
use odp::space::Access;
use std::sync::atomic::{AtomicUsize, Ordering};

const EXECUTIONS: usize = 150;

/// The page list that a burst is using.
type InUse = Mutex<Option<Arc<Core>>>;

/// What `key` leads to.
fn found(device: &ModelDevice, key: Key) -> Arc<Core> {
    match device.fault_target(key).expect("a region").memory {
        Backed::Explicit(core, _) => core,
        Backed::Implicit(_) => unreachable!("it is explicit"),
    }
}

/// Bursts of an engine. Gives how many moved bytes, and how many the bus refused.
fn bursts(device: &ModelDevice, key: Key, port: &DmaPort, in_use: &InUse) -> (usize, usize) {
    let mut slot = port.epoch().register().expect("room for an engine");
    let (mut moved, mut refused) = (0, 0);
    for _ in 0..3 {
        let _busy = slot.enter().expect("nobody closes it");
        let core = found(device, key);
        *in_use.lock() = Some(Arc::clone(&core));
        let entry = core.list.load(0).expect("a page of the region");
        if entry.is_valid() {
            thread::yield_now();
            let read = port.read(entry.address(), &mut [0; 8]);
            (moved, refused) = (moved + usize::from(read.is_ok()), refused + usize::from(read.is_err()));
        }
        let before = in_use.lock().take();
        drop(before);
    }
    (moved, refused)
}

/// Bursts that moved bytes, and DMAs that went to pages that were gone.
fn world() -> (usize, usize) {
    let space = TwoPages::new();
    let (port, domain) = space.attach();
    let (hca, dma) = (HcaConfig::simulated(7), DmaConfig::default());
    let config = ModelConfig { hca, dma, faults: FaultPolicy::default() };
    let device = ModelDevice::stepped("hca", port.clone(), Fabric::new().port(), config).expect("a device");
    let pd = device.alloc_model_pd().expect("a domain");
    let pages = [0, 1].map(|n| space.both().part(n * PAGE_SIZE, PAGE_SIZE).expect("in it"));
    let region = pd.register_model(&pages[0], RegisterOptions::pinned()).expect("registered");
    let key = region.key();
    let in_use = Arc::new(InUse::default());

    let changing = {
        let (region, device, in_use) = (Arc::clone(&region), Arc::clone(&device), Arc::clone(&in_use));
        thread::spawn(move || {
            for page in [&pages[1], &pages[0]] {
                let old = found(&device, key);
                let memory = Some((page.clone(), None));
                region.rereg(Rereg { memory, ..Rereg::default() }).expect("possible");
                let used = in_use.lock().as_ref().is_some_and(|core| Arc::ptr_eq(core, &old));
                assert!(!used, "a burst that began before the change is under way after it");
            }
        })
    };
    let faulting = {
        let device = Arc::clone(&device);
        thread::spawn(move || {
            for _ in 0..2 {
                let target = device.fault_target(key).expect("a region");
                match target.bring(target.range, Want::Fault(Access::Write)) {
                    // It kept changing, or went: who still wants it asks again, and finds what there is then.
                    Ok(())
                    | Err(AdviseError::Deregistered | AdviseError::Pages(FaultFailure::Unsettled { .. })) => {
                    }
                    Err(error) => panic!("{error:?}"),
                }
            }
        })
    };
    let invalidating = {
        let space = Arc::clone(&space);
        thread::spawn(move || (0..2).for_each(|_| space.drop_first()))
    };
    let engine = {
        let (device, port) = (Arc::clone(&device), port.clone());
        thread::spawn(move || bursts(&device, key, &port, &in_use))
    };
    let (moved, refused) = engine.join().expect("the engine did not fail");
    for thread in [changing, faulting, invalidating] {
        thread.join().expect("no thread failed");
    }
    region.deregister();
    drop(region);
    assert_eq!(device.hca().live_objects().keys, 0, "a key is left");
    let stale = space.check_nothing_is_left(device.dma(), &domain);
    (moved, refused + stale)
}

#[test]
fn shuttle_a_key_that_goes_to_other_memory_leads_to_one_memory_or_the_other() {
    let counts = std::sync::Arc::new([const { AtomicUsize::new(0) }; 3]);
    let counted = std::sync::Arc::clone(&counts);
    let run = move || {
        let (moved, stale) = world();
        counted[0].fetch_add(1, Ordering::Relaxed);
        counted[1].fetch_add(moved, Ordering::Relaxed);
        counted[2].fetch_add(stale, Ordering::Relaxed);
    };
    shuttle::check_random(run.clone(), EXECUTIONS);
    shuttle::check_pct(run, EXECUTIONS, 4);
    let [executions, moved, stale] = [0, 1, 2].map(|n: usize| counts[n].load(Ordering::Relaxed));
    println!(
        "shuttle explored {executions} executions of a reregistration, in which {moved} bursts moved bytes"
    );
    assert_eq!(stale, 0, "DMA reached pages that were gone");
    assert!(moved > 0, "no burst ever met a page");
}
