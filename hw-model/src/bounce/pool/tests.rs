use super::*;
use crate::bus::{RamMemory, Slot};
use proptest::prelude::*;

fn memory() -> (Arc<RamMemory>, Slot) {
    let memory = RamMemory::new(8 << 20).expect("8 MiB");
    let slot = memory.epoch().register().expect("a slot");
    (memory, slot)
}

fn pool(segments: u64) -> Arc<BouncePool> {
    let config = BounceConfig { size: segments * SEGMENT_SIZE, ..BounceConfig::default() };
    BouncePool::new(config).expect("memory")
}

fn request(origin: u64, len: u64) -> BounceRequest {
    BounceRequest { origin: PhysAddr(origin), len, granule: PAGE_SIZE, trusted: true }
}

/// What the device would read at a physical address of the pool.
fn seen(pool: &BouncePool, phys: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    pool.storage().read(phys - pool.base().0, &mut out).expect("in the pool");
    out
}

#[test]
fn data_goes_in_when_mapped_and_comes_back_when_unmapped() {
    let (memory, mut slot) = memory();
    let burst = slot.enter().expect("open");
    let pool = pool(1);
    memory.write(PhysAddr(0x1234), b"hello, device").expect("RAM");
    let bounce = pool.map(request(0x1234, 13), &*memory, &burst).expect("room");
    assert_eq!(bounce.phys().0 % PAGE_SIZE, 0x234, "it lies in its IO page as the data does");
    assert_eq!(seen(&pool, bounce.phys().0, 13), b"hello, device");

    // The device writes part; the rest comes back as it was.
    pool.storage().write(bounce.phys().0 - pool.base().0, b"HELLO").expect("in the pool");
    let phys = bounce.origin();
    pool.unmap(bounce, &*memory, &burst).expect("RAM is there");
    let mut back = [0; 13];
    memory.read(phys, &mut back).expect("RAM");
    assert_eq!(&back, b"HELLO, device");
    let stats = pool.stats();
    assert_eq!((stats.used, stats.high_water, stats.mapped), (0, 2, 1));
    assert_eq!((stats.bytes_to_device, stats.bytes_to_cpu), (13, 13));
}

#[test]
fn each_sync_copies_its_range_one_way() {
    let (memory, mut slot) = memory();
    let burst = slot.enter().expect("open");
    let pool = pool(1);
    let origin = PhysAddr(0x1f00);
    let bounce = pool.map(request(origin.0, 0x300), &*memory, &burst).expect("room");
    memory.write(origin.offset(0x100), &[1; 16]).expect("RAM");
    assert_eq!(seen(&pool, bounce.phys().0 + 0x100, 16), [0; 16], "not copied before the sync");
    pool.sync_for_device(&bounce, 0x104, 8, &*memory, &burst).expect("in the buffer");
    assert_eq!(seen(&pool, bounce.phys().0 + 0x100, 16), [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]);
    pool.storage().write(bounce.phys().0 - pool.base().0, &[2; 0x300]).expect("in the pool");
    pool.sync_for_cpu(&bounce, 0x200, 0x100, &*memory, &burst).expect("in the buffer");
    let mut back = [0; 0x300];
    memory.read(origin, &mut back).expect("RAM");
    assert!(back[0x200..].iter().all(|byte| *byte == 2) && back[0x110..0x200].iter().all(|byte| *byte == 0));
    let outside = pool.sync_for_cpu(&bounce, 0x2ff, 2, &*memory, &burst).unwrap_err();
    assert_eq!(outside, BounceError::OutOfRange { offset: 0x2ff, len: 2, size: 0x300 });
    assert!(pool.sync_for_device(&bounce, u64::MAX, 2, &*memory, &burst).is_err());
    pool.discard(bounce);
}

/// A device that is not trusted sees the data and zeroes, nothing that lay in the slots before.
#[test]
fn padding_is_zeroed_for_devices_that_are_not_trusted() {
    let (memory, mut slot) = memory();
    let burst = slot.enter().expect("open");
    for trusted in [false, true] {
        let pool = pool(1);
        pool.storage().write(0, &[0xaa; SEGMENT_SIZE as usize]).expect("in the pool");
        memory.write(PhysAddr(0x1100), &[7; 0x100]).expect("RAM");
        let asked = BounceRequest { trusted, ..request(0x1100, 0x100) };
        let bounce = pool.map(asked, &*memory, &burst).expect("room");
        let page = seen(&pool, bounce.phys().page_start().0, PAGE_SIZE as usize);
        let left_over = if trusted { 0xaa } else { 0 };
        assert!(page[..0x100].iter().chain(&page[0x200..]).all(|byte| *byte == left_over));
        assert!(page[0x100..0x200].iter().all(|byte| *byte == 7));
        pool.discard(bounce);
    }
}

#[test]
fn a_buffer_is_at_most_a_segment_with_its_padding() {
    let (memory, mut slot) = memory();
    let burst = slot.enter().expect("open");
    let pool = pool(2);
    let whole = pool.map(request(0x10_0000, SEGMENT_SIZE), &*memory, &burst).expect("a segment");
    let most = SEGMENT_SIZE - 0x10;
    let refused = pool.map(request(0x10_0010, most + 1), &*memory, &burst).unwrap_err();
    assert_eq!(refused, BounceError::Size { len: most + 1, padding: 0x10, most });
    assert!(matches!(pool.map(request(0x1000, 0), &*memory, &burst), Err(BounceError::Size { .. })));
    let second = pool.map(request(0x10_0010, most), &*memory, &burst).expect("the other segment");
    pool.discard(whole);
    pool.discard(second);
}

