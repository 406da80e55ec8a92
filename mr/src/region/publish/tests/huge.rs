//! Entries of 2 MiB: of hugetlb memory, simulated, and of a pinned region.
//!
//! Unsafe island. Invariant: the addresses of simulated memory are numbers that nothing dereferences.
#![allow(unsafe_code)]

use super::*;
use crate::region::MapRegionError;
use hw_model::addr::VirtRange;
use hw_model::hca::HUGE_PAGES;
use odp::fault::{FaultFailure, Want};
use odp::space::PinKind;
use odp::space::sim::{FaultMode, MapRequest, SimConfig, SimHost, SimSpace, Source, SpaceChange};
use odp::space::{FaultError, UserRange};

const HUGE: u64 = HUGE_PAGES * PAGE_SIZE;
const ON_DEMAND: How = How {
    mode: Mode::OnDemand,
    pin: PinKind::Populated,
    snapshot: Snapshot::Resident,
    writable: true,
    hugetlb: true,
};

/// Four huge pages of simulated hugetlb memory, and a device that an IOMMU translates for, or none.
struct Simulated {
    host: Arc<SimHost>,
    space: Arc<SimSpace>,
    range: VirtRange,
    domain: Option<Arc<Domain>>,
    device: Arc<DmaDevice>,
}

fn simulated(iommu: bool) -> Simulated {
    let config = SimConfig { ram_pages: 16 * 512, seed: 5, faults: FaultMode::Wait, nodes: 1 };
    let host = SimHost::new(config).expect("a host");
    let space = host.new_space();
    let source = Source::Shared { object: host.new_hugetlb(4), first: 0 };
    let range = space.map(MapRequest::anonymous(4 * HUGE_PAGES).of(source)).expect("room");
    let bus = Bus::new(space.memory());
    let domain = iommu.then(|| Domain::new(DomainConfig::default()).expect("the default is possible"));
    let spec = DeviceSpec::new("device");
    let spec = if let Some(domain) = &domain { spec.domain(domain) } else { spec };
    let device = DmaDevice::new(bus.attach(spec).expect("room on the bus"), DmaConfig::default());
    Simulated { host, space, range, domain, device }
}

impl Simulated {
    fn map(&self, range: VirtRange, how: How) -> Result<Mapped, MapRegionError> {
        // SAFETY: there is no memory at these addresses to which a reference could exist.
        let memory = unsafe { UserRange::from_raw(Arc::clone(&self.space) as _, range) };
        Mapped::new(&self.device, &memory, how)
    }

    fn page(&self, page: u64) -> VirtRange {
        VirtRange::new(self.range.start().offset(page_bytes(page)), PAGE_SIZE).expect("in the range")
    }

    fn leaves(&self) -> (u64, u64) {
        self.domain.as_ref().map_or((0, 0), |domain| {
            let stats = domain.stats();
            (stats.leaves_mapped.iter().sum(), stats.leaves_unmapped.iter().sum())
        })
    }
}

fn fault(mapped: &Mapped, range: VirtRange) -> Result<u64, FaultFailure<PublishError>> {
    mapped.core.bring(&mapped.interval.sequence(), range, Want::Fault(Access::Write))
}

