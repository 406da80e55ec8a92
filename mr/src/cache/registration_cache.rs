//! The cache itself: what is asked of it.

use super::config::{CacheConfig, CacheError, CacheStats};
use super::entry::Lease;
use super::front::Published;
use super::shelf::{Displaced, Shelf};
use crate::device::ProtectionDomain;
use hw_model::addr::VirtRange;
use hw_model::hca::Access;
use hw_model::sync::atomic::{AtomicU64, Ordering};
use hw_model::sync::{Arc, Mutex};
use odp::space::{AddressSpace, UserRange};
use std::fmt;

/// Regions of one protection domain over memory of one address space, kept for the next time. Shared by reference between
/// threads. Dropping it deregisters what nobody has a lease on; leases may outlive it.
pub struct Cache {
    pub(super) pd: Arc<dyn ProtectionDomain>,
    pub(super) space: Arc<dyn AddressSpace>,
    pub(super) config: CacheConfig,
    pub(super) published: Arc<Published>,
    /// Guards the list of entries. No callback takes it; nothing is registered, dropped or waited for under it.
    pub(super) shelf: Mutex<Shelf>,
    /// Entries that have ended, counted by their trackers.
    pub(super) ended: Arc<AtomicU64>,
    /// As many of them as there were when the shelf was last cleared of them.
    pub(super) cleared: AtomicU64,
}

impl Cache {
    /// An empty cache that registers in `pd` memory of `space`.
    #[must_use]
    pub fn new(pd: Arc<dyn ProtectionDomain>, space: Arc<dyn AddressSpace>, config: CacheConfig) -> Self {
        Self {
            pd,
            space,
            config,
            published: Published::new(),
            shelf: Mutex::new(Shelf::default()),
            ended: Arc::new(AtomicU64::new(0)),
            cleared: AtomicU64::new(0),
        }
    }

    /// A lease of all of `memory`, with at least the rights `access`.
    ///
    /// # Errors
    /// See [`CacheError`].
    pub fn get(&self, memory: &UserRange, access: Access) -> Result<Lease, CacheError> {
        self.get_part(memory, 0, memory.range().len(), access)
    }

    /// A lease of `len` bytes at `offset` of `memory`. The region may be wider, within `memory` and what it is merged with.
    ///
    /// # Errors
    /// See [`CacheError`].
    #[inline]
    pub fn get_part(
        &self,
        memory: &UserRange,
        offset: u64,
        len: u64,
        access: Access,
    ) -> Result<Lease, CacheError> {
        let wanted = self.checked(memory, offset, len)?;
        if let Some(entry) = self.published.find(wanted, access) {
            return Ok(Lease::new(entry, wanted.start(), len));
        }
        self.miss(memory, wanted, access)
    }

    fn checked(&self, memory: &UserRange, offset: u64, len: u64) -> Result<VirtRange, CacheError> {
        let range = memory.range();
        if !std::ptr::addr_eq(Arc::as_ptr(memory.space()), Arc::as_ptr(&self.space)) {
            return Err(CacheError::ForeignSpace { memory: range });
        }
        if len == 0 {
            return Err(CacheError::Empty);
        }
        let start = range.start().checked_add(offset);
        start
            .and_then(|start| VirtRange::new(start, len))
            .filter(|wanted| range.contains(*wanted))
            .ok_or(CacheError::OutOfRange { offset, len, memory: range })
    }

    /// Ends every entry that has a byte of `range`: no request that begins after this finds it. For changes that the address
    /// space does not hear of; on the rung poll, of every one. Regions are deregistered before this returns, or with their
    /// last lease. Gives how many entries there were.
    pub fn forget(&self, range: VirtRange) -> usize {
        let displaced = self.change(|shelf, displaced| {
            shelf.take(displaced, |kept| kept.memory.range().overlaps(range));
            for kept in displaced {
                kept.row.tracker.end();
            }
        });
        displaced.len()
    }

    /// Deregisters entries that have ended and are not leased. Every miss does this; for a cache that nobody asks any more.
    pub fn reap(&self) {
        let ended = self.ended.load(Ordering::Relaxed);
        if self.cleared.swap(ended, Ordering::Relaxed) != ended {
            drop(self.change(Shelf::take_ended));
        }
    }

    /// What it has done and what it holds.
    #[must_use]
    pub fn stats(&self) -> CacheStats {
        let shelf = self.shelf.lock();
        CacheStats {
            hits: self.published.hits(),
            misses: shelf.misses,
            entries: shelf.len() as u64,
            bytes: shelf.bytes(),
            merged: shelf.merged,
            evicted: shelf.evicted,
            ended: self.ended.load(Ordering::Relaxed),
            unkept: shelf.unkept,
        }
    }

    /// Changes the shelf, and publishes what is on it then if anything left it. What it gives is dropped by the caller.
    pub(super) fn change(&self, change: impl FnOnce(&mut Shelf, &mut Displaced)) -> Displaced {
        let mut displaced = Displaced::new();
        let mut shelf = self.shelf.lock();
        change(&mut shelf, &mut displaced);
        if !displaced.is_empty() {
            self.published.publish(shelf.table());
        }
        displaced
    }
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache").field("stats", &self.stats()).finish_non_exhaustive()
    }
}
