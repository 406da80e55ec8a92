//! What is watched, and by what.
//!
//! The kernel splits a mapping where a registration ends, and a process may have only so many mappings (vm.max_map_count):
//! ten thousand watched pages, each registered alone, would take twenty thousand. So what is registered are *extents*, and
//! extents that meet are one. An extent is what a watch asks for, to the page, while there are few: more would keep other
//! users of userfaultfd from their own memory beside it. Once there are [`CROWD`] edges, the ends of further extents are
//! moved outward to the next [`EXTENT`] boundary, where the whole unit lies in the mapping, so that they grow together. An
//! application that drops a page beside a watched one may then wait for the monitor for nothing, some 10 microseconds;
//! nobody is told.
//!
//! A mapping that is put in the place of a watched one is not registered by the kernel. Walks see that (a scanned page
//! says whether it is watched) and have it registered before they report any page of it.

use super::coverage::Coverage;
use super::fork::NotInChildren;
use super::mappings::{Mapping, Mappings};
use super::polled::{self, Polled};
use super::sys;
use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange};
use hw_model::sync::atomic::{AtomicU64, Ordering};
use hw_model::sync::{Arc, Mutex};
use rustix::io::Errno;

/// Watches are rounded outward to multiples of this, once there are many: a huge page.
const EXTENT: u64 = 2 << 20;
/// Edges of extents that are many: a thirtieth of the mappings that a process may have by default.
const CROWD: usize = 2048;

/// The extents of one space.
pub(super) struct Watches {
    userfault: Option<Arc<NotInChildren>>,
    /// All changes are told of, whatever is watched.
    exact: bool,
    mappings: Arc<Mappings>,
    polled: Arc<Polled>,
    /// Taken by watches, their ends, and walks that find something to register. Never by the monitor or an engine.
    coverage: Mutex<Coverage>,
    registrations: AtomicU64,
}

impl Watches {
    pub(super) fn new(
        userfault: Option<Arc<NotInChildren>>,
        exact: bool,
        mappings: Arc<Mappings>,
        polled: Arc<Polled>,
    ) -> Self {
        let registrations = AtomicU64::new(0);
        Self { userfault, exact, mappings, polled, coverage: Mutex::new(Coverage::default()), registrations }
    }

    /// Whether changes of everything are told of.
    pub(super) fn are_exact(&self) -> bool {
        self.exact
    }

    /// Registrations that the kernel was asked for.
    pub(super) fn registrations(&self) -> u64 {
        self.registrations.load(Ordering::Relaxed)
    }

    /// Watches `piece` of `mapping`; the extent to [`Watches::uncover`] later. What cannot be registered is polled.
    pub(super) fn cover(&self, piece: VirtRange, mapping: &Mapping) -> VirtRange {
        let mut fresh = Vec::new();
        let mut coverage = self.coverage.lock();
        let unit = if coverage.edges() < CROWD { PAGE_SIZE } else { EXTENT };
        let extent = extent(piece, mapping, unit.max(mapping.page_size));
        coverage.add(extent, |part| fresh.push(part));
        for part in fresh {
            self.register(part, mapping);
        }
        extent
    }

    /// Watches whatever is or will be mapped in `range`: each mapping from the first walk on that reports a page of it. To be
    /// uncovered as an extent.
    pub(super) fn cover_sparsely(&self, range: VirtRange) {
        self.coverage.lock().add(range, |_| ());
    }

    /// Covers an extent once less.
    pub(super) fn uncover(&self, extent: VirtRange) {
        let mut bare = Vec::new();
        let mut coverage = self.coverage.lock();
        coverage.remove(extent, |part| bare.push(part));
        for part in bare {
            let polled = self.polled.overlapping(part);
            self.polled.remove(part);
            if !polled.iter().any(|record| record.range == part) {
                self.unregister(part);
            }
        }
    }

    /// Registers what is covered of `mapping`, which was found not to be. Whether there was anything to try.
    pub(super) fn renew(&self, mapping: &Mapping, within: VirtRange) -> bool {
        if self.exact && self.userfault.is_none() {
            return false;
        }
        let mut parts = Vec::new();
        let coverage = self.coverage.lock();
        coverage.covered(within, |part| parts.push(part));
        for record in self.polled.overlapping(within) {
            let cut = |part| <[_; 2]>::from(polled::without(part, record.range)).into_iter().flatten();
            parts = parts.into_iter().flat_map(cut).collect();
        }
        for part in &parts {
            self.register(*part, mapping);
        }
        !parts.is_empty()
    }

    /// Ends all registrations: no event comes after. The monitor still runs and reads those that are under way.
    pub(super) fn end_all(&self) {
        let mut parts = Vec::new();
        let coverage = self.coverage.lock();
        coverage.covered(super::frames::user_space(), |part| parts.push(part));
        for part in parts {
            self.unregister(part);
        }
    }

    fn register(&self, part: VirtRange, mapping: &Mapping) {
        let refused = match &self.userfault {
            None if self.exact => return,
            None => Errno::NOSYS,
            Some(userfault) => {
                self.registrations.fetch_add(1, Ordering::Relaxed);
                let register =
                    |range: VirtRange| sys::userfault_register(userfault.fd(), range.start().0, range.len());
                match register(part) {
                    // Too many mappings: the whole of this one needs no split.
                    Err(Errno::NOMEM) => match register(mapping.range) {
                        Ok(()) => return self.polled.remove(part),
                        Err(refused) => refused,
                    },
                    Ok(()) => return self.polled.remove(part),
                    Err(refused) => refused,
                }
            }
        };
        self.polled.insert(part, mapping, refused);
    }

    /// Best effort: what stays registered costs its owner time and nothing else.
    fn unregister(&self, part: VirtRange) {
        let Some(userfault) = &self.userfault else { return };
        let mut mappings = Vec::new();
        if self.mappings.collect(part, &mut mappings).is_err() {
            return;
        }
        for piece in mappings.iter().filter_map(|mapping| mapping.range.intersection(part)) {
            let _ = sys::userfault_unregister(userfault.fd(), piece.start().0, piece.len());
        }
    }
}

/// `piece` of `mapping` with its ends moved outward to multiples of `unit`, where the whole unit is mapped.
fn extent(piece: VirtRange, mapping: &Mapping, unit: u64) -> VirtRange {
    let (start, end) = (piece.start().0 & !(unit - 1), piece.end().0.next_multiple_of(unit));
    let start = if start >= mapping.range.start().0 { start } else { piece.start().0 };
    let end = if end <= mapping.range.end().0 { end } else { piece.end().0 };
    VirtRange::new(VirtAddr(start), end - start).expect("part of a mapping")
}
