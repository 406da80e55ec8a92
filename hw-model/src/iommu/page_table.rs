//! The radix page table of a domain.
//!
//! Nine bits a level above the granule (the IO page): with a granule of 4 KiB, leaves of 4 KiB, 2 MiB and 1 GiB, and a
//! root that reaches 48 bits. Engines walk it without a lock while software maps and unmaps; software calls on disjoint
//! ranges may run at once.
//!
//! ```text
//! root (OnceLock a slot) -> Upper: 512 words, one a 1 GiB entry, each with a slot for a
//!                           Middle: 512 words, one a 2 MiB entry, with one array of 512 x 512 leaf words
//! ```
//!
//! A word is empty, a leaf (address and permissions) or TABLE: look in the level below. The memory of a level below is
//! made once and kept, so a walk can never meet freed memory; what changes is whether the word points there. The leaf
//! words of a GiB are one lazily zeroed allocation: a GiB of IOVA that is prepared but never mapped costs address space,
//! not memory. The levels below are not given back before the domain is: IOVA is reused, so their size follows the peak.
//!
//! Unmapping leaves the address in the word and takes the permissions away. Such a word counts as empty everywhere; the
//! fault log uses it to say where a late DMA would have gone.

use crate::addr::{Iova, PhysAddr};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{OnceLock, zeroed_words};

bitflags::bitflags! {
    /// What a mapping allows, and what it leads to.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Prot: u64 {
        /// The device may read.
        const READ = 1;
        /// The device may write.
        const WRITE = 1 << 1;
        /// The physical address is a BAR, not memory (`IOMMU_MMIO`). Kept for reports; the address decides the way.
        const MMIO = 1 << 2;
        /// Read and write.
        const READ_WRITE = 1 | 1 << 1;
    }
}

/// Permission bits: a word with one of them is a live leaf.
const LIVE: u64 = Prot::READ_WRITE.bits();
const TABLE: u64 = 1 << 3;
const FLAGS: u64 = (1 << MIN_GRANULE_SHIFT) - 1;
/// log2 of entries a table.
const FANOUT_SHIFT: u32 = 9;
const FANOUT: usize = 1 << FANOUT_SHIFT;
/// Bits of a word below the smallest address: flags live there.
pub(super) const MIN_GRANULE_SHIFT: u32 = 11;
pub(super) const MAX_GRANULE_SHIFT: u32 = 16;
/// Bits of the largest domain.
pub(super) const MAX_WIDTH: u32 = 48;

/// The three sizes of leaves. The names are those of a 4 KiB granule; the sizes follow the granule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum LeafSize {
    /// One granule.
    Page = 0,
    /// 512 granules (2 MiB of 4 KiB).
    Large = 1,
    /// 512 x 512 granules (1 GiB of 4 KiB).
    Huge = 2,
}

impl LeafSize {
    /// Smallest first.
    pub const ALL: [Self; 3] = [Self::Page, Self::Large, Self::Huge];

    /// log2 of the leaf's bytes for a granule of `granule_shift`.
    #[must_use]
    pub fn shift(self, granule_shift: u32) -> u32 {
        granule_shift + FANOUT_SHIFT * self as u32
    }
}

/// Why a mapping was refused. Nothing of it stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// The start, the physical address or the length is not a multiple of the IO page, or the length is 0.
    #[error("mapping {iova} -> {phys} of {len:#x} bytes is not in whole IO pages of {granule:#x} bytes")]
    Misaligned {
        /// First IOVA.
        iova: Iova,
        /// Physical address.
        phys: PhysAddr,
        /// Bytes.
        len: u64,
        /// Bytes in an IO page.
        granule: u64,
    },
    /// The range passes the width of the domain.
    #[error("mapping {iova} of {len:#x} bytes passes the domain's {width} bits")]
    BeyondWidth {
        /// First IOVA.
        iova: Iova,
        /// Bytes.
        len: u64,
        /// Width of the domain in bits.
        width: u32,
    },
    /// Something is mapped there already: the caller links over a live link.
    #[error("{iova} is mapped already, to {existing}")]
    AlreadyMapped {
        /// First IOVA in the way.
        iova: Iova,
        /// Where it leads.
        existing: PhysAddr,
    },
    /// A mapping that allows neither reading nor writing.
    #[error("mapping {iova} allows neither reading nor writing")]
    NoAccess {
        /// First IOVA.
        iova: Iova,
    },
    /// The host has no memory for the tables.
    #[error("no memory for the IO page table at {iova}")]
    OutOfMemory {
        /// Where the table was needed.
        iova: Iova,
    },
}

