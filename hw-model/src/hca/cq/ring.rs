//! The part of a completion queue that engines fill: the entries, and who is to be told of them.
//!
//! Arming and adding are both done under the queue's lock. So an entry is added either before the arming, and whoever
//! armed finds it in the poll that has to follow (11.4.2.3), or after it, and is an event: none is lost between the two.

use super::moderation::{Moderation, Moderator};
use super::{Cqn, Notify, Overrun};
use crate::hca::events::{AsyncEvent, AsyncEvents, Channel, CompletionEvent, Unacknowledged};
use crate::hca::request::Completion;
use crate::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use crate::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::collections::VecDeque;
use std::time::Duration;

pub(in crate::hca) struct Ring {
    cqn: Cqn,
    entries: Mutex<Entries>,
    ready: AtomicUsize,
    overrun: AtomicBool,
    waiters: AtomicU32,
    arrived: Condvar,
    unacknowledged: Arc<Unacknowledged>,
    moderator: Arc<Moderator>,
    events: Arc<AsyncEvents>,
}

pub(super) struct Entries {
    pub(super) queue: VecDeque<Completion>,
    pub(super) capacity: usize,
    told: Option<Told>,
}

/// Who is told, and when.
struct Told {
    channel: Arc<Channel>,
    cookie: u64,
    armed: Option<Notify>,
    moderation: Moderation,
    /// Completions since the arming that would have been an event.
    held_back: u16,
    /// Counts armings, so that a time that ran for one is not taken for the next.
    arming: u64,
    /// The moderator has it, for this arming or an earlier one.
    held: bool,
}

impl Ring {
    pub(super) fn new(
        cqn: Cqn,
        capacity: u32,
        channel: Option<(Arc<Channel>, u64)>,
        (moderator, events): (Arc<Moderator>, Arc<AsyncEvents>),
    ) -> Self {
        let capacity = capacity as usize;
        let told = channel.map(|(channel, cookie)| Told {
            channel,
            cookie,
            armed: None,
            moderation: Moderation::OFF,
            held_back: 0,
            arming: 0,
            held: false,
        });
        // Small queues never grow again; a large one costs what it holds.
        let queue = VecDeque::with_capacity(capacity.min(4096));
        Self {
            cqn,
            entries: Mutex::new(Entries { queue, capacity, told }),
            ready: AtomicUsize::new(0),
            overrun: AtomicBool::new(false),
            waiters: AtomicU32::new(0),
            arrived: Condvar::new(),
            unacknowledged: Arc::default(),
            moderator,
            events,
        }
    }

    pub(super) fn cqn(&self) -> Cqn {
        self.cqn
    }

    pub(in crate::hca) fn unacknowledged(&self) -> &Unacknowledged {
        &self.unacknowledged
    }

    /// Adds a completion.
    pub(in crate::hca) fn push(self: &Arc<Self>, completion: Completion) -> Result<(), Overrun> {
        let mut entries = self.entries.lock();
        let lost = Overrun { capacity: entries.capacity, lost: Some(completion.id) };
        if self.overrun.load(Ordering::Relaxed) || entries.queue.len() >= entries.capacity {
            let first = !self.overrun.swap(true, Ordering::AcqRel);
            // Who waits for an event is to hear of it too, whatever was waited for.
            self.tell(&mut entries, true, true);
            drop(entries);
            if first {
                self.events.post(AsyncEvent::CqError(self.cqn));
            }
            self.wake();
            return Err(lost);
        }
        let solicited = completion.solicited;
        entries.queue.push_back(completion);
        self.ready.store(entries.queue.len(), Ordering::Release);
        self.tell(&mut entries, solicited, false);
        drop(entries);
        self.wake();
        Ok(())
    }