#[test]
fn a_huge_page_comes_goes_and_comes_again_with_one_entry_and_one_leaf() {
    for iommu in [true, false] {
        let sim = simulated(iommu);
        let mapped = sim.map(sim.range, ON_DEMAND).expect("hugetlb memory");
        let core = &mapped.core;
        let leaves = u64::from(iommu);
        assert_eq!((core.report().present, core.report().list_bytes), (0, 4 * 8), "a word each huge page");
        // A fault on one page brings its huge page.
        assert_eq!(fault(&mapped, core.whole(sim.page(700))), Ok(HUGE_PAGES));
        let report = core.report();
        assert_eq!((report.present, report.huge, report.counters.entries_published), (HUGE_PAGES, 1, 1));
        assert_eq!((sim.leaves(), report.counters.links), ((leaves, 0), leaves));
        assert!(core.list.load(511).is_some_and(|entry| !entry.is_valid()));
        assert!((512..1024).all(|index| core.list.load(index).is_some_and(|entry| entry.is_writable())));
        // Migration takes all of it, whatever part it was asked for.
        sim.space.change(SpaceChange::Migrate(sim.page(900))).expect("a free huge page");
        assert_eq!((core.report().present, core.report().linked, sim.leaves()), (0, 0, (leaves, leaves)));
        assert_eq!(fault(&mapped, core.whole(sim.page(512))), Ok(HUGE_PAGES));
        let counters = core.report().counters;
        assert_eq!((counters.entries_published, counters.entries_relinked), (2, 1));
        assert_eq!(sim.leaves(), (2 * leaves, leaves), "one leaf each time");
        Teardown::begin(mapped).wait();
        assert_eq!((sim.leaves(), sim.device.iova_stats().live_ranges), ((2 * leaves, 2 * leaves), 0));
        sim.host.check().expect("the host agrees with itself");
    }
}

#[test]
fn a_part_of_a_huge_page_that_is_told_of_takes_all_of_it() {
    for iommu in [true, false] {
        let sim = simulated(iommu);
        let mapped = sim.map(sim.range, ON_DEMAND).expect("hugetlb memory");
        assert_eq!(fault(&mapped, mapped.core.pages), Ok(4 * HUGE_PAGES));
        sim.space.notifiers().invalidate(sim.page(HUGE_PAGES + 3), || ());
        let report = mapped.core.report();
        assert_eq!((report.present, report.huge), (3 * HUGE_PAGES, 3));
        assert_eq!(report.linked, if iommu { 3 * HUGE_PAGES } else { 0 });
        assert_eq!(report.counters.pages_invalidated, HUGE_PAGES);
        Teardown::begin(mapped).wait();
    }
}

#[test]
fn memory_that_is_not_or_no_longer_hugetlb_is_refused_by_name() {
    for iommu in [true, false] {
        let sim = simulated(iommu);
        let plain = sim.space.map(MapRequest::anonymous(HUGE_PAGES).huge()).expect("room");
        let refused = sim.map(plain, ON_DEMAND).err();
        assert_eq!(refused, Some(MapRegionError::NotHuge { range: plain }));
        assert_eq!(sim.space.notifiers().stats().intervals, 0, "nothing is left of it");

        let mapped = sim.map(sim.range, ON_DEMAND).expect("hugetlb memory");
        assert_eq!(fault(&mapped, mapped.core.pages), Ok(4 * HUGE_PAGES));
        let first = VirtRange::new(sim.range.start(), HUGE).expect("in the range");
        sim.space.unmap(first).expect("mapped");
        let request = MapRequest::anonymous(HUGE_PAGES).fixed(first.start());
        for request in [request, request.huge()] {
            sim.space.map(request).expect("a hole");
            let outcome = fault(&mapped, first);
            let at = first.start();
            assert_eq!(outcome, Err(FaultFailure::Publish(PublishError::NotHuge { at })));
            let report = mapped.core.report();
            assert_eq!(report.present, 3 * HUGE_PAGES, "what is left is as it was");
            assert_eq!(report.linked, if iommu { 3 * HUGE_PAGES } else { 0 });
            sim.space.unmap(first).expect("mapped");
        }
        assert_eq!(
            fault(&mapped, first),
            Err(FaultFailure::Space(FaultError::NoMapping { at: first.start() }))
        );
        Teardown::begin(mapped).wait();
        assert_eq!(sim.device.iova_stats().live_ranges, 0);
    }
}

#[test]
fn a_region_that_ends_inside_a_huge_page_holds_that_page() {
    let sim = simulated(true);
    let inside = VirtRange::new(sim.range.start().offset(5000), HUGE).expect("in the range");
    let mapped = sim.map(inside, ON_DEMAND).expect("hugetlb memory");
    assert_eq!((mapped.core.pages.start(), mapped.core.pages.len()), (sim.range.start(), 2 * HUGE));
    assert_eq!(mapped.core.offset_of(inside.start()), 5000);
    Teardown::begin(mapped).wait();
}