/// Why an unmapping was refused. Nothing was unmapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnmapError {
    /// The range is empty or not in whole IO pages.
    #[error("unmapping {iova} of {len:#x} bytes is not in whole IO pages of {granule:#x} bytes")]
    Misaligned {
        /// First IOVA.
        iova: Iova,
        /// Bytes.
        len: u64,
        /// Bytes in an IO page.
        granule: u64,
    },
    /// The range passes the width of the domain.
    #[error("unmapping {iova} of {len:#x} bytes passes the domain's {width} bits")]
    BeyondWidth {
        /// First IOVA.
        iova: Iova,
        /// Bytes.
        len: u64,
        /// Width of the domain in bits.
        width: u32,
    },
    /// Nothing is mapped at part of the range.
    #[error("nothing is mapped at {iova}")]
    Hole {
        /// First IOVA of the hole.
        iova: Iova,
    },
    /// The range holds a part of a larger leaf. A real IOMMU would drop the whole leaf.
    #[error("{leaf} of {leaf_len:#x} bytes was mapped as one leaf; a part of it cannot be unmapped")]
    PartOfLeaf {
        /// First IOVA of the leaf.
        leaf: Iova,
        /// Bytes of the leaf.
        leaf_len: u64,
    },
}

/// A word as a walk found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Leaf {
    word: u64,
    size: LeafSize,
}

impl Leaf {
    pub(super) const ABSENT: Self = Self { word: 0, size: LeafSize::Page };

    pub(super) fn from_raw(word: u64, size: LeafSize) -> Self {
        Self { word, size }
    }
    pub(super) fn word(self) -> u64 {
        self.word
    }
    pub(super) fn size(self) -> LeafSize {
        self.size
    }
    pub(super) fn is_live(self) -> bool {
        self.word & LIVE != 0
    }
    pub(super) fn prot(self) -> Prot {
        Prot::from_bits_truncate(self.word)
    }
    /// The physical address of the leaf's first byte.
    pub(super) fn base(self) -> PhysAddr {
        PhysAddr(self.word & !FLAGS)
    }
    /// The address an unmapped word still holds.
    pub(super) fn last_mapped(self) -> Option<PhysAddr> {
        (self.word != 0).then(|| self.base())
    }
    /// The physical address of `iova`, which lies in this leaf.
    pub(super) fn translate(self, iova: Iova, granule_shift: u32) -> PhysAddr {
        self.base().offset(iova.0 & ((1 << self.size.shift(granule_shift)) - 1))
    }
}

pub(super) struct PageTable {
    root: Box<[OnceLock<Box<Upper>>]>,
    granule_shift: u32,
    width: u32,
    tables: AtomicU64,
}

struct Upper {
    words: Box<[AtomicU64]>,
    below: Box<[OnceLock<Box<Middle>>]>,
}

struct Middle {
    words: Box<[AtomicU64]>,
    /// 512 words for each of `words`.
    leaves: Box<[AtomicU64]>,
}

impl Middle {
    /// The leaf words below entry `index`.
    fn table(&self, index: usize) -> &[AtomicU64] {
        &self.leaves[index * FANOUT..(index + 1) * FANOUT]
    }
}

/// Leaves by size, in the order of [`LeafSize::ALL`].
pub(super) type LeafCounts = [u64; LeafSize::ALL.len()];

/// A stretch of words of one leaf size that an operation covers.
struct Stretch<'a> {
    size: LeafSize,
    iova: Iova,
    words: &'a [AtomicU64],
    /// The word above, where the stretch is all that is below it.
    above: Option<&'a AtomicU64>,
}

impl PageTable {
    /// `granule_shift` and `width` have been checked by the domain.
    pub(super) fn new(granule_shift: u32, width: u32) -> Self {
        let roots = 1_usize << width.saturating_sub(Self::root_shift(granule_shift));
        Self {
            root: (0..roots).map(|_| OnceLock::new()).collect(),
            granule_shift,
            width,
            tables: AtomicU64::new(1),
        }
    }

