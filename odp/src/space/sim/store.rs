//! The bytes of a host: frames of RAM and the memories of devices. No lock; DMA comes here from any thread.

use super::kernel::Place;
use hw_model::addr::{PAGE_SIZE, PhysAddr};
use hw_model::bus::{AtomicOp, BarStorage, MemoryError, PrivatePages, ProviderId, RamStorage, StorageError};
use hw_model::sync::atomic::{AtomicU8, Ordering};
use hw_model::sync::{Arc, OnceLock};
use std::fmt;

/// Device memories of one host.
pub(super) const MAX_DEVICES: usize = 8;
/// The frame that is never given out, so that physical address 0 is always a mistake.
pub(super) const NULL_FRAME: u32 = 0;
/// The frame of the one page of zeroes.
pub(super) const ZERO_FRAME: u32 = 1;
/// What a page holds that was given back.
const POISON: [u8; PAGE] = [0xdb; PAGE];
const PAGE: usize = PAGE_SIZE as usize;

/// Never used: no owner, and no pattern either, so that a host costs what it uses.
const FRESH: u8 = 0;
const FREE: u8 = 1;
const USED: u8 = 2;
const PRIVATE: u8 = 3;

/// A device memory of one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceMemoryId(pub u32);

/// What a device's memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// The BAR of a DMABUF exporter.
    Peer,
    /// Memory that CPU and peers reach coherently; anonymous pages can be migrated there.
    Coherent,
    /// Memory that nobody but its device reaches; anonymous pages migrated there come back when they are touched.
    Private,
}

/// The memory of one device: a window of the physical address space with bytes behind it.
pub struct DeviceMemory {
    pub(super) provider: ProviderId,
    pub(super) base: PhysAddr,
    pub(super) kind: DeviceKind,
    pub(super) storage: Arc<dyn BarStorage>,
}

impl DeviceMemory {
    /// Whose it is.
    #[must_use]
    pub fn provider(&self) -> ProviderId {
        self.provider
    }
    /// Where the host sees its first byte.
    #[must_use]
    pub fn base(&self) -> PhysAddr {
        self.base
    }
    /// What it is for.
    #[must_use]
    pub fn kind(&self) -> DeviceKind {
        self.kind
    }
    /// Its bytes, as they stand behind a BAR.
    #[must_use]
    pub fn storage(&self) -> &Arc<dyn BarStorage> {
        &self.storage
    }
    /// Whether `viewer`, or with `None` the CPU and whoever else, reaches it.
    pub(super) fn is_reached_by(&self, viewer: Option<ProviderId>) -> bool {
        self.kind != DeviceKind::Private || viewer == Some(self.provider)
    }
    /// Whole pages it has.
    #[must_use]
    pub fn pages(&self) -> u32 {
        u32::try_from(self.storage.size() / PAGE_SIZE).unwrap_or(u32::MAX)
    }
}

impl fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceMemory")
            .field("provider", &self.provider)
            .field("base", &self.base)
            .field("kind", &self.kind)
            .field("pages", &self.pages())
            .finish_non_exhaustive()
    }
}

/// All bytes of one host.
pub(super) struct Store {
    ram: Arc<RamStorage>,
    /// One of FRESH, FREE, USED, PRIVATE a frame.
    states: Box<[AtomicU8]>,
    /// The private ones again, for buses, which stop devices from reaching them.
    private: Arc<PrivatePages>,
    devices: [OnceLock<Arc<DeviceMemory>>; MAX_DEVICES],
}

/// Where a bus address leads.
struct Target<'a> {
    storage: &'a dyn BarStorage,
    offset: u64,
}

impl Store {
    /// `frames` frames of RAM, all free but that of zeroes; `None` if this machine has no memory for them.
    pub fn new(frames: u32) -> Option<Arc<Self>> {
        let states: Box<[AtomicU8]> = (0..frames).map(|_| AtomicU8::new(FRESH)).collect();
        let store = Self {
            ram: RamStorage::new(u64::from(frames) * PAGE_SIZE)?,
            states,
            private: Arc::default(),
            devices: Default::default(),
        };
        store.revive(ZERO_FRAME);
        Some(Arc::new(store))
    }

    pub fn frames(&self) -> u32 {
        self.states.len() as u32
    }
    pub fn add_device(&self, device: Arc<DeviceMemory>) -> Option<DeviceMemoryId> {
        let index = self.devices.iter().position(|slot| slot.set(Arc::clone(&device)).is_ok())?;
        Some(DeviceMemoryId(index as u32))
    }
    pub fn device(&self, memory: DeviceMemoryId) -> &Arc<DeviceMemory> {
        self.devices[memory.0 as usize].get().expect("ids come from add_device")
    }
    pub fn devices(&self) -> impl Iterator<Item = (DeviceMemoryId, &Arc<DeviceMemory>)> {
        let ids = (0..MAX_DEVICES as u32).map(DeviceMemoryId);
        ids.zip(&self.devices).filter_map(|(id, slot)| Some((id, slot.get()?)))
    }

