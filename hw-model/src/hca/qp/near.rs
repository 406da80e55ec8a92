//! Where the two ends of a connection lie in memory, when both are in this process: who posts asks for all of it at once, and
//! finds it in the cache where it would have missed it line after line. Hints: an end that is gone is nowhere to be read.

use super::core::Core;
use super::queue::Shared;
use crate::prefetch::{self, Place};
use crate::sync::atomic::{AtomicUsize, Ordering};

/// The places of a queue pair and of its peer.
pub(super) struct Near {
    core: Place,
    peer: [AtomicUsize; 2],
}

impl Near {
    pub(super) fn new(core: &Core) -> Self {
        Self { core: Place::of(core), peer: [const { 0 }; 2].map(AtomicUsize::new) }
    }

    /// The queue pair was connected.
    pub(super) fn meet(&self, peer: [usize; 2]) {
        for (place, address) in self.peer.iter().zip(peer) {
            place.store(address, Ordering::Relaxed);
        }
    }

    /// The queue pair is about to work.
    #[inline]
    pub(super) fn expect(&self, shared: &Shared) {
        prefetch::expect(shared);
        self.core.expect();
        let [core, shared] = [0, 1].map(|end: usize| self.peer[end].load(Ordering::Relaxed));
        if core != 0 {
            Place::at(core, size_of::<Core>()).expect();
            Place::at(shared, size_of::<Shared>()).expect();
        }
    }
}

impl Core {
    /// Where it and what it shares with posting threads lie.
    pub(in crate::hca) fn whereabouts(&self) -> [usize; 2] {
        [Place::of(self).address(), Place::of(&*self.shared).address()]
    }
}
