//! The size of a page list's entries, and the entries.
//!
//! A device takes lists whose entries all stand for pages of one size, out of the few sizes it has. [`best_page_size`]
//! answers the question of `ib_umem_find_best_pgsz` (drivers/infiniband/core/umem.c): the smallest size that gives the
//! fewest entries. What limits it are the places where the memory does not go on where it was: there a page must end, so the
//! region's address and the DMA address have to agree in the bits below the page size on both sides. One IOVA range has
//! no such place, and where it begins it agrees by construction (`Mapping::try_alloc`): an aligned GiB is one entry.
//!
//! Where a few small pieces would force small pages on large ones, [`Parts`] cuts the memory into lists of one size each,
//! for an indirect key over all of them.
//!
//! Nothing here allocates; ranges come in as an iterator and entries go out as one.

use hw_model::addr::{DmaAddr, RegionAddr};
use std::fmt;
use std::ops::ControlFlow;

mod parts;

pub use parts::{Part, Parts};

/// Bytes that lie together on the bus: a uniform segment as the device sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaRange {
    /// What the device puts on the bus for the first byte.
    pub dma: DmaAddr,
    /// Bytes.
    pub len: u64,
}

/// The size of a page that an entry stands for, as its logarithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageSize(u8);

impl PageSize {
    /// Pages of `bytes` bytes, or `None` if that is no power of two.
    #[must_use]
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        if bytes.is_power_of_two() { Some(Self(bytes.trailing_zeros() as u8)) } else { None }
    }
    /// Bytes of a page.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        1 << self.0
    }
    /// log2 of that.
    #[must_use]
    pub const fn shift(self) -> u32 {
        self.0 as u32
    }
    /// Where in its page an address lies.
    #[must_use]
    pub const fn offset_of(self, address: u64) -> u64 {
        address & (self.bytes() - 1)
    }
    /// Pages that hold the bytes from `first` to `last`, both included. At most 2^64 - 1 pages.
    const fn pages(self, first: u64, last: u64) -> u64 {
        ((last >> self.0) - (first >> self.0)).saturating_add(1)
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        write!(f, "{} {}", 1_u64 << (self.0 % 10), UNITS[usize::from(self.0 / 10)])
    }
}

/// The page sizes of a device, as the bitmap that its driver hands to the kernel (`hca pgsz_bitmap`).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageSizes(u64);

impl PageSizes {
    /// 4 KiB, 2 MiB and 1 GiB.
    pub const X86: Self = Self(1 << 12 | 1 << 21 | 1 << 30);

    /// The sizes whose bits are set: bit `n` stands for pages of 2^n bytes.
    #[must_use]
    pub const fn from_bitmap(bits: u64) -> Self {
        Self(bits)
    }
    /// The bitmap.
    #[must_use]
    pub const fn bitmap(self) -> u64 {
        self.0
    }
    /// Every size, the smallest first.
    pub fn iter(self) -> impl Iterator<Item = PageSize> {
        (0..64).filter(move |shift| self.0 >> shift & 1 != 0).map(PageSize)
    }
    /// Those of at most 2^`shift` bytes.
    const fn up_to(self, shift: u32) -> Self {
        Self(if shift >= 63 { self.0 } else { self.0 & ((2 << shift) - 1) })
    }
}

impl fmt::Display for PageSizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 {
            return f.write_str("no pages at all");
        }
        for (number, size) in self.iter().enumerate() {
            write!(f, "{}{size}", if number == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

impl fmt::Debug for PageSizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageSizes({self})")
    }
}

/// How a device knows where in the first page the first byte lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirstByte {
    /// As the region's address does: its low bits are the offset (a region at its own address, or at an IOVA of its own,
    /// `ib_umem_find_best_pgsz`).
    Address(RegionAddr),
    /// The device keeps an offset beside the list, whatever the address: zero-based regions. Bits of the DMA address that
    /// the offset can hold (`ib_umem_find_best_pgoff`).
    Offset {
        /// The largest offset the device keeps, a power of two less one.
        mask: u64,
    },
}

impl FirstByte {
    /// The device keeps an offset in a page of any size. 2^48 bytes are more than any page has.
    pub const ANY_OFFSET: Self = Self::Offset { mask: (1 << 48) - 1 };

    /// What the first byte is counted from, given where it is on the bus.
    fn address(self, dma: DmaAddr) -> u64 {
        match self {
            Self::Address(address) => address.0,
            Self::Offset { mask } => dma.0 & mask,
        }
    }
}

/// Why no page size fits. The memory's own layout is to blame, or the address that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageSizeError {
    /// There is no byte.
    #[error("a page list of nothing")]
    Empty,
    /// A range or the region's address passes the top of the address space.
    #[error("the range {at:#x} bytes in passes the top of the address space")]
    PastTop {
        /// Bytes before the range.
        at: u64,
    },
    /// At one place the pages would have to be smaller than the device has.
    #[error("{at:#x} bytes in, at {dma}, pages have at most {fits} bytes, and the device has {sizes}")]
    NoSize {
        /// Bytes before the place.
        at: u64,
        /// The DMA address that goes on there.
        dma: DmaAddr,
        /// The largest power of two that ends a page there.
        fits: u64,
        /// What the device has.
        sizes: PageSizes,
    },
}

/// Ranges, with neighbours that continue each other on the bus made one. Empty ones are left out.
#[derive(Clone, Debug)]
struct Joined<I> {
    ranges: I,
    held: Option<DmaRange>,
}

fn joined<I: Iterator<Item = DmaRange>>(ranges: I) -> Joined<I> {
    Joined { ranges, held: None }
}

