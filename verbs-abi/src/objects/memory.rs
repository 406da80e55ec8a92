//! Protection domains and regions.

use super::{Context, Dm};
use crate::abi::IbvSge;
use crate::abi::number::*;
use crate::errno::Errno;
use crate::process::settings;
use hw_model::addr::{PAGE_SIZE, RegionAddr};
use hw_model::fault_plan::Points;
use hw_model::hca::{Access, DeviceRegion, Key, Sge};
use hw_model::sync::{Arc, Mutex};
use mr::Flush;
use mr::device::model::ModelPd;
use mr::{Mode, ProtectionDomain, Region, RegisterOptions, Rereg};
use odp::fault::Want;
use odp::space::dmabuf::{ImportMode, ImportOptions};
use odp::space::process::FileExport;
use odp::space::{Access as PageAccess, AddressSpace, UserRange};
use std::ffi::{c_int, c_uint};
use std::os::fd::BorrowedFd;

/// A protection domain.
pub(crate) struct Pd {
    pub(crate) context: Arc<Context>,
    pub(crate) domain: Arc<ModelPd>,
    /// Of a parent domain, which keeps them.
    _parts: Option<(Arc<Self>, Option<Arc<Td>>)>,
}

impl Pd {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Arc<Self>, Errno> {
        let domain = context.device.alloc_model_pd()?;
        Ok(Arc::new(Self { context: Arc::clone(context), domain, _parts: None }))
    }

    /// The domain of a handle, once more.
    pub(crate) fn import(context: &Arc<Context>, handle: u32) -> Result<Arc<Self>, Errno> {
        let domain = context.event_faces().handles.pd(handle).ok_or(Errno::NOENT)?;
        Ok(Arc::new(Self { context: Arc::clone(context), domain, _parts: None }))
    }

    /// A parent domain: the same domain once more, with how its objects are to be used (ibv_alloc_parent_domain(3)). All of
    /// ours may be used by any thread, and none of them is in memory of the program's.
    pub(crate) fn parent(of: &Arc<Self>, td: Option<&Arc<Td>>) -> Arc<Self> {
        let parts = Some((Arc::clone(of), td.map(Arc::clone)));
        Arc::new(Self { context: Arc::clone(&of.context), domain: Arc::clone(&of.domain), _parts: parts })
    }
}

/// A thread domain: the program's word that one thread uses what is in it.
pub(crate) struct Td {
    pub(crate) _context: Arc<Context>,
}

/// A region.
pub(crate) struct Mr {
    /// What it is in; reregistration changes it.
    pd: Mutex<Arc<Pd>>,
    memory: Memory,
}

