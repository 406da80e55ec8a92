//! A region on the modelled HCA.

use super::prefetch::Origin;
use super::stepping::Advice;
use super::target::{Backed, FaultTarget};
use super::{ModelDevice, ModelPd};
use crate::device::{
    AdviseError, ObjectError, Region, RegisterError, RegisterOptions, Rereg, ReregError, Seal, SyncError,
};
use crate::dma::{LinkError, Mapping};
use crate::points;
use crate::region::counters::add;
use crate::region::{Bringing, Core, How, MapRun, Mapped, Mode, PublishError, RegionReport, Teardown};
use hw_model::addr::{RegionAddr, VirtAddr, VirtRange};
use hw_model::hca::{Access, CreateKeyError, DestroyKeyError, Key, KeySpec};
use hw_model::sync::atomic::AtomicBool;
use hw_model::sync::{Arc, Mutex, RwLock, Weak};
use odp::fault::{FaultFailure, Want};
use odp::notifier::Sequence;
use odp::space::{Access as PageAccess, PinKind, Rung, UserRange};

/// Bytes that are copied while the region's lock is held.
const SYNC_STEP: u64 = 256 << 10;

/// A region on the modelled HCA. Dropping it deregisters it.
pub struct ModelRegion {
    pub(super) device: Arc<ModelDevice>,
    pub(super) key: Key,
    now: RwLock<Now>,
    /// It is being reregistered.
    pub(super) changing: AtomicBool,
    /// What pinned means, if it is pinned.
    pub(super) pin: PinKind,
    /// Taken by deregistration.
    pub(super) mapped: Mutex<Option<Mapped>>,
    /// For reregistration, which holds the region.
    me: Weak<Self>,
}

/// What a region is at the moment: all that reregistration may change.
#[derive(Clone)]
pub(super) struct Now {
    pub(super) pd: Arc<ModelPd>,
    pub(super) address: RegionAddr,
    pub(super) access: Access,
    /// Keeps the memory mapped, where the range owns it.
    pub(super) memory: UserRange,
    pub(super) core: Arc<Core>,
    pub(super) sequence: Arc<Sequence>,
}

impl Now {
    /// For the fault handler.
    pub(super) fn target(&self) -> FaultTarget {
        FaultTarget {
            memory: Backed::Explicit(Arc::clone(&self.core), Arc::clone(&self.sequence)),
            range: self.memory.range(),
            address: self.address,
            pd: self.pd.handle(),
        }
    }

    /// The pages of `[offset, offset + len)`, if they are in the region.
    fn pages_of(&self, offset: u64, len: u64) -> Result<VirtRange, AdviseError> {
        let region = self.memory.range().len();
        let part = self.memory.part(offset, len).ok_or(AdviseError::OutOfRange { offset, len, region })?;
        Ok(part.range().page_aligned())
    }

    /// The same, if advice to bring them in so can be taken.
    fn advised(&self, offset: u64, len: u64, want: Want) -> Result<VirtRange, AdviseError> {
        let pages = self.pages_of(offset, len)?;
        if self.core.state.lock().closing {
            return Err(AdviseError::Deregistered);
        }
        if want == Want::Fault(PageAccess::Write) && !self.core.writable {
            return Err(AdviseError::NotWritable);
        }
        Ok(pages)
    }
}

impl How {
    /// What `options` ask for.
    pub(super) fn of(options: &RegisterOptions) -> Result<Self, RegisterError> {
        let (mode, pin) = options.kept()?;
        let (snapshot, hugetlb) = (options.snapshot, options.hugetlb);
        Ok(Self { mode, pin, snapshot, writable: writing(options.access), hugetlb })
    }
}

/// Whether any right of `access` writes memory.
pub(super) fn writing(access: Access) -> bool {
    access.intersects(Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_ATOMIC)
}

impl ModelRegion {
    pub(super) fn register(
        pd: &Arc<ModelPd>,
        memory: &UserRange,
        options: RegisterOptions,
    ) -> Result<Arc<Self>, RegisterError> {
        if options.mode == Mode::Implicit {
            return Err(RegisterError::ImplicitInSteps);
        }
        let mapped = Mapped::new(pd.device().dma(), memory, How::of(&options)?)?;
        Self::with_key(pd, memory, options, mapped).map_err(|(error, mapped)| {
            Teardown::begin(*mapped).wait();
            error.into()
        })
    }

    /// Makes a key for what is mapped: the last step of registration.
    pub(super) fn with_key(
        pd: &Arc<ModelPd>,
        memory: &UserRange,
        options: RegisterOptions,
        mapped: Mapped,
    ) -> Result<Arc<Self>, (CreateKeyError, Box<Mapped>)> {
        let start: VirtAddr = memory.range().start();
        let address = options.address.unwrap_or(RegionAddr(start.0));
        let spec = KeySpec {
            pd: pd.handle(),
            access: options.access,
            address,
            length: memory.range().len(),
            first_page_offset: mapped.core.offset_of(start),
            pages: Arc::clone(&mapped.core.list),
        };
        let now = Now {
            pd: Arc::clone(pd),
            address,
            access: options.access,
            memory: memory.clone(),
            core: Arc::clone(&mapped.core),
            sequence: mapped.interval.sequence(),
        };
        match pd.device().publish_key(spec, now.target()) {
            Ok(key) => Ok(Arc::new_cyclic(|me| Self {
                device: Arc::clone(pd.device()),
                key,
                now: RwLock::new(now),
                changing: AtomicBool::new(false),
                pin: options.pin,
                mapped: Mutex::new(Some(mapped)),
                me: Weak::clone(me),
            })),
            Err(error) => Err((error, Box::new(mapped))),
        }
    }