fn is_huge(core: &Core, index: u64) -> bool {
    core.list.huge_slot(index).is_some_and(|slot| core.list.is_whole(slot))
}

#[test]
fn a_pinned_region_has_an_entry_for_512_pages_that_lie_together() {
    let stand = stand();
    let mapped = stand.map(Mode::Pinned);
    let report = mapped.core.report();
    assert_eq!((report.present, report.huge, report.counters.entries_published), (PAGES, 2, 2));
    let on_demand = stand.map(Mode::OnDemand);
    assert_eq!(on_demand.core.report().huge, 0, "one page of it can come and go");
    Teardown::begin(on_demand).wait();
    Teardown::begin(mapped).wait();
    assert_eq!(stand.mapped_pages(), 0);
}

/// If this fails, a page of a pinned huge page that went and came back is missing, or its neighbours are.
#[test]
fn pages_of_a_pinned_huge_page_come_back_one_by_one_and_then_as_one_again() {
    let stand = stand();
    let mapped = stand.map(Mode::Pinned);
    let core = &mapped.core;
    let range = VirtRange::new(core.page_address(600), PAGE_SIZE).expect("in the region");
    stand.space.notifiers().invalidate(range, || ());
    assert_eq!(
        (core.report().present, core.report().linked),
        (HUGE_PAGES, HUGE_PAGES),
        "its unit went whole"
    );
    let page = PageRun {
        start: range.start(),
        pages: 1,
        phys: stand.runs()[0].phys.offset(page_bytes(600)),
        ..stand.runs()[0]
    };
    assert_eq!(core.publish(&[page], || true), Ok(Some(1)));
    assert!(core.list.load(600).is_some_and(|entry| entry.is_writable()) && !is_huge(core, 600));
    assert_eq!(core.report().counters.entries_relinked, 1, "it was there before, as part of a huge page");
    assert_eq!(core.publish(&stand.runs(), || true), Ok(Some(HUGE_PAGES - 1)), "the others");
    assert_eq!((core.report().present, core.report().huge, stand.mapped_pages()), (PAGES, 1, PAGES));
    stand.invalidate(core, true);
    assert_eq!(core.publish(&stand.runs(), || true), Ok(Some(PAGES)));
    assert_eq!(core.report().huge, 2);
    Teardown::begin(mapped).wait();
    assert_eq!((stand.mapped_pages(), stand.device.iova_stats().live_ranges), (0, 0));
    assert_eq!(stand.domain.stats().violations, 0);
}

/// If this fails, a huge page hidden by an invalidation that gave up is linked twice, or its pages are lost.
#[test]
fn a_part_of_a_hidden_huge_page_that_comes_back_uses_its_link_again() {
    let stand = stand();
    let mapped = stand.map(Mode::Pinned);
    let core = &mapped.core;
    let mut engine = stand.space.memory().epoch().register().expect("a slot");
    engine.begin().expect("open");
    stand.space.notifiers().try_begin(core.pages).expect_err("a burst is under way");
    let links = core.report().counters.links;
    let part = PageRun { pages: 7, ..stand.runs()[0] };
    assert_eq!(core.publish(&[part], || true), Ok(Some(7)));
    assert_eq!(
        (core.report().present, core.report().linked, core.report().counters.links),
        (7, PAGES, links)
    );
    assert_eq!(core.publish(&stand.runs(), || true), Ok(Some(PAGES - 7)));
    assert_eq!((core.report().huge, core.report().counters.links), (1, links));
    engine.end();
    Teardown::begin(mapped).wait();
    assert_eq!(stand.mapped_pages(), 0);
}

