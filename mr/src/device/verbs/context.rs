//! An open device.
//!
//! Unsafe island. Invariant: `context` was given by libibverbs, or by a caller who vouched for it, and stays open until this
//! is dropped, after everything that was made from it: all of that holds the device by `Arc`.
#![allow(unsafe_code)]

use super::capabilities::{Capabilities, Capability, Operations};
use super::error::VerbsError;
use super::events::VerbsChannel;
use super::extended;
use super::pd::VerbsPd;
use super::queue::VerbsCq;
use hw_model::sync::Arc;
use hw_model::sync::atomic::AtomicU64;
use hw_model::wire::Gid;
use rdma_sys::{
    ___ibv_query_port, ibv_close_device, ibv_context, ibv_device, ibv_device_attr_ex, ibv_free_device_list,
    ibv_get_device_list, ibv_get_device_name, ibv_gid, ibv_open_device, ibv_port_attr, ibv_query_gid,
};
use rustix::io::Errno;
use std::any::Any;
use std::ffi::CStr;
use std::ptr::NonNull;

/// What errno says after a call that gave no pointer.
pub(super) fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// The name of a device of a list, or of an open context.
fn name_of(device: *mut ibv_device) -> String {
    // SAFETY: both callers have it from libibverbs, and it is there still.
    let name = unsafe { ibv_get_device_name(device) };
    // SAFETY: a string that lives as long as the device.
    unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
}

/// All devices there are.
struct List {
    devices: Option<NonNull<*mut ibv_device>>,
    count: usize,
}

impl List {
    /// None, too, where the kernel has no RDMA at all.
    fn new() -> Self {
        let mut count = 0;
        // SAFETY: the count has room; the list is freed on drop.
        let devices = NonNull::new(unsafe { ibv_get_device_list(&raw mut count) });
        Self { devices, count: usize::try_from(count).unwrap_or(0) }
    }

    fn iter(&self) -> impl Iterator<Item = (String, *mut ibv_device)> + '_ {
        let devices = self.devices.into_iter();
        devices.flat_map(move |devices| {
            (0..self.count).map(move |index| {
                // SAFETY: the list has as many entries.
                let entry = unsafe { devices.add(index) };
                // SAFETY: an entry of the list.
                let device = unsafe { entry.read() };
                (name_of(device), device)
            })
        })
    }
}

impl Drop for List {
    fn drop(&mut self) {
        if let Some(devices) = self.devices {
            // SAFETY: given by ibv_get_device_list, and no entry of it is used again.
            unsafe { ibv_free_device_list(devices.as_ptr()) };
        }
    }
}

/// The names of the RDMA devices of this machine.
#[must_use]
pub fn devices() -> Vec<String> {
    List::new().iter().map(|(name, _)| name).collect()
}

/// Who closes the context.
enum Owner {
    Ours,
    /// Held until the device goes.
    Theirs {
        _keep: Arc<dyn Any + Send + Sync>,
    },
}

/// A device that libibverbs drives, open.
pub struct VerbsDevice {
    name: String,
    context: NonNull<ibv_context>,
    owner: Owner,
    capabilities: Capabilities,
    /// Regions of it that this process has.
    pub(super) regions: AtomicU64,
}

// SAFETY: a context of libibverbs may be used by any thread (libibverbs is thread safe, README of rdma-core).
unsafe impl Send for VerbsDevice {}
// SAFETY: the same.
unsafe impl Sync for VerbsDevice {}

impl VerbsDevice {
    /// Opens the device called `name`, `rxe0` for instance, and asks what it can do.
    ///
    /// # Errors
    /// [`VerbsError::NoDevice`], or what the kernel said.
    pub fn open(name: &str) -> Result<Arc<Self>, VerbsError> {
        let list = List::new();
        let Some((_, device)) = list.iter().find(|(found, _)| found == name) else {
            let found = list.iter().map(|(name, _)| name).collect();
            return Err(VerbsError::NoDevice { name: name.to_owned(), found });
        };
        // SAFETY: a device of a list that is there still.
        let Some(context) = NonNull::new(unsafe { ibv_open_device(device) }) else {
            return Err(refused(name, "ibv_open_device", last_errno()));
        };
        Self::with(context, name.to_owned(), Owner::Ours)
    }

