//! The differences that are known, each a row of the tables of docs/conformance.md and docs/rxe.md, and when they apply.

use crate::play::{Outcome, Player};
use crate::program::{KeyOf, Operation, Place, Side, Step};
use hw_model::addr::PAGE_SIZE;
use mr::Mode;

/// A difference that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Known {
    pub what: &'static str,
    /// Whether memory differs from then on, so that nothing can be compared any more.
    pub ends: bool,
}

const PINS: Known =
    Known { what: "model: pinned, pages that went: the device uses those that are there now", ends: true };
const FLUSHED: Known =
    Known { what: "rxe0: a write with a bad local key, or past the local end: flush error", ends: false };
const FLUSHED_LATE: Known =
    Known { what: "rxe0: the same, of several packets: those before the end are there", ends: true };
const EITHER_END: Known =
    Known { what: "rxe0: the same, and the peer refuses what was sent: either comes first", ends: false };
const MISPLACED: Known = Known {
    what: "rxe0: on demand, a request that begins inside a page: bytes are not where they should be",
    ends: true,
};
const UNPOSTED: Known = Known { what: "rxe0: an atomic that is not aligned: not posted", ends: false };
const IN_PART: Known = Known {
    what: "either: a request over several packets or pages that was refused: those before are there",
    ends: true,
};
const BOTH_ENDS: Known = Known {
    what: "rxe0: a write that neither end allows: its own page comes first there, and the peer's right in the model",
    ends: false,
};

/// Why `step` may end differently on the model and on rdma_rxe. `model` has carried it out.
pub fn of(step: &Step, model: &Player<'_>, [ours, theirs]: [&Outcome; 2]) -> Option<Known> {
    let (Step::Ask { operation, from, to, len } | Step::AskMany { operation, from, to, len, .. }) = step
    else {
        return None;
    };
    let places = [(Side::Asking, *from), (Side::Peer, *to)];
    let held = |(side, place): (Side, Place)| model.held(side, place.slot);
    let bad_local = ours.said.contains("LocalProtectionError") && theirs.said.contains("FlushError");
    if bad_local && matches!(operation, Operation::Write | Operation::Send) {
        return Some(if ours.bytes == theirs.bytes { FLUSHED } else { FLUSHED_LATE });
    }
    let atomic = matches!(operation, Operation::FetchAdd | Operation::CompareSwap);
    if atomic && theirs.said == "not posted" && !model.is_aligned(Side::Peer, *to) {
        return Some(UNPOSTED);
    }
    // From the page that a place begins in.
    let pages = |(side, place): (Side, Place)| {
        let inside = model.in_memory(side, place).unwrap_or(0).rem_euclid(PAGE_SIZE as i64) as u64;
        (inside + *len).div_ceil(PAGE_SIZE)
    };
    if ours.said == theirs.said
        && !ours.said.starts_with("[Success")
        && places.into_iter().any(|at| pages(at) > 1)
    {
        return Some(IN_PART);
    }
    let both_ends = ours.said.starts_with("[RemoteAccessError") && theirs.said.starts_with("[FlushError");
    let goes = held(places[0]).is_some_and(|region| region.mode == Mode::OnDemand && region.changed);
    if both_ends && *operation == Operation::Write && goes && ours.bytes == theirs.bytes {
        return Some(BOTH_ENDS);
    }
    let refused_first =
        ours.said.contains("LocalProtectionError") && theirs.said.contains("RemoteAccessError");
    if refused_first && *operation == Operation::Write && *len > PAGE_SIZE && ours.bytes == theirs.bytes {
        return Some(EITHER_END);
    }
    let any = |is: &dyn Fn(&crate::play::Held, i64) -> bool| {
        places.into_iter().any(|at| {
            at.1.key == KeyOf::Region
                && held(at).is_some_and(|region| is(region, model.in_memory(at.0, at.1).unwrap_or(0)))
        })
    };
    if any(&|region, _| region.mode == Mode::Pinned && region.changed) {
        return Some(PINS);
    }
    let inside = any(&|region, at| region.mode == Mode::OnDemand && at.rem_euclid(PAGE_SIZE as i64) != 0);
    (inside && *len > 0).then_some(MISPLACED)
}
