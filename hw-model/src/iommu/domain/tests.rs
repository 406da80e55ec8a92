use super::*;
use crate::iommu::DmaAccess::{Read, Write};
use crate::iommu::IotlbConfig;
use proptest::prelude::*;
use std::collections::BTreeMap;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const DEVICE: DeviceId = DeviceId(3);

fn domain() -> Arc<Domain> {
    Domain::new(DomainConfig::default()).expect("the default is possible")
}

fn with_iotlb(sets: usize, ways: usize) -> Arc<Domain> {
    let iotlb = Some(IotlbConfig { sets, ways, caches_not_present: true });
    Domain::new(DomainConfig { iotlb, audit: true, ..DomainConfig::default() }).expect("possible")
}

#[test]
fn leaves_are_as_large_as_alignment_and_length_allow() {
    let domain = domain();
    let start = Iova(GIB - 2 * MIB - 4 * KIB);
    let len = 4 * KIB + 2 * MIB + GIB + 2 * MIB + 4 * KIB;
    domain.map(start, PhysAddr(5 * GIB - 2 * MIB - 4 * KIB), len, Prot::READ_WRITE).expect("free");
    let sizes = [
        (start.0, LeafSize::Page),
        (GIB - 2 * MIB, LeafSize::Large),
        (GIB, LeafSize::Huge),
        (2 * GIB, LeafSize::Large),
        (2 * GIB + 2 * MIB, LeafSize::Page),
    ];
    for (iova, size) in sizes {
        assert_eq!(domain.leaf_at(Iova(iova)), Some(size), "at {iova:#x}");
        assert_eq!(domain.iova_to_phys(Iova(iova + 5)), Some(PhysAddr(iova + 4 * GIB + 5)));
    }
    assert_eq!(domain.stats().mapped_bytes, len);
    domain.flush(domain.unmap(start, len).expect("exactly what was mapped"));
    assert_eq!(domain.stats().mapped_bytes, 0);
    assert!(sizes.iter().all(|(iova, _)| domain.iova_to_phys(Iova(*iova)).is_none()));
}

#[test]
fn synthetic_addresses_with_the_top_bit_survive_the_table() {
    let domain = domain();
    let phys = PhysAddr(1 << 63 | 0xffff << 47 | 0x7fff_ffff_f000);
    domain.map(Iova(0x7000), phys, 0x1000, Prot::READ).expect("free");
    assert_eq!(domain.lookup(Iova(0x7abc)), Some((phys.offset(0xabc), Prot::READ)));
}

#[test]
fn the_top_of_the_address_space_can_be_mapped_and_nothing_beyond() {
    for (width, granule_shift) in [(48, 12), (39, 12), (32, 12), (48, 11), (48, 16), (33, 16)] {
        let config = DomainConfig { width, granule_shift, ..DomainConfig::default() };
        let domain = Domain::new(config).expect("possible");
        let page = domain.granule();
        let last = Iova((1 << width) - page);
        domain.prepare(last, page).expect("there");
        domain.map(last, PhysAddr(0), page, Prot::READ).expect("there");
        assert_eq!(domain.translate(DEVICE, last.offset(page - 1), Read), Ok(PhysAddr(page - 1)));
        let beyond = MapError::BeyondWidth { iova: last, len: 2 * page, width };
        assert_eq!(domain.map(last, PhysAddr(0), 2 * page, Prot::READ), Err(beyond));
        assert_eq!(domain.prepare(last, 2 * page), Err(beyond));
        assert_eq!(domain.translate(DEVICE, Iova(1 << width), Read), Err(IommuFault::BeyondWidth));
        assert!(matches!(domain.unmap(last, 2 * page), Err(UnmapError::BeyondWidth { .. })));
        assert!(matches!(domain.unmap(Iova(u64::MAX - page + 1), page), Err(UnmapError::BeyondWidth { .. })));
        assert_eq!(domain.iova_to_phys(Iova(1 << width)), None);
        let _gather = domain.unmap(last, page).expect("mapped");
    }
    let refused = |config| Domain::new(config).err();
    let base = DomainConfig::default();
    assert_eq!(refused(DomainConfig { width: 49, ..base }), Some(ConfigError::Width { width: 49 }));
    assert_eq!(
        refused(DomainConfig { granule_shift: 10, ..base }),
        Some(ConfigError::Granule { granule_shift: 10 })
    );
    let iotlb = Some(IotlbConfig { sets: 3, ways: 1, caches_not_present: false });
    assert_eq!(refused(DomainConfig { iotlb, ..base }), Some(ConfigError::Iotlb { sets: 3, ways: 1 }));
}

