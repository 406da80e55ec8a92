//! What only a real process has: a stack, a heap, an allocator, segments, mappings that grow.

use crate::Test;
use crate::device::Device;
use crate::memory;
use crate::process::ProcessWorld;
use crate::world::{Cpu, Kind, Skip, Verdict, World, fill, holds};
use hw_model::addr::{PAGE_SIZE, VirtRange};
use hw_model::sync::Arc;
use odp::space::{AddressSpace, FaultError, Rung};

pub const ALL: &[(&str, Test)] = &[
    ("stack_memory", Test::Process(stack)),
    ("allocator_memory", Test::Process(allocator)),
    ("heap_that_shrinks", Test::Process(heap)),
    ("trimming_while_a_device_moves_data", Test::Process(trimming)),
    ("shmdt_takes_the_segment_away", Test::Process(shmdt)),
    ("mremap_grows_and_shrinks_in_place", Test::Process(mremap_in_place)),
    ("new_memory_at_an_old_address", Test::Process(new_memory_at_an_old_address)),
    ("new_memory_at_an_anchored_address", Test::Process(new_memory_at_an_anchored_address)),
    ("ten_thousand_regions_of_one_page", Test::Process(ten_thousand)),
    ("writes_show_in_dirty_tracking", Test::Process(dirty_tracking)),
];

/// Both sides write and read it.
fn works(world: &ProcessWorld, range: VirtRange, salt: u64) {
    let device = world.device(&[range]);
    device.fill(range, salt);
    assert!(holds(world, range, salt));
    fill(world, range, salt + 1);
    assert!(device.holds(range, salt + 1));
}

fn stack(world: &ProcessWorld) -> Verdict {
    memory::on_the_stack(|range| works(world, range, 1));
    Ok(())
}

fn allocator(world: &ProcessWorld) -> Verdict {
    // Inside the heap, and in a mapping of its own: malloc gives both.
    for bytes in [24 * 1024, 1 << 20] {
        for round in 0..20 {
            memory::on_the_heap(bytes, |range| works(world, range, round));
        }
    }
    Ok(())
}

fn heap(world: &ProcessWorld) -> Verdict {
    memory::above_the_heap(8, |range, shrink| {
        let device = world.device(&[range]);
        device.fill(range, 3);
        assert!(holds(world, range, 3));
        shrink();
        assert_eq!(device.read(range.start()), Err(FaultError::NoMapping { at: range.start() }));
    });
    Ok(())
}

/// The allocator gives memory back (munmap, brk, MADV_DONTNEED) between any two transfers, as it may in the middle of a
/// program's completion handler. If this fails, the program hangs in free.
fn trimming(world: &ProcessWorld) -> Verdict {
    let area = world.map(Kind::Anonymous, 16)?;
    let device = world.device(&[area.range]);
    for round in 0..200 {
        memory::on_the_heap(if round % 2 == 0 { 200 * 1024 } else { 40 * 1024 }, |range| {
            let other = world.device(&[range]);
            other.fill(range, round);
            assert!(holds(world, range, round));
        });
        memory::trim();
        device.fill(area.range, round);
        assert!(holds(world, area.range, round));
    }
    Ok(())
}

fn shmdt(world: &ProcessWorld) -> Verdict {
    let segment = memory::attach(8)?;
    let device = world.device(&[segment]);
    device.fill(segment, 4);
    assert!(holds(world, segment, 4));
    memory::detach(segment);
    assert_eq!(device.read(segment.start()), Err(FaultError::NoMapping { at: segment.start() }));
    Ok(())
}

fn mremap_in_place(world: &ProcessWorld) -> Verdict {
    let area = world.map(Kind::Anonymous, 16)?;
    let small = area.part(0, 8);
    fill(world, small, 5);
    world.unmap(area.part(8, 8));
    let device = world.device(&[small]);
    assert!(device.holds(small, 5));
    assert!(memory::resize(small, 16 * PAGE_SIZE), "there was room just now");
    assert!(device.holds(small, 5), "growing takes nothing away");
    let larger = world.device(&[area.range]);
    larger.fill(area.range, 6);
    assert!(holds(world, area.range, 6));
    assert!(memory::resize(area.range, 8 * PAGE_SIZE));
    let gone = FaultError::NoMapping { at: area.page(8) };
    assert_eq!(larger.read(area.page(8)), Err(gone));
    assert!(larger.holds(small, 6) && device.holds(small, 6));
    Ok(())
}

