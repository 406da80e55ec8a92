//! Completion queues and channels as a program uses them: descriptors that are polled, acknowledgements, overrun, resizing.

use crate::world::{Pair, config};
use hw_model::hca::{
    AsyncEvent, CompletionChannel, CqSpec, CreateCqError, HcaConfig, Moderation, Notify, Overrun, QpSpec,
    QpState, ResizeCqError, SendRequest, Status,
};
use hw_model::link::Fabric;
use hw_model::sync::Arc;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

fn is_readable(descriptor: BorrowedFd<'_>) -> bool {
    let mut watched = [PollFd::from_borrowed_fd(descriptor, PollFlags::IN)];
    poll(&mut watched, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).expect("poll(2)") > 0
}

/// A pair whose `a` completes to a queue of `entries` entries with a channel.
fn with_channel(entries: u32) -> (Pair, Arc<CompletionChannel>) {
    let mut pair = Pair::new(config());
    let channel = pair.a.hca.create_channel().expect("a channel");
    let spec = CqSpec { entries, channel: Some(Arc::clone(&channel)), cookie: 77 };
    pair.a.cq = pair.a.hca.create_cq_with(&spec).expect("a queue");
    pair.qa = pair.a.qp();
    pair.qb = pair.b.qp();
    crate::world::connect(&pair.qa, &pair.qb);
    (pair, channel)
}

fn post(pair: &Pair, id: u64) {
    let remote = hw_model::hca::Remote { key: hw_model::hca::Key(1), address: hw_model::addr::RegionAddr(0) };
    // No bytes: no key is looked at.
    pair.qa.post_send(&SendRequest::write(id, &[], remote)).expect("posted");
}

#[test]
fn a_channels_descriptor_is_readable_exactly_while_there_is_an_event() {
    let (mut pair, channel) = with_channel(16);
    assert!(!is_readable(channel.descriptor()));
    post(&pair, 1);
    pair.run_without_faults();
    assert!(!is_readable(channel.descriptor()), "a queue that is not armed is silent");
    assert!(pair.a.cq.arm(Notify::Any), "one completion waits");
    post(&pair, 2);
    post(&pair, 3);
    pair.run_without_faults();
    assert!(is_readable(channel.descriptor()));
    let event = channel.next().expect("there is one");
    assert_eq!((event.cq, event.cookie), (pair.a.cq.number(), 77));
    assert!(!is_readable(channel.descriptor()) && channel.try_next().is_none(), "one arming, one event");
    assert_eq!(pair.a.cq.unacknowledged_events(), 1);
    pair.a.cq.acknowledge_events(1);
    assert_eq!(pair.a.cq.unacknowledged_events(), 0);
    assert_eq!(pair.a.take().len(), 3);
}