    fn root_shift(granule_shift: u32) -> u32 {
        LeafSize::Huge.shift(granule_shift) + FANOUT_SHIFT
    }

    fn index(&self, iova: u64, size: LeafSize) -> usize {
        (iova >> size.shift(self.granule_shift)) as usize & (FANOUT - 1)
    }

    fn bytes(&self, size: LeafSize) -> u64 {
        1 << size.shift(self.granule_shift)
    }

    /// Tables that exist, in modelled tables of 512 words.
    pub(super) fn table_count(&self) -> u64 {
        self.tables.load(Ordering::Relaxed)
    }

    /// The word that `iova` leads to: a live leaf, or the word where the walk ended.
    pub(super) fn walk(&self, iova: Iova) -> Leaf {
        let slot = (iova.0 >> Self::root_shift(self.granule_shift)) as usize;
        let Some(upper) = self.root.get(slot).and_then(OnceLock::get) else { return Leaf::ABSENT };
        let index = self.index(iova.0, LeafSize::Huge);
        let word = upper.words[index].load(Ordering::Acquire);
        if word & TABLE == 0 {
            return Leaf { word, size: LeafSize::Huge };
        }
        let Some(middle) = upper.below[index].get() else { return Leaf::ABSENT };
        let index = self.index(iova.0, LeafSize::Large);
        let word = middle.words[index].load(Ordering::Acquire);
        if word & TABLE == 0 {
            return Leaf { word, size: LeafSize::Large };
        }
        let word = middle.table(index)[self.index(iova.0, LeafSize::Page)].load(Ordering::Acquire);
        Leaf { word, size: LeafSize::Page }
    }

    /// Makes the tables that mappings in the range can need, down to the smallest leaf.
    pub(super) fn prepare(&self, iova: Iova, len: u64) -> Result<(), MapError> {
        let span = self.bytes(LeafSize::Huge);
        let mut at = iova.0 & !(span - 1);
        while at < iova.0 + len {
            self.middle(Iova(at))?;
            at += span;
        }
        Ok(())
    }

    fn upper(&self, iova: Iova) -> Result<&Upper, MapError> {
        let slot = &self.root[(iova.0 >> Self::root_shift(self.granule_shift)) as usize];
        if let Some(upper) = slot.get() {
            return Ok(upper);
        }
        let words = zeroed_words(FANOUT).ok_or(MapError::OutOfMemory { iova })?;
        let below = (0..FANOUT).map(|_| OnceLock::new()).collect();
        // Losing the race to another caller is as good as winning it.
        if slot.set(Box::new(Upper { words, below })).is_ok() {
            self.tables.fetch_add(1, Ordering::Relaxed);
        }
        slot.get().map(Box::as_ref).ok_or(MapError::OutOfMemory { iova })
    }

    fn middle(&self, iova: Iova) -> Result<(&Upper, &Middle), MapError> {
        let upper = self.upper(iova)?;
        let slot = &upper.below[self.index(iova.0, LeafSize::Huge)];
        if let Some(middle) = slot.get() {
            return Ok((upper, middle));
        }
        let words = zeroed_words(FANOUT).ok_or(MapError::OutOfMemory { iova })?;
        let leaves = zeroed_words(FANOUT * FANOUT).ok_or(MapError::OutOfMemory { iova })?;
        if slot.set(Box::new(Middle { words, leaves })).is_ok() {
            self.tables.fetch_add(1 + FANOUT as u64, Ordering::Relaxed);
        }
        slot.get().map(|middle| (upper, middle.as_ref())).ok_or(MapError::OutOfMemory { iova })
    }

