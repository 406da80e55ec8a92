//! Page faults from the device's event to its answer: once for all who want the page, no further than the region, with the
//! rights that the memory has, and seen by everybody who shares the memory.

use crate::bed::{Bed, hears_of_drops, space};
use crate::checks::{protocol_kept, until};
use crate::remapped::{Remapped, SharedFile};
use anypage::machine::{End, Machine, MachineConfig};
use hw_model::addr::{PAGE_SIZE, page_bytes};
use hw_model::hca::{Access, Entry, Remote, SendRequest, Sge, Status, Time};
use hw_model::sync::Arc;
use mr::device::AdviseError;
use mr::device::model::{FaultPolicy, ModelDevice};
use mr::{Device, Flush, RegisterOptions};
use odp::fault::Want;
use odp::prefetch::PrefetchPolicy;
use odp::space::process::OwnedMemory;
use odp::space::{Access as PageAccess, AddressSpace};

const NEVER: FaultPolicy = FaultPolicy { neighbours: 0, prefetch: PrefetchPolicy::Off };

/// Steps both devices' engines until nothing moves, answering no fault.
fn settle(devices: [&Arc<ModelDevice>; 2], now: &mut u64) {
    for _ in 0..1000 {
        *now += 1_000_000;
        for device in devices {
            let _ = device.hca().step_engine(0, Time(*now));
        }
    }
}

/// A far end with a connection of its own to a near end that shares the region of another.
fn second_queue(machine: &Machine, first: &End, memory: &Arc<OwnedMemory>) -> (End, Arc<dyn mr::QueuePair>) {
    let far = End::new(&machine.far, &memory.user_range(), RegisterOptions::pinned()).expect("a region");
    let qp = Arc::clone(&first.pd).create_qp(Arc::clone(&first.cq), 16).expect("a queue pair");
    qp.connect(far.qp.endpoint()).expect("fresh");
    far.qp.connect(qp.endpoint()).expect("fresh");
    (far, qp)
}

#[test]
fn a_page_that_two_queues_want_is_brought_in_once() {
    let space = space();
    let memory = Remapped::new(4);
    let whole = memory.user_range(Arc::clone(&space) as _);
    let config = MachineConfig { threads: false, faults: NEVER, ..MachineConfig::default() };
    let bed = Bed::new(&space, &whole, RegisterOptions::on_demand(), &config);
    let more = Arc::new(OwnedMemory::new(&space, 4 * PAGE_SIZE).expect("memory"));
    let (far, _near) = second_queue(&bed.machine, &bed.near, &more);
    let remote = Remote { key: bed.near.region.key(), address: bed.near.region.address() };
    for end in [&bed.far, &far] {
        let local = [Sge { key: end.region.key(), address: end.region.address(), length: 100 }];
        end.qp.post_send(&SendRequest::write(7, &local, remote)).expect("room");
    }
    let (near_device, mut now) = (&bed.machine.near, 0);
    settle([near_device, &bed.machine.far], &mut now);
    let [first, second] = [(); 2].map(|()| near_device.next_fault().expect("each queue pair has asked"));
    first.run();
    second.run();
    let counters = bed.near.region.counters();
    assert_eq!((counters.page_faults, counters.page_faults_handled), (2, 2));
    assert_eq!((counters.faults_coalesced, counters.entries_published, counters.links), (1, 1, 1));
    settle([near_device, &bed.machine.far], &mut now);
    for end in [&bed.far, &far] {
        let mut done = Vec::new();
        end.cq.poll(&mut done, 4).expect("no overrun");
        assert_eq!(done.iter().map(|done| done.status).collect::<Vec<_>>(), [Status::Success]);
    }
}

#[test]
fn a_fault_brings_in_neighbours_as_far_as_it_was_told() {
    let space = space();
    let memory = Remapped::new(64);
    memory.replace(20, 1, false);
    let whole = memory.user_range(Arc::clone(&space) as _);
    let faults = FaultPolicy { neighbours: 8 * PAGE_SIZE, ..NEVER };
    let config = MachineConfig { faults, ..MachineConfig::default() };
    let bed = Bed::new(&space, &whole, RegisterOptions::on_demand(), &config);
    let first = whole.range().start().page_number() % 8;
    // A page in the middle of an aligned block, all of which can be had.
    assert_eq!(bed.write(page_bytes(12 - first), 8), Status::Success);
    let counters = bed.near.region.counters();
    assert_eq!((counters.entries_published, counters.pages_ahead, counters.syncs), (8, 7, 1));
    // The block with a page that cannot be had: what can be had comes, and the fault does not fail.
    let wanted = if (20 - 1 + first) / 8 == (20 + first) / 8 { 19 } else { 21 };
    assert_eq!(bed.write(page_bytes(wanted), 8), Status::Success);
    assert_eq!(bed.write(page_bytes(20), 8), Status::RemoteAccessError, "nobody may have that one");
}