/// A range is unmapped and something else is mapped there. Whoever goes on with what he was told before gets at it by no
/// frame that he was told of then; a fault, which asks anew, gets at what is there now.
fn new_memory_at_an_old_address(world: &ProcessWorld) -> Verdict {
    let area = world.map(Kind::Anonymous, 16)?;
    let device = world.device(&[area.range]);
    let host = world.space.memory();
    let exact = world.space.rung(area.range) == odp::space::Rung::Exact;
    for round in 1..200 {
        device.fill(area.range, round);
        let old = device.entry(area.page(3)).expect("written").phys;
        world.unmap(area.range);
        world.replace(area.range);
        fill(world, area.range, round + 1000);
        if exact {
            assert!(host.write(old, &[0xee; 8]).is_err(), "an old frame led to new memory");
        }
        assert!(holds(world, area.range, round + 1000), "not one byte has changed");
        assert!(device.holds(area.range, round + 1000));
    }
    Ok(())
}

/// The same where the device was given the memory only for as long as it is mapped: not even a fault gets at what comes.
fn new_memory_at_an_anchored_address(world: &ProcessWorld) -> Verdict {
    let area = world.map(Kind::Anonymous, 16)?;
    let rung = world.space.rung(area.range);
    if rung == Rung::Poll {
        return Err(Skip("nobody tells the poll rung of an unmap".to_owned()));
    }
    for round in 1..100 {
        let anchored = memory::vouched(world, area.range).anchored().expect("mapped");
        let device = Device::open(Arc::clone(anchored.space()), &[area.range]);
        device.fill(area.range, round);
        assert!(holds(world, area.range, round));
        world.discard(area.part(4, 2));
        assert!(device.is_zero(area.part(4, 2)), "what happens within the mapping it follows");
        if rung == Rung::Exact && round % 2 == 0 {
            world.replace(area.range);
        } else {
            world.unmap(area.range);
            world.replace(area.range);
        }
        fill(world, area.range, round + 1000);
        for page in 0..area.pages() {
            let at = area.page(page);
            assert_eq!(device.write(at, 1), Err(FaultError::NoMapping { at }));
            assert_eq!(device.read(at), Err(FaultError::NoMapping { at }));
        }
        assert!(holds(world, area.range, round + 1000), "not one byte has changed");
    }
    Ok(())
}

/// A program that tracks what was written to its memory (userfaultfd's asynchronous write protection and PAGEMAP_SCAN,
/// Documentation/admin-guide/mm/pagemap.rst) finds what a device wrote, as it finds what it wrote itself. If this fails, a
/// checkpoint misses what came in by RDMA.
fn dirty_tracking(world: &ProcessWorld) -> Verdict {
    for kind in [Kind::Anonymous, Kind::Shared] {
        let area = world.map(kind, 16)?;
        fill(world, area.range, 1);
        let tracker = memory::WriteTracker::new(area.range)?;
        // Its userfaultfd has the memory now: ours is refused it, and the memory is on the poll rung, unless it is on the exact.
        let device = world.device(&[area.range]);
        assert_ne!(world.space.rung(area.range), Rung::Events);
        device.fill(area.range, 8);
        assert_eq!(tracker.take(), (0..16).collect::<Vec<_>>(), "{kind:?}");
        assert_eq!(tracker.take(), [0; 0], "nobody has written since");
        world.put(area.page(1), 1);
        for page in [3, 9, 10] {
            device.write(area.page(page), 5).expect("writable");
        }
        assert_eq!(tracker.take(), [1, 3, 9, 10], "{kind:?}");
        assert!(device.read(area.page(3)) == Ok(5) && world.get(area.page(9)) == 5);
        assert_eq!(tracker.take(), [0; 0], "reading is not writing");
    }
    Ok(())
}

/// If this fails, a program with many small regions runs out of mappings (vm.max_map_count).
fn ten_thousand(world: &ProcessWorld) -> Verdict {
    const REGIONS: u64 = 10_000;
    let mappings = || std::fs::read_to_string("/proc/self/maps").expect("maps").lines().count();
    let area = world.map(Kind::Anonymous, 2 * REGIONS + 2)?;
    let before = mappings();
    let watches: Vec<_> =
        (0..REGIONS).map(|n| world.space.watch(area.part(2 * n + 1, 1)).expect("mapped")).collect();
    assert!(mappings() < before + 4096, "{before} mappings became {}", mappings());
    let device = world.device(&[area.part(REGIONS, 8)]);
    device.fill(area.part(REGIONS, 8), 7);
    assert!(holds(world, area.part(REGIONS, 8), 7));
    drop(watches);
    assert_eq!(world.space.stats().watches, 1, "only the device's own is left");
    Ok(())
}
