//! Taking a region down. It always succeeds, in bounded time, whatever is outstanding.
//!
//! The key is gone before this begins, so no new burst finds the list. Then as in an invalidation: hide, drain, unlink.
//! Only then does the region stop listening, and only then is its IOVA given back (invariants 2 and 5).

use super::register::Mapped;
use hw_model::bus::Drain;
use hw_model::sync::thread;
use std::time::Duration;

/// A region on its way down. Poll it to the end; dropping it waits.
pub struct Teardown {
    mapped: Option<Mapped>,
    drain: Drain,
}

impl Teardown {
    /// Hides every page from the device. Faults that are being handled publish nothing from here on.
    pub(crate) fn begin(mapped: Mapped) -> Self {
        let core = &mapped.core;
        {
            let mut state = core.state.lock();
            state.closing = true;
            let span = 0..core.list.len();
            core.hide(&mut state, span);
        }
        let drain = core.space.memory().epoch().drain();
        Self { mapped: Some(mapped), drain }
    }

    /// Whether it is done. Never blocks.
    pub fn poll(&mut self) -> bool {
        let Some(mapped) = &self.mapped else { return true };
        let memory = mapped.core.space.memory();
        if !self.drain.poll(memory.epoch()) {
            return false;
        }
        let Mapped { core, interval, watch, pin } = self.mapped.take().expect("looked at above");
        {
            let mut state = core.state.lock();
            let span = 0..core.list.len();
            core.unlink_hidden(&mut state, span);
            debug_assert_eq!((state.present, state.linked), (0, 0));
        }
        drop(interval);
        drop(watch);
        drop(pin);
        if let Some(mapping) = &core.mapping {
            mapping
                .free()
                .expect("everything was unlinked above, and nothing links once the region is closing");
        }
        true
    }

    /// Polls to the end. Bursts are bounded, so this is soon.
    pub fn wait(mut self) {
        let mut spins = 0_u32;
        while !self.poll() {
            spins += 1;
            if spins < 100 && !cfg!(any(loom, shuttle)) {
                std::hint::spin_loop();
            } else {
                thread::sleep(Duration::from_micros(10));
            }
        }
    }
}

impl Drop for Teardown {
    fn drop(&mut self) {
        while !self.poll() {
            thread::yield_now();
        }
    }
}
