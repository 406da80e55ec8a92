//! Regions in entries of 2 MiB, over the memory of this process.

use crate::bed::{Bed, hears_of_drops, space};
use crate::checks::{protocol_kept, until};
use crate::fail_nth::{Made, Stand, sweep};
use crate::remapped::Remapped;
use anypage::machine::MachineConfig;
use anypage::mixed::{HUGE, Kind, MixedMemory};
use hw_model::addr::{PAGE_SIZE, page_bytes};
use hw_model::hca::{HUGE_PAGES, Status};
use hw_model::iommu::LeafSize;
use hw_model::sync::Arc;
use mr::{RegisterOptions, Rereg};
use odp::fault::Want;
use odp::space::{Access, AddressSpace, UserRange};

fn hugetlb() -> RegisterOptions {
    RegisterOptions::on_demand().with_hugetlb()
}

/// Memory of two whole huge pages' room, and that room as a range, which may become hugetlb.
struct Room {
    memory: Arc<Remapped>,
    first: u64,
    range: UserRange,
}

impl Room {
    fn new(space: Arc<dyn AddressSpace>) -> Self {
        let memory = Remapped::new(3 * HUGE_PAGES);
        let start = memory.range().start().page_number();
        let first = start.next_multiple_of(HUGE_PAGES) - start;
        let range = memory.user_range(space).part(page_bytes(first), 2 * HUGE).expect("in it");
        Self { memory, first, range }
    }

    /// Puts hugetlb pages there; if there are none to spare, says that `test` is skipped.
    fn fill(&self, test: &str) -> bool {
        let filled = self.memory.replace_hugetlb(self.first, 2 * HUGE_PAGES);
        if !filled {
            println!("SKIPPED {test}: the host has no hugetlb page to spare");
        }
        filled
    }
}

fn configs() -> [MachineConfig; 2] {
    [true, false].map(|iommu| MachineConfig { iommu, ..MachineConfig::default() })
}

fn large_leaves(bed: &Bed) -> (u64, u64) {
    bed.machine.near.dma().domain().map_or((0, 0), |domain| {
        let stats = domain.stats();
        assert_eq!(stats.leaves_mapped[LeafSize::Page as usize], 0, "nothing was linked page by page");
        (stats.leaves_mapped[LeafSize::Large as usize], stats.leaves_unmapped[LeafSize::Large as usize])
    })
}

#[test]
fn a_region_of_hugetlb_memory_faults_and_relinks_by_the_huge_page() {
    let test = "a_region_of_hugetlb_memory_faults_and_relinks_by_the_huge_page";
    if !hears_of_drops(test) {
        return;
    }
    for config in configs() {
        let space = space();
        let room = Room::new(Arc::clone(&space) as _);
        if !room.fill(test) {
            return;
        }
        let bed = Bed::new(&space, &room.range, hugetlb(), &config);
        let leaves = u64::from(config.iommu);
        let report = bed.near.region.report();
        assert_eq!((report.present, report.list_bytes), (0, 16), "nobody has touched it");
        bed.mirror.write_at(HUGE + 12_345, b"huge").expect("our own memory");
        assert_eq!(bed.write(HUGE + 12_345, 4), Status::Success);
        let report = bed.near.region.report();
        assert_eq!((report.present, report.huge), (HUGE_PAGES, 1));
        assert_eq!((report.counters.page_faults, report.counters.entries_published), (1, 1));
        assert_eq!(large_leaves(&bed), (leaves, 0));
        bed.view(&room.range).check().expect("at rest");

        assert_eq!(bed.write(0, 2 * HUGE as u32), Status::Success);
        assert_eq!(bed.near.region.report().counters.entries_published, 2);
        if !room.memory.replace_hugetlb(room.first + HUGE_PAGES, HUGE_PAGES) {
            println!("SKIPPED {test}: the host has no hugetlb page to spare");
            return;
        }
        assert!(until(|| bed.near.region.report().linked <= HUGE_PAGES), "an unmap is told of");
        assert_eq!(bed.write(HUGE + 12_345, 4), Status::Success);
        let report = bed.near.region.report();
        assert_eq!(
            (report.huge, report.counters.entries_published, report.counters.entries_relinked),
            (2, 3, 1)
        );
        assert_eq!(large_leaves(&bed), (3 * leaves, leaves), "one leaf went and one came");
        bed.mirror.write_at(HUGE + 12_345, &[0; 4]).expect("our own memory");
        assert_eq!(bed.read(HUGE + 12_345, 4), Status::Success);
        assert_eq!(bed.far_bytes(HUGE + 12_345, 4), b"huge");
        bed.view(&room.range).check().expect("at rest");
        protocol_kept(&bed.machine, &bed.space).expect("on the way");
    }
}

#[test]
fn memory_that_stops_being_hugetlb_fails_a_region_of_it_and_serves_any_other() {
    let test = "memory_that_stops_being_hugetlb_fails_a_region_of_it_and_serves_any_other";
    if !hears_of_drops(test) {
        return;
    }
    for config in configs() {
        let space = space();
        let room = Room::new(Arc::clone(&space) as _);
        if !room.fill(test) {
            return;
        }
        let mut bed = Bed::new(&space, &room.range, hugetlb(), &config);
        assert_eq!(bed.write(0, 2 * HUGE as u32), Status::Success);
        room.memory.replace(room.first, HUGE_PAGES, true);
        assert!(until(|| bed.near.region.report().linked <= HUGE_PAGES), "an unmap is told of");
        assert_eq!(bed.write(5000, 100), Status::RemoteAccessError, "a page of it is no whole huge page");
        bed.reconnect();
        assert_eq!(bed.write(HUGE, HUGE as u32), Status::Success, "the other huge page is as it was");
        let any =
            Arc::clone(&bed.near.pd).register(&room.range, RegisterOptions::on_demand()).expect("any pages");
        any.advise(0, any.len(), Want::Fault(Access::Write)).expect("mapped");
        assert_eq!(
            (any.report().present, any.report().huge),
            (2 * HUGE_PAGES, 1),
            "one is still a huge page"
        );
        let refused =
            Arc::clone(&bed.near.pd).register(&room.range, hugetlb()).err().expect("not hugetlb any more");
        assert!(refused.to_string().contains("is not hugetlb memory throughout"), "{refused}");
        protocol_kept(&bed.machine, &bed.space).expect("on the way");
    }
}

