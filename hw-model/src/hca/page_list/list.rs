//! The words of one key: a row of words for pages, and above it, where a region has use for them, a row for huge pages.
//!
//! A word of the upper row stands for 512 pages of 2 MiB together. While it is visible or linked it alone counts, and none of
//! the words below it is either; else those below count. A region that lies in huge pages is so published, hidden and
//! unlinked with one word where there were 512, and one page of it can still go its own way (as a huge entry of a CPU page
//! table is split). Every index is that of a page of 4 KiB, whichever row answers (invariant 10).
//!
//! A list for memory that is huge pages and stays so (`IBV_ACCESS_HUGETLB`) has the upper row alone.

use super::{ADDRESS_MASK, Entry};
use crate::addr::{PAGE_SHIFT, page_bytes};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::zeroed_words;
use std::fmt;
use std::ops::{Deref, Range};

/// Pages of 4 KiB in a huge page.
pub const HUGE_PAGES: u64 = 512;

/// In a word of the upper row that is neither visible nor linked, and so has no address: words below it were written.
const BELOW: u64 = 1 << PAGE_SHIFT;

/// What one word stands for: a page, or the pages of a huge page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    first: u64,
    /// Which word of the upper row; `None` for a page.
    huge: Option<usize>,
}

impl Slot {
    /// Of page `index` alone.
    #[must_use]
    pub fn page(index: u64) -> Self {
        Self { first: index, huge: None }
    }
    /// Index of its first page.
    #[must_use]
    pub fn first(&self) -> u64 {
        self.first
    }
    /// Pages of 4 KiB in it.
    #[must_use]
    pub fn pages(&self) -> u64 {
        if self.huge.is_some() { HUGE_PAGES } else { 1 }
    }
    /// Index of the page behind it.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.first + self.pages()
    }
    /// Whether it is a huge page.
    #[must_use]
    pub fn is_huge(&self) -> bool {
        self.huge.is_some()
    }
}

/// A row of words. One alone lies here.
enum Row {
    One(AtomicU64),
    Many(Box<[AtomicU64]>),
}

impl Deref for Row {
    type Target = [AtomicU64];
    #[inline]
    fn deref(&self) -> &[AtomicU64] {
        match self {
            Self::One(word) => std::slice::from_ref(word),
            Self::Many(words) => words,
        }
    }
}

/// The entries of one key. In a line of its own: a region that was not used for long misses the cache once here.
#[cfg_attr(not(any(loom, shuttle)), repr(align(64)))]
pub struct PageList {
    /// The lower row; empty where every page is huge.
    entries: Row,
    /// The upper row; empty where no page is.
    huge: Row,
    /// Pages before the first of the upper row.
    lead: u64,
    len: u64,
    page_shift: u32,
    /// Flushes so far: what a translation cache remembers of before the last is void.
    generation: AtomicU64,
}

#[cfg(not(any(loom, shuttle)))]
const _: () = assert!(size_of::<PageList>() == 64);

fn words(count: u64) -> Result<Row, OutOfMemory> {
    if count == 1 {
        return Ok(Row::One(AtomicU64::new(0)));
    }
    let refused = OutOfMemory { entries: count };
    let count = usize::try_from(count).map_err(|_| refused)?;
    zeroed_words(count).map(Row::Many).ok_or(refused)
}

