//! The host's own invariants.

use super::kernel::{Holders, Kernel, MmId, Place};
use super::object::ObjectId;
use super::span::{HUGE_PAGES, Span};
use super::store::{NULL_FRAME, ZERO_FRAME};
use super::vma::Encryption;
use crate::space::Access;
use std::collections::BTreeMap;

/// Something that the host believes and that is not so. Always a bug, of the host or of a device that wrote where it may
/// not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// A page table entry where nothing is mapped.
    #[error("process {mm:?} has an entry for page {page:#x}, which is not mapped")]
    Stray {
        /// The process.
        mm: MmId,
        /// Its page.
        page: u64,
    },
    /// An entry allows writing what may not be written: the mapping forbids it, the page is shared by copies, or it is
    /// the page of zeroes.
    #[error("process {mm:?} may write page {page:#x}, which is not its own to write")]
    Writable {
        /// The process.
        mm: MmId,
        /// Its page.
        page: u64,
    },
    /// A huge page is not 512 contiguous, aligned, equal entries.
    #[error("process {mm:?} maps a huge page at {page:#x} that is none")]
    Huge {
        /// The process.
        mm: MmId,
        /// Its first page.
        page: u64,
    },
    /// Who holds a page, and whom the page says it is held by, differ.
    #[error("page {number:#x} of memory {device:?} is held by others than it says")]
    Holders {
        /// The device memory, or `None` for RAM.
        device: Option<u32>,
        /// The frame, or page of the device.
        number: u64,
    },
    /// A page is in an object's cache beyond its end.
    #[error("object {object:?} holds page {index} beyond its end")]
    BeyondEnd {
        /// The object.
        object: ObjectId,
        /// The page.
        index: u64,
    },
    /// A page that is dirty is not there.
    #[error("object {object:?} has lost its dirty page {index}")]
    LostDirty {
        /// The object.
        object: ObjectId,
        /// The page.
        index: u64,
    },
    /// References to a slot of swap are not as counted.
    #[error("swap slot {slot} is referenced {found} times, not {counted}")]
    Swap {
        /// The slot.
        slot: u64,
        /// References found.
        found: u32,
        /// References counted.
        counted: u32,
    },
    /// A free page was written by somebody who had no business there.
    #[error("frame {frame:#x} is free and has been written")]
    WrittenWhileFree {
        /// The frame.
        frame: u32,
    },
    /// A frame is neither free nor held, or both.
    #[error("frame {frame:#x} is lost, or both free and in use")]
    Lost {
        /// The frame.
        frame: u32,
    },
    /// The page of zeroes holds something else.
    #[error("the page of zeroes has been written")]
    ZeroPage,
    /// A frame is encrypted for devices and its mapping is not private, or the other way round.
    #[error("process {mm:?} page {page:#x} is not as encrypted as its mapping says")]
    Encryption {
        /// The process.
        mm: MmId,
        /// Its page.
        page: u64,
    },
}

impl Kernel {
    pub fn check(&self) -> Result<(), Broken> {
        let mut held: BTreeMap<Place, Holders> = BTreeMap::new();
        let mut swapped: BTreeMap<u64, u32> = BTreeMap::new();
        self.check_processes(&mut held, &mut swapped)?;
        self.check_objects(&mut held, &mut swapped)?;
        self.check_holders(&held)?;
        for (slot, counted) in self.swap.iter().map(|(slot, kept)| (*slot, kept.references)) {
            let found = swapped.remove(&slot).unwrap_or(0);
            if found != counted {
                return Err(Broken::Swap { slot, found, counted });
            }
        }
        if let Some((slot, found)) = swapped.pop_first() {
            return Err(Broken::Swap { slot, found, counted: 0 });
        }
        self.check_frames()
    }

