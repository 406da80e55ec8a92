//! Lazy invalidation: freed IOVA waits here, and one global flush serves many (drivers/iommu/dma-iommu.c, `queue_iova`).
//!
//! The price is a window: until the flush a device can still reach pages that were unmapped and released. Time comes in
//! as an argument.

use super::Domain;

/// Freed ranges that wait (`IOVA_DEFAULT_FQ_SIZE`).
const DEFAULT_CAPACITY: usize = 256;
/// The longest that one waits, in nanoseconds (`IOVA_DEFAULT_FQ_TIMEOUT`, 10 ms).
const DEFAULT_TIMEOUT_NS: u64 = 10_000_000;

/// The queue of one domain. `T` stands for a freed range: the allocator's token, which must not be given back before the
/// queue hands it out.
#[derive(Debug)]
pub struct FlushQueue<T> {
    waiting: Vec<T>,
    capacity: usize,
    timeout_ns: u64,
    /// When the oldest was queued.
    since_ns: u64,
}

impl<T> Default for FlushQueue<T> {
    fn default() -> Self {
        Self::new(DEFAULT_CAPACITY, DEFAULT_TIMEOUT_NS)
    }
}

impl<T> FlushQueue<T> {
    /// A queue that flushes when `capacity` ranges wait, or one has waited `timeout_ns`.
    ///
    /// # Panics
    /// If `capacity` is 0.
    #[must_use]
    pub fn new(capacity: usize, timeout_ns: u64) -> Self {
        assert!(capacity > 0, "a flush queue holds at least one range");
        Self { waiting: Vec::with_capacity(capacity), capacity, timeout_ns, since_ns: 0 }
    }

    /// Queues a freed range. If that fills the queue, flushes all of `domain` and hands every waiting range to `release`.
    /// Never allocates.
    pub fn push(&mut self, domain: &Domain, range: T, now_ns: u64, release: impl FnMut(T)) {
        if self.waiting.is_empty() {
            self.since_ns = now_ns;
        }
        self.waiting.push(range);
        if self.waiting.len() == self.capacity {
            self.drain(domain, release);
        }
    }

    /// Flushes if the oldest has waited long enough. Gives whether it did.
    pub fn poll(&mut self, domain: &Domain, now_ns: u64, release: impl FnMut(T)) -> bool {
        let due = self.deadline_ns().is_some_and(|deadline| now_ns >= deadline);
        if due {
            self.drain(domain, release);
        }
        due
    }

    /// Flushes and hands out everything, at once.
    pub fn drain(&mut self, domain: &Domain, mut release: impl FnMut(T)) {
        if self.waiting.is_empty() {
            return;
        }
        domain.flush_all();
        for range in self.waiting.drain(..) {
            release(range);
        }
    }

    /// When [`FlushQueue::poll`] next has something to do.
    #[must_use]
    pub fn deadline_ns(&self) -> Option<u64> {
        (!self.waiting.is_empty()).then(|| self.since_ns.saturating_add(self.timeout_ns))
    }

    /// Ranges that wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether no range waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests;
