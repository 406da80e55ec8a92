//! All that is not bytes: page tables, mappings, who holds which page. Everything here happens under the host's one lock.

use super::frames::Frames;
use super::object::{Object, ObjectId, ObjectKind};
use super::span::{HUGE_PAGES, Span, huge_head};
use super::store::{DeviceKind, DeviceMemoryId, Store};
use super::vma::{Encryption, Source, Vma, Vmas};
use crate::notifier::Notifiers;
use crate::page::{Backing, PageRun};
use hw_model::addr::{PAGE_SHIFT, PAGE_SIZE, PhysAddr, VirtAddr};
use hw_model::bus::{DmaEpoch, ProviderId};
use hw_model::sync::Arc;
use rand_chacha::ChaCha8Rng;
use std::collections::{BTreeMap, BTreeSet};

/// A process of one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MmId(pub u32);

/// Where the bytes of a page are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Place {
    /// The one page of zeroes.
    Zero,
    /// A frame of RAM.
    Ram(u32),
    /// A page of a device's memory.
    Device { memory: DeviceMemoryId, page: u32 },
    /// A slot of swap.
    Swap(u64),
    /// Nowhere: the memory failed.
    Poisoned,
}

/// One entry of a page table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pte {
    pub place: Place,
    pub write: bool,
    /// Lent to this device for its exclusive use: present for nobody else until somebody else touches it.
    pub exclusive: Option<ProviderId>,
}

/// One process.
#[derive(Debug)]
pub(super) struct Mm {
    pub notifiers: Arc<Notifiers>,
    pub vmas: Vmas,
    pub table: BTreeMap<u64, Pte>,
    /// First pages of what is mapped as a huge page: 512 entries, contiguous frames, changed only as a whole.
    pub huge: BTreeSet<u64>,
}

impl Mm {
    pub fn is_huge(&self, page: u64) -> bool {
        self.huge.contains(&huge_head(page))
    }
    /// `span`, extended to the whole of the huge pages that it cuts.
    pub fn huge_cover(&self, span: Span) -> Span {
        if span.is_empty() {
            return span;
        }
        let mut cover = span;
        for page in [span.first, span.end - 1] {
            if self.is_huge(page) {
                cover = cover.hull(Span::huge(page));
            }
        }
        cover
    }
    /// First pages of the huge pages that overlap `span`.
    pub fn heads(&self, span: Span) -> Vec<u64> {
        let from = huge_head(span.first);
        self.huge.range(from..span.end.max(from)).copied().collect()
    }
    /// Maps what is mapped huge in `span` by small pages.
    pub fn split(&mut self, span: Span) -> u64 {
        let heads = self.heads(span);
        for head in &heads {
            self.huge.remove(head);
        }
        heads.len() as u64
    }
    /// The entries in `span`.
    pub fn entries(&self, span: Span) -> Vec<(u64, Pte)> {
        self.table.range(span.pages()).map(|(page, pte)| (*page, *pte)).collect()
    }
}

/// Who holds a page.
#[derive(Clone, Debug, Default)]
pub(super) struct Holders {
    pub mappers: BTreeSet<(MmId, u64)>,
    pub cached: Option<(ObjectId, u64)>,
    /// Long-term pins: while there are any the page stays where it is, and in use.
    pub pins: u32,
}

/// What a reference to a page comes from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Holder {
    Pte(MmId, u64),
    Object(ObjectId, u64),
    Pin,
}

/// What was swapped out, and how many entries say so.
#[derive(Debug)]
pub(super) struct SwapSlot {
    pub bytes: Box<[u8]>,
    pub references: u32,
}

/// The state of one host.
#[derive(Debug)]
pub(super) struct Kernel {
    pub store: Arc<Store>,
    pub epoch: Arc<DmaEpoch>,
    pub rng: ChaCha8Rng,
    pub frames: Frames,
    pub holders: BTreeMap<Place, Holders>,
    pub swap: BTreeMap<u64, SwapSlot>,
    /// Free pages of the device memories that pages can be migrated to.
    pub device_free: BTreeMap<DeviceMemoryId, BTreeSet<u32>>,
    pub mms: BTreeMap<MmId, Mm>,
    pub objects: BTreeMap<ObjectId, Object>,
    /// Frames that failed and are never used again.
    pub poisoned: BTreeSet<u32>,
    pub next_id: u32,
    pub next_slot: u64,
}

