//! The page-fault event queue: the HCA asks software for pages, software answers by token.
//!
//! A requester's queue pair waits for the answer. A responder does not: it has told its peer to ask again (RNR NAK), and
//! the answer decides what the peer is told next. Either way one side of a queue pair has one event outstanding at most.
//!
//! An event speaks of a work request or of a peer's access, or, if the configuration says so ([`FaultScheme`]), of a range of
//! memory: then queue pairs that meet the same range share an event, and its answer is for all of them.

use super::time::Time;
use crate::addr::RegionAddr;
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use crate::sync::{Condvar, Mutex};
use crate::wire::{Key, Qpn};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Names one page-fault event in the answer to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FaultToken {
    pub(super) qpn: Qpn,
    pub(super) side: FaultKind,
    pub(super) serial: u64,
}

impl FaultToken {
    /// How many events were posted before this one.
    #[must_use]
    pub fn serial(&self) -> u64 {
        self.serial
    }

    /// Whether its event is one by range, whose answer may be for several queue pairs.
    pub(super) fn is_shared(&self) -> bool {
        self.side == FaultKind::ByRange
    }
}

/// Which side of a queue pair met the missing page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultKind {
    /// The requester, in the local memory of one of its own work requests.
    ByWorkRequest,
    /// The responder, in memory that the peer named, or that a receive names.
    ByRemoteAccess,
    /// Any number of queue pairs, of either side, in the same range of memory.
    ByRange,
}

/// What a page-fault event speaks of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum FaultScheme {
    /// Of one side of one queue pair.
    #[default]
    ByRequest,
    /// Of a range of memory, for all queue pairs that meet it before the answer.
    ByRange,
}

/// What the HCA wants to do to the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultAccess {
    /// Read it.
    Read,
    /// Write it.
    Write,
}

/// A page that the HCA needs and its page list does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// For the answer.
    pub token: FaultToken,
    /// The queue pair; of an event by range the first.
    pub qpn: Qpn,
    /// The key of the region.
    pub key: Key,
    /// Which side of the queue pair.
    pub kind: FaultKind,
    /// The first byte that could not be reached.
    pub address: RegionAddr,
    /// Bytes from there to the end of the message in this region, so that all of it can be brought in at once.
    pub length: u64,
    /// What for.
    pub access: FaultAccess,
}

/// What became of a page fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultOutcome {
    /// The pages are in the list, or are worth another try.
    Resolved,
    /// There are no such pages, or not for this access: the request fails.
    Failed,
}

/// The event queue of one HCA.
pub struct FaultQueue {
    state: Mutex<State>,
    arrived: Condvar,
    waiters: AtomicU32,
    serial: AtomicU64,
    depth: usize,
    scheme: FaultScheme,
}

struct State {
    events: VecDeque<PageFault>,
    interrupts: u32,
    /// Events by range that were not answered yet.
    ranges: Vec<Range>,
}

/// An event by range, and who waits for its answer.
struct Range {
    serial: u64,
    key: Key,
    first: RegionAddr,
    length: u64,
    access: FaultAccess,
    waiters: Vec<Waiter>,
}

/// A queue pair that waits for a range.
struct Waiter {
    token: FaultToken,
    /// It asked for all of it, and for as much: what cannot be had is what it needs.
    needs_all: bool,
}

impl Range {
    /// Whether its answer is one for `fault` too.
    fn covers(&self, fault: &PageFault) -> bool {
        let access = self.access == FaultAccess::Write || fault.access == FaultAccess::Read;
        let into = fault.address.0.checked_sub(self.first.0);
        let inside = into.is_some_and(|into| into < self.length && fault.length <= self.length - into);
        self.key == fault.key && access && inside
    }
}

/// That an event was posted, or that one under way serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Posted {
    Event(FaultToken),
    Joined(FaultToken),
}

/// The queue has no room for another event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct QueueFull;

impl FaultQueue {
    pub(super) fn new(depth: u32, scheme: FaultScheme) -> Self {
        let depth = depth as usize;
        Self {
            state: Mutex::new(State {
                events: VecDeque::with_capacity(depth),
                interrupts: 0,
                ranges: Vec::new(),
            }),
            arrived: Condvar::new(),
            waiters: AtomicU32::new(0),
            serial: AtomicU64::new(0),
            depth,
            scheme,
        }
    }

