//! Memory that a cached region does not keep.
//!
//! Unsafe island. Invariant: what is handed out here is registered by the cache alone, in a region whose tracker is told
//! before the memory goes with its owner, and seals it then.
#![allow(unsafe_code)]

use super::shelf::Owner;
use crate::device::ProtectionDomain;
use hw_model::sync::Arc;
use odp::space::{Rung, UserRange};

/// The range as the cache registers it, and the owner that the tracker has to watch. An owner must be free to drop memory
/// that a cache happens to know; but only where it is told of in time may the region be without one.
pub(super) fn unkept(memory: &UserRange, pd: &dyn ProtectionDomain) -> (UserRange, Owner) {
    let Some(owner) = memory.owner().filter(|_| pd.seals()) else { return (memory.clone(), None) };
    match memory.space().rung(memory.range()) {
        Rung::Exact | Rung::Owned => {
            // SAFETY: on these rungs every change of the memory is bracketed, so the tracker's `unlink` runs after the last
            // reference to the owner is gone and before the memory is, and seals the region then, leased or not.
            let memory = unsafe { memory.without_owner() };
            (memory, Some(Arc::downgrade(owner)))
        }
        Rung::Events | Rung::Poll => (memory.clone(), None),
    }
}
