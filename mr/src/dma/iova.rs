//! The IOVA allocator of one domain.
//!
//! Two-level segregated fit (Masmano et al., "TLSF: a new dynamic memory allocator for real-time systems", ECRTS 2004)
//! over ranges instead of bytes: holes hang in lists by size class, two bitmaps find the first class that surely fits,
//! and neighbours in address order are linked, so that allocating and freeing take a bounded number of steps however many
//! ranges live. Nothing is looked up on freeing: a range carries the number of its node.
//!
//! The space is two zones that never mix, below and above 4 GiB, because devices with 32-bit masks live on the first and
//! addresses there are tried first (`iommu_dma_alloc_iova` in drivers/iommu/dma-iommu.c). Where the fast way finds nothing
//! in either (an alignment or a limit that only some holes meet) all holes are searched, so that "exhausted" is never a
//! guess.

use holes::{Holes, NodeId, Want};
use hw_model::addr::Iova;
use std::fmt;

mod holes;
mod shared;

pub(in crate::dma) use shared::SharedIova;

/// What an allocator covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IovaSpace {
    /// Bits of an IOVA: what the domain and the devices in it can address. At most 48.
    pub bits: u32,
    /// log2 of the IO page; everything is a multiple of it. At least 11, less than `bits`.
    pub granule_shift: u32,
}

/// What an allocation wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IovaRequest {
    /// Bytes; rounded up to IO pages.
    pub size: u64,
    /// Alignment in bytes, a power of two; less than an IO page is an IO page.
    pub align: u64,
    /// Where in the alignment the range begins: its start is `phase` more than a multiple of `align`. Rounded down to IO
    /// pages. A mapping that lies in its 2 MiB as the memory does lets large leaves fit.
    pub phase: u64,
    /// The last address that may be part of the range: a DMA mask.
    pub last: Iova,
    /// Whether to look below 4 GiB first. Devices do best with short addresses; large regions had better leave them. The
    /// other side is taken rather than searching all holes of this one.
    pub low_first: bool,
}

impl IovaRequest {
    /// `size` bytes aligned to an IO page, anywhere, below 4 GiB first.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self { size, align: 1, phase: 0, last: Iova(u64::MAX), low_first: true }
    }
    /// Aligned to `align` bytes, a power of two.
    #[must_use]
    pub fn align(self, align: u64) -> Self {
        Self { align, ..self }
    }
    /// Lying in `align` bytes (a power of two) as the address `like` does.
    #[must_use]
    pub fn like(self, like: u64, align: u64) -> Self {
        Self { align, phase: like & align.wrapping_sub(1), ..self }
    }
    /// Wholly at or below `last`.
    #[must_use]
    pub fn last(self, last: Iova) -> Self {
        Self { last, ..self }
    }
    /// Above 4 GiB first.
    #[must_use]
    pub fn high_first(self) -> Self {
        Self { low_first: false, ..self }
    }
}

/// An allocated range, in 16 bytes. A copy that is given back a second time is refused, unless the very same range has
/// been allocated again meanwhile.
#[must_use = "the range stays allocated until it is freed"]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct IovaRange {
    start: Iova,
    /// Length in units of [`UNIT_SHIFT`], and above them the number of the node.
    extent: u64,
}

/// log2 of the smallest IO page.
const UNIT_SHIFT: u32 = 11;
/// Bits of a length: the whole of the largest space.
const LENGTH_BITS: u32 = MAX_BITS - UNIT_SHIFT + 1;
/// Bits of an IOVA, at most.
const MAX_BITS: u32 = 48;
/// Nodes that a range can name: 67 million.
const MAX_NODES: NodeId = 1 << (64 - LENGTH_BITS);

impl IovaRange {
    fn new(start: Iova, len: u64, node: NodeId) -> Self {
        Self { start, extent: len >> UNIT_SHIFT | u64::from(node) << LENGTH_BITS }
    }
    /// First IOVA.
    #[must_use]
    pub fn start(&self) -> Iova {
        self.start
    }
    /// Bytes, a multiple of the IO page.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a range is never empty")]
    pub fn len(&self) -> u64 {
        (self.extent & ((1 << LENGTH_BITS) - 1)) << UNIT_SHIFT
    }
    fn node(&self) -> NodeId {
        (self.extent >> LENGTH_BITS) as NodeId
    }
    /// Its start and a word for the rest.
    pub(in crate::dma) fn into_parts(self) -> (Iova, u64) {
        (self.start, self.extent)
    }
    /// The range that was taken apart into these.
    pub(in crate::dma) fn from_parts(start: Iova, extent: u64) -> Self {
        Self { start, extent }
    }
}