#[test]
fn a_page_that_may_only_be_read_is_given_for_reading() {
    let space = space();
    let memory = Remapped::new(2);
    let whole = memory.user_range(Arc::clone(&space) as _);
    space.fault(whole.range(), PageAccess::Write, &mut Vec::new()).expect("mapped");
    memory.protect(0, 1, false);
    let config = MachineConfig { faults: NEVER, ..MachineConfig::default() };
    let mut bed = Bed::new(&space, &whole, RegisterOptions::on_demand(), &config);
    assert_eq!(bed.read(0, 100), Status::Success);
    let entry = || Entry::from_bits(bed.near.region.raw_entries().expect("the model shows its list")[0]);
    let before = entry();
    assert!(before.is_valid() && !before.is_writable());
    assert_eq!(bed.write(0, 100), Status::RemoteAccessError);
    bed.reconnect();
    memory.protect(0, 1, true);
    assert_eq!(bed.write(0, 100), Status::Success, "and now it may be written");
    let entry = Entry::from_bits(bed.near.region.raw_entries().expect("the model shows its list")[0]);
    assert!(entry.is_writable());
    protocol_kept(&bed.machine, &bed.space).expect("all in order");
}

/// What would be wrong if this failed: a device's write would be lost when the page cache is written back, or be seen by
/// this process only.
#[test]
fn a_shared_file_that_a_device_writes_is_dirty_and_seen_by_others() {
    let space = space();
    let file = SharedFile::new(4);
    let whole = file.user_range(Arc::clone(&space) as _);
    let bed = Bed::new(&space, &whole, RegisterOptions::on_demand(), &MachineConfig::default());
    let bytes: Vec<u8> = (0..5000_u32).map(|n| (n % 251) as u8 + 1).collect();
    bed.mirror.write_at(3000, &bytes).expect("our own memory");
    assert_eq!(file.dirty_kib(), 0, "clean at first");
    assert_eq!(bed.write(3000, 5000), Status::Success);
    assert_eq!(file.dirty_kib(), 8, "the kernel would drop what the device wrote");
    file.write_back();
    assert_eq!(file.dirty_kib(), 0, "on the disk");
    let seen = std::process::Command::new("cat").stdin(file.reopened()).output().expect("there is cat");
    assert!(seen.stdout[3000..8000] == bytes[..], "another process sees other bytes");
}