#[test]
fn a_refused_mapping_leaves_nothing_and_an_earlier_one_stays() {
    let domain = domain();
    domain.map(Iova(0x5000), PhysAddr(0x9000), 0x1000, Prot::READ).expect("free");
    let taken = MapError::AlreadyMapped { iova: Iova(0x5000), existing: PhysAddr(0x9000) };
    assert_eq!(domain.map(Iova(0x3000), PhysAddr(0x100_0000), 0x4000, Prot::READ), Err(taken));
    for page in [0x3000, 0x4000, 0x6000] {
        assert_eq!(domain.iova_to_phys(Iova(page)), None, "unwound at {page:#x}");
    }
    assert_eq!(domain.iova_to_phys(Iova(0x5000)), Some(PhysAddr(0x9000)));
    assert_eq!((domain.stats().violations, domain.stats().mapped_bytes), (1, 0x1000));
    assert_eq!(domain.stats().iotlb.flushes, 1, "an engine may have met what was unwound");
    assert_eq!(
        domain.map(Iova(0x8000), PhysAddr(0), 0x1000, Prot::MMIO),
        Err(MapError::NoAccess { iova: Iova(0x8000) })
    );
}

/// A large leaf may not hide small ones below it, nor small ones be mapped below a large leaf.
#[test]
fn double_mapping_is_caught_across_leaf_sizes() {
    let taken = |iova: u64, existing: u64| {
        Err(MapError::AlreadyMapped { iova: Iova(iova), existing: PhysAddr(existing) })
    };
    let domain = domain();
    let small = GIB + 6 * MIB + 3 * 4 * KIB;
    domain.map(Iova(small), PhysAddr(0x7000), 0x1000, Prot::READ).expect("free");
    assert_eq!(domain.map(Iova(GIB), PhysAddr(0), GIB, Prot::READ), taken(small, 0x7000));
    assert_eq!(domain.map(Iova(GIB + 6 * MIB), PhysAddr(0), 2 * MIB, Prot::READ), taken(small, 0x7000));
    domain.map(Iova(GIB + 8 * MIB), PhysAddr(8 * MIB), 2 * MIB, Prot::READ).expect("beside it");
    domain.flush(domain.unmap(Iova(small), 0x1000).expect("mapped"));
    assert_eq!(domain.map(Iova(GIB), PhysAddr(0), GIB, Prot::READ), taken(GIB + 8 * MIB, 8 * MIB));
    domain.map(Iova(GIB), PhysAddr(0x3000), 0x1000, Prot::READ).expect("before it");
    let first = domain.map(Iova(GIB), PhysAddr(0), GIB, Prot::READ);
    assert_eq!(first, taken(GIB, 0x3000), "the first in the way is named, whatever its size");
    domain.flush(domain.unmap(Iova(GIB), 0x1000).expect("mapped"));
    domain.flush(domain.unmap(Iova(GIB + 8 * MIB), 2 * MIB).expect("mapped"));
    domain.map(Iova(GIB), PhysAddr(GIB), GIB, Prot::READ).expect("all below is empty again");
    assert_eq!(domain.map(Iova(small), PhysAddr(0), 0x1000, Prot::READ), taken(small, small));
    assert_eq!(
        domain.map(Iova(GIB + 2 * MIB), PhysAddr(0), 2 * MIB, Prot::READ),
        taken(GIB + 2 * MIB, GIB + 2 * MIB)
    );
}

