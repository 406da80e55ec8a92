use super::*;
use crate::hca::events::{AsyncEvents, Channel};
use crate::hca::request::{OperationCode, Status};
use crate::hca::time::Time;
use crate::sync::atomic::{AtomicBool, AtomicU64};
use crate::wire::Qpn;

struct Bed {
    ring: Arc<Ring>,
    channel: Arc<Channel>,
    moderator: Arc<Moderator>,
    events: Arc<AsyncEvents>,
}

fn bed(entries: u32) -> Bed {
    let (channel, moderator, events) =
        (Arc::new(Channel::new()), Arc::new(Moderator::new()), Arc::new(AsyncEvents::new()));
    let shared = (Arc::clone(&moderator), Arc::clone(&events));
    let ring = Arc::new(Ring::new(Cqn(7), entries, Some((Arc::clone(&channel), 42)), shared));
    Bed { ring, channel, moderator, events }
}

impl Bed {
    fn push(&self, id: u64, solicited: bool) {
        let mut completion =
            Completion::new(RequestId(id), Status::Success, OperationCode::Receive, Qpn(2), 0);
        completion.solicited = solicited;
        self.ring.push(completion).expect("room");
    }

    /// Events that can be taken now, and takes them.
    fn events(&self) -> usize {
        std::iter::from_fn(|| self.channel.take())
            .inspect(|event| assert_eq!((event.cq, event.cookie), (Cqn(7), 42)))
            .count()
    }
}

#[test]
fn an_armed_queue_is_one_event_and_then_none_until_it_is_armed_again() {
    let bed = bed(16);
    bed.push(1, false);
    assert_eq!(bed.events(), 0, "not armed");
    assert!(bed.ring.arm(Notify::Any), "there is something to poll already");
    assert_eq!(bed.events(), 0, "what was there before is no event");
    bed.push(2, false);
    bed.push(3, false);
    assert_eq!(bed.events(), 1);
    bed.push(4, false);
    assert_eq!(bed.events(), 0);
    bed.ring.arm(Notify::Any);
    bed.push(5, false);
    assert_eq!(bed.events(), 1);
}

#[test]
fn one_who_waits_for_solicited_completions_hears_of_those_and_of_failures() {
    let bed = bed(16);
    bed.ring.arm(Notify::Solicited);
    bed.push(1, false);
    assert_eq!(bed.events(), 0);
    bed.push(2, true);
    assert_eq!(bed.events(), 1);
    bed.ring.arm(Notify::Solicited);
    let failed = Completion::new(RequestId(3), Status::FlushError, OperationCode::Receive, Qpn(2), 0);
    bed.ring.push(failed).expect("room");
    assert_eq!(bed.events(), 1, "a failure is always one");
    // The wider of two requests stays, whichever came first.
    for [first, second] in [[Notify::Any, Notify::Solicited], [Notify::Solicited, Notify::Any]] {
        bed.ring.arm(first);
        bed.ring.arm(second);
        bed.push(4, false);
        assert_eq!(bed.events(), 1);
    }
}

#[test]
fn an_overrun_is_an_event_of_the_queue_once_and_of_the_device_once() {
    let bed = bed(1);
    bed.push(1, false);
    bed.ring.arm(Notify::Solicited);
    let one_more = Completion::new(RequestId(2), Status::Success, OperationCode::Receive, Qpn(2), 0);
    let lost = Overrun { capacity: 1, lost: Some(RequestId(2)) };
    assert_eq!(bed.ring.push(one_more), Err(lost));
    assert_eq!(bed.ring.push(one_more), Err(lost));
    assert_eq!(bed.events(), 1, "who sleeps is woken");
    assert_eq!(bed.events.try_next(), Some(AsyncEvent::CqError(Cqn(7))));
    assert_eq!(bed.events.try_next(), None);
}

