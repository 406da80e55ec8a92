//! One simulated machine.

use super::change::{Change, user_span};
use super::check::Broken;
use super::fault::{Stop, Touch};
use super::frames::Frames;
use super::kernel::{Kernel, MmId, NoFrame, Place, Pte};
use super::object::{Object, ObjectId, ObjectKind, Residence};
use super::object_change::ObjectChange;
use super::op::{Outcome, Pending, SimError, SimOp};
use super::process::SimSpace;
use super::span::HUGE_PAGES;
use super::store::{DeviceKind, DeviceMemory, DeviceMemoryId, NULL_FRAME, Store, ZERO_FRAME};
use crate::space::FaultError;
use crate::space::dmabuf::SystemPages;
use hw_model::addr::{PhysAddr, VirtAddr};
use hw_model::bus::{AtomicOp, BarStorage, DmaEpoch, HostMemory, MemoryError, PrivatePages, ProviderId};
use hw_model::sync::{Arc, Mutex};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// What a fault does that has to wait for devices before it can replace a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum FaultMode {
    /// Waits. For threads.
    #[default]
    Wait,
    /// Leaves the change to [`SimHost::poll_parked`] and says [`FaultError::Busy`]. For one thread that steps everything.
    Park,
}

/// How a host is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimConfig {
    /// Pages of RAM; rounded up to whole huge pages. Two are the host's own.
    pub ram_pages: u32,
    /// Where frames and mappings end up depends on it.
    pub seed: u64,
    /// What a fault does that has to wait.
    pub faults: FaultMode,
    /// NUMA nodes that the RAM is shared out among, at least one.
    pub nodes: u32,
}

impl Default for SimConfig {
    fn default() -> Self {
        Self { ram_pages: 16384, seed: 0, faults: FaultMode::Wait, nodes: 2 }
    }
}

/// What a host has at the moment. The same before and after whatever gave back what it took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostStats {
    /// Frames of RAM that are free.
    pub free_frames: u64,
    /// Frames that failed.
    pub poisoned_frames: u64,
    /// Slots of swap in use.
    pub swap_slots: u64,
    /// Pages of coherent and private device memory that are free.
    pub free_device_pages: u64,
    /// Processes.
    pub processes: u64,
    /// Changes that faults have parked.
    pub parked: u64,
}

/// One simulated machine: its memory as devices reach it, its objects and its processes.
pub struct SimHost {
    pub(super) kernel: Mutex<Kernel>,
    parked: Mutex<Vec<Pending>>,
    store: Arc<Store>,
    epoch: Arc<DmaEpoch>,
    faults: FaultMode,
}

impl SimHost {
    /// A machine without processes, or `None` if the real one has no memory for it.
    #[must_use]
    pub fn new(config: SimConfig) -> Option<Arc<Self>> {
        let ram_pages = config.ram_pages.max(1).checked_next_multiple_of(HUGE_PAGES as u32)?;
        let store = Store::new(ram_pages)?;
        let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
        let mut frames = Frames::new(ram_pages, config.nodes, ChaCha8Rng::from_rng(&mut rng));
        for own in [NULL_FRAME, ZERO_FRAME] {
            assert!(frames.take_exactly(own), "a new host has all its frames");
        }
        let epoch = DmaEpoch::new();
        let kernel = Kernel {
            store: Arc::clone(&store),
            epoch: Arc::clone(&epoch),
            rng,
            frames,
            holders: BTreeMap::new(),
            swap: BTreeMap::new(),
            device_free: BTreeMap::new(),
            mms: BTreeMap::new(),
            objects: BTreeMap::new(),
            poisoned: BTreeSet::new(),
            next_id: 0,
            next_slot: 0,
        };
        Some(Arc::new(Self {
            kernel: Mutex::new(kernel),
            parked: Mutex::new(Vec::new()),
            store,
            epoch,
            faults: config.faults,
        }))
    }

    /// A new process without memory.
    #[must_use]
    pub fn new_space(self: &Arc<Self>) -> Arc<SimSpace> {
        let mm = self.kernel.lock().new_mm();
        SimSpace::of(self, mm)
    }

    /// Memory of a device at `base`, above RAM. The same storage may stand behind a BAR of a modelled bus; without a bus
    /// the host itself answers for its window, unless it is private.
    ///
    /// # Errors
    /// [`SimError::OutOfMemory`] if the host has eight already, or the window is not above RAM.
    pub fn add_device(
        &self,
        kind: DeviceKind,
        provider: ProviderId,
        base: PhysAddr,
        storage: Arc<dyn BarStorage>,
    ) -> Result<DeviceMemoryId, SimError> {
        let mut kernel = self.kernel.lock();
        if base.page_offset() != 0 || base.page_number() < u64::from(self.store.frames()) {
            return Err(SimError::OutOfMemory);
        }
        let device = Arc::new(DeviceMemory { provider, base, kind, storage });
        let pages = device.pages();
        let id = self.store.add_device(device).ok_or(SimError::OutOfMemory)?;
        if kind != DeviceKind::Peer {
            kernel.device_free.insert(id, (0..pages).collect());
        }
        Ok(id)
    }

