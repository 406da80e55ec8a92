//! Mapping: leaves go in where nothing is, and a call that fails takes out what it put in.

use super::{LeafCounts, Middle, PageTable};
use crate::addr::{Iova, PhysAddr};
use crate::iommu::host::HostRefusal;
use crate::iommu::leaf::{FANOUT, LIVE, Leaf, LeafSize, Prot, TABLE};
use crate::sync::atomic::{AtomicU64, Ordering};

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
    /// The host refused, who has an IOMMU that is no model. [`Domain`](crate::iommu::Domain) never says this.
    #[error("{iova} cannot be mapped: {why}")]
    Host {
        /// Where.
        iova: Iova,
        /// Why.
        why: HostRefusal,
    },
}

impl PageTable {
    /// Maps the range with the largest leaves, up to `largest`, that alignment and length allow. Gives the leaves used. On
    /// an error, `unwound` is called with the part that had been visible for a moment.
    #[inline]
    pub(in crate::iommu) fn map(
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
            let words = self.words_for(iova)?;
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
    pub(in crate::iommu) fn map_scattered(
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
                    words = self.words_for(at)?;
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

    /// The words of the table that holds leaves of one IO page at `iova`, made reachable for a walk.
    #[inline]
    fn words_for(&self, iova: Iova) -> Result<&[AtomicU64], MapError> {
        let middle = self.enter_middle(iova)?;
        let index = self.index(iova.0, LeafSize::Large);
        let word = &middle.words[index];
        if word.load(Ordering::Acquire) & TABLE == 0 {
            let _filling = middle.filling.lock();
            self.enter(word, iova, LeafSize::Large)?;
        }
        Ok(middle.table(index))
    }

    /// The tables of the GiB that holds `iova`, made reachable for a walk.
    #[inline]
    fn enter_middle(&self, iova: Iova) -> Result<&Middle, MapError> {
        let (upper, middle) = self.middle(iova)?;
        self.enter(&upper.words[self.index(iova.0, LeafSize::Huge)], iova, LeafSize::Huge)?;
        Ok(middle)
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
        let (words, _filling) = match size {
            LeafSize::Page => (self.words_for(iova)?, None),
            LeafSize::Large => {
                let middle = self.enter_middle(iova)?;
                (&*middle.words, Some(middle.filling.lock()))
            }
            LeafSize::Huge => (&*self.upper(iova)?.words, None),
        };
        let first = self.index(iova.0, size);
        let count = (len >> size.shift(self.granule_shift)).min((FANOUT - first) as u64) as usize;
        let step = self.bytes(size);
        let (mut at, mut target) = (iova, phys);
        for word in &words[first..first + count] {
            let new = target.0 | prot.bits();
            match size {
                LeafSize::Large => self.install_locked(word, new, at)?,
                LeafSize::Page | LeafSize::Huge => self.install(word, new, at, size)?,
            }
            (at, target) = (at.offset(step), target.offset(step));
            *done += step;
        }
        Ok(())
    }

    /// Puts one large leaf in its word. The caller holds the lock of its table.
    #[inline]
    fn install_locked(&self, word: &AtomicU64, new: u64, iova: Iova) -> Result<(), MapError> {
        let now = word.load(Ordering::Relaxed);
        if now & (LIVE | TABLE) != 0 {
            self.check_vacant(Leaf { word: now, size: LeafSize::Large }, iova)?;
        }
        word.store(new, Ordering::Release);
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
}
