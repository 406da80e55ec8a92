//! The cache over a simulated address space and a stepped device: what is found, what is not, and what is left.

mod model;

use super::*;
use crate::device::model::{ModelConfig, ModelDevice};
use crate::device::{AdviseError, Device, ProtectionDomain, RegisterError};
use crate::region::{MapRegionError, PublishError};
use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange, page_bytes};
use hw_model::bus::{Bus, DeviceSpec};
use hw_model::fault_plan::{Action, FaultPlan, Points, Rule};
use hw_model::hca::Access;
use hw_model::iommu::{Domain, DomainConfig};
use hw_model::link::Fabric;
use hw_model::sync::Arc;
use odp::fault::{FaultFailure, Want};
use odp::space::sim::{MapRequest, Protection, SimConfig, SimHost, SimSpace, Source, SpaceChange};
use odp::space::{Access as PageAccess, AddressSpace, UserRange};

const READ: Access = Access::REMOTE_READ;

fn rights() -> Access {
    Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ
}

/// A process with one mapping, and a device.
struct World {
    space: Arc<SimSpace>,
    device: Arc<ModelDevice>,
    memory: UserRange,
}

impl World {
    fn new(pages: u64) -> Self {
        let host = SimHost::new(SimConfig::default()).expect("memory");
        let space = host.new_space();
        let request = MapRequest {
            at: None,
            pages,
            source: Source::Anonymous,
            protection: Protection::ReadWrite,
            huge: false,
        };
        let range = space.map(request).expect("room");
        let bus = Bus::new(space.memory());
        let domain = Domain::new(DomainConfig::default()).expect("the default is possible");
        let port = bus.attach(DeviceSpec::new("device").domain(&domain)).expect("room on the bus");
        let device = ModelDevice::stepped("device", port, Fabric::new().port(), ModelConfig::default());
        let memory = UserRange::simulated(&space, range);
        Self { space, device: device.expect("a device"), memory }
    }

    fn pd(&self) -> Arc<dyn ProtectionDomain> {
        Arc::clone(&self.device).alloc_pd().expect("a protection domain")
    }

    fn cache(&self, config: CacheConfig) -> Cache {
        Cache::new(self.pd(), Arc::clone(&self.space) as _, config)
    }

    fn pages(&self, first: u64, count: u64) -> VirtRange {
        let start = self.memory.range().start().offset(page_bytes(first));
        VirtRange::new(start, page_bytes(count)).expect("in the mapping")
    }

    fn discard(&self, first: u64, count: u64) {
        self.space.change(SpaceChange::Discard(self.pages(first, count))).expect("mapped");
    }

    /// Regions' intervals and trackers', and IOVA ranges.
    fn left(&self) -> (u64, u64) {
        (self.space.notifiers().stats().intervals, self.device.dma().iova_stats().live_ranges)
    }
}

#[test]
fn what_was_registered_is_found_again_by_any_part_and_fewer_rights() {
    let world = World::new(16);
    let cache = world.cache(CacheConfig::default());
    let whole = cache.get(&world.memory, rights()).expect("registered");
    let part = cache.get_part(&world.memory, 5000, 300, READ).expect("a hit");
    assert_eq!((part.key(), part.address()), (whole.key(), whole.address().offset(5000)));
    assert_eq!((part.len(), part.is_current()), (300, true));
    assert_eq!(cache.get_part(&world.memory, 0, 1, READ).expect("a hit").key(), whole.key());
    let last = world.memory.range().len() - 1;
    assert_eq!(cache.get_part(&world.memory, last, 1, READ).expect("a hit").key(), whole.key());
    let more = cache.get_part(&world.memory, 0, 1, rights() | Access::REMOTE_ATOMIC).expect("registered");
    assert_ne!(more.key(), whole.key(), "rights that the entry does not grant were given");
    let stats = cache.stats();
    assert_eq!((stats.hits, stats.misses, stats.entries), (3, 2, 2));
}

#[test]
fn a_lease_outlives_its_entry_and_the_cache() {
    let world = World::new(4);
    let cache = world.cache(CacheConfig::default());
    let lease = cache.get(&world.memory, rights()).expect("registered");
    drop(cache);
    assert!(lease.region().advise(0, 1, Want::Fault(PageAccess::Write)).is_ok());
    assert_eq!(world.left(), (2, 1));
    drop(lease);
    assert_eq!(world.left(), (0, 0));
}

