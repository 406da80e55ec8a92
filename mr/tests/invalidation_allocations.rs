//! An invalidation runs inside the application's own munmap, with its allocator's lock held: with regions of several devices on
//! the range it still neither allocates nor frees. A counting allocator watches the thread that invalidates.
//!
//! Unsafe island. Invariant: every call is passed on to the system's allocator unchanged.
#![allow(unsafe_code)]

use hw_model::bus::{Bus, DeviceSpec, HostMemory};
use hw_model::iommu::{Domain, DomainConfig};
use hw_model::link::Fabric;
use hw_model::sync::Arc;
use mr::device::model::{ModelConfig, ModelDevice};
use mr::{Device, Region, RegisterOptions};
use odp::fault::Want;
use odp::notifier::Event;
use odp::space::sim::{MapRequest, SimConfig, SimHost};
use odp::space::{Access, AddressSpace, UserRange};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

thread_local! {
    static CALLS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    // Not counted while the thread ends: nothing is asserted then.
    let _ = CALLS.try_with(|calls| calls.set(calls.get() + 1));
}

// SAFETY: every method passes its arguments to `System` unchanged, which keeps the contract of the trait.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's contract is that of the callee.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count();
        // SAFETY: `at` came from `System` with this layout.
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: `at` came from `System` with this layout.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Calls of the allocator that `run` makes on this thread.
fn allocator_calls(run: impl FnOnce()) -> u64 {
    let before = CALLS.get();
    run();
    CALLS.get() - before
}

const PAGES: u64 = 600;

/// If this fails, a program hangs in free: the supervisor or monitor waits for the lock that the caller of munmap holds.
#[test]
fn invalidating_regions_of_several_devices_neither_allocates_nor_frees() {
    assert!(allocator_calls(|| drop(std::hint::black_box(Box::new(1)))) >= 2, "the counter does not count");
    let host = SimHost::new(SimConfig { ram_pages: 2048, ..SimConfig::default() }).expect("memory");
    let space = host.new_space();
    let range = space.map(MapRequest::anonymous(PAGES)).expect("room");
    let bus = Bus::new(Arc::clone(&host) as Arc<dyn HostMemory>);
    let memory = UserRange::simulated(&space, range);
    let regions: Vec<Arc<dyn Region>> = [true, true, false]
        .into_iter()
        .enumerate()
        .map(|(n, iommu)| {
            let domain = Domain::new(DomainConfig::default()).expect("the default is possible");
            let spec = DeviceSpec::new(format!("hca{n}"));
            let port = bus.attach(if iommu { spec.domain(&domain) } else { spec }).expect("room on the bus");
            let device = ModelDevice::stepped("hca", port, Fabric::new().port(), ModelConfig::default());
            let pd = device.expect("a device").alloc_pd().expect("a protection domain");
            let range = if n == 1 { memory.anchored().expect("mapped") } else { memory.clone() };
            pd.register(&range, RegisterOptions::on_demand()).expect("a region")
        })
        .collect();
    let bring = || {
        for region in &regions {
            region.advise(0, range.len(), Want::Fault(Access::Write)).expect("the pages can be had");
        }
    };
    let present = || regions.iter().map(|region| region.report().present).sum::<u64>();
    let notifiers = space.notifiers();
    let part = |page: u64, pages: u64| {
        let start = range.start().offset(page * 4096);
        hw_model::addr::VirtRange::new(start, pages * 4096).expect("part of the range")
    };
    bring();
    assert_eq!(present(), 3 * PAGES);
    let calls = allocator_calls(|| notifiers.invalidate(range, || ()));
    assert_eq!((calls, present()), (0, 0), "a blocking invalidation called the allocator");

    bring();
    let calls = allocator_calls(|| {
        notifiers.try_begin(part(7, 30)).expect("nobody is busy").end();
        let mut outer = notifiers.begin_invalidation(part(0, 300));
        let mut inner = notifiers.begin_invalidation(part(100, 20));
        assert!(inner.poll() && outer.poll());
        outer.end();
        inner.end();
        drop(notifiers.begin_invalidation(part(400, 10)));
    });
    assert_eq!((calls, present()), (0, 3 * (PAGES - 310)), "a stepped invalidation called the allocator");

    bring();
    let calls = allocator_calls(|| notifiers.invalidate_event(part(500, 10), Event::Unmap, || ()));
    assert_eq!(calls, 0, "the end of a mapping called the allocator");
    drop(regions);
}
