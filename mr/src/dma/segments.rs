//! The shared tracker of path boundaries: whatever the user has becomes ranges of one path each.
//!
//! Nothing else in the workspace finds path boundaries. It holds no state a page and allocates nothing, so it can run
//! under the locks that invalidations take.

use super::device::DmaDevice;
use super::route::Refusal;
use hw_model::addr::{DmaAddr, PhysAddr, VirtAddr, page_bytes};
use hw_model::bus::PeerRoutes;
use hw_model::hca::{Backing, Path};
use odp::page::PageRun;

/// Pages that DMA reaches in one way, contiguous for the user and on the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First page.
    pub start: VirtAddr,
    /// Pages of 4 KiB.
    pub pages: u64,
    /// Physical address of the first page.
    pub phys: PhysAddr,
    /// The way.
    pub path: Path,
    /// What the pages are made of.
    pub backing: Backing,
    /// Whether the device may write them.
    pub writable: bool,
    /// Bus address of the first page, for paths that are not linked.
    bus: DmaAddr,
}

impl Segment {
    /// Physical address of the page at `at`, which lies in the segment.
    #[must_use]
    pub fn phys_at(&self, at: VirtAddr) -> PhysAddr {
        self.phys.offset(at.0 - self.start.0)
    }
    /// What the device puts on the bus for page `page` of a segment whose path is not linked.
    #[must_use]
    pub fn unlinked_address(&self, page: u64) -> DmaAddr {
        self.bus.offset(page_bytes(page))
    }
}

/// The segments of a list of runs, in order.
pub struct Segments<'a> {
    device: &'a DmaDevice,
    runs: std::slice::Iter<'a, PageRun>,
    peers: PeerRoutes,
}

impl<'a> Segments<'a> {
    /// The segments in which `device` reaches `runs`.
    #[must_use]
    pub fn new(device: &'a DmaDevice, runs: &'a [PageRun]) -> Self {
        Self { device, runs: runs.iter(), peers: PeerRoutes::default() }
    }
}

impl Iterator for Segments<'_> {
    /// A segment, or the address from which on there is no way and why.
    type Item = Result<Segment, (VirtAddr, Refusal)>;

    fn next(&mut self) -> Option<Self::Item> {
        let run = self.runs.next()?;
        let step = self.device.route(run, &mut self.peers).map(|(path, bus)| Segment {
            start: run.start,
            pages: run.pages,
            phys: run.phys,
            path,
            backing: run.backing,
            writable: run.writable,
            bus,
        });
        Some(step.map_err(|refusal| (run.start, refusal)))
    }
}