impl fmt::Debug for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IOVA [{}, +{:#x})", self.start, self.len())
    }
}

/// Why no range was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IovaError {
    /// Zero bytes, more than the space, or an alignment that is no power of two.
    #[error("an IOVA range of {size:#x} bytes aligned to {align:#x} cannot be in a space of {bits} bits")]
    BadRequest {
        /// Bytes asked for.
        size: u64,
        /// Alignment asked for.
        align: u64,
        /// Bits of the space.
        bits: u32,
    },
    /// The allocator has as many ranges and holes as it can tell apart.
    #[error("the IOVA allocator has its {most} ranges and holes already")]
    TooMany {
        /// How many that is.
        most: u32,
    },
    /// No hole is large enough, at that alignment, up to that address.
    #[error(
        "IOVA space of {bits} bits exhausted: {size:#x} bytes aligned to {align:#x} wanted up to {last}; {free:#x} bytes \
         are free there, the largest hole has {largest_hole:#x}"
    )]
    Exhausted {
        /// Bytes asked for, in whole IO pages.
        size: u64,
        /// Alignment asked for.
        align: u64,
        /// The last address that was allowed.
        last: Iova,
        /// Bits of the space.
        bits: u32,
        /// Free bytes up to `last`.
        free: u64,
        /// Bytes of the largest hole up to `last`, whatever its alignment.
        largest_hole: u64,
    },
}

/// Why a window cannot be reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReserveError {
    /// Part of it is allocated.
    #[error("{start} with {len:#x} bytes cannot be reserved: {live} is allocated")]
    InUse {
        /// First IOVA of the window.
        start: Iova,
        /// Bytes of the window.
        len: u64,
        /// First IOVA of the allocated range in the way.
        live: Iova,
    },
}

/// A range that is not allocated: given back before, or to the wrong allocator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{range} is not allocated here")]
pub struct FreeError {
    /// The range.
    pub range: IovaRange,
}

/// How the space is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IovaStats {
    /// Ranges allocated at the moment.
    pub live_ranges: u64,
    /// Bytes in them.
    pub live_bytes: u64,
    /// Bytes in reserved windows, the page at 0 included.
    pub reserved_bytes: u64,
    /// Bytes free.
    pub free_bytes: u64,
    /// Stretches that are free.
    pub holes: u64,
    /// Bytes of the largest.
    pub largest_hole: u64,
    /// Allocations that had to search all holes.
    pub full_searches: u64,
}

impl IovaStats {
    /// The share of free space that is not in the largest hole: 0 is one hole, near 1 is dust.
    #[must_use]
    pub fn fragmentation(&self) -> f64 {
        if self.free_bytes == 0 { 0.0 } else { 1.0 - self.largest_hole as f64 / self.free_bytes as f64 }
    }
}

/// First IOVA that needs more than 32 bits.
const LOW_END: u64 = 1 << 32;

/// The ranges of one domain's IOVA space. Not synchronized: its owner has a lock.
pub struct IovaAllocator {
    space: IovaSpace,
    holes: Holes,
    live_bytes: u64,
    live_ranges: u64,
    reserved_pages: u64,
    full_searches: u64,
}

impl IovaAllocator {
    /// An empty space. The IO page at 0 is never given out: a device that forgot an address uses it.
    ///
    /// # Panics
    /// If there is no such space: see [`IovaSpace`]. That of a domain always is.
    #[must_use]
    pub fn new(space: IovaSpace) -> Self {
        let IovaSpace { bits, granule_shift } = space;
        assert!((UNIT_SHIFT..bits).contains(&granule_shift) && bits <= MAX_BITS, "no such space: {space:?}");
        let end = 1 << (bits - granule_shift);
        let low_end = (LOW_END >> granule_shift).clamp(1, end);
        let holes = Holes::new([(1, low_end), (low_end, end)]);
        Self { space, holes, live_bytes: 0, live_ranges: 0, reserved_pages: 1, full_searches: 0 }
    }

    /// What it covers.
    #[must_use]
    pub fn space(&self) -> IovaSpace {
        self.space
    }

    fn shift(&self) -> u32 {
        self.space.granule_shift
    }

