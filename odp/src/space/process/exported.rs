//! A file of shared memory as a DMABUF: a memfd, or a DMABUF of the kernel (udmabuf, a heap of /dev/dma_heap, a driver).
//!
//! The file is mapped, and the mapping's pages have physical addresses of their own, as those of
//! [`OwnedMemory`](super::OwnedMemory) have. They never move: whoever exports a real DMABUF to user space keeps its mapping
//! whole. On x86, where DMA is coherent with the CPU, no DMA_BUF_IOCTL_SYNC is needed around copies.

use super::ProcessSpace;
use super::view::View;
use crate::page::Backing;
use crate::space::dmabuf::{Dmabuf, Exporter, Piece};
use hw_model::addr::{PAGE_SIZE, PhysAddr, page_bytes};
use hw_model::bus::HostMemory;
use hw_model::fault_plan::Points;
use hw_model::sync::Arc;
use rustix::fd::AsFd;
use rustix::fs::{SealFlags, SeekFrom};
use rustix::io::Errno;

/// The exporter of a file's memory.
#[derive(Debug)]
pub struct FileExport {
    space: Arc<ProcessSpace>,
    base: PhysAddr,
    pages: u64,
}

/// Why a file cannot be exported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FileExportError {
    /// A buffer has at least one page, and only whole ones.
    #[error("a file of {bytes} bytes does not consist of whole pages")]
    NotWholePages {
        /// Bytes of the file.
        bytes: u64,
    },
    /// Somebody could cut it short under a device. A memfd is sealed against that with F_SEAL_SHRINK, as udmabuf wants it too
    /// (drivers/dma-buf/udmabuf.c); a DMABUF cannot be.
    #[error("the file may shrink: seal it with F_SEAL_SHRINK")]
    MayShrink,
    /// The kernel does not say how long it is, or does not map it shared, to be read and written.
    #[error("the file cannot be mapped to be shared: {reason}")]
    NotMappable {
        /// What the kernel said.
        reason: Errno,
    },
}

impl FileExport {
    /// A buffer of all of `file`. The file's memory stays in use while the buffer does.
    ///
    /// # Errors
    /// See [`FileExportError`].
    pub fn export(
        space: &Arc<ProcessSpace>,
        file: impl AsFd,
        points: Points,
    ) -> Result<Arc<Dmabuf>, FileExportError> {
        let refused = |reason| FileExportError::NotMappable { reason };
        // A DMABUF answers to a seek to its end with its length, and to no fstat (drivers/dma-buf/dma-buf.c).
        let bytes = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(refused)?;
        if bytes == 0 || !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(FileExportError::NotWholePages { bytes });
        }
        // Asked after the length, which is the final one if the file is sealed.
        if !is_dmabuf(&file).map_err(refused)? && !is_sealed(&file) {
            return Err(FileExportError::MayShrink);
        }
        let view = Arc::new(View::of_file(&file, bytes).map_err(refused)?);
        let base = space.memory.add_window(view);
        let exporter = Arc::new(Self { space: Arc::clone(space), base, pages: bytes / PAGE_SIZE });
        Ok(Dmabuf::own(exporter, points))
    }
}

/// Of the file system that DMABUFs are files of (include/uapi/linux/magic.h, DMA_BUF_MAGIC).
const DMA_BUF_MAGIC: i64 = 0x444d_4142;

fn is_dmabuf(file: impl AsFd) -> Result<bool, Errno> {
    Ok(rustix::fs::fstatfs(file)?.f_type == DMA_BUF_MAGIC)
}

fn is_sealed(file: impl AsFd) -> bool {
    rustix::fs::fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
}

impl Exporter for FileExport {
    fn size(&self) -> u64 {
        page_bytes(self.pages)
    }
    fn memory(&self) -> Arc<dyn HostMemory> {
        Arc::clone(&self.space.memory) as Arc<dyn HostMemory>
    }
    fn piece(&self, page: u64) -> Piece {
        let phys = self.base.offset(page_bytes(page));
        Piece { phys, pages: self.pages - page, backing: Backing::DmabufSystem, provider: None }
    }
}

impl Drop for FileExport {
    fn drop(&mut self) {
        // Whoever had pages of it held the buffer, and the buffer this.
        self.space.memory.remove_window(self.base);
    }
}
