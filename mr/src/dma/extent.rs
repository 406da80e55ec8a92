//! What users hand to the DMA layer.

use hw_model::addr::{PhysAddr, VirtAddr, page_bytes};
use hw_model::bus::ProviderId;
use hw_model::hca::Backing;
use odp::page::PageRun;

/// Physically contiguous memory of one backing and one provider, and where it lies in what is mapped.
///
/// Page runs of a region, bvecs of a block request and ranges of a DMABUF each become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Offset of its first byte in what is mapped.
    pub at: u64,
    /// Physical address of its first byte.
    pub phys: PhysAddr,
    /// Bytes, at least 1.
    pub len: u64,
    /// What the memory is made of.
    pub backing: Backing,
    /// The BAR that holds it, for memory that peers can reach.
    pub provider: Option<ProviderId>,
    /// Whether the device may write it.
    pub writable: bool,
}

impl Extent {
    /// The extent of `run` in what is mapped from `base` on. The run does not lie before `base`.
    #[must_use]
    pub fn of_run(run: &PageRun, base: VirtAddr) -> Self {
        debug_assert!(run.start >= base, "a run before what is mapped");
        Self {
            at: run.start.0 - base.0,
            phys: run.phys,
            len: page_bytes(run.pages),
            backing: run.backing,
            provider: run.provider,
            writable: run.writable,
        }
    }

    /// Whether `next` goes on where this ends, for the user and in memory, and is alike in everything else.
    #[must_use]
    pub fn continues_in(&self, next: &Self) -> bool {
        self.at.checked_add(self.len) == Some(next.at)
            && self.phys.checked_add(self.len) == Some(next.phys)
            && (self.backing, self.provider, self.writable) == (next.backing, next.provider, next.writable)
    }
}