#[test]
fn only_what_was_mapped_can_be_unmapped() {
    let domain = domain();
    domain.map(Iova(2 * MIB), PhysAddr(2 * MIB), 2 * MIB, Prot::READ).expect("free");
    let part = Err(UnmapError::PartOfLeaf { leaf: Iova(2 * MIB), leaf_len: 2 * MIB });
    assert_eq!(domain.unmap(Iova(2 * MIB), 4 * KIB), part);
    assert_eq!(domain.unmap(Iova(3 * MIB), MIB), part);
    assert_eq!(domain.unmap(Iova(2 * MIB), 3 * MIB), Err(UnmapError::Hole { iova: Iova(4 * MIB) }));
    assert_eq!(domain.unmap(Iova(MIB), 3 * MIB), Err(UnmapError::Hole { iova: Iova(MIB) }));
    let misaligned = UnmapError::Misaligned { iova: Iova(2 * MIB), len: 100, granule: 4096 };
    assert_eq!(domain.unmap(Iova(2 * MIB), 100), Err(misaligned));
    assert!(matches!(domain.unmap(Iova(2 * MIB), 0), Err(UnmapError::Misaligned { .. })));
    assert_eq!(domain.stats().violations, 6);
    assert_eq!(domain.stats().mapped_bytes, 2 * MIB, "a refused call unmaps nothing");
    assert_eq!(domain.leaf_at(Iova(3 * MIB)), Some(LeafSize::Large));

    domain.map_pages(Iova(8 * MIB), PhysAddr(8 * MIB), 2 * MIB, Prot::READ).expect("free");
    domain.flush(domain.unmap(Iova(8 * MIB + 4 * KIB), 4 * KIB).expect("pages come down one by one"));
}

#[test]
fn units_of_another_io_page_size_are_refused_by_name() {
    let domain =
        Domain::new(DomainConfig { granule_shift: 16, ..DomainConfig::default() }).expect("possible");
    let refused = MapError::Misaligned {
        iova: Iova(0x1000),
        phys: PhysAddr(0x1_0000),
        len: 0x1_0000,
        granule: 0x1_0000,
    };
    assert_eq!(domain.map(Iova(0x1000), PhysAddr(0x1_0000), 0x1_0000, Prot::READ), Err(refused));
    domain.map(Iova(0), PhysAddr(0), 1 << 25, Prot::READ).expect("free");
    assert_eq!(domain.leaf_at(Iova(0)), Some(LeafSize::Large), "512 IO pages of 64 KiB");
}

#[test]
fn a_translation_stays_until_it_is_invalidated_and_is_gone_after() {
    for len in [4 * KIB, 2 * MIB, GIB] {
        let domain = with_iotlb(64, 4);
        let iova = Iova(4 * GIB);
        domain.map(iova, PhysAddr(8 * GIB), len, Prot::READ).expect("free");
        assert_eq!(domain.translate(DEVICE, iova, Read), Ok(PhysAddr(8 * GIB)));
        let gather = domain.unmap(iova, len).expect("mapped");
        assert_eq!(domain.iova_to_phys(iova), None);
        assert_eq!(domain.translate(DEVICE, iova, Read), Ok(PhysAddr(8 * GIB)), "still cached");
        assert_eq!(domain.stats().stale_hits, 1, "and the audit noticed");
        domain.flush(gather);
        assert_eq!(domain.translate(DEVICE, iova, Read), Err(IommuFault::NotPresent));
        let stats = domain.stats();
        assert_eq!((stats.iotlb.flushes, stats.iotlb.invalidated, stats.faults), (1, 1, 1));
        let log = domain.faults().recent();
        assert_eq!(log[0].last_mapped, Some(PhysAddr(8 * GIB)), "the log says where a late DMA was bound");
        assert_eq!((log[0].device, log[0].iova, log[0].unsynced), (DEVICE, iova, false));
    }
}

#[test]
fn invalidating_any_part_of_a_leaf_drops_it() {
    for (len, part) in [(2 * MIB, MIB), (GIB, 3 * MIB + 4 * KIB)] {
        let domain = with_iotlb(1024, 4);
        let iova = Iova(4 * GIB);
        domain.map(iova, PhysAddr(8 * GIB), len, Prot::READ).expect("free");
        domain.translate(DEVICE, iova, Read).expect("mapped");
        domain.sync_map(iova.offset(len), 4 * KIB);
        assert_eq!(domain.stats().iotlb.invalidated, 0, "beside it");
        domain.sync_map(iova.offset(part), 4 * KIB);
        assert_eq!(domain.stats().iotlb.invalidated, 1);
    }
}