#[test]
fn a_change_of_memory_ends_the_entry_and_seals_a_region_that_nobody_uses() {
    let world = World::new(4);
    let cache = world.cache(CacheConfig::default());
    let region = Arc::clone(cache.get(&world.memory, rights()).expect("registered").region());
    let write = Want::Fault(PageAccess::Write);
    region.advise(page_bytes(2), PAGE_SIZE, write).expect("a page");
    world.discard(1, 1);
    let refused = region.advise(page_bytes(1), PAGE_SIZE, write);
    assert_eq!(refused, Err(AdviseError::Pages(FaultFailure::Publish(PublishError::Sealed))));
    assert_eq!(region.report().present, 1, "a page that did not change was taken from the region");
    drop(region);
    // Nothing is deregistered in the callback; asking is what clears away.
    assert_eq!(world.left(), (2, 1));
    let anew = cache.get(&world.memory, rights()).expect("registered");
    assert!(anew.is_current());
    assert_eq!(world.left(), (2, 1));
    let stats = cache.stats();
    assert_eq!((stats.hits, stats.misses, stats.entries, stats.ended), (0, 2, 1, 1));
}

#[test]
fn a_region_that_is_in_use_follows_its_memory_until_its_last_lease_goes() {
    let world = World::new(4);
    let cache = world.cache(CacheConfig::default());
    let lease = cache.get(&world.memory, rights()).expect("registered");
    world.discard(1, 1);
    assert!(!lease.is_current());
    lease.region().advise(page_bytes(1), PAGE_SIZE, Want::Fault(PageAccess::Write)).expect("it follows");
    let anew = cache.get(&world.memory, rights()).expect("registered");
    assert_ne!(anew.key(), lease.key(), "a stale hit");
    assert_eq!(world.left(), (4, 2));
    drop(lease);
    assert_eq!(world.left(), (2, 1), "the last lease of an ended entry did not deregister it");
    drop(anew);
    cache.reap();
    assert_eq!((world.left(), cache.stats().entries), ((2, 1), 1), "a current entry was reaped");
    world.discard(0, 4);
    cache.reap();
    assert_eq!((world.left(), cache.stats().entries), ((0, 0), 0));
}

#[test]
fn a_region_whose_memory_changes_while_it_is_made_is_given_out_and_not_kept() {
    let world = World::new(4);
    let changed = Arc::new(hw_model::sync::Mutex::new(None));
    let action = {
        let space = Arc::clone(&world.space);
        let (page, changed) = (world.pages(3, 1), Arc::clone(&changed));
        Action::Run(Arc::new(move |_| {
            *changed.lock() = Some(space.change(SpaceChange::Discard(page)).is_ok());
        }))
    };
    let plan = FaultPlan::new(0, vec![Rule::nth("mr.cache.put", 1, action)]);
    let cache = world.cache(CacheConfig { points: Points::with(&plan), ..CacheConfig::default() });
    let lease = cache.get(&world.memory, rights()).expect("registered");
    assert_eq!(*changed.lock(), Some(true), "the plan did not fire");
    assert_eq!((lease.is_current(), cache.stats().entries, cache.stats().unkept), (false, 0, 1));
    let write = Want::Fault(PageAccess::Write);
    lease.region().advise(0, 4 * PAGE_SIZE, write).expect("a leased region is not sealed");
    assert!(cache.get(&world.memory, rights()).expect("registered").is_current());
    drop(lease);
    assert_eq!(world.left(), (2, 1));
}

#[test]
fn a_region_made_while_an_invalidation_runs_is_not_kept() {
    let world = World::new(4);
    let cache = world.cache(CacheConfig::default());
    let running = world.space.notifiers().begin_invalidation(world.pages(0, 1));
    // The region itself waits for the invalidation to end; so this ends it meanwhile.
    let lease = std::thread::scope(|scope| {
        let getting = scope.spawn(|| cache.get(&world.memory, rights()));
        while world.space.notifiers().stats().intervals < 2 {
            std::thread::yield_now();
        }
        drop(running);
        getting.join().expect("no panic")
    });
    let lease = lease.expect("registered once the invalidation has ended");
    assert!(!lease.is_current() && cache.stats().entries == 0);
}