#[test]
fn a_part_of_a_huge_page_that_changes_kind_leaves_the_others_as_they_are() {
    let stand = stand();
    let mapped = stand.map(Mode::Pinned);
    let core = &mapped.core;
    let before: Vec<_> = (0..PAGES).map(|index| core.list.load(index).expect("in the list")).collect();
    let same = PageRun { pages: 3, ..stand.runs()[0] };
    assert_eq!(core.publish(&[same], || true), Ok(Some(0)));
    assert!(is_huge(core, 0), "nothing about it has changed");
    let other = PageRun { backing: Backing::File, ..same };
    assert_eq!(core.publish(&[other], || true), Ok(Some(3)));
    for (index, before) in before.iter().enumerate() {
        let now = core.list.load(index as u64).expect("in the list");
        let expected = if index < 3 { before.relabelled(Backing::File) } else { *before };
        assert_eq!(now, expected, "page {index}");
    }
    assert_eq!((core.report().present, core.report().linked, core.report().huge), (PAGES, PAGES, 1));
    Teardown::begin(mapped).wait();
    assert_eq!(stand.mapped_pages(), 0);
}

/// If this fails, a stream through huge pages needs a translation a page, or a page that goes on its own takes others along.
#[test]
fn on_demand_a_huge_page_of_the_processor_is_one_entry_and_one_leaf_until_it_is_split() {
    for iommu in [true, false] {
        let sim = simulated(iommu);
        let range = sim.space.map(MapRequest::anonymous(2 * HUGE_PAGES).huge()).expect("room");
        let page =
            |page| VirtRange::new(range.start().offset(page_bytes(page)), PAGE_SIZE).expect("in the range");
        let leaves = |mapped: u64, unmapped: u64| if iommu { (mapped, unmapped) } else { (0, 0) };
        let mapped = sim.map(range, How { hugetlb: false, ..ON_DEMAND }).expect("memory");
        let core = &mapped.core;
        assert_eq!(fault(&mapped, range), Ok(2 * HUGE_PAGES));
        let report = core.report();
        assert_eq!((report.present, report.huge, report.counters.entries_published), (2 * HUGE_PAGES, 2, 2));
        assert_eq!(sim.leaves(), leaves(2, 0));
        // The kernel splits the huge page and tells of all of it.
        sim.space.change(SpaceChange::Discard(page(5))).expect("mapped");
        assert_eq!((core.report().present, core.report().huge), (HUGE_PAGES, 1));
        assert_eq!(sim.leaves(), leaves(2, 1), "in one piece, as it was linked");
        assert_eq!(fault(&mapped, range), Ok(HUGE_PAGES));
        assert_eq!((core.report().present, core.report().huge), (2 * HUGE_PAGES, 1));
        assert_eq!(sim.leaves(), leaves(2 + HUGE_PAGES, 1), "from here on each page is its own");
        sim.space.change(SpaceChange::Discard(page(6))).expect("mapped");
        assert_eq!((core.report().present, sim.leaves()), (2 * HUGE_PAGES - 1, leaves(2 + HUGE_PAGES, 2)));
        assert_eq!(fault(&mapped, page(6)), Ok(1));
        Teardown::begin(mapped).wait();
        let (linked, unlinked) = sim.leaves();
        assert_eq!((linked, sim.device.iova_stats().live_ranges), (unlinked, 0));
        sim.host.check().expect("the host agrees with itself");
    }
}

#[test]
fn a_huge_page_of_which_a_page_is_there_by_itself_comes_page_by_page() {
    let sim = simulated(true);
    let range = sim.space.map(MapRequest::anonymous(2 * HUGE_PAGES).huge()).expect("room");
    let mapped = sim.map(range, How { hugetlb: false, ..ON_DEMAND }).expect("memory");
    let one = VirtRange::new(range.start().offset(page_bytes(700)), PAGE_SIZE).expect("in the range");
    assert_eq!((fault(&mapped, one), sim.leaves()), (Ok(1), (1, 0)));
    assert_eq!(fault(&mapped, range), Ok(2 * HUGE_PAGES - 1));
    assert_eq!((mapped.core.report().huge, sim.leaves()), (1, (1 + 1 + 511, 0)));
    sim.space.change(SpaceChange::Discard(one)).expect("mapped");
    assert_eq!(mapped.core.report().present, HUGE_PAGES, "the huge page that it was part of is split");
    Teardown::begin(mapped).wait();
    let (linked, unlinked) = sim.leaves();
    assert_eq!((linked, sim.device.iova_stats().live_ranges), (unlinked, 0));
}