    /// Maps the range with the largest leaves, up to `largest`, that alignment and length allow. Gives the leaves used. On
    /// an error, `unwound` is called with the part that had been visible for a moment.
    #[inline]
    pub(super) fn map(
        &self,
        iova: Iova,
        phys: PhysAddr,
        len: u64,
        prot: Prot,
        largest: LeafSize,
        unwound: impl FnOnce(u64),
    ) -> Result<LeafCounts, MapError> {
        self.check_map(iova, phys, len, prot)?;
        if len == self.bytes(LeafSize::Page) {
            let words = self.words_for(iova, LeafSize::Page)?;
            let word = &words[self.index(iova.0, LeafSize::Page)];
            self.install(word, phys.0 | prot.bits(), iova, LeafSize::Page)?;
            return Ok([1, 0, 0]);
        }
        let mut counts = LeafCounts::default();
        let mut done = 0;
        while done < len {
            let (at, to) = (iova.offset(done), phys.offset(done));
            let size = self.choose(at, to, len - done, largest);
            let installed = self.install_run(at, to, len - done, prot, size, &mut done);
            if let Err(error) = installed {
                self.unwind(iova, done, unwound);
                return Err(error);
            }
            counts[size as usize] += (iova.0 + done - at.0) >> size.shift(self.granule_shift);
        }
        Ok(counts)
    }

    /// Maps one IO page for each address of `frames`, at consecutive IOVAs. Gives the number mapped. Errors as
    /// [`PageTable::map`].
    pub(super) fn map_scattered(
        &self,
        iova: Iova,
        frames: impl IntoIterator<Item = PhysAddr>,
        prot: Prot,
        unwound: impl FnOnce(u64),
    ) -> Result<u64, MapError> {
        let page = self.bytes(LeafSize::Page);
        let mut words: &[AtomicU64] = &[];
        let mut done = 0;
        for phys in frames {
            let at = iova.offset(done);
            let index = self.index(at.0, LeafSize::Page);
            let installed = self.check_map(at, phys, page, prot).and_then(|()| {
                if done == 0 || index == 0 {
                    words = self.words_for(at, LeafSize::Page)?;
                }
                self.install(&words[index], phys.0 | prot.bits(), at, LeafSize::Page)
            });
            if let Err(error) = installed {
                self.unwind(iova, done, unwound);
                return Err(error);
            }
            done += page;
        }
        Ok(done >> self.granule_shift)
    }

    #[cold]
    fn unwind(&self, iova: Iova, done: u64, unwound: impl FnOnce(u64)) {
        if done == 0 {
            return;
        }
        let undone = self.visit(iova, done, |stretch| {
            Self::clear(&stretch);
            Ok(())
        });
        debug_assert!(undone.is_ok(), "what this call mapped was there to unmap");
        unwound(done);
    }

    fn check_map(&self, iova: Iova, phys: PhysAddr, len: u64, prot: Prot) -> Result<(), MapError> {
        let granule = self.bytes(LeafSize::Page);
        if len == 0 || (iova.0 | phys.0 | len) & (granule - 1) != 0 {
            return Err(MapError::Misaligned { iova, phys, len, granule });
        }
        if !prot.intersects(Prot::READ_WRITE) {
            return Err(MapError::NoAccess { iova });
        }
        if !self.holds(iova, len) {
            return Err(MapError::BeyondWidth { iova, len, width: self.width });
        }
        Ok(())
    }

    /// Whether the range lies within the width of the domain.
    pub(super) fn holds(&self, iova: Iova, len: u64) -> bool {
        iova.0.checked_add(len).is_some_and(|end| end <= 1 << self.width)
    }

    fn choose(&self, iova: Iova, phys: PhysAddr, len: u64, largest: LeafSize) -> LeafSize {
        let fits = |size: LeafSize| {
            let bytes = self.bytes(size);
            size <= largest && len >= bytes && (iova.0 | phys.0) & (bytes - 1) == 0
        };
        if fits(LeafSize::Huge) {
            LeafSize::Huge
        } else if fits(LeafSize::Large) {
            LeafSize::Large
        } else {
            LeafSize::Page
        }
    }

    /// The words of the table that holds leaves of `size` at `iova`, made reachable for a walk.
    #[inline]
    fn words_for(&self, iova: Iova, size: LeafSize) -> Result<&[AtomicU64], MapError> {
        if size == LeafSize::Huge {
            return Ok(&self.upper(iova)?.words);
        }
        let (upper, middle) = self.middle(iova)?;
        self.enter(&upper.words[self.index(iova.0, LeafSize::Huge)], iova, LeafSize::Huge)?;
        if size == LeafSize::Large {
            return Ok(&middle.words);
        }
        let index = self.index(iova.0, LeafSize::Large);
        self.enter(&middle.words[index], iova, LeafSize::Large)?;
        Ok(middle.table(index))
    }

