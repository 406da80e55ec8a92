//! Implicit regions: everything there is and will be behind one key, and only what is used costs anything.

use crate::bed::{Bed, hears_of_drops, space};
use crate::checks::{Counts, PATIENCE, pages_of, protocol_kept, until};
use crate::races::Stop;
use crate::remapped::{Remapped, anywhere};
use anypage::machine::MachineConfig;
use hw_model::addr::{PAGE_SIZE, RegionAddr, VirtAddr, VirtRange, page_bytes};
use hw_model::fault_plan::{FaultPlan, Points};
use hw_model::hca::{OperationCode, Remote, SLOT_BYTES, Sge, Status};
use hw_model::sync::Arc;
use hw_model::sync::atomic::{AtomicBool, Ordering};
use mr::device::{AdviseError, RegisterError};
use mr::{Flush, RegisterOptions};
use odp::fault::Want;
use odp::space::process::ProcessSpace;
use odp::space::{Access, AddressSpace, UserRange};

/// Bytes of what the far end has.
const MIRROR: u64 = 1 << 20;

fn everything(space: &Arc<ProcessSpace>) -> UserRange {
    anywhere(&(Arc::clone(space) as Arc<dyn AddressSpace>), space.addresses())
}

fn bed(space: &Arc<ProcessSpace>, iommu: bool) -> Bed {
    let config = MachineConfig { iommu, ..MachineConfig::default() };
    Bed::with_mirror(space, &everything(space), RegisterOptions::implicit(), &config, MIRROR)
}

/// The far end reads `length` bytes at `va` to `to` of its own region.
fn read_to(bed: &Bed, va: u64, to: u64, length: u32) -> Status {
    let remote = Remote { key: bed.near.region.key(), address: RegionAddr(va) };
    bed.far_does(OperationCode::Read, to, length, remote)
}

fn page(memory: &Remapped, page: u64) -> VirtRange {
    VirtRange::new(memory.range().start().offset(page_bytes(page)), PAGE_SIZE).expect("in it")
}

#[test]
fn one_key_reaches_all_memory_there_is_and_that_which_comes_later() {
    let space = space();
    for iommu in [true, false] {
        let bed = bed(&space, iommu);
        let region = &bed.near.region;
        let idle = region.report();
        assert_eq!(
            (idle.entries, idle.present, idle.children),
            (0, 0, 0),
            "nothing is mapped before it is used"
        );
        assert!(idle.list_bytes < 64 << 10, "{} bytes while nobody uses it", idle.list_bytes);
        // More than two slots, mapped after the registration.
        let pages = 2 * SLOT_BYTES / PAGE_SIZE + 64;
        let memory = Remapped::new(pages);
        bed.mirror.write_at(0, b"here, there").expect("our own memory");
        let places = [0, 5000, 2 * SLOT_BYTES + 40, memory.range().len() - 11];
        for at in places {
            let va = memory.range().start().0 + at;
            assert_eq!(bed.write_to(va, 0, 11), Status::Success, "at {at:#x}");
            assert_eq!(read_to(&bed, va, 4096, 11), Status::Success);
            assert_eq!(bed.far_bytes(4096, 11), b"here, there");
        }
        // Across the boundary of two slots.
        let boundary = (memory.range().start().0 + SLOT_BYTES) & !(SLOT_BYTES - 1);
        assert_eq!(bed.write_to(boundary - 3000, 0, 6000), Status::Success);
        let report = region.report();
        assert!((2..=4).contains(&report.children), "{report:?}");
        assert!(report.counters.page_faults >= 4 && report.counters.page_faults_handled >= 4);
        protocol_kept(&bed.machine, &bed.space).expect("all in order");
    }
}

#[test]
fn a_part_that_has_become_empty_is_given_back_with_all_it_had() {
    if !hears_of_drops("a_part_that_has_become_empty_is_given_back_with_all_it_had") {
        return;
    }
    let space = space();
    let bed = bed(&space, true);
    let memory = Remapped::new(2 * SLOT_BYTES / PAGE_SIZE);
    let (region, before) = (&bed.near.region, Counts::of(&bed.machine, &bed.space));
    for round in 0..3 {
        for at in [0, memory.range().len() - PAGE_SIZE] {
            assert_eq!(
                bed.write_to(memory.range().start().0 + at, 0, 4096),
                Status::Success,
                "round {round}"
            );
        }
        let used = Counts::of(&bed.machine, &bed.space);
        assert_ne!(used, before);
        memory.discard(0, memory.range().page_count());
        assert!(until(|| region.report().children == 0), "{:?}", region.report());
        before.are_back(&bed.machine, &bed.space).expect("keys, IOVA, links and intervals");
    }
    region.deregister();
    protocol_kept(&bed.machine, &bed.space).expect("all in order");
}

