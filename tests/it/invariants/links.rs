//! What the HCA sees and what the IOMMU has: 1, 3, 4, 5, 7, 9, 10.

use super::{Hand, page_of};
use crate::bed::{Bed, hears_of_drops, space};
use crate::checks::View;
use crate::overlay::{Instead, Overlay};
use anypage::machine::{Machine, MachineConfig};
use anypage::mixed::{HUGE, Kind, MixedMemory};
use hw_model::addr::{PAGE_SIZE, page_bytes};
use hw_model::bus::RamStorage;
use hw_model::hca::{Entry, PageList, Path, Status};
use hw_model::iommu::{DmaAccess, LeafSize, MapError, Prot};
use hw_model::sync::Arc;
use mr::RegisterOptions;
use mr::dma::{LinkError, UnlinkError};
use odp::fault::Want;
use odp::page::Backing;
use odp::space::Access;

const PARTS: [Kind; 5] = [Kind::Anonymous, Kind::TransparentHuge, Kind::Shared, Kind::File, Kind::Untouched];

fn mixed() -> Arc<MixedMemory> {
    Arc::new(MixedMemory::new(&PARTS.map(|kind| (kind, HUGE))).expect("memory"))
}

/// A region that was written, lost some pages, and got some of those back.
fn lived_in(options: RegisterOptions, iommu: bool) -> (Bed, odp::space::UserRange) {
    let (space, memory) = (space(), mixed());
    let range = memory.user_range(Arc::clone(&space) as _);
    let config = MachineConfig { iommu, ..MachineConfig::default() };
    let bed = Bed::new(&space, &range, options, &config);
    assert_eq!(bed.write(0, range.range().len() as u32), Status::Success);
    for part in memory.parts() {
        let first = part.offset / PAGE_SIZE;
        memory.discard(first + 7, 1).expect("our own memory");
        memory.discard(first + 100, 30).expect("our own memory");
        assert_eq!(bed.write(page_bytes(first + 100), 10 * PAGE_SIZE as u32), Status::Success);
    }
    assert!(crate::checks::until(|| bed.space.notifiers_idle()), "invalidations end");
    (bed, range)
}

trait Idle {
    fn notifiers_idle(&self) -> bool;
}

impl Idle for odp::space::process::ProcessSpace {
    fn notifiers_idle(&self) -> bool {
        odp::space::AddressSpace::notifiers(self).stats().running == 0
    }
}

#[test]
fn invariant_01_what_the_hca_can_see_is_linked_and_synced() {
    if !hears_of_drops("invariant_01_what_the_hca_can_see_is_linked_and_synced") {
        return;
    }
    for options in [RegisterOptions::on_demand(), RegisterOptions::pinned()] {
        for iommu in [true, false] {
            let (bed, range) = lived_in(options, iommu);
            bed.view(&range).check().expect("at rest");
            crate::checks::protocol_kept(&bed.machine, &bed.space).expect("on the way");
        }
    }
}

#[test]
fn invariant_01_can_fail() {
    // An entry published before its link.
    let hand = Hand::new(1);
    let mapping = hand.mapping();
    let list = PageList::new(1).expect("memory");
    list.store(0, Entry::present(mapping.dma_address(0), Path::Iova, Backing::Shared, true));
    let view = |present, linked| View {
        linked_at: Some((Arc::clone(&hand.domain), mapping.iova())),
        entries: vec![list.load(0).expect("in the list")],
        present,
        linked,
        memory: crate::checks::pages_of(&*hand.space, hand.memory.range()),
    };
    view(1, 1).links().expect_err("visible, but not linked");
    // Linked, not synced, and the IOMMU remembers that nothing was there.
    let device = hand.port.device();
    hand.domain.translate(device, mapping.iova(), DmaAccess::Read).expect_err("nothing is linked");
    mapping.link(0, hand.memory.physical_base(), PAGE_SIZE, LeafSize::Page).expect("free");
    hand.domain.translate(device, mapping.iova(), DmaAccess::Read).expect_err("not synced");
    let faults = hand.domain.faults().recent();
    assert!(faults.last().expect("it was logged").unsynced, "the log says why: {faults:?}");
    mapping.sync(0, PAGE_SIZE).expect("linked");
    hand.domain.translate(device, mapping.iova(), DmaAccess::Read).expect("synced");
    view(1, 1).check().expect("now it is right");
    mapping.unlink(0, PAGE_SIZE).expect("linked");
}

