//! Bounce buffers: memory that every device reaches, for data that lies where a device may not look.
//!
//! A page bounces when DMA to it directly is out of the question: the device is not trusted with what else lies in the
//! same IO page, its DMA mask does not reach the page, or the page is private memory of an encrypted guest. Then the
//! device is given slots of a pool instead, and software copies: to the slots before the device reads them
//! ([`BouncePool::sync_for_device`]), from the slots after the device wrote them ([`BouncePool::sync_for_cpu`]). One-sided
//! RDMA has no moment for either, which is why the policy `coherent` refuses such pages.
//!
//! Sources: kernel/dma/swiotlb.c (`swiotlb_tbl_map_single`, `swiotlb_bounce`, slots and segments),
//! drivers/iommu/dma-iommu.c (`iommu_dma_map_swiotlb`: alignment to the IO page, zeroed padding;
//! `iommu_dma_iova_link_swiotlb`: only head and tail bounce).

mod pool;
mod split;

pub use pool::{Bounce, BounceConfig, BounceError, BouncePool, BounceRequest, BounceStats};
pub use pool::{SEGMENT_SIZE, SLOT_SIZE};
pub use split::{Piece, Split};
