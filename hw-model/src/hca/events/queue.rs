//! A queue of events with a descriptor that is readable while it is not empty.

use crate::sync::{Condvar, Mutex, OnceLock};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{OFlags, fcntl_getfl};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

pub(super) struct EventQueue<T> {
    events: Mutex<Events<T>>,
    arrived: Condvar,
    /// Made when somebody asks for it: most devices of a simulation have none.
    descriptor: OnceLock<OwnedFd>,
}

struct Events<T> {
    queue: VecDeque<T>,
    /// What the descriptor says. It is made under this lock, and says then what the queue says.
    raised: bool,
}

impl<T> EventQueue<T> {
    pub(super) fn new() -> Self {
        let events = Events { queue: VecDeque::new(), raised: false };
        Self { events: Mutex::new(events), arrived: Condvar::new(), descriptor: OnceLock::new() }
    }

    /// The descriptor.
    pub(super) fn descriptor(&self) -> io::Result<BorrowedFd<'_>> {
        if let Some(made) = self.descriptor.get() {
            return Ok(made.as_fd());
        }
        let made = eventfd(0, EventfdFlags::CLOEXEC)?;
        let mut events = self.events.lock();
        let descriptor = self.descriptor.get_or_init(|| made);
        self.follow(&mut events);
        drop(events);
        Ok(descriptor.as_fd())
    }

    /// Makes the descriptor say what the queue says.
    fn follow(&self, events: &mut Events<T>) {
        let Some(descriptor) = self.descriptor.get() else { return };
        let wanted = !events.queue.is_empty();
        if wanted == events.raised {
            return;
        }
        // Neither blocks: the counter is 0 before the write and 1 before the read, as nobody else touches it. A program
        // that does has broken its own descriptor, and a failure here is the least of what follows.
        let done = match wanted {
            true => rustix::io::write(descriptor, &1_u64.to_ne_bytes()),
            false => rustix::io::read(descriptor, &mut [0; 8]),
        };
        if let Err(error) = done {
            tracing::error!(%error, "an event descriptor failed");
        }
        events.raised = wanted;
    }

    /// Adds an event, unless there are `most` already.
    pub(super) fn post(&self, event: T, most: usize) -> bool {
        let mut events = self.events.lock();
        if events.queue.len() >= most {
            return false;
        }
        events.queue.push_back(event);
        self.follow(&mut events);
        drop(events);
        self.arrived.notify_one();
        true
    }

    /// The oldest event. `taken` is told of it before anybody can see that it is gone.
    pub(super) fn take(&self, taken: impl FnOnce(&T)) -> Option<T> {
        let mut events = self.events.lock();
        let event = events.queue.pop_front()?;
        self.follow(&mut events);
        taken(&event);
        Some(event)
    }

    /// Sleeps until there is an event, or `timeout` is over. Whether there is one.
    pub(super) fn wait(&self, timeout: Duration) -> bool {
        let end = Instant::now() + timeout;
        let mut events = self.events.lock();
        while events.queue.is_empty() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            self.arrived.wait_for(&mut events, left);
        }
        true
    }

    /// Takes back the events that are not `kept`.
    pub(super) fn retain(&self, kept: impl FnMut(&T) -> bool) {
        let mut events = self.events.lock();
        events.queue.retain(kept);
        self.follow(&mut events);
    }

    pub(super) fn len(&self) -> usize {
        self.events.lock().queue.len()
    }

    /// Whether the program asked that taking an event does not block (`O_NONBLOCK` of the descriptor).
    pub(super) fn is_nonblocking(&self) -> bool {
        let flags = self.descriptor.get().and_then(|descriptor| fcntl_getfl(descriptor).ok());
        flags.is_some_and(|flags| flags.contains(OFlags::NONBLOCK))
    }
}

/// Whether `descriptor` is readable within `timeout`.
#[cfg(all(test, not(any(loom, shuttle))))]
pub(super) fn readable(descriptor: BorrowedFd<'_>, timeout: Duration) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut watched = [PollFd::from_borrowed_fd(descriptor, PollFlags::IN)];
    let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
    poll(&mut watched, Some(&timeout)).is_ok_and(|ready| ready > 0)
}