#[test]
fn invariant_03_nothing_is_linked_over_a_live_link() {
    let (bed, _) = lived_in(RegisterOptions::on_demand(), true);
    let range = page_of(bed.mirror.range(), 3);
    // Pages that are there already, asked for again.
    for want in [Want::Snapshot, Want::Fault(Access::Write)] {
        bed.far.region.advise(page_bytes(3), range.len(), want).expect("there");
        bed.near.region.advise(0, bed.near.region.len(), want).expect("there");
    }
    let domain = bed.machine.near.dma().domain().expect("behind an IOMMU");
    assert_eq!(domain.stats().violations, 0, "the IOMMU counts links over live ones");
}

#[test]
fn invariant_03_can_fail() {
    let hand = Hand::new(2);
    let mapping = hand.mapping();
    mapping.link(0, hand.memory.physical_base(), PAGE_SIZE, LeafSize::Page).expect("free");
    let over = mapping.link(0, hand.memory.physical_base(), 2 * PAGE_SIZE, LeafSize::Page);
    assert!(matches!(over, Err(LinkError::Map(MapError::AlreadyMapped { .. }))), "{over:?}");
    assert_eq!(hand.domain.stats().violations, 1, "seen, refused, and counted");
    assert_eq!(mapping.linked(), PAGE_SIZE);
    mapping.unlink(0, PAGE_SIZE).expect("linked");
}

#[test]
fn invariant_04_units_are_unlinked_as_they_were_linked() {
    if !hears_of_drops("invariant_04_units_are_unlinked_as_they_were_linked") {
        return;
    }
    let domain_of = |bed: &Bed| Arc::clone(bed.machine.near.dma().domain().expect("behind an IOMMU"));
    let (bed, _) = lived_in(RegisterOptions::on_demand(), true);
    let stats = domain_of(&bed).stats();
    assert_eq!(stats.violations, 0);
    drop(bed);
    // The memory and the IOVA lie alike, so 2 MiB are one leaf. Pinned it goes whole when one page of it goes; on demand each
    // page is a unit, and the leaf is split.
    let resident = || {
        let memory = Arc::new(MixedMemory::new(&[(Kind::Anonymous, 2 * HUGE)]).expect("memory"));
        let space = space();
        let range = memory.user_range(Arc::clone(&space) as _);
        let bed = Bed::new(&space, &range, RegisterOptions::pinned(), &MachineConfig::default());
        assert_eq!(domain_of(&bed).stats().leaves_mapped, [0, 2, 0]);
        (space, memory, range, bed)
    };
    let (space, memory, range, _pinned) = resident();
    let bed = Bed::new(&space, &range, RegisterOptions::on_demand(), &MachineConfig::default());
    assert_eq!(domain_of(&bed).stats().leaves_mapped, [0, 2, 0]);
    memory.discard(517, 1).expect("our own memory");
    assert!(crate::checks::until(|| bed.near.region.report().linked == 1023), "the page goes alone");
    let stats = domain_of(&bed).stats();
    assert_eq!((stats.leaves_unmapped, stats.violations), ([1, 1, 0], 0));
    bed.view(&range).check().expect("and the others stay");
    bed.near.region.advise(517 * PAGE_SIZE, PAGE_SIZE, Want::Fault(Access::Write)).expect("ours");
    assert_eq!(domain_of(&bed).stats().leaves_mapped, [513, 2, 0]);
    // Frames of its own: one that was dropped does not lie with the others any more.
    let (_space, memory, range, bed) = resident();
    memory.discard(5, 1).expect("our own memory");
    assert!(crate::checks::until(|| bed.near.region.report().linked == 512), "the unit goes whole");
    let stats = domain_of(&bed).stats();
    assert_eq!((stats.leaves_unmapped, stats.violations), ([0, 1, 0], 0));
    bed.view(&range).check().expect("and the other one stays");
}

