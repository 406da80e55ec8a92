//! What a range is made of: mappings and page tables put together into runs.
//!
//! Asking what is mapped and which pages are present are two looks, and the address space changes between them. A walk
//! reports what it saw; whether that still held when it was used, the notifier's sequence decides.
//!
//! What the page tables of an unprivileged process do not tell: whether an anonymous page is shared copy-on-write with a
//! child. Such a page is called writable, and is not populated again where all of a range is asked for. The first write
//! copies it, and the copy is reached by the same virtual address, so the frame stays true.

use super::frames::Generations;
use super::mappings::{Mapping, Mappings, Source};
use super::scan::{Present, Scanner};
use super::segments::{Segment, Segments};
use super::sys::{self, PageIs, Region};
use super::watch::Watches;
use crate::page::{Backing, PageRun};
use crate::space::{Access, FaultError};
use hw_model::addr::{PAGE_SHIFT, PAGE_SIZE, VirtAddr, VirtRange, page_bytes, pages_for};
use hw_model::sync::{Arc, Mutex};
use rustix::io::Errno;

/// Populated and scanned at a time: long enough to make calls cheap, short enough not to lose what was populated to
/// reclaim before it is scanned.
const BATCH: u64 = 16 << 20;
/// Times a batch is populated again because pages went away before they were scanned.
const MAX_ROUNDS: u32 = 16;
/// From here on what is there already is looked for before anything is populated: a scan costs a third of populating what is
/// there, and next to nothing where nothing is. Less is what a device's fault asks for, whose page is not there.
const LOOK_FIRST: u64 = 256 << 10;
/// Populated at least, then; four times as many with each round, so that the sixth has all of a batch.
const MISSING: u64 = 16 << 10;
const HUGE_SHIFT: u8 = 21;
/// Walks at a time that find buffers; one more makes its own.
const WALKS: usize = 4;

/// Buffers that walks use again.
#[derive(Default)]
struct Scratch {
    mappings: Vec<Mapping>,
    regions: Vec<Region>,
    recent: Option<Recent>,
}

/// The mapping that the last write fault met. While all pages in question are watched, it can only have been replaced
/// with an event, and then either the count of changes is another, or an invalidation is about to come and make the walk
/// worthless. What changes without an event is permission; that a page could just be populated for writing answers that.
/// Saves a third of the cost of a fault on one page.
#[derive(Clone, Copy)]
struct Recent {
    mapping: Mapping,
    changes: u64,
}

/// Walks one address space.
pub(super) struct Walker {
    scanner: Scanner,
    mappings: Arc<Mappings>,
    scratch: [Mutex<Scratch>; WALKS],
}

/// What a walk reports to and asks, besides the kernel.
#[derive(Clone, Copy)]
pub(super) struct Surroundings<'a> {
    pub(super) watches: &'a Watches,
    pub(super) segments: &'a Segments,
    pub(super) generations: &'a Generations,
    pub(super) settle: &'a dyn Settle,
    /// Mappings replaced or moved so far, as far as the kernel has told.
    pub(super) changes: u64,
}

/// Who is told of what is mapped before any page of it is reported.
pub(super) trait Settle {
    /// `range` is part of `mapping`. If it was reported as another one, and nobody noticed the change, now is the time.
    fn settle(&self, range: VirtRange, mapping: &Mapping);

    /// `range` is in hugetlb pages. One page is one frame: whoever was at its addresses before may have had pages of 4 KiB
    /// that went one by one.
    fn settle_huge(&self, range: VirtRange);
}

/// The part of a range from `start` to `end`.
fn part(start: VirtAddr, end: VirtAddr) -> VirtRange {
    VirtRange::new(start, end.0 - start.0).expect("part of a range")
}

/// Where a walk ended.
struct Reached {
    /// The first page that is not as wanted, or the end of the range.
    at: VirtAddr,
    /// No page from there to here is as wanted.
    missing_until: VirtAddr,
}

/// What to report of a page.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Want {
    /// It, if it is present.
    Present,
    /// It, present and usable; anything else ends the walk. It was populated just now.
    Usable(Access),
    /// The same of a page that nobody has populated: what populating alone tells does not count as known.
    There(Access),
}

impl Walker {
    pub(super) fn new(scanner: Scanner, mappings: Arc<Mappings>) -> Self {
        Self { scanner, mappings, scratch: Default::default() }
    }

