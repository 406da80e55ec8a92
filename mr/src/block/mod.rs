//! Block requests: bvecs of any memory become what an NVMe controller reads, through the same DMA layer as regions.
//!
//! ```text
//! bvecs (system memory, peers' BARs) -> Batch: one mapping, one sync -> DMA ranges -> PRP entries, or an SGL
//! ```
//!
//! [`prp`] and [`sgl`] are pure: ranges and the addresses of list memory go in, words to be written there come out. The
//! kernel has the same two builders in drivers/nvme/host/pci.c (`nvme_pci_setup_data_prp`, `nvme_pci_setup_data_sgl`),
//! over the iterator of block/blk-mq-dma.c and without a scatterlist.

pub mod prp;
mod request;
pub mod sgl;

pub use request::{BlockRequest, Bvec};
