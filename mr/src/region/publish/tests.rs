//! Publishing: all or nothing, units whole, and hidden links that a burst may still be using.

use super::*;
use crate::dma::{DmaConfig, DmaDevice};
use crate::region::teardown::Teardown;
use crate::region::{How, Mapped, Snapshot};
use hw_model::addr::PhysAddr;
use hw_model::bus::{Bus, DeviceSpec};
use hw_model::hca::Backing;
use hw_model::iommu::{Domain, DomainConfig};
use hw_model::sync::Arc;
use odp::fault::{FaultFailure, Want};
use odp::space::process::{Options, OwnedMemory, ProcessSpace};
use odp::space::{Access, AddressSpace, PinKind};

mod huge;

const PAGES: u64 = 1024;

struct Stand {
    space: Arc<ProcessSpace>,
    domain: Arc<Domain>,
    device: Arc<DmaDevice>,
    memory: Arc<OwnedMemory>,
}

/// Memory of 4 MiB, every page there, its frames aligned for large leaves.
fn stand() -> Stand {
    let space = ProcessSpace::open(Options::default()).expect("this process can use its own memory");
    let bus = Bus::new(space.memory());
    let domain = Domain::new(DomainConfig::default()).expect("the default is possible");
    let port = bus.attach(DeviceSpec::new("device").domain(&domain)).expect("room on the bus");
    let device = DmaDevice::new(port, DmaConfig::default());
    let memory = Arc::new(OwnedMemory::new(&space, PAGES * PAGE_SIZE).expect("memory"));
    let mut runs = Vec::new();
    space.fault(memory.range(), Access::Write, &mut runs).expect("our own memory");
    Stand { space, domain, device, memory }
}

impl Stand {
    fn map(&self, mode: Mode) -> Mapped {
        self.map_from(mode, Snapshot::Resident)
    }

    fn map_from(&self, mode: Mode, snapshot: Snapshot) -> Mapped {
        let how = How { mode, pin: PinKind::Populated, snapshot, writable: true, hugetlb: false };
        Mapped::new(&self.device, &self.memory.user_range(), how).expect("a region")
    }

    fn runs(&self) -> Vec<PageRun> {
        let mut runs = Vec::new();
        self.space.snapshot(self.memory.range(), &mut runs).expect("mapped");
        runs
    }

    fn mapped_pages(&self) -> u64 {
        self.domain.stats().mapped_bytes / PAGE_SIZE
    }

    /// Hides everything, as an invalidation does; finishes it or not.
    fn invalidate(&self, core: &Core, finish: bool) {
        let mut state = core.state.lock();
        core.hide(&mut state, 0..PAGES);
        if finish {
            core.unlink_hidden(&mut state, 0..PAGES);
        }
    }
}

/// A run list that ends in a page to which no way leads.
fn with_unreachable_end(mut runs: Vec<PageRun>) -> Vec<PageRun> {
    let last = runs.last_mut().expect("pages are there");
    last.pages -= 1;
    let lost = PageRun {
        start: last.start.offset(page_bytes(last.pages)),
        pages: 1,
        phys: PhysAddr(0x7000),
        backing: Backing::DevicePrivate,
        ..*last
    };
    runs.push(lost);
    runs
}

#[test]
fn a_list_whose_last_page_is_refused_leaves_nothing() {
    let stand = stand();
    for mode in [Mode::OnDemand, Mode::Pinned] {
        let mapped = stand.map(mode);
        let core = &mapped.core;
        stand.invalidate(core, true);
        assert_eq!(stand.mapped_pages(), 0);
        let runs = with_unreachable_end(stand.runs());
        let outcome = core.publish(&runs, || true);
        assert!(matches!(outcome, Err(PublishError::Refused { .. })), "{outcome:?}");
        let report = core.report();
        assert_eq!((report.present, report.linked, stand.mapped_pages()), (0, 0, 0), "{mode:?}");
        assert!((0..PAGES).all(|index| !core.list.load(index).expect("in the list").is_valid()));
        assert_eq!(core.publish(&stand.runs(), || true), Ok(Some(PAGES)), "and then it works");
        Teardown::begin(mapped).wait();
    }
    assert_eq!(stand.device.iova_stats().live_ranges, 0);
}