/// No memory, of the kind that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NoFrame;

impl Kernel {
    pub fn mm(&self, mm: MmId) -> Option<&Mm> {
        self.mms.get(&mm)
    }
    pub fn mm_mut(&mut self, mm: MmId) -> &mut Mm {
        self.mms.get_mut(&mm).expect("the process lives")
    }
    pub fn object_mut(&mut self, object: ObjectId) -> &mut Object {
        self.objects.get_mut(&object).expect("objects live as long as their host")
    }
    pub fn vma(&self, mm: MmId, page: u64) -> Option<Vma> {
        self.mm(mm)?.vmas.at(page).copied()
    }
    pub fn pte(&self, mm: MmId, page: u64) -> Option<Pte> {
        self.mm(mm)?.table.get(&page).copied()
    }

    /// A frame that the caller fills and links at once.
    pub fn take_frame(&mut self) -> Result<Place, NoFrame> {
        self.take_frame_of(None)
    }

    /// One of this node.
    pub fn take_frame_of(&mut self, node: Option<u32>) -> Result<Place, NoFrame> {
        let frame = self.frames.take(node).ok_or(NoFrame)?;
        self.store.revive(frame);
        Ok(Place::Ram(frame))
    }

    /// 512 contiguous frames, likewise.
    pub fn take_huge(&mut self) -> Result<u32, NoFrame> {
        self.take_huge_of(None)
    }

    /// 512 of this node.
    pub fn take_huge_of(&mut self, node: Option<u32>) -> Result<u32, NoFrame> {
        let head = self.frames.take_huge(node).ok_or(NoFrame)?;
        (0..HUGE_PAGES as u32).for_each(|n| self.store.revive(head + n));
        Ok(head)
    }

    /// The first of 512 contiguous, aligned pages of a device memory, likewise.
    pub fn take_huge_device(&mut self, memory: DeviceMemoryId) -> Result<u32, NoFrame> {
        const HUGE: u32 = HUGE_PAGES as u32;
        let free = self.device_free.get_mut(&memory).ok_or(NoFrame)?;
        let whole = |head: &u32| free.range(*head..*head + HUGE).count() == HUGE as usize;
        let head =
            free.iter().copied().filter(|page| page.is_multiple_of(HUGE)).find(whole).ok_or(NoFrame)?;
        free.retain(|page| !(head..head + HUGE).contains(page));
        Ok(head)
    }

    /// A page of a device memory, likewise.
    pub fn take_device(&mut self, memory: DeviceMemoryId) -> Result<Place, NoFrame> {
        let free = self.device_free.get_mut(&memory).ok_or(NoFrame)?;
        Ok(Place::Device { memory, page: free.pop_first().ok_or(NoFrame)? })
    }

    pub fn hold(&mut self, place: Place, holder: Holder) {
        match place {
            Place::Zero | Place::Poisoned => {}
            Place::Swap(slot) => self.swap.get_mut(&slot).expect("a slot in use").references += 1,
            Place::Ram(_) | Place::Device { .. } => {
                let holders = self.holders.entry(place).or_default();
                match holder {
                    Holder::Pte(mm, page) => drop(holders.mappers.insert((mm, page))),
                    Holder::Object(object, index) => holders.cached = Some((object, index)),
                    Holder::Pin => holders.pins += 1,
                }
            }
        }
    }

