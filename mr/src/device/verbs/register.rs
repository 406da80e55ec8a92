//! Registering in a domain of a real device: pinned, on demand, all of the address space, a DMABUF; and changing what is
//! registered.
//!
//! Unsafe island. Invariant: memory is registered only through a [`UserRange`] of this process, so that somebody owns it or
//! vouched for it; the region holds that. A DMABUF is held by the kernel, and who maps it answers for references to it, as
//! with any shared file.
#![allow(unsafe_code)]

use super::capabilities::Capability;
use super::context::last_errno;
use super::error::VerbsError;
use super::handle::Change;
use super::limits::{LockedMemory, without_pages};
use super::pd::{VerbsPd, translated};
use super::region::{Memory, Registered, VerbsRegion};
use crate::device::RegisterOptions;
use crate::region::Mode;
use hw_model::addr::{PAGE_SIZE, RegionAddr};
use hw_model::hca::Access;
use hw_model::sync::Arc;
use hw_model::sync::atomic::Ordering;
use odp::space::UserRange;
use rdma_sys::{ibv_mr, ibv_reg_dmabuf_mr, ibv_reg_mr, ibv_reg_mr_iova, ibv_rereg_mr};
use rustix::fd::{AsRawFd, BorrowedFd};
use rustix::io::Errno;
use std::ffi::c_void;
use std::os::raw::c_int;
use std::ptr::{self, NonNull};

/// `IBV_ACCESS_ON_DEMAND` and `IBV_ACCESS_HUGETLB`.
const ON_DEMAND: c_int = 1 << 6;
const HUGETLB: c_int = 1 << 7;

/// What became of a change in place.
pub(super) enum Changed {
    /// It was made, and this is the region from now on.
    InPlace(Arc<VerbsRegion>),
    /// The driver has no such change: the region is to be made anew.
    Not,
}

impl VerbsPd {
    /// Registers `memory` as one region with one key: pinned (ibv_reg_mr(3)), on demand where the device can, or, with
    /// [`Mode::Implicit`] where it has that, all of the address space, for [`UserRange::everything`].
    ///
    /// # Errors
    /// See [`VerbsError`]. Limits are looked at first; nothing is left behind.
    pub fn register(
        self: &Arc<Self>,
        memory: &UserRange,
        options: RegisterOptions,
    ) -> Result<Arc<VerbsRegion>, VerbsError> {
        self.check(memory, options)?;
        self.check_count()?;
        let start = memory.range().start();
        let address = options.address.unwrap_or(RegionAddr(start.0));
        let flags = flags(options);
        let (at, len) = place(memory, options.mode);
        let mr = if options.address.is_some() && options.mode != Mode::Implicit {
            // SAFETY: a domain that is there; the range may be used by devices as long as the region lives, which holds it.
            unsafe { ibv_reg_mr_iova(self.as_ptr(), at, len, address.0, flags) }
        } else {
            // SAFETY: the same.
            unsafe { ibv_reg_mr(self.as_ptr(), at, len, flags) }
        };
        self.registered(mr, "ibv_reg_mr", Memory::Process(memory.clone()), options, address)
    }

    /// Registers `len` bytes from `offset` on of the buffer that a DMABUF's descriptor stands for (ibv_reg_dmabuf_mr(3)); peers
    /// name its first byte by `address`. Its pages may move while it is registered: the kernel keeps the region true.
    ///
    /// # Errors
    /// [`VerbsError::Lacks`] from a device without, [`VerbsError::DmabufAddress`], and as [`VerbsPd::register`].
    pub fn register_dmabuf(
        self: &Arc<Self>,
        buffer: BorrowedFd<'_>,
        (offset, len): (u64, u64),
        address: RegionAddr,
        access: Access,
    ) -> Result<Arc<VerbsRegion>, VerbsError> {
        self.device().require(Capability::Dmabuf)?;
        self.check_length(len)?;
        self.check_count()?;
        // One page is one page, however it is called (ib_uverbs_reg_dmabuf_mr, uverbs_std_types_mr.c).
        if (offset ^ address.0) & (PAGE_SIZE - 1) != 0 {
            return Err(VerbsError::DmabufAddress { offset, address });
        }
        let bytes = usize::try_from(len).map_err(|_| self.too_long(len))?;
        let (fd, flags) = (buffer.as_raw_fd(), translated(access));
        // SAFETY: a domain that is there; no memory of the program's is named.
        let mr = unsafe { ibv_reg_dmabuf_mr(self.as_ptr(), offset, bytes, address.0, fd, flags) };
        let options = RegisterOptions { access, address: Some(address), ..RegisterOptions::on_demand() };
        self.registered(mr, "ibv_reg_dmabuf_mr", Memory::Dmabuf(len), options, address)
    }

    fn registered(
        self: &Arc<Self>,
        mr: *mut ibv_mr,
        call: &'static str,
        memory: Memory,
        options: RegisterOptions,
        address: RegionAddr,
    ) -> Result<Arc<VerbsRegion>, VerbsError> {
        let Some(mr) = NonNull::new(mr) else {
            let (device, reason) = (self.device(), last_errno());
            let asked = match &memory {
                Memory::Process(memory) if reason == Errno::FAULT => Some(memory.range()),
                _ => None,
            };
            return Err(match asked.and_then(without_pages) {
                Some(part) => VerbsError::WithoutPages { device: device.name().to_owned(), part },
                None => device.refused(call, reason),
            });
        };
        VerbsRegion::new(Registered::new(self, mr, memory), options, address)
    }

