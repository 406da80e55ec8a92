//! Protection domains and regions.

use super::Context;
use crate::abi::IbvSge;
use crate::abi::number::*;
use crate::errno::Errno;
use hw_model::addr::RegionAddr;
use hw_model::hca::Access;
use hw_model::sync::{Arc, Mutex, Weak};
use mr::{Device, Mode, ProtectionDomain, Region, RegisterOptions};
use odp::fault::Want;
use odp::space::{Access as PageAccess, UserRange};
use std::collections::HashMap;
use std::ffi::{c_int, c_uint};

/// A protection domain.
pub(crate) struct Pd {
    pub(crate) context: Arc<Context>,
    pub(crate) domain: Arc<dyn ProtectionDomain>,
    /// Its regions, by key: advice names them so.
    regions: Mutex<HashMap<u32, Weak<dyn Region>>>,
}

impl Pd {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Arc<Self>, Errno> {
        let device: Arc<dyn Device> = Arc::clone(&context.device) as _;
        let (domain, regions) = (device.alloc_pd()?, Mutex::new(HashMap::new()));
        Ok(Arc::new(Self { context: Arc::clone(context), domain, regions }))
    }

    /// The region of a key. One of another domain is unknown here, as in mlx5: ENOENT.
    fn region(&self, key: u32) -> Result<Arc<dyn Region>, Errno> {
        self.regions.lock().get(&key).and_then(Weak::upgrade).ok_or(Errno::NOENT)
    }
}

/// A region.
pub(crate) struct Mr {
    pub(crate) pd: Arc<Pd>,
    pub(crate) region: Mutex<Arc<dyn Region>>,
}

impl Mr {
    /// Registers `memory` with the rights of `enum ibv_access_flags`; its first byte is called `iova`.
    pub(crate) fn register(
        pd: &Arc<Pd>,
        memory: &UserRange,
        iova: u64,
        flags: c_uint,
    ) -> Result<Self, Errno> {
        let options = options(flags, iova)?;
        let region = Arc::clone(&pd.domain).register(memory, options)?;
        pd.regions.lock().insert(region.key().0, Arc::downgrade(&region));
        Ok(Self { pd: Arc::clone(pd), region: Mutex::new(region) })
    }

    pub(crate) fn region(&self) -> Arc<dyn Region> {
        Arc::clone(&self.region.lock())
    }
}

impl Drop for Mr {
    fn drop(&mut self) {
        let region = self.region();
        self.pd.regions.lock().remove(&region.key().0);
        // Now, not when the last of those who look at it has gone.
        region.deregister();
    }
}

/// The rights that `enum ibv_access_flags` grants; those in the optional range are hints that we do not need.
fn rights(flags: c_uint) -> Result<Access, Errno> {
    let others = IBV_ACCESS_ZERO_BASED | IBV_ACCESS_ON_DEMAND | IBV_ACCESS_HUGETLB | IBV_ACCESS_MW_BIND;
    let mut access = Access::empty();
    let mut known = others | IBV_ACCESS_OPTIONAL_RANGE;
    for (flag, right) in [
        (IBV_ACCESS_LOCAL_WRITE, Access::LOCAL_WRITE),
        (IBV_ACCESS_REMOTE_WRITE, Access::REMOTE_WRITE),
        (IBV_ACCESS_REMOTE_READ, Access::REMOTE_READ),
        (IBV_ACCESS_REMOTE_ATOMIC, Access::REMOTE_ATOMIC),
    ] {
        known |= flag;
        if flags & flag != 0 {
            access |= right;
        }
    }
    if flags & !known != 0 {
        return Err(Errno::INVAL);
    }
    Ok(access)
}

fn options(flags: c_uint, iova: u64) -> Result<RegisterOptions, Errno> {
    let access = rights(flags)?;
    // Who may write from outside must be allowed to write here (ib_check_mr_access).
    if access.intersects(Access::REMOTE_WRITE | Access::REMOTE_ATOMIC)
        && !access.contains(Access::LOCAL_WRITE)
    {
        return Err(Errno::INVAL);
    }
    let mode = if flags & IBV_ACCESS_ON_DEMAND != 0 { Mode::OnDemand } else { Mode::Pinned };
    let address = if flags & IBV_ACCESS_ZERO_BASED != 0 { 0 } else { iova };
    Ok(RegisterOptions { access, mode, address: Some(RegionAddr(address)) })
}

/// Brings memory in ahead of use. Whatever is asked for is done before this returns, which is what the flag for it says
/// and what its absence allows.
pub(crate) fn advise(pd: &Arc<Pd>, advice: c_int, ranges: &[IbvSge]) -> Result<(), Errno> {
    let want = match advice {
        IBV_ADVISE_MR_ADVICE_PREFETCH => Want::Fault(PageAccess::Read),
        IBV_ADVISE_MR_ADVICE_PREFETCH_WRITE => Want::Fault(PageAccess::Write),
        IBV_ADVISE_MR_ADVICE_PREFETCH_NO_FAULT => Want::Snapshot,
        _ => return Err(Errno::NOTSUPP),
    };
    for range in ranges {
        let region = pd.region(range.lkey)?;
        let offset = range.addr.checked_sub(region.address().0).ok_or(Errno::FAULT)?;
        region.advise(offset, range.length.into(), want)?;
    }
    Ok(())
}
