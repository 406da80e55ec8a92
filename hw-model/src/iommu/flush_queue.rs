//! Lazy invalidation: freed IOVA waits here, and one global flush serves many (drivers/iommu/dma-iommu.c, `queue_iova`).
//!
//! The price is a window: until the flush a device can still reach pages that were unmapped and released. Time comes in
//! as an argument of [`FlushQueue::poll`]; what is queued counts as queued when it is first polled for.

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
    /// When the oldest was first polled for.
    since_ns: Option<u64>,
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
        Self { waiting: Vec::with_capacity(capacity), capacity, timeout_ns, since_ns: None }
    }

    /// Queues a freed range. If that fills the queue, calls `flush_all`, which invalidates the whole domain, and hands
    /// every waiting range to `release`. Never allocates.
    pub fn push(&mut self, range: T, flush_all: impl FnOnce(), release: impl FnMut(T)) {
        self.waiting.push(range);
        if self.waiting.len() == self.capacity {
            self.drain(flush_all, release);
        }
    }

    /// Flushes if the oldest has waited long enough. Gives whether it did.
    pub fn poll(&mut self, now_ns: u64, flush_all: impl FnOnce(), release: impl FnMut(T)) -> bool {
        if self.waiting.is_empty() {
            return false;
        }
        let since = *self.since_ns.get_or_insert(now_ns);
        let due = now_ns >= since.saturating_add(self.timeout_ns);
        if due {
            self.drain(flush_all, release);
        }
        due
    }

    /// Flushes and hands out everything, at once.
    pub fn drain(&mut self, flush_all: impl FnOnce(), mut release: impl FnMut(T)) {
        if self.waiting.is_empty() {
            return;
        }
        flush_all();
        self.since_ns = None;
        for range in self.waiting.drain(..) {
            release(range);
        }
    }

    /// When [`FlushQueue::poll`] next has something to do: `None` while nothing waits, 0 if it has not been asked since
    /// something does.
    #[must_use]
    pub fn deadline_ns(&self) -> Option<u64> {
        let since = (!self.waiting.is_empty()).then_some(self.since_ns)?;
        Some(since.map_or(0, |since| since.saturating_add(self.timeout_ns)))
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
