//! Starts and ends inside IO pages, and IO pages that are not those of the host: what unit confusion would get wrong.

use super::*;

/// A device behind an IOMMU with IO pages of `1 << shift` bytes.
fn device_with(shift: u32) -> (Arc<DmaDevice>, Arc<Domain>) {
    let config = DomainConfig { granule_shift: shift, ..DomainConfig::default() };
    let domain = Domain::new(config).expect("possible");
    (DmaDevice::over(Arc::clone(&domain) as _, DmaConfig::default()), domain)
}

fn like(device: &Arc<DmaDevice>, len: u64, phys: PhysAddr) -> Mapping {
    Mapping::try_alloc(device, len, phys.0).expect("room").expect("a domain translates")
}

#[test]
fn the_first_link_may_begin_and_the_last_may_end_inside_an_io_page_and_no_other() {
    for shift in [11, 12, 16] {
        let (device, domain) = device_with(shift);
        let granule = 1 << shift;
        let phys = PHYS.offset(0x234);
        let mapping = like(&device, 3 * granule, phys);
        assert_eq!(mapping.iova().0 & (granule - 1), 0x234, "it lies in its IO page as the memory does");
        assert_eq!((mapping.len(), mapping.granule()), (3 * granule, granule));
        let head = granule - 0x234;
        for (offset, len) in [
            (0, 0x100),
            (0, head + 1),
            (head + 1, granule),
            (head, granule - 1),
            (head + 2 * granule, 0x233),
            (head + 2 * granule, 0x235),
        ] {
            let range = RangeError { offset, len, reserved: 3 * granule, granule };
            let refused = mapping.link(offset, phys.offset(offset), len, LeafSize::Page);
            assert_eq!(refused, Err(range.into()), "IO pages of {granule:#x}");
            assert_eq!(mapping.unlink(offset, len), Err(range.into()));
        }
        let pieces = [(0, head), (head, granule), (head + granule, granule), (head + 2 * granule, 0x234)];
        for (offset, len) in pieces {
            mapping.link(offset, phys.offset(offset), len, LeafSize::Page).expect("edges of IO pages");
        }
        mapping.sync(0, 3 * granule).expect("all of it");
        assert_eq!((mapping.linked(), domain.stats().mapped_bytes), (4 * granule, 4 * granule));
        assert!([0, head, 3 * granule - 1].iter().all(|at| mapping.leads_to(*at, phys.offset(*at))));
        mapping.unlink(0, head + granule).expect("two of them");
        mapping.destroy(granule).expect_err("the first are gone already");
        mapping.unlink(head + granule, granule + 0x234).expect("the other two");
        mapping.free().expect("empty");
        assert_eq!((device.iova_stats().live_bytes, domain.stats().mapped_bytes), (0, 0));
    }
}

#[test]
fn memory_that_lies_otherwise_in_its_io_page_is_refused_with_both_addresses() {
    for shift in [11, 12, 16] {
        let (device, domain) = device_with(shift);
        let granule = 1 << shift;
        let mapping = like(&device, 2 * granule, PHYS);
        let phys = PHYS.offset(8);
        let error = LinkError::Unaligned { phys, iova: mapping.iova(), granule };
        assert_eq!(mapping.link(0, phys, granule, LeafSize::Page), Err(error));
        assert_eq!(domain.stats().violations, 0, "the IOMMU was never asked");
    }
}

#[test]
fn pages_of_4_kib_are_two_io_pages_of_2_kib() {
    let (device, domain) = device_with(11);
    let mapping = like(&device, 4 * PAGE, PHYS);
    let frames = [7, 3, 12].map(|page| PHYS.offset(page * PAGE));
    mapping.link_scattered(PAGE, frames).expect("free");
    assert_eq!((domain.stats().leaves_mapped, mapping.linked()), ([6, 0, 0], 3 * PAGE));
    for (page, frame) in frames.into_iter().enumerate() {
        for inside in [0, 0x7ff, 0x800, 0xfff] {
            assert!(mapping.leads_to((1 + page as u64) * PAGE + inside, frame.offset(inside)));
        }
    }
    assert_eq!(mapping.unit_at(PAGE), 0x800);
    mapping.unlink(PAGE + 0x800, 0x800).expect("a unit is an IO page");
    mapping.unlink(PAGE, 0x800).expect("a unit is an IO page");
    mapping.unlink(2 * PAGE, 2 * PAGE).expect("linked");
}