/// What a region is over.
enum Memory {
    /// The process's, or a DMABUF's.
    Process(Arc<dyn Region>, Mode),
    /// The device's.
    Device(Arc<DeviceRegion>),
    /// None: it reads as zeros.
    Null(Key),
    /// Another's, which has it.
    Imported(Key),
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
        Ok(Self::new(pd, Memory::Process(region, options.mode)))
    }

    fn new(pd: &Arc<Pd>, memory: Memory) -> Self {
        let region = Self { pd: Mutex::new(Arc::clone(pd)), memory };
        pd.context.event_faces().handles.insert_region(region.key());
        region
    }

    /// Registers `length` bytes from `offset` on of the memory that a descriptor stands for. As in the kernel, pages that move
    /// are faulted in again (ib_umem_dmabuf_get).
    pub(crate) fn of_dmabuf(
        pd: &Arc<Pd>,
        fd: BorrowedFd<'_>,
        (offset, length): (u64, u64),
        iova: u64,
        flags: c_uint,
    ) -> Result<Self, Errno> {
        // One page is one page, however it is called (ib_uverbs_reg_dmabuf_mr).
        if flags & IBV_ACCESS_ON_DEMAND != 0 || (offset ^ iova) & (PAGE_SIZE - 1) != 0 {
            return Err(Errno::INVAL);
        }
        let options = RegisterOptions { mode: Mode::OnDemand, ..options(flags, iova)? };
        let buffer = FileExport::export(&pd.context.process.space, fd, Points::OFF)?;
        let space = buffer.attach(ImportOptions::new(ImportMode::Dynamic))?;
        let whole = space.user_range().ok_or(Errno::INVAL)?;
        let part = whole.part(offset, length).ok_or(Errno::INVAL)?;
        let domain: Arc<dyn ProtectionDomain> = Arc::clone(&pd.domain) as _;
        Ok(Self::new(pd, Memory::Process(domain.register(&part, options)?, options.mode)))
    }

    /// That of a handle, once more.
    pub(crate) fn import(pd: &Arc<Pd>, key: Key) -> Result<Self, Errno> {
        let there = pd.context.event_faces().handles.has_region(key);
        let region = Self { pd: Mutex::new(Arc::clone(pd)), memory: Memory::Imported(key) };
        if there { Ok(region) } else { Err(Errno::NOENT) }
    }

    /// Changes what is told of it; it stays as it is if that cannot be.
    pub(crate) fn rereg(
        &self,
        pd: Option<&Arc<Pd>>,
        memory: Option<UserRange>,
        flags: Option<c_uint>,
    ) -> Result<(), Errno> {
        let Memory::Process(region, mode) = &self.memory else { return Err(Errno::NOTSUPP) };
        // What brings its pages in is settled when it is registered.
        let on_demand = |flags: c_uint| flags & IBV_ACCESS_ON_DEMAND != 0;
        if flags.is_some_and(|flags| on_demand(flags) != (*mode == Mode::OnDemand)) {
            return Err(Errno::NOTSUPP);
        }
        let domain = pd.map(|pd| Arc::clone(&pd.domain) as Arc<dyn ProtectionDomain>);
        let memory = memory.map(|memory| (memory, None));
        region.rereg(Rereg { access: flags.map(region_rights).transpose()?, pd: domain, memory })?;
        if let Some(pd) = pd {
            *self.pd.lock() = Arc::clone(pd);
        }
        Ok(())
    }

    /// The memory of the process that it is in.
    pub(crate) fn space(&self) -> Arc<dyn AddressSpace> {
        Arc::clone(&self.pd.lock().context.process.space) as _
    }

    /// Registers whatever is and will be mapped in `memory`.
    pub(crate) fn implicit(pd: &Arc<Pd>, memory: &UserRange, flags: c_uint) -> Result<Self, Errno> {
        let domain: Arc<dyn ProtectionDomain> = Arc::clone(&pd.domain) as _;
        let options = RegisterOptions::implicit().with_access(region_rights(flags)?);
        Ok(Self::new(pd, Memory::Process(domain.register(memory, options)?, options.mode)))
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
        Ok(Self::new(pd, Memory::Device(region)))
    }

    /// The region of no memory.
    pub(crate) fn null(pd: &Arc<Pd>) -> Result<Self, Errno> {
        let key = pd.context.device.hca().create_null_key(pd.domain.handle())?;
        Ok(Self::new(pd, Memory::Null(key)))
    }

    pub(crate) fn key(&self) -> Key {
        match &self.memory {
            Memory::Process(region, _) => region.key(),
            Memory::Device(region) => region.key(),
            Memory::Null(key) | Memory::Imported(key) => *key,
        }
    }
}

impl Drop for Mr {
    fn drop(&mut self) {
        if matches!(self.memory, Memory::Imported(_)) {
            return;
        }
        self.pd.lock().context.event_faces().handles.remove_region(self.key());
        match &self.memory {
            // Now, not when the last of those who look at it has gone.
            Memory::Process(region, _) => region.deregister(),
            Memory::Device(_) | Memory::Imported(_) => {}
            Memory::Null(key) => {
                let known = self.pd.lock().context.device.hca().destroy_null_key(*key);
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
