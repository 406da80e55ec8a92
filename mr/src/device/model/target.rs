//! What a key means to the fault handler: which memory lies behind an address, and in which region it is kept.

use crate::region::{Core, Mode, WINDOW};
use hw_model::addr::{RegionAddr, VirtRange};
use hw_model::hca::Pd;
use hw_model::sync::Arc;
use odp::notifier::Sequence;

/// What the fault handler needs of a region: enough to fault, not enough to keep it registered.
#[derive(Clone)]
pub(super) struct FaultTarget {
    pub(super) core: Arc<Core>,
    pub(super) sequence: Arc<Sequence>,
    pub(super) range: VirtRange,
    pub(super) address: RegionAddr,
    pub(super) pd: Pd,
}

/// Memory of one region, or of one part of it that has a page list of its own.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) core: Arc<Core>,
    pub(super) sequence: Arc<Sequence>,
    pub(super) range: VirtRange,
}

impl FaultTarget {
    /// The memory of the `length` bytes that requests call `address`; `None` if they are not all in the region.
    pub(super) fn memory_of(&self, address: RegionAddr, length: u64) -> Option<VirtRange> {
        let offset = address.0.checked_sub(self.address.0).filter(|offset| *offset <= self.range.len())?;
        (length <= self.range.len() - offset).then_some(())?;
        VirtRange::new(self.range.start().offset(offset), length)
    }

    /// The memory of the first of the `length` bytes that requests call `address`: as many as one fault brings in, cut off
    /// at the end of the region. A fault past the end has none.
    pub(super) fn faulted(&self, address: RegionAddr, length: u64) -> Option<VirtRange> {
        let offset = address.0.checked_sub(self.address.0).filter(|offset| *offset < self.range.len())?;
        let length = length.clamp(1, WINDOW).min(self.range.len() - offset);
        VirtRange::new(self.range.start().offset(offset), length)
    }

    /// The first part of `memory`, clipped to the region, that is kept in one place; with it what lies behind that.
    pub(super) fn place(&self, memory: VirtRange) -> Option<Place> {
        let range = memory.intersection(self.range)?;
        Some(Place { core: Arc::clone(&self.core), sequence: Arc::clone(&self.sequence), range })
    }

    pub(super) fn is_on_demand(&self) -> bool {
        self.core.mode == Mode::OnDemand
    }

    pub(super) fn is_writable(&self) -> bool {
        self.core.writable
    }
}
