//! Physical region pages (NVM Express Base Specification 2.1, 4.3.1 "Physical Region Page Entry and List").
//!
//! An entry is the address of (a part of) one page of the controller. The first may begin inside its page, on a double
//! word; all others begin with theirs. So memory that has an end or a beginning inside a page anywhere but at its two ends
//! cannot be said this way. A command holds two entries: PRP1 is the first; PRP2 is nothing, the second and last, or the
//! address of a list of all others. A list that is longer than its page goes on in another, whose address takes the place
//! of the last entry.

use crate::dma::page_size::DmaRange;
use hw_model::addr::DmaAddr;

/// The size of a controller's pages (CC.MPS), a power of two of at least 4 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControllerPage(u64);

impl ControllerPage {
    /// 4 KiB, which every host uses (`NVME_CTRL_PAGE_SHIFT`).
    pub const SMALLEST: Self = Self(4096);

    /// Pages of `bytes` bytes, or `None` if that is no power of two from 4 KiB to 128 MiB.
    #[must_use]
    pub const fn new(bytes: u64) -> Option<Self> {
        if bytes.is_power_of_two() && bytes >= 4096 && bytes <= 128 << 20 { Some(Self(bytes)) } else { None }
    }
    /// Bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0
    }
    fn offset_of(self, dma: DmaAddr) -> u64 {
        dma.0 & (self.0 - 1)
    }
    /// Entries that fit in a page.
    const fn entries(self) -> usize {
        (self.0 / ENTRY) as usize
    }
}

/// Bytes of an entry.
const ENTRY: u64 = 8;

/// Why memory cannot be said in PRP entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PrpError {
    /// There is no byte.
    #[error("a request without data has no PRP entries")]
    Empty,
    /// More than the controller moves in one command.
    #[error("{bytes:#x} bytes, the controller moves at most {max:#x} in a command (MDTS)")]
    TooLong {
        /// Of the request.
        bytes: u64,
        /// Of the controller.
        max: u64,
    },
    /// The first byte is not on a double word.
    #[error("the data begins at {dma}, which is no multiple of 4")]
    NotOnDoubleWord {
        /// Its address.
        dma: DmaAddr,
    },
    /// A page would begin or end inside the data.
    #[error(
        "{at:#x} bytes in, memory ends at {before} and goes on at {after}: not where pages of {page:#x} bytes meet"
    )]
    Gap {
        /// Bytes before the place.
        at: u64,
        /// One past the last byte before it.
        before: DmaAddr,
        /// The first byte after it.
        after: DmaAddr,
        /// Bytes of the controller's page.
        page: u64,
    },
    /// Too few pages for the list, or one that is not a page.
    #[error("the list needs {needed} pages of the controller, {given} were given")]
    ListPages {
        /// Pages needed.
        needed: usize,
        /// Whole pages, aligned, among those given.
        given: usize,
    },
}

/// The data of one command as PRP entries, before it is known where its list will be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrpPlan {
    page: ControllerPage,
    /// Of the data, in order: one a page of the controller.
    entries: Vec<DmaAddr>,
    bytes: u64,
}

/// What goes into the command, and into the memory of the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prp {
    /// The first entry.
    pub prp1: DmaAddr,
    /// Nothing (0), the second entry, or the address of the list.
    pub prp2: DmaAddr,
    /// The pages of the list: where each is, and its words from the first on, little-endian.
    pub list: Vec<(DmaAddr, Vec<u64>)>,
}

impl PrpPlan {
    /// The entries for `ranges` on a controller with pages of `page` that moves at most `max_bytes` a command.
    ///
    /// # Errors
    /// See [`PrpError`].
    pub fn new(
        ranges: impl IntoIterator<Item = DmaRange>,
        page: ControllerPage,
        max_bytes: u64,
    ) -> Result<Self, PrpError> {
        let mut plan = Self { page, entries: Vec::new(), bytes: 0 };
        let mut end: Option<DmaAddr> = None;
        for DmaRange { dma, len } in ranges.into_iter().filter(|range| range.len > 0) {
            match end {
                None if dma.0 % 4 != 0 => return Err(PrpError::NotOnDoubleWord { dma }),
                Some(before) if before != dma && page.offset_of(before) | page.offset_of(dma) != 0 => {
                    return Err(PrpError::Gap { at: plan.bytes, before, after: dma, page: page.bytes() });
                }
                _ => {}
            }
            plan.bytes = plan.bytes.saturating_add(len);
            if plan.bytes > max_bytes {
                return Err(PrpError::TooLong { bytes: plan.bytes, max: max_bytes });
            }
            plan.cover(dma, len, end);
            end = Some(dma.offset(len));
        }
        if plan.bytes == 0 { Err(PrpError::Empty) } else { Ok(plan) }
    }

    /// Adds an entry for every page of `[dma, dma + len)` that has none yet; the data before it ended at `end`.
    fn cover(&mut self, dma: DmaAddr, len: u64, end: Option<DmaAddr>) {
        let mut done = 0;
        if end == Some(dma) && self.page.offset_of(dma) != 0 {
            // The page that it begins in has an entry.
            done = self.page.bytes() - self.page.offset_of(dma);
        }
        while done < len {
            let entry = dma.offset(done);
            self.entries.push(entry);
            done += self.page.bytes() - self.page.offset_of(entry);
        }
    }

    /// Bytes of the data.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Entries, one a page of the controller.
    #[must_use]
    pub fn entries(&self) -> &[DmaAddr] {
        &self.entries
    }

    /// Pages of the controller that the list needs.
    #[must_use]
    pub fn list_pages(&self) -> usize {
        // Without the first, and two or fewer need no list.
        let listed = self.entries.len() - 1;
        let (fits, chained) = (self.page.entries(), self.page.entries() - 1);
        match listed {
            0 | 1 => 0,
            // Every page but the last gives up a place to say where the next is.
            _ => 1 + listed.saturating_sub(fits).div_ceil(chained),
        }
    }

    /// The entries with their list in `pages`, whole pages of the controller that it can reach, of which as many as
    /// [`PrpPlan::list_pages`] says are used.
    ///
    /// # Errors
    /// [`PrpError::ListPages`].
    pub fn build(&self, pages: &[DmaAddr]) -> Result<Prp, PrpError> {
        let needed = self.list_pages();
        let given = pages.iter().take_while(|page| self.page.offset_of(**page) == 0).count();
        if given < needed {
            return Err(PrpError::ListPages { needed, given });
        }
        let prp1 = self.entries[0];
        let mut rest = &self.entries[1..];
        if needed == 0 {
            return Ok(Prp { prp1, prp2: rest.first().copied().unwrap_or_default(), list: Vec::new() });
        }
        let mut list = Vec::with_capacity(needed);
        for (number, at) in pages[..needed].iter().enumerate() {
            let last = number + 1 == needed;
            let here = if last { rest.len() } else { self.page.entries() - 1 };
            let (now, later) = rest.split_at(here);
            let mut words: Vec<u64> = now.iter().map(|entry| entry.0).collect();
            if !last {
                words.push(pages[number + 1].0);
            }
            list.push((*at, words));
            rest = later;
        }
        Ok(Prp { prp1, prp2: pages[0], list })
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
