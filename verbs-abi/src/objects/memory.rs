//! Protection domains and regions.

use super::{Context, Dm};
use crate::abi::IbvSge;
use crate::abi::number::*;
use crate::errno::Errno;
use crate::process::settings;
use hw_model::addr::RegionAddr;
use hw_model::hca::{Access, DeviceRegion, Key, Sge};
use hw_model::sync::Arc;
use mr::Flush;
use mr::device::model::ModelPd;
use mr::{Mode, ProtectionDomain, Region, RegisterOptions};
use odp::fault::Want;
use odp::space::{Access as PageAccess, UserRange};
use std::ffi::{c_int, c_uint};

/// A protection domain.
pub(crate) struct Pd {
    pub(crate) context: Arc<Context>,
    pub(crate) domain: Arc<ModelPd>,
}

impl Pd {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Arc<Self>, Errno> {
        let domain = context.device.alloc_model_pd()?;
        Ok(Arc::new(Self { context: Arc::clone(context), domain }))
    }
}

/// A region.
pub(crate) struct Mr {
    pd: Arc<Pd>,
    memory: Memory,
}

/// What a region is over.
enum Memory {
    /// The process's.
    Process(Arc<dyn Region>),
    /// The device's.
    Device(Arc<DeviceRegion>),
    /// None: it reads as zeros.
    Null(Key),
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
        let domain: Arc<dyn ProtectionDomain> = Arc::clone(&pd.domain) as _;
        let region = domain.register(memory, options)?;
        if settings().cold && options.mode == Mode::OnDemand {
            // As if the pages had been taken away and were there again.
            memory.space().notifiers().invalidate(memory.range().page_aligned(), || ());
        }
        Ok(Self { pd: Arc::clone(pd), memory: Memory::Process(region) })
    }

    /// Registers whatever is and will be mapped in `memory`.
    pub(crate) fn implicit(pd: &Arc<Pd>, memory: &UserRange, flags: c_uint) -> Result<Self, Errno> {
        let domain: Arc<dyn ProtectionDomain> = Arc::clone(&pd.domain) as _;
        let options = RegisterOptions::implicit().with_access(region_rights(flags)?);
        Ok(Self { pd: Arc::clone(pd), memory: Memory::Process(domain.register(memory, options)?) })
    }

    /// Registers a part of device memory.
    pub(crate) fn of_device(
        pd: &Arc<Pd>,
        dm: &Dm,
        offset: u64,
        length: u64,
        flags: c_uint,
    ) -> Result<Self, Errno> {
        let region = dm.memory.register(pd.domain.handle(), region_rights(flags)?, offset, length)?;
        Ok(Self { pd: Arc::clone(pd), memory: Memory::Device(region) })
    }

    /// The region of no memory.
    pub(crate) fn null(pd: &Arc<Pd>) -> Result<Self, Errno> {
        let key = pd.context.device.hca().create_null_key(pd.domain.handle())?;
        Ok(Self { pd: Arc::clone(pd), memory: Memory::Null(key) })
    }

    pub(crate) fn key(&self) -> Key {
        match &self.memory {
            Memory::Process(region) => region.key(),
            Memory::Device(region) => region.key(),
            Memory::Null(key) => *key,
        }
    }
}

impl Drop for Mr {
    fn drop(&mut self) {
        match &self.memory {
            // Now, not when the last of those who look at it has gone.
            Memory::Process(region) => region.deregister(),
            Memory::Device(_) => {}
            Memory::Null(key) => {
                let known = self.pd.context.device.hca().destroy_null_key(*key);
                debug_assert!(known.is_ok(), "a null key is destroyed once");
            }
        }
    }
}

/// The rights that `enum ibv_access_flags` grants; those in the optional range are hints that we do not need.
pub(crate) fn rights(flags: c_uint) -> Result<Access, Errno> {
    let others = IBV_ACCESS_ON_DEMAND | IBV_ACCESS_HUGETLB;
    let mut access = Access::empty();
    let mut known = others | IBV_ACCESS_OPTIONAL_RANGE;
    for (flag, right) in [
        (IBV_ACCESS_LOCAL_WRITE, Access::LOCAL_WRITE),
        (IBV_ACCESS_REMOTE_WRITE, Access::REMOTE_WRITE),
        (IBV_ACCESS_REMOTE_READ, Access::REMOTE_READ),
        (IBV_ACCESS_REMOTE_ATOMIC, Access::REMOTE_ATOMIC),
        (IBV_ACCESS_MW_BIND, Access::WINDOW_BIND),
        (IBV_ACCESS_ZERO_BASED, Access::ZERO_BASED),
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

/// Those of a region. That its addresses count from 0 is said by its address.
fn region_rights(flags: c_uint) -> Result<Access, Errno> {
    let access = rights(flags & !IBV_ACCESS_ZERO_BASED)?;
    // Who may write from outside must be allowed to write here (ib_check_mr_access).
    let writes = access.intersects(Access::REMOTE_WRITE | Access::REMOTE_ATOMIC);
    if writes && !access.contains(Access::LOCAL_WRITE) {
        return Err(Errno::INVAL);
    }
    Ok(access)
}

fn options(flags: c_uint, iova: u64) -> Result<RegisterOptions, Errno> {
    let access = region_rights(flags)?;
    let mode = if flags & IBV_ACCESS_ON_DEMAND != 0 { Mode::OnDemand } else { Mode::Pinned };
    let address = if flags & IBV_ACCESS_ZERO_BASED != 0 { 0 } else { iova };
    // Of a pinned region the kernel does not ask for it (ib_umem_get).
    let hugetlb = flags & IBV_ACCESS_HUGETLB != 0 && mode == Mode::OnDemand;
    let address = Some(RegionAddr(address));
    Ok(RegisterOptions { access, mode, address, hugetlb, ..RegisterOptions::on_demand() })
}

/// Brings memory in ahead of use.
pub(crate) fn advise(pd: &Pd, advice: c_int, flush: bool, pieces: &[IbvSge]) -> Result<(), Errno> {
    let want = match advice {
        IBV_ADVISE_MR_ADVICE_PREFETCH => Want::Fault(PageAccess::Read),
        IBV_ADVISE_MR_ADVICE_PREFETCH_WRITE => Want::Fault(PageAccess::Write),
        IBV_ADVISE_MR_ADVICE_PREFETCH_NO_FAULT => Want::Snapshot,
        _ => return Err(Errno::NOTSUPP),
    };
    let flush = if flush { Flush::Yes } else { Flush::No };
    let pieces: Vec<Sge> =
        pieces.iter().map(|piece| super::request::sge(piece.addr, piece.length, piece.lkey)).collect();
    Ok(pd.domain.advise(want, flush, &pieces)?)
}