#[test]
fn exhaustion_names_what_is_there() {
    let (memory, mut slot) = memory();
    let burst = slot.enter().expect("open");
    let pool = pool(1);
    let held: Vec<_> =
        (0..64).map(|page| pool.map(request(page * PAGE_SIZE, 1), &*memory, &burst).expect("room")).collect();
    let full = BounceError::Full { wanted: 2, free: 0, slots: 128, longest: 0 };
    assert_eq!(pool.map(request(0, 1), &*memory, &burst), Err(full));
    for (number, bounce) in held.into_iter().enumerate() {
        if number % 2 == 0 {
            pool.discard(bounce);
        } else {
            // Lost on purpose: the slots between stay taken.
            let Bounce { .. } = bounce;
        }
    }
    let scattered = pool.map(request(0, PAGE_SIZE + 1), &*memory, &burst).unwrap_err();
    assert_eq!(scattered, BounceError::Full { wanted: 4, free: 64, slots: 128, longest: 2 });
    assert_eq!(
        scattered.to_string(),
        "bounce pool full: 4 contiguous slots of 2048 bytes wanted, 64 of 128 are free, 2 of them contiguous"
    );
    assert_eq!(pool.stats().refused, 2);
}

#[test]
fn a_page_that_cannot_be_read_takes_no_slot() {
    let (memory, mut slot) = memory();
    let burst = slot.enter().expect("open");
    let pool = pool(1);
    let beyond = 8 << 20;
    let refused = pool.map(request(beyond - 0x10, 0x20), &*memory, &burst).unwrap_err();
    assert_eq!(refused, BounceError::Memory(MemoryError::Unbacked { at: PhysAddr(beyond) }));
    assert_eq!((pool.stats().used, pool.stats().mapped), (0, 0));
}

proptest! {
    /// Buffers never share an IO page, lie in one segment, and all slots come back.
    #[test]
    fn buffers_are_apart(
        granule_shift in prop_oneof![Just(0_u32), 11..17_u32],
        asks in prop::collection::vec((0..100_000_u64, 1..70_000_u64, any::<bool>()), 1..60),
    ) {
        let (memory, mut slot) = memory();
        let burst = slot.enter().expect("open");
        let pool = pool(4);
        let granule = 1_u64 << granule_shift;
        let mut live: Vec<Bounce> = Vec::new();
        for (origin, len, give_back) in asks {
            if give_back && !live.is_empty() {
                pool.discard(live.swap_remove(origin as usize % live.len()));
            }
            let ask = BounceRequest { origin: PhysAddr(origin), len, granule, trusted: false };
            match pool.map(ask, &*memory, &burst) {
                Ok(bounce) => {
                    prop_assert_eq!(bounce.phys().0 % granule, origin % granule);
                    let unit = granule.max(SLOT_SIZE);
                    let page = |at: u64| at / unit;
                    let (first, last) = (bounce.phys().0, bounce.phys().0 + len - 1);
                    prop_assert_eq!(first / SEGMENT_SIZE, last / SEGMENT_SIZE);
                    for other in &live {
                        let (start, end) = (other.phys().0, other.phys().0 + other.len() - 1);
                        prop_assert!(page(end) < page(first) || page(last) < page(start), "an IO page is shared");
                    }
                    live.push(bounce);
                }
                Err(BounceError::Full { wanted, free, longest, .. }) => {
                    // Alignment may leave a run unusable that is less than twice as long.
                    prop_assert!(longest < 2 * wanted.max((granule / SLOT_SIZE) as u32) && u64::from(longest) <= free);
                }
                Err(other) => prop_assert!(false, "{other}"),
            }
        }
        for bounce in live {
            pool.discard(bounce);
        }
        prop_assert_eq!(pool.stats().used, 0);
    }
}

#[test]
fn a_parked_buffer_is_found_by_its_first_slot_once_and_is_what_it_was() {
    let (memory, mut slot) = memory();
    let burst = slot.enter().expect("open");
    let pool = pool(2);
    // The first is as long as one can be; the second lies in another segment, deep inside its IO page.
    let asked = [request(0, SEGMENT_SIZE), BounceRequest { granule: 0x1_0000, ..request(0x4_fff0, 0x10) }];
    for request in asked {
        let bounce = pool.map(request, &*memory, &burst).expect("room");
        let (phys, slots) = (bounce.phys(), bounce.slots);
        let start = pool.park(bounce);
        assert_eq!(start.0, phys.0 & !(request.granule - 1));
        assert_eq!(pool.unpark(start.offset(SLOT_SIZE)), None, "not where a buffer begins");
        assert_eq!(
            pool.with_parked(start, |found| (found.phys(), found.origin())),
            Some((phys, request.origin))
        );
        let found = pool.unpark(start).expect("it was parked");
        assert_eq!((found.phys(), found.origin(), found.len()), (phys, request.origin, request.len));
        assert_eq!(found.slots, slots);
        assert_eq!((pool.unpark(start), pool.with_parked(start, |_| ())), (None, None), "found once");
        if request.len == SEGMENT_SIZE {
            pool.park(found);
        } else {
            pool.discard(found);
        }
    }
    assert_eq!(pool.stats().used, 128, "the one that is parked");
    assert_eq!(pool.unpark(PhysAddr(0x1000)), None, "no address of the pool");
    assert_eq!(pool.unpark(pool.base().offset(pool.size())), None, "one past it");
}