    /// Makes `word` lead to the table below it.
    #[inline]
    fn enter(&self, word: &AtomicU64, iova: Iova, size: LeafSize) -> Result<(), MapError> {
        let mut now = word.load(Ordering::Acquire);
        loop {
            if now & TABLE != 0 {
                return Ok(());
            }
            let leaf = Leaf { word: now, size };
            if leaf.is_live() {
                return Err(MapError::AlreadyMapped {
                    iova,
                    existing: leaf.translate(iova, self.granule_shift),
                });
            }
            match word.compare_exchange(now, TABLE, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Ok(()),
                Err(other) => now = other,
            }
        }
    }

    /// Puts leaves of one size at `iova`, up to the end of their table or of `len`. Adds what it mapped to `done`, also
    /// when it stops at a live leaf.
    fn install_run(
        &self,
        iova: Iova,
        phys: PhysAddr,
        len: u64,
        prot: Prot,
        size: LeafSize,
        done: &mut u64,
    ) -> Result<(), MapError> {
        let words = self.words_for(iova, size)?;
        let first = self.index(iova.0, size);
        let count = (len >> size.shift(self.granule_shift)).min((FANOUT - first) as u64) as usize;
        let step = self.bytes(size);
        let (mut at, mut target) = (iova, phys);
        for word in &words[first..first + count] {
            self.install(word, target.0 | prot.bits(), at, size)?;
            (at, target) = (at.offset(step), target.offset(step));
            *done += step;
        }
        Ok(())
    }

    /// Puts one leaf in its word.
    #[inline]
    fn install(&self, word: &AtomicU64, new: u64, iova: Iova, size: LeafSize) -> Result<(), MapError> {
        let mut now = word.load(Ordering::Relaxed);
        loop {
            if now & (LIVE | TABLE) != 0 {
                self.check_vacant(Leaf { word: now, size }, iova)?;
            }
            // Exchanged rather than stored: of two callers who map one IOVA at once, one is told.
            match word.compare_exchange(now, new, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return Ok(()),
                Err(other) => now = other,
            }
        }
    }

    /// Whether a leaf may take the place of this word: it is no live leaf, and nothing is mapped below it.
    #[cold]
    fn check_vacant(&self, leaf: Leaf, iova: Iova) -> Result<(), MapError> {
        if leaf.word & TABLE == 0 {
            return Err(MapError::AlreadyMapped { iova, existing: leaf.base() });
        }
        let (upper, middle) = self.middle(iova)?;
        if leaf.size == LeafSize::Large {
            return self.check_empty(middle.table(self.index(iova.0, LeafSize::Large)), iova, LeafSize::Page);
        }
        let Some(middle) = upper.below[self.index(iova.0, LeafSize::Huge)].get() else { return Ok(()) };
        for (index, word) in middle.words.iter().enumerate() {
            let at = iova.offset(index as u64 * self.bytes(LeafSize::Large));
            self.check_empty(std::slice::from_ref(word), at, LeafSize::Large)?;
            if word.load(Ordering::Acquire) & TABLE != 0 {
                self.check_empty(middle.table(index), at, LeafSize::Page)?;
            }
        }
        Ok(())
    }

    fn check_empty(&self, words: &[AtomicU64], iova: Iova, size: LeafSize) -> Result<(), MapError> {
        for (index, word) in words.iter().enumerate() {
            let leaf = Leaf { word: word.load(Ordering::Acquire), size };
            if leaf.is_live() {
                let iova = iova.offset(index as u64 * self.bytes(size));
                return Err(MapError::AlreadyMapped { iova, existing: leaf.base() });
            }
        }
        Ok(())
    }

    /// Unmaps the range, which must consist of whole live leaves. Gives how many of each size.
    pub(super) fn unmap(&self, iova: Iova, len: u64) -> Result<LeafCounts, UnmapError> {
        let granule = self.bytes(LeafSize::Page);
        if len == 0 || (iova.0 | len) & (granule - 1) != 0 {
            return Err(UnmapError::Misaligned { iova, len, granule });
        }
        if !self.holds(iova, len) {
            return Err(UnmapError::BeyondWidth { iova, len, width: self.width });
        }
        self.visit(iova, len, |stretch| self.check_live(&stretch))?;
        let mut counts = LeafCounts::default();
        self.visit(iova, len, |stretch| {
            Self::clear(&stretch);
            counts[stretch.size as usize] += stretch.words.len() as u64;
            Ok(())
        })?;
        self.forget_empty_upper(iova, len);
        Ok(counts)
    }

