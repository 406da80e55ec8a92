//! A process space's side of the exact rung: an invalidation around each call that takes pages away.

use super::exact::{Affected, Bracket, Kind};
use super::frames;
use super::mappings::Mappings;
use super::memory::ProcessMemory;
use super::monitor::{Events, Stopped};
use crate::notifier::{Event, Invalidation, Notifiers};
use hw_model::addr::{VirtAddr, VirtRange};
use hw_model::bus::HostMemory;
use hw_model::sync::Arc;
use hw_model::sync::atomic::Ordering;

/// Ranges that one call is bracketed in. A file mapped in more places takes everything.
const MOST: usize = 16;

/// What the supervisor needs of a space.
pub(super) struct Bracketed {
    pub(super) memory: Arc<ProcessMemory>,
    pub(super) notifiers: Arc<Notifiers>,
    pub(super) mappings: Arc<Mappings>,
    pub(super) events: Arc<Events>,
}

/// Up to [`MOST`] ranges, without the allocator.
struct Ranges {
    found: [Option<VirtRange>; MOST],
    count: usize,
}

impl Ranges {
    fn of(ranges: [Option<VirtRange>; 2]) -> Self {
        let mut found = [None; MOST];
        found[..2].copy_from_slice(&ranges);
        Self { found, count: 2 }
    }

    fn everything() -> Self {
        Self::of([Some(frames::user_space()), None])
    }

    /// Whether there was room.
    fn push(&mut self, range: VirtRange) -> bool {
        let Some(place) = self.found.get_mut(self.count) else { return false };
        *place = Some(range);
        self.count += 1;
        true
    }
}

impl Bracket for Bracketed {
    fn around(&self, kind: Kind, affected: Affected, call: &mut dyn FnMut()) {
        let ranges = self.ranges(affected);
        let mut begun: [Option<Invalidation>; MOST] = [const { None }; MOST];
        let event = match kind {
            Kind::Unmapped | Kind::Moved => Event::Unmap,
            Kind::Removed | Kind::Protected => Event::Clear,
        };
        for (place, range) in begun.iter_mut().zip(ranges.found) {
            *place = range.map(|range| self.notifiers.begin_event(range, event));
        }
        begun.iter_mut().flatten().for_each(Invalidation::wait);
        // No page list leads there any more. Frames that somebody has from elsewhere, or is given by a walk that runs beside
        // this, are good until they are retired: no DMA between.
        let watched = begun.iter().flatten().any(|invalidation| invalidation.visited() > 0);
        let stopped = watched.then(|| Stopped::new(self.memory.epoch()));
        call();
        for range in ranges.found.into_iter().flatten() {
            self.memory.generations.retire(range);
        }
        drop(stopped);
        // After the call: a walk that saw what was mapped before it must not take that for what is there now.
        let counter = match kind {
            Kind::Removed => &self.events.removed,
            Kind::Unmapped => &self.events.unmapped,
            Kind::Moved => &self.events.moved,
            Kind::Protected => &self.events.protected,
        };
        counter.fetch_add(1, Ordering::AcqRel);
        begun.into_iter().flatten().for_each(Invalidation::end);
    }
}

impl Bracketed {
    fn ranges(&self, affected: Affected) -> Ranges {
        let known = match affected {
            Affected::Nothing => Some(Ranges::of([None, None])),
            Affected::Ranges(first, second) => Some(Ranges::of([Some(first), second])),
            Affected::Segment(at) => self.segment(at),
            Affected::File { inode, from, to } => self.file(inode, from, to),
            Affected::Everything => None,
        };
        known.unwrap_or_else(Ranges::everything)
    }

    /// The mappings of the segment that is attached at `at`; `None` if that cannot be found out.
    fn segment(&self, at: VirtAddr) -> Option<Ranges> {
        let first = self.next(at)??;
        let mut end = first.range.end();
        while let Some(next) = self.next(end)? {
            if next.range.start() != end || !next.is_of_same_file(&first) {
                break;
            }
            end = next.range.end();
        }
        let len = end.0.checked_sub(at.0)?;
        Some(Ranges::of([VirtRange::new(at, len), None]))
    }

    /// Where bytes of a file are mapped; `None` if that cannot be found out, or is too much.
    fn file(&self, inode: u64, from: u64, to: u64) -> Option<Ranges> {
        let mut ranges = Ranges { found: [None; MOST], count: 0 };
        let mut at = frames::user_space().start();
        while let Some(mapping) = self.next(at)? {
            if let Some(part) = mapping.part_of_file(inode, from, to)
                && !ranges.push(part)
            {
                return None;
            }
            at = mapping.range.end();
        }
        Some(ranges)
    }

    /// The mapping at `at`, or the next above it; the outer `None` if the kernel cannot be asked without the allocator.
    fn next(&self, at: VirtAddr) -> Option<Option<super::mappings::Mapping>> {
        if self.mappings.can_query() { self.mappings.at_or_above(at).ok() } else { None }
    }
}
