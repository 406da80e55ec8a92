//! Draining DMA by epoch: who is moving a burst at the moment, and when have those that were gone.
//!
//! Invariant 2 of the house: clear in the HCA, drain, then unlink from the IOMMU, then release the page. An engine marks
//! its [`Slot`] busy while it translates and moves one bounded burst, never across a fault wait. An invalidation clears
//! page-list entries, takes a [`Drain`] and polls it: when it is done, every burst that could have read an old entry has
//! ended. No reference count per entry, and nothing here allocates.
//!
//! The engine's side is two plain stores. The order between "slot is busy" and "entry is read" is supplied by the
//! draining side, with one process-wide barrier (membarrier(2), `PRIVATE_EXPEDITED`); where the kernel has none, entering
//! costs a full fence instead.
//!
//! The epoch can also be closed: engines that try to enter are refused until it opens again. The userfaultfd monitor does
//! that around reading an event, because reading is what lets the application's call go on.

use super::barrier;
use crate::sync::Arc;
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use crossbeam::utils::CachePadded;

/// Engines that can be registered with one epoch at a time.
pub const MAX_SLOTS: usize = 64;

/// Who is moving data to or from one memory.
pub struct DmaEpoch {
    /// Odd while busy. The value never repeats, so a drain sees that a burst ended even if the next has begun.
    slots: [CachePadded<AtomicU64>; MAX_SLOTS],
    taken: AtomicU64,
    closed: AtomicU32,
    asymmetric: bool,
    drains: AtomicU64,
}

/// Why [`Slot::enter`] was refused: the epoch is closed. Try again a little later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

impl DmaEpoch {
    /// A new epoch with no engines.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            slots: std::array::from_fn(|_| CachePadded::new(AtomicU64::new(0))),
            taken: AtomicU64::new(0),
            closed: AtomicU32::new(0),
            asymmetric: barrier::register(),
            drains: AtomicU64::new(0),
        })
    }

    /// A slot for one engine, or `None` if [`MAX_SLOTS`] engines have one already.
    #[must_use]
    pub fn register(self: &Arc<Self>) -> Option<Slot> {
        let mut taken = self.taken.load(Ordering::Relaxed);
        loop {
            let index = (!taken).trailing_zeros();
            if index as usize >= MAX_SLOTS {
                return None;
            }
            match self.taken.compare_exchange(taken, taken | 1 << index, Ordering::AcqRel, Ordering::Relaxed)
            {
                Ok(_) => return Some(Slot { epoch: Arc::clone(self), index: index as usize }),
                Err(now) => taken = now,
            }
        }
    }

    /// Starts to wait for all bursts that are under way now. What the caller stored before this call is seen by every
    /// burst that begins after it.
    pub fn drain(&self) -> Drain {
        self.drains.fetch_add(1, Ordering::Relaxed);
        if self.asymmetric {
            barrier::process_wide();
        } else {
            crate::sync::fence(Ordering::SeqCst);
        }
        let mut waiting = 0;
        let mut seen = [0; MAX_SLOTS];
        let taken = self.taken.load(Ordering::Acquire);
        for (index, slot) in self.slots.iter().enumerate() {
            if taken & 1 << index != 0 {
                seen[index] = slot.load(Ordering::Acquire);
                if seen[index] & 1 == 1 {
                    waiting |= 1 << index;
                }
            }
        }
        Drain { waiting, seen }
    }

    /// Refuses new bursts until as many [`DmaEpoch::open`] calls have been made. Bursts under way go on; drain for them.
    pub fn close(&self) {
        self.closed.fetch_add(1, Ordering::SeqCst);
    }

    /// Undoes one [`DmaEpoch::close`].
    pub fn open(&self) {
        let before = self.closed.fetch_sub(1, Ordering::SeqCst);
        assert!(before > 0, "epoch opened more often than closed");
    }

    /// Whether bursts are refused at the moment.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire) > 0
    }

    /// Drains started so far: one an invalidation, however many pages it covers.
    pub fn drain_count(&self) -> u64 {
        self.drains.load(Ordering::Relaxed)
    }

    /// Engines registered at the moment.
    pub fn slot_count(&self) -> u32 {
        self.taken.load(Ordering::Relaxed).count_ones()
    }
}

impl std::fmt::Debug for DmaEpoch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DmaEpoch")
            .field("engines", &self.slot_count())
            .field("closed", &self.is_closed())
            .field("asymmetric", &self.asymmetric)
            .finish_non_exhaustive()
    }
}

/// An engine's place in an epoch. Given back on drop.
#[derive(Debug)]
pub struct Slot {
    epoch: Arc<DmaEpoch>,
    index: usize,
}

impl Slot {
    /// Marks this engine busy. Entries read and memory reached until the guard is dropped are covered by a drain.
    ///
    /// # Errors
    /// [`Closed`] while the epoch is closed.
    pub fn enter(&mut self) -> Result<Busy<'_>, Closed> {
        self.begin()?;
        Ok(Busy { slot: self })
    }

    /// [`Slot::enter`] without a guard, for an engine whose burst is spread over several steps. [`Slot::end`] ends it.
    ///
    /// # Errors
    /// [`Closed`] while the epoch is closed; the slot is not busy then.
    ///
    /// # Panics
    /// If a burst is under way.
    pub fn begin(&mut self) -> Result<(), Closed> {
        let word = &self.epoch.slots[self.index];
        let idle = word.load(Ordering::Relaxed);
        assert!(idle & 1 == 0, "an engine has one burst at a time");
        word.store(idle + 1, Ordering::Relaxed);
        if self.epoch.asymmetric {
            std::sync::atomic::compiler_fence(Ordering::SeqCst);
        } else {
            crate::sync::fence(Ordering::SeqCst);
        }
        // Read after the slot is marked: a closer that drains sees this engine, or this engine sees the door closed.
        if self.epoch.closed.load(Ordering::Acquire) > 0 {
            word.store(idle + 2, Ordering::Release);
            return Err(Closed);
        }
        Ok(())
    }

    /// Ends the burst that [`Slot::begin`] began.
    ///
    /// # Panics
    /// If none is under way.
    pub fn end(&mut self) {
        assert!(self.is_busy(), "ended a burst that had not begun");
        let word = &self.epoch.slots[self.index];
        word.store(word.load(Ordering::Relaxed) + 1, Ordering::Release);
    }

    /// Whether a burst is under way.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.epoch.slots[self.index].load(Ordering::Relaxed) & 1 == 1
    }

    /// The epoch this slot belongs to.
    #[must_use]
    pub fn epoch(&self) -> &Arc<DmaEpoch> {
        &self.epoch
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.is_busy() {
            self.end();
        }
        self.epoch.taken.fetch_and(!(1 << self.index), Ordering::AcqRel);
    }
}

/// A burst under way.
#[derive(Debug)]
pub struct Busy<'a> {
    slot: &'a mut Slot,
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.slot.end();
    }
}

/// The bursts that were under way when a drain began. Poll it until it is done.
#[derive(Clone, Debug)]
pub struct Drain {
    waiting: u64,
    seen: [u64; MAX_SLOTS],
}

impl Drain {
    /// Whether all of them have ended. Never blocks.
    pub fn poll(&mut self, epoch: &DmaEpoch) -> bool {
        let mut left = self.waiting;
        while left != 0 {
            let index = left.trailing_zeros() as usize;
            left &= left - 1;
            if epoch.slots[index].load(Ordering::Acquire) != self.seen[index] {
                self.waiting &= !(1 << index);
            }
        }
        self.waiting == 0
    }
}
