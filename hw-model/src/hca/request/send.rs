//! Requests, and why one is not taken.

use super::{Operation, OperationCode, Remote, Sge};
use crate::hca::key::Access;
use crate::hca::qp::{QpState, Transport};
use crate::wire::{Gid, GlobalRoute, Immediate, Key, QKey, Qpn, Srqn};

/// Software's name for a request; the completion carries it back. The HCA does not look at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct RequestId(pub u64);

/// The way to a port, as a datagram needs it with each request (11.2.2.1, address handles).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AddressVector {
    /// The port.
    pub gid: Gid,
    /// Which of the sending port's addresses it comes from.
    pub source_gid_index: u8,
    /// What its packets say to the network.
    pub route: GlobalRoute,
    /// Four bits: in what class it leaves this host.
    pub service_level: u8,
}

impl AddressVector {
    /// From the port's first address, asking for nothing of the network.
    #[must_use]
    pub const fn to(gid: Gid) -> Self {
        Self { gid, source_gid_index: 0, route: GlobalRoute::DEFAULT, service_level: 0 }
    }
}

/// To whom a request goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Destination {
    /// To whom the queue pair is connected.
    #[default]
    Connected,
    /// UD: to that queue pair, which has this queue key. A [controlled](QKey::is_controlled) one stands for that of the
    /// sending queue pair.
    Datagram {
        /// The way to its port.
        to: AddressVector,
        /// The queue pair.
        qpn: Qpn,
        /// Its queue key.
        qkey: QKey,
    },
    /// XRC: to that shared receive queue at the peer's host (A14.2).
    SharedQueue(Srqn),
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
    /// Data that is taken when the request is posted, from memory that needs no key. Used in place of `local`, which is
    /// empty then.
    pub inline: &'a [u8],
    /// To whom.
    pub destination: Destination,
    /// Whether success leaves a completion. Failure always does.
    pub signaled: bool,
    /// Do not begin before earlier reads and atomics of this queue pair have ended (10.8.3.3).
    pub fence: bool,
    /// The receiver's completion is an event for one who waits for solicited ones only (9.2.3).
    pub solicited: bool,
}

impl<'a> SendRequest<'a> {
    /// A signaled request to the connected peer.
    #[must_use]
    pub const fn new(id: u64, operation: Operation, local: &'a [Sge]) -> Self {
        Self {
            id: RequestId(id),
            operation,
            local,
            inline: &[],
            destination: Destination::Connected,
            signaled: true,
            fence: false,
            solicited: false,
        }
    }
    /// A signaled send of `local`.
    #[must_use]
    pub const fn send(id: u64, local: &'a [Sge]) -> Self {
        Self::new(id, Operation::Send, local)
    }
    /// A signaled send of `local` with `immediate` data.
    #[must_use]
    pub const fn send_immediate(id: u64, local: &'a [Sge], immediate: u32) -> Self {
        Self::new(id, Operation::SendImmediate(Immediate(immediate)), local)
    }
    /// A signaled RDMA write of `local` to `remote`.
    #[must_use]
    pub const fn write(id: u64, local: &'a [Sge], remote: Remote) -> Self {
        Self::new(id, Operation::Write(remote), local)
    }
    /// The same, with `immediate` data for a receive of the peer.
    #[must_use]
    pub const fn write_immediate(id: u64, local: &'a [Sge], remote: Remote, immediate: u32) -> Self {
        Self::new(id, Operation::WriteImmediate(remote, Immediate(immediate)), local)
    }
    /// A signaled RDMA read of `remote` into `local`.
    #[must_use]
    pub const fn read(id: u64, local: &'a [Sge], remote: Remote) -> Self {
        Self::new(id, Operation::Read(remote), local)
    }
    /// A signaled fetch-and-add of `add` to the word `remote`; what it was goes to `local`.
    #[must_use]
    pub const fn fetch_add(id: u64, local: &'a [Sge], remote: Remote, add: u64) -> Self {
        Self::new(id, Operation::FetchAdd { remote, add }, local)
    }
    /// A signaled compare-and-swap of the word `remote`; what it was goes to `local`.
    #[must_use]
    pub const fn compare_swap(id: u64, local: &'a [Sge], remote: Remote, compare: u64, swap: u64) -> Self {
        Self::new(id, Operation::CompareSwap { remote, compare, swap }, local)
    }
    /// A signaled fast registration of `key`, which allows `access`.
    #[must_use]
    pub const fn register(id: u64, key: Key, access: Access) -> Self {
        Self::new(id, Operation::Register { key, access }, &[])
    }
    /// A signaled local invalidation of `key`.
    #[must_use]
    pub const fn invalidate(id: u64, key: Key) -> Self {
        Self::new(id, Operation::Invalidate { key }, &[])
    }
    /// The same request with `data` taken when it is posted.
    #[must_use]
    pub const fn with_inline(self, data: &'a [u8]) -> Self {
        Self { inline: data, local: &[], ..self }
    }
    /// The same request to `destination`.
    #[must_use]
    pub const fn with_destination(self, destination: Destination) -> Self {
        Self { destination, ..self }
    }
}

