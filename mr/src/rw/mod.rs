//! RDMA reads and writes for users as those in a kernel: bvecs to or from a peer, without a region of their own.
//!
//! ```text
//!                      +-- few ranges: work requests on them, by the local key of the whole bus
//! bvecs -> Batch ------+
//!   (one sync)         +-- many, or memory for the peer: regions of a pool (register ... invalidate)
//!                              |-- one page list, if pages of one size fit
//!                              |-- an indirect list, if the device takes gaps
//!                              +-- several regions otherwise
//! ```
//!
//! As drivers/infiniband/core/rw.c. Behind an IOMMU bvecs of whole pages are one range, however scattered they are: one
//! work request, no region. A device that nothing translates for sees every piece: there work requests, or the regions of
//! the pool, are used up, and an empty pool is an error with its numbers in it. [`RwCost`] says what a transfer costs.

mod context;
mod endpoint;
mod plan;
mod pool;

pub use context::{RwContext, RwCost, RwPostError, Way};
pub use endpoint::{RwConfig, RwEndpoint, RwError};
pub use pool::PoolEmpty;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