/// Found under shuttle: a fault that had found a region just before it was reregistered failed, and the device's request with
/// it, though the key led to other memory by then.
#[test]
fn a_fault_that_comes_to_a_region_that_is_gone_is_told_that_it_is_closing() {
    let stand = stand();
    let mapped = stand.map(Mode::OnDemand);
    let (core, sequence) = (Arc::clone(&mapped.core), mapped.interval.sequence());
    Teardown::begin(mapped).wait();
    let brought = core.bring(&sequence, core.pages, Want::Fault(Access::Write));
    assert_eq!(brought, Err(FaultFailure::Publish(PublishError::Closing)));
}

#[test]
fn what_was_published_before_survives_a_call_that_fails() {
    let stand = stand();
    let mapped = stand.map(Mode::OnDemand);
    let core = &mapped.core;
    stand.invalidate(core, true);
    let first = PageRun { pages: 7, ..stand.runs()[0] };
    assert_eq!(core.publish(&[first], || true), Ok(Some(7)));
    core.publish(&with_unreachable_end(stand.runs()), || true).expect_err("its last page is refused");
    assert_eq!((core.report().present, stand.mapped_pages()), (7, 7));
    Teardown::begin(mapped).wait();
}

#[test]
fn a_region_that_begins_with_nothing_links_what_is_asked_for_and_a_pinned_one_has_it_all() {
    let stand = stand();
    let mapped = stand.map_from(Mode::OnDemand, Snapshot::Nothing);
    let core = &mapped.core;
    assert_eq!((core.report().present, stand.mapped_pages()), (0, 0), "though all of it is resident");
    let part = hw_model::addr::VirtRange::new(core.page_address(7), 20 * PAGE_SIZE).expect("in it");
    assert_eq!(core.bring(&mapped.interval.sequence(), part, Want::Snapshot), Ok(20));
    assert_eq!((core.report().present, stand.mapped_pages()), (20, 20));
    Teardown::begin(mapped).wait();
    let mapped = stand.map_from(Mode::Pinned, Snapshot::Nothing);
    assert_eq!(mapped.core.report().present, PAGES);
    Teardown::begin(mapped).wait();
    assert_eq!((stand.mapped_pages(), stand.device.iova_stats().live_ranges), (0, 0));
}

/// If this fails, relinking a page of what was resident at registration costs more than the page, or a stream through it
/// needs a translation a page.
#[test]
fn a_page_of_an_on_demand_region_splits_its_leaf_once_and_then_goes_alone() {
    let stand = stand();
    let mapped = stand.map(Mode::OnDemand);
    let core = &mapped.core;
    let leaves = || (stand.domain.stats().leaves_mapped, stand.domain.stats().leaves_unmapped);
    assert_eq!(
        (leaves(), core.report().huge),
        (([0, 2, 0], [0; 3]), 0),
        "4 MiB in two leaves, an entry a page"
    );
    let part = |page, pages| {
        let start = core.page_address(page);
        hw_model::addr::VirtRange::new(start, page_bytes(pages)).expect("in the region")
    };
    stand.space.notifiers().invalidate(part(700, 1), || {
        assert_eq!((core.report().present, core.report().linked), (PAGES - 1, PAGES - 1));
    });
    assert_eq!(leaves(), ([512, 2, 0], [1, 1, 0]), "the leaf became pages, and the page went");
    let relink = |page: u64| {
        let first = stand.runs()[0];
        let phys = first.phys.offset(page_bytes(page));
        let run = PageRun { start: core.page_address(page), phys, pages: 1, ..first };
        assert_eq!(core.publish(&[run], || true), Ok(Some(1)));
    };
    relink(700);
    assert_eq!(leaves(), ([513, 2, 0], [1, 1, 0]));
    stand.space.notifiers().invalidate(part(513, 1), || ());
    relink(513);
    assert_eq!(leaves(), ([514, 2, 0], [2, 1, 0]), "from here on one entry a page");
    let counters = core.report().counters;
    assert_eq!((counters.entries_relinked, counters.pages_invalidated), (2, 2));
    stand.space.notifiers().invalidate(part(500, 24), || ());
    assert_eq!(core.report().present, PAGES - 24);
    assert_eq!(leaves(), ([514 + 512, 2, 0], [2 + 24, 2, 0]), "and the first of them now");
    Teardown::begin(mapped).wait();
    assert_eq!((stand.mapped_pages(), stand.domain.stats().violations), (0, 0));
}