impl<I: Iterator<Item = DmaRange>> Iterator for Joined<I> {
    type Item = DmaRange;

    fn next(&mut self) -> Option<DmaRange> {
        for range in self.ranges.by_ref().filter(|range| range.len > 0) {
            match &mut self.held {
                Some(held) if continues(held, &range) => held.len += range.len,
                held => match held.replace(range) {
                    Some(whole) => return Some(whole),
                    None => continue,
                },
            }
        }
        self.held.take()
    }
}

fn continues(before: &DmaRange, after: &DmaRange) -> bool {
    before.dma.checked_add(before.len) == Some(after.dma) && before.len.checked_add(after.len).is_some()
}

/// The page sizes that fit what was seen so far: a bit is set where addresses disagree or a page must end.
#[derive(Clone, Copy, Debug)]
struct Fit {
    first: u64,
    /// Of the last byte.
    last: u64,
    len: u64,
    /// What limits the size most: its trailing zeros, and where it is.
    limit: (u32, u64, DmaAddr),
}

impl Fit {
    /// Of the first run alone. `None` if it passes the top.
    fn new(run: DmaRange, first: FirstByte) -> Option<Self> {
        let address = first.address(run.dma);
        run.dma.checked_add(run.len - 1)?;
        let last = address.checked_add(run.len - 1)?;
        let limit = ((run.dma.0 ^ address).trailing_zeros(), 0, run.dma);
        Some(Self { first: address, last, len: run.len, limit })
    }

    /// With `run` after it, which does not continue it. `None` if it passes the top.
    fn then(self, run: DmaRange) -> Option<Self> {
        let address = self.last.checked_add(1)?;
        run.dma.checked_add(run.len - 1)?;
        let last = address.checked_add(run.len - 1)?;
        // A page ends here and one begins: both addresses are multiples of the size.
        let here = ((address | run.dma.0).trailing_zeros(), self.len, run.dma);
        let limit = if here.0 < self.limit.0 { here } else { self.limit };
        Some(Self { last, len: self.len.checked_add(run.len)?, limit, ..self })
    }

    /// The smallest size that gives the fewest entries.
    fn best(&self, sizes: PageSizes) -> Result<PageSize, PageSizeError> {
        let (shift, at, dma) = self.limit;
        let fewest = sizes.up_to(shift).iter().min_by_key(|size| (size.pages(self.first, self.last), *size));
        fewest.ok_or(PageSizeError::NoSize { at, dma, fits: 1 << shift.min(63), sizes })
    }
}

fn fit(ranges: impl Iterator<Item = DmaRange>, first: FirstByte) -> Result<Fit, PageSizeError> {
    let mut at = 0_u64;
    let step = |fit: Option<Fit>, run: DmaRange| {
        let next = match fit {
            None => Fit::new(run, first),
            Some(fit) => fit.then(run),
        };
        match next {
            Some(fit) => {
                at = fit.len;
                ControlFlow::Continue(Some(fit))
            }
            None => ControlFlow::Break(()),
        }
    };
    match joined(ranges).try_fold(None, step) {
        ControlFlow::Continue(fit) => fit.ok_or(PageSizeError::Empty),
        ControlFlow::Break(()) => Err(PageSizeError::PastTop { at }),
    }
}

/// The page size for one list over `ranges`: of the device's `sizes` the smallest that gives the fewest entries.
///
/// # Errors
/// See [`PageSizeError`]; it names the place that no size fits.
pub fn best_page_size(
    ranges: impl IntoIterator<Item = DmaRange>,
    first: FirstByte,
    sizes: PageSizes,
) -> Result<PageSize, PageSizeError> {
    fit(ranges.into_iter(), first)?.best(sizes)
}

/// One page list: how large its pages are, where the first byte lies, how many entries there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListPlan {
    /// Of every entry.
    pub page_size: PageSize,
    /// Where in the first page the first byte lies.
    pub offset: u64,
    /// Entries.
    pub entries: u64,
    /// Bytes that the list covers.
    pub len: u64,
}

impl ListPlan {
    /// The plan of one list over `ranges` with the fewest entries.
    ///
    /// # Errors
    /// See [`PageSizeError`].
    pub fn new(
        ranges: impl IntoIterator<Item = DmaRange>,
        first: FirstByte,
        sizes: PageSizes,
    ) -> Result<Self, PageSizeError> {
        let fit = fit(ranges.into_iter(), first)?;
        Ok(Self::of(&fit, fit.best(sizes)?))
    }

    fn of(fit: &Fit, page_size: PageSize) -> Self {
        let offset = page_size.offset_of(fit.first);
        Self { page_size, offset, entries: page_size.pages(fit.first, fit.last), len: fit.len }
    }

    /// The entries: the DMA address of each page, in order. `ranges` are those of the plan.
    pub fn pages(&self, ranges: impl IntoIterator<Item = DmaRange>) -> impl Iterator<Item = DmaAddr> {
        let size = self.page_size;
        joined(ranges.into_iter()).flat_map(move |run| {
            let start = run.dma.0 - size.offset_of(run.dma.0);
            let pages = size.pages(run.dma.0, run.dma.0 + (run.len - 1));
            (0..pages).map(move |page| DmaAddr(start + page * size.bytes()))
        })
    }

    /// The entry that holds byte `at`, and where in its page: the device's own arithmetic.
    #[must_use]
    pub fn locate(&self, at: u64) -> (u64, u64) {
        let at = self.offset + at;
        (at / self.page_size.bytes(), self.page_size.offset_of(at))
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
