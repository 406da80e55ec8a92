//! Long-term pins: pages that stay where they are, whatever becomes of their mapping (FOLL_LONGTERM, mm/gup.c).

use super::fault::Touch;
use super::host::SimHost;
use super::kernel::{Holder, Kernel, Place, Pte};
use super::process::SimSpace;
use super::span::Span;
use crate::page::PageRun;
use crate::space::{Access, FaultError};
use hw_model::addr::{VirtAddr, VirtRange};
use hw_model::sync::Arc;

/// Pages that are held where they are until this is dropped. They are not migrated, swapped, merged or lent to a device's
/// memory; a fork gives the child copies; when they are unmapped they stay in use.
#[derive(Debug)]
#[must_use = "dropping it gives the pages free"]
pub struct SimPin {
    host: Arc<SimHost>,
    held: Vec<Place>,
    runs: Vec<PageRun>,
}

impl SimPin {
    /// Where the pages are, in the order of their addresses.
    #[must_use]
    pub fn runs(&self) -> &[PageRun] {
        &self.runs
    }
}

impl SimSpace {
    /// Brings every page of `range` (whole pages) into RAM, for writing, and holds it there. What is in a device's memory
    /// comes back first.
    ///
    /// # Errors
    /// As a fault for writing. [`FaultError::Permission`] also for a shared file, which has to know who writes it, and
    /// [`FaultError::Special`] for an exporter's buffer. Nothing is held then.
    pub fn pin(&self, range: VirtRange) -> Result<SimPin, FaultError> {
        let touch = Touch { access: Access::Write, viewer: None, pin: true };
        let mut pin = SimPin { host: Arc::clone(self.host()), held: Vec::new(), runs: Vec::new() };
        for page in Span::of(range).pages() {
            let hold = |kernel: &mut Kernel, pte: Pte| {
                let run = kernel.report(self.id(), page, None)?;
                kernel.hold(pte.place, Holder::Pin);
                Some((pte.place, run))
            };
            let held = self.host().with_page(self.id(), page, touch, hold)?;
            let (place, run) = held.ok_or(FaultError::Special { at: VirtAddr::from_page_number(page) })?;
            pin.held.push(place);
            PageRun::push(&mut pin.runs, run);
        }
        Ok(pin)
    }
}

impl Drop for SimPin {
    fn drop(&mut self) {
        let mut kernel = self.host.kernel.lock();
        for place in self.held.drain(..) {
            kernel.release(place, Holder::Pin);
        }
    }
}
