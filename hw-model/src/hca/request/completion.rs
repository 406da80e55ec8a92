//! Completions: how a request ended (IBTA volume 1, 11.4.2 and 11.6.2).

use super::{OperationCode, RequestId};
use crate::wire::{Immediate, Key, Qpn};

/// How a request ended (11.6.2). The statuses of end-to-end contexts and of reliable datagrams are missing, as those are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Success = 0,
    /// A local key or its bounds or rights forbid the access, or its pages could not be brought in.
    LocalProtectionError,
    /// The local device could not execute it; see [`HcaStats::dma_refused`](crate::hca::HcaStats::dma_refused).
    LocalQpOperationError,
    /// The queue pair was in, or went to, the error state before this request was done.
    FlushError,
    /// The responder answered something else than was asked.
    BadResponseError,
    /// The responder cannot execute such a request.
    RemoteInvalidRequestError,
    /// The remote key or its bounds or rights forbid the access, or its pages could not be brought in.
    RemoteAccessError,
    /// The responder failed to execute it.
    RemoteOperationError,
    /// No answer, however often it was asked.
    RetryExceeded,
    /// The responder was not ready, however often it was asked.
    RnrRetryExceeded,
    /// A binding, registration or invalidation was not allowed: wrong key, state, rights or protection domain.
    MemoryManagementError,
    /// Of a receive: the message is longer than the receive's list. Of a send: longer than the service carries.
    LocalLengthError,
    /// Of a receive: the peer's RDMA write with immediate data broke the rules of the memory that it named.
    LocalAccessError,
    /// Of a receive from a shared queue: the message that had begun in it never ended (its sender's packets were lost).
    RemoteAbortedError,
}

impl Status {
    /// Every status, in the order of their codes.
    pub const ALL: [Self; 14] = [
        Self::Success,
        Self::LocalProtectionError,
        Self::LocalQpOperationError,
        Self::FlushError,
        Self::BadResponseError,
        Self::RemoteInvalidRequestError,
        Self::RemoteAccessError,
        Self::RemoteOperationError,
        Self::RetryExceeded,
        Self::RnrRetryExceeded,
        Self::MemoryManagementError,
        Self::LocalLengthError,
        Self::LocalAccessError,
        Self::RemoteAbortedError,
    ];
}

/// What a received message carried beside its bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Attached {
    /// Nothing.
    #[default]
    Nothing,
    /// Immediate data.
    Immediate(Immediate),
    /// A key, which the device has invalidated.
    Invalidated(Key),
}

/// Where a datagram came from. The first 40 bytes of its receive are the global route header (11.4.2.1), or hold an IPv4
/// header in their last 20.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DatagramSource {
    /// The queue pair.
    pub qpn: Qpn,
    /// Index of the partition key that it came with.
    pub pkey_index: u16,
}

/// The end of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Completion {
    /// The request's name.
    pub id: RequestId,
    /// How it ended. Unless with success, only `id`, `status` and `qpn` mean anything (11.4.2.1).
    pub status: Status,
    /// What it was.
    pub operation: OperationCode,
    /// The queue pair it was carried out by.
    pub qpn: Qpn,
    /// Bytes of the message; of a datagram's receive with the 40 bytes before it.
    pub bytes: u32,
    /// Of a receive: what else came.
    pub attached: Attached,
    /// Of a datagram's receive.
    pub datagram: Option<DatagramSource>,
    /// Whether it is an event for one who waits for solicited ones only: the sender said so, or it failed (11.4.2.2).
    pub solicited: bool,
}

impl Completion {
    /// A completion of `bytes` bytes without anything beside them.
    #[must_use]
    pub const fn new(id: RequestId, status: Status, operation: OperationCode, qpn: Qpn, bytes: u32) -> Self {
        let solicited = !matches!(status, Status::Success);
        Self { id, status, operation, qpn, bytes, attached: Attached::Nothing, datagram: None, solicited }
    }
    /// The immediate data that came with it.
    #[must_use]
    pub const fn immediate(&self) -> Option<Immediate> {
        match self.attached {
            Attached::Immediate(immediate) => Some(immediate),
            _ => None,
        }
    }
    /// The key that it invalidated.
    #[must_use]
    pub const fn invalidated(&self) -> Option<Key> {
        match self.attached {
            Attached::Invalidated(key) => Some(key),
            _ => None,
        }
    }
}