    /// Changes `region` in place (ibv_rereg_mr(3)): what `change` names, to this domain, `memory` and `options`, which say how
    /// all of it is afterwards.
    pub(super) fn change(
        self: &Arc<Self>,
        region: &VerbsRegion,
        change: &Change,
        memory: &UserRange,
        options: RegisterOptions,
    ) -> Result<Changed, VerbsError> {
        /// `enum ibv_rereg_mr_err_code`: nothing was changed, or all of it but a word to fork(2).
        const UNCHANGED: [c_int; 2] = [-1, -2];
        const CHANGED: [c_int; 2] = [0, -3];
        let told = [change.memory.is_some(), change.pd.is_some(), change.access.is_some()];
        let what = (0..3).filter(|bit| told[*bit]).map(|bit| 1 << bit).sum();
        let (at, len) = if told[0] { place(memory, options.mode) } else { (ptr::null_mut(), 0) };
        let pd = if told[1] { self.as_ptr() } else { ptr::null_mut() };
        let access = if told[2] { flags(options) } else { 0 };
        region.hand_on(|registered| {
            // SAFETY: a live region and domain; the range may be used by devices as long as the region lives, which holds it.
            let code = unsafe { ibv_rereg_mr(registered.as_ptr(), what, pd, at, len, access) };
            if CHANGED.contains(&code) {
                let start = RegionAddr(memory.range().start().0);
                let address = options.address.unwrap_or(start);
                let moved = registered.moved(self, Memory::Process(memory.clone()));
                return (None, VerbsRegion::new(moved, options, address).map(Changed::InPlace));
            }
            let reason = last_errno();
            let absent = matches!(reason, Errno::OPNOTSUPP | Errno::NOSYS);
            // What a command that failed left behind is not to be used (ibv_rereg_mr(3)): made anew, too.
            let outcome = if UNCHANGED.contains(&code) && !absent {
                Err(self.device().refused("ibv_rereg_mr", reason))
            } else {
                Ok(Changed::Not)
            };
            (Some(registered), outcome)
        })?
    }

    /// What of memory and options would end the registration, before it is tried.
    pub(super) fn check(&self, memory: &UserRange, options: RegisterOptions) -> Result<(), VerbsError> {
        let (device, range) = (self.device(), memory.range());
        if !memory.space().is_this_process() {
            return Err(VerbsError::NotOfThisProcess { range });
        }
        if options.mode == Mode::Implicit {
            device.require(Capability::Implicit)?;
            let all = memory.space().addresses();
            let named = options.address.is_none_or(|address| address.0 == 0);
            return if range == all && named {
                Ok(())
            } else {
                Err(VerbsError::NotEverything { range, all })
            };
        }
        self.check_length(range.len())?;
        if options.hugetlb {
            let shift = memory.space().page_shift(range.page_aligned());
            let page = 1_u64 << shift;
            let aligned = range.start().0.is_multiple_of(page) && range.len().is_multiple_of(page);
            if page == PAGE_SIZE || !aligned {
                return Err(VerbsError::HugePages { range, page });
            }
        }
        match options.mode {
            Mode::OnDemand => device.require(Capability::OnDemand),
            _ => LockedMemory::now().allows(range),
        }
    }

    fn check_length(&self, len: u64) -> Result<(), VerbsError> {
        match len {
            0 => Err(VerbsError::Empty),
            len if len > self.device().capabilities().max_region => Err(self.too_long(len)),
            _ => Ok(()),
        }
    }

    fn too_long(&self, len: u64) -> VerbsError {
        let device = self.device();
        let limit = device.capabilities().max_region;
        VerbsError::TooLong { device: device.name().to_owned(), len, limit }
    }

    /// That there may be one region more.
    fn check_count(&self) -> Result<(), VerbsError> {
        let device = self.device();
        let max = device.capabilities().max_regions;
        if device.regions.load(Ordering::Relaxed) < max {
            return Ok(());
        }
        Err(VerbsError::TooManyRegions { device: device.name().to_owned(), max })
    }
}

/// What libibverbs is told of memory: all of the address space is NULL and the largest length (ibv_reg_mr(3)).
fn place(memory: &UserRange, mode: Mode) -> (*mut c_void, usize) {
    if mode == Mode::Implicit {
        return (ptr::null_mut(), usize::MAX);
    }
    let range = memory.range();
    (ptr::with_exposed_provenance_mut(range.start().0 as usize), range.len() as usize)
}

fn flags(options: RegisterOptions) -> c_int {
    let mut flags = translated(options.access);
    if options.mode != Mode::Pinned {
        flags |= ON_DEMAND;
        // Of a pinned region the kernel does not ask for it (ib_umem_get).
        if options.hugetlb {
            flags |= HUGETLB;
        }
    }
    flags
}