/// What would be wrong if this failed: a peer could make us keep something for every address that it names.
#[test]
fn who_names_addresses_at_which_nothing_is_is_refused_and_leaves_nothing_behind() {
    let space = space();
    let mut bed = bed(&space, true);
    let before = Counts::of(&bed.machine, &bed.space);
    for slot in 0..200 {
        // The lowest slots of the address space, where nothing of a process is but perhaps its program.
        let status = bed.write_to(64 + slot * SLOT_BYTES, 0, 8);
        assert_eq!(status, Status::RemoteAccessError);
        assert!(bed.near.region.report().children <= 3, "{:?}", bed.near.region.report());
        bed.reconnect();
    }
    let past = bed.write_to(space.addresses().end().0 - 8, 0, 16);
    assert_eq!(past, Status::RemoteAccessError, "past the last address");
    bed.reconnect();
    before.are_back(&bed.machine, &bed.space).expect("nothing is left of it");
}

#[test]
fn what_is_mapped_at_an_address_that_was_unmapped_is_what_is_reached() {
    if !hears_of_drops("what_is_mapped_at_an_address_that_was_unmapped_is_what_is_reached") {
        return;
    }
    let space = space();
    let bed = bed(&space, true);
    let memory = Remapped::new(16);
    bed.mirror.write_at(0, &[7; 4096]).expect("our own memory");
    for round in 0..20_u64 {
        let va = page(&memory, round % 16).start().0;
        assert_eq!(bed.write_to(va, 0, 100), Status::Success);
        memory.replace(round % 16, 1, true);
        assert_eq!(read_to(&bed, va, 8192, 100), Status::Success);
        assert_eq!(bed.far_bytes(8192, 100), [0; 100], "round {round}: new memory reads as zeroes");
    }
    protocol_kept(&bed.machine, &bed.space).expect("all in order");
}

#[test]
fn advice_makes_the_parts_that_it_needs() {
    let space = space();
    let bed = bed(&space, true);
    let memory = Remapped::new(SLOT_BYTES / PAGE_SIZE + 8);
    let region = &bed.near.region;
    let boundary = (memory.range().start().0 + SLOT_BYTES - 1) & !(SLOT_BYTES - 1);
    let write = Want::Fault(Access::Write);
    let from = boundary - 2 * PAGE_SIZE;
    // Both sides of the boundary, as far as they are this memory.
    let lies = memory.range().contains(VirtRange::new(VirtAddr(from), 4 * PAGE_SIZE).expect("fits"));
    if lies {
        region.advise(from, 4 * PAGE_SIZE, write).expect("mapped");
        assert_eq!((region.report().present, region.report().children), (4, 2));
        assert_eq!(region.counters().page_prefetch, 4);
    }
    let sge = Sge {
        key: region.key(),
        address: RegionAddr(memory.range().start().0),
        length: 3 * PAGE_SIZE as u32,
    };
    bed.near.pd.advise(write, Flush::No, &[sge]).expect("a region on demand");
    assert!(until(|| region.counters().page_prefetch >= 3));
    let nowhere = region.advise(0, 8, write);
    assert!(matches!(nowhere, Err(AdviseError::Pages(_))), "{nowhere:?}");
    region.deregister();
    assert_eq!(region.advise(from, 8, write), Err(AdviseError::Deregistered));
    let elsewhere = RegisterOptions { address: Some(RegionAddr(8)), ..RegisterOptions::implicit() };
    let refused = Arc::clone(&bed.near.pd).register(&everything(&space), elsewhere).map(drop);
    assert!(matches!(refused, Err(RegisterError::ImplicitAddress { .. })));
}