/// If this fails, a page that goes takes its neighbours in the same leaf along, or a device that knows the whole leaf still
/// reaches it.
#[test]
fn a_page_of_a_large_leaf_goes_alone_after_a_split() {
    let domain = with_iotlb(64, 4);
    let (iova, page) = (Iova(4 * GIB), Iova(4 * GIB + 7 * 4 * KIB));
    domain.map(iova, PhysAddr(8 * GIB), 4 * MIB, Prot::READ).expect("free");
    let led = |at: Iova| domain.translate(DEVICE, at, Read);
    assert_eq!(led(page), Ok(PhysAddr(8 * GIB + 7 * 4 * KIB)));
    let refused = domain.unmap(page, 4 * KIB);
    assert_eq!(refused, Err(UnmapError::PartOfLeaf { leaf: iova, leaf_len: 2 * MIB }));
    domain.split(page, 4 * KIB);
    assert_eq!(led(iova), Ok(PhysAddr(8 * GIB)), "the IOTLB still has the whole leaf, which is right");
    assert_eq!((domain.leaf_at(iova), domain.stats().stale_hits), (Some(LeafSize::Page), 0));
    domain.flush(domain.unmap(page, 4 * KIB).expect("a leaf of its own"));
    assert_eq!(led(page), Err(IommuFault::NotPresent));
    for other in [iova, page.offset(4 * KIB), iova.offset(2 * MIB - 1), iova.offset(2 * MIB)] {
        assert_eq!(led(other), Ok(PhysAddr(other.0 + 4 * GIB)), "{other}");
    }
    let stats = domain.stats();
    assert_eq!((stats.leaves_mapped, stats.leaves_unmapped), ([512, 2, 0], [1, 1, 0]));
    assert_eq!((stats.mapped_bytes, stats.stale_hits), (4 * MIB - 4 * KIB, 0));
    domain.split(iova, 2 * MIB);
    assert_eq!(domain.stats().leaves_mapped, [512, 2, 0], "neither end cuts a leaf");
}

/// Relinking at the same IOVA without a flush is the mistake that sends data into the old page.
#[test]
fn a_page_relinked_without_a_flush_still_leads_to_the_old_one() {
    let domain = with_iotlb(64, 4);
    let iova = Iova(0x4000);
    domain.map(iova, PhysAddr(0x1000), 0x1000, Prot::READ_WRITE).expect("free");
    domain.translate(DEVICE, iova, Write).expect("mapped");
    let gather = domain.unmap(iova, 0x1000).expect("mapped");
    domain.map(iova, PhysAddr(0x2000), 0x1000, Prot::READ_WRITE).expect("free");
    assert_eq!(domain.translate(DEVICE, iova, Write), Ok(PhysAddr(0x1000)));
    domain.flush(gather);
    assert_eq!(domain.translate(DEVICE, iova, Write), Ok(PhysAddr(0x2000)));
}

#[test]
fn a_mapping_used_before_its_sync_can_be_refused() {
    let domain = with_iotlb(64, 4);
    let iova = Iova(0x4000);
    assert!(domain.translate(DEVICE, iova, Read).is_err());
    domain.map(iova, PhysAddr(0x1000), 0x1000, Prot::READ).expect("free");
    assert_eq!(domain.translate(DEVICE, iova, Read), Err(IommuFault::NotPresent));
    assert!(domain.faults().recent()[1].unsynced, "the log says that the table allowed it");
    domain.sync_map(iova, 0x1000);
    assert_eq!(domain.translate(DEVICE, iova, Read), Ok(PhysAddr(0x1000)));

    let iotlb = Some(IotlbConfig { caches_not_present: false, ..IotlbConfig::default() });
    let plain = Domain::new(DomainConfig { iotlb, ..DomainConfig::default() }).expect("possible");
    assert!(plain.translate(DEVICE, iova, Read).is_err());
    plain.map(iova, PhysAddr(0x1000), 0x1000, Prot::READ).expect("free");
    assert_eq!(plain.translate(DEVICE, iova, Read), Ok(PhysAddr(0x1000)));
    plain.sync_map(iova, 0x1000);
    assert_eq!(plain.stats().iotlb.flushes, 0, "such an IOMMU needs no command for a new mapping");
}

#[test]
fn permissions_are_those_of_the_entry() {
    let domain = domain();
    domain.map(Iova(0x1000), PhysAddr(0), 0x1000, Prot::READ).expect("free");
    domain.map(Iova(0x2000), PhysAddr(0), 0x1000, Prot::WRITE).expect("free");
    let ask = |iova, access| domain.translate(DEVICE, Iova(iova), access);
    assert_eq!(ask(0x1000, Write), Err(IommuFault::NoWrite));
    assert_eq!(ask(0x1000, DmaAccess::Atomic), Err(IommuFault::NoWrite));
    assert_eq!(ask(0x2000, Read), Err(IommuFault::NoRead));
    assert_eq!(ask(0x2000, DmaAccess::Atomic), Err(IommuFault::NoRead));
    assert!(ask(0x1000, Read).is_ok() && ask(0x2000, Write).is_ok());
    let log = domain.faults().recent();
    assert_eq!(log.len(), 4);
    assert_eq!((log[2].iova, log[2].access, log[2].reason), (Iova(0x2000), Read, IommuFault::NoRead));
    assert_eq!(
        log[0].to_string(),
        "IOMMU fault 0: device 3 Write at 0x1000: no write permission (the table has, or had, 0x0)"
    );
}

