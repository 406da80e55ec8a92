//! Bounce buffers as devices of the policy `legacy` use them.
//!
//! Behind an IOMMU a buffer is parked in the pool, and the IO page that leads to it is all that remembers it: a
//! [`Mapping`](super::Mapping) keeps one bit. Where nothing translates there is no table to remember it, and no mapping: a
//! [`Bounced`] holds the buffers beside whatever list of DMA addresses its owner keeps.

use super::device::DmaDevice;
use super::points;
use hw_model::addr::{DmaAddr, PAGE_SIZE, PhysAddr};
use hw_model::bounce::{Bounce, BouncePool, BounceRequest, SEGMENT_SIZE};
use hw_model::bus::{Busy, DmaPort, HostMemory, Slot};
use hw_model::sync::{Arc, Mutex, thread};
use std::time::Duration;

/// Why memory did not bounce, or was not copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BounceError {
    /// The pool refused.
    #[error(transparent)]
    Pool(#[from] hw_model::bounce::BounceError),
    /// The device has nothing to bounce with: the policy is `coherent`, the host has no pool, or as many devices as
    /// there can be already move data.
    #[error("the device has no bounce pool")]
    NoPool,
    /// All DMA is held up for longer than is waited for: the memory is changing. Try again.
    #[error("memory is changing, and nothing may be copied meanwhile")]
    Held,
}

/// Which way a sync copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SyncDirection {
    /// What the device wrote to where the CPU reads it (`dma_sync_single_for_cpu`).
    ForCpu,
    /// What the CPU wrote to where the device reads it (`dma_sync_single_for_device`).
    ForDevice,
}

/// What one device bounces with.
pub(super) struct Bouncer {
    pool: Arc<BouncePool>,
    memory: Arc<dyn HostMemory>,
    /// Its copies are bursts like those of the device. One at a time: whoever looks at a parked buffer or takes it does
    /// so with this held.
    slot: Mutex<Slot>,
    trusted: bool,
}

/// Attempts to begin a burst, the later ones [`PAUSE`] apart: 10 ms in all.
const PATIENCE: u32 = 1100;
/// Between two attempts.
const PAUSE: Duration = Duration::from_micros(10);

impl Bouncer {
    /// `None` if the host has no pool or no place for another engine.
    pub(super) fn new(port: &DmaPort, trusted: bool) -> Option<Self> {
        let pool = Arc::clone(port.bus().bounce()?);
        let slot = Mutex::new(port.epoch().register()?);
        Some(Self { pool, memory: Arc::clone(port.bus().memory()), slot, trusted })
    }

    /// Whether `phys` lies in a buffer.
    pub(super) fn holds(&self, phys: PhysAddr) -> bool {
        self.pool.holds(phys)
    }

