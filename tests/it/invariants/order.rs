//! The order of things: 2, 6, 11.

use super::Hand;
use crate::bed::{Bed, hears_of_drops, knows_zero_pages, space};
use crate::checks::{Verdict, until};
use crate::gate::Gate;
use crate::remapped::Remapped;
use anypage::machine::MachineConfig;
use hw_model::addr::{PAGE_SIZE, VirtRange, page_bytes};
use hw_model::bus::DmaPort;
use hw_model::fault_plan::{FaultPlan, Points, Rule};
use hw_model::hca::{Backing, Entry, PageList, Path, Status};
use hw_model::iommu::LeafSize;
use hw_model::sync::Arc;
use mr::RegisterOptions;
use mr::dma::Mapping;
use odp::fault::{FaultWork, Progress, Publication, Want};
use odp::notifier::{Notify, Raise};
use odp::space::process::ProcessSpace;
use odp::space::{Access, AddressSpace};

/// Invariant 2, with the test as the engine: a burst that read its entry before the invalidation keeps its page to its end,
/// no later burst finds it, and when the page may go nothing leads there.
fn clear_drain_unlink(
    space: &ProcessSpace,
    port: &DmaPort,
    page: VirtRange,
    entry: impl Fn() -> Entry,
) -> Verdict {
    let mut engine = space.memory().epoch().register().expect("a slot");
    engine.begin().expect("open");
    let read = entry();
    assert!(read.is_valid(), "the page is there at first");
    let mut invalidation = space.notifiers().begin_invalidation(page);
    if entry().is_valid() {
        return Err("a burst that begins now would still find the page".into());
    }
    if invalidation.poll() {
        return Err("the page may go while a burst is using it".into());
    }
    let burst = port.read(read.address(), &mut [0; 8]);
    burst.map_err(|error| format!("the burst under way lost its page: {error}"))?;
    engine.end();
    if !invalidation.poll() {
        return Err("nobody uses the page and still it may not go".into());
    }
    if port.read(read.address(), &mut [0; 8]).is_ok() {
        return Err("the page goes and a translation still leads there".into());
    }
    invalidation.end();
    Ok(())
}

#[test]
fn invariant_02_clear_drain_unlink_release() {
    let hand = Hand::new(4);
    for options in [RegisterOptions::on_demand(), RegisterOptions::pinned()] {
        let bed = Bed::new(&hand.space, &hand.memory.user_range(), options, &MachineConfig::default());
        assert_eq!(bed.write(0, 4 * PAGE_SIZE as u32), Status::Success);
        let entry = || Entry::from_bits(bed.near.region.raw_entries().expect("the model shows its list")[2]);
        let port = bed.machine.near.dma().port().expect("on the modelled bus");
        clear_drain_unlink(&hand.space, port, hand.page(2), entry).expect("the order of the protocol");
        assert_eq!(bed.write(0, 4 * PAGE_SIZE as u32), Status::Success, "and the page comes back");
    }
}

/// An owner that does the steps of an invalidation, each when it is told to.
struct Owner {
    list: PageList,
    mapping: Mapping,
    hides: bool,
    /// Unlinks in the clear callback already: the mistake that the drain is there to prevent.
    hasty: bool,
    unlinks: bool,
}

impl Owner {
    fn new(hand: &Hand) -> Self {
        let (mapping, list) = (hand.mapping(), PageList::new(1).expect("memory"));
        mapping.link(0, hand.memory.physical_base(), PAGE_SIZE, LeafSize::Page).expect("free");
        mapping.sync(0, PAGE_SIZE).expect("linked");
        list.store(0, Entry::present(mapping.dma_address(0), Path::Iova, Backing::Shared, true));
        Self { list, mapping, hides: true, hasty: false, unlinks: true }
    }
    fn entry(&self) -> Entry {
        self.list.load(0).expect("in the list")
    }
}

impl Notify for Owner {
    fn clear(&self, _range: VirtRange, raise: Raise<'_>) {
        raise.raise();
        if self.hides {
            self.list.store(0, self.entry().cleared());
        }
        if self.hasty {
            self.mapping.unlink(0, PAGE_SIZE).expect("linked");
        }
    }
    fn unlink(&self, _range: VirtRange) {
        if self.unlinks && !self.hasty {
            self.mapping.unlink(0, PAGE_SIZE).expect("linked");
        }
    }
}

#[test]
fn invariant_02_can_fail() {
    let verdict = |change: fn(&mut Owner)| {
        let hand = Hand::new(1);
        let mut owner = Owner::new(&hand);
        change(&mut owner);
        let owner = Arc::new(owner);
        let interval = hand.space.notifiers().register(hand.memory.range(), Arc::clone(&owner) as _);
        let verdict = clear_drain_unlink(&hand.space, &hand.port, hand.page(0), || owner.entry());
        drop(interval);
        verdict
    };
    verdict(|_| ()).expect("in the right order it is right");
    let wrong = verdict(|owner| owner.hasty = true).expect_err("unlinked before the drain");
    assert!(wrong.contains("lost its page"), "{wrong}");
    let wrong = verdict(|owner| owner.hides = false).expect_err("never hidden");
    assert!(wrong.contains("still find"), "{wrong}");
    let wrong = verdict(|owner| owner.unlinks = false).expect_err("never unlinked");
    assert!(wrong.contains("still leads"), "{wrong}");
}

