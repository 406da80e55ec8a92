//! The set of intervals of one address space, and the invalidations that run on it.
//!
//! # Who counts what
//!
//! Every interval and every invalidation gets a stamp from one clock, under the registry lock. An invalidation raises the
//! sequence of the intervals that are older than itself. An interval is born with one active count for each overlapping
//! invalidation that is running then. An invalidation that ends takes itself off the table with a second stamp, and
//! lowers the intervals that are older than that one. So each interval is lowered by exactly the invalidations that it
//! was raised by or born into, whenever it came, and one that was removed meanwhile is not met again.

use super::Notify;
use super::interval::{Key, Node, Tree};
use super::seq::{Seq, Sequence};
use crate::fault::Resolutions;
use hw_model::addr::VirtRange;
use hw_model::bus::DmaEpoch;
use hw_model::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use hw_model::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::fmt;
use std::time::{Duration, Instant};

/// Invalidations that can run in one address space at a time; one more waits for room.
pub const MAX_INVALIDATIONS: usize = 64;

/// A waiter looks again after this long even if nobody woke it.
const RECHECK: Duration = Duration::from_millis(10);

/// A point in the order of registrations, begins and ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Stamp(u64);

/// Where a running invalidation stands in the table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    index: usize,
    pub began: Stamp,
}

/// The intervals of one address space.
pub struct Notifiers {
    epoch: Arc<DmaEpoch>,
    registry: Mutex<Registry>,
    /// Invalidations ended, callbacks returned, room in the table: rare enough to share one.
    changed: Condvar,
    next_id: AtomicU64,
    /// Looks at pages that are under way. Invalidations never come there.
    resolutions: Resolutions,
    pub(super) counters: Counters,
}

struct Registry {
    tree: Tree<Member>,
    running: [Option<Running>; MAX_INVALIDATIONS],
    clock: u64,
    /// Threads that wait for `changed`.
    waiting: u32,
}

#[derive(Clone, Copy)]
struct Running {
    range: VirtRange,
}

/// What the tree holds of an interval.
struct Member {
    born: Stamp,
    record: Arc<Record>,
}

/// What a callback needs of an interval. Pinned while one runs.
struct Record {
    owner: Arc<dyn Notify>,
    sequence: Arc<Sequence>,
    /// Walks that hold this record. Changed under the registry lock.
    pins: AtomicU32,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub invalidations: AtomicU64,
    pub bytes: AtomicU64,
    pub drains: AtomicU64,
    pub visits: AtomicU64,
    pub refused: AtomicU64,
}

/// What has happened in one address space since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NotifierStats {
    /// Invalidations begun.
    pub invalidations: u64,
    /// Bytes of address space that they covered.
    pub bytes: u64,
    /// Drains: invalidations that met at least one interval.
    pub drains: u64,
    /// Intervals cleared, over all invalidations.
    pub visits: u64,
    /// Non-blockable invalidations that answered "cannot".
    pub refused: u64,
    /// Intervals registered at the moment.
    pub intervals: u64,
    /// Invalidations running at the moment.
    pub running: u64,
}

impl Notifiers {
    /// An address space without intervals, whose memory is mastered by the engines of `epoch`.
    #[must_use]
    pub fn new(epoch: Arc<DmaEpoch>) -> Arc<Self> {
        Arc::new(Self {
            epoch,
            registry: Mutex::new(Registry {
                tree: Tree::new(),
                running: [None; MAX_INVALIDATIONS],
                clock: 0,
                waiting: 0,
            }),
            changed: Condvar::new(),
            next_id: AtomicU64::new(0),
            resolutions: Resolutions::default(),
            counters: Counters::default(),
        })
    }

    /// Tells `owner` of changes in `range` from now on. Works while invalidations run: those that overlap count as
    /// running on the new interval, and the owner, who has published nothing yet, is not called by them.
    ///
    /// # Panics
    /// If `range` is empty: no region is.
    pub fn register(self: &Arc<Self>, range: VirtRange, owner: Arc<dyn Notify>) -> Interval {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        // All that is allocated is allocated here, before the lock. The number of running invalidations is known only
        // under it, so the sequence starts idle and is raised there.
        let sequence = Arc::new(Sequence::new());
        let record = Arc::new(Record { owner, sequence: Arc::clone(&sequence), pins: AtomicU32::new(0) });
        let member = Member { born: Stamp(0), record: Arc::clone(&record) };
        let mut node = Node::new(range, id, member).expect("an interval holds at least one byte");
        let key = node.key();
        let mut registry = self.registry.lock();
        node.value.born = registry.tick();
        let running = registry.running.iter().flatten().filter(|running| running.range.overlaps(range));
        for _ in running {
            sequence.raise();
        }
        registry.tree.insert(node);
        drop(registry);
        Interval { notifiers: Arc::clone(self), range, key, sequence }
    }