#[test]
fn advice_about_pieces_follows_the_rules_of_the_verb() {
    let space = space();
    let memory = Remapped::new(16);
    let whole = memory.user_range(Arc::clone(&space) as _);
    let bed = Bed::new(&space, &whole, RegisterOptions::on_demand(), &MachineConfig::default());
    let (region, pd) = (&bed.near.region, &bed.near.pd);
    let piece = |offset: u64, length: u64| Sge {
        key: region.key(),
        address: region.address().offset(offset),
        length: length as u32,
    };
    let write = Want::Fault(PageAccess::Write);
    for flush in [Flush::Yes, Flush::No] {
        assert_eq!(pd.advise(write, flush, &[]), Err(AdviseError::Nothing));
        let key = hw_model::hca::Key(region.key().0 ^ 1);
        let unknown = [piece(0, 8), Sge { key, ..piece(0, 8) }];
        assert_eq!(pd.advise(write, flush, &unknown), Err(AdviseError::UnknownKey { key }));
        let other = Arc::clone(&bed.machine.near).alloc_pd().expect("a domain");
        let key = region.key();
        assert_eq!(other.advise(write, flush, &[piece(0, 8)]), Err(AdviseError::OtherPd { key }));
        let past = pd.advise(write, flush, &[piece(page_bytes(15), PAGE_SIZE + 1)]);
        let (offset, len, region) = (page_bytes(15), PAGE_SIZE + 1, page_bytes(16));
        assert_eq!(past, Err(AdviseError::OutOfRange { offset, len, region }));
        let pinned = Arc::clone(pd).register(&whole.part(0, 100).expect("in it"), RegisterOptions::pinned());
        let pinned = pinned.expect("a region");
        let sge = Sge { key: pinned.key(), address: pinned.address(), length: 8 };
        assert_eq!(pd.advise(write, flush, &[sge]), Err(AdviseError::NotOnDemand { key: pinned.key() }));
        let options = RegisterOptions::on_demand().with_access(Access::REMOTE_READ);
        let read_only = Arc::clone(pd).register(&whole, options).expect("a region");
        let sge = Sge { key: read_only.key(), address: read_only.address(), length: 8 };
        assert_eq!(pd.advise(write, flush, &[sge]), Err(AdviseError::NotWritable));
        assert_eq!(pd.advise(Want::Fault(PageAccess::Read), flush, &[sge]), Ok(()));
        let hca = bed.machine.near.hca();
        let domain = hca.alloc_pd().expect("a domain");
        let fast = hca.create_fast_key(hw_model::hca::FastKeySpec { pd: domain, max_entries: 1 });
        let key = fast.expect("a key");
        let not_a_region = pd.advise(write, flush, &[Sge { key, ..piece(0, 8) }]);
        assert_eq!(not_a_region, Err(AdviseError::NotARegion { key }));
        hca.destroy_fast_key(key).expect("it is there");
        hca.dealloc_pd(domain).expect("empty");
    }
    assert_eq!(region.report().present, 0, "what is refused does nothing");

    let two = [piece(0, PAGE_SIZE), piece(page_bytes(4) + 5, 2 * PAGE_SIZE)];
    assert_eq!(pd.advise(write, Flush::Yes, &two), Ok(()));
    let counters = region.counters();
    assert_eq!((region.report().present, counters.page_prefetch, counters.page_faults), (4, 4, 0));
    assert_eq!(pd.advise(Want::Snapshot, Flush::Yes, &[piece(0, page_bytes(16))]), Ok(()));
    assert_eq!(region.counters().page_prefetch, 4, "no-fault faults nothing in");
    assert_eq!(pd.advise(write, Flush::No, &[piece(0, page_bytes(16))]), Ok(()));
    assert!(until(|| region.report().present == 16), "later, but it is followed");
    // What cannot be had is nobody's error when nobody waits.
    memory.replace(7, 1, false);
    assert_eq!(region.advise_later(0, page_bytes(16), write), Ok(()));
    assert!(matches!(pd.advise(write, Flush::Yes, &[piece(page_bytes(7), 8)]), Err(AdviseError::Pages(_))));
    region.deregister();
    assert_eq!(region.advise_later(0, 8, write), Err(AdviseError::Deregistered));
}

/// A cold stream in messages of 64 KiB: how many faults it takes, and how many pages came ahead of them.
fn cold_stream(policy: PrefetchPolicy, bytes: u64) -> (u64, u64) {
    let space = space();
    let memory = Remapped::new(bytes / PAGE_SIZE);
    let whole = memory.user_range(Arc::clone(&space) as _);
    let faults = FaultPolicy { neighbours: 0, prefetch: policy };
    let config = MachineConfig { faults, ..MachineConfig::default() };
    let bed = Bed::with_mirror(&space, &whole, RegisterOptions::on_demand(), &config, 64 << 10);
    for at in (0..bytes).step_by(64 << 10) {
        let remote = Remote { key: bed.near.region.key(), address: bed.near.region.address().offset(at) };
        let status = bed.far_does(hw_model::hca::OperationCode::Read, 0, 64 << 10, remote);
        assert_eq!(status, Status::Success);
        // However busy the machine is: what was asked for ahead is there before the stream goes on.
        let settled = || {
            let stats = bed.machine.near.prefetch_stats();
            stats.windows == stats.carried_out + stats.dropped
        };
        assert!(until(settled), "prefetches end");
    }
    protocol_kept(&bed.machine, &bed.space).expect("all in order");
    let counters = bed.near.region.counters();
    assert_eq!(bed.near.region.report().present, bytes / PAGE_SIZE);
    (counters.page_faults, counters.pages_ahead)
}

#[test]
fn a_cold_stream_costs_a_fault_a_window_and_not_a_fault_a_message() {
    if !hears_of_drops("a_cold_stream_costs_a_fault_a_window_and_not_a_fault_a_message") {
        return;
    }
    let bytes = 64 << 20;
    let (faults, ahead) = cold_stream(PrefetchPolicy::Off, bytes);
    assert_eq!((faults, ahead), (bytes / (64 << 10), 0), "off: each message faults");
    let (faults, ahead) = cold_stream(PrefetchPolicy::ADAPTIVE, bytes);
    println!("64 MiB in messages of 64 KiB: {faults} faults, {ahead} pages ahead");
    assert!(faults < 80, "{faults} faults");
    assert!(ahead > bytes / PAGE_SIZE / 2, "{ahead} pages came ahead");
}