#[test]
fn the_fault_log_keeps_the_newest_and_counts_all() {
    let domain = Domain::new(DomainConfig { fault_log: 3, ..DomainConfig::default() }).expect("possible");
    for page in 0..10_u64 {
        let _ = domain.translate(DEVICE, Iova(page << 12), Read);
    }
    assert_eq!(domain.faults().total(), 10);
    let numbers: Vec<u64> = domain.faults().recent().iter().map(|fault| fault.number).collect();
    assert_eq!(numbers, [7, 8, 9]);
}

#[test]
fn the_iotlb_has_the_size_and_associativity_it_was_given() {
    let domain = with_iotlb(4, 2);
    domain.map(Iova(0), PhysAddr(0), 64 * 4 * KIB, Prot::READ).expect("free");
    let touch = |page: u64| domain.translate(DEVICE, Iova(page << 12), Read).expect("mapped");
    touch(0);
    touch(4);
    touch(0);
    touch(4);
    let iotlb = domain.stats().iotlb;
    assert_eq!((iotlb.misses, iotlb.hits, iotlb.evictions), (2, 2, 0), "two ways hold two of one set");
    touch(8);
    touch(1);
    let iotlb = domain.stats().iotlb;
    assert_eq!((iotlb.misses, iotlb.hits, iotlb.evictions), (4, 2, 1), "a third of the set evicts");
    domain.flush_all();
    assert_eq!(domain.stats().iotlb.invalidated, 3);
    assert_eq!(domain.stats().iotlb.flushes, 1);
}

#[test]
fn a_gather_is_flushed_by_one_command() {
    let domain = with_iotlb(16, 4);
    domain.map_pages(Iova(0), PhysAddr(0), 32 * 4 * KIB, Prot::READ).expect("free");
    for page in 0..32_u64 {
        domain.translate(DEVICE, Iova(page << 12), Read).expect("mapped");
    }
    let mut gather = Gather::EMPTY;
    domain.flush(gather);
    assert_eq!(domain.stats().iotlb.flushes, 0, "nothing to flush is no command");
    for page in [3_u64, 9, 5] {
        gather = gather.merge(domain.unmap(Iova(page << 12), 4 * KIB).expect("mapped"));
    }
    assert_eq!(gather.hull(), (Iova(0x3000), 7 * 4 * KIB));
    domain.flush(gather);
    assert_eq!((domain.stats().iotlb.flushes, domain.stats().iotlb.invalidated), (1, 7));
    assert!(domain.translate(DEVICE, Iova(9 << 12), Read).is_err());
    assert!(domain.translate(DEVICE, Iova(4 << 12), Read).is_ok());
}

#[test]
fn a_queued_flush_is_done_when_its_wait_is_and_not_before() {
    let domain =
        Domain::new(DomainConfig { queue: 4, audit: true, ..DomainConfig::default() }).expect("possible");
    domain.map_pages(Iova(0), PhysAddr(0), 4 * 4 * KIB, Prot::READ).expect("free");
    for page in 0..4_u64 {
        domain.translate(DEVICE, Iova(page << 12), Read).expect("mapped");
    }
    let submit = |page: u64| {
        let gather = domain.unmap(Iova(page << 12), 4 * KIB).expect("mapped");
        domain.submit_flush(gather)
    };
    let first = submit(0).expect("room");
    let second = submit(1).expect("room");
    assert_eq!(submit(2), Err(QueueFull { pending: 4, length: 4 }));
    assert!(domain.translate(DEVICE, Iova(0), Read).is_ok(), "submitted is not executed");
    assert_eq!(domain.run_queue(1), 1);
    assert!(domain.translate(DEVICE, Iova(0), Read).is_err(), "executed");
    assert!(!domain.is_flushed(first), "but software has not been told");
    assert_eq!(domain.run_queue(1), 1);
    assert!(domain.is_flushed(first) && !domain.is_flushed(second));
    // A flush that waits runs what was queued before it, in order.
    let gather = domain.unmap(Iova(3 << 12), 4 * KIB).expect("mapped");
    domain.flush(gather);
    assert!(domain.is_flushed(second));
    let queue = domain.stats().queue;
    assert_eq!((queue.descriptors, queue.waits, queue.pending), (6, 3, 0));
    assert_eq!(domain.stats().iotlb.flushes, 3);
    assert!(domain.translate(DEVICE, Iova(2 << 12), Read).is_ok(), "its flush was refused, and never came");
    assert_eq!(domain.stats().stale_hits, 2);
    let nothing = domain.submit_flush(Gather::EMPTY).expect("room");
    assert_eq!((domain.run_queue(usize::MAX), domain.is_flushed(nothing)), (1, true), "a wait alone");
    let refused = Domain::new(DomainConfig { queue: 1, ..DomainConfig::default() }).err();
    assert_eq!(refused, Some(ConfigError::Queue { length: 1 }));
}