#[test]
fn invariant_04_can_fail() {
    let hand = Hand::new(512);
    let mapping = hand.mapping();
    mapping.link(0, hand.memory.physical_base(), HUGE, LeafSize::Huge).expect("free");
    let part = mapping.unlink(5 * PAGE_SIZE, PAGE_SIZE);
    assert!(matches!(part, Err(UnlinkError::Unmap(_))), "{part:?}");
    assert_eq!(hand.domain.stats().violations, 1, "seen, refused, and counted");
    mapping.unlink(0, HUGE).expect("whole");
}

#[test]
fn invariant_05_iova_is_free_only_where_nothing_is_linked() {
    for options in [RegisterOptions::on_demand(), RegisterOptions::pinned()] {
        let (bed, _) = lived_in(options, true);
        let near = Arc::clone(&bed.machine.near);
        let domain = Arc::clone(near.dma().domain().expect("behind an IOMMU"));
        bed.near.region.deregister();
        assert_eq!((near.dma().iova_stats().live_bytes, domain.stats().mapped_bytes), (0, 0));
        assert_eq!(domain.stats().violations, 0);
    }
}

#[test]
fn invariant_05_can_fail() {
    let hand = Hand::new(1);
    let mapping = hand.mapping();
    mapping.link(0, hand.memory.physical_base(), PAGE_SIZE, LeafSize::Page).expect("free");
    let refused = mapping.free().expect_err("something is linked");
    assert_eq!(refused.linked, PAGE_SIZE);
    drop(mapping);
    assert_eq!(
        hand.device.iova_stats().live_ranges,
        1,
        "lost, which the count shows, rather than given away"
    );
}

/// A region whose first half is in a BAR below the same switch.
fn half_peer() -> (Bed, odp::space::UserRange, Arc<Overlay>) {
    let space = space();
    let storage = RamStorage::new(HUGE).expect("memory");
    let machine =
        Machine::new(odp::space::AddressSpace::memory(&*space), Some(storage), &MachineConfig::default());
    let machine = machine.expect("a machine");
    let memory = Arc::new(MixedMemory::new(&[(Kind::Anonymous, HUGE)]).expect("memory"));
    let overlay = Overlay::new(&space);
    let half = hw_model::addr::VirtRange::new(memory.range().start(), HUGE / 2).expect("in it");
    overlay.say(half, Instead::Peer(Arc::clone(machine.bar.as_ref().expect("asked for"))));
    let range = memory.user_range(Arc::clone(&overlay) as _);
    (Bed::on(machine, &space, &range, RegisterOptions::on_demand(), HUGE), range, overlay)
}

#[test]
fn invariant_07_a_bus_address_page_leaves_its_slot_a_hole() {
    let (bed, range, _overlay) = half_peer();
    let pattern: Vec<u8> = (0..HUGE).map(|i| (i % 253) as u8).collect();
    bed.mirror.write_at(0, &pattern).expect("our own memory");
    assert_eq!(bed.write(0, HUGE as u32), Status::Success);
    let view = bed.view(&range);
    view.check().expect("slots of bus-address pages are holes");
    let paths = |path| view.entries.iter().filter(|entry| entry.path() == path).count();
    assert_eq!((paths(Path::BusAddress), paths(Path::Iova)), (256, 256), "one region, two paths");
    let bar = bed.machine.bar.as_ref().expect("asked for");
    let mut there = vec![0; (HUGE / 2) as usize];
    bar.storage().read(0, &mut there).expect("a BAR of memory");
    assert!(there[..] == pattern[..there.len()], "the bytes are in the BAR");
    assert!(bar.bursts_by_bus_address() > 0 && bar.bursts_through_host_bridge() == 0);
}