    /// `frame` has an owner again.
    pub fn revive(&self, frame: u32) {
        self.states[frame as usize].store(USED, Ordering::Release);
    }
    /// `place` has no owner any more.
    pub fn retire(&self, place: Place) {
        if let Place::Ram(frame) = place {
            self.set(frame, FREE);
        }
        self.write(place, 0, &POISON);
    }
    /// Whether `frame` is kept from devices.
    pub fn set_private(&self, frame: u32, private: bool) {
        self.set(frame, if private { PRIVATE } else { USED });
    }
    fn set(&self, frame: u32, state: u8) {
        let before = self.states[frame as usize].swap(state, Ordering::AcqRel);
        let at = PhysAddr(u64::from(frame) * PAGE_SIZE);
        match (before == PRIVATE, state == PRIVATE) {
            (false, true) => self.private.make_private(at, PAGE_SIZE),
            (true, false) => self.private.share(at, PAGE_SIZE),
            _ => {}
        }
    }
    /// The frames that are kept from devices.
    pub fn private_pages(&self) -> &Arc<PrivatePages> {
        &self.private
    }
    pub fn is_private(&self, frame: u32) -> bool {
        self.states[frame as usize].load(Ordering::Acquire) == PRIVATE
    }
    /// Whether `frame` was given back and no longer holds what was left in it then.
    pub fn is_written_while_free(&self, frame: u32) -> bool {
        self.states[frame as usize].load(Ordering::Acquire) == FREE
            && self.page(Place::Ram(frame))[..] != POISON
    }

    /// Copies from `offset` bytes into the page at `place`, as the CPU does.
    pub fn read(&self, place: Place, offset: u64, out: &mut [u8]) {
        let (storage, base) = self.of(place);
        storage.read(base + offset, out).expect("places lie in their storage");
    }
    /// Copies to `offset` bytes into the page at `place`, as the CPU does.
    pub fn write(&self, place: Place, offset: u64, data: &[u8]) {
        let (storage, base) = self.of(place);
        storage.write(base + offset, data).expect("places lie in their storage");
    }
    /// An atomic of the CPU.
    pub fn atomic(&self, place: Place, offset: u64, op: AtomicOp) -> u64 {
        let (storage, base) = self.of(place);
        storage.atomic(base + offset, op).expect("checked by the caller")
    }
    /// The bytes at `place`.
    pub fn page(&self, place: Place) -> Box<[u8]> {
        let mut bytes = vec![0; PAGE].into_boxed_slice();
        self.read(place, 0, &mut bytes);
        bytes
    }
    pub fn zero(&self, place: Place) {
        self.write(place, 0, &[0; PAGE]);
    }
    /// Copies a page, and whether it is private.
    pub fn copy(&self, from: Place, to: Place) {
        self.write(to, 0, &self.page(from));
        if let (Place::Ram(from), Place::Ram(to)) = (from, to) {
            self.set_private(to, self.is_private(from));
        }
    }

    fn of(&self, place: Place) -> (&dyn BarStorage, u64) {
        match place {
            Place::Zero => (&*self.ram, u64::from(ZERO_FRAME) * PAGE_SIZE),
            Place::Ram(frame) => (&*self.ram, u64::from(frame) * PAGE_SIZE),
            Place::Device { memory, page } => (&*self.device(memory).storage, u64::from(page) * PAGE_SIZE),
            Place::Swap(_) | Place::Poisoned => unreachable!("{place:?} has no bytes"),
        }
    }

    /// What answers on the bus for `at`. The device memories come last: RAM pays nothing for them.
    fn target(&self, at: PhysAddr, viewer: Option<ProviderId>) -> Result<Target<'_>, MemoryError> {
        if let Some(state) = usize::try_from(at.page_number()).ok().and_then(|frame| self.states.get(frame)) {
            return match state.load(Ordering::Acquire) {
                FRESH | FREE => Err(MemoryError::Retired { at }),
                _ => Ok(Target { storage: &*self.ram, offset: at.0 }),
            };
        }
        let devices = self.devices().filter(|(_, device)| device.is_reached_by(viewer));
        for (_, device) in devices {
            if let Some(offset) = at.0.checked_sub(device.base.0)
                && offset < device.storage.size()
            {
                return Ok(Target { storage: &*device.storage, offset });
            }
        }
        Err(MemoryError::Unbacked { at })
    }

    /// Calls `copy` for each page of the `len` bytes at `at`, in ascending order, with the bytes of the caller's that are
    /// in it.
    fn pages(
        &self,
        (at, viewer): (PhysAddr, Option<ProviderId>),
        len: usize,
        mut copy: impl FnMut(Target<'_>, std::ops::Range<usize>) -> Result<(), StorageError>,
    ) -> Result<(), MemoryError> {
        let mut done = 0;
        while done < len {
            let here = at.checked_add(done as u64).ok_or(MemoryError::Unbacked { at })?;
            let count = (len - done).min(PAGE - here.page_offset() as usize);
            copy(self.target(here, viewer)?, done..done + count)
                .map_err(|_| MemoryError::Unbacked { at: here })?;
            done += count;
        }
        Ok(())
    }

    /// Copies out for `viewer`, who reaches its own private memory besides what all devices do.
    pub fn dma_read(
        &self,
        at: PhysAddr,
        viewer: Option<ProviderId>,
        out: &mut [u8],
    ) -> Result<(), MemoryError> {
        self.pages((at, viewer), out.len(), |target, part| target.storage.read(target.offset, &mut out[part]))
    }

    /// Copies in, likewise.
    pub fn dma_write(
        &self,
        at: PhysAddr,
        viewer: Option<ProviderId>,
        data: &[u8],
    ) -> Result<(), MemoryError> {
        self.pages((at, viewer), data.len(), |target, part| target.storage.write(target.offset, &data[part]))
    }

    /// An atomic, likewise.
    pub fn dma_atomic(
        &self,
        at: PhysAddr,
        viewer: Option<ProviderId>,
        op: AtomicOp,
    ) -> Result<u64, MemoryError> {
        if !at.is_aligned(8) {
            return Err(MemoryError::Misaligned { at });
        }
        let target = self.target(at, viewer)?;
        target.storage.atomic(target.offset, op).map_err(|_| MemoryError::Unbacked { at })
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("frames", &self.states.len()).finish_non_exhaustive()
    }
}