#[test]
fn prepared_ranges_need_no_further_table() {
    let domain = domain();
    domain.prepare(Iova(GIB - 4 * KIB), 2 * MIB).expect("memory for tables");
    let tables = domain.stats().tables;
    for page in 0..512_u64 {
        let iova = Iova(GIB - 4 * KIB + page * 4 * KIB);
        domain.map(iova, PhysAddr(page * 8 * KIB), 4 * KIB, Prot::READ).expect("free");
    }
    assert_eq!(domain.stats().tables, tables);
}

#[test]
fn scattered_pages_are_mapped_by_one_call_or_not_at_all() {
    let domain = domain();
    let start = Iova(GIB - 3 * 4 * KIB);
    let frames: Vec<PhysAddr> = (0..600).map(|page| PhysAddr::from_page_number(page * 7 % 601)).collect();
    domain.map(start.offset(599 * 4 * KIB), PhysAddr(0x9000), 4 * KIB, Prot::READ).expect("free");
    let taken = MapError::AlreadyMapped { iova: start.offset(599 * 4 * KIB), existing: PhysAddr(0x9000) };
    assert_eq!(domain.map_scattered(start, frames.iter().copied(), Prot::READ), Err(taken));
    assert_eq!(domain.stats().mapped_bytes, 4 * KIB, "the 599 before it were unwound");
    domain.map_scattered(start, frames[..599].iter().copied(), Prot::READ).expect("free");
    for (page, frame) in frames[..599].iter().enumerate() {
        assert_eq!(domain.iova_to_phys(start.offset(page as u64 * 4 * KIB)), Some(*frame));
    }
    assert_eq!(domain.stats().leaves_mapped, [600, 0, 0], "one entry a page");
    assert_eq!(domain.stats().iotlb.flushes, 1, "that of the unwinding");
    let top = Iova((1 << 48) - 4 * KIB);
    let beyond = domain.map_scattered(top, frames.iter().copied(), Prot::READ);
    assert!(matches!(beyond, Err(MapError::BeyondWidth { .. })));
    assert_eq!(domain.iova_to_phys(top), None);
}

/// What the model remembers of a leaf: bytes, physical address, permissions.
type Model = BTreeMap<u64, (u64, u64, Prot)>;

#[derive(Clone, Debug)]
enum Call {
    Map { page: u64, pages: u64, phys: u64, single: bool },
    Unmap { page: u64, pages: u64 },
    Split { page: u64, pages: u64 },
    Look { page: u64 },
}

/// Pages around a GiB boundary, often at 2 MiB boundaries, so that every leaf size, table edge and collision comes up.
fn calls() -> impl Strategy<Value = Vec<Call>> {
    let page =
        prop_oneof![0..8_u64, Just(512), Just(1024), 510..515_u64, Just(262_144), 261_630..262_150_u64];
    let pages = prop_oneof![4 => 1..6_u64, 2 => Just(512), 1 => Just(1024), 1 => 500..530_u64, 1 => Just(262_144), 1 => Just(0)];
    let phys = prop_oneof![Just(0), Just(512), Just(262_144), 0..4096_u64];
    let call = prop_oneof![
        (page.clone(), pages.clone(), phys, any::<bool>()).prop_map(|(page, pages, phys, single)| {
            Call::Map { page, pages, phys, single: single && pages < 2048 }
        }),
        (page.clone(), pages.clone()).prop_map(|(page, pages)| Call::Unmap { page, pages }),
        (page.clone(), pages).prop_map(|(page, pages)| Call::Split { page, pages }),
        page.prop_map(|page| Call::Look { page }),
    ];
    prop::collection::vec(call, 1..60)
}

