//! The shared tracker of path boundaries: whatever the user has becomes ranges of one path each.
//!
//! Nothing else in the workspace finds path boundaries. It holds no state a page and allocates nothing, so it can run
//! under the locks that invalidations take.

use super::device::{DmaDevice, Way};
use super::extent::Extent;
use super::route::Refusal;
use hw_model::addr::{DmaAddr, PhysAddr};
use hw_model::bus::PeerRoutes;
use hw_model::hca::{Backing, Path};
use std::iter::Peekable;

/// Bytes that DMA reaches in one way, contiguous for the user, in memory and on the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Offset of the first byte in what is mapped.
    pub at: u64,
    /// Bytes, at least 1.
    pub len: u64,
    /// Physical address of the first byte.
    pub phys: PhysAddr,
    /// The way.
    pub path: Path,
    /// What the memory is made of.
    pub backing: Backing,
    /// Whether the device may write it.
    pub writable: bool,
    /// Bus address of the first byte, for paths that are not linked.
    bus: DmaAddr,
}

impl Segment {
    /// The `len` bytes of it from `at` of what is mapped on, which lie in the segment.
    #[must_use]
    pub fn part(&self, at: u64, len: u64) -> Self {
        let skipped = at - self.at;
        debug_assert!(skipped + len <= self.len, "part of a segment");
        Self { at, len, phys: self.phys.offset(skipped), bus: self.bus.offset(skipped), ..*self }
    }
    /// Physical address of the byte at `at` of what is mapped, which lies in the segment.
    #[must_use]
    pub fn phys_at(&self, at: u64) -> PhysAddr {
        self.phys.offset(at - self.at)
    }
    /// What the device puts on the bus for the byte at `at` of what is mapped, which lies in a segment whose path is not
    /// linked.
    #[must_use]
    pub fn unlinked_address(&self, at: u64) -> DmaAddr {
        self.bus.offset(at - self.at)
    }
}

/// The segments of a list of extents, in order. Extents that continue each other become one segment; one whose ends bounce
/// and whose middle does not becomes up to three, and one that is not linked is cut as the device's limits ask.
pub struct Segments<'a, I: Iterator<Item = Extent>> {
    device: &'a DmaDevice,
    extents: Peekable<I>,
    /// What is left of an extent whose first part was a segment of its own.
    rest: Option<Extent>,
    peers: PeerRoutes,
}

impl<'a, I: Iterator<Item = Extent>> Segments<'a, I> {
    /// The segments in which `device` reaches `extents`.
    #[must_use]
    pub fn new(device: &'a DmaDevice, extents: impl IntoIterator<IntoIter = I>) -> Self {
        let extents = extents.into_iter().peekable();
        Self { device, extents, rest: None, peers: PeerRoutes::default() }
    }

    /// The next extent, with all that continue it.
    fn whole(&mut self) -> Option<Extent> {
        let mut whole = self.extents.next()?;
        while let Some(next) = self.extents.next_if(|next| whole.continues_in(next)) {
            whole.len += next.len;
        }
        Some(whole)
    }
}

impl<I: Iterator<Item = Extent>> Iterator for Segments<'_, I> {
    /// A segment, or the offset in what is mapped from which on there is no way, and why.
    type Item = Result<Segment, (u64, Refusal)>;

    fn next(&mut self) -> Option<Self::Item> {
        let extent = self.rest.take().or_else(|| self.whole())?;
        let Extent { at, phys, backing, writable, .. } = extent;
        let Way { len, path, bus } = match self.device.route(&extent, &mut self.peers) {
            Ok(way) => way,
            Err(refusal) => return Some(Err((at, refusal))),
        };
        if len < extent.len {
            let (at, phys) = (at + len, phys.offset(len));
            self.rest = Some(Extent { at, phys, len: extent.len - len, ..extent });
        }
        Some(Ok(Segment { at, len, phys, path, backing, writable, bus }))
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
