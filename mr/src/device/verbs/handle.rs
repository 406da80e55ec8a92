//! A registration that may be changed, or made anew, behind a handle that stays.
//!
//! A real device keeps a region true by itself only on demand. A pinned region keeps the pages that it had: when one of them is
//! dropped or replaced by another, of another kind perhaps, device and program see different bytes from then on. And
//! some drivers cannot change a region (the library of rdma_rxe in rdma-core 44 has no ibv_rereg_mr(3), and the driver no
//! change of memory). For both there is a fresh registration: the key is another one then, and **the old key reaches nothing
//! any more when the call returns**. Whoever was told the old key must be told the new one.
//!
//! Changes of the memory of a pinned region are noticed as [`Region::rung`](crate::device::Region::rung) promises, by the
//! notifiers that regions of the model have.

use super::capabilities::Capability;
use super::error::VerbsError;
use super::pd::VerbsPd;
use super::region::VerbsRegion;
use super::register::Changed;
use crate::device::{Region, RegisterOptions};
use crate::region::Mode;
use hw_model::addr::{RegionAddr, VirtRange};
use hw_model::hca::{Access, Key};
use hw_model::sync::atomic::{AtomicBool, Ordering};
use hw_model::sync::{Arc, Mutex};
use odp::notifier::{Interval, Notify, Raise};
use odp::space::{UserRange, Watch};

/// What of a registration changes. What is `None` stays.
#[derive(Clone, Default)]
pub struct Change {
    /// Who may do what.
    pub access: Option<Access>,
    /// Another domain of the same device.
    pub pd: Option<Arc<VerbsPd>>,
    /// Other memory, and the address of its first byte as peers name it. `None` is its virtual address.
    pub memory: Option<(UserRange, Option<RegionAddr>)>,
}

/// How a registration was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// By ibv_rereg_mr(3), with the key that the region has now: in general the one that it had.
    InPlace(Key),
    /// By a fresh registration, which has this key. The old one reaches nothing any more.
    Fresh(Key),
}

impl Outcome {
    /// The key from now on.
    #[must_use]
    pub fn key(self) -> Key {
        match self {
            Self::InPlace(key) | Self::Fresh(key) => key,
        }
    }
}

/// A registration behind a handle that stays. Dropping it deregisters.
pub struct VerbsHandle {
    current: Mutex<Current>,
}

struct Current {
    region: Arc<VerbsRegion>,
    memory: UserRange,
    options: RegisterOptions,
    watched: Option<Watched>,
}

/// What tells of changes of a pinned region's memory. Dropped in the order of its fields.
struct Watched {
    _interval: Interval,
    _watch: Watch,
    changed: Arc<Flag>,
}

/// Set by whatever takes pages away, before it does.
struct Flag(AtomicBool);

impl Notify for Flag {
    fn clear(&self, _range: VirtRange, raise: Raise<'_>) {
        self.0.store(true, Ordering::Release);
        raise.raise();
    }
    fn try_clear(&self, range: VirtRange, raise: Raise<'_>) -> bool {
        self.clear(range, raise);
        true
    }
    // The kernel holds the pages that the device has: nothing is to be taken down.
    fn unlink(&self, _range: VirtRange) {}
    fn try_unlink(&self, _range: VirtRange) -> bool {
        true
    }
}

impl Watched {
    /// `None` where the space can watch no such range, or where the kernel keeps the region true.
    fn new(memory: &UserRange, mode: Mode) -> Option<Self> {
        if mode != Mode::Pinned {
            return None;
        }
        let range = memory.range().page_aligned();
        let watch = memory.space().watch(range).ok()?;
        let changed = Arc::new(Flag(AtomicBool::new(false)));
        let interval = memory.space().notifiers().register(range, Arc::clone(&changed) as _);
        Some(Self { _interval: interval, _watch: watch, changed })
    }
}

impl VerbsHandle {
    /// Registers `memory` in `pd`.
    ///
    /// # Errors
    /// Those of [`VerbsPd::register`].
    pub fn register(
        pd: &Arc<VerbsPd>,
        memory: &UserRange,
        options: RegisterOptions,
    ) -> Result<Arc<Self>, VerbsError> {
        // Watched first: what changes while the pages are being pinned is noticed.
        let watched = Watched::new(memory, options.mode);
        let region = pd.register(memory, options)?;
        let current = Current { region, memory: memory.clone(), options, watched };
        Ok(Arc::new(Self { current: Mutex::new(current) }))
    }

