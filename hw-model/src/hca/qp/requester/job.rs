//! A request that has its sequence numbers.

use crate::hca::qp::core::Route;
use crate::hca::qp::queue::Wqe;
use crate::hca::request::{Operation, Status};
use crate::hca::translate::Piece;
use crate::wire::Psn;

/// A request that has its sequence numbers.
pub(super) struct Job {
    pub(super) wqe: Wqe,
    pub(super) first: Psn,
    pub(super) packets: u32,
    /// Of a read: bytes that have arrived.
    pub(super) received: u32,
    /// Of a read: all has arrived. Of a request that sends nothing: carried out.
    pub(super) done: bool,
    /// It failed on this side. Its completion waits for those before it.
    pub(super) failed: Option<Status>,
}

impl Job {
    pub(super) fn end(&self) -> Psn {
        self.first.offset(self.packets)
    }
    pub(super) fn is_read(&self) -> bool {
        matches!(self.wqe.operation, Operation::Read(_))
    }
    /// A request that sends nothing has no sequence numbers: it lies between those before and after it.
    pub(super) fn is_local(&self) -> bool {
        self.wqe.operation.is_local()
    }
    /// Whether a cursor at `psn` has passed all of it.
    pub(super) fn is_before(&self, psn: Psn) -> bool {
        psn.since(self.end()) >= 0 && (!self.is_local() || self.done)
    }
    /// The sequence number of the next response that a read waits for.
    pub(super) fn awaited(&self, route: &Route) -> Psn {
        self.first.offset(self.received / route.mtu.bytes())
    }
    /// The parts of local memory that hold `now` bytes at `offset` of the message.
    pub(super) fn pieces(&self, mut offset: u32, mut now: u32, out: &mut Vec<Piece>) {
        out.clear();
        for sge in self.wqe.sges() {
            if now == 0 {
                return;
            }
            if offset >= sge.length {
                offset -= sge.length;
                continue;
            }
            let rest = sge.length - offset;
            let part = rest.min(now);
            let address = sge.address.offset(u64::from(offset));
            out.push(Piece { key: sge.key, address, now: part, rest: u64::from(rest) });
            offset = 0;
            now -= part;
        }
    }
}
