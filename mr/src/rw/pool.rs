//! A pool of keys for fast registration (`ib_mr_pool_init` in drivers/infiniband/core/mr_pool.c).

use hw_model::hca::{CreateKeyError, FastKeySpec, Hca, Key};
use hw_model::sync::{Arc, Mutex};

/// Fewer regions are free than a transfer needs. None was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the memory needs {needed} regions, {free} of the pool's {size} are free")]
pub struct PoolEmpty {
    /// Regions needed.
    pub needed: usize,
    /// Regions free.
    pub free: usize,
    /// Regions of the pool.
    pub size: usize,
}

/// Keys for fast registration that are not in use.
pub(super) struct FastPool {
    hca: Arc<Hca>,
    spec: FastKeySpec,
    size: usize,
    free: Mutex<Vec<Key>>,
}

impl FastPool {
    /// # Errors
    /// [`CreateKeyError`]; no key stays.
    pub(super) fn new(hca: &Arc<Hca>, spec: FastKeySpec, size: u32) -> Result<Arc<Self>, CreateKeyError> {
        let size = size as usize;
        let pool = Self { hca: Arc::clone(hca), spec, size, free: Mutex::new(Vec::with_capacity(size)) };
        for _ in 0..size {
            let key = hca.create_fast_key(spec)?;
            pool.free.lock().push(key);
        }
        Ok(Arc::new(pool))
    }

    /// Takes `count` regions, or none.
    pub(super) fn take(self: &Arc<Self>, count: usize) -> Result<Vec<PooledKey>, PoolEmpty> {
        let mut free = self.free.lock();
        let Some(rest) = free.len().checked_sub(count) else {
            return Err(PoolEmpty { needed: count, free: free.len(), size: self.size });
        };
        let taken = free.drain(rest..);
        Ok(taken.map(|key| PooledKey { pool: Arc::clone(self), name: next(key), used: false }).collect())
    }

    /// Regions free at the moment.
    pub(super) fn free(&self) -> usize {
        self.free.lock().len()
    }
}

/// The same index with the next key byte, so that an earlier name reaches nothing (`ib_inc_rkey`).
fn next(key: Key) -> Key {
    Key(key.0 & !0xff | key.0.wrapping_add(1) & 0xff)
}

impl Drop for FastPool {
    fn drop(&mut self) {
        for key in self.free.lock().drain(..) {
            let gone = self.hca.destroy_fast_key(key);
            debug_assert!(gone.is_ok(), "the pool's keys are its own");
        }
    }
}

/// A region of the pool, in use. Dropping it gives it back.
pub(super) struct PooledKey {
    pool: Arc<FastPool>,
    /// What it is to be registered as.
    pub(super) name: Key,
    /// Requests for it were posted, and it is not known that they have ended well: it may be registered. Such a key is not
    /// used again but replaced.
    pub(super) used: bool,
}

impl Drop for PooledKey {
    fn drop(&mut self) {
        let pool = &self.pool;
        if !self.used {
            pool.free.lock().push(self.name);
            return;
        }
        let gone = pool.hca.destroy_fast_key(self.name);
        debug_assert!(gone.is_ok(), "the pool's keys are its own");
        match pool.hca.create_fast_key(pool.spec) {
            Ok(key) => pool.free.lock().push(key),
            Err(error) => tracing::error!(%error, "a pool of regions has one less"),
        }
    }
}
