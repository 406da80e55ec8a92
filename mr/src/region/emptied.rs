//! How a part of a region that has become empty is made known, from inside an invalidation: nothing is locked, allocated or
//! waited for.

use crossbeam::sync::Unparker;
use hw_model::sync::atomic::{AtomicBool, Ordering};

/// Says that some part is empty, and wakes who takes such parts away.
pub(crate) struct Emptied {
    some: AtomicBool,
    bell: Unparker,
}

impl Emptied {
    pub(crate) fn new(bell: Unparker) -> Self {
        Self { some: AtomicBool::new(false), bell }
    }

    /// A part may be empty.
    pub(crate) fn ring(&self) {
        if !self.some.swap(true, Ordering::AcqRel) {
            self.bell.unpark();
        }
    }

    /// Whether there may be an empty part. The next answer is no, unless another has become so.
    pub(crate) fn take(&self) -> bool {
        self.some.load(Ordering::Acquire) && self.some.swap(false, Ordering::AcqRel)
    }
}
