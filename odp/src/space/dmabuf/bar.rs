//! An exporter of memory that stays in a BAR, as a driver that gives its device to user space has it.

use super::buffer::Dmabuf;
use super::exporter::{Exporter, Piece};
use crate::page::Backing;
use hw_model::addr::{PAGE_SIZE, PhysAddr, page_bytes};
use hw_model::bus::{Bar, HostMemory};
use hw_model::fault_plan::Points;
use hw_model::sync::Arc;

/// Whole pages of a BAR.
#[derive(Clone, Debug)]
pub struct BarPart {
    bar: Arc<Bar>,
    offset: u64,
    pages: u64,
}

/// Pages that are not in a BAR, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{bytes:#x} bytes at {offset:#x} are not whole pages of a BAR of {size:#x} bytes")]
pub struct OutsideBar {
    /// Where they begin in it, in bytes.
    pub offset: u64,
    /// Bytes asked for.
    pub bytes: u64,
    /// Bytes of the BAR.
    pub size: u64,
}

impl BarPart {
    /// `bytes` bytes of `bar` from `offset` on.
    ///
    /// # Errors
    /// [`OutsideBar`].
    pub fn new(bar: &Arc<Bar>, offset: u64, bytes: u64) -> Result<Self, OutsideBar> {
        let size = bar.size();
        let fits = offset.checked_add(bytes).is_some_and(|end| end <= size);
        if bytes == 0 || !fits || !(offset | bytes).is_multiple_of(PAGE_SIZE) {
            return Err(OutsideBar { offset, bytes, size });
        }
        Ok(Self { bar: Arc::clone(bar), offset, pages: bytes / PAGE_SIZE })
    }

    /// Pages of 4 KiB it has.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }
    /// The BAR.
    #[must_use]
    pub fn bar(&self) -> &Arc<Bar> {
        &self.bar
    }
    /// Where `page` is in the BAR, in bytes.
    pub(in crate::space) fn offset_of(&self, page: u64) -> u64 {
        self.offset + page_bytes(page)
    }
    /// Its pages from `page` on, `pages` of them.
    pub(super) fn piece(&self, page: u64, pages: u64) -> Piece {
        let phys: PhysAddr = self.bar.base().offset(self.offset_of(page));
        Piece { phys, pages, backing: Backing::DmabufPeer, provider: Some(self.bar.provider()) }
    }
}

/// The exporter: one contiguous piece, which it may revoke (drivers/vfio/pci/vfio_pci_dmabuf.c: when the device is reset or
/// its memory disabled).
pub struct BarExport {
    part: BarPart,
    memory: Arc<dyn HostMemory>,
    writable: bool,
}

impl BarExport {
    /// A buffer of `part`, on the host with this memory.
    #[must_use]
    pub fn export(part: BarPart, memory: Arc<dyn HostMemory>, points: Points) -> Arc<Dmabuf> {
        Dmabuf::own(Arc::new(Self { part, memory, writable: true }), points)
    }

    /// The same for reading only.
    #[must_use]
    pub fn export_read_only(part: BarPart, memory: Arc<dyn HostMemory>, points: Points) -> Arc<Dmabuf> {
        Dmabuf::own(Arc::new(Self { part, memory, writable: false }), points)
    }
}

impl Exporter for BarExport {
    fn size(&self) -> u64 {
        page_bytes(self.part.pages())
    }
    fn memory(&self) -> Arc<dyn HostMemory> {
        Arc::clone(&self.memory)
    }
    fn piece(&self, page: u64) -> Piece {
        self.part.piece(page, self.part.pages() - page)
    }
    fn is_writable(&self) -> bool {
        self.writable
    }
    fn revokes(&self) -> bool {
        true
    }
}