/// Pages that no entry knows of are written as runs, others one by one: if this fails, the two do not write the same.
#[test]
fn a_run_of_news_is_published_as_its_pages_are_one_by_one() {
    let stand = stand();
    let run = stand.runs()[0];
    let read_only = PageRun { pages: 600, writable: false, ..run };
    let written = PageRun {
        start: run.start.offset(page_bytes(600)),
        phys: run.phys.offset(page_bytes(600)),
        pages: PAGES - 600,
        ..run
    };
    let [together, apart] = [(); 2].map(|()| stand.map_from(Mode::OnDemand, Snapshot::Nothing));
    assert_eq!(together.core.publish(&[read_only, written], || true), Ok(Some(PAGES)));
    for run in [read_only, written] {
        for page in (0..run.pages).rev() {
            let (start, phys) = (run.start.offset(page_bytes(page)), run.phys.offset(page_bytes(page)));
            assert_eq!(apart.core.publish(&[PageRun { start, phys, pages: 1, ..run }], || true), Ok(Some(1)));
        }
    }
    let reports = [&together, &apart].map(|mapped| mapped.core.report());
    let said = |mapped: &Mapped, index: u64| {
        let entry = mapped.core.list.load(index).expect("in the list");
        let offset = entry.address().0 - mapped.core.mapping.as_ref().expect("behind an IOMMU").iova().0;
        (offset, entry.flags(), entry.path(), entry.backing())
    };
    for index in 0..PAGES {
        assert_eq!(said(&together, index), said(&apart, index), "page {index}");
    }
    for report in &reports {
        assert_eq!((report.present, report.linked, report.huge), (PAGES, PAGES, 0));
        assert_eq!((report.counters.entries_published, report.counters.entries_relinked), (PAGES, 0));
    }
    assert_eq!(
        stand.domain.stats().leaves_mapped,
        [PAGES + 512, 1, 0],
        "where 512 pages lie together, one leaf"
    );
    for mapped in [together, apart] {
        stand.invalidate(&mapped.core, true);
        assert_eq!(
            mapped.core.publish(&stand.runs(), || true),
            Ok(Some(PAGES)),
            "and again, where it was before"
        );
        assert_eq!(mapped.core.report().counters.entries_relinked, PAGES);
        Teardown::begin(mapped).wait();
    }
    assert_eq!((stand.mapped_pages(), stand.domain.stats().violations), (0, 0));
}

#[test]
fn a_number_that_is_not_confirmed_publishes_nothing() {
    let stand = stand();
    let mapped = stand.map(Mode::OnDemand);
    stand.invalidate(&mapped.core, true);
    assert_eq!(mapped.core.publish(&stand.runs(), || false), Ok(None));
    assert_eq!((mapped.core.report().present, stand.mapped_pages()), (0, 0));
    Teardown::begin(mapped).wait();
}

/// Regression: pages that a non-blocking invalidation hid and gave up on were unlinked by the next fault, under bursts that
/// were still using them.
#[test]
fn a_link_that_an_abandoned_invalidation_left_is_used_again_and_never_taken_down_undrained() {
    let stand = stand();
    let mapped = stand.map(Mode::OnDemand);
    let core = &mapped.core;
    let range = core.pages;
    let mut engine = stand.space.memory().epoch().register().expect("a slot");
    engine.begin().expect("open");
    stand.space.notifiers().try_begin(range).expect_err("a burst is under way");
    let before = (stand.domain.stats().leaves_mapped, stand.domain.stats().leaves_unmapped);
    assert_eq!((core.report().present, core.report().linked), (0, PAGES), "hidden, still linked");

    core.publish(&with_unreachable_end(stand.runs()), || true).expect_err("its last page is refused");
    assert_eq!(stand.mapped_pages(), PAGES, "a call that fails takes down its own links only");
    assert_eq!(core.publish(&stand.runs(), || true), Ok(Some(PAGES)));
    let after = (stand.domain.stats().leaves_mapped, stand.domain.stats().leaves_unmapped);
    assert_eq!(after, before, "nothing was linked or unlinked while the burst ran");
    assert_eq!((core.report().present, core.report().counters.entries_relinked), (PAGES, PAGES));
    engine.end();
    Teardown::begin(mapped).wait();
    assert_eq!(stand.mapped_pages(), 0);
}

