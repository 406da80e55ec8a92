//! An implicit region as its owner sees it.

use super::children::{Children, Parts};
use crate::device::model::ModelPd;
use crate::device::model::prefetch::Origin;
use crate::device::model::region::writing;
use crate::device::model::target::FaultTarget;
use crate::device::{AdviseError, Region, RegisterError, RegisterOptions, SyncError};
use crate::points;
use crate::region::{Emptied, MapRegionError, MapRun, RegionReport, Teardown};
use hw_model::addr::{RegionAddr, VirtRange};
use hw_model::hca::{Access, ImplicitKeySpec, Key};
use hw_model::sync::{Arc, Mutex, thread};
use odp::fault::Want;
use odp::space::{Access as PageAccess, Rung, UserRange};
use std::time::Duration;

/// An implicit region on the modelled HCA. Dropping it deregisters it.
pub struct ImplicitRegion {
    pd: Arc<ModelPd>,
    key: Key,
    access: Access,
    memory: UserRange,
    children: Arc<Children>,
    /// Deregistration has begun.
    gone: Mutex<bool>,
}

impl ImplicitRegion {
    pub(in crate::device::model) fn register(
        pd: &Arc<ModelPd>,
        memory: &UserRange,
        options: RegisterOptions,
    ) -> Result<Arc<Self>, RegisterError> {
        options.kept()?;
        let space = memory.space();
        // Where no page can ever be, none is missed.
        let range = memory.range().intersection(space.addresses()).filter(|range| !range.is_empty());
        let range = range.ok_or(MapRegionError::Empty)?;
        let address = RegionAddr(range.start().0);
        if options.address.is_some_and(|wanted| wanted != address) {
            return Err(RegisterError::ImplicitAddress { address });
        }
        if options.hugetlb {
            return Err(RegisterError::ImplicitHugetlb);
        }
        let device = pd.device();
        let writable = writing(options.access);
        let children = Children::new(Parts {
            hca: Arc::clone(device.hca()),
            device: Arc::clone(device.dma()),
            space: Arc::clone(space),
            pd: pd.handle(),
            range,
            writable,
            emptied: Arc::new(Emptied::new(device.prefetcher().bell())),
        });
        let (length, access) = (range.len(), options.access);
        let table = Arc::clone(&children.table);
        let spec = ImplicitKeySpec { pd: pd.handle(), access, address, length, table };
        let key = device.publish_implicit_key(spec, FaultTarget::implicit(&children, pd.handle()))?;
        let (pd, memory) = (Arc::clone(pd), memory.clone());
        Ok(Arc::new(Self { pd, key, access, memory, children, gone: Mutex::new(false) }))
    }

    /// Starts to take the region down: its key is gone when this returns, its memory once what it gives has been polled
    /// to the end. `None` if that has been done. For stepping; others call [`Region::deregister`].
    pub fn begin_deregister(&self) -> Option<ImplicitTeardown> {
        let mut gone = self.gone.lock();
        self.begin_teardown(&mut gone)
    }

    fn begin_teardown(&self, gone: &mut bool) -> Option<ImplicitTeardown> {
        if std::mem::replace(gone, true) {
            return None;
        }
        let device = self.pd.device();
        device.withdraw_implicit_key(self.key);
        // Nothing to fail: it only lets a test in.
        let _ = device.dma().points().meet(points::DEREGISTER);
        Some(ImplicitTeardown { children: Arc::clone(&self.children), left: self.children.close() })
    }

    /// Children made so far, those that are gone too.
    #[must_use]
    pub fn children_made(&self) -> u64 {
        self.children.made()
    }

    /// Children that were taken away because they were empty, and wait for a burst to end.
    #[must_use]
    pub fn children_going(&self) -> u64 {
        self.children.going()
    }

    /// The present pages: address and page-list word. A moment's view.
    #[must_use]
    pub fn present_entries(&self) -> Vec<(hw_model::addr::VirtAddr, u64)> {
        let mut entries = Vec::new();
        self.children.each_list(|core| {
            let touched = core.touched();
            let words = touched.filter_map(|index| Some((core.page_address(index), core.list.load(index)?)));
            entries.extend(words.filter(|(_, entry)| entry.is_valid()).map(|(at, entry)| (at, entry.bits())));
        });
        entries
    }

