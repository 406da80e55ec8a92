//! A block request: bvecs, mapped for a controller as one.

use crate::dma::batch::{Batch, BatchError, MappedRange};
use crate::dma::{DmaDevice, Extent};
use hw_model::addr::PhysAddr;
use hw_model::bus::ProviderId;
use hw_model::hca::Backing;
use hw_model::sync::Arc;

use super::prp::{ControllerPage, PrpError, PrpPlan};
use super::sgl::{SglError, SglPlan};

/// Physically contiguous memory of a request (`struct bio_vec`): what of which page, and whose page it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bvec {
    /// Physical address of the first byte.
    pub phys: PhysAddr,
    /// Bytes.
    pub len: u64,
    /// What the memory is made of.
    pub backing: Backing,
    /// The BAR that holds it, if one does.
    pub provider: Option<ProviderId>,
}

impl Bvec {
    /// The extents of `bvecs`, which follow each other in the request. The device may write them all.
    pub fn extents(bvecs: &[Self]) -> impl Iterator<Item = Extent> + Clone {
        bvecs.iter().scan(0, |end, bvec| {
            let at = *end;
            *end += bvec.len;
            let Self { phys, len, backing, provider } = *bvec;
            Some(Extent { at, phys, len, backing, provider, writable: true })
        })
    }
}

/// A request that is mapped. Dropping it unmaps it: the controller must be done with it.
pub struct BlockRequest {
    batch: Batch,
}

impl BlockRequest {
    /// Maps `bvecs` for `device` as one.
    ///
    /// # Errors
    /// See [`BatchError`]; nothing stays mapped.
    pub fn map(device: &Arc<DmaDevice>, bvecs: &[Bvec]) -> Result<Self, BatchError> {
        Ok(Self { batch: Batch::map(device, Bvec::extents(bvecs))? })
    }

    /// What the controller may use, in order.
    #[must_use]
    pub fn ranges(&self) -> &[MappedRange] {
        self.batch.ranges()
    }

    /// Bytes of the request.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.batch.bytes()
    }

    /// Bytes of IOVA reserved for it.
    #[must_use]
    pub fn reserved(&self) -> u64 {
        self.batch.reserved()
    }

    /// Its PRP entries, for a controller with pages of `page` and data of at most `max_bytes` a command (MDTS).
    ///
    /// # Errors
    /// See [`PrpError`]. What PRP entries cannot say, an SGL can.
    pub fn prp(&self, page: ControllerPage, max_bytes: u64) -> Result<PrpPlan, PrpError> {
        PrpPlan::new(self.batch.dma_ranges(), page, max_bytes)
    }

    /// Its SGL, for a controller that takes data of at most `max_bytes` a command (MDTS).
    ///
    /// # Errors
    /// See [`SglError`].
    pub fn sgl(&self, max_bytes: u64) -> Result<SglPlan, SglError> {
        SglPlan::new(self.batch.dma_ranges(), max_bytes)
    }
}