/// Found by the simulation: the part was taken down under the region's lock, waiting for bursts.
#[test]
fn a_part_that_gets_no_key_waits_for_no_burst() {
    let plan = FaultPlan::new(0, Vec::new());
    let space = space();
    let config = MachineConfig { points: Points::with(&plan), ..MachineConfig::default() };
    let bed = Bed::with_mirror(&space, &everything(&space), RegisterOptions::implicit(), &config, MIRROR);
    let memory = Remapped::new(1);
    let (at, region) = (memory.range().start().0, Arc::clone(&bed.near.region));
    let before = Counts::of(&bed.machine, &bed.space);
    let mut engine = space.memory().epoch().register().expect("room for an engine");
    {
        // A burst that lasts as long as this.
        let _burst = engine.enter().expect("nobody closes it");
        let (told, answer) = std::sync::mpsc::channel();
        let advising = std::thread::spawn(move || {
            for nth in 1..100 {
                plan.fail_nth_from_now(nth);
                let advised = region.advise(at, PAGE_SIZE, Want::Fault(Access::Write));
                if matches!(advised, Err(AdviseError::Part(RegisterError::Key(_)))) {
                    break;
                }
            }
            plan.disarm();
            told.send(()).expect("somebody listens");
        });
        answer.recv_timeout(PATIENCE).expect("it waits for the burst");
        advising.join().expect("it does not panic");
    }
    drop(engine);
    memory.discard(0, 1);
    let idle = || {
        bed.machine.near.reclaim();
        bed.near.region.report().children == 0
    };
    assert!(until(idle), "{:?}", bed.near.region.report());
    before.are_back(&bed.machine, &bed.space).expect("nothing is left of the part");
}

/// What would be wrong if this failed: a stream that ends would populate memory of somebody else that lies behind it.
#[test]
fn a_stream_brings_in_nothing_of_the_mappings_beside_the_one_that_it_is_in() {
    let space = space();
    let bed = bed(&space, true);
    const PART: u64 = 256;
    // Neighbours on both sides that may only be read: other mappings, which the kernel cannot make one with the middle.
    let memory = Remapped::new(3 * PART);
    memory.protect(0, PART, false);
    memory.protect(2 * PART, PART, false);
    let present = |part: u64| {
        let range = VirtRange::new(page(&memory, part * PART).start(), page_bytes(PART)).expect("in it");
        pages_of(&*space, range).iter().flatten().count()
    };
    // Forwards over the second half, backwards over the first: reading, which the neighbours would allow.
    for n in 0..PART / 2 {
        for at in [PART + PART / 2 + n, PART + PART / 2 - 1 - n] {
            assert_eq!(read_to(&bed, page(&memory, at).start().0, 0, 4096), Status::Success, "page {at}");
        }
    }
    let region = &bed.near.region;
    assert!(region.counters().pages_ahead > 0, "there was a stream: {:?}", region.counters());
    let device = &bed.machine.near;
    let idle = || device.prefetch_stats().carried_out == device.prefetch_stats().asked;
    assert!(until(idle), "{:?}", device.prefetch_stats());
    assert_eq!((present(0), present(1), present(2)), (0, PART as usize, 0));
    region.deregister();
    protocol_kept(&bed.machine, &bed.space).expect("all in order");
}

/// Parts come and go while faults, invalidations and prefetches run on them, and the region goes in the middle of it.
#[test]
fn parts_that_are_taken_away_while_they_are_faulted_in_are_made_again() {
    if !hears_of_drops("parts_that_are_taken_away_while_they_are_faulted_in_are_made_again") {
        return;
    }
    let space = space();
    let bed = bed(&space, true);
    // In the middle of so much that nobody may have that no stream, however far it is followed ahead, leaves it.
    const GUARD: u64 = 4096;
    let memory = Remapped::new(GUARD + 64 + GUARD);
    memory.replace(0, GUARD, false);
    memory.replace(GUARD + 64, GUARD, false);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = Stop(&over);
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                memory.discard(GUARD, 64);
            }
        });
        for round in 0..400_u64 {
            let va = page(&memory, GUARD + round % 64).start().0;
            assert_eq!(bed.write_to(va, 0, 4096), Status::Success, "round {round}");
        }
    });
    // What the last faults have brought in ahead may come after a drop: dropped until nothing comes any more.
    let empty = || {
        memory.discard(GUARD, 64);
        bed.near.region.report().children == 0
    };
    assert!(until(empty), "{:?}", bed.near.region.report());
    bed.near.region.deregister();
    protocol_kept(&bed.machine, &bed.space).expect("all in order");
}
