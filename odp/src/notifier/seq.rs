//! The sequence of one interval: how a fault learns that an invalidation overtook it.
//!
//! One word: the sequence number in the high 48 bits, the count of invalidations that run on the interval at the moment
//! in the low 16. A fault takes the word with [`Sequence::begin`] before it looks at the pages and hands it to
//! [`Sequence::retry`] under the owner's lock before it publishes what it saw. [`Sequence::raise`] happens under the same
//! lock, together with hiding what was published. So either the fault published first and the invalidation hides it, or
//! the invalidation raised first and the fault finds the word changed.
//!
//! Kernel: mm/mmu_notifier.c has one odd-or-even number an address space and serialises nested invalidations; a count
//! beside the number lets them overlap freely.

use hw_model::sync::atomic::{AtomicU64, Ordering};

const ACTIVE_BITS: u32 = 16;
const ACTIVE_MASK: u64 = (1 << ACTIVE_BITS) - 1;

/// The sequence word of one interval.
#[derive(Debug)]
pub struct Sequence(AtomicU64);

/// What a fault saw of a [`Sequence`] while no invalidation was running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seq(u64);

impl Sequence {
    /// A sequence on which no invalidation runs.
    pub(super) fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Starts a fault. `None` while an invalidation runs on the interval. What invalidations before it released is seen
    /// by whoever gets a number.
    #[must_use]
    pub fn begin(&self) -> Option<Seq> {
        let word = self.0.load(Ordering::Acquire);
        (word & ACTIVE_MASK == 0).then_some(Seq(word))
    }

    /// Whether an invalidation has begun since `seq` was taken: what was seen since may not be published. To be called
    /// under the owner's lock, the one that [`Notify::clear`](super::Notify::clear) takes, and published under it too.
    #[must_use]
    pub fn retry(&self, seq: Seq) -> bool {
        self.0.load(Ordering::Acquire) != seq.0
    }

    /// Whether an invalidation runs on the interval.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.0.load(Ordering::Acquire) & ACTIVE_MASK != 0
    }

    /// An invalidation begins. Under the owner's lock.
    pub(super) fn raise(&self) {
        let before = self.0.fetch_add((1 << ACTIVE_BITS) + 1, Ordering::AcqRel);
        assert!(before & ACTIVE_MASK != ACTIVE_MASK, "too many invalidations on one interval");
    }

    /// An invalidation has ended: its pages are gone.
    pub(super) fn lower(&self) {
        let before = self.0.fetch_sub(1, Ordering::AcqRel);
        assert!(before & ACTIVE_MASK != 0, "an invalidation ended twice on one interval");
    }
}

impl Sequence {
    /// The interval is gone: nobody will say any more that what runs on it has ended. A fault that waits goes on, to be
    /// told by the owner that there is nothing to publish in.
    pub(super) fn retire(&self) {
        self.0.fetch_and(!ACTIVE_MASK, Ordering::AcqRel);
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_given_only_between_invalidations_and_is_worthless_after_the_next() {
        let sequence = Sequence::new();
        let before = sequence.begin().expect("quiet");
        assert!(!sequence.retry(before));
        sequence.raise();
        sequence.raise();
        assert!(sequence.begin().is_none() && sequence.is_active() && sequence.retry(before));
        sequence.lower();
        assert!(sequence.begin().is_none(), "the second is still running");
        sequence.lower();
        assert!(sequence.retry(before), "both have ended, and what was seen before them is stale");
        let after = sequence.begin().expect("quiet again");
        assert!(!sequence.retry(after));
    }
}

/// Fault against invalidation, every interleaving: `RUSTFLAGS="--cfg loom" cargo test -p odp --release --lib loom`.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use hw_model::sync::outside::{AtomicUsize, Ordering as Count};
    use hw_model::sync::{Arc, Mutex, thread};

    /// Where the retry check stands.
    #[derive(Clone, Copy, PartialEq)]
    enum Check {
        UnderTheLock,
        BeforeTheLock,
    }

    /// A page, its owner's entry for it, and the sequence between them.
    struct World {
        sequence: Sequence,
        /// The frame behind the page; each invalidation replaces it by the next.
        frame: AtomicU64,
        /// What the device would use.
        entry: Mutex<Option<u64>>,
    }

    impl World {
        fn fault(&self, check: Check) {
            let Some(seq) = self.sequence.begin() else { return };
            let seen = self.frame.load(Ordering::Acquire);
            let stale_outside = self.sequence.retry(seq);
            let mut entry = self.entry.lock();
            let stale = if check == Check::UnderTheLock { self.sequence.retry(seq) } else { stale_outside };
            if !stale {
                *entry = Some(seen);
            }
        }

        fn invalidate(&self) {
            {
                let mut entry = self.entry.lock();
                self.sequence.raise();
                *entry = None;
            }
            let gone = self.frame.fetch_add(1, Ordering::AcqRel);
            assert_ne!(*self.entry.lock(), Some(gone), "a stale entry survived the invalidation of its page");
            self.sequence.lower();
            let entry = *self.entry.lock();
            assert!(
                entry.is_none_or(|frame| frame > gone),
                "a stale entry was published after the invalidation"
            );
        }
    }

    fn explore(name: &str, check: Check, faults: usize, invalidations: usize) -> usize {
        let executions = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&executions);
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(move || {
            counter.fetch_add(1, Count::Relaxed);
            let world = Arc::new(World {
                sequence: Sequence::new(),
                frame: AtomicU64::new(1),
                entry: Mutex::new(None),
            });
            let spawn = |run: fn(&World, Check)| {
                let world = Arc::clone(&world);
                thread::spawn(move || run(&world, check))
            };
            let threads: Vec<_> = (0..faults)
                .map(|_| spawn(World::fault))
                .chain((0..invalidations).map(|_| spawn(|world, _| world.invalidate())))
                .collect();
            for thread in threads {
                thread.join().expect("no thread failed");
            }
            let seq = world.sequence.begin().expect("every invalidation has ended");
            assert!(!world.sequence.retry(seq));
            let frame = world.frame.load(Ordering::Acquire);
            assert!(world.entry.lock().is_none_or(|seen| seen == frame), "a stale entry is left");
        });
        let executions = executions.load(Count::Relaxed);
        println!("loom explored {executions} executions of {name}");
        executions
    }

    #[test]
    fn loom_no_entry_survives_an_invalidation() {
        assert!(explore("one fault and two nested invalidations", Check::UnderTheLock, 1, 2) > 0);
        assert!(explore("two faults and one invalidation", Check::UnderTheLock, 2, 1) > 0);
    }

    #[test]
    #[should_panic(expected = "a stale entry")]
    fn loom_catches_a_check_made_before_the_lock() {
        explore("the broken protocol", Check::BeforeTheLock, 1, 1);
    }
}