#[test]
fn invariant_07_can_fail() {
    let (bed, range, _overlay) = half_peer();
    assert_eq!(bed.write(0, HUGE as u32), Status::Success);
    let (domain, base) = bed.view(&range).linked_at.expect("behind an IOMMU");
    let bar = bed.machine.bar.as_ref().expect("asked for");
    domain.map(base, bar.base(), PAGE_SIZE, Prot::READ | Prot::WRITE).expect("a hole, rightly");
    bed.view(&range).links().expect_err("the slot of a bus-address page is taken");
    let gather = domain.unmap(base, PAGE_SIZE).expect("just mapped");
    domain.flush(gather);
}

#[test]
fn invariant_09_the_count_of_mapped_pages_is_that_of_present_entries() {
    let (bed, range) = lived_in(RegisterOptions::on_demand(), true);
    bed.view(&range).counts().expect("after pages went and some came back");
    // Again, though present: counted once.
    let want = odp::fault::Want::Fault(odp::space::Access::Write);
    bed.near.region.advise(0, bed.near.region.len(), want).expect("all of it can be had");
    let view = bed.view(&range);
    view.counts().expect("with all pages there");
    assert_eq!(view.present, view.entries.len() as u64);
}

#[test]
fn invariant_09_can_fail() {
    let (bed, range) = lived_in(RegisterOptions::on_demand(), true);
    // The mistake of counting a page again when it is mapped already.
    let mut view = bed.view(&range);
    view.present += 1;
    view.counts().expect_err("one page more than there are");
    let mut view = bed.view(&range);
    view.linked -= 1;
    view.counts().expect_err("one link less than there are");
}

#[test]
fn invariant_10_page_indices_are_in_one_unit_for_list_iommu_and_memory() {
    // Linked in 2 MiB leaves, out of 2 MiB pages where the host gives them, and beginning inside a page.
    let (space, memory) =
        (space(), Arc::new(MixedMemory::new(&[(Kind::TransparentHuge, 2 * HUGE)]).expect("memory")));
    let whole = memory.user_range(Arc::clone(&space) as _);
    let part = whole.part(PAGE_SIZE + 100, 2 * HUGE - 2 * PAGE_SIZE).expect("in it");
    for range in [whole, part] {
        let bed = Bed::new(&space, &range, RegisterOptions::pinned(), &MachineConfig::default());
        let view = bed.view(&range);
        assert_eq!(view.entries.len() as u64, range.range().page_count(), "one entry a 4 KiB page");
        assert_eq!(view.present, range.range().page_count());
        view.check().expect("entry, slot and page of each index belong together");
        // One byte at each end and in the middle lands where the address says.
        let len = range.range().len();
        for offset in [0, len / 2, len - 1] {
            bed.mirror.write_at(offset, &[0xa5]).expect("our own memory");
            assert_eq!(bed.write(offset, 1), Status::Success);
            bed.mirror.write_at(offset, &[0]).expect("our own memory");
            assert_eq!(bed.near_does(hw_model::hca::OperationCode::Write, offset, 1), Status::Success);
            assert_eq!(bed.far_bytes(offset, 1), [0xa5]);
        }
    }
}

#[test]
fn invariant_10_can_fail() {
    let (bed, range) = lived_in(RegisterOptions::on_demand(), true);
    let mut view = bed.view(&range);
    // What a consumer that counts in units of two pages would store.
    let far: Vec<Entry> = (0..view.entries.len()).map(|index| view.entries[index & !1]).collect();
    view.entries = far;
    view.links().expect_err("entries at another page's slot");
}