#[test]
fn entries_become_one_as_far_as_they_are_told_to() {
    for (merging, touching, overlapping) in
        [(Merging::Never, 3, 3), (Merging::Overlapping, 3, 2), (Merging::Touching, 2, 2)]
    {
        let world = World::new(16);
        let cache = world.cache(CacheConfig { merging, granule: 1, ..CacheConfig::default() });
        let get = |offset, len| drop(cache.get_part(&world.memory, offset, len, rights()).expect("a region"));
        get(0, 100);
        get(8000, 10);
        get(100, 50);
        assert_eq!(cache.stats().entries, touching, "{merging:?}, touching");
        let cache = world.cache(CacheConfig { merging, granule: 1, ..CacheConfig::default() });
        let get = |offset, len| drop(cache.get_part(&world.memory, offset, len, rights()).expect("a region"));
        get(0, 100);
        get(8000, 10);
        get(99, 50);
        assert_eq!(cache.stats().entries, overlapping, "{merging:?}, overlapping");
    }
}

#[test]
fn a_merged_region_takes_the_place_of_its_parts_and_stays_below_the_limit() {
    let world = World::new(16);
    let config = CacheConfig { max_merged: page_bytes(6), ..CacheConfig::default() };
    let cache = world.cache(config);
    let get = |page, count| {
        cache.get_part(&world.memory, page_bytes(page), page_bytes(count), rights()).expect("a region")
    };
    let first = get(0, 3);
    let both = get(2, 3);
    assert_eq!(both.region().len(), page_bytes(5));
    assert_eq!(both.address().0, world.pages(2, 1).start().0);
    assert_eq!(get(0, 1).key(), both.key(), "the part is still found");
    assert_eq!((cache.stats().entries, cache.stats().merged), (1, 1));
    assert!(first.is_current() && first.region().report().entries == 3, "a lease of a part broke");
    assert_eq!(get(4, 4).region().len(), page_bytes(4), "merged past the limit");
}

#[test]
fn requests_are_widened_within_the_memory_that_they_are_part_of() {
    let world = World::new(16);
    let part = world.memory.part(page_bytes(3) + 100, page_bytes(4)).expect("in it");
    let cache = world.cache(CacheConfig { granule: page_bytes(8), ..CacheConfig::default() });
    let lease = cache.get_part(&part, 50, 1, rights()).expect("a region");
    assert_eq!(lease.region().len(), part.range().len(), "memory that nobody vouched for was registered");
    assert_eq!(lease.address().0, part.range().start().0 + 50);
    let cache = world.cache(CacheConfig { granule: PAGE_SIZE, ..CacheConfig::default() });
    let lease = cache.get_part(&world.memory, page_bytes(2) + 7, PAGE_SIZE, rights()).expect("a region");
    assert_eq!(lease.region().address().0, world.pages(2, 1).start().0);
    assert_eq!(lease.region().len(), page_bytes(2));
}

#[test]
fn what_nobody_uses_makes_room_and_what_was_found_lately_last() {
    let world = World::new(16);
    let limits = CacheConfig { max_entries: 3, max_bytes: page_bytes(4), ..CacheConfig::default() };
    let cache = world.cache(limits);
    let get = |page, count| {
        cache.get_part(&world.memory, page_bytes(page), page_bytes(count), rights()).expect("a region")
    };
    let leased = get(0, 1);
    let (second, third) = (get(2, 1).key(), get(4, 1).key());
    assert_eq!(get(4, 1).key(), third);
    drop(get(6, 1));
    assert_eq!(cache.stats().evicted, 1);
    assert_eq!(get(4, 1).key(), third, "what was found lately went before what was not");
    assert_ne!(get(2, 1).key(), second, "the cache holds more than it may");
    assert_eq!(get(0, 1).key(), leased.key(), "what is leased was evicted");
    // By bytes: three pages and the leased one fill it.
    drop(get(8, 3));
    let stats = cache.stats();
    assert_eq!((stats.entries, stats.bytes), (2, page_bytes(4)));
    let large = get(0, 16);
    assert_eq!(large.region().len(), page_bytes(16));
    assert_eq!((cache.stats().bytes <= page_bytes(4), cache.stats().unkept), (true, 1));
}