#[test]
fn invariant_06_what_is_published_was_reported_at_the_accepted_number() {
    if !hears_of_drops("invariant_06_what_is_published_was_reported_at_the_accepted_number") {
        return;
    }
    let gate = Gate::new();
    let plan = FaultPlan::new(0, vec![Rule::nth("mr.publish", 2, gate.action())]);
    let config = MachineConfig { points: Points::with(&plan), ..MachineConfig::default() };
    let (space, memory) = (space(), Remapped::new(16));
    let range = memory.user_range(Arc::clone(&space) as _);
    // The first visit is registration's own walk.
    let bed = Bed::new(&space, &range, RegisterOptions::on_demand(), &config);
    bed.post_write(1, page_bytes(3), 8);
    gate.wait_for_arrival();
    // The page has been looked at, and is gone before it is published.
    let before = space.notifiers().stats().invalidations;
    memory.discard(3, 1);
    let ended = || {
        let stats = space.notifiers().stats();
        stats.invalidations > before && stats.running == 0
    };
    assert!(until(ended), "the region has been told");
    gate.open();
    assert_eq!(bed.far_ends(1)[0].status, Status::Success);
    assert!(bed.near.region.counters().fault_retries >= 1, "what was seen was thrown away");
    bed.view(&range).check().expect("what is there now is what is published");
    assert_eq!(plan.fired()[0].1, 1);
    assert_eq!(space.stats().retired_uses, 0);
}

#[test]
fn invariant_06_can_fail() {
    if !hears_of_drops("invariant_06_can_fail") {
        return;
    }
    // A publisher that does not ask whether its number still holds.
    let hand = Hand::new(1);
    let memory = Remapped::new(1);
    let watch = hand.space.watch(memory.range()).expect("mapped");
    let owner = Arc::new(Owner::new(&hand));
    let interval = hand.space.notifiers().register(memory.range(), Arc::clone(&owner) as _);
    let mut work = FaultWork::new(interval.sequence(), memory.range(), Want::Fault(Access::Write));
    let mut published = None;
    loop {
        let step = work.poll::<(), ()>(&*hand.space, |runs, check| {
            memory.discard(0, 1);
            assert!(until(|| check.retry()), "the change is noticed");
            published = Some(runs[0]);
            Ok(Publication::Published(()))
        });
        if step == Ok(Progress::Done(())) {
            break;
        }
    }
    assert!(until(|| hand.space.notifiers().stats().running == 0), "the invalidation ends");
    let stale = published.expect("published");
    let now = crate::checks::pages_of(&*hand.space, memory.range())[0];
    assert_ne!(now.map(|page| page.phys), Some(stale.phys), "published: a page that is gone");
    let engine = hand.space.memory();
    engine.read(stale.phys, &mut [0; 8]).expect_err("and memory refuses it");
    assert_eq!(hand.space.stats().retired_uses, 1, "which is what the other tests count");
    drop((interval, watch));
}

/// Invariant 11: what an upgrade may change of an entry.
fn upgrade_keeps_the_page(before: Entry, after: Entry) -> Verdict {
    let same = before.address() == after.address() && before.path() == after.path();
    match same && before.is_valid() && after.is_writable() && before.is_linked() == after.is_linked() {
        true => Ok(()),
        false => Err(format!("{before:?} became {after:?}")),
    }
}

#[test]
fn invariant_11_an_upgrade_keeps_the_dma_address() {
    if !knows_zero_pages("invariant_11_an_upgrade_keeps_the_dma_address") {
        return;
    }
    for iommu in [true, false] {
        let (space, memory) = (space(), Remapped::new(4));
        let range = memory.user_range(Arc::clone(&space) as _);
        let config = MachineConfig { iommu, ..MachineConfig::default() };
        let bed = Bed::new(&space, &range, RegisterOptions::on_demand(), &config);
        let entry = || Entry::from_bits(bed.near.region.raw_entries().expect("the model shows its list")[1]);
        assert_eq!(bed.read(page_bytes(1), 8), Status::Success);
        let (before, links) = (entry(), bed.near.region.counters().links);
        assert!(before.is_valid() && !before.is_writable(), "read: the page of zeroes, {before:?}");
        assert_eq!(bed.write(page_bytes(1), 8), Status::Success);
        upgrade_keeps_the_page(before, entry()).expect("written");
        assert_eq!(bed.near.region.counters().links, links, "nothing was linked for it");
        assert_eq!(bed.near.region.report().present, 1, "nor counted again");
    }
}

#[test]
fn invariant_11_can_fail() {
    let before = Entry::present(hw_model::addr::DmaAddr(0x5000), Path::Iova, Backing::Zero, false);
    upgrade_keeps_the_page(before, before.upgraded()).expect("as it should be");
    // A page of zeroes that is taken down and linked elsewhere for the write.
    let elsewhere = Entry::present(hw_model::addr::DmaAddr(0x6000), Path::Iova, Backing::Anonymous, true);
    upgrade_keeps_the_page(before, elsewhere).expect_err("another address");
    upgrade_keeps_the_page(before, before).expect_err("no upgrade at all");
}