#[test]
fn a_descriptor_that_was_made_non_blocking_says_so_instead_of_sleeping() {
    let (pair, channel) = with_channel(16);
    let flags = fcntl_getfl(channel.descriptor()).expect("flags");
    fcntl_setfl(channel.descriptor(), flags | OFlags::NONBLOCK).expect("settable");
    assert_eq!(channel.next().expect_err("nothing is there").kind(), io::ErrorKind::WouldBlock);
    let events = pair.a.hca.events();
    let descriptor = events.descriptor().expect("a descriptor");
    let flags = fcntl_getfl(descriptor).expect("flags");
    fcntl_setfl(descriptor, flags | OFlags::NONBLOCK).expect("settable");
    assert_eq!(events.next().expect_err("nothing is there").kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn one_channel_serves_many_queues_and_forgets_those_that_go() {
    let (mut pair, channel) = with_channel(16);
    let spec = CqSpec { entries: 4, channel: Some(Arc::clone(&channel)), cookie: 78 };
    let other = pair.a.hca.create_cq_with(&spec).expect("a queue");
    let (qa, qb) =
        (pair.a.hca.create_qp(&QpSpec::new(pair.a.pd, &other)).expect("a queue pair"), pair.b.qp());
    crate::world::connect(&qa, &qb);
    pair.a.cq.arm(Notify::Any);
    other.arm(Notify::Any);
    post(&pair, 1);
    let first = std::mem::replace(&mut pair.qa, qa);
    post(&pair, 2);
    pair.run_without_faults();
    assert_eq!(channel.len(), 2);
    // The queue pair goes with what completes to it, and then the queue.
    pair.qa = first;
    drop(other);
    let left: Vec<_> = std::iter::from_fn(|| channel.try_next()).map(|event| event.cookie).collect();
    assert_eq!(left, [77]);
    assert!(!is_readable(channel.descriptor()));
}

#[test]
fn a_queue_and_its_channel_are_of_one_device() {
    let (pair, channel) = with_channel(16);
    let spec = CqSpec { entries: 4, channel: Some(channel), cookie: 0 };
    assert_eq!(pair.b.hca.create_cq_with(&spec).expect_err("foreign"), CreateCqError::OtherDevice);
    drop(spec);
    let before = pair.a.hca.live_objects().channels;
    let channel = pair.a.hca.create_channel().expect("a channel");
    let spec = CqSpec { entries: 4, channel: Some(Arc::clone(&channel)), cookie: 0 };
    let cq = pair.a.hca.create_cq_with(&spec).expect("a queue");
    drop((channel, spec));
    assert_eq!(pair.a.hca.live_objects().channels, before + 1, "the queue holds it");
    drop(cq);
    assert_eq!(pair.a.hca.live_objects().channels, before);
}

#[test]
fn a_queue_keeps_what_it_holds_when_it_is_resized() {
    let (mut pair, _channel) = with_channel(4);
    (0..4).for_each(|id| post(&pair, id));
    pair.run_without_faults();
    let occupied = ResizeCqError::Occupied { entries: 3, there: 4 };
    assert_eq!(pair.a.cq.resize(3), Err(occupied));
    for entries in [0, u32::MAX] {
        let max = pair.a.hca.config().limits.cq_entries;
        assert_eq!(pair.a.cq.resize(entries), Err(ResizeCqError::Size { entries, max }));
    }
    pair.a.cq.resize(8).expect("room");
    assert_eq!(pair.a.cq.capacity(), 8);
    (4..8).for_each(|id| post(&pair, id));
    pair.run_without_faults();
    let ids: Vec<_> = pair.a.take().iter().map(|completion| completion.id.0).collect();
    assert_eq!(ids, [0, 1, 2, 3, 4, 5, 6, 7], "nothing lost, nothing out of order");
    pair.a.cq.resize(1).expect("it is empty");
    post(&pair, 8);
    pair.run_without_faults();
    assert_eq!(pair.a.take().len(), 1);
}

#[test]
fn an_overrun_is_an_event_of_the_device_and_wakes_who_sleeps_on_the_channel() {
    let (mut pair, channel) = with_channel(1);
    pair.a.cq.arm(Notify::Solicited);
    let hca = Arc::clone(&pair.a.hca);
    let descriptor = hca.events().descriptor().expect("a descriptor");
    assert!(!is_readable(descriptor));
    (0..3).for_each(|id| post(&pair, id));
    pair.run_without_faults();
    assert!(is_readable(channel.descriptor()));
    assert!(is_readable(descriptor));
    let number = pair.a.cq.number();
    let events: Vec<_> = std::iter::from_fn(|| pair.a.hca.events().try_next()).collect();
    assert!(events.contains(&AsyncEvent::CqError(number)), "{events:?}");
    assert_eq!(events.iter().filter(|event| **event == AsyncEvent::CqError(number)).count(), 1);
    assert!(!is_readable(descriptor));
    assert_eq!(pair.a.hca.events().unacknowledged(), events.len() as u64);
    pair.a.hca.events().acknowledge(events.len() as u64);
    assert_eq!(pair.a.hca.events().unacknowledged(), 0);
    assert_eq!(pair.qa.state(), QpState::Error);
    let mut out = Vec::new();
    assert_eq!(pair.a.cq.poll(&mut out, 16), Ok(1), "what was there before can still be taken");
    assert_eq!(out[0].status, Status::Success);
    assert_eq!(pair.a.cq.poll(&mut out, 16), Err(Overrun { capacity: 1, lost: None }));
}

/// The engine's own clock lets a held-back event go, though nothing more happens.
#[test]
fn a_moderated_event_comes_when_its_time_is_over() {
    let (mut pair, channel) = with_channel(16);
    pair.a.cq.moderate(Moderation { count: 10, period: 50 });
    pair.a.cq.arm(Notify::Any);
    post(&pair, 1);
    pair.settle();
    assert_eq!((pair.a.cq.len(), channel.len()), (1, 0), "the completion is there, the event waits");
    let before = pair.now;
    pair.run_without_faults();
    assert_eq!(channel.len(), 1);
    assert!(pair.now.0 - before.0 >= 50_000, "the event did not wait its time");
}

/// A thread that sleeps in poll(2) on the descriptor is woken by the engine's thread, many times over.
#[test]
fn a_thread_that_polls_the_descriptor_misses_no_completion() {
    const ROUNDS: u64 = 2_000;
    let fabric = Fabric::new();
    let config = HcaConfig { callers_drive: false, ..HcaConfig::default() };
    let pair = Pair::over(config, Box::new(fabric.port()), Box::new(fabric.port()));
    let threads = [&pair.a, &pair.b].map(|host| host.hca.spawn_engines().expect("threads"));
    let channel = pair.a.hca.create_channel().expect("a channel");
    let spec = CqSpec { entries: 64, channel: Some(Arc::clone(&channel)), cookie: 0 };
    let cq = pair.a.hca.create_cq_with(&spec).expect("a queue");
    let (qa, qb) = (pair.a.hca.create_qp(&QpSpec::new(pair.a.pd, &cq)).expect("a queue pair"), pair.b.qp());
    crate::world::connect(&qa, &qb);
    let remote = hw_model::hca::Remote { key: hw_model::hca::Key(1), address: hw_model::addr::RegionAddr(0) };
    let mut out = Vec::new();
    for round in 0..ROUNDS {
        qa.post_send(&SendRequest::write(round, &[], remote)).expect("posted");
        while (out.len() as u64) <= round {
            cq.arm(Notify::Any);
            if cq.poll(&mut out, 16).expect("no overrun") == 0 {
                let mut watched = [PollFd::from_borrowed_fd(channel.descriptor(), PollFlags::IN)];
                // Running into this is the failure.
                let ready = poll(&mut watched, Some(&Timespec { tv_sec: 120, tv_nsec: 0 })).expect("poll(2)");
                assert_eq!(ready, 1, "a completion was slept over");
                assert!(channel.next_within(Duration::ZERO).is_some(), "readable, and nothing there");
                cq.acknowledge_events(1);
            }
        }
    }
    assert!(out.iter().enumerate().all(|(at, completion)| completion.id.0 == at as u64));
    drop(threads);
}
