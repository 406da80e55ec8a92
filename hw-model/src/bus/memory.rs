//! Host memory as a bus master reaches it, by physical address.

use super::epoch::DmaEpoch;
use super::private::PrivatePages;
use crate::addr::PhysAddr;
use crate::sync::Arc;

/// Memory behind the host bridge. Implemented by the address spaces of `odp` and by modelled BARs.
///
/// Bytes are always copied in and out: memory that a device or another thread can change is never a Rust reference.
/// A copy runs in increasing address order and its last byte (last aligned word, where there is one) is placed last.
/// Callers are inside [`Slot::enter`](super::epoch::Slot::enter) of a slot of [`HostMemory::epoch`].
pub trait HostMemory: Send + Sync {
    /// Copies `out.len()` bytes from `at`.
    ///
    /// # Errors
    /// See [`MemoryError`]; `out` is unspecified then.
    fn read(&self, at: PhysAddr, out: &mut [u8]) -> Result<(), MemoryError>;

    /// Copies `data` to `at`.
    ///
    /// # Errors
    /// See [`MemoryError`]; a prefix of `data` may have been placed then.
    fn write(&self, at: PhysAddr, data: &[u8]) -> Result<(), MemoryError>;

    /// Performs `op` on the aligned 64-bit word at `at` as one locked instruction and gives the value before it.
    ///
    /// # Errors
    /// See [`MemoryError`]; [`MemoryError::Misaligned`] if `at` is not a multiple of 8.
    fn atomic(&self, at: PhysAddr, op: AtomicOp) -> Result<u64, MemoryError>;

    /// Who is moving data to or from this memory at the moment.
    fn epoch(&self) -> &Arc<DmaEpoch>;

    /// Which pages devices cannot reach, if this is the memory of an encrypted guest. Asked once a device; what is read
    /// and written here is the CPU's view, which reaches private pages too.
    fn private_pages(&self) -> Option<Arc<PrivatePages>> {
        None
    }
}

/// An atomic on a 64-bit word (InfiniBand Architecture Specification 1, 9.4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtomicOp {
    /// Adds, wrapping.
    FetchAdd(u64),
    /// Stores `swap` if the word equals `compare`.
    CompareSwap {
        /// The value to compare with.
        compare: u64,
        /// The value to store.
        swap: u64,
    },
}

/// Why a copy did not happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// The frame was retired by an invalidation that had ended: a stale translation. Always a bug above.
    #[error("frame at {at} was retired by an invalidation; a stale translation reached the bus")]
    Retired {
        /// The physical address used.
        at: PhysAddr,
    },
    /// No memory answers at this physical address.
    #[error("no memory at physical address {at}")]
    Unbacked {
        /// The physical address used.
        at: PhysAddr,
    },
    /// The memory behind the frame went away, or lost its permission, during the copy; its notification is on the way.
    #[error("memory behind {at} vanished during the copy")]
    Vanished {
        /// The first physical address that could not be reached.
        at: PhysAddr,
    },
    /// An atomic on a word that is not naturally aligned.
    #[error("atomic at {at} is not 8-byte aligned")]
    Misaligned {
        /// The physical address used.
        at: PhysAddr,
    },
}
