//! Work requests and completions, as software sees them (IBTA volume 1, 11.4.1 and 11.4.2).

use super::key::Access;
use super::qp::QpState;
use crate::addr::RegionAddr;
use crate::wire::{Key, Qpn};

/// Software's name for a request; the completion carries it back. The HCA does not look at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct RequestId(pub u64);

/// A piece of local memory: one entry of a scatter-gather list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sge {
    /// The local key.
    pub key: Key,
    /// First address in the region of that key.
    pub address: RegionAddr,
    /// Bytes.
    pub length: u32,
}

/// Where in the peer's memory a one-sided operation begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remote {
    /// The remote key.
    pub key: Key,
    /// First address in the region of that key.
    pub address: RegionAddr,
}

/// What a request does. The local side is the scatter-gather list of its [`SendRequest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// RDMA write: the peer's memory becomes what the list holds (9.4.3).
    Write(Remote),
    /// RDMA read: what the list names becomes what the peer's memory holds (9.4.4).
    Read(Remote),
    /// Fast registration (10.6.4.4): the memory that [`Hca::map_fast_key`](super::Hca::map_fast_key) named becomes
    /// reachable by `key`. Requests after it may use the key. Nothing is sent.
    Register {
        /// The key's new name: the lowest byte is software's choice.
        key: Key,
        /// What it allows.
        access: Access,
    },
    /// Local invalidation (10.6.5): `key` reaches nothing any more. Begins when all requests before it have ended, so that
    /// none of them loses its memory. Bursts of peers that are under way end by themselves: drain the epoch
    /// ([`DmaEpoch::drain`](crate::bus::DmaEpoch::drain)) before the memory goes. Nothing is sent.
    Invalidate {
        /// The registered key.
        key: Key,
    },
}

impl Operation {
    /// What the completion calls it.
    #[must_use]
    pub fn code(&self) -> OperationCode {
        match self {
            Self::Write(_) => OperationCode::Write,
            Self::Read(_) => OperationCode::Read,
            Self::Register { .. } => OperationCode::Register,
            Self::Invalidate { .. } => OperationCode::Invalidate,
        }
    }
    /// Whether nothing goes over the wire.
    pub(super) fn is_local(&self) -> bool {
        matches!(self, Self::Register { .. } | Self::Invalidate { .. })
    }
}

/// An operation without its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OperationCode {
    /// RDMA write.
    Write,
    /// RDMA read.
    Read,
    /// Fast registration.
    Register,
    /// Local invalidation.
    Invalidate,
}

/// A request for a send queue.
#[derive(Clone, Copy, Debug)]
pub struct SendRequest<'a> {
    /// Carried back by the completion.
    pub id: RequestId,
    /// What to do.
    pub operation: Operation,
    /// Local memory, in message order. Empty for a message without data.
    pub local: &'a [Sge],
    /// Whether success leaves a completion. Failure always does.
    pub signaled: bool,
    /// Do not begin before earlier reads of this queue pair have ended (10.8.3.3).
    pub fence: bool,
}

impl<'a> SendRequest<'a> {
    /// A signaled RDMA write of `local` to `remote`.
    #[must_use]
    pub fn write(id: u64, local: &'a [Sge], remote: Remote) -> Self {
        let operation = Operation::Write(remote);
        Self { id: RequestId(id), operation, local, signaled: true, fence: false }
    }
    /// A signaled RDMA read of `remote` into `local`.
    #[must_use]
    pub fn read(id: u64, local: &'a [Sge], remote: Remote) -> Self {
        let operation = Operation::Read(remote);
        Self { id: RequestId(id), operation, local, signaled: true, fence: false }
    }
    /// A signaled fast registration of `key`, which allows `access`.
    #[must_use]
    pub fn register(id: u64, key: Key, access: Access) -> Self {
        let operation = Operation::Register { key, access };
        Self { id: RequestId(id), operation, local: &[], signaled: true, fence: false }
    }
    /// A signaled local invalidation of `key`.
    #[must_use]
    pub fn invalidate(id: u64, key: Key) -> Self {
        let operation = Operation::Invalidate { key };
        Self { id: RequestId(id), operation, local: &[], signaled: true, fence: false }
    }
}

/// Why a request was not taken. Nothing of it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PostError {
    /// The queue pair cannot send yet (10.3.1): reset, initialised, or ready to receive only.
    #[error("queue pair {qpn:?} in state {state:?} does not take send requests")]
    State {
        /// The queue pair.
        qpn: Qpn,
        /// Its state.
        state: QpState,
    },
    /// As many requests as the queue holds have not ended yet.
    #[error("all {capacity} requests of the send queue are outstanding")]
    QueueFull {
        /// The queue's size.
        capacity: u32,
    },
    /// More scatter-gather entries than the queue pair was created for, or any for a request that moves no data.
    #[error("{entries} scatter-gather entries, at most {max} are possible")]
    TooManySges {
        /// In the request.
        entries: usize,
        /// Of the queue pair; 0 for a request that moves no data.
        max: u32,
    },
    /// A longer message than the device carries.
    #[error("a message of {bytes} bytes, at most {max} are possible")]
    TooLong {
        /// Of the request.
        bytes: u64,
        /// Of the device.
        max: u32,
    },
}

/// How a request ended (11.6.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Success = 0,
    /// A local key or its bounds or rights forbid the access, or its pages could not be brought in.
    LocalProtectionError,
    /// The local device could not execute it; see [`HcaStats::dma_refused`](super::HcaStats::dma_refused).
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
    /// A registration or invalidation was not allowed: wrong key, state, rights or protection domain.
    MemoryManagementError,
}

impl Status {
    /// Every status, in the order of their codes.
    pub const ALL: [Self; 11] = [
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
    ];
}

/// The end of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Completion {
    /// The request's name.
    pub id: RequestId,
    /// How it ended.
    pub status: Status,
    /// What it was.
    pub operation: OperationCode,
    /// The queue pair it was posted to.
    pub qpn: Qpn,
    /// Bytes of the message; meaningful on success.
    pub bytes: u32,
}
