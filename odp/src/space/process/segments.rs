//! Parts of the address space whose pages are ours: we know their frames, and their changes go through us.

use crate::page::Backing;
use hw_model::addr::{PhysAddr, VirtAddr, VirtRange};
use hw_model::bus::ProviderId;
use hw_model::sync::atomic::{AtomicUsize, Ordering};
use hw_model::sync::{Arc, RwLock};

/// Such a part.
pub(super) trait Segment: Send + Sync {
    /// Where it lies.
    fn range(&self) -> VirtRange;
    /// The frames from `at`, in the range, on.
    fn frames(&self, at: VirtAddr) -> Frames;
}

/// Frames of a segment, alike and contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frames {
    pub(super) phys: PhysAddr,
    /// How many, at least 1; may reach past what was asked for, not past the segment.
    pub(super) pages: u64,
    pub(super) backing: Backing,
    pub(super) provider: Option<ProviderId>,
}

/// The segments of one space, disjoint, in ascending order. Read by walks only, never inside a burst or by the monitor.
#[derive(Default)]
pub(super) struct Segments {
    count: AtomicUsize,
    list: RwLock<Vec<Arc<dyn Segment>>>,
}

impl Segments {
    /// Adds one.
    ///
    /// # Errors
    /// The range of one that it overlaps.
    pub(super) fn add(&self, segment: Arc<dyn Segment>) -> Result<(), VirtRange> {
        let range = segment.range();
        let mut list = self.list.write();
        if let Some(other) = list.iter().map(|other| other.range()).find(|other| other.overlaps(range)) {
            return Err(other);
        }
        let at = list.partition_point(|other| other.range().start() < range.start());
        list.insert(at, segment);
        self.count.store(list.len(), Ordering::Release);
        Ok(())
    }

    /// Removes the one at exactly `range`.
    pub(super) fn remove(&self, range: VirtRange) {
        let mut list = self.list.write();
        let removed = list.iter().position(|segment| segment.range() == range).map(|at| list.remove(at));
        self.count.store(list.len(), Ordering::Release);
        drop(list);
        drop(removed);
    }

    /// The segments that overlap `range`, in ascending order.
    pub(super) fn overlapping(&self, range: VirtRange) -> Vec<Arc<dyn Segment>> {
        if self.count.load(Ordering::Acquire) == 0 {
            return Vec::new();
        }
        let list = self.list.read();
        let from = list.partition_point(|segment| segment.range().end() <= range.start());
        list[from..].iter().take_while(|segment| segment.range().overlaps(range)).map(Arc::clone).collect()
    }
}
