//! Address handles, memory windows, device memory: objects that are little more than a handle of the model's.

use super::{Context, Pd};
use crate::abi::number::*;
use crate::errno::Errno;
use hw_model::hca::{AddressHandle, AddressVector, DeviceMemory, Key, WindowKind, WindowSpec};
use hw_model::sync::Arc;
use std::ffi::c_int;

/// An address handle.
pub(crate) struct Ah {
    pub(crate) handle: Arc<AddressHandle>,
    _pd: Arc<Pd>,
}

impl Ah {
    pub(crate) fn new(pd: &Arc<Pd>, vector: AddressVector) -> Result<Self, Errno> {
        let handle = pd.context.device.hca().create_ah(pd.domain.handle(), vector)?;
        Ok(Self { handle, _pd: Arc::clone(pd) })
    }
}

/// A memory window.
pub(crate) struct Mw {
    /// Its key when it was made: the lowest byte changes with each binding.
    pub(crate) key: Key,
    pd: Arc<Pd>,
}

impl Mw {
    pub(crate) fn new(pd: &Arc<Pd>, kind: c_int) -> Result<Self, Errno> {
        let kind = match kind {
            IBV_MW_TYPE_1 => WindowKind::One,
            IBV_MW_TYPE_2 => WindowKind::TwoB,
            _ => return Err(Errno::INVAL),
        };
        let key = pd.context.device.hca().alloc_window(WindowSpec { pd: pd.domain.handle(), kind })?;
        Ok(Self { key, pd: Arc::clone(pd) })
    }
}

impl Drop for Mw {
    fn drop(&mut self) {
        let known = self.pd.context.device.hca().dealloc_window(self.key);
        debug_assert!(known.is_ok(), "a window is given back once");
    }
}

/// Device memory.
pub(crate) struct Dm {
    pub(crate) memory: Arc<DeviceMemory>,
    _context: Arc<Context>,
}

impl Dm {
    pub(crate) fn new(context: &Arc<Context>, length: u64, align_shift: u32) -> Result<Self, Errno> {
        let memory = context.device.hca().alloc_device_memory(length, align_shift)?;
        Ok(Self { memory, _context: Arc::clone(context) })
    }

    /// That of a handle, once more.
    pub(crate) fn import(context: &Arc<Context>, handle: u32) -> Result<Self, Errno> {
        let memory = context.event_faces().handles.memory(handle).ok_or(Errno::NOENT)?;
        Ok(Self { memory, _context: Arc::clone(context) })
    }
}