    /// The present pages of `range`.
    pub(super) fn snapshot(
        &self,
        around: Surroundings<'_>,
        range: VirtRange,
        out: &mut Vec<PageRun>,
    ) -> Result<(), FaultError> {
        self.with_scratch(|scratch| self.walk(around, range, Want::Present, scratch, out).map(drop))
    }

    /// Every page of `range`, faulted in.
    pub(super) fn fault(
        &self,
        around: Surroundings<'_>,
        range: VirtRange,
        access: Access,
        out: &mut Vec<PageRun>,
    ) -> Result<(), FaultError> {
        self.with_scratch(|scratch| {
            let mut at = range.start();
            while at < range.end() {
                let bytes = BATCH.min(range.end().0 - at.0);
                let batch = VirtRange::new(at, bytes).expect("part of the range");
                self.batch(around, batch, access, scratch, out)?;
                at = batch.end();
            }
            Ok(())
        })
    }

    fn with_scratch<T>(&self, work: impl FnOnce(&mut Scratch) -> T) -> T {
        match self.scratch.iter().find_map(Mutex::try_lock) {
            Some(mut scratch) => work(&mut scratch),
            None => work(&mut Scratch::default()),
        }
    }

    fn batch(
        &self,
        around: Surroundings<'_>,
        batch: VirtRange,
        access: Access,
        scratch: &mut Scratch,
        out: &mut Vec<PageRun>,
    ) -> Result<(), FaultError> {
        let mut left = batch;
        for round in 0..MAX_ROUNDS {
            let mut missing = left;
            if left.len() >= LOOK_FIRST && self.scanner.is_precise() {
                let there = self.walk(around, left, Want::There(access), scratch, out)?;
                if there.at == batch.end() {
                    return Ok(());
                }
                left = part(there.at, batch.end());
                // More each time, so that what is missing here and there does not take a call each.
                let until = there.missing_until.0.max(there.at.0 + (MISSING << (2 * round)));
                missing = part(there.at, VirtAddr(until.min(batch.end().0)));
            }
            self.populate(missing, access).or_else(|failure| {
                // What lies before the failure is reported as well as can be; the failure is the answer.
                if failure.at() > left.start() {
                    self.walk(around, part(left.start(), failure.at()), Want::Usable(access), scratch, out)?;
                }
                Err(failure)
            })?;
            let reached = self.walk(around, missing, Want::Usable(access), scratch, out)?.at;
            if reached == batch.end() {
                return Ok(());
            }
            left = part(reached, batch.end());
        }
        Err(FaultError::Busy { at: left.start() })
    }