    /// Gives up a hold; the last one gives the page back.
    pub fn release(&mut self, place: Place, holder: Holder) {
        match place {
            Place::Zero | Place::Poisoned => {}
            Place::Swap(slot) => {
                let references = &mut self.swap.get_mut(&slot).expect("a slot in use").references;
                *references -= 1;
                if *references == 0 {
                    self.swap.remove(&slot);
                }
            }
            Place::Ram(_) | Place::Device { .. } => {
                let holders = self.holders.get_mut(&place).expect("a page in use");
                match holder {
                    Holder::Pte(mm, page) => drop(holders.mappers.remove(&(mm, page))),
                    Holder::Object(..) => holders.cached = None,
                    Holder::Pin => holders.pins -= 1,
                }
                if holders.mappers.is_empty() && holders.cached.is_none() && holders.pins == 0 {
                    self.holders.remove(&place);
                    self.give_back(place);
                }
            }
        }
    }

    /// Nobody holds `place` any more: its bytes are destroyed and DMA to it is refused.
    pub fn give_back(&mut self, place: Place) {
        self.store.retire(place);
        match place {
            Place::Ram(frame) if !self.poisoned.contains(&frame) => self.frames.put(frame),
            Place::Device { memory, page } => {
                if let Some(free) = self.device_free.get_mut(&memory) {
                    free.insert(page);
                }
            }
            _ => {}
        }
    }

    /// Maps `page`, where nothing is, to `place`.
    pub fn link(&mut self, mm: MmId, page: u64, place: Place, write: bool) {
        self.hold(place, Holder::Pte(mm, page));
        self.tag(mm, page, place);
        let old = self.mm_mut(mm).table.insert(page, Pte { place, write, exclusive: None });
        assert!(old.is_none(), "page {page:#x} is mapped already");
    }

    /// Takes the entry of `page` away.
    pub fn unlink(&mut self, mm: MmId, page: u64) -> Option<Pte> {
        let pte = self.mm_mut(mm).table.remove(&page)?;
        self.release(pte.place, Holder::Pte(mm, page));
        Some(pte)
    }

    /// Maps `page` to `place` instead of what it is mapped to. A huge page around it is split.
    pub fn relink(&mut self, mm: MmId, page: u64, place: Place, write: bool) {
        self.mm_mut(mm).split(Span::page(page));
        self.unlink(mm, page);
        self.link(mm, page, place, write);
    }

    /// Takes all entries of `span` away, huge pages at its edges being split. Gives their number.
    pub fn zap(&mut self, mm: MmId, span: Span) -> u64 {
        self.mm_mut(mm).split(span);
        let entries = self.mm_mut(mm).entries(span);
        for (page, _) in &entries {
            self.unlink(mm, *page);
        }
        entries.len() as u64
    }

    /// Puts what is at `from` to `to`, which the caller took, for everybody who holds it.
    pub fn move_page(&mut self, from: Place, to: Place) {
        self.store.copy(from, to);
        let holders = self.holders.remove(&from).expect("a page in use");
        for (mm, page) in &holders.mappers {
            self.mm_mut(*mm).table.get_mut(page).expect("a mapper maps").place = to;
        }
        if let Some((object, index)) = holders.cached {
            self.object_mut(object).cache.insert(index, to);
        }
        self.holders.insert(to, holders);
        self.give_back(from);
    }

    /// Whether one entry alone holds `place`.
    pub fn is_sole(&self, place: Place) -> bool {
        self.holders.get(&place).is_some_and(|held| held.cached.is_none() && held.mappers.len() == 1)
    }

    /// Whether somebody holds `place` where it is.
    pub fn is_pinned(&self, place: Place) -> bool {
        self.holders.get(&place).is_some_and(|held| held.pins > 0)
    }

    /// Every (process, page) that maps `place`.
    pub fn mappers(&self, place: Place) -> Vec<(MmId, u64)> {
        self.holders.get(&place).map_or_else(Vec::new, |held| held.mappers.iter().copied().collect())
    }

    pub fn cached(&self, place: Place) -> Option<(ObjectId, u64)> {
        self.holders.get(&place).and_then(|held| held.cached)
    }

    pub fn kind(&self, object: ObjectId) -> ObjectKind {
        self.objects[&object].kind
    }

    pub fn is_hugetlb(&self, vma: &Vma) -> bool {
        vma.object_page(vma.span.first).is_some_and(|(object, _)| self.kind(object) == ObjectKind::Hugetlb)
    }

