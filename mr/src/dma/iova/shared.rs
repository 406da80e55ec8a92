//! The IOVA allocator of one I/O address space, shared by every device that the space translates for.

use super::{IovaAllocator, IovaError, IovaRange, IovaRequest, IovaSpace, IovaStats};
use crate::dma::space::IoSpace;
use hw_model::addr::Iova;
use hw_model::sync::{Arc, Mutex};

/// An allocator that devices share (`struct iommu_dma_cookie`).
pub(in crate::dma) struct SharedIova {
    allocator: Mutex<IovaAllocator>,
}

impl SharedIova {
    /// That of `space`, made when its first device comes.
    pub(in crate::dma) fn of(space: &dyn IoSpace) -> Arc<Self> {
        space.cookie().get_or_init(|| {
            let bits = space.width();
            let shared = Self {
                allocator: Mutex::new(IovaAllocator::new(IovaSpace {
                    bits,
                    granule_shift: space.granule_shift(),
                })),
            };
            for (start, len) in space.reserved() {
                shared.keep_out(start, len);
            }
            Arc::new(shared)
        })
    }

    /// Keeps a window out of use. What the space does not hold need not be kept out of it.
    pub(in crate::dma) fn keep_out(&self, start: Iova, len: u64) {
        let kept = self.allocator.lock().reserve(start, len);
        tracing::debug!(?kept, %start, len, "window kept out of the IOVA space");
    }

    pub(in crate::dma) fn allocate(&self, request: IovaRequest) -> Result<IovaRange, IovaError> {
        self.allocator.lock().allocate(request)
    }

    pub(in crate::dma) fn free(&self, range: IovaRange) {
        self.allocator.lock().free(range).expect("a mapping gives its range back once");
    }

    pub(in crate::dma) fn stats(&self) -> IovaStats {
        self.allocator.lock().stats()
    }
}