fn model_map(model: &mut Model, page: u64, pages: u64, phys: u64, single: bool) -> Result<(), u64> {
    let taken = model.iter().filter(|(start, leaf)| **start < page + pages && **start + leaf.0 > page);
    if let Some((start, _)) = taken.min_by_key(|(start, _)| **start) {
        return Err((*start).max(page));
    }
    let mut done = 0;
    while done < pages {
        let fits = |size: &u64| {
            !(single && *size > 1)
                && pages - done >= *size
                && (page + done).is_multiple_of(*size)
                && (phys + done).is_multiple_of(*size)
        };
        let size = [262_144, 512, 1].into_iter().find(fits).expect("a page always fits");
        model.insert(page + done, (size, phys + done, Prot::READ));
        done += size;
    }
    Ok(())
}

/// Whether the range is made of whole leaves of the model.
fn model_unmap(model: &mut Model, page: u64, pages: u64) -> bool {
    let mut at = page;
    while at < page + pages {
        match model.get(&at) {
            Some((size, ..)) if at + size <= page + pages => at += size,
            _ => return false,
        }
    }
    model.retain(|start, _| *start < page || *start >= page + pages);
    true
}

/// Leaves of 512 pages that an end of the range cuts become pages.
fn model_split(model: &mut Model, page: u64, pages: u64) {
    for edge in [page, page + pages] {
        let cut = model.range(..edge).next_back().map(|(start, leaf)| (*start, *leaf));
        if let Some((start, (512, phys, prot))) = cut.filter(|(start, leaf)| edge < start + leaf.0) {
            model.extend((0..512).map(|page| (start + page, (1, phys + page, prot))));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Legal and illegal calls in any order: the table and the model agree on every answer and every translation.
    #[test]
    fn the_table_is_a_map(calls in calls()) {
        let domain = with_iotlb(16, 2);
        let mut model = Model::new();
        for call in calls {
            match call {
                Call::Map { page, pages, phys, single } => {
                    let (iova, to) = (Iova(page << 12), PhysAddr(phys << 12));
                    let outcome = if single {
                        domain.map_pages(iova, to, pages << 12, Prot::READ)
                    } else {
                        domain.map(iova, to, pages << 12, Prot::READ)
                    };
                    domain.sync_map(iova, pages << 12);
                    if pages == 0 {
                        let refused = matches!(outcome, Err(MapError::Misaligned { .. }));
                        prop_assert!(refused);
                        continue;
                    }
                    match model_map(&mut model, page, pages, phys, single) {
                        Ok(()) => prop_assert_eq!(outcome, Ok(())),
                        Err(taken) => match outcome {
                            Err(MapError::AlreadyMapped { iova, .. }) => prop_assert_eq!(iova, Iova(taken << 12)),
                            other => prop_assert!(false, "mapped over page {taken}: {other:?}"),
                        },
                    }
                }
                Call::Unmap { page, pages } => {
                    let outcome = domain.unmap(Iova(page << 12), pages << 12);
                    let legal = pages > 0 && model_unmap(&mut model, page, pages);
                    prop_assert_eq!(outcome.is_ok(), legal, "{:?}", outcome);
                    if let Ok(gather) = outcome {
                        domain.flush(gather);
                    }
                }
                Call::Split { page, pages } => {
                    domain.split(Iova(page << 12), pages << 12);
                    model_split(&mut model, page, pages);
                }
                Call::Look { page } => {
                    let leaf = model.range(..=page).next_back().filter(|(start, leaf)| *start + leaf.0 > page);
                    let expected = leaf.map(|(start, leaf)| PhysAddr((leaf.1 + page - start) << 12));
                    prop_assert_eq!(domain.iova_to_phys(Iova(page << 12)), expected);
                    let translated = domain.translate(DEVICE, Iova(page << 12), Read).ok();
                    prop_assert_eq!(translated, expected, "flushed after every call, so never stale");
                }
            }
            let bytes: u64 = model.values().map(|leaf| leaf.0 << 12).sum();
            prop_assert_eq!(domain.stats().mapped_bytes, bytes);
        }
        prop_assert_eq!(domain.stats().stale_hits, 0);
    }
}

/// Engines translate all the time while software maps, unmaps and flushes. An answer is the right page or a fault; and
/// after a flush has returned, the old page is never given again, which the shrinking floor checks.
#[test]
fn walks_race_with_mapping_unmapping_and_flushing() {
    use crate::sync::atomic::AtomicBool;
    const PAGES: u64 = 8;
    const ROUNDS: u64 = 20_000;
    // One set: every fill meets every invalidation.
    for (sets, ways) in [(1, 2), (4, 4)] {
        let iotlb = Some(IotlbConfig { sets, ways, caches_not_present: true });
        let domain =
            Domain::new(DomainConfig { iotlb, fault_log: 4, ..DomainConfig::default() }).expect("possible");
        // Page p in round r leads to frame r * PAGES + p. `floor`: rounds before it have been flushed.
        let floors: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
        let done = AtomicBool::new(false);
        let answered = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for engine in 0..2_u64 {
                let (domain, floors, done, answered) = (&domain, &floors, &done, &answered);
                scope.spawn(move || {
                    let mut page = engine;
                    while !done.load(Ordering::Relaxed) {
                        page = (page + 1) % PAGES;
                        let floor = floors[page as usize].load(Ordering::Acquire);
                        if let Ok(phys) = domain.translate(DeviceId(0), Iova(page << 12), Read) {
                            let frame = phys.page_number();
                            assert_eq!(frame % PAGES, page, "a translation of another page");
                            assert!(
                                frame / PAGES >= floor,
                                "round {} after {floor} was flushed",
                                frame / PAGES
                            );
                            answered.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
            let writers: Vec<_> = (0..2_u64)
                .map(|half| {
                    let (domain, floors) = (&domain, &floors);
                    scope.spawn(move || {
                        for round in 0..ROUNDS {
                            for page in (0..PAGES).filter(|page| page % 2 == half) {
                                let iova = Iova(page << 12);
                                let frame = PhysAddr::from_page_number(round * PAGES + page);
                                domain.map(iova, frame, 0x1000, Prot::READ).expect("this thread's page");
                                domain.sync_map(iova, 0x1000);
                                if round % 64 == 0 {
                                    std::thread::yield_now();
                                }
                                domain.flush(domain.unmap(iova, 0x1000).expect("this thread's page"));
                                floors[page as usize].store(round + 1, Ordering::Release);
                            }
                        }
                    })
                })
                .collect();
            for writer in writers {
                writer.join().expect("no assertion failed");
            }
            done.store(true, Ordering::Relaxed);
        });
        assert!(answered.load(Ordering::Relaxed) > 0, "the engines met mappings");
        assert_eq!((domain.stats().mapped_bytes, domain.stats().violations), (0, 0));
    }
}

/// Large leaves are put in under a lock of their table and not one by one: neighbours who map pages, and who turn the word
/// beside it into a table, must not be lost; nor may two have the same leaf.
#[test]
fn threads_that_map_large_leaves_and_pages_in_one_gib_lose_nothing_and_share_nothing() {
    const ROUNDS: u64 = 200;
    let domain = domain();
    let won: u64 = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4_u64)
            .map(|thread| {
                let domain = &domain;
                scope.spawn(move || {
                    let mut won = 0;
                    for round in 0..ROUNDS {
                        // Every thread its own stretch, pages and large leaves in turn.
                        let at = Iova(GIB + (8 * (round % 8) + 2 * thread) * 2 * MIB);
                        let len = if (round + thread).is_multiple_of(2) { 4 * MIB } else { 3 * 4 * KIB };
                        domain.map(at, PhysAddr(at.0), len, Prot::READ).expect("this thread's stretch");
                        // And one leaf that all want.
                        let wanted = Iova(2 * GIB - 2 * MIB * (1 + round % 16));
                        let mapped = domain.map(wanted, PhysAddr(0), 2 * MIB, Prot::READ);
                        won += u64::from(mapped.is_ok());
                        for place in [at, at.offset(len - 1)] {
                            assert_eq!(domain.iova_to_phys(place), Some(PhysAddr(place.0)));
                        }
                        domain.flush(domain.unmap(at, len).expect("exactly what was mapped"));
                        if mapped.is_ok() {
                            domain.flush(domain.unmap(wanted, 2 * MIB).expect("it is this thread's"));
                        }
                    }
                    won
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("no thread panicked")).sum()
    });
    let stats = domain.stats();
    assert_eq!((stats.mapped_bytes, stats.violations), (0, 4 * ROUNDS - won), "who lost was told");
}