    /// One more completion: an event, if the queue is armed for it.
    fn tell(self: &Arc<Self>, entries: &mut Entries, solicited: bool, at_once: bool) {
        let Some(told) = &mut entries.told else { return };
        let wanted = match told.armed {
            None => false,
            Some(Notify::Solicited) => solicited,
            Some(Notify::Any) => true,
        };
        if !wanted {
            return;
        }
        told.held_back = told.held_back.saturating_add(1);
        if at_once || told.moderation.is_over(told.held_back) {
            self.fire(told);
        } else {
            self.hold(told);
        }
    }

    /// Has the moderator come back to it.
    fn hold(self: &Arc<Self>, told: &mut Told) {
        if !std::mem::replace(&mut told.held, true) {
            self.moderator.hold(self, told.arming, told.moderation.period);
        }
    }

    fn fire(&self, told: &mut Told) {
        told.armed = None;
        told.held_back = 0;
        let event = CompletionEvent { cq: self.cqn, cookie: told.cookie };
        // Under the queue's lock: a queue that goes takes its events back, and none may come after that.
        told.channel.post(event, &self.unacknowledged);
    }

    /// The time for which an event of that arming was held back is over. One of a later arming waits its own time.
    pub(super) fn time_is_over(self: &Arc<Self>, arming: u64) {
        let Some(told) = &mut self.entries.lock().told else { return };
        told.held = false;
        match told.held_back {
            0 => {}
            _ if told.arming == arming => self.fire(told),
            _ => self.hold(told),
        }
    }

    /// Arms the queue. Whether there is something to poll at this moment, which will be no event.
    pub(super) fn arm(&self, notify: Notify) -> bool {
        let mut entries = self.entries.lock();
        if let Some(told) = &mut entries.told {
            if told.armed.is_none() {
                told.arming += 1;
                told.held_back = 0;
            }
            // Any completion is more than solicited ones: the wider request of two stays (11.4.2.3).
            told.armed = told.armed.max(Some(notify));
        }
        !entries.queue.is_empty() || self.overrun.load(Ordering::Relaxed)
    }

    pub(super) fn moderate(&self, moderation: Moderation) {
        if let Some(told) = &mut self.entries.lock().told {
            told.moderation = moderation;
            if told.held_back > 0 && told.moderation.is_over(told.held_back) {
                self.fire(told);
            }
        }
    }

    /// Another capacity, unless more than that is there. Gives what is there then.
    pub(super) fn resize(&self, capacity: u32) -> Result<(), usize> {
        let mut entries = self.entries.lock();
        let there = entries.queue.len();
        if there > capacity as usize {
            return Err(there);
        }
        entries.capacity = capacity as usize;
        Ok(())
    }

    /// Tells nobody any more, and takes back what was told.
    pub(super) fn forget_channel(&self) {
        let told = self.entries.lock().told.take();
        if let Some(told) = told {
            told.channel.forget(self.cqn);
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock()
    }

    /// What is left was counted under the lock.
    pub(super) fn taken(&self, entries: &Entries) {
        self.ready.store(entries.queue.len(), Ordering::Release);
    }

    /// Sleeps for `nap` at most, unless there is something to poll.
    pub(super) fn sleep(&self, nap: Duration) {
        let mut entries = self.entries.lock();
        self.waiters.fetch_add(1, Ordering::SeqCst);
        if !self.has_news() && !nap.is_zero() {
            self.arrived.wait_for(&mut entries, nap);
        }
        self.waiters.fetch_sub(1, Ordering::SeqCst);
    }

    fn wake(&self) {
        if self.waiters.load(Ordering::SeqCst) > 0 {
            // Taking the lock puts this after a waiter's look at the queue or before it, never between look and sleep.
            drop(self.entries.lock());
            self.arrived.notify_all();
        }
    }

    pub(super) fn has_news(&self) -> bool {
        self.ready.load(Ordering::Acquire) > 0 || self.has_overrun()
    }

    pub(super) fn has_overrun(&self) -> bool {
        self.overrun.load(Ordering::Acquire)
    }

    pub(super) fn len(&self) -> usize {
        self.ready.load(Ordering::Acquire)
    }
}