    /// Waits until no invalidation runs on `sequence`, one of an interval of this address space, but at most for about
    /// `timeout`. `None` if one is running still.
    #[must_use]
    pub fn begin_blocking(&self, sequence: &Sequence, timeout: Duration) -> Option<Seq> {
        if let Some(seq) = sequence.begin() {
            return Some(seq);
        }
        let deadline = Instant::now() + timeout;
        let mut registry = self.registry.lock();
        loop {
            if let Some(seq) = sequence.begin() {
                return Some(seq);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            self.wait(&mut registry, left.min(RECHECK));
        }
    }

    /// The epoch of the engines that master this memory.
    #[must_use]
    pub fn epoch(&self) -> &Arc<DmaEpoch> {
        &self.epoch
    }

    /// The looks at pages that are under way in this address space.
    #[must_use]
    pub fn resolutions(&self) -> &Resolutions {
        &self.resolutions
    }

    /// What has happened so far.
    #[must_use]
    pub fn stats(&self) -> NotifierStats {
        let registry = self.registry.lock();
        let counters = &self.counters;
        NotifierStats {
            invalidations: counters.invalidations.load(Ordering::Relaxed),
            bytes: counters.bytes.load(Ordering::Relaxed),
            drains: counters.drains.load(Ordering::Relaxed),
            visits: counters.visits.load(Ordering::Relaxed),
            refused: counters.refused.load(Ordering::Relaxed),
            intervals: registry.tree.len() as u64,
            running: registry.running.iter().flatten().count() as u64,
        }
    }

    /// Takes a place in the table of running invalidations. Waits for room if `may_wait`; else `None` if there is none.
    pub(super) fn enter(&self, range: VirtRange, may_wait: bool) -> Option<Place> {
        let mut registry = self.registry.lock();
        loop {
            if let Some(index) = registry.running.iter().position(Option::is_none) {
                let began = registry.tick();
                registry.running[index] = Some(Running { range });
                return Some(Place { index, began });
            }
            if !may_wait {
                return None;
            }
            self.wait(&mut registry, RECHECK);
        }
    }

    /// The intervals that overlap `range` and are older than `began`.
    pub(super) fn walk(&self, range: VirtRange, began: Stamp) -> Walk<'_> {
        Walk { notifiers: self, range, began, cursor: None, pinned: None }
    }

    /// Takes the invalidation off the table and lowers what it was running on: what was born while it ran, and what is
    /// older, up to the last interval that it `reached` (all there were, unless a callback panicked).
    pub(super) fn leave(&self, range: VirtRange, place: Place, reached: Option<Key>) {
        let mut registry = self.registry.lock();
        let ended = registry.tick();
        registry.running[place.index] = None;
        let mut cursor = None;
        while let Some((key, member)) = registry.next(range, cursor, ended) {
            if member.born > place.began || Some(key) <= reached {
                member.record.sequence.lower();
            }
            cursor = Some(key);
            // Let others in between two intervals: a lock held for the length of a walk is a lock held too long.
            drop(registry);
            registry = self.registry.lock();
        }
        self.wake(&registry);
    }

    fn wait(&self, registry: &mut MutexGuard<'_, Registry>, timeout: Duration) {
        registry.waiting += 1;
        self.changed.wait_for(registry, timeout);
        registry.waiting -= 1;
    }

    fn wake(&self, registry: &MutexGuard<'_, Registry>) {
        if registry.waiting > 0 {
            self.changed.notify_all();
        }
    }
}

impl fmt::Debug for Notifiers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Notifiers").field(&self.stats()).finish()
    }
}

impl Registry {
    fn tick(&mut self) -> Stamp {
        self.clock += 1;
        Stamp(self.clock)
    }

