//! Windows, device memory, null keys, channels and asynchronous events through the traits that an application uses, over
//! real memory whose pages change.

use crate::bed::{Bed, hears_of_drops, space};
use anypage::machine::MachineConfig;
use hw_model::addr::{PAGE_SIZE, RegionAddr, page_bytes};
use hw_model::hca::{
    Access, AddressVector, AsyncEvent, Completion, DestroyKeyError, Gid, Key, Notify, Operation, QpAddress,
    Remote, SendRequest, Sge, Status, WindowBind, WindowKind,
};
use hw_model::sync::Arc;
use mr::device::{CqOptions, ObjectError};
use mr::{Device, QueuePair, RegisterOptions};
use odp::space::process::OwnedMemory;
use std::time::Duration;

/// A request that takes longer than this never ends.
const PATIENCE: Duration = Duration::from_secs(60);
const PAGES: u64 = 16;

fn bed() -> (Bed, Arc<OwnedMemory>) {
    let space = space();
    let memory = Arc::new(OwnedMemory::new(&space, page_bytes(PAGES)).expect("memory"));
    let access = Access::LOCAL_WRITE | Access::REMOTE_READ | Access::WINDOW_BIND;
    let options = RegisterOptions::on_demand().with_access(access);
    let bed = Bed::new(&space, &memory.user_range(), options, &MachineConfig::default());
    (bed, memory)
}

/// The one completion of a request of the near end.
fn near_ends(bed: &Bed, request: &SendRequest<'_>) -> Completion {
    bed.near.qp.post_send(request).expect("the queue has room");
    let mut ended = Vec::new();
    while bed.near.cq.poll(&mut ended, 1).expect("no overrun") == 0 {
        assert!(bed.near.cq.wait(PATIENCE), "a posted request never ended");
    }
    ended[0]
}

fn far_writes(bed: &Bed, key: Key, address: u64, data: &[u8]) -> Status {
    bed.mirror.write_at(0, data).expect("our own memory");
    let remote = Remote { key, address: RegionAddr(address) };
    bed.far_does(hw_model::hca::OperationCode::Write, 0, data.len() as u32, remote)
}

#[test]
fn a_window_over_an_on_demand_region_follows_its_pages_and_ends_with_it() {
    if !hears_of_drops("a_window_over_an_on_demand_region_follows_its_pages_and_ends_with_it") {
        return;
    }
    let (mut bed, memory) = bed();
    let window = Arc::clone(&bed.near.pd).alloc_window(WindowKind::TwoB).expect("a window");
    assert_eq!(window.kind(), WindowKind::TwoB);
    let bind = WindowBind {
        key: window.key(),
        region: bed.near.region.key(),
        address: bed.near.region.address().offset(PAGE_SIZE),
        length: page_bytes(4),
        access: Access::REMOTE_WRITE | Access::ZERO_BASED,
    };
    let ended = near_ends(&bed, &SendRequest::new(1, Operation::Bind(bind), &[]));
    assert_eq!(ended.status, Status::Success);
    // The region itself may not be written by peers; the window may, and no page of it is there yet.
    for round in 1..6_u8 {
        let data = vec![round; page_bytes(4) as usize];
        assert_eq!(far_writes(&bed, window.key(), 0, &data), Status::Success);
        let mut out = vec![0; data.len()];
        memory.read_at(PAGE_SIZE, &mut out).expect("our own memory");
        assert!(out == data, "round {round}: what the window took is not in the memory of its region");
        memory.discard(PAGE_SIZE, page_bytes(4)).expect("our own memory");
        memory.read_at(PAGE_SIZE, &mut out).expect("our own memory");
        assert!(out.iter().all(|byte| *byte == 0), "dropped");
    }
    let windows = DestroyKeyError::WindowsBound { key: bed.near.region.key(), windows: 1 };
    assert_eq!(bed.near.region.try_deregister(), Err(ObjectError::Refused(windows)));
    assert_eq!(far_writes(&bed, window.key(), 0, &[9]), Status::Success, "a refusal changes nothing");
    bed.near.region.deregister();
    assert_eq!(far_writes(&bed, window.key(), 0, &[8]), Status::RemoteAccessError);
    let mut byte = [0];
    memory.read_at(PAGE_SIZE, &mut byte).expect("our own memory");
    assert_eq!(byte, [9], "the window of a region that is gone moved a byte");
    bed.reconnect();
    assert_eq!(bed.near.region.try_deregister(), Ok(()), "it is gone, which is what was asked for");
    assert_eq!(bed.space.stats().retired_uses, 0, "a stale translation reached memory");
}