#[test]
fn completions_are_held_back_until_there_are_enough_or_the_time_is_over() {
    let bed = bed(64);
    bed.ring.moderate(Moderation { count: 3, period: 10 });
    bed.ring.arm(Notify::Any);
    bed.push(1, false);
    bed.push(2, false);
    assert_eq!(bed.events(), 0);
    bed.push(3, false);
    assert_eq!(bed.events(), 1, "enough of them");
    // The time that ran for the first arming does not end the second early.
    bed.ring.arm(Notify::Any);
    assert_eq!(bed.moderator.look(Time(0)), Some(Time(10_000)));
    bed.push(4, false);
    assert_eq!(bed.moderator.look(Time(10_000)), Some(Time(20_000)));
    assert_eq!(bed.events(), 0);
    assert_eq!(bed.moderator.look(Time(20_000)), None);
    assert_eq!(bed.events(), 1, "the time is over");
    // Off again, nothing is held; and what is held is let go.
    bed.ring.arm(Notify::Any);
    bed.push(5, false);
    assert_eq!(bed.events(), 0);
    bed.ring.moderate(Moderation::OFF);
    assert_eq!(bed.events(), 1);
    for off in [
        Moderation { count: 9, period: 0 },
        Moderation { count: 0, period: 9 },
        Moderation { count: 1, period: 9 },
    ] {
        bed.ring.moderate(off);
        bed.ring.arm(Notify::Any);
        bed.push(6, false);
        assert_eq!(bed.events(), 1, "{off:?}");
    }
}

#[test]
fn a_queue_that_goes_takes_its_events_back() {
    let bed = bed(16);
    bed.ring.arm(Notify::Any);
    bed.push(1, false);
    bed.ring.forget_channel();
    assert_eq!(bed.events(), 0);
    bed.push(2, false);
    assert!(!bed.channel.is_readable(), "an event that was taken back left the descriptor readable");
}

/// Consumers that sleep on events only, in the order of the specification (arm, poll, sleep), beside producers: were one
/// completion added between a poll and a sleep without an event, the test would never end.
#[test]
fn no_completion_is_slept_over() {
    const EACH: u64 = 20_000;
    let bed = bed(EACH as u32 * 2);
    let taken = AtomicU64::new(0);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for producer in 0..2 {
            let bed = &bed;
            scope.spawn(move || {
                for id in 0..EACH {
                    bed.push(producer << 32 | id, id % 3 == 0);
                    if id % 64 == 0 {
                        std::thread::yield_now();
                    }
                }
            });
        }
        let mut next = [0; 2];
        while taken.load(Ordering::Relaxed) < 2 * EACH {
            bed.ring.arm(Notify::Any);
            let mut entries = bed.ring.lock();
            let count = entries.queue.len();
            for completion in entries.queue.drain(..) {
                let (producer, id) = (completion.id.0 >> 32, completion.id.0 & 0xffff_ffff);
                assert_eq!(std::mem::replace(&mut next[producer as usize], id + 1), id, "out of order");
            }
            bed.ring.taken(&entries);
            drop(entries);
            taken.fetch_add(count as u64, Ordering::Relaxed);
            if count == 0 {
                // Long enough for a loaded machine: running into it is the failure.
                assert!(bed.channel.wait(Duration::from_secs(120)), "a completion was slept over");
                bed.events();
            }
        }
        over.store(true, Ordering::Relaxed);
    });
    assert!(over.into_inner());
}

#[test]
fn a_smaller_queue_keeps_what_it_holds_or_stays_large() {
    let bed = bed(8);
    (0..5).for_each(|id| bed.push(id, false));
    assert_eq!(bed.ring.resize(4), Err(5));
    assert_eq!(bed.ring.resize(5), Ok(()));
    let ids: Vec<_> = bed.ring.lock().queue.iter().map(|completion| completion.id.0).collect();
    assert_eq!(ids, [0, 1, 2, 3, 4]);
    let full = Completion::new(RequestId(5), Status::Success, OperationCode::Receive, Qpn(2), 0);
    assert_eq!(bed.ring.push(full), Err(Overrun { capacity: 5, lost: Some(RequestId(5)) }));
}