    /// The registration as it is now. It is deregistered by the next change, whoever holds it.
    #[must_use]
    pub fn region(&self) -> Arc<VerbsRegion> {
        Arc::clone(&self.current.lock().region)
    }

    /// The key that it has now.
    #[must_use]
    pub fn key(&self) -> Key {
        self.current.lock().region.key()
    }

    /// Whether pages of the memory were dropped, moved or replaced since it was registered, so that the device may have others
    /// than the program. Never of a region on demand, which the kernel keeps true; `None` if nothing tells of changes of
    /// this memory. On the rung of events a change may be told late, and so once more after the memory was registered again.
    #[must_use]
    pub fn is_stale(&self) -> Option<bool> {
        let current = self.current.lock();
        match &current.watched {
            Some(watched) => Some(watched.changed.0.load(Ordering::Acquire)),
            None => (current.options.mode != Mode::Pinned).then_some(false),
        }
    }

    /// Registers the memory again as it is now. The old key reaches nothing when this returns. Until then there are two
    /// registrations, which the limits must allow.
    ///
    /// # Errors
    /// Those of [`VerbsPd::register`]. The old registration is as it was then.
    pub fn refresh(&self) -> Result<Key, VerbsError> {
        let mut current = self.current.lock();
        let pd = Arc::clone(current.region.pd());
        let (memory, options) = (current.memory.clone(), current.options);
        current.replace(&pd, memory, options)
    }

    /// The same if it is stale; `None` if nothing is known to have changed.
    ///
    /// # Errors
    /// Those of [`VerbsHandle::refresh`].
    pub fn refresh_if_stale(&self) -> Result<Option<Key>, VerbsError> {
        if self.is_stale() == Some(true) { self.refresh().map(Some) } else { Ok(None) }
    }

    /// Changes it: in place by ibv_rereg_mr(3) where device and driver can, else by a fresh registration.
    ///
    /// # Errors
    /// [`VerbsError::Foreign`] for a domain of another device, [`VerbsError::WindowsBound`], and those of [`VerbsPd::register`]. The registration is as it
    /// was then, unless a driver broke it off in the middle and a fresh one failed: it is gone in that case, and says so.
    pub fn change(&self, change: Change) -> Result<Outcome, VerbsError> {
        let mut current = self.current.lock();
        let before = Arc::clone(current.region.pd());
        let device = before.device();
        let pd = change.pd.clone().unwrap_or_else(|| Arc::clone(&before));
        if !pd.device().is(device) {
            return Err(VerbsError::Foreign { device: device.name().to_owned() });
        }
        // As everywhere else (IBTA volume 1, 11.2.8.7).
        let windows = current.region.windows().len();
        if windows > 0 {
            return Err(VerbsError::WindowsBound { key: current.region.key(), windows });
        }
        let mut options = current.options;
        options.access = change.access.unwrap_or(options.access);
        let memory = match &change.memory {
            None => current.memory.clone(),
            Some((memory, address)) => {
                options.address = *address;
                memory.clone()
            }
        };
        // ibv_rereg_mr(3) has no word for an address of the program's choice.
        let expressible = change.memory.is_none() || options.address.is_none();
        if expressible && device.capabilities().has(Capability::Rereg) {
            if change.memory.is_some() {
                pd.check(&memory, options)?;
            }
            match pd.change(&current.region, &change, &memory, options)? {
                Changed::InPlace(region) => {
                    if change.memory.is_some() {
                        current.watched = Watched::new(&memory, options.mode);
                    }
                    let key = region.key();
                    (current.region, current.memory, current.options) = (region, memory, options);
                    return Ok(Outcome::InPlace(key));
                }
                Changed::Not => {}
            }
        }
        current.replace(&pd, memory, options).map(Outcome::Fresh)
    }
}

impl Current {
    fn replace(
        &mut self,
        pd: &Arc<VerbsPd>,
        memory: UserRange,
        options: RegisterOptions,
    ) -> Result<Key, VerbsError> {
        let watched = Watched::new(&memory, options.mode);
        let region = pd.register(&memory, options)?;
        let old = std::mem::replace(&mut self.region, region);
        (self.memory, self.options, self.watched) = (memory, options, watched);
        old.deregister();
        Ok(self.region.key())
    }
}

impl std::fmt::Debug for VerbsHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VerbsHandle").field("region", &self.region()).finish_non_exhaustive()
    }
}