    /// Faults pages in. The error names the first page that failed.
    fn populate(&self, range: VirtRange, access: Access) -> Result<(), FaultError> {
        let mut rounds = 0;
        let errno = loop {
            match sys::populate(range.start().0, range.len(), access == Access::Write) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(errno) => {
                    if let Some(obstacle) = self.obstacle(range, access) {
                        let before = obstacle.at().0 - range.start().0;
                        if before > 0 {
                            let before = VirtRange::new(range.start(), before).expect("part of the range");
                            self.populate(before, access)?;
                        }
                        return Err(obstacle);
                    }
                    // The mappings allow it now; they may have changed since. A page that goes on failing has a reason.
                    rounds += 1;
                    if rounds == MAX_ROUNDS || pages_for(range.len()) > 1 {
                        break errno;
                    }
                }
            }
        };
        let pages = pages_for(range.len());
        if pages > 1 {
            let half = page_bytes(pages / 2);
            let second = range.start().offset(half);
            self.populate(VirtRange::new(range.start(), half).expect("a half"), access)?;
            return self
                .populate(VirtRange::new(second, range.len() - half).expect("the other half"), access);
        }
        let at = range.start();
        Err(match errno {
            // Past the end of a file, a guard page, poison: mapped, and not to be read.
            Errno::FAULT | Errno::HWPOISON => FaultError::NoMapping { at },
            Errno::INVAL => FaultError::Special { at },
            _ => FaultError::OutOfMemory { at },
        })
    }

    /// The first address of `range` whose mapping is not there or does not allow `access`.
    fn obstacle(&self, range: VirtRange, access: Access) -> Option<FaultError> {
        let mut mappings = Vec::new();
        self.mappings.collect(range, &mut mappings).ok()?;
        let mut at = range.start();
        for mapping in &mappings {
            if mapping.range.start() > at {
                break;
            }
            let allowed = match access {
                Access::Read => mapping.readable,
                Access::Write => mapping.writable,
            };
            if !allowed {
                return Some(FaultError::Permission { at, access });
            }
            at = mapping.range.end();
        }
        (at < range.end()).then_some(FaultError::NoMapping { at })
    }

    /// Reports pages up to the first that is not as wanted, or the end.
    fn walk(
        &self,
        around: Surroundings<'_>,
        range: VirtRange,
        want: Want,
        scratch: &mut Scratch,
        out: &mut Vec<PageRun>,
    ) -> Result<Reached, FaultError> {
        let Scratch { mappings, regions, recent } = scratch;
        let known = recent.take().filter(|recent| {
            let same = recent.changes == around.changes && recent.mapping.range.contains(range);
            same && want == Want::Usable(Access::Write) && recent.mapping.writable
        });
        mappings.clear();
        match known {
            Some(known) => mappings.push(known.mapping),
            None => {
                self.mappings.collect(range, mappings).map_err(|_| FaultError::Busy { at: range.start() })?
            }
        }
        let segments = around.segments.overlapping(range);
        let mut at = range.start();
        let mut watched = self.scanner.is_precise() && segments.is_empty();
        for mapping in mappings.iter() {
            if mapping.range.start() > at {
                break;
            }
            // Mappings are asked for one by one, and one that has become part of another meanwhile is met twice: what lies before
            // has been reported.
            let left = part(at, range.end());
            let Some(piece) = mapping.range.intersection(left) else { continue };
            let mut report = Report {
                around,
                mapping,
                segments: &segments,
                want,
                at: piece.start(),
                missing_until: piece.end(),
                must_be_watched: known.is_some(),
                watched: true,
                out,
            };
            if !report.is_owned(piece) {
                around.settle.settle(piece, mapping);
            }
            self.piece(piece, regions, &mut report)?;
            watched &= report.watched;
            at = report.at;
            if want == Want::Present {
                at = piece.end();
            } else if at < piece.end() {
                return Ok(Reached { at, missing_until: report.missing_until });
            }
        }
        if at < range.end() && want == Want::Present {
            return Err(FaultError::NoMapping { at });
        }
        if let [mapping] = **mappings
            && watched
        {
            *recent = Some(Recent { mapping, changes: around.changes });
        }
        Ok(Reached { at, missing_until: range.end() })
    }

    /// Reports the pages of one mapping.
    fn piece(
        &self,
        piece: VirtRange,
        regions: &mut Vec<Region>,
        report: &mut Report<'_>,
    ) -> Result<(), FaultError> {
        // Without precise scans nobody says whether a page is watched: register again, to be sure.
        if !self.scanner.is_precise() && !report.is_owned(piece) {
            report.around.watches.renew(report.mapping, piece);
        }
        for _ in 0..MAX_ROUNDS {
            let left = VirtRange::new(report.at, piece.end().0 - report.at.0).expect("the rest of the piece");
            let mut again = false;
            let scanned = self.scanner.present(left, regions, |present| {
                let watched = report.around.watches.are_exact() || present.is.contains(PageIs::WATCHED);
                report.watched &= watched;
                if !watched && report.must_be_watched {
                    return false;
                }
                if self.scanner.is_precise() && !watched && !report.is_owned(present.range) {
                    // Either nobody wants to be told of it, or a mapping took the place of one that was watched.
                    again = report.around.watches.renew(report.mapping, present.range);
                }
                !again && report.present(present)
            });
            scanned.map_err(|_| FaultError::Busy { at: report.at })?;
            if !again {
                return Ok(());
            }
        }
        Err(FaultError::Busy { at: report.at })
    }
}

/// One mapping on its way into runs.
struct Report<'a> {
    around: Surroundings<'a>,
    mapping: &'a Mapping,
    segments: &'a [Arc<dyn Segment>],
    want: Want,
    /// Everything before has been reported, or is known not to be present.
    at: VirtAddr,
    /// Where the next page that is as wanted may be.
    missing_until: VirtAddr,
    /// The mapping is remembered, and good only for watched pages: stop at any other.
    must_be_watched: bool,
    /// All pages seen so far are.
    watched: bool,
    out: &'a mut Vec<PageRun>,
}