    /// Runs `work` as a burst. Whoever holds DMA up may be waiting for a lock of our caller, so this does not wait for
    /// ever.
    fn burst<T>(slot: &mut Slot, work: impl FnOnce(&Busy<'_>) -> T) -> Result<T, BounceError> {
        for attempt in 0..PATIENCE {
            if attempt > 100 {
                thread::sleep(PAUSE);
            }
            if let Ok(burst) = slot.enter() {
                return Ok(work(&burst));
            }
            thread::yield_now();
        }
        Err(BounceError::Held)
    }

    /// A buffer with the data in it.
    fn fill(&self, origin: PhysAddr, len: u64, granule: u64) -> Result<Bounce, BounceError> {
        let request = BounceRequest { origin, len, granule, trusted: self.trusted };
        Ok(Self::burst(&mut self.slot.lock(), |burst| self.pool.map(request, &*self.memory, burst))??)
    }

    /// Gives a buffer back, with what the device wrote if `copy` says so.
    ///
    /// # Errors
    /// The copy's. What cannot be copied is gone with its memory; the buffer goes back all the same.
    fn empty(&self, slot: &mut Slot, bounce: Bounce, copy: bool) -> Result<(), BounceError> {
        let copied = match copy {
            true => self.copy(slot, &bounce, 0, bounce.len(), SyncDirection::ForCpu),
            false => Ok(()),
        };
        if let Err(error) = &copied {
            let origin = bounce.origin();
            tracing::warn!(%error, %origin, "what a device wrote to a bounce buffer is lost");
        }
        self.pool.discard(bounce);
        copied
    }

    fn copy(
        &self,
        slot: &mut Slot,
        bounce: &Bounce,
        offset: u64,
        len: u64,
        direction: SyncDirection,
    ) -> Result<(), BounceError> {
        let memory = &*self.memory;
        Ok(Self::burst(slot, |burst| match direction {
            SyncDirection::ForCpu => self.pool.sync_for_cpu(bounce, offset, len, memory, burst),
            SyncDirection::ForDevice => self.pool.sync_for_device(bounce, offset, len, memory, burst),
        })??)
    }

    /// A buffer with the data of `len` bytes at `origin`, which lie in one IO page. Gives the IO page that the device has
    /// to be led to.
    pub(super) fn bring(&self, origin: PhysAddr, len: u64, granule: u64) -> Result<PhysAddr, BounceError> {
        Ok(self.pool.park(self.fill(origin, len, granule)?))
    }

    /// Gives the buffer at `page` back, which no device is led to any more.
    ///
    /// # Errors
    /// The copy's, if one was asked for. The buffer goes back all the same.
    pub(super) fn release(&self, page: PhysAddr, copy: bool) -> Result<(), BounceError> {
        // Before the buffer is taken: a sync under way is looking at it.
        let mut slot = self.slot.lock();
        self.pool.unpark(page).map_or(Ok(()), |bounce| self.empty(&mut slot, bounce, copy))
    }

    /// The memory that the byte at `phys`, `inside` bytes into its IO page, stands for.
    pub(super) fn origin_of(&self, phys: PhysAddr, inside: u64) -> Option<PhysAddr> {
        let page = PhysAddr(phys.0 - inside);
        self.pool.with_parked(page, |bounce| bounce.origin().offset(phys.0.wrapping_sub(bounce.phys().0)))
    }

    /// Copies what `[from, to)` of the IO page at `page` has in common with the buffer there.
    pub(super) fn sync(
        &self,
        page: PhysAddr,
        from: u64,
        to: u64,
        direction: SyncDirection,
    ) -> Result<(), BounceError> {
        let mut slot = self.slot.lock();
        let copied = self.pool.with_parked(page, |bounce| {
            let begins = bounce.phys().0 - page.0;
            let (from, to) = (from.max(begins), to.min(begins + bounce.len()));
            if from >= to {
                return Ok(());
            }
            self.copy(&mut slot, bounce, from - begins, to - from, direction)
        });
        copied.unwrap_or(Ok(()))
    }
}

/// Memory that bounces for a device that nothing translates for: its buffers, which go back when this is dropped, with
/// what the device wrote.
///
/// Source: `dma_direct_map_phys` and `dma_direct_unmap_phys` in kernel/dma/direct.h.
#[must_use = "the buffers go back when this is dropped"]
pub struct Bounced {
    device: Arc<DmaDevice>,
    /// In order; each but the last ends where a page of the memory does.
    buffers: Vec<Bounce>,
}

impl Bounced {
    /// Buffers for `len` bytes at `phys`, with the data in them. Each lies in its page as the memory does.
    ///
    /// # Errors
    /// See [`BounceError`]; nothing stays taken.
    pub fn new(device: &Arc<DmaDevice>, phys: PhysAddr, len: u64) -> Result<Self, BounceError> {
        let bouncer = device.bouncer().ok_or(BounceError::NoPool)?;
        let mut bounced = Self { device: Arc::clone(device), buffers: Vec::new() };
        let mut done = 0;
        while done < len {
            let at = phys.offset(done);
            let most = SEGMENT_SIZE - at.page_offset();
            let filled = match device.points().meet(points::BOUNCE).fails() {
                true => Err(BounceError::Held),
                false => bouncer.fill(at, most.min(len - done), PAGE_SIZE),
            };
            match filled {
                Ok(buffer) => bounced.buffers.push(buffer),
                Err(error) => {
                    bounced.discard();
                    return Err(error);
                }
            }
            done += most.min(len - done);
        }
        Ok(bounced)
    }

    /// What the device puts on the bus, and bytes from there on, in order.
    pub fn pieces(&self) -> impl Iterator<Item = (DmaAddr, u64)> {
        self.buffers.iter().map(|buffer| (buffer.phys().to_dma_identity(), buffer.len()))
    }

    /// Copies what `[offset, offset + len)` has in common with the memory.
    ///
    /// # Errors
    /// See [`BounceError`]; a part may have been copied.
    pub fn sync(&self, offset: u64, len: u64, direction: SyncDirection) -> Result<(), BounceError> {
        let end = offset.saturating_add(len);
        let mut begins = 0;
        for buffer in &self.buffers {
            let (from, to) = (offset.max(begins), end.min(begins + buffer.len()));
            if from < to {
                let bouncer = self.bouncer();
                bouncer.copy(&mut bouncer.slot.lock(), buffer, from - begins, to - from, direction)?;
            }
            begins += buffer.len();
        }
        Ok(())
    }

    /// Gives the buffers back without copying: the device only read, or the memory is gone (`DMA_ATTR_SKIP_CPU_SYNC`).
    pub fn discard(mut self) {
        self.give_back(false);
    }

    fn bouncer(&self) -> &Bouncer {
        self.device.bouncer().expect("buffers come from a device that bounces")
    }

    fn give_back(&mut self, mut copy: bool) {
        for buffer in std::mem::take(&mut self.buffers) {
            let bouncer = self.bouncer();
            // Waiting once is enough: whoever holds DMA up is changing the memory.
            copy &= bouncer.empty(&mut bouncer.slot.lock(), buffer, copy) != Err(BounceError::Held);
        }
    }
}

impl Drop for Bounced {
    fn drop(&mut self) {
        self.give_back(true);
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
