//! What transfers of one device and protection domain share: the local key of the bus, and the pool of regions.

use super::context::RwContext;
use super::plan::{List, Piece, part, pieces};
use super::pool::{FastPool, PoolEmpty};
use crate::dma::batch::{Batch, BatchError};
use crate::dma::page_size::{DmaRange, ListPlan, PageSizeError, PageSizes};
use crate::dma::{DmaDevice, Extent};
use hw_model::addr::{DmaAddr, RegionAddr};
use hw_model::hca::{
    Access, Backing, CreateKeyError, Entry, FastKeySpec, FastMap, FastMemory, Hca, IndirectEntry,
    IndirectKeySpec, IndirectList, IndirectListError, IndirectTarget, Key, MapKeyError, OutOfMemory,
    PageList, Path, Pd,
};
use hw_model::sync::Arc;

/// How an endpoint makes work requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RwConfig {
    /// Scatter-gather entries of a work request, as many as the queue pairs have.
    pub max_sges: u32,
    /// Ranges up to which a transfer uses them as they are; more are registered (`rdma_rw_io_needs_mr`). 0 registers
    /// every transfer.
    pub direct_ranges: usize,
    /// Regions of the pool.
    pub regions: u32,
    /// Entries of a region's list.
    pub entries: u32,
    /// Whether regions take indirect lists (`IB_MR_TYPE_SG_GAPS`).
    pub gaps: bool,
    /// Page sizes of the device.
    pub page_sizes: PageSizes,
}

impl Default for RwConfig {
    fn default() -> Self {
        Self {
            max_sges: 4,
            direct_ranges: 16,
            regions: 16,
            entries: 256,
            gaps: true,
            page_sizes: PageSizes::X86,
        }
    }
}

/// Why a transfer was not prepared. Nothing of it stays: no mapping, no region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RwError {
    /// The memory could not be mapped.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// Too few regions. Try again when other transfers have ended.
    #[error(transparent)]
    Pool(#[from] PoolEmpty),
    /// No page list says the memory, and the device takes no gaps.
    #[error(transparent)]
    PageSize(#[from] PageSizeError),
    /// No indirect list says the memory.
    #[error(transparent)]
    Gaps(#[from] IndirectListError),
    /// No memory for a page list.
    #[error(transparent)]
    List(#[from] OutOfMemory),
    /// The device does not take the list.
    #[error(transparent)]
    Map(#[from] MapKeyError),
}

/// What transfers of one device and protection domain share.
pub struct RwEndpoint {
    hca: Arc<Hca>,
    dma: Arc<DmaDevice>,
    /// A local key for every address of the bus (`local_dma_lkey`, IBTA volume 1, 10.6.3.3). It allows no remote access.
    bus_key: Key,
    pool: Arc<FastPool>,
    config: RwConfig,
}

impl RwEndpoint {
    /// An endpoint for queue pairs of `pd` on `hca`, whose side of the DMA layer is `dma`.
    ///
    /// # Errors
    /// [`CreateKeyError`]; no key stays.
    pub fn new(
        hca: &Arc<Hca>,
        dma: &Arc<DmaDevice>,
        pd: Pd,
        config: RwConfig,
    ) -> Result<Arc<Self>, CreateKeyError> {
        let spec = FastKeySpec { pd, max_entries: config.entries };
        let pool = FastPool::new(hca, spec, config.regions)?;
        let bus = IndirectEntry { target: IndirectTarget::Dma(DmaAddr(0)), length: u64::MAX };
        let list = IndirectList::new(vec![bus]).expect("one entry of some bytes");
        let spec = IndirectKeySpec { pd, access: Access::LOCAL_WRITE, address: RegionAddr(0), list };
        let bus_key = hca.create_indirect_key(spec)?;
        Ok(Arc::new(Self { hca: Arc::clone(hca), dma: Arc::clone(dma), bus_key, pool, config }))
    }

    /// Prepares a transfer of `extents`, which follow each other without gaps, to or from a peer's memory.
    ///
    /// # Errors
    /// See [`RwError`].
    pub fn transfer<E>(self: &Arc<Self>, extents: E) -> Result<RwContext, RwError>
    where
        E: IntoIterator<Item = Extent, IntoIter: Clone>,
    {
        let batch = Batch::map(&self.dma, extents)?;
        if batch.ranges().len() <= self.config.direct_ranges {
            return Ok(RwContext::new(Arc::clone(self), batch, Vec::new()));
        }
        self.register(batch)
    }

    /// Prepares `extents`, which follow each other without gaps, for access by a peer.
    ///
    /// # Errors
    /// See [`RwError`].
    pub fn expose<E>(self: &Arc<Self>, extents: E) -> Result<RwContext, RwError>
    where
        E: IntoIterator<Item = Extent, IntoIter: Clone>,
    {
        self.register(Batch::map(&self.dma, extents)?)
    }

    /// Gives regions of the pool the memory of `batch`.
    fn register(self: &Arc<Self>, batch: Batch) -> Result<RwContext, RwError> {
        let ranges: Vec<DmaRange> = batch.dma_ranges().collect();
        let pieces = pieces(&ranges, &self.config)?;
        let keys = self.pool.take(pieces.len())?;
        for (key, piece) in keys.iter().zip(&pieces) {
            let memory = memory(piece, part(&ranges, piece.at, piece.len))?;
            self.hca.map_fast_key(key.name, FastMap { address: RegionAddr(piece.at), memory })?;
        }
        let regions = keys.into_iter().zip(pieces).collect();
        Ok(RwContext::new(Arc::clone(self), batch, regions))
    }

    /// Regions of the pool that are free at the moment.
    #[must_use]
    pub fn free_regions(&self) -> usize {
        self.pool.free()
    }

    pub(super) fn config(&self) -> &RwConfig {
        &self.config
    }
    pub(super) fn dma(&self) -> &DmaDevice {
        &self.dma
    }
    pub(super) fn bus_key(&self) -> Key {
        self.bus_key
    }
    pub(super) fn message_bytes(&self) -> u32 {
        self.hca.config().limits.message_bytes
    }
}

impl Drop for RwEndpoint {
    fn drop(&mut self) {
        let gone = self.hca.destroy_indirect_key(self.bus_key);
        debug_assert!(gone.is_ok(), "the key is the endpoint's own");
    }
}

/// The list of one region, over the ranges of its piece.
fn memory(piece: &Piece, ranges: impl Iterator<Item = DmaRange> + Clone) -> Result<FastMemory, RwError> {
    match &piece.list {
        List::Pages(plan) => Ok(pages(plan, ranges)?),
        List::Gaps(_) => {
            let entry =
                |range: DmaRange| IndirectEntry { target: IndirectTarget::Dma(range.dma), length: range.len };
            Ok(FastMemory::Gaps(IndirectList::new(ranges.map(entry).collect())?))
        }
    }
}

fn pages(plan: &ListPlan, ranges: impl Iterator<Item = DmaRange>) -> Result<FastMemory, OutOfMemory> {
    let pages = PageList::with_page_shift(plan.entries, plan.page_size.shift())?;
    for (index, dma) in (0..).zip(plan.pages(ranges)) {
        // Paths and links are the batch's; this list is for the device alone.
        pages.store(index, Entry::present(dma, Path::Direct, Backing::Anonymous, true));
    }
    Ok(FastMemory::Pages { pages: Arc::new(pages), first_page_offset: plan.offset, length: plan.len })
}