/// Regression: pages that had gone one by one gave the hugetlb page that took their place frames that did not lie together.
#[test]
fn hugetlb_memory_where_pages_of_4_kib_came_and_went_is_one_huge_page() {
    let test = "hugetlb_memory_where_pages_of_4_kib_came_and_went_is_one_huge_page";
    if !hears_of_drops(test) {
        return;
    }
    let space = space();
    let room = Room::new(Arc::clone(&space) as _);
    let bed = Bed::new(&space, &room.range, RegisterOptions::on_demand(), &MachineConfig::default());
    for page in [3, 3, 500, 700] {
        assert_eq!(bed.write(0, 2 * HUGE as u32), Status::Success);
        let before = bed.near.region.report().counters.page_invalidations;
        room.memory.replace(room.first + page, 1, true);
        assert!(until(|| bed.near.region.report().counters.page_invalidations > before));
    }
    if !room.fill(test) {
        return;
    }
    let region = Arc::clone(&bed.near.pd).register(&room.range, hugetlb()).expect("hugetlb memory");
    region.advise(0, region.len(), Want::Fault(Access::Write)).expect("mapped");
    assert_eq!((region.report().present, region.report().huge), (2 * HUGE_PAGES, 2));
    assert_eq!(bed.write(0, 2 * HUGE as u32), Status::Success);
    bed.view(&room.range).check().expect("at rest");
    protocol_kept(&bed.machine, &bed.space).expect("on the way");
}

#[test]
fn a_pinned_region_is_listed_by_the_huge_page_and_loses_and_regains_single_pages() {
    let test = "a_pinned_region_is_listed_by_the_huge_page_and_loses_and_regains_single_pages";
    if !hears_of_drops(test) {
        return;
    }
    for config in configs() {
        let space = space();
        let memory = MixedMemory::new(&[(Kind::TransparentHuge, 3 * HUGE), (Kind::Shared, HUGE)]);
        let memory = Arc::new(memory.expect("memory"));
        let all = memory.user_range(Arc::clone(&space) as _);
        // Neither end is one of a huge page.
        let range = all.part(HUGE / 2, 3 * HUGE).expect("in it");
        let bed = Bed::new(&space, &range, RegisterOptions::pinned(), &config);
        let report = bed.near.region.report();
        assert_eq!((report.present, report.huge), (3 * HUGE_PAGES, 2));
        assert_eq!(report.counters.entries_published, 2 + HUGE_PAGES, "the ends by the page");
        let bytes: Vec<u8> = (0..range.range().len()).map(|at| (at % 249) as u8).collect();
        bed.mirror.write_at(0, &bytes).expect("our own memory");
        assert_eq!(bed.write(0, bytes.len() as u32), Status::Success);
        assert_eq!(bed.near.region.report().counters.page_faults, 0, "everything is there");

        let lost = HUGE_PAGES + 77;
        memory.discard(lost, 1).expect("our own memory");
        assert!(until(|| bed.near.region.report().linked < 3 * HUGE_PAGES || !config.iommu));
        assert!(until(|| bed.near.region.report().present < 3 * HUGE_PAGES), "a drop is told of");
        let mut expected = bytes;
        expected[(page_bytes(lost) - HUGE / 2) as usize..][..PAGE_SIZE as usize].fill(0);
        assert_eq!(bed.read(0, expected.len() as u32), Status::Success);
        assert!(bed.far_bytes(0, expected.len()) == expected, "a page went, and no other byte");
        bed.view(&range).check().expect("at rest");
        protocol_kept(&bed.machine, &bed.space).expect("on the way");
    }
}

#[test]
fn whatever_fails_of_a_region_of_hugetlb_memory_leaves_nothing() {
    for iommu in [true, false] {
        let stand = Stand::new(iommu);
        let room = Room::new(Arc::clone(&stand.bed.space) as _);
        if !room.fill("whatever_fails_of_a_region_of_hugetlb_memory_leaves_nothing") {
            return;
        }
        let pd = &stand.bed.near.pd;
        for options in [hugetlb(), RegisterOptions::pinned().with_hugetlb()] {
            let row = sweep(&stand, "register hugetlb, fault, rereg", || {
                let region =
                    Arc::clone(pd).register(&room.range, options).map_err(|error| error.to_string())?;
                let advised = region.advise(0, HUGE, Want::Fault(Access::Write));
                advised.map_err(|error| error.to_string())?;
                let half = room.range.part(HUGE, HUGE).expect("in it");
                let change = Rereg { memory: Some((half, None)), ..Rereg::default() };
                region.rereg(change).map_err(|error| error.to_string())?;
                assert_eq!(region.report().entries, HUGE_PAGES);
                Ok(Box::new(region) as Made)
            });
            let row = row.unwrap_or_else(|leak| panic!("{leak}"));
            assert!(row.injected > row.survived && !row.points.is_empty(), "{row:?}");
        }
    }
}
