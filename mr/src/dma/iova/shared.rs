//! The IOVA allocator of one I/O address space, shared by every device that the space translates for.

use super::{IovaAllocator, IovaError, IovaRange, IovaRequest, IovaSpace, IovaStats};
use crate::dma::space::IoSpace;
use hw_model::addr::Iova;
use hw_model::iommu::{FlushMode, FlushQueue};
use hw_model::sync::{Arc, Mutex};

/// An allocator that devices share (`struct iommu_dma_cookie`). Lock order: `inner`, then those of the space.
pub(in crate::dma) struct SharedIova {
    inner: Mutex<Inner>,
}

struct Inner {
    allocator: IovaAllocator,
    /// What was given back without being flushed; there if the space flushes lazily.
    unflushed: Option<FlushQueue<IovaRange>>,
}

impl Inner {
    fn give_back(allocator: &mut IovaAllocator, range: IovaRange) {
        allocator.free(range).expect("a mapping gives its range back once");
    }
}

impl SharedIova {
    /// That of `space`, made when its first device comes.
    pub(in crate::dma) fn of(space: &dyn IoSpace) -> Arc<Self> {
        space.cookie().get_or_init(|| {
            let covered = IovaSpace { bits: space.width(), granule_shift: space.granule_shift() };
            let unflushed = (space.flush_mode() == FlushMode::Lazy).then(FlushQueue::default);
            let inner = Inner { allocator: IovaAllocator::new(covered), unflushed };
            let shared = Self { inner: Mutex::new(inner) };
            for (start, len) in space.reserved() {
                shared.keep_out(start, len);
            }
            Arc::new(shared)
        })
    }

    /// Keeps a window out of use. What the space does not hold need not be kept out of it.
    pub(in crate::dma) fn keep_out(&self, start: Iova, len: u64) {
        let kept = self.inner.lock().allocator.reserve(start, len);
        tracing::debug!(?kept, %start, len, "window kept out of the IOVA space");
    }

    /// Allocates; where nothing is free but something waits for a flush, flushes.
    pub(in crate::dma) fn allocate(
        &self,
        request: IovaRequest,
        space: &dyn IoSpace,
    ) -> Result<IovaRange, IovaError> {
        let Inner { allocator, unflushed } = &mut *self.inner.lock();
        let outcome = allocator.allocate(request);
        match unflushed {
            Some(queue) if !queue.is_empty() && matches!(outcome, Err(IovaError::Exhausted { .. })) => {
                queue.drain(|| space.flush_all(), |range| Inner::give_back(allocator, range));
                allocator.allocate(request)
            }
            _ => outcome,
        }
    }

    /// Takes back a range of which every translation was flushed.
    pub(in crate::dma) fn free(&self, range: IovaRange) {
        Inner::give_back(&mut self.inner.lock().allocator, range);
    }

    /// Takes back a range that was unmapped, and is free once everything has been flushed.
    pub(in crate::dma) fn free_unflushed(&self, range: IovaRange, space: &dyn IoSpace) {
        let Inner { allocator, unflushed } = &mut *self.inner.lock();
        let Some(queue) = unflushed else {
            space.flush_all();
            return Inner::give_back(allocator, range);
        };
        queue.push(range, || space.flush_all(), |range| Inner::give_back(allocator, range));
    }

    /// Flushes if what waits has waited long enough at `now_ns`. Gives whether it did.
    pub(in crate::dma) fn poll(&self, now_ns: u64, space: &dyn IoSpace) -> bool {
        let Inner { allocator, unflushed } = &mut *self.inner.lock();
        let give_back = |range| Inner::give_back(allocator, range);
        unflushed.as_mut().is_some_and(|queue| queue.poll(now_ns, || space.flush_all(), give_back))
    }

    pub(in crate::dma) fn stats(&self) -> IovaStats {
        self.inner.lock().allocator.stats()
    }
}
