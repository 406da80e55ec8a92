//! What can be said of the backend without a device; with one, tests/verbs does the rest.

use super::limits::LockedMemory;
use super::*;
use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange};

fn range(start: u64, len: u64) -> VirtRange {
    VirtRange::new(VirtAddr(start), len).expect("fits")
}

#[test]
fn a_device_that_is_not_there_is_named_with_those_that_are() {
    let error = VerbsDevice::open("no such device").expect_err("nothing is called that");
    let VerbsError::NoDevice { name, found } = &error else { panic!("{error}") };
    assert_eq!((name.as_str(), found), ("no such device", &devices()));
    assert!(error.to_string().starts_with("there is no RDMA device no such device; there are: "));
}

#[test]
fn pinning_past_the_limit_is_refused_with_its_numbers_before_it_is_tried() {
    let status = "Name:\tx\nVmPin:\t      64 kB\nCapEff:\t0000000000000000\n";
    let locked = LockedMemory::from_status(status, Some(128 << 10));
    assert_eq!(locked, LockedMemory { limit: Some(128 << 10), pinned: 64 << 10, exempt: false });
    assert_eq!(locked.allows(range(0, 64 << 10)), Ok(()));
    // One byte into a page more.
    let refused = locked.allows(range(PAGE_SIZE - 1, (64 << 10) + 1)).expect_err("past the limit");
    assert_eq!(
        refused,
        VerbsError::MemoryLock { needed: 17 * PAGE_SIZE, pinned: 64 << 10, limit: 128 << 10 }
    );
    let said = refused.to_string();
    assert!(said.contains("RLIMIT_MEMLOCK is 131072 bytes") && said.contains("at least 135168"), "{said}");
}

#[test]
fn the_limit_does_not_hold_for_who_may_lock_memory_or_has_none() {
    let exempt = LockedMemory::from_status("CapEff:\t0000000000004000\n", Some(0));
    assert_eq!(exempt.allows(range(0, 1 << 40)), Ok(()));
    let unlimited = LockedMemory::from_status("", None);
    assert_eq!(unlimited.allows(range(0, u64::MAX)), Ok(()));
    let neither = LockedMemory::from_status("CapEff:\t000001ffffffbfff\n", Some(u64::MAX - 1));
    assert!(neither.allows(range(0, u64::MAX)).is_err(), "a sum passed the top");
}

#[test]
fn every_status_of_the_specification_has_a_word() {
    use hw_model::hca::Status;
    // 11.6.2; the model's statuses that a verbs device can give.
    let given: std::collections::BTreeSet<_> = (0..=23).map(translate::status).collect();
    for status in Status::ALL {
        assert!(given.contains(&status), "{status:?} is never given");
    }
}

#[test]
fn what_a_device_cannot_do_names_it_and_what_to_do_instead() {
    let device = || "rxe0".to_owned();
    let said = [
        (
            VerbsError::Lacks { device: device(), capability: Capability::Implicit },
            "rxe0 has no implicit ODP",
        ),
        (
            VerbsError::TooLong { device: device(), len: 9, limit: 8 },
            "9 bytes are more than a region of rxe0",
        ),
        (VerbsError::TooManyRegions { device: device(), max: 7 }, "all 7 regions of rxe0 (max_mr)"),
        (VerbsError::HugePages { range: range(0x1000, 0x1000), page: PAGE_SIZE }, "vm.nr_hugepages"),
        (VerbsError::NotEverything { range: range(0, 1), all: range(0, 2) }, "register that on demand"),
        (
            VerbsError::WithoutPages { device: device(), part: range(0, PAGE_SIZE) },
            "VerbsPd::register_dmabuf",
        ),
        (
            VerbsError::DmabufAddress { offset: 0x1000, address: hw_model::addr::RegionAddr(8) },
            "the last 12 bits must be the same",
        ),
        (
            VerbsError::WindowsBound { key: hw_model::hca::Key(1), windows: 2 },
            "must be unbound, invalidated or ended before",
        ),
    ];
    for (error, part) in said {
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[test]
fn a_mapping_without_pages_is_found_among_those_that_have_some() {
    let smaps = "7f0000000000-7f0000002000 rw-s 00000000 00:0a 9  /memfd:a (deleted)\nSize: 8 kB\nVmFlags: rd wr sh mr \n\
                 7f0000002000-7f0000003000 rw-s 00000000 00:0b 1  /dmabuf:\nVmFlags: rd wr sh mr pf io de \n\
                 7f0000003000-7f0000004000 rw-p 00000000 00:00 0\nVmFlags: rd wr mr \n";
    let find = |start, len| super::limits::find_without_pages(smaps, range(start, len));
    let without = Some(range(0x7f00_0000_2000, PAGE_SIZE));
    assert_eq!(find(0x7f00_0000_0000, 4 * PAGE_SIZE), without);
    assert_eq!(find(0x7f00_0000_2fff, 1), without);
    assert_eq!(find(0x7f00_0000_0000, 2 * PAGE_SIZE), None);
    assert_eq!(find(0x7f00_0000_3000, PAGE_SIZE), None);
}