/// A request for a receive queue: where one message goes.
#[derive(Clone, Copy, Debug)]
pub struct RecvRequest<'a> {
    /// Carried back by the completion.
    pub id: RequestId,
    /// Local memory, in message order. A datagram's begins with 40 bytes of its global route header.
    pub local: &'a [Sge],
}

impl<'a> RecvRequest<'a> {
    /// A receive into `local`.
    #[must_use]
    pub const fn new(id: u64, local: &'a [Sge]) -> Self {
        Self { id: RequestId(id), local }
    }
}

/// Why a request was not taken. Nothing of it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PostError {
    /// The queue pair cannot do it yet (10.3.1): to send it must be ready to send, to receive it must be initialised.
    #[error("queue pair {qpn:?} in state {state:?} does not take such requests")]
    State {
        /// The queue pair.
        qpn: Qpn,
        /// Its state.
        state: QpState,
    },
    /// As many requests as the queue holds have not ended yet.
    #[error("all {capacity} requests of the queue are outstanding")]
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
    /// A longer message than the device carries, or the path MTU of a datagram.
    #[error("a message of {bytes} bytes, at most {max} are possible")]
    TooLong {
        /// Of the request.
        bytes: u64,
        /// Of the device.
        max: u32,
    },
    /// More inline data than the queue pair was created for, or any for a request that sends none.
    #[error("{bytes} bytes of inline data, at most {max} are possible")]
    InlineTooLong {
        /// Of the request.
        bytes: usize,
        /// Of the queue pair; 0 for an operation that sends no data.
        max: u32,
    },
    /// Inline data and a list at once.
    #[error("inline data takes the place of scatter-gather entries, both were given")]
    InlineAndList,
    /// The service has no such operation (IBTA volume 1, table 45).
    #[error("a queue pair of {transport:?} has no {operation:?}")]
    NotOfTransport {
        /// What was asked for.
        operation: OperationCode,
        /// Of the queue pair.
        transport: Transport,
    },
    /// A datagram without address, or an address where there is a connection.
    #[error("a request of {transport:?} cannot go to {destination:?}")]
    NoSuchDestination {
        /// Of the queue pair.
        transport: Transport,
        /// Of the request.
        destination: Destination,
    },
    /// Atomics move 8 bytes.
    #[error("{operation:?} moves 8 bytes, the request has {bytes}")]
    NotAWord {
        /// What was asked for.
        operation: OperationCode,
        /// Of the request.
        bytes: u64,
    },
    /// The queue pair receives from a shared queue, or not at all.
    #[error("queue pair {qpn:?} has no receive queue of its own")]
    NoReceiveQueue {
        /// The queue pair.
        qpn: Qpn,
    },
}