impl PageList {
    /// A list of `pages` empty entries for pages of 4 KiB. Memory that is never written is never touched: a region of a TiB costs what its
    /// present pages cost.
    ///
    /// # Errors
    /// [`OutOfMemory`] if the host cannot give the table.
    pub fn new(pages: u64) -> Result<Self, OutOfMemory> {
        Self::with_page_shift(pages, PAGE_SHIFT)
    }
    /// A list of `pages` empty entries for pages of 2^`page_shift` bytes.
    ///
    /// # Errors
    /// [`OutOfMemory`] if the host cannot give the table.
    ///
    /// # Panics
    /// If such pages are smaller than 4 KiB, or larger than the address space.
    pub fn with_page_shift(pages: u64, page_shift: u32) -> Result<Self, OutOfMemory> {
        assert!((PAGE_SHIFT..u64::BITS).contains(&page_shift), "entries are for pages of 4 KiB at least");
        let (entries, huge, generation) = (words(pages)?, words(0)?, AtomicU64::new(0));
        Ok(Self { entries, huge, lead: 0, len: pages, page_shift, generation })
    }
    /// A list of `pages` empty entries of 4 KiB, with a word above each 512 of them from page `lead` on.
    ///
    /// # Errors
    /// [`OutOfMemory`] if the host cannot give the table.
    pub fn mixed(pages: u64, lead: u64) -> Result<Self, OutOfMemory> {
        let huge = words(pages.saturating_sub(lead) / HUGE_PAGES)?;
        Ok(Self { huge, lead, ..Self::new(pages)? })
    }
    /// A list of `pages` pages of 4 KiB in empty entries for whole huge pages.
    ///
    /// # Errors
    /// [`OutOfMemory`] if the host cannot give the table.
    ///
    /// # Panics
    /// If a huge page is cut.
    pub fn huge(pages: u64) -> Result<Self, OutOfMemory> {
        assert!(pages.is_multiple_of(HUGE_PAGES), "{pages} pages are not whole huge pages");
        Ok(Self { huge: words(pages / HUGE_PAGES)?, len: pages, ..Self::new(0)? })
    }
    /// log2 of the bytes of a page.
    #[must_use]
    pub fn page_shift(&self) -> u32 {
        self.page_shift
    }
    /// Bytes of a page.
    #[must_use]
    pub fn page_bytes(&self) -> u64 {
        1 << self.page_shift
    }
    /// Bytes of what the smallest word stands for.
    #[must_use]
    pub fn entry_bytes(&self) -> u64 {
        if self.is_huge() { page_bytes(HUGE_PAGES) } else { self.page_bytes() }
    }
    /// Number of pages.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }
    /// Whether the list has no page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// Words it has.
    #[must_use]
    pub fn words(&self) -> u64 {
        (self.entries.len() + self.huge.len()) as u64
    }
    /// Whether there are words for huge pages.
    #[must_use]
    pub fn has_huge(&self) -> bool {
        !self.huge.is_empty()
    }
    /// Whether every page is part of a huge one.
    #[must_use]
    pub fn is_huge(&self) -> bool {
        self.entries.is_empty() && self.len > 0
    }
    /// The entry of page `index`; `None` past the end.
    #[must_use]
    #[inline]
    pub fn load(&self, index: u64) -> Option<Entry> {
        if !self.huge.is_empty() {
            return self.load_mixed(index).map(|(entry, _)| entry);
        }
        let word = self.entries.get(usize::try_from(index).ok()?)?;
        Some(Entry(word.load(Ordering::Acquire)))
    }

    /// As [`PageList::load`], with the number of pages from this one on that the word that answered stands for: their
    /// addresses go on.
    #[must_use]
    #[inline]
    pub fn load_run(&self, index: u64) -> Option<(Entry, u64)> {
        if self.huge.is_empty() { Some((self.load(index)?, 1)) } else { self.load_mixed(index) }
    }

    fn load_mixed(&self, index: u64) -> Option<(Entry, u64)> {
        if index >= self.len {
            return None;
        }
        let Some(slot) = self.huge_slot(index) else { return Some((self.small(index)?, 1)) };
        let above = self.load_slot(slot);
        if above.is_active() {
            return Some((above.page_of_huge(index - slot.first), slot.end() - index));
        }
        // Below nothing may be known of a page that was part of a huge one.
        Some((self.small(index).filter(|entry| *entry != Entry::EMPTY).unwrap_or(above.unlinked()), 1))
    }

    fn small(&self, index: u64) -> Option<Entry> {
        self.entries.get(index as usize).map(|word| Entry(word.load(Ordering::Acquire)))
    }

    /// Voids what translation caches remember of the list. To be called after entries were hidden, or took another address or
    /// less permission, and before the drain: bursts that begin after that read the list anew.
    pub fn flush(&self) {
        self.generation.fetch_add(1, Ordering::Release);
    }

    pub(in crate::hca) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Publishes `entry` for page `index`. What was written before (links, syncs) is seen by who reads the entry.
    ///
    /// # Panics
    /// If `index` is past the end.
    pub fn store(&self, index: u64, entry: Entry) {
        if let Some(Slot { huge: Some(number), .. }) = self.huge_slot(index) {
            let above = self.huge[number].load(Ordering::Relaxed);
            debug_assert!(!Entry(above).is_active(), "page {index} is part of a huge one");
            if above & BELOW == 0 {
                self.huge[number].store(above & !ADDRESS_MASK | BELOW, Ordering::Relaxed);
            }
        }
        self.entries[usize::try_from(index).expect("index of a list in memory")]
            .store(entry.0, Ordering::Release);
    }