#[test]
fn device_memory_and_a_null_key_are_memory_to_work_requests() {
    let (bed, memory) = bed();
    let near = Arc::clone(&bed.machine.near);
    let device_memory = Arc::clone(&near).alloc_device_memory(4096, 0).expect("device memory");
    let access = Access::LOCAL_WRITE | Access::REMOTE_WRITE;
    let pd = || Arc::clone(&bed.near.pd);
    let region = pd().register_device_memory(Arc::clone(&device_memory), access, 0, 4096).expect("a region");
    assert_eq!(far_writes(&bed, region.key(), 16, &[3; 100]), Status::Success);
    let mut out = [0; 102];
    device_memory.copy_from(15, &mut out).expect("in it");
    assert_eq!((out[0], out[101]), (0, 0));
    assert!(out[1..101].iter().all(|byte| *byte == 3));

    // From device memory to the peer, with a hole of zeroes.
    let null = pd().alloc_null().expect("a null key");
    memory.write_at(0, &[5; 8]).expect("our own memory");
    let local = [
        Sge { key: region.key(), address: RegionAddr(16), length: 50 },
        Sge { key: null.key(), address: RegionAddr(1), length: 50 },
        Sge { key: bed.near.region.key(), address: bed.near.region.address(), length: 8 },
    ];
    let remote = Remote { key: bed.far.region.key(), address: bed.far.region.address() };
    bed.mirror.write_at(0, &[7; 200]).expect("our own memory");
    assert_eq!(near_ends(&bed, &SendRequest::write(1, &local, remote)).status, Status::Success);
    let expected = [&[3; 50][..], &[0; 50], &[5; 8], &[7; 92]].concat();
    assert_eq!(bed.far_bytes(0, 200), expected);

    let other = Arc::clone(&bed.machine.far).alloc_device_memory(64, 0).expect("device memory");
    let foreign = pd().register_device_memory(other, access, 0, 64).err();
    assert_eq!(foreign, Some(ObjectError::Foreign { object: "device memory" }));
    drop((region, null, device_memory));
    assert_eq!(near.hca().live_objects().device_memory, 0);
}

#[test]
fn a_program_sleeps_on_a_channel_and_hears_of_each_completion_and_of_an_overrun() {
    let (bed, _memory) = bed();
    let near = || Arc::clone(&bed.machine.near);
    let channel = near().create_channel().expect("a channel");
    let options = CqOptions { entries: 1, channel: Some(Arc::clone(&channel)), cookie: 0xfeed };
    let cq = near().create_cq_with(options.clone()).expect("a queue");
    let qp: Arc<dyn QueuePair> =
        Arc::clone(&bed.near.pd).create_qp(Arc::clone(&cq), 16).expect("a queue pair");
    let own: QpAddress = qp.endpoint();
    qp.connect(own).expect("to itself");
    let remote = Remote { key: Key(1), address: RegionAddr(0) };
    let post = |id| qp.post_send(&SendRequest::write(id, &[], remote)).expect("room");
    let mut ended = Vec::new();
    for id in 0..100 {
        cq.arm(Notify::Any);
        post(id);
        let event = channel.next_within(PATIENCE).expect("an event");
        assert_eq!(event.cookie, 0xfeed);
        cq.acknowledge_events(1);
        assert_eq!(cq.poll(&mut ended, 16), Ok(1));
    }
    assert_eq!(cq.unacknowledged_events(), 0);
    assert!(ended.iter().enumerate().all(|(at, ended)| ended.id.0 == at as u64));
    let events = bed.machine.near.async_events().expect("the model has them");
    assert_eq!(events.next_within(Duration::ZERO), None);
    post(100);
    post(101);
    let event = events.next_within(PATIENCE).expect("an overrun is an event");
    assert!(matches!(event, AsyncEvent::CqError(_)), "{event:?}");
    events.acknowledge(1);
    let foreign = Arc::clone(&bed.machine.far).create_cq_with(options).err();
    assert!(foreign.is_some(), "a channel of another device");
}

#[test]
fn a_device_reports_itself_and_makes_address_handles() {
    let (bed, _memory) = bed();
    let near = &bed.machine.near;
    let said = near.query().expect("the model says");
    assert_eq!(said.max_region, near.attributes().max_region);
    assert_eq!(near.query_gid(1, 0), Ok(near.hca().gid()));
    assert!(near.query_gid(2, 0).is_err() && near.query_pkey(1, 1).is_err());
    assert_eq!(near.query_port(1).expect("the port").pkeys, said.max_pkeys);
    let handle = Arc::clone(&bed.near.pd).create_ah(AddressVector::to(Gid(5))).expect("a handle");
    assert_eq!(handle.vector().gid, Gid(5));
    drop(handle);
    assert_eq!(near.hca().live_objects().ahs, 0);
}