    /// A device memory.
    #[must_use]
    pub fn device(&self, memory: DeviceMemoryId) -> Arc<DeviceMemory> {
        Arc::clone(self.store.device(memory))
    }

    /// Shared memory of `pages` pages, all zero.
    pub fn new_shmem(&self, pages: u64) -> ObjectId {
        self.kernel.lock().new_object(ObjectKind::Shmem, pages)
    }

    /// A file of `pages` pages, all zero.
    pub fn new_file(&self, pages: u64) -> ObjectId {
        self.kernel.lock().new_object(ObjectKind::File, pages)
    }

    /// Huge pages: `count` of them.
    pub fn new_hugetlb(&self, count: u64) -> ObjectId {
        self.kernel.lock().new_object(ObjectKind::Hugetlb, count.saturating_mul(HUGE_PAGES))
    }

    /// A DMABUF of `pages` pages, zero, all in one place. In the BAR it is at page `first` and on.
    ///
    /// # Errors
    /// [`SimError::BadPages`] if the BAR is too small, [`SimError::Gone`] if it is not an exporter's, or
    /// [`SimError::OutOfMemory`].
    pub fn new_dmabuf(
        &self,
        bar: DeviceMemoryId,
        first: u32,
        pages: u32,
        at: Residence,
    ) -> Result<ObjectId, SimError> {
        let mut kernel = self.kernel.lock();
        let found = self.store.devices().find(|(id, device)| *id == bar && device.kind() == DeviceKind::Peer);
        let size = found.ok_or(SimError::Gone)?.1.pages();
        if first.checked_add(pages).is_none_or(|end| end > size) {
            let (first, end) = (u64::from(first), u64::from(first) + u64::from(pages));
            return Err(SimError::BadPages { first, end, pages: u64::from(size) });
        }
        if at == Residence::System && kernel.frames.free() < u64::from(pages) {
            return Err(SimError::OutOfMemory);
        }
        let object = kernel.new_object(ObjectKind::Dmabuf { bar, first }, u64::from(pages));
        for index in 0..pages {
            let place = match at {
                Residence::Peer => Place::Device { memory: bar, page: first + index },
                Residence::System => kernel.take_frame().map_err(|NoFrame| SimError::OutOfMemory)?,
            };
            self.store.zero(place);
            kernel.cache(object, u64::from(index), place);
        }
        Ok(object)
    }

    /// Pages that a driver takes for itself, zero, scattered; they are given back when the host ends.
    ///
    /// # Errors
    /// [`SimError::OutOfMemory`].
    pub fn system_pages(self: &Arc<Self>, pages: u64) -> Result<SystemPages, SimError> {
        let mut kernel = self.kernel.lock();
        if kernel.frames.free() < pages {
            return Err(SimError::OutOfMemory);
        }
        // An object that nobody knows of: nobody maps it, and no change is made to it.
        let object = kernel.new_object(ObjectKind::Shmem, pages);
        let mut taken = Vec::new();
        for index in 0..pages {
            let place = kernel.take_frame().map_err(|NoFrame| SimError::OutOfMemory)?;
            let Place::Ram(frame) = place else { return Err(SimError::OutOfMemory) };
            self.store.zero(place);
            kernel.cache(object, index, place);
            taken.push(PhysAddr::from_page_number(u64::from(frame)));
        }
        drop(kernel);
        let memory = Arc::clone(self) as Arc<dyn HostMemory>;
        Ok(SystemPages::new(memory, taken.into_boxed_slice(), Arc::clone(self) as _))
    }

    pub(super) fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Begins a change of an object.
    ///
    /// # Errors
    /// See [`SimError`].
    pub fn begin(self: &Arc<Self>, change: ObjectChange) -> Result<SimOp, SimError> {
        SimOp::begin(self, Change::Object(change))
    }

    /// Makes a change of an object, waiting for devices.
    ///
    /// # Errors
    /// See [`SimError`].
    pub fn change(self: &Arc<Self>, change: ObjectChange) -> Result<Outcome, SimError> {
        self.begin(change)?.run()
    }

