//! Where a device does otherwise than the specification has it, and who is right. docs/conformance.md is the same table.

use crate::rig::Kind;

pub struct Difference {
    pub of: Kind,
    /// The end of the names of the cases: after the operation and the mode, or with them.
    pub cases: &'static str,
    pub instead: &'static str,
    pub why: &'static str,
}

/// What is known of `case` on devices of `kind`.
pub fn of(kind: Kind, case: &str) -> Option<&'static Difference> {
    DIFFERENCES.iter().find(|known| known.of == kind && case.ends_with(known.cases))
}

const FOLLOWS: &str =
    "a process cannot hold a kernel's pin: the region follows its memory, and says so (mr::Mode::Pinned)";
const MISPLACED: &str = "rdma_rxe: __rxe_odp_mr_copy forgets where in its page a packet begins";
const BY_IOVA: &str =
    "rdma_rxe: rxe_odp_iova_to_index takes the peer's address for the memory's (IBTA 10.6.2.1)";
const FLUSHED: &str = "rdma_rxe flushes a write whose local key is bad (IBTA 11.6.2: local protection error)";

const fn model(cases: &'static str, instead: &'static str) -> Difference {
    Difference { of: Kind::Model, cases, instead, why: FOLLOWS }
}

const fn rxe(cases: &'static str, instead: &'static str, why: &'static str) -> Difference {
    Difference { of: Kind::Rxe, cases, instead, why }
}

pub const DIFFERENCES: &[Difference] = &[
    model("pinned, a page that was dropped", "Success, bytes moved"),
    model("pinned, a page with another in its place", "Success, bytes moved"),
    model("pinned, our own page that was dropped", "Success, bytes moved"),
    model("write, pinned, a page that may only be read", "RemoteAccessError, bytes as before"),
    model("pinned, a page that may not be touched", "RemoteAccessError, bytes as before"),
    rxe("write, pinned, a local key nobody has", "FlushError, bytes as before", FLUSHED),
    rxe("write, pinned, a local key of another domain", "FlushError, bytes as before", FLUSHED),
    rxe("write, pinned, a byte past the local end", "FlushError, bytes as before", FLUSHED),
    rxe("write, on demand, a local key nobody has", "FlushError, bytes as before", FLUSHED),
    rxe("write, on demand, a local key of another domain", "FlushError, bytes as before", FLUSHED),
    rxe("write, on demand, a byte past the local end", "FlushError, bytes as before", FLUSHED),
    rxe("on demand, an odd start", "Success, bytes as before", MISPLACED),
    rxe("on demand, an odd start across pages", "Success, other bytes", MISPLACED),
    rxe("on demand, an odd start, the last byte", "Success, bytes as before", MISPLACED),
    rxe("on demand, an address other than the memory's", "RemoteAccessError, bytes as before", BY_IOVA),
    rxe("on demand, counted from 0", "RemoteAccessError, bytes as before", BY_IOVA),
];
