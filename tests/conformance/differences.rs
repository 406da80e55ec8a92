//! Where a device does otherwise than the specification has it, and who is right. docs/conformance.md is the same table.

use crate::rig::Kind;

pub struct Difference {
    pub of: Kind,
    /// The end of the names of the cases; `*` stands for anything.
    pub cases: &'static str,
    pub instead: &'static str,
    pub why: &'static str,
}

/// What is known of `case` on devices of `kind`.
pub fn of(kind: Kind, case: &str) -> Option<&'static Difference> {
    DIFFERENCES.iter().find(|known| known.of == kind && is_of(case, known.cases))
}

fn is_of(case: &str, pattern: &str) -> bool {
    let (before, end) = pattern.rsplit_once('*').unwrap_or(("", pattern));
    let Some(mut rest) = case.strip_suffix(end) else { return false };
    before.rsplit('*').all(|part| rest.rfind(part).map(|at| rest = &rest[..at]).is_some())
}

/// Why a case is left out on a device: it has no such thing, or the kernel under it dies.
pub fn left_out(kind: Kind, case: &str) -> Option<&'static str> {
    LEFT_OUT.iter().find(|(of, cases, _)| *of == kind && is_of(case, cases)).map(|(_, _, why)| *why)
}

const LEFT_OUT: &[(Kind, &str, &str)] = &[
    (Kind::Rxe, "add, on demand, an address other than the memory's", DEADLY),
    (Kind::Rxe, "swap, on demand, an address other than the memory's", DEADLY),
    (Kind::Rxe, "events, two completions for an event", "rdma_rxe has no moderation of events"),
];
const DEADLY: &str = "the kernel dies of it (rxe_odp.c, rxe_odp_map_range_and_lock)";

const FOLLOWS: &str =
    "a process cannot hold a kernel's pin: the region follows its memory, and says so (mr::Mode::Pinned)";
const MISPLACED: &str = "rdma_rxe: __rxe_odp_mr_copy forgets where in its page a packet begins";
const BY_IOVA: &str =
    "rdma_rxe: rxe_odp_iova_to_index takes the peer's address for the memory's (IBTA 10.6.2.1)";
const FLUSHED: &str = "rdma_rxe flushes a write whose local key is bad (IBTA 11.6.2: local protection error)";

const ENDS: &str = "rdma_rxe: copy errors of any kind are one (rxe_resp.c, send_data_in, RESPST_ERR_MALFORMED_WQE); IBTA \
                    9.9.3.1, 11.6.2: local protection error, or local length error and remote invalid request error";
const SENT_FLUSHED: &str =
    "rdma_rxe flushes a send whose local key is bad (IBTA 11.6.2: local protection error)";
const ACCESS: &str =
    "rdma_rxe gives both ends one status (rxe_resp.c, do_class_ac_error); IBTA 11.6.2: local access error";
const UNALIGNED: &str =
    "both refuse; rdma_rxe's library does not post it, the peer of the model says so (IBTA 9.4.5)";
const LONGER: &str = "rdma_rxe does not look at the length (IBTA 9.4.5, 11.2.5.1: an atomic moves 8 bytes)";
const UNSOLICITED: &str =
    "rxe_cq.c, rxe_cq_post, looks at the solicited bit alone (IBTA 11.4.2.2: a failure is an event)";
const LATE_LIMIT: &str =
    "rxe_resp.c, get_srq_wqe, asks only when a receive is taken (IBTA 11.2.3.4, 11.6.3.2)";
const BIND_FLUSHED: &str = "rdma_rxe flushes what is not allowed of windows (rxe_req.c, rxe_do_local_ops; IBTA 11.6.2: memory management error)";
const UNBOUNDED: &str =
    "rxe_resp.c, check_rkey, checks the bounds of the region (IBTA 10.6.7.2: those of the window)";
const NOT_ITS_OWN: &str = "rxe_mw.c, rxe_check_invalidate_mw, does not ask whose it is (IBTA 10.6.7.2)";
const UNTOLD: &str =
    "rdma_rxe marks the receive with the kernel's bit, which is another than the library's (IBTA 11.4.2.1)";
const EARLIER: &str =
    "both refuse (IBTA 10.6.7.2): the backend of real devices before it posts, the model where it binds";

const fn model(cases: &'static str, instead: &'static str) -> Difference {
    Difference { of: Kind::Model, cases, instead, why: FOLLOWS }
}

const fn rxe(cases: &'static str, instead: &'static str, why: &'static str) -> Difference {
    Difference { of: Kind::Rxe, cases, instead, why }
}

const MISFIT: &str = "RemoteOperationError; receive LocalQpOperationError, bytes as before";
const ODD_ROW: &str = "[(0, Success), (1, Success), (2, Success)], words otherwise";
const SEND_FLUSHED: &str = "FlushError; receive FlushError, bytes as before";
const PAGE_SENT: &str = "Success; Receive of 4096 bytes, bytes as sent";
const UNRECEIVED: &str = "RemoteOperationError; receive LocalProtectionError, bytes as before";