    /// What it is at the moment.
    pub(super) fn now(&self) -> Now {
        self.now.read().clone()
    }

    /// What it was is dropped outside the lock: the last hold on a domain or on memory may go with it.
    pub(super) fn become_next(&self, next: Now) {
        let before = std::mem::replace(&mut *self.now.write(), next);
        drop(before);
    }

    /// Starts to bring pages in as [`Region::advise`] does. For stepping.
    ///
    /// # Errors
    /// See [`AdviseError`].
    pub fn begin_advise(&self, offset: u64, len: u64, want: Want) -> Result<Advice, AdviseError> {
        let now = self.now();
        let pages = now.advised(offset, len, want)?;
        Ok(Advice::new(Bringing::new(&now.core, now.sequence, pages, want)))
    }

    /// Starts to take the region down: its key is gone when this returns, its memory once what it gives has been polled
    /// to the end. `None` if that has been done. For stepping; others call [`Region::deregister`].
    pub fn begin_deregister(&self) -> Option<Teardown> {
        self.begin_teardown(&mut self.mapped.lock(), true).unwrap_or(None)
    }

    /// `revoke`: with the windows that are bound to it, which refuse it otherwise.
    fn begin_teardown(
        &self,
        slot: &mut Option<Mapped>,
        revoke: bool,
    ) -> Result<Option<Teardown>, DestroyKeyError> {
        let Some(mapped) = slot.take() else { return Ok(None) };
        let device = &self.device;
        let gone = device.withdraw_key(self.key, |hca| {
            if revoke {
                hca.revoke_key(self.key)?
            } else {
                hca.destroy_key(self.key)?
            };
            Ok(())
        });
        if let Err(error) = gone {
            debug_assert!(!revoke, "a region's key is destroyed once, by the region");
            *slot = Some(mapped);
            return Err(error);
        }
        // Nothing to fail: it only lets a test in.
        let _ = device.dma().points().meet(points::DEREGISTER);
        Ok(Some(Teardown::begin(mapped)))
    }

    fn sync(
        &self,
        offset: u64,
        len: u64,
        copy: impl Fn(&Mapping, u64, u64) -> Result<(), LinkError>,
    ) -> Result<(), SyncError> {
        let now = self.now();
        let region = now.memory.range().len();
        now.memory.part(offset, len).ok_or(SyncError::OutOfRange { offset, len, region })?;
        let Some(mapping) = &now.core.mapping else { return Ok(()) };
        let first = now.core.offset_of(now.memory.range().start()) + offset;
        let mut done = 0;
        while done < len {
            // Held over each copy: who takes pages away, and copies them back, does that before or after.
            let state = now.core.state.lock();
            if state.closing {
                return Err(SyncError::Deregistered);
            }
            let count = SYNC_STEP.min(len - done);
            copy(mapping, first + done, count)?;
            done += count;
        }
        Ok(())
    }
}

impl Region for ModelRegion {
    fn key(&self) -> Key {
        self.key
    }
    fn address(&self) -> RegionAddr {
        self.now.read().address
    }
    fn len(&self) -> u64 {
        self.now.read().memory.range().len()
    }
    fn advise(&self, offset: u64, len: u64, want: Want) -> Result<(), AdviseError> {
        let now = self.now();
        let pages = now.advised(offset, len, want)?;
        let brought = now.core.bring(&now.sequence, pages, want).map_err(|failure| match failure {
            FaultFailure::Publish(PublishError::Closing) => AdviseError::Deregistered,
            failure => failure.into(),
        })?;
        add(&now.core.counters.page_prefetch, brought);
        Ok(())
    }
    fn advise_later(&self, offset: u64, len: u64, want: Want) -> Result<(), AdviseError> {
        let now = self.now();
        let pages = now.advised(offset, len, want)?;
        self.device.prefetcher().ask(&now.target(), pages, want, Origin::Advice);
        Ok(())
    }
    fn rereg(&self, change: Rereg) -> Result<(), ReregError> {
        let me = self.me.upgrade().ok_or(ReregError::Deregistered)?;
        me.begin_rereg(change)?.wait()
    }
    fn sync_for_cpu(&self, offset: u64, len: u64) -> Result<(), SyncError> {
        self.sync(offset, len, Mapping::sync_for_cpu)
    }
    fn sync_for_device(&self, offset: u64, len: u64) -> Result<(), SyncError> {
        self.sync(offset, len, Mapping::sync_for_device)
    }
    fn report(&self) -> RegionReport {
        self.now().core.report()
    }
    fn page_map(&self) -> Option<Vec<MapRun>> {
        Some(self.now().core.map())
    }
    fn raw_entries(&self) -> Option<Vec<u64>> {
        Some(self.now().core.raw_entries())
    }
    fn rung(&self) -> Rung {
        let now = self.now();
        now.core.space.rung(now.memory.range())
    }
    fn access(&self) -> Access {
        self.now.read().access
    }
    fn sealer(&self) -> Option<Arc<dyn Seal>> {
        Some(self.now().core as _)
    }
    fn deregister(&self) {
        // Held to the end: who comes second waits for the promise as well.
        let mut mapped = self.mapped.lock();
        if let Ok(Some(teardown)) = self.begin_teardown(&mut mapped, true) {
            teardown.wait();
        }
    }
    fn try_deregister(&self) -> Result<(), ObjectError<DestroyKeyError>> {
        let mut mapped = self.mapped.lock();
        if let Some(teardown) = self.begin_teardown(&mut mapped, false)? {
            teardown.wait();
        }
        Ok(())
    }
}

impl Drop for ModelRegion {
    fn drop(&mut self) {
        self.deregister();
    }
}