    /// A context that the program has opened itself. `keep` is held as long as it is used here.
    ///
    /// # Errors
    /// What the device said to a question.
    ///
    /// # Safety
    /// `context` is an open context of the libibverbs that this process is linked with, and stays open while `keep` lives.
    pub unsafe fn from_context(
        context: NonNull<ibv_context>,
        keep: Arc<dyn Any + Send + Sync>,
    ) -> Result<Arc<Self>, VerbsError> {
        // SAFETY: an open context, by the caller's word.
        let device = unsafe { (*context.as_ptr()).device };
        Self::with(context, name_of(device), Owner::Theirs { _keep: keep })
    }

    fn with(context: NonNull<ibv_context>, name: String, owner: Owner) -> Result<Arc<Self>, VerbsError> {
        let capabilities = Capabilities {
            has: [false; Capability::ALL.len()],
            on_demand_rc: Operations::empty(),
            on_demand_uc: Operations::empty(),
            on_demand_ud: Operations::empty(),
            max_regions: 0,
            max_region: 0,
            max_qps: 0,
            max_requests: 0,
            max_cq_entries: 0,
        };
        // Whatever fails from here on, the context is closed.
        let mut device = Self { name, context, owner, capabilities, regions: AtomicU64::new(0) };
        // SAFETY: the context is open.
        let said = unsafe { extended::query_device(context.as_ptr()) };
        device.take(&said.map_err(|reason| device.refused("ibv_query_device_ex", reason))?);
        let device = Arc::new(device);
        // What no attribute tells is tried, on a domain that goes again.
        let tried = VerbsPd::new(&device)?.probe();
        let mut device = Arc::into_inner(device).expect("the domain that held it is gone");
        for capability in tried {
            device.capabilities.has[capability as usize] = true;
        }
        Ok(Arc::new(device))
    }

