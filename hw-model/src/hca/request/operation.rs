//! Operations: what a send request does.

use crate::addr::RegionAddr;
use crate::hca::key::Access;
use crate::wire::{Feth, Immediate, Key};

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

/// What a memory window is bound to (10.6.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowBind {
    /// The key that the window has from now on. Its lowest byte is software's choice; the rest names the window.
    pub key: Key,
    /// The region, by its local key: it allows binding ([`Access::WINDOW_BIND`]).
    pub region: Key,
    /// First address in the region.
    pub address: RegionAddr,
    /// Bytes. None unbinds a window of type 1.
    pub length: u64,
    /// What peers may do through the window. [`Access::ZERO_BASED`] has them count from 0.
    pub access: Access,
}

/// What a request does. The local side is the scatter-gather list of its [`SendRequest`](super::SendRequest).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// Send (9.4.1): what the list holds goes to where the peer's oldest receive says.
    Send,
    /// The same, and the peer's completion carries the immediate data.
    SendImmediate(Immediate),
    /// The same, and the peer's device invalidates the key, of a window of type 2 or of fast registration (9.4.1.1).
    SendInvalidate(Key),
    /// RDMA write: the peer's memory becomes what the list holds (9.4.3).
    Write(Remote),
    /// The same, and a receive of the peer completes with the immediate data.
    WriteImmediate(Remote, Immediate),
    /// RDMA read: what the list names becomes what the peer's memory holds (9.4.4).
    Read(Remote),
    /// Compare and swap of a word of 8 bytes (9.4.5). The list names 8 bytes: they become the word as it was.
    CompareSwap {
        /// The word, at a multiple of 8.
        remote: Remote,
        /// What it is compared with.
        compare: u64,
        /// What it becomes if it is equal.
        swap: u64,
    },
    /// Fetch and add of a word of 8 bytes, wrapping (9.4.5). The list names 8 bytes: they become the word as it was.
    FetchAdd {
        /// The word, at a multiple of 8.
        remote: Remote,
        /// What is added.
        add: u64,
    },
    /// Atomic write (A19.4.2): the 8 bytes that the list holds are seen as one by whoever reads the word.
    AtomicWrite(Remote),
    /// Flush (A19.4.1): ends when the bytes that were written there before have come as far as is asked.
    Flush {
        /// First byte.
        remote: Remote,
        /// Bytes.
        length: u32,
        /// How far, and whether the bytes named or the whole region.
        how: Feth,
    },
    /// Binding of a memory window (10.6.7). Nothing is sent.
    Bind(WindowBind),
    /// Fast registration (10.6.4.4): the memory that [`Hca::map_fast_key`](crate::hca::Hca::map_fast_key) named becomes
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
    pub const fn code(&self) -> OperationCode {
        match self {
            Self::Send | Self::SendImmediate(_) | Self::SendInvalidate(_) => OperationCode::Send,
            Self::Write(_) | Self::WriteImmediate(..) => OperationCode::Write,
            Self::Read(_) => OperationCode::Read,
            Self::CompareSwap { .. } => OperationCode::CompareSwap,
            Self::FetchAdd { .. } => OperationCode::FetchAdd,
            Self::AtomicWrite(_) => OperationCode::AtomicWrite,
            Self::Flush { .. } => OperationCode::Flush,
            Self::Bind(_) => OperationCode::Bind,
            Self::Register { .. } => OperationCode::Register,
            Self::Invalidate { .. } => OperationCode::Invalidate,
        }
    }

    /// Whether nothing goes over the wire.
    pub(in crate::hca) const fn is_local(&self) -> bool {
        matches!(self, Self::Bind(_) | Self::Register { .. } | Self::Invalidate { .. })
    }

    /// Whether its answer is more than an acknowledgement: of these only so many may be under way (9.7.3.1, A19.4).
    pub(in crate::hca) const fn is_fetch(&self) -> bool {
        matches!(
            self,
            Self::Read(_)
                | Self::CompareSwap { .. }
                | Self::FetchAdd { .. }
                | Self::AtomicWrite(_)
                | Self::Flush { .. }
        )
    }

    /// Whether it moves one word.
    pub(in crate::hca) const fn is_word(&self) -> bool {
        matches!(self, Self::CompareSwap { .. } | Self::FetchAdd { .. } | Self::AtomicWrite(_))
    }

    /// Whether it has a scatter-gather list.
    pub(in crate::hca) const fn has_data(&self) -> bool {
        !(self.is_local() || matches!(self, Self::Flush { .. }))
    }

    /// Whether its list holds what is sent, rather than being the place for what comes back.
    pub(in crate::hca) const fn sends_data(&self) -> bool {
        matches!(
            self,
            Self::Send
                | Self::SendImmediate(_)
                | Self::SendInvalidate(_)
                | Self::Write(_)
                | Self::WriteImmediate(..)
                | Self::AtomicWrite(_)
        )
    }
}

/// An operation without its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OperationCode {
    /// Send, with or without immediate data or invalidation.
    Send,
    /// RDMA write, with or without immediate data.
    Write,
    /// RDMA read.
    Read,
    /// Compare and swap.
    CompareSwap,
    /// Fetch and add.
    FetchAdd,
    /// Atomic write.
    AtomicWrite,
    /// Flush.
    Flush,
    /// Binding of a memory window.
    Bind,
    /// Fast registration.
    Register,
    /// Local invalidation.
    Invalidate,
    /// A receive, of a send.
    Receive,
    /// A receive, of an RDMA write with immediate data: the bytes are in the memory that the peer named.
    ReceiveWrite,
}
