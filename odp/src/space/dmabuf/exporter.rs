//! What gives a buffer: the exporter's side, as `struct dma_buf_ops` (include/linux/dma-buf.h) without its scatterlist.

use crate::page::Backing;
use crate::space::Access;
use hw_model::addr::PhysAddr;
use hw_model::bus::{HostMemory, ProviderId};
use hw_model::sync::Arc;
use std::ops::Range;

/// Whoever has the memory. Pages are 4 KiB and counted from the start of the buffer.
///
/// Called with no lock of this crate held, from any thread. What [`Exporter::piece`] says of a page changes only inside a
/// [`Move`](super::Move) of that page: between the time that its `poll` said yes and its `finish`; or while a fence that
/// `finish` was given has not signalled.
pub trait Exporter: Send + Sync {
    /// Bytes of the buffer: whole pages, at least one. Never changes.
    fn size(&self) -> u64;

    /// The memory that its physical addresses belong to, or that the BARs stand beside.
    fn memory(&self) -> Arc<dyn HostMemory>;

    /// Where `page`, one of the buffer's, is now, with the pages behind it that continue it in every respect. Must not wait.
    fn piece(&self, page: u64) -> Piece;

    /// Whether importers may write.
    fn is_writable(&self) -> bool {
        true
    }

    /// Whether it may take the buffer back at any time. Importers that pin then have to let go on demand
    /// (`dma_buf_attach_revocable`; drivers/vfio/pci/vfio_pci_dmabuf.c is such an exporter).
    fn revokes(&self) -> bool {
        false
    }

    /// An importer is about to use `pages`: the map notice. Time to bring back what is elsewhere, or to begin a move of it.
    ///
    /// # Errors
    /// See [`MapRefusal`].
    fn map(&self, pages: Range<u64>, access: Access) -> Result<(), MapRefusal> {
        let _ = (pages, access);
        Ok(())
    }

    /// An importer has pinned `pages`. Until as many [`Exporter::unpinned`] have come, moves of them are refused.
    fn pinned(&self, pages: Range<u64>) {
        let _ = pages;
    }

    /// An importer has unpinned `pages`.
    fn unpinned(&self, pages: Range<u64>) {
        let _ = pages;
    }

    /// The buffer was withdrawn, every importer has unmapped it, and none is given any of it again: the memory may be used
    /// for something else.
    fn withdrawn(&self) {}
}

/// Pages of a buffer, contiguous and alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Physical address of the first.
    pub phys: PhysAddr,
    /// How many, at least 1; not past the end of the buffer.
    pub pages: u64,
    /// What they are made of: [`Backing::DmabufPeer`] or [`Backing::DmabufSystem`].
    pub backing: Backing,
    /// The BAR that holds them, if one does.
    pub provider: Option<ProviderId>,
}

/// Why an exporter does not give pages now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapRefusal {
    /// It has no memory to put the page in.
    #[error("the exporter has no memory for page {page}")]
    OutOfMemory {
        /// The page.
        page: u64,
    },
    /// It is on its way: ask again.
    #[error("page {page} is on its way")]
    Busy {
        /// The page.
        page: u64,
    },
    /// Its memory failed.
    #[error("the memory of page {page} failed")]
    Poisoned {
        /// The page.
        page: u64,
    },
}