impl Report<'_> {
    /// Whether `range`, of this mapping, is a segment's. No mapping is a segment's in part.
    fn is_owned(&self, range: VirtRange) -> bool {
        self.segments.iter().any(|segment| segment.range().overlaps(range))
    }

    /// Reports pages alike; whether to go on.
    fn present(&mut self, present: Present) -> bool {
        let usable = self.is_usable(present);
        if self.want != Want::Present && (present.range.start() > self.at || !usable) {
            self.missing_until = if usable { present.range.start() } else { present.range.end() };
            return false;
        }
        let owner = self.segments.iter().find(|segment| segment.range().overlaps(present.range));
        match owner.map(Arc::clone) {
            Some(segment) => self.owned(&*segment, present),
            None => self.synthetic(present),
        }
        self.at = present.range.end();
        true
    }

    fn is_usable(&self, present: Present) -> bool {
        match self.want {
            Want::Usable(Access::Write) => self.is_writable(present),
            Want::There(Access::Write) => self.is_writable(present) && !self.may_need_room(),
            Want::There(Access::Read) => self.mapping.readable,
            Want::Usable(Access::Read) | Want::Present => true,
        }
    }

    /// Whether the first write to a page that is there may need something that is not to be had: the blocks of a file, or a
    /// huge page to copy to. Only populating for writing tells.
    fn may_need_room(&self) -> bool {
        match self.mapping.source {
            Source::File => self.mapping.shared,
            Source::Hugetlb => !self.mapping.shared,
            Source::Anonymous | Source::Shmem => false,
        }
    }

    /// Whether a write reaches the page itself: not the zero page, and not the page cache under a private mapping.
    fn is_writable(&self, present: Present) -> bool {
        let borrowed = !self.mapping.shared && present.is.contains(PageIs::FILE);
        self.mapping.writable
            && !present.is.contains(PageIs::ZERO)
            && !(borrowed && self.is_copied_on_write())
    }

    /// Private hugetlb pages are FILE to the page tables, copied or not.
    fn is_copied_on_write(&self) -> bool {
        self.mapping.source != Source::Hugetlb
    }

    fn order_shift(&self, present: Present) -> u8 {
        match (self.mapping.source, present.is.contains(PageIs::HUGE)) {
            (Source::Hugetlb, _) => self.mapping.page_size.trailing_zeros() as u8,
            (_, true) => HUGE_SHIFT,
            (_, false) => PAGE_SHIFT as u8,
        }
    }

    fn backing(&self, present: Present) -> Backing {
        let anonymous = match present.is.contains(PageIs::HUGE) {
            true => Backing::TransparentHuge,
            false => Backing::Anonymous,
        };
        match self.mapping.source {
            _ if present.is.contains(PageIs::ZERO) => Backing::Zero,
            Source::Hugetlb => Backing::Hugetlb,
            Source::File => Backing::File,
            // A private copy of a shared page is nobody else's any more.
            Source::Shmem if !self.mapping.shared && !present.is.contains(PageIs::FILE) => anonymous,
            Source::Shmem => Backing::Shared,
            Source::Anonymous => anonymous,
        }
    }

    fn synthetic(&mut self, present: Present) {
        let (backing, writable) = (self.backing(present), self.is_writable(present));
        let order_shift = self.order_shift(present);
        let out = &mut *self.out;
        if self.mapping.source == Source::Hugetlb {
            self.around.settle.settle_huge(present.range);
        }
        self.around.generations.runs(present.range, |start, pages, generation| {
            let phys = super::frames::encode(start, generation);
            PageRun::push(
                out,
                PageRun { start, pages, phys, backing, writable, order_shift, provider: None },
            );
        });
    }

    fn owned(&mut self, segment: &dyn Segment, present: Present) {
        let (writable, order_shift) = (self.mapping.writable, self.order_shift(present));
        let mut start = present.range.start();
        while start < present.range.end() {
            let frames = segment.frames(start);
            let pages = frames.pages.min((present.range.end().0 - start.0) / PAGE_SIZE);
            let (phys, backing, provider) = (frames.phys, frames.backing, frames.provider);
            PageRun::push(self.out, PageRun { start, pages, phys, backing, writable, order_shift, provider });
            start = start.offset(page_bytes(pages));
        }
    }
}

impl FaultError {
    /// The address it speaks of.
    fn at(&self) -> VirtAddr {
        match *self {
            Self::Busy { at }
            | Self::NoMapping { at }
            | Self::Permission { at, .. }
            | Self::OutOfMemory { at }
            | Self::Special { at }
            | Self::Withdrawn { at, .. } => at,
        }
    }
}
