//! The memory behind a modelled BAR that the CPU maps as well.

use super::copy::{Copier, Short};
use super::owned::OwnedError;
use super::space::ProcessSpace;
use super::view::{self, View};
use hw_model::addr::{PAGE_SIZE, VirtAddr};
use hw_model::bus::{AtomicOp, BarStorage, StorageError};
use hw_model::sync::Arc;
use rustix::fd::OwnedFd;

/// Device memory in a file of its own, so that a [`DmabufMapping`](super::DmabufMapping) can put pages of it where the
/// CPU reaches them. Zeroed at first; what is never written takes no memory.
#[derive(Debug)]
pub struct BarMemory {
    file: OwnedFd,
    view: View,
    copier: Copier,
}

impl BarMemory {
    /// `bytes` bytes, in whole pages.
    ///
    /// # Errors
    /// [`OwnedError::Empty`], [`OwnedError::OutOfMemory`].
    pub fn new(space: &ProcessSpace, bytes: u64) -> Result<Arc<Self>, OwnedError> {
        if bytes == 0 {
            return Err(OwnedError::Empty);
        }
        let refused = |reason| OwnedError::OutOfMemory { bytes, reason };
        let size = bytes.checked_next_multiple_of(PAGE_SIZE).ok_or(refused(rustix::io::Errno::NOMEM))?;
        let file = view::memory_file("anypage-bar", size, false).map_err(refused)?;
        let view = View::of_file(&file, size).map_err(refused)?;
        Ok(Arc::new(Self { file, view, copier: space.memory.copier() }))
    }

    pub(super) fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// Where `len` bytes at `offset` are mapped for devices.
    pub(super) fn place(&self, offset: u64, len: u64) -> Result<VirtAddr, StorageError> {
        let size = self.size();
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(StorageError::OutOfRange { offset: offset.max(size), size });
        }
        Ok(self.view.part(offset, len))
    }
}

impl BarStorage for BarMemory {
    fn size(&self) -> u64 {
        self.view.range().len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), StorageError> {
        let at = self.place(offset, out.len() as u64)?;
        self.copier.read(at, out).map_err(|short| vanished(offset, short))
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), StorageError> {
        let at = self.place(offset, data.len() as u64)?;
        self.copier.write(at, data).map_err(|short| vanished(offset, short))
    }

    fn atomic(&self, offset: u64, op: AtomicOp) -> Result<u64, StorageError> {
        if !offset.is_multiple_of(8) {
            return Err(StorageError::Misaligned { offset });
        }
        let at = self.place(offset, 8)?;
        self.copier.atomic(at, op).ok_or(StorageError::Vanished { offset })
    }
}

fn vanished(offset: u64, short: Short) -> StorageError {
    StorageError::Vanished { offset: offset + short.copied }
}