#[test]
fn a_cache_that_may_hold_nothing_still_registers() {
    let world = World::new(4);
    let cache = world.cache(CacheConfig { max_entries: 0, ..CacheConfig::default() });
    let lease = cache.get(&world.memory, rights()).expect("a region");
    assert_eq!((cache.stats().entries, world.left()), (0, (2, 1)));
    drop(lease);
    assert_eq!(world.left(), (0, 0));
}

#[test]
fn forgetting_a_range_ends_the_entries_that_reach_into_it() {
    let world = World::new(16);
    let cache = world.cache(CacheConfig::default());
    let get = |page| cache.get_part(&world.memory, page_bytes(page), PAGE_SIZE, rights()).expect("a region");
    let (kept, gone) = (get(0).key(), get(4));
    assert_eq!(cache.forget(world.pages(4, 3)), 1);
    assert_eq!(get(0).key(), kept);
    assert!(get(4).key() != gone.key() && !gone.is_current());
}

#[test]
fn bad_requests_are_refused_with_their_numbers() {
    let world = World::new(4);
    let cache = world.cache(CacheConfig::default());
    let memory = world.memory.range();
    let part = |offset, len| cache.get_part(&world.memory, offset, len, READ).expect_err("refused");
    assert_eq!(part(0, 0), CacheError::Empty);
    for (offset, len) in [(1, page_bytes(4)), (page_bytes(4), 1), (u64::MAX, 1), (0, u64::MAX)] {
        assert_eq!(part(offset, len), CacheError::OutOfRange { offset, len, memory });
    }
    let other = World::new(4);
    let foreign = cache.get(&other.memory, READ).expect_err("refused");
    assert_eq!(foreign, CacheError::ForeignSpace { memory: other.memory.range() });
    let nowhere = VirtRange::new(VirtAddr(memory.end().0 + page_bytes(1 << 20)), PAGE_SIZE).expect("fits");
    let nowhere = cache.get(&UserRange::simulated(&world.space, nowhere), READ).expect_err("refused");
    assert!(matches!(nowhere, CacheError::Register(RegisterError::Map(MapRegionError::Watch(_)))));
    assert_eq!((cache.stats().entries, world.left()), (0, (0, 0)));
}

#[test]
fn a_registration_that_fails_is_tried_again_without_what_nobody_uses() {
    let host = World::new(8);
    let plan = FaultPlan::new(0, Vec::new());
    let domain = Domain::new(DomainConfig::default()).expect("the default is possible");
    let port = Bus::new(host.space.memory()).attach(DeviceSpec::new("device").domain(&domain)).expect("room");
    let dma = crate::dma::DmaConfig { points: Points::with(&plan), ..crate::dma::DmaConfig::default() };
    let config = ModelConfig { dma, ..ModelConfig::default() };
    let device = ModelDevice::stepped("device", port, Fabric::new().port(), config).expect("a device");
    let pd = Arc::clone(&device).alloc_pd().expect("a protection domain");
    let cache = Cache::new(pd, Arc::clone(&host.space) as _, CacheConfig::default());
    let get = |page| cache.get_part(&host.memory, page_bytes(page), PAGE_SIZE, rights());
    drop(get(0).expect("a region"));
    plan.fail_nth_from_now(1);
    drop(get(4).expect("a region, once the other is gone"));
    assert_eq!((cache.stats().entries, cache.stats().evicted), (1, 1));
}

#[test]
fn threads_count_their_hits_and_see_changes_of_each_other() {
    let world = World::new(8);
    let cache = world.cache(CacheConfig::default());
    let get = |page| cache.get_part(&world.memory, page_bytes(page), PAGE_SIZE, rights()).expect("a region");
    drop((get(0), get(4)));
    std::thread::scope(|scope| {
        for page in [0, 4] {
            let get = &get;
            scope.spawn(move || (0..1000).for_each(|_| drop(get(page))));
        }
    });
    assert_eq!((cache.stats().hits, cache.stats().misses), (2000, 2));
    let before = get(0).key();
    std::thread::scope(|scope| scope.spawn(|| world.discard(0, 1)).join().expect("no panic"));
    assert_ne!(get(0).key(), before, "another thread's change was not seen");
}
