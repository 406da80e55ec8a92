//! A region on the modelled HCA.

use super::ModelPd;
use super::prefetch::Origin;
use super::stepping::Advice;
use super::target::{Backed, FaultTarget};
use crate::device::{AdviseError, ObjectError, Region, RegisterError, RegisterOptions, Seal, SyncError};
use crate::dma::{LinkError, Mapping};
use crate::points;
use crate::region::counters::add;
use crate::region::{Bringing, Core, MapRun, Mapped, Mode, PublishError, RegionReport, Teardown};
use hw_model::addr::{RegionAddr, VirtAddr, VirtRange};
use hw_model::hca::{Access, CreateKeyError, DestroyKeyError, Key, KeySpec};
use hw_model::sync::{Arc, Mutex};
use odp::fault::{FaultFailure, Want};
use odp::notifier::Sequence;
use odp::space::{Access as PageAccess, Rung, UserRange};

/// Bytes that are copied while the region's lock is held.
const SYNC_STEP: u64 = 256 << 10;

/// A region on the modelled HCA. Dropping it deregisters it.
pub struct ModelRegion {
    pd: Arc<ModelPd>,
    key: Key,
    address: RegionAddr,
    access: Access,
    /// Keeps the memory mapped, where the range owns it.
    memory: UserRange,
    core: Arc<Core>,
    sequence: Arc<Sequence>,
    /// Taken by deregistration.
    mapped: Mutex<Option<Mapped>>,
}

/// Whether any right of `options` writes memory.
pub(super) fn writes(options: &RegisterOptions) -> bool {
    options.access.intersects(Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_ATOMIC)
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
        let mapped = Mapped::new(pd.device().dma(), memory, options.mode, writes(&options))?;
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
            first_page_offset: start.page_offset(),
            pages: Arc::clone(&mapped.core.list),
        };
        let core = Arc::clone(&mapped.core);
        let sequence = mapped.interval.sequence();
        let target = FaultTarget {
            memory: Backed::Explicit(Arc::clone(&core), Arc::clone(&sequence)),
            range: memory.range(),
            address,
            pd: pd.handle(),
        };
        match pd.device().publish_key(spec, target) {
            Ok(key) => {
                let (pd, memory) = (Arc::clone(pd), memory.clone());
                let mapped = Mutex::new(Some(mapped));
                let access = options.access;
                Ok(Arc::new(Self { pd, key, address, access, memory, core, sequence, mapped }))
            }
            Err(error) => Err((error, Box::new(mapped))),
        }
    }

    /// Starts to bring pages in as [`Region::advise`] does. For stepping.
    ///
    /// # Errors
    /// See [`AdviseError`].
    pub fn begin_advise(&self, offset: u64, len: u64, want: Want) -> Result<Advice, AdviseError> {
        let pages = self.pages_of(offset, len)?;
        if want == Want::Fault(PageAccess::Write) && !self.core.writable {
            return Err(AdviseError::NotWritable);
        }
        Ok(Advice::new(Bringing::new(&self.core, Arc::clone(&self.sequence), pages, want)))
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
        let device = self.pd.device();
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
        let region = self.memory.range().len();
        self.memory.part(offset, len).ok_or(SyncError::OutOfRange { offset, len, region })?;
        let Some(mapping) = &self.core.mapping else { return Ok(()) };
        let first = self.memory.range().start().page_offset() + offset;
        let mut done = 0;
        while done < len {
            // Held over each copy: who takes pages away, and copies them back, does that before or after.
            let state = self.core.state.lock();
            if state.closing {
                return Err(SyncError::Deregistered);
            }
            let count = SYNC_STEP.min(len - done);
            copy(mapping, first + done, count)?;
            done += count;
        }
        Ok(())
    }

    /// The pages of `[offset, offset + len)`, if they are in the region.
    fn pages_of(&self, offset: u64, len: u64) -> Result<VirtRange, AdviseError> {
        let region = self.memory.range().len();
        let part = self.memory.part(offset, len).ok_or(AdviseError::OutOfRange { offset, len, region })?;
        Ok(part.range().page_aligned())
    }
}

impl Region for ModelRegion {
    fn key(&self) -> Key {
        self.key
    }
    fn address(&self) -> RegionAddr {
        self.address
    }
    fn len(&self) -> u64 {
        self.memory.range().len()
    }
    fn advise(&self, offset: u64, len: u64, want: Want) -> Result<(), AdviseError> {
        let pages = self.pages_of(offset, len)?;
        if self.core.state.lock().closing {
            return Err(AdviseError::Deregistered);
        }
        if want == Want::Fault(PageAccess::Write) && !self.core.writable {
            return Err(AdviseError::NotWritable);
        }
        let brought = self.core.bring(&self.sequence, pages, want).map_err(|failure| match failure {
            FaultFailure::Publish(PublishError::Closing) => AdviseError::Deregistered,
            failure => failure.into(),
        })?;
        add(&self.core.counters.page_prefetch, brought);
        Ok(())
    }
    fn advise_later(&self, offset: u64, len: u64, want: Want) -> Result<(), AdviseError> {
        let pages = self.pages_of(offset, len)?;
        if self.core.state.lock().closing {
            return Err(AdviseError::Deregistered);
        }
        if want == Want::Fault(PageAccess::Write) && !self.core.writable {
            return Err(AdviseError::NotWritable);
        }
        if let Some(target) = self.pd.device().fault_target(self.key) {
            self.pd.device().prefetcher().ask(&target, pages, want, Origin::Advice);
        }
        Ok(())
    }
    fn sync_for_cpu(&self, offset: u64, len: u64) -> Result<(), SyncError> {
        self.sync(offset, len, Mapping::sync_for_cpu)
    }
    fn sync_for_device(&self, offset: u64, len: u64) -> Result<(), SyncError> {
        self.sync(offset, len, Mapping::sync_for_device)
    }
    fn report(&self) -> RegionReport {
        self.core.report()
    }
    fn page_map(&self) -> Option<Vec<MapRun>> {
        Some(self.core.map())
    }
    fn raw_entries(&self) -> Option<Vec<u64>> {
        Some(self.core.raw_entries())
    }
    fn rung(&self) -> Rung {
        self.core.space.rung(self.memory.range())
    }
    fn access(&self) -> Access {
        self.access
    }
    fn sealer(&self) -> Option<Arc<dyn Seal>> {
        Some(Arc::clone(&self.core) as _)
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