    /// Polls the changes that faults have parked, and makes those that are ready. Gives how many are left.
    pub fn poll_parked(&self) -> usize {
        let parked = std::mem::take(&mut *self.parked.lock());
        for mut pending in parked {
            if pending.poll(self) {
                // What fails is told to the fault, which comes again.
                let _ = pending.finish(self);
            } else {
                self.parked.lock().push(pending);
            }
        }
        self.parked.lock().len()
    }

    /// Checks that everything the host knows of its pages agrees with everything else, and that nobody has written to
    /// pages that are free. For when nothing is going on.
    ///
    /// # Errors
    /// The first thing found that is [`Broken`].
    pub fn check(&self) -> Result<(), Broken> {
        self.kernel.lock().check()
    }

    /// What it has at the moment.
    #[must_use]
    pub fn stats(&self) -> HostStats {
        let parked = self.parked.lock().len() as u64;
        let kernel = self.kernel.lock();
        HostStats {
            free_frames: kernel.frames.free(),
            poisoned_frames: kernel.poisoned.len() as u64,
            swap_slots: kernel.swap.len() as u64,
            free_device_pages: kernel.device_free.values().map(|free| free.len() as u64).sum(),
            processes: kernel.mms.len() as u64,
            parked,
        }
    }

    /// The node that a frame of RAM is of.
    #[must_use]
    pub fn node_of(&self, at: PhysAddr) -> Option<u32> {
        let frame = u32::try_from(at.page_number()).ok().filter(|frame| *frame < self.store.frames())?;
        Some(self.kernel.lock().frames.node(frame))
    }

    /// Begins to bring back what is in a device's memory, as when its driver goes.
    ///
    /// # Errors
    /// See [`SimError`].
    pub fn evict_device(self: &Arc<Self>, memory: DeviceMemoryId) -> Result<SimOp, SimError> {
        SimOp::begin(self, Change::Evict(memory))
    }

    /// Makes `page` present as `touch` wants it and calls `then` with its entry, under the lock.
    pub(super) fn with_page<R>(
        &self,
        mm: MmId,
        page: u64,
        touch: Touch,
        then: impl FnOnce(&mut Kernel, Pte) -> R,
    ) -> Result<R, FaultError> {
        loop {
            {
                let mut kernel = self.kernel.lock();
                match kernel.fault_page(mm, page, touch, false) {
                    Ok(()) => {
                        let pte = kernel.pte(mm, page).expect("the fault made it present");
                        return Ok(then(&mut kernel, pte));
                    }
                    Err(Stop::Failed(error)) => return Err(error),
                    Err(Stop::Invalidate) => {}
                }
            }
            self.replace_page(mm, page, touch)?;
        }
    }

    /// Does what a fault needs an invalidation for, now or, on a stepped host, in its own time.
    fn replace_page(&self, mm: MmId, page: u64, touch: Touch) -> Result<(), FaultError> {
        let at = VirtAddr::from_page_number(page);
        let same = |pending: &Pending| matches!(pending.change, Change::Resolve { mm: m, page: p, .. } if (m, p) == (mm, page));
        if self.faults == FaultMode::Park && self.parked.lock().iter().any(same) {
            return Err(FaultError::Busy { at });
        }
        let change = Change::Resolve { mm, page, touch };
        let mut pending = Pending::begin(self, change).map_err(|_| FaultError::NoMapping { at })?;
        if self.faults == FaultMode::Park && !pending.poll(self) {
            self.parked.lock().push(pending);
            return Err(FaultError::Busy { at });
        }
        match pending.finish(self) {
            // Anything but a lack of memory is told better by the fault, when it comes again and finds what there is now.
            Err(SimError::Fault(error @ FaultError::OutOfMemory { .. })) => Err(error),
            _ => Ok(()),
        }
    }
}

impl Kernel {
    fn new_object(&mut self, kind: ObjectKind, pages: u64) -> ObjectId {
        let id = ObjectId(self.next_id);
        self.next_id += 1;
        self.objects.insert(id, Object::new(kind, pages.min(user_span().end)));
        id
    }
}

impl HostMemory for SimHost {
    fn read(&self, at: PhysAddr, out: &mut [u8]) -> Result<(), MemoryError> {
        self.store.dma_read(at, None, out)
    }
    fn write(&self, at: PhysAddr, data: &[u8]) -> Result<(), MemoryError> {
        self.store.dma_write(at, None, data)
    }
    fn atomic(&self, at: PhysAddr, op: AtomicOp) -> Result<u64, MemoryError> {
        self.store.dma_atomic(at, None, op)
    }
    fn epoch(&self) -> &Arc<DmaEpoch> {
        &self.epoch
    }
    fn private_pages(&self) -> Option<Arc<PrivatePages>> {
        Some(Arc::clone(self.store.private_pages()))
    }
}

impl fmt::Debug for SimHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SimHost").field(&self.stats()).finish()
    }
}