#[test]
fn an_upgrade_or_a_new_kind_links_nothing_and_keeps_the_address() {
    let stand = stand();
    let mapped = stand.map(Mode::OnDemand);
    let core = &mapped.core;
    stand.invalidate(core, true);
    let page = PageRun { pages: 1, writable: false, backing: Backing::Zero, ..stand.runs()[0] };
    assert_eq!(core.publish(&[page], || true), Ok(Some(1)));
    let (before, links) = (core.list.load(0).expect("in the list"), core.report().counters.links);
    let written = PageRun { writable: true, backing: Backing::Anonymous, ..page };
    assert_eq!(core.publish(&[written], || true), Ok(Some(1)));
    let after = core.list.load(0).expect("in the list");
    assert!(!before.is_writable() && after.is_writable());
    assert_eq!((after.address(), after.backing()), (before.address(), Backing::Anonymous));
    assert_eq!((core.report().present, core.report().counters.links), (1, links));
    Teardown::begin(mapped).wait();
}

#[test]
fn one_page_of_a_pinned_region_takes_its_whole_unit_and_no_other() {
    let stand = stand();
    let mapped = stand.map(Mode::Pinned);
    let core = &mapped.core;
    assert_eq!(stand.domain.stats().leaves_mapped, [0, 2, 0], "4 MiB in two large leaves");
    let page = PAGES / 2 + 77;
    let range = stand.memory.range();
    let one =
        hw_model::addr::VirtRange::new(range.start().offset(page_bytes(page)), PAGE_SIZE).expect("in it");
    stand.space.notifiers().invalidate(one, || {
        assert_eq!(core.report().present, PAGES / 2, "the whole unit is hidden");
        assert_eq!(core.report().linked, PAGES / 2, "and unlinked");
    });
    assert_eq!(stand.domain.stats().leaves_unmapped, [0, 1, 0], "in one piece, as it was linked");
    assert!((0..PAGES / 2).all(|index| core.list.load(index).expect("in the list").is_valid()));
    // One page of it comes back alone, and goes alone.
    let back = stand.runs()[0];
    let back = PageRun { start: one.start(), pages: 1, phys: back.phys.offset(page_bytes(page)), ..back };
    assert_eq!(core.publish(&[back], || true), Ok(Some(1)));
    stand.space.notifiers().invalidate(one, || ());
    assert_eq!((core.report().present, stand.domain.stats().violations), (PAGES / 2, 0));
    Teardown::begin(mapped).wait();
    assert_eq!(stand.mapped_pages(), 0);
}

#[test]
fn teardown_ends_whatever_an_invalidation_under_way_has_done() {
    let stand = stand();
    for stage in 0..3 {
        let mapped = stand.map(Mode::OnDemand);
        let range = mapped.core.pages;
        let mut invalidation = stand.space.notifiers().begin_invalidation(range);
        if stage == 1 {
            invalidation.wait();
        }
        let mut engine = stand.space.memory().epoch().register().expect("a slot");
        engine.begin().expect("open");
        let mut teardown = Teardown::begin(mapped);
        assert!(!teardown.poll(), "a burst is under way");
        if stage == 2 {
            invalidation.wait();
        }
        engine.end();
        assert!(teardown.poll(), "stage {stage}");
        invalidation.wait();
        invalidation.end();
        assert_eq!((stand.mapped_pages(), stand.device.iova_stats().live_ranges), (0, 0));
        assert_eq!(stand.space.notifiers().stats().intervals, 0);
    }
    assert_eq!(stand.domain.stats().violations, 0);
}

#[test]
fn a_closing_region_takes_no_page() {
    let stand = stand();
    let mapped = stand.map(Mode::OnDemand);
    let core = Arc::clone(&mapped.core);
    Teardown::begin(mapped).wait();
    assert_eq!(core.publish(&stand.runs(), || true), Err(PublishError::Closing));
    assert_eq!(stand.mapped_pages(), 0);
}