#[test]
fn pages_of_4_kib_do_not_go_apart_into_io_pages_of_64_kib() {
    let (device, domain) = device_with(16);
    let mapping = like(&device, 16 * PAGE, PHYS);
    let refused = mapping.link_scattered(0, [PHYS]);
    assert_eq!(refused, Err(LinkError::Granule { page: PAGE, granule: 0x1_0000 }));
    assert_eq!(
        refused.unwrap_err().to_string(),
        "pages of 0x1000 bytes cannot be linked apart in IO pages of 0x10000 bytes"
    );
    let one = mapping.link(PAGE, PHYS.offset(PAGE), PAGE, LeafSize::Page).unwrap_err();
    assert!(one.to_string().contains("not whole IO pages of 0x10000 bytes"), "{one}");
    mapping.link(0, PHYS, 16 * PAGE, LeafSize::Page).expect("a whole one");
    assert_eq!(domain.stats().leaves_mapped, [1, 0, 0]);
    mapping.unlink(0, 16 * PAGE).expect("linked");
}

#[test]
fn scattered_pages_are_linked_all_or_none() {
    let (device, domain) = device_with(12);
    let mapping = like(&device, 8 * PAGE, PHYS);
    mapping.link(5 * PAGE, PHYS, PAGE, LeafSize::Page).expect("free");
    let frames = (0..7_u64).map(|page| PHYS.offset((100 - 9 * page) * PAGE)).collect::<Vec<_>>();
    let over = mapping.link_scattered(0, frames.iter().copied());
    assert!(matches!(over, Err(LinkError::Map(MapError::AlreadyMapped { .. }))), "{over:?}");
    assert_eq!((mapping.linked(), domain.stats().mapped_bytes), (PAGE, PAGE));
    let odd = mapping.link_scattered(0, [PHYS, PHYS.offset(8)]);
    assert!(matches!(odd, Err(LinkError::Map(MapError::Misaligned { .. }))), "{odd:?}");
    assert_eq!((mapping.linked(), domain.stats().mapped_bytes), (PAGE, PAGE));
    let long = mapping.link_scattered(2 * PAGE, frames.iter().copied());
    assert!(matches!(long, Err(LinkError::Range(_))), "{long:?}");
    assert!(matches!(mapping.link_scattered(0, []), Err(LinkError::Range(_))), "nothing is no range");
    mapping.link_scattered(0, frames[..5].iter().copied()).expect("free");
    mapping.unlink(0, 6 * PAGE).expect("linked in two calls, unlinked in one");
}

#[test]
fn a_range_lies_in_its_2_mib_as_the_memory_does_and_takes_large_leaves_from_there_on() {
    let (device, domain) = device_with(12);
    let phys = PHYS.offset(LARGE - 3 * PAGE);
    let mapping = like(&device, 2 * LARGE, phys);
    mapping.link(0, phys, 2 * LARGE, LeafSize::Huge).expect("free");
    assert_eq!(domain.stats().leaves_mapped, [512, 1, 0], "three pages, a large leaf, the rest");
    assert_eq!(mapping.unit_at(3 * PAGE), LARGE);
    mapping.unlink(0, 2 * LARGE).expect("linked");
}

/// Regression: an aligned GiB was linked in 512 leaves, because its IOVA was only aligned for those.
#[test]
fn an_aligned_gib_is_one_leaf_and_no_room_for_that_is_no_refusal() {
    let (device, domain) = device_with(12);
    let mapping = like(&device, 1 << 30, PhysAddr(5 << 30));
    mapping.link(0, PhysAddr(5 << 30), 1 << 30, LeafSize::Huge).expect("free");
    assert_eq!(domain.stats().leaves_mapped, [0, 0, 1]);
    mapping.unlink(0, 1 << 30).expect("linked");

    let narrow = Domain::new(DomainConfig { width: 32, ..DomainConfig::default() }).expect("possible");
    let device = DmaDevice::over(narrow as _, DmaConfig::default());
    // Page 0 is never given out, so no 4 GiB less 2 MiB lie in their GiB as 0 does; nor in their 2 MiB as this does.
    let one = like(&device, (4 << 30) - (20 << 20) - LARGE, PhysAddr(0));
    assert_eq!(one.iova().0 % LARGE, 0, "the next smaller leaf then");
    drop(one);
    let end = 0xfee0_0000 - PAGE;
    let all = like(&device, end, PhysAddr(0x5000));
    assert_eq!((all.iova().0, all.len()), (PAGE, end), "all there is, wherever it lies");
}
