//! The cache under every thread order that shuttle finds: requests with leases held, changes of the memory, eviction.
//! `RUSTFLAGS="--cfg shuttle" cargo test -p mr --release --lib shuttle`.
//!
//! Harm is a request that begins after a change and gets a region from before it, and a leased region that takes no page any
//! more because somebody thought that it was not leased.

use super::{Cache, CacheConfig, Lease};
use crate::device::model::{ModelConfig, ModelDevice};
use crate::device::{AdviseError, Device};
use crate::region::PublishError;
use hw_model::addr::{PAGE_SIZE, VirtRange, page_bytes};
use hw_model::bus::{Bus, DeviceSpec};
use hw_model::hca::{Access, Key};
use hw_model::iommu::{Domain, DomainConfig};
use hw_model::link::Fabric;
use hw_model::sync::outside::{AtomicUsize, Ordering};
use hw_model::sync::{Arc, Mutex, thread};
use odp::fault::{FaultFailure, Want};
use odp::space::sim::{MapRequest, Protection, SimConfig, SimHost, SimSpace, Source, SpaceChange};
use odp::space::{Access as PageAccess, AddressSpace, UserRange};

/// A simulated machine is made for each.
const EXECUTIONS: usize = 120;

/// When a request looks whether what it found has ended.
#[derive(Clone, Copy, PartialEq)]
enum Look {
    /// Also after it was counted.
    Again,
    /// Only before: what a request must not do.
    Once,
}

struct World {
    space: Arc<SimSpace>,
    memory: UserRange,
    cache: Cache,
    /// Keys that were given out so far.
    given: Mutex<Vec<Key>>,
}

const RIGHTS: Access = Access::REMOTE_READ;

impl World {
    fn new() -> (Arc<Self>, Arc<ModelDevice>) {
        let host = SimHost::new(SimConfig { ram_pages: 512, ..SimConfig::default() }).expect("memory");
        let space = host.new_space();
        let (source, protection) = (Source::Anonymous, Protection::ReadWrite);
        let range = space.map(MapRequest { at: None, pages: 3, source, protection, huge: false });
        let memory = UserRange::simulated(&space, range.expect("room"));
        let bus = Bus::new(space.memory());
        let config = DomainConfig { width: 32, ..DomainConfig::default() };
        let domain = Domain::new(config).expect("a small domain");
        let port = bus.attach(DeviceSpec::new("device").domain(&domain)).expect("room on the bus");
        let device = ModelDevice::stepped("device", port, Fabric::new().port(), ModelConfig::default());
        let device = device.expect("a device");
        let pd = Arc::clone(&device).alloc_pd().expect("a protection domain");
        let config = CacheConfig { max_entries: 2, ..CacheConfig::default() };
        let cache = Cache::new(pd, Arc::clone(&space) as _, config);
        (Arc::new(Self { space, memory, cache, given: Mutex::default() }), device)
    }

    fn pages(&self, first: u64, count: u64) -> VirtRange {
        let start = self.memory.range().start().offset(page_bytes(first));
        VirtRange::new(start, page_bytes(count)).expect("in the mapping")
    }

    /// The first two pages.
    fn get(&self, look: Look) -> Lease {
        let wanted = self.pages(0, 2);
        let found = match look {
            Look::Again => None,
            Look::Once => self.cache.published.find_once(wanted, RIGHTS),
        };
        let lease = match found {
            Some(entry) => Lease::new(entry, wanted.start(), wanted.len()),
            None => self.cache.get_part(&self.memory, 0, wanted.len(), RIGHTS).expect("mapped"),
        };
        self.given.lock().push(lease.key());
        lease
    }

    /// Uses the second page, which nobody changes, while a lease is held. Whether that was refused.
    fn is_refused(&self, lease: &Lease) -> bool {
        match lease.region().advise(PAGE_SIZE, PAGE_SIZE, Want::Fault(PageAccess::Read)) {
            Ok(()) => false,
            Err(AdviseError::Pages(FaultFailure::Publish(PublishError::Sealed))) => true,
            Err(error) => panic!("the second page cannot be had: {error}"),
        }
    }
}

fn world(look: Look) -> usize {
    let (world, device) = World::new();
    drop(world.get(Look::Again));
    let user = |rounds: usize| {
        let world = Arc::clone(&world);
        thread::spawn(move || {
            let used = (0..rounds).map(|_| {
                let lease = world.get(look);
                usize::from(world.is_refused(&lease))
            });
            used.sum::<usize>()
        })
    };
    let users = [user(2), user(1)];
    let changer = {
        let world = Arc::clone(&world);
        thread::spawn(move || {
            world.space.change(SpaceChange::Discard(world.pages(0, 1))).expect("mapped");
            // Given before now: perhaps from before the change.
            let before = world.given.lock().clone();
            let lease = world.cache.get_part(&world.memory, 0, PAGE_SIZE, RIGHTS).expect("mapped");
            let first = before.first().expect("one was given before any thread began");
            usize::from(lease.key() == *first)
        })
    };
    let evictor = {
        let world = Arc::clone(&world);
        thread::spawn(move || {
            let other = world.cache.get_part(&world.memory, page_bytes(2), PAGE_SIZE, RIGHTS);
            drop(other.expect("mapped"));
            world.cache.reap();
        })
    };
    let mut harm = changer.join().expect("the change did not fail");
    for user in users {
        harm += user.join().expect("the user did not fail");
    }
    evictor.join().expect("the evictor did not fail");
    let world = Arc::into_inner(world).expect("the threads have ended");
    let World { space, cache, .. } = world;
    drop(cache);
    let notifiers = space.notifiers().stats();
    assert_eq!((notifiers.intervals, notifiers.running), (0, 0), "something still listens");
    assert_eq!(device.dma().iova_stats().live_ranges, 0, "IOVA is left");
    harm
}

/// How many schedules were tried, and how much harm was done.
fn explore(look: Look) -> (usize, usize) {
    let counts = std::sync::Arc::new([const { AtomicUsize::new(0) }; 2]);
    let counted = std::sync::Arc::clone(&counts);
    let run = move || {
        let harm = world(look);
        counted[0].fetch_add(1, Ordering::Relaxed);
        counted[1].fetch_add(harm, Ordering::Relaxed);
    };
    shuttle::check_random(run.clone(), EXECUTIONS);
    shuttle::check_pct(run, EXECUTIONS, 4);
    (counts[0].load(Ordering::Relaxed), counts[1].load(Ordering::Relaxed))
}

#[test]
fn shuttle_no_request_finds_what_ended_before_it_and_no_leased_region_is_sealed() {
    let (executions, harm) = explore(Look::Again);
    println!("shuttle explored {executions} executions of a cache under requests, a change and eviction");
    assert!(executions > 0);
    assert_eq!(harm, 0, "a stale hit, or a leased region that takes no page");
}

#[test]
fn shuttle_catches_a_hit_that_is_not_looked_at_again() {
    let (executions, harm) = explore(Look::Once);
    println!("shuttle explored {executions} executions of the broken cache, harm {harm}");
    assert!(harm > 0, "in {executions} executions the broken cache did no harm");
}