    pub(super) fn post(&self, mut fault: PageFault) -> Result<Posted, QueueFull> {
        let mut state = self.state.lock();
        fault.token.serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let waiter = fault.token;
        if let Some(range) = state.ranges.iter_mut().find(|range| range.covers(&fault)) {
            let needs_all = (range.length, range.access) == (fault.length, fault.access);
            range.waiters.push(Waiter { token: waiter, needs_all });
            return Ok(Posted::Joined(waiter));
        }
        if state.events.len() >= self.depth {
            return Err(QueueFull);
        }
        if self.scheme == FaultScheme::ByRange {
            let PageFault { key, address: first, length, access, .. } = fault;
            let serial = self.serial.fetch_add(1, Ordering::Relaxed);
            let waiters = vec![Waiter { token: waiter, needs_all: true }];
            state.ranges.push(Range { serial, key, first, length, access, waiters });
            fault.kind = FaultKind::ByRange;
            fault.token = FaultToken { side: FaultKind::ByRange, serial, ..waiter };
        }
        state.events.push_back(fault);
        drop(state);
        self.wake();
        Ok(Posted::Event(waiter))
    }

    /// Whom the answer to the event by range `token` is for, and what it says to each: of a range that cannot be had, who asked for
    /// less is told to try again, and asks for that.
    pub(super) fn answered(
        &self,
        token: FaultToken,
        outcome: FaultOutcome,
    ) -> Vec<(FaultToken, FaultOutcome)> {
        let mut state = self.state.lock();
        let at = state.ranges.iter().position(|range| range.serial == token.serial);
        let waiters = at.map_or(Vec::new(), |at| state.ranges.swap_remove(at).waiters);
        let told =
            |waiter: Waiter| (waiter.token, if waiter.needs_all { outcome } else { FaultOutcome::Resolved });
        waiters.into_iter().map(told).collect()
    }

    fn wake(&self) {
        // A waiter announces itself under the lock before it looks and sleeps: either it is seen here, or it sees what
        // was put in before this call.
        if self.waiters.load(Ordering::SeqCst) > 0 {
            drop(self.state.lock());
            self.arrived.notify_one();
        }
    }

    /// The oldest event.
    pub fn next(&self) -> Option<PageFault> {
        self.state.lock().events.pop_front()
    }

    /// The oldest event; sleeps until there is one. `None` after `timeout`, or when interrupted.
    pub fn wait(&self, timeout: Duration) -> Option<PageFault> {
        let end = Instant::now() + timeout;
        let mut state = self.state.lock();
        self.waiters.fetch_add(1, Ordering::SeqCst);
        let event = loop {
            if let Some(event) = state.events.pop_front() {
                break Some(event);
            }
            let left = end.saturating_duration_since(Instant::now());
            if state.interrupts > 0 || left.is_zero() {
                state.interrupts = state.interrupts.saturating_sub(1);
                break None;
            }
            self.arrived.wait_for(&mut state, left);
        };
        self.waiters.fetch_sub(1, Ordering::SeqCst);
        event
    }

    /// Makes one [`FaultQueue::wait`], one under way or the next, return without an event: to tell a handler to stop.
    pub fn interrupt(&self) {
        self.state.lock().interrupts += 1;
        self.wake();
    }

    /// Events posted so far: every [`FaultToken::serial`] is below this.
    #[must_use]
    pub fn posted(&self) -> u64 {
        self.serial.load(Ordering::Relaxed)
    }

    /// Events that wait for software.
    pub fn len(&self) -> usize {
        self.state.lock().events.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl std::fmt::Debug for FaultQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FaultQueue").field("len", &self.len()).field("depth", &self.depth).finish()
    }
}

/// What one side of a queue pair knows of its outstanding fault.
#[derive(Clone, Copy, Debug)]
pub(super) enum FaultWait {
    /// Software has the event.
    Asked(FaultToken),
    /// The queue was full; try again then.
    Unasked { until: Time },
    /// Software said no.
    Denied,
}
