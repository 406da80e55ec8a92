//! A request that has its sequence numbers.

use crate::hca::qp::queue::{WORD, Wqe};
use crate::hca::qp::work::Route;
use crate::hca::request::{Operation, Status};
use crate::wire::{AtomicEth, Header, Position, Psn, Reth};

/// A request that has its sequence numbers.
pub(super) struct Job {
    pub(super) wqe: Wqe,
    pub(super) first: Psn,
    pub(super) packets: u32,
    /// Of a fetch: bytes of the answer that have arrived.
    pub(super) received: u32,
    /// Of a fetch: all has arrived. Of a request that sends nothing: carried out.
    pub(super) done: bool,
    /// It failed on this side. Its completion waits for those before it.
    pub(super) failed: Option<Status>,
}

impl Job {
    pub(super) fn end(&self) -> Psn {
        self.first.offset(self.packets)
    }
    pub(super) fn is_fetch(&self) -> bool {
        self.wqe.operation.is_fetch()
    }
    /// A request that sends nothing has no sequence numbers: it lies between those before and after it.
    pub(super) fn is_local(&self) -> bool {
        self.wqe.operation.is_local()
    }
    /// Whether a cursor at `psn` has passed all of it.
    pub(super) fn is_before(&self, psn: Psn) -> bool {
        psn.since(self.end()) >= 0 && (!self.is_local() || self.done)
    }
    /// The sequence number of the next answer that a fetch waits for.
    pub(super) fn awaited(&self, route: &Route) -> Psn {
        self.first.offset(self.received / route.mtu.bytes())
    }
    /// Bytes that the answer to a fetch brings.
    pub(super) fn answer_bytes(&self) -> u32 {
        match self.wqe.operation {
            Operation::Read(_) => self.wqe.length,
            Operation::CompareSwap { .. } | Operation::FetchAdd { .. } => WORD,
            _ => 0,
        }
    }
    /// Whether the answer to a fetch is an atomic acknowledgement.
    pub(super) fn wants_word(&self) -> bool {
        matches!(self.wqe.operation, Operation::CompareSwap { .. } | Operation::FetchAdd { .. })
    }

    /// The header of the packet at `position` (9.4; A19.4). `received` bytes of a read need not be asked for again.
    pub(super) fn header(&self, position: Position) -> Header {
        let length = self.wqe.length;
        match self.wqe.operation {
            Operation::Send => send(position),
            Operation::SendImmediate(immediate) => match position {
                Position::Last => Header::SendLastImmediate(immediate),
                Position::Only => Header::SendOnlyImmediate(immediate),
                _ => send(position),
            },
            Operation::SendInvalidate(key) => match position {
                Position::Last => Header::SendLastInvalidate(key),
                Position::Only => Header::SendOnlyInvalidate(key),
                _ => send(position),
            },
            Operation::Write(remote) => {
                let reth = Reth { address: remote.address, key: remote.key, length };
                match position {
                    Position::First => Header::WriteFirst(reth),
                    Position::Middle => Header::WriteMiddle,
                    Position::Last => Header::WriteLast,
                    Position::Only => Header::WriteOnly(reth),
                }
            }
            Operation::WriteImmediate(remote, immediate) => {
                let reth = Reth { address: remote.address, key: remote.key, length };
                match position {
                    Position::First => Header::WriteFirst(reth),
                    Position::Middle => Header::WriteMiddle,
                    Position::Last => Header::WriteLastImmediate(immediate),
                    Position::Only => Header::WriteOnlyImmediate(reth, immediate),
                }
            }
            Operation::Read(remote) => {
                // After a loss only what is missing is asked for again.
                let address = remote.address.offset(u64::from(self.received));
                Header::ReadRequest(Reth { address, key: remote.key, length: length - self.received })
            }
            Operation::CompareSwap { remote, compare, swap } => {
                let (address, key) = (remote.address, remote.key);
                Header::CompareSwap(AtomicEth { address, key, swap_or_add: swap, compare })
            }
            Operation::FetchAdd { remote, add } => {
                let (address, key) = (remote.address, remote.key);
                Header::FetchAdd(AtomicEth { address, key, swap_or_add: add, compare: 0 })
            }
            Operation::AtomicWrite(remote) => {
                Header::AtomicWrite(Reth { address: remote.address, key: remote.key, length: WORD })
            }
            Operation::Flush { remote, length, how } => {
                Header::Flush(how, Reth { address: remote.address, key: remote.key, length })
            }
            Operation::Bind(_) | Operation::Register { .. } | Operation::Invalidate { .. } => {
                unreachable!("nothing is sent for it")
            }
        }
    }
}

const fn send(position: Position) -> Header {
    match position {
        Position::First => Header::SendFirst,
        Position::Middle => Header::SendMiddle,
        Position::Last => Header::SendLast,
        Position::Only => Header::SendOnly,
    }
}