    /// Publishes `entry` for page `first`, and for each of the `count` pages from there on the same at its own address.
    ///
    /// # Panics
    /// If the last is past the end.
    pub fn store_run(&self, first: u64, count: u64, entry: Entry) {
        let mut index = first;
        while let Some(Slot { first: above, huge: Some(number) }) =
            self.huge_slot(index.max(self.lead)).filter(|slot| slot.first < first + count)
        {
            let word = self.huge[number].load(Ordering::Relaxed);
            debug_assert!(!Entry(word).is_active(), "pages from {above} on are a huge one");
            if word & BELOW == 0 {
                self.huge[number].store(word & !ADDRESS_MASK | BELOW, Ordering::Relaxed);
            }
            index = above + HUGE_PAGES;
        }
        let mut address = entry.0;
        for word in &self.entries[first as usize..(first + count) as usize] {
            word.store(address, Ordering::Release);
            address = address.wrapping_add(page_bytes(1));
        }
    }

    /// The huge page that page `index` is part of, if the list has a word for it.
    #[must_use]
    pub fn huge_slot(&self, index: u64) -> Option<Slot> {
        let number = (index.checked_sub(self.lead)? / HUGE_PAGES) as usize;
        let first = self.lead + number as u64 * HUGE_PAGES;
        (number < self.huge.len()).then_some(Slot { first, huge: Some(number) })
    }
    /// The word of `slot`.
    #[must_use]
    pub fn load_slot(&self, slot: Slot) -> Entry {
        match slot.huge {
            Some(number) => Entry(self.huge[number].load(Ordering::Acquire)),
            None => self.load(slot.first).unwrap_or_default(),
        }
    }
    /// As [`PageList::store`]. Nothing below a huge slot may be visible or linked; see [`PageList::may_be_huge`].
    ///
    /// # Panics
    /// If the address of a huge page is not one.
    pub fn store_slot(&self, slot: Slot, entry: Entry) {
        let Some(number) = slot.huge else { return self.store(slot.first, entry) };
        if entry.is_active() {
            assert!(
                entry.address().is_aligned(page_bytes(HUGE_PAGES)),
                "{entry:?} is not that of a huge page"
            );
        }
        self.huge[number].store(entry.0, Ordering::Release);
    }
    /// Whether the word of a huge `slot` counts, and not those below it.
    #[must_use]
    pub fn is_whole(&self, slot: Slot) -> bool {
        slot.is_huge() && self.load_slot(slot).is_active()
    }
    /// Whether a huge `slot` counts, or can: nothing below it is visible or linked.
    #[must_use]
    pub fn may_be_huge(&self, slot: Slot) -> bool {
        let above = self.load_slot(slot);
        above.is_active()
            || above.0 & BELOW == 0
            || (slot.first..slot.end()).all(|index| self.small(index).is_none_or(|entry| !entry.is_active()))
    }
    /// Has the words below a huge `slot` say what its own word says. The device sees the same pages before, between and after.
    pub fn split(&self, slot: Slot) {
        let (Some(number), whole) = (slot.huge, self.load_slot(slot)) else { return };
        for page in 0..slot.pages() {
            self.entries[(slot.first + page) as usize].store(whole.page_of_huge(page).0, Ordering::Release);
        }
        self.huge[number].store(whole.unlinked().0 | BELOW, Ordering::Release);
    }
    /// The words that count for the pages `span`, with what they say; a huge page that `span` cuts comes whole.
    pub fn slots(&self, span: Range<u64>) -> impl Iterator<Item = (Slot, Entry)> + '_ {
        let (mut index, mut small_until) = (span.start, 0);
        std::iter::from_fn(move || {
            if index >= span.end {
                return None;
            }
            if index >= small_until {
                small_until = u64::MAX;
                if let Some(slot) = self.huge_slot(index) {
                    let entry = self.load_slot(slot);
                    if entry.is_active() || self.is_huge() {
                        (index, small_until) = (slot.end(), 0);
                        return Some((slot, entry));
                    }
                    small_until = slot.end();
                } else if index < self.lead {
                    small_until = self.lead;
                }
            }
            let slot = Slot::page(index);
            index += 1;
            Some((slot, self.small(slot.first).unwrap_or_default()))
        })
    }
}

impl fmt::Debug for PageList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageList").field("pages", &self.len).field("huge", &self.huge.len()).finish()
    }
}

/// The host has no memory for a page list of this many entries (8 bytes each).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no memory for a page list of {entries} entries (8 bytes each)")]
pub struct OutOfMemory {
    /// Entries asked for.
    pub entries: u64,
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