    /// Allocates a range.
    ///
    /// # Errors
    /// See [`IovaError`].
    pub fn allocate(&mut self, request: IovaRequest) -> Result<IovaRange, IovaError> {
        let IovaRequest { size, align, phase, last, low_first } = request;
        let IovaSpace { bits, granule_shift } = self.space;
        if size == 0 || size > 1 << bits || !align.is_power_of_two() || align > 1 << bits {
            return Err(IovaError::BadRequest { size, align, bits });
        }
        let pages = size.div_ceil(1 << granule_shift);
        let align_pages = (align >> granule_shift).max(1);
        // Pages wholly at or below `last`.
        let limit = if last.0 == u64::MAX { u64::MAX } else { (last.0 + 1) >> granule_shift };
        let want =
            Want { pages, align: align_pages, phase: (phase >> granule_shift) & (align_pages - 1), limit };
        if self.holes.node_count() + 2 > MAX_NODES {
            return Err(IovaError::TooMany { most: MAX_NODES });
        }
        let zones = if low_first { [0, 1] } else { [1, 0] };
        let mut node = zones.into_iter().find_map(|zone| self.holes.take(zone, want));
        if node.is_none() {
            self.full_searches += 1;
            node = zones.into_iter().find_map(|zone| self.holes.search(zone, want));
        }
        let Some(node) = node else { return Err(self.exhausted(pages << granule_shift, align, last, limit)) };
        let (start, len) = (Iova(self.holes.start(node) << granule_shift), pages << granule_shift);
        self.live_bytes += len;
        self.live_ranges += 1;
        Ok(IovaRange::new(start, len, node))
    }

    #[cold]
    fn exhausted(&self, size: u64, align: u64, last: Iova, limit: u64) -> IovaError {
        let (mut free, mut largest) = (0, 0);
        for (start, pages) in self.holes.iter() {
            let usable = limit.saturating_sub(start).min(pages);
            free += usable;
            largest = usable.max(largest);
        }
        let (free, largest_hole) = (free << self.shift(), largest << self.shift());
        IovaError::Exhausted { size, align, last, bits: self.space.bits, free, largest_hole }
    }

    /// Gives a range back. Nothing in it may still be mapped.
    ///
    /// # Errors
    /// [`FreeError`] if it is not allocated here: a second time, or another allocator.
    pub fn free(&mut self, range: IovaRange) -> Result<(), FreeError> {
        let (start, pages) = (range.start.0 >> self.shift(), range.len() >> self.shift());
        if !self.holes.put(range.node(), start, pages) {
            return Err(FreeError { range });
        }
        self.live_bytes -= range.len();
        self.live_ranges -= 1;
        Ok(())
    }

    /// Whether every byte is part of one allocated range. For checks: searches in address order.
    #[must_use]
    pub fn is_allocated(&self, start: Iova, len: u64) -> bool {
        let Some(end) = start.0.checked_add(len) else { return false };
        self.holes
            .live_ranges()
            .any(|(first, pages)| first << self.shift() <= start.0 && end <= (first + pages) << self.shift())
    }

    /// Keeps a window out of use for good: interrupts (0xfee0_0000 to 0xfeef_ffff on x86), the bus windows of PCI
    /// (`iommu_get_resv_regions`, `iova_reserve_pci_windows`). Rounded out to IO pages; what lies outside the space, or is
    /// reserved already, is no mistake.
    ///
    /// # Errors
    /// [`ReserveError`] if part of it is allocated; nothing is reserved then.
    pub fn reserve(&mut self, start: Iova, len: u64) -> Result<(), ReserveError> {
        if len == 0 {
            return Ok(());
        }
        let last = start.0.saturating_add(len - 1);
        let (first, end) = (start.0 >> self.shift(), (last >> self.shift()) + 1);
        match self.holes.reserve(first, end) {
            Ok(pages) => {
                self.reserved_pages += pages;
                Ok(())
            }
            Err(live) => Err(ReserveError::InUse { start, len, live: Iova(live << self.shift()) }),
        }
    }

    /// How the space is used. Looks at every hole.
    #[must_use]
    pub fn stats(&self) -> IovaStats {
        let mut stats = IovaStats {
            live_ranges: self.live_ranges,
            live_bytes: self.live_bytes,
            reserved_bytes: self.reserved_pages << self.shift(),
            full_searches: self.full_searches,
            ..IovaStats::default()
        };
        for (_, pages) in self.holes.iter() {
            stats.holes += 1;
            stats.free_bytes += pages << self.shift();
            stats.largest_hole = stats.largest_hole.max(pages << self.shift());
        }
        stats
    }
}

impl fmt::Debug for IovaAllocator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IovaAllocator").field("space", &self.space).field("stats", &self.stats()).finish()
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