    /// Marks a process's own frame as private to the guest or not, as its mapping says.
    fn tag(&mut self, mm: MmId, page: u64, place: Place) {
        if let Place::Ram(frame) = place
            && self.cached(place).is_none()
        {
            let private = self.vma(mm, page).is_some_and(|vma| vma.encryption == Encryption::Private);
            self.store.set_private(frame, private);
        }
    }

    /// What a walk reports of `page`; `None` if it is not present for a device, or for `viewer`, to whom its own memory and
    /// what is lent to it are.
    pub fn report(&self, mm: MmId, page: u64, viewer: Option<ProviderId>) -> Option<PageRun> {
        let (vma, pte) = (self.vma(mm, page)?, self.pte(mm, page)?);
        let lent = pte.exclusive.is_some() && pte.exclusive != viewer;
        if lent || vma.protection == super::vma::Protection::None {
            return None;
        }
        let huge = self.mm(mm)?.is_huge(page);
        let (phys, provider) = self.phys(pte.place, viewer)?;
        Some(PageRun {
            start: VirtAddr::from_page_number(page),
            pages: 1,
            phys,
            backing: self.backing(&vma, pte.place, huge)?,
            writable: pte.write,
            order_shift: if huge { PAGE_SHIFT as u8 + HUGE_PAGES.ilog2() as u8 } else { PAGE_SHIFT as u8 },
            provider,
        })
    }

    /// Where the bus finds `place`, if it does.
    fn phys(&self, place: Place, viewer: Option<ProviderId>) -> Option<(PhysAddr, Option<ProviderId>)> {
        match place {
            Place::Zero => Some((PhysAddr::from_page_number(u64::from(super::store::ZERO_FRAME)), None)),
            Place::Ram(frame) => Some((PhysAddr::from_page_number(u64::from(frame)), None)),
            Place::Device { memory, page } => {
                let device = self.store.device(memory);
                let phys = device.base().offset(u64::from(page) * PAGE_SIZE);
                device.is_reached_by(viewer).then(|| (phys, Some(device.provider())))
            }
            Place::Swap(_) | Place::Poisoned => None,
        }
    }

    fn backing(&self, vma: &Vma, place: Place, huge: bool) -> Option<Backing> {
        let object = vma.object_page(vma.span.first).map(|(object, _)| self.kind(object));
        Some(match (place, vma.encryption, object) {
            (Place::Swap(_) | Place::Poisoned, ..) => return None,
            (Place::Zero, ..) => Backing::Zero,
            (Place::Device { memory, .. }, ..) => match self.store.device(memory).kind() {
                DeviceKind::Peer => Backing::DmabufPeer,
                DeviceKind::Coherent => Backing::DeviceCoherent,
                DeviceKind::Private => Backing::DevicePrivate,
            },
            (_, Encryption::Private, _) => Backing::EncryptedPrivate,
            (_, Encryption::Shared, _) => Backing::EncryptedShared,
            (_, _, Some(ObjectKind::Dmabuf { .. })) => Backing::DmabufSystem,
            (_, _, Some(ObjectKind::Hugetlb)) => Backing::Hugetlb,
            (_, _, Some(ObjectKind::File)) => Backing::File,
            (_, _, Some(ObjectKind::Shmem)) if self.cached(place).is_some() => Backing::Shared,
            _ if huge => Backing::TransparentHuge,
            _ => Backing::Anonymous,
        })
    }

    /// The pages of every process that map pages `of` of `object`, whole huge pages where those are cut.
    pub fn mappings_of(&self, object: ObjectId, of: Span) -> Vec<(MmId, Span)> {
        let mut found = Vec::new();
        for (id, mm) in &self.mms {
            let spans = mm.vmas.iter().filter_map(|vma| vma.mapping_of(object, of));
            found.extend(spans.map(|span| (*id, mm.huge_cover(span))));
        }
        found
    }

    /// Whether the mapping at `page` is one that fork copies.
    pub fn is_private(vma: &Vma) -> bool {
        matches!(vma.source, Source::Anonymous | Source::Private { .. })
    }
}
