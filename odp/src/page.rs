//! What a walk of an address space reports.

pub use hw_model::hca::Backing;

use hw_model::addr::{PAGE_SIZE, PhysAddr, VirtAddr, VirtRange, page_bytes};
use hw_model::bus::ProviderId;

/// A run of present pages, contiguous in virtual and physical addresses and alike in everything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// First page.
    pub start: VirtAddr,
    /// Number of 4 KiB pages, at least 1.
    pub pages: u64,
    /// Physical address of the first page.
    pub phys: PhysAddr,
    /// What the pages are made of.
    pub backing: Backing,
    /// Whether a device may write them now without another fault.
    pub writable: bool,
    /// log2 of the size of the CPU mapping that holds these pages: 12, 21 or 30.
    pub order_shift: u8,
    /// The BAR that holds the pages, for [`Backing::DmabufPeer`] and device memory that peers can reach.
    pub provider: Option<ProviderId>,
}

impl PageRun {
    /// The virtual addresses of the run.
    ///
    /// # Panics
    /// If the run passes the top of the address space: no walk reports that.
    #[must_use]
    pub fn range(&self) -> VirtRange {
        VirtRange::new(self.start, page_bytes(self.pages)).expect("runs lie in the address space")
    }

    /// Appends `run` to `runs`, joined with the last run where it continues it in every respect.
    pub fn push(runs: &mut Vec<Self>, run: Self) {
        if let Some(last) = runs.last_mut() {
            let alike = last.backing == run.backing
                && last.writable == run.writable
                && last.order_shift == run.order_shift
                && last.provider == run.provider;
            let follows = last.start.0 + last.pages * PAGE_SIZE == run.start.0
                && last.phys.0.wrapping_add(last.pages * PAGE_SIZE) == run.phys.0;
            if alike && follows {
                last.pages += run.pages;
                return;
            }
        }
        runs.push(run);
    }
}