    fn check_live(&self, stretch: &Stretch<'_>) -> Result<(), UnmapError> {
        for (index, word) in stretch.words.iter().enumerate() {
            if word.load(Ordering::Relaxed) & LIVE == 0 {
                let step = self.bytes(stretch.size);
                return Err(UnmapError::Hole { iova: stretch.iova.offset(index as u64 * step) });
            }
        }
        Ok(())
    }

    fn clear(stretch: &Stretch<'_>) {
        for word in stretch.words {
            let leaf = word.load(Ordering::Relaxed);
            word.store(leaf & !FLAGS, Ordering::Release);
        }
        if let Some(above) = stretch.above {
            above.store(0, Ordering::Release);
        }
    }

    /// Words for 1 GiB entries that the range covers whole lead nowhere any more: a huge leaf fits again without a
    /// search below.
    fn forget_empty_upper(&self, iova: Iova, len: u64) {
        let span = self.bytes(LeafSize::Huge);
        let mut at = iova.0.next_multiple_of(span);
        while at + span <= iova.0 + len {
            if let Some(upper) = self.root[(at >> Self::root_shift(self.granule_shift)) as usize].get() {
                let word = &upper.words[self.index(at, LeafSize::Huge)];
                if word.load(Ordering::Relaxed) & TABLE != 0 {
                    word.store(0, Ordering::Release);
                }
            }
            at += span;
        }
    }

    /// Calls `each` for every stretch of words that the range covers, in ascending order. Stops at a hole, and at a leaf
    /// that the range holds only a part of.
    fn visit(
        &self,
        iova: Iova,
        len: u64,
        mut each: impl FnMut(Stretch<'_>) -> Result<(), UnmapError>,
    ) -> Result<(), UnmapError> {
        let end = iova.0 + len;
        let mut at = iova.0;
        while at < end {
            let hole = UnmapError::Hole { iova: Iova(at) };
            let slot = &self.root[(at >> Self::root_shift(self.granule_shift)) as usize];
            let upper = slot.get().ok_or(hole)?;
            let index = self.index(at, LeafSize::Huge);
            let word = &upper.words[index];
            let now = word.load(Ordering::Acquire);
            if now & TABLE == 0 {
                at = self.visit_leaf(at, end, word, now, LeafSize::Huge, &mut each)?;
                continue;
            }
            let middle = upper.below[index].get().ok_or(hole)?;
            let index = self.index(at, LeafSize::Large);
            let word = &middle.words[index];
            let now = word.load(Ordering::Acquire);
            if now & TABLE == 0 {
                at = self.visit_leaf(at, end, word, now, LeafSize::Large, &mut each)?;
                continue;
            }
            let first = self.index(at, LeafSize::Page);
            let count = ((end - at) >> self.granule_shift).min((FANOUT - first) as u64) as usize;
            let above = (count == FANOUT).then_some(word);
            let words = &middle.table(index)[first..first + count];
            each(Stretch { size: LeafSize::Page, iova: Iova(at), words, above })?;
            at += (count as u64) << self.granule_shift;
        }
        Ok(())
    }

    fn visit_leaf(
        &self,
        at: u64,
        end: u64,
        word: &AtomicU64,
        now: u64,
        size: LeafSize,
        each: &mut impl FnMut(Stretch<'_>) -> Result<(), UnmapError>,
    ) -> Result<u64, UnmapError> {
        let bytes = self.bytes(size);
        if now & LIVE == 0 {
            return Err(UnmapError::Hole { iova: Iova(at) });
        }
        if at & (bytes - 1) != 0 || end - at < bytes {
            return Err(UnmapError::PartOfLeaf { leaf: Iova(at & !(bytes - 1)), leaf_len: bytes });
        }
        each(Stretch { size, iova: Iova(at), words: std::slice::from_ref(word), above: None })?;
        Ok(at + bytes)
    }
}