pub const DIFFERENCES: &[Difference] = &[
    model("send, pinned, into a page that was dropped", PAGE_SENT),
    model("send, pinned, *with another in its place", PAGE_SENT),
    model("send, pinned, our own page that was dropped", PAGE_SENT),
    model("send, pinned, into a page that may*", UNRECEIVED),
    model("pinned, a word of a page that was dropped", "Success, done"),
    model("pinned, a word of a page with another in its place", "Success, done"),
    model("pinned, into our own page that was dropped", "Success, done"),
    model("pinned, a word of a page that may*", "RemoteAccessError, words as before"),
    model("pinned, into our own page that may only be read", "LocalProtectionError, our words as before"),
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
    rxe("write, on demand, counted from 0", "RemoteAccessError, bytes as before", BY_IOVA),
    rxe("read, on demand, counted from 0", "RemoteAccessError, bytes as before", BY_IOVA),
    rxe("send, *, too long for *", MISFIT, ENDS),
    rxe(
        "send, *, too long by a packet",
        "RemoteOperationError; receive LocalQpOperationError, bytes as sent",
        ENDS,
    ),
    rxe("send, *, a local key *", SEND_FLUSHED, SENT_FLUSHED),
    rxe("send, *, a byte past the local end", SEND_FLUSHED, SENT_FLUSHED),
    rxe("send, *, a receive by a key *", MISFIT, ENDS),
    rxe("send, *, a receive past its region's end", MISFIT, ENDS),
    rxe("send, *, a receive in a region that may only be read", MISFIT, ENDS),
    rxe("send, on demand, into a page that may*", MISFIT, ENDS),
    rxe("send, on demand, inside pages", "Success; Receive of 333 bytes, other bytes", MISPLACED),
    rxe(
        "on demand, a list of three into a list of three",
        "Success; Receive of 9000 bytes, other bytes",
        MISPLACED,
    ),
    rxe(
        "with data, *, a remote key nobody has",
        "RemoteAccessError; receive RemoteAccessError, bytes as before",
        ACCESS,
    ),
    rxe(
        "with data, *, past the remote end",
        "RemoteAccessError; receive RemoteAccessError, bytes as before",
        ACCESS,
    ),
    rxe("into more than a word", "Success, done", LONGER),
    rxe("a byte from a word", "not posted", UNALIGNED),
    rxe("half a word from a word", "not posted", UNALIGNED),
    rxe("and *, across pages", "not posted", UNALIGNED),
    rxe("add, on demand, three in a row", ODD_ROW, MISPLACED),
    rxe("swap, on demand, three in a row", ODD_ROW, MISPLACED),
    rxe(
        "behind one that is too long",
        "RemoteOperationError, FlushError, LocalQpOperationError, FlushError",
        ENDS,
    ),
    rxe("on demand, into an odd place", "Success, other words", MISPLACED),
    rxe("armed for solicited ones and a failure", "RemoteAccessError, 0 events", UNSOLICITED),
    rxe("one that is too long", "RemoteOperationError and LocalQpOperationError 0, Success 1", ENDS),
    rxe("a limit that is reached when it is set", "not told", LATE_LIMIT),
    rxe("status, MemoryManagementError", "FlushError, Error and ReadyToSend", BIND_FLUSHED),
    rxe("status, LocalLengthError", "LocalQpOperationError, Error and Error", ENDS),
    rxe("status, LocalAccessError", "RemoteAccessError, RemoteAccessError at the other end", ACCESS),
    rxe("window of type *, a byte past its end", "Success, bytes moved", UNBOUNDED),
    rxe("window of type *, wholly past its end", "Success, bytes moved", UNBOUNDED),
    rxe("window of type *, before its start", "Success, bytes moved", UNBOUNDED),
    rxe("type 2, *, bound elsewhere while it is bound", "FlushError", BIND_FLUSHED),
    rxe("type 2, *, bound to nothing", "FlushError", BIND_FLUSHED),
    rxe("window of type *, over a region without the right to bind", "FlushError", BIND_FLUSHED),
    rxe("window of type *, for writing over a region that may only be read", "FlushError", BIND_FLUSHED),
    rxe("window of type *, bound * of its region", "FlushError", BIND_FLUSHED),
    rxe("window of type *, of another domain", "not posted", EARLIER),
    rxe("type 1, *, invalidated*", "FlushError", BIND_FLUSHED),
    rxe(
        "type 2, *, invalidated by a message",
        "Success; Receive of 64 bytes, bytes as sent; then RemoteAccessError, bytes as before",
        UNTOLD,
    ),
    rxe("type 2, *, invalidated through another queue pair", "Success", NOT_ITS_OWN),
];