    /// The next interval after `cursor` that overlaps `range` and was born before `before`.
    fn next(&self, range: VirtRange, mut cursor: Option<Key>, before: Stamp) -> Option<(Key, &Member)> {
        loop {
            let node = self.tree.next_overlapping(range, cursor)?;
            if node.value.born < before {
                return Some((node.key(), &node.value));
            }
            cursor = Some(node.key());
        }
    }
}

/// One pass over the overlapping intervals, no lock held between steps, the interval in hand pinned.
pub(super) struct Walk<'a> {
    notifiers: &'a Notifiers,
    range: VirtRange,
    began: Stamp,
    cursor: Option<Key>,
    pinned: Option<Arc<Record>>,
}

impl Walk<'_> {
    /// The next owner, its sequence, and where the walk stands with it.
    pub fn next(&mut self) -> Option<(&dyn Notify, &Sequence, Key)> {
        let registry = self.notifiers.registry.lock();
        self.unpin(&registry);
        let (key, member) = registry.next(self.range, self.cursor, self.began)?;
        member.record.pins.fetch_add(1, Ordering::Relaxed);
        self.cursor = Some(key);
        self.pinned = Some(Arc::clone(&member.record));
        drop(registry);
        self.pinned.as_deref().map(|record| (&*record.owner, &*record.sequence, key))
    }

    /// Lets go of the interval in hand. Never the last reference: whoever removes it waits, under the registry lock, for
    /// the pins to go, and holds one himself meanwhile.
    fn unpin(&mut self, registry: &MutexGuard<'_, Registry>) {
        if let Some(record) = self.pinned.take()
            && record.pins.fetch_sub(1, Ordering::Relaxed) == 1
        {
            self.notifiers.wake(registry);
        }
    }
}

impl Drop for Walk<'_> {
    fn drop(&mut self) {
        // Left over only if a callback panicked.
        if self.pinned.is_some() {
            let registry = self.notifiers.registry.lock();
            self.unpin(&registry);
        }
    }
}

/// One range of one owner. Dropping it ends the calls: it waits for callbacks that run on it at the moment, and after it
/// none runs. Drop it when nothing of it is visible to a device or linked any more, without holding the lock that its
/// callbacks take, and not inside one.
#[must_use = "the owner is told of changes while the interval lives"]
pub struct Interval {
    notifiers: Arc<Notifiers>,
    range: VirtRange,
    key: Key,
    sequence: Arc<Sequence>,
}

impl Interval {
    /// The range watched.
    #[must_use]
    pub fn range(&self) -> VirtRange {
        self.range
    }
    /// Starts a fault; see [`Sequence::begin`].
    #[must_use]
    pub fn begin(&self) -> Option<Seq> {
        self.sequence.begin()
    }
    /// Starts a fault, waiting while invalidations run, at most for about `timeout`.
    #[must_use]
    pub fn begin_blocking(&self, timeout: Duration) -> Option<Seq> {
        self.notifiers.begin_blocking(&self.sequence, timeout)
    }
    /// Whether what was seen since `seq` is worthless; see [`Sequence::retry`].
    #[must_use]
    pub fn retry(&self, seq: &Seq) -> bool {
        self.sequence.retry(*seq)
    }
    /// The sequence itself, to be kept beside what it protects.
    #[must_use]
    pub fn sequence(&self) -> Arc<Sequence> {
        Arc::clone(&self.sequence)
    }
    /// The address space that the interval is registered in.
    #[must_use]
    pub fn notifiers(&self) -> &Arc<Notifiers> {
        &self.notifiers
    }
}

impl Drop for Interval {
    fn drop(&mut self) {
        let mut registry = self.notifiers.registry.lock();
        let node = registry.tree.remove(self.key);
        if let Some(node) = &node {
            while node.value.record.pins.load(Ordering::Relaxed) > 0 {
                self.notifiers.wait(&mut registry, RECHECK);
            }
        }
        // Off the tree, no invalidation that runs will find it to lower its sequence; who waits for that must not wait.
        self.sequence.retire();
        self.notifiers.wake(&registry);
        // The lock first: node and owner are freed outside it.
        drop(registry);
        drop(node);
    }
}

impl fmt::Debug for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interval").field("range", &self.range).field("sequence", &self.sequence).finish()
    }
}
