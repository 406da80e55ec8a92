//! Fences: something that will have happened, in bounded time.
//!
//! As the kernel's `dma_fence` (include/linux/dma-fence.h): it signals once and stays so, whoever promised it cannot take
//! the promise back, and nobody waits for one without a bound.

use hw_model::bus::{DmaEpoch, Drain};
use hw_model::sync::atomic::{AtomicBool, Ordering};
use hw_model::sync::{Arc, Mutex, thread};
use std::fmt;
use std::time::{Duration, Instant};

/// A promise, to be polled or waited for. Clones are the same one.
#[derive(Clone)]
pub struct Fence(Arc<Promise>);

enum Promise {
    /// Somebody says so.
    Said(AtomicBool),
    /// The bursts that were under way when it was made have ended.
    Dma { epoch: Arc<DmaEpoch>, drain: Box<Mutex<Drain>> },
}

/// What keeps the promise of a [`Fence`]. Dropping it does too: a fence that never signals would be waited for by everybody
/// for as long as their bounds allow.
#[derive(Debug)]
#[must_use = "dropping it signals the fence"]
pub struct FenceSignal(Fence);

impl Fence {
    /// A fence, and what signals it.
    pub fn new() -> (Self, FenceSignal) {
        let fence = Self(Arc::new(Promise::Said(AtomicBool::new(false))));
        (fence.clone(), FenceSignal(fence))
    }

    /// Signals when all DMA to and from the memory of `epoch` that is under way now has ended.
    #[must_use]
    pub fn of_dma(epoch: &Arc<DmaEpoch>) -> Self {
        let drain = Box::new(Mutex::new(epoch.drain()));
        Self(Arc::new(Promise::Dma { epoch: Arc::clone(epoch), drain }))
    }

    /// Whether it has signalled. Never waits.
    #[must_use]
    pub fn is_signalled(&self) -> bool {
        match &*self.0 {
            Promise::Said(said) => said.load(Ordering::Acquire),
            Promise::Dma { epoch, drain } => drain.lock().poll(epoch),
        }
    }

    /// Waits until it has signalled, but at most for about `timeout`; whether it has.
    #[must_use]
    pub fn wait(&self, timeout: Duration) -> bool {
        until(timeout, || self.is_signalled())
    }
}

/// Looks at `condition` until it is true, giving the processor away between looks, then sleeping, but at most for about
/// `timeout`; whether it is.
pub(super) fn until(timeout: Duration, mut condition: impl FnMut() -> bool) -> bool {
    const YIELDS: u32 = 64;
    const NAP: Duration = Duration::from_micros(20);
    if condition() {
        return true;
    }
    let end = Instant::now().checked_add(timeout);
    let mut looks = 0_u32;
    while end.is_none_or(|end| Instant::now() < end) {
        looks = looks.saturating_add(1);
        if looks < YIELDS || cfg!(any(loom, shuttle)) {
            thread::yield_now();
        } else {
            thread::sleep(NAP);
        }
        if condition() {
            return true;
        }
    }
    false
}

impl FenceSignal {
    /// It has happened.
    pub fn signal(self) {}
}

impl Drop for FenceSignal {
    fn drop(&mut self) {
        if let Promise::Said(said) = &*self.0.0 {
            said.store(true, Ordering::Release);
        }
    }
}

impl fmt::Debug for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fence").field("signalled", &self.is_signalled()).finish()
    }
}