    fn check_processes(
        &self,
        held: &mut BTreeMap<Place, Holders>,
        swapped: &mut BTreeMap<u64, u32>,
    ) -> Result<(), Broken> {
        for (id, mm) in &self.mms {
            for (page, pte) in &mm.table {
                let (mm, page) = (*id, *page);
                let vma = self.vma(mm, page).ok_or(Broken::Stray { mm, page })?;
                match pte.place {
                    Place::Swap(slot) => *swapped.entry(slot).or_default() += 1,
                    Place::Zero | Place::Poisoned => {}
                    place => drop(held.entry(place).or_default().mappers.insert((mm, page))),
                }
                let own = vma.is_shared() || self.is_sole(pte.place);
                if pte.write && !(vma.protection.allows(Access::Write) && own) {
                    return Err(Broken::Writable { mm, page });
                }
                if let Place::Ram(frame) = pte.place
                    && self.cached(pte.place).is_none()
                    && self.store.is_private(frame) != (vma.encryption == Encryption::Private)
                {
                    return Err(Broken::Encryption { mm, page });
                }
            }
            for head in &mm.huge {
                let entries: Vec<_> =
                    mm.table.range(Span::huge(*head).pages()).map(|(_, pte)| *pte).collect();
                let inside = mm.vmas.at(*head).is_some_and(|vma| vma.span.contains(Span::huge(*head)));
                let whole = inside && entries.len() as u64 == HUGE_PAGES;
                let alike = entries.iter().enumerate().all(|(n, pte)| {
                    let (first, number) = match (entries[0].place, pte.place) {
                        (Place::Ram(first), Place::Ram(frame)) => (first, frame),
                        (Place::Device { memory, page: first }, Place::Device { memory: same, page })
                            if memory == same =>
                        {
                            (first, page)
                        }
                        _ => return false,
                    };
                    u64::from(first).is_multiple_of(HUGE_PAGES)
                        && number == first + n as u32
                        && pte.write == entries[0].write
                        && pte.exclusive.is_none()
                });
                if !(whole && alike) {
                    return Err(Broken::Huge { mm: *id, page: *head });
                }
            }
        }
        Ok(())
    }

    fn check_objects(
        &self,
        held: &mut BTreeMap<Place, Holders>,
        swapped: &mut BTreeMap<u64, u32>,
    ) -> Result<(), Broken> {
        for (id, object) in &self.objects {
            for (index, place) in &object.cache {
                if *index >= object.pages {
                    return Err(Broken::BeyondEnd { object: *id, index: *index });
                }
                match place {
                    Place::Swap(slot) => *swapped.entry(*slot).or_default() += 1,
                    Place::Zero | Place::Poisoned => {}
                    // In two places at once: the second does not find what it says of itself.
                    place => held.entry(*place).or_default().cached = Some((*id, *index)),
                }
            }
            if let Some(index) = object.dirty.iter().find(|index| !object.cache.contains_key(index)) {
                return Err(Broken::LostDirty { object: *id, index: *index });
            }
        }
        Ok(())
    }

    fn check_holders(&self, held: &BTreeMap<Place, Holders>) -> Result<(), Broken> {
        let broken = |place: &Place| match *place {
            Place::Device { memory, page } => {
                Broken::Holders { device: Some(memory.0), number: u64::from(page) }
            }
            Place::Ram(frame) => Broken::Holders { device: None, number: u64::from(frame) },
            Place::Zero | Place::Swap(_) | Place::Poisoned => unreachable!("nobody holds {place:?}"),
        };
        for (place, found) in held {
            let known = self.holders.get(place).ok_or_else(|| broken(place))?;
            if known.cached != found.cached || known.mappers != found.mappers {
                return Err(broken(place));
            }
        }
        let unpinned = |(place, known): &(&Place, &Holders)| known.pins == 0 && !held.contains_key(place);
        match self.holders.iter().find(unpinned) {
            Some((place, _)) => Err(broken(place)),
            None => Ok(()),
        }
    }

    fn check_frames(&self) -> Result<(), Broken> {
        let used = |frame| {
            frame == NULL_FRAME
                || frame == ZERO_FRAME
                || self.poisoned.contains(&frame)
                || self.holders.contains_key(&Place::Ram(frame))
        };
        for frame in 0..self.store.frames() {
            if used(frame) == self.frames.is_free(frame) {
                return Err(Broken::Lost { frame });
            }
            if self.store.is_written_while_free(frame) {
                return Err(Broken::WrittenWhileFree { frame });
            }
        }
        if self.store.page(Place::Zero).iter().any(|byte| *byte != 0) {
            Err(Broken::ZeroPage)
        } else {
            Ok(())
        }
    }
}