    /// Takes over what the device says of itself.
    fn take(&mut self, said: &ibv_device_attr_ex) {
        /// `IBV_ODP_SUPPORT` and `IBV_ODP_SUPPORT_IMPLICIT`.
        const ODP: [(u64, Capability); 2] = [(1, Capability::OnDemand), (2, Capability::Implicit)];
        /// `IBV_DEVICE_MEM_WINDOW` and its types 2A and 2B.
        const WINDOWS: [(u32, Capability); 2] =
            [(1 << 17, Capability::WindowType1), (1 << 23 | 1 << 24, Capability::WindowType2)];
        let plain = &said.orig_attr;
        let to_u32 = |number: i32| u32::try_from(number).unwrap_or(0);
        let known = &mut self.capabilities;
        for (bit, capability) in ODP {
            known.has[capability as usize] = said.odp_caps.general_caps & bit != 0;
        }
        for (bits, capability) in WINDOWS {
            known.has[capability as usize] = plain.device_cap_flags & bits != 0 && plain.max_mw > 0;
        }
        let operations = Operations::from_bits_truncate;
        known.on_demand_rc = operations(said.odp_caps.per_transport_caps.rc_odp_caps);
        known.on_demand_uc = operations(said.odp_caps.per_transport_caps.uc_odp_caps);
        known.on_demand_ud = operations(said.odp_caps.per_transport_caps.ud_odp_caps);
        known.max_regions = u64::from(to_u32(plain.max_mr));
        known.max_region = plain.max_mr_size;
        known.max_qps = to_u32(plain.max_qp);
        known.max_requests = to_u32(plain.max_qp_wr);
        known.max_cq_entries = to_u32(plain.max_cqe);
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it can do.
    #[must_use]
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// That it has `capability`.
    ///
    /// # Errors
    /// [`VerbsError::Lacks`], which names both.
    pub fn require(&self, capability: Capability) -> Result<(), VerbsError> {
        if self.capabilities.has(capability) {
            return Ok(());
        }
        Err(VerbsError::Lacks { device: self.name.clone(), capability })
    }

    /// A new protection domain.
    ///
    /// # Errors
    /// What the device said.
    pub fn alloc_pd(self: &Arc<Self>) -> Result<Arc<VerbsPd>, VerbsError> {
        Ok(Arc::new(VerbsPd::new(self)?))
    }

    /// A new completion queue of `entries` entries.
    ///
    /// # Errors
    /// What the device said.
    pub fn create_cq(self: &Arc<Self>, entries: u32) -> Result<Arc<VerbsCq>, VerbsError> {
        VerbsCq::new(self, entries, None, 0)
    }

    /// The same with events: they go to `channel`, and carry `cookie`.
    ///
    /// # Errors
    /// What the device said.
    pub fn create_cq_with(
        self: &Arc<Self>,
        entries: u32,
        channel: &Arc<VerbsChannel>,
        cookie: u64,
    ) -> Result<Arc<VerbsCq>, VerbsError> {
        VerbsCq::new(self, entries, Some(Arc::clone(channel)), cookie)
    }

    /// A new completion channel.
    ///
    /// # Errors
    /// What the device said.
    pub fn create_channel(self: &Arc<Self>) -> Result<Arc<VerbsChannel>, VerbsError> {
        VerbsChannel::new(self)
    }

    /// Entry `index` of the address table of `port` (ibv_query_gid(3)).
    ///
    /// # Errors
    /// What the device said.
    pub fn gid(&self, port: u8, index: u8) -> Result<Gid, VerbsError> {
        let mut gid = ibv_gid { raw: [0; 16] };
        // SAFETY: the context is open, and there is room for the address.
        let code = unsafe { ibv_query_gid(self.context.as_ptr(), port, index.into(), &raw mut gid) };
        if code != 0 {
            return Err(self.refused("ibv_query_gid", last_errno()));
        }
        // SAFETY: 16 bytes are one of the two ways to look at it.
        Ok(Gid(u128::from_be_bytes(unsafe { gid.raw })))
    }

    /// The path MTU that `port` has at the moment, as `enum ibv_mtu` numbers it (ibv_query_port(3)).
    pub(super) fn active_mtu(&self, port: u8) -> Result<u32, VerbsError> {
        // SAFETY: all zeroes is a value of this C struct.
        let mut said: ibv_port_attr = unsafe { std::mem::zeroed() };
        // SAFETY: an open context, and room for the beginning of the struct, which is what the exported function knows.
        match unsafe { ___ibv_query_port(self.context.as_ptr(), port, &raw mut said) } {
            0 => Ok(said.active_mtu),
            code => Err(self.refused("ibv_query_port", extended::errno(code))),
        }
    }

    /// Whether both are one context: what is made of a context that was handed over twice works together.
    pub(super) fn is(&self, other: &Self) -> bool {
        self.context == other.context
    }

    pub(super) fn context(&self) -> *mut ibv_context {
        self.context.as_ptr()
    }

    pub(super) fn refused(&self, call: &'static str, reason: Errno) -> VerbsError {
        refused(&self.name, call, reason)
    }
}

fn refused(device: &str, call: &'static str, reason: Errno) -> VerbsError {
    VerbsError::Refused { device: device.to_owned(), call, reason }
}

impl Drop for VerbsDevice {
    fn drop(&mut self) {
        if matches!(self.owner, Owner::Ours) {
            // SAFETY: opened by us, closed once, and what was made from it is gone: it held the device.
            unsafe { ibv_close_device(self.context.as_ptr()) };
        }
    }
}

impl std::fmt::Debug for VerbsDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VerbsDevice").field("name", &self.name).finish_non_exhaustive()
    }
}
