//! Which pages of a range are present: PAGEMAP_SCAN, or /proc/self/pagemap where the kernel has none.

use super::sys::{self, PageIs, Region};
use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange, pages_for};
use rustix::fd::OwnedFd;
use rustix::io::Errno;

/// Runs of pages that one call can report.
const REGIONS: usize = 512;
/// Runs that the first call can report, no more than there are pages: before it looks, the kernel allocates what all of them
/// take (fs/proc/task_mmu.c `pagemap_scan_init_bounce_buffer`), and for a page the room for 512 costs half as much again as
/// the look.
const FEW_REGIONS: usize = 64;
/// Words read from the pagemap file at a time.
const WORDS: usize = 512;

/// Reads the page tables of this process.
pub(super) struct Scanner {
    pagemap: OwnedFd,
    scan: bool,
}

/// Pages alike and present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Present {
    pub(super) range: VirtRange,
    pub(super) is: PageIs,
}

impl Scanner {
    /// `scan` says that the kernel has PAGEMAP_SCAN.
    pub(super) fn new(pagemap: OwnedFd, scan: bool) -> Self {
        Self { pagemap, scan }
    }

    /// Whether reports tell huge pages, zero pages and watched ones from others.
    pub(super) fn is_precise(&self) -> bool {
        self.scan
    }

    /// Hands the present pages of `range` to `each`, in ascending order, until it says false.
    pub(super) fn present(
        &self,
        range: VirtRange,
        regions: &mut Vec<Region>,
        mut each: impl FnMut(Present) -> bool,
    ) -> Result<(), Errno> {
        regions.resize(REGIONS, Region::default());
        let pages = pages_for(range.len()) as usize;
        let mut most = FEW_REGIONS.min(pages);
        let (mut at, end) = (range.start().0, range.end().0);
        while at < end {
            let (filled, next) = match self.scan {
                true => sys::pagemap_scan(&self.pagemap, at, end, &mut regions[..most])?,
                false => self.read(at, end, regions)?,
            };
            if filled == most {
                most = REGIONS;
            }
            for region in &regions[..filled] {
                let range = VirtRange::new(VirtAddr(region.start), region.end - region.start);
                let range = range.expect("the kernel reports user addresses");
                if !each(Present { range, is: PageIs::from_bits_truncate(region.categories) }) {
                    return Ok(());
                }
            }
            if next <= at {
                return Err(Errno::IO);
            }
            at = next;
        }
        Ok(())
    }

    /// As PAGEMAP_SCAN, from the words of the pagemap file (Documentation/admin-guide/mm/pagemap.rst).
    fn read(&self, start: u64, end: u64, out: &mut [Region]) -> Result<(usize, u64), Errno> {
        const WORD_PRESENT: u64 = 1 << 63;
        const WORD_FILE: u64 = 1 << 61;
        let mut bytes = [0; WORDS * 8];
        let wanted = WORDS.min(((end - start) / PAGE_SIZE) as usize);
        let got = rustix::io::pread(&self.pagemap, &mut bytes[..wanted * 8], start / PAGE_SIZE * 8)?;
        let mut filled = 0;
        let mut at = start;
        for word in bytes[..got].as_chunks::<8>().0 {
            let word = u64::from_ne_bytes(*word);
            let next = at + PAGE_SIZE;
            if word & WORD_PRESENT != 0 {
                let file = if word & WORD_FILE != 0 { PageIs::FILE } else { PageIs::empty() };
                let categories = (PageIs::PRESENT | file).bits();
                match out[..filled].last_mut() {
                    Some(last) if last.end == at && last.categories == categories => last.end = next,
                    _ => {
                        // One region a word at most, and as many regions as words.
                        out[filled] = Region { start: at, end: next, categories };
                        filled += 1;
                    }
                }
            }
            at = next;
        }
        Ok((filled, at))
    }
}