    #[cfg(all(test, shuttle))]
    pub(super) fn children(&self) -> &Arc<Children> {
        &self.children
    }

    /// The page list of the first child.
    #[cfg(all(test, shuttle))]
    pub(super) fn first_list(&self) -> Option<Arc<hw_model::hca::PageList>> {
        let mut list = None;
        self.children.each_list(|core| list = Some(Arc::clone(&core.list)));
        list
    }

    fn part(&self, offset: u64, len: u64) -> Result<VirtRange, AdviseError> {
        let region = self.children.range.len();
        let refused = AdviseError::OutOfRange { offset, len, region };
        let at = self.children.range.start().checked_add(offset);
        let part = at.and_then(|at| VirtRange::new(at, len)).ok_or(refused.clone())?;
        self.children.range.contains(part).then_some(part).ok_or(refused)
    }

    fn check(&self, want: Want) -> Result<FaultTarget, AdviseError> {
        if *self.gone.lock() {
            return Err(AdviseError::Deregistered);
        }
        if want == Want::Fault(PageAccess::Write) && !self.children.writable {
            return Err(AdviseError::NotWritable);
        }
        Ok(FaultTarget::implicit(&self.children, self.pd.handle()))
    }
}

impl Region for ImplicitRegion {
    fn key(&self) -> Key {
        self.key
    }
    fn address(&self) -> RegionAddr {
        RegionAddr(self.children.range.start().0)
    }
    fn access(&self) -> Access {
        self.access
    }
    fn len(&self) -> u64 {
        self.children.range.len()
    }
    fn advise(&self, offset: u64, len: u64, want: Want) -> Result<(), AdviseError> {
        let part = self.part(offset, len)?;
        self.check(want)?.bring(part, want)
    }
    fn advise_later(&self, offset: u64, len: u64, want: Want) -> Result<(), AdviseError> {
        let part = self.part(offset, len)?;
        self.pd.device().prefetcher().ask(&self.check(want)?, part, want, Origin::Advice);
        Ok(())
    }
    fn sync_for_cpu(&self, offset: u64, len: u64) -> Result<(), SyncError> {
        let region = self.children.range.len();
        self.part(offset, len).map(drop).map_err(|_| SyncError::OutOfRange { offset, len, region })
    }
    fn sync_for_device(&self, offset: u64, len: u64) -> Result<(), SyncError> {
        self.sync_for_cpu(offset, len)
    }
    fn report(&self) -> RegionReport {
        self.children.report()
    }
    fn page_map(&self) -> Option<Vec<MapRun>> {
        None
    }
    fn raw_entries(&self) -> Option<Vec<u64>> {
        None
    }
    fn rung(&self) -> Rung {
        self.memory.space().rung(self.children.range)
    }
    fn deregister(&self) {
        // Held to the end: who comes second waits for the promise as well.
        let mut gone = self.gone.lock();
        if let Some(teardown) = self.begin_teardown(&mut gone) {
            teardown.wait();
        }
    }
}

impl Drop for ImplicitRegion {
    fn drop(&mut self) {
        self.deregister();
    }
}

/// An implicit region on its way down. Poll it to the end; dropping it waits.
pub struct ImplicitTeardown {
    children: Arc<Children>,
    left: Vec<Teardown>,
}

impl ImplicitTeardown {
    /// Whether it is done. Never blocks.
    pub fn poll(&mut self) -> bool {
        debug_assert!(self.children.is_closing());
        self.left.retain_mut(|teardown| !teardown.poll());
        self.left.is_empty()
    }

    /// Children that are not gone yet.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.left.len() as u64
    }

    /// Polls to the end. Bursts are bounded, so this is soon.
    pub fn wait(mut self) {
        let mut looks = 0_u32;
        while !self.poll() {
            looks += 1;
            if looks < 100 { thread::yield_now() } else { thread::sleep(Duration::from_micros(10)) }
        }
    }
}
