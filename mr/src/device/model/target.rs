//! What a key means to the fault handler: which memory lies behind an address, and in which region it is kept.

use super::implicit::{ChildUse, Children};
use crate::device::{AdviseError, RegisterError};
use crate::region::counters::{Counters, add};
use crate::region::{Core, Mode, PublishError, WINDOW};
use hw_model::addr::{RegionAddr, VirtRange};
use hw_model::hca::Pd;
use hw_model::sync::Arc;
use odp::fault::{FaultFailure, Want};
use odp::notifier::Sequence;

/// What the fault handler needs of a region: enough to fault, not enough to keep it registered.
#[derive(Clone)]
pub(super) struct FaultTarget {
    pub(super) memory: Backed,
    pub(super) range: VirtRange,
    pub(super) address: RegionAddr,
    pub(super) pd: Pd,
}

/// Where the pages of a region are kept.
#[derive(Clone)]
pub(super) enum Backed {
    /// In one page list.
    Explicit(Arc<Core>, Arc<Sequence>),
    /// In the lists of its children.
    Implicit(Arc<Children>),
}

/// Memory of one region, or of one part of it that has a page list of its own.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) core: Arc<Core>,
    pub(super) sequence: Arc<Sequence>,
    pub(super) range: VirtRange,
    /// A child stays while it is used.
    pub(super) held: Option<ChildUse>,
}

impl FaultTarget {
    pub(super) fn implicit(children: &Arc<Children>, pd: Pd) -> Self {
        let (range, memory) = (children.range, Backed::Implicit(Arc::clone(children)));
        Self { memory, range, address: RegionAddr(range.start().0), pd }
    }

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

    /// The first part of `memory`, clipped to the region, that is kept in one place. `None` if none of it is in the region.
    ///
    /// # Errors
    /// Why an implicit region cannot have a child there.
    pub(super) fn place(&self, memory: VirtRange) -> Result<Option<Place>, RegisterError> {
        let Some(range) = memory.intersection(self.range).filter(|range| !range.is_empty()) else {
            return Ok(None);
        };
        Ok(Some(match &self.memory {
            Backed::Explicit(core, sequence) => {
                let (core, sequence) = (Arc::clone(core), Arc::clone(sequence));
                Place { core, sequence, range, held: None }
            }
            Backed::Implicit(children) => {
                let (core, sequence, range, held) = children.place(range)?;
                Place { core, sequence, range, held: Some(held) }
            }
        }))
    }

    /// The part of `within` that may be brought in because `pages`, which lie in it, were asked for: all of an explicit
    /// region, which somebody made of this memory; of an implicit one the mapping that they are in.
    pub(super) fn together(&self, pages: VirtRange, within: VirtRange) -> VirtRange {
        match &self.memory {
            Backed::Explicit(..) => within,
            Backed::Implicit(_) if within == pages => within,
            Backed::Implicit(children) => children.space.mapped_alike(pages, within),
        }
    }

    /// Brings `memory`, which lies in the region, in and waits for it.
    pub(super) fn bring(&self, memory: VirtRange, want: Want) -> Result<(), AdviseError> {
        let mut left = memory;
        while !left.is_empty() {
            let Some(place) = self.place(left)? else { return Ok(()) };
            let pages = place.range.page_aligned();
            let brought =
                place.core.bring(&place.sequence, pages, want).map_err(|failure| match failure {
                    FaultFailure::Publish(PublishError::Closing) => AdviseError::Deregistered,
                    failure => failure.into(),
                })?;
            add(&place.core.counters.page_prefetch, brought);
            let end = place.range.end();
            left = VirtRange::new(end, left.end().0 - end.0).expect("the rest of a range");
        }
        Ok(())
    }

    pub(super) fn counters(&self) -> &Counters {
        match &self.memory {
            Backed::Explicit(core, _) => &core.counters,
            Backed::Implicit(children) => &children.counters,
        }
    }

    pub(super) fn is_on_demand(&self) -> bool {
        match &self.memory {
            Backed::Explicit(core, _) => core.mode == Mode::OnDemand,
            Backed::Implicit(_) => true,
        }
    }

    pub(super) fn is_writable(&self) -> bool {
        match &self.memory {
            Backed::Explicit(core, _) => core.writable,
            Backed::Implicit(children) => children.writable,
        }
    }
}
