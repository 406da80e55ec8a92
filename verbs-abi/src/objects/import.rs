//! Objects by the numbers of their handles, for programs that share them (ibv_import_device(3), ibv_import_pd(3),
//! ibv_import_mr(3), ibv_import_dm(3)): within one process, as a device here is a process's own.

use hw_model::hca::{DeviceMemory, Key};
use hw_model::sync::atomic::{AtomicU32, Ordering};
use hw_model::sync::{Arc, Mutex, Weak};
use mr::device::model::ModelPd;
use std::collections::{HashMap, HashSet};

/// The handles of one device.
#[derive(Default)]
pub(crate) struct Handles {
    last: AtomicU32,
    pds: Mutex<HashMap<u32, Weak<ModelPd>>>,
    memories: Mutex<HashMap<u32, Weak<DeviceMemory>>>,
    /// Those of regions are their keys.
    regions: Mutex<HashSet<u32>>,
}

impl Handles {
    fn insert<T>(&self, map: &Mutex<HashMap<u32, Weak<T>>>, object: &Arc<T>) -> u32 {
        let number = self.last.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let mut map = map.lock();
        map.retain(|_, known| known.strong_count() > 0);
        map.insert(number, Arc::downgrade(object));
        number
    }

    /// The handle of a new protection domain.
    pub(crate) fn insert_pd(&self, pd: &Arc<ModelPd>) -> u32 {
        self.insert(&self.pds, pd)
    }

    pub(crate) fn pd(&self, number: u32) -> Option<Arc<ModelPd>> {
        self.pds.lock().get(&number)?.upgrade()
    }

    /// The handle of new device memory.
    pub(crate) fn insert_memory(&self, memory: &Arc<DeviceMemory>) -> u32 {
        self.insert(&self.memories, memory)
    }

    pub(crate) fn memory(&self, number: u32) -> Option<Arc<DeviceMemory>> {
        self.memories.lock().get(&number)?.upgrade()
    }

    pub(super) fn insert_region(&self, key: Key) {
        self.regions.lock().insert(key.0);
    }

    pub(super) fn remove_region(&self, key: Key) {
        self.regions.lock().remove(&key.0);
    }

    pub(super) fn has_region(&self, key: Key) -> bool {
        self.regions.lock().contains(&key.0)
    }
}
