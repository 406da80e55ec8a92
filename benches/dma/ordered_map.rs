//! The IOVA allocator that one would write first: ordered maps of holes by place and by size, best fit, holes joined when
//! ranges come back.

use std::collections::{BTreeMap, BTreeSet};

/// A range that was allocated: first address, bytes.
pub type Range = (u64, u64);

/// The holes of one space.
pub struct OrderedMap {
    by_place: BTreeMap<u64, u64>,
    by_size: BTreeSet<(u64, u64)>,
}

impl OrderedMap {
    /// A space of `size` bytes in one hole.
    pub fn new(size: u64) -> Self {
        Self { by_place: BTreeMap::from([(0, size)]), by_size: BTreeSet::from([(size, 0)]) }
    }

    fn put(&mut self, start: u64, size: u64) {
        self.by_place.insert(start, size);
        self.by_size.insert((size, start));
    }

    fn take(&mut self, start: u64, size: u64) {
        self.by_place.remove(&start);
        self.by_size.remove(&(size, start));
    }

    /// The smallest hole that is large enough, the lowest of several.
    pub fn allocate(&mut self, size: u64) -> Option<Range> {
        let (hole, start) = *self.by_size.range((size, 0)..).next()?;
        self.take(start, hole);
        if hole > size {
            self.put(start + size, hole - size);
        }
        Some((start, size))
    }

    /// Gives a range back.
    pub fn free(&mut self, (mut start, mut size): Range) {
        if let Some((&below, &len)) = self.by_place.range(..start).next_back()
            && below + len == start
        {
            self.take(below, len);
            (start, size) = (below, size + len);
        }
        if let Some(&len) = self.by_place.get(&(start + size)) {
            self.take(start + size, len);
            size += len;
        }
        self.put(start, size);
    }
}
