//! Host memory as a bus master reaches it, by physical address.

use super::epoch::DmaEpoch;
use super::outside::Outside;
use super::private::PrivatePages;
use crate::addr::{PAGE_SIZE, PhysAddr};
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

    /// Copies from `at` to where another process sees it: at most a page.
    ///
    /// # Errors
    /// As of [`HostMemory::read`].
    fn read_to(&self, at: PhysAddr, to: Outside<'_>) -> Result<(), MemoryError> {
        let mut buffer = [0; PAGE_SIZE as usize];
        let bytes = &mut buffer[..to.len()];
        self.read(at, bytes)?;
        to.copy_in(bytes);
        Ok(())
    }

    /// Copies what another process may change meanwhile to `at`: at most a page.
    ///
    /// # Errors
    /// As of [`HostMemory::write`].
    fn write_from(&self, at: PhysAddr, from: Outside<'_>) -> Result<(), MemoryError> {
        let mut buffer = [0; PAGE_SIZE as usize];
        let bytes = &mut buffer[..from.len()];
        from.copy_out(bytes);
        self.write(at, bytes)
    }

    /// Copies `len` bytes from `from` to `to`. Unlike the others this may run over page after page, as long as physical
    /// addresses go on. Where the two ranges overlap, the bytes that arrive are unspecified.
    ///
    /// # Errors
    /// See [`CopyError`]; a prefix may have been placed then.
    fn copy(&self, from: PhysAddr, to: PhysAddr, len: usize) -> Result<(), CopyError<MemoryError>> {
        let mut buffer = [0; PAGE_SIZE as usize];
        let mut done = 0;
        while done < len {
            let (from, to) = (from.offset(done as u64), to.offset(done as u64));
            let left = |at: PhysAddr| (PAGE_SIZE - at.page_offset()) as usize;
            let now = (len - done).min(left(from)).min(left(to));
            let (bytes, at) = (&mut buffer[..now], done as u64);
            self.read(from, bytes).map_err(|error| CopyError { end: CopyEnd::Source, done: at, error })?;
            self.write(to, bytes).map_err(|error| CopyError { end: CopyEnd::Target, done: at, error })?;
            done += now;
        }
        Ok(())
    }

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

impl MemoryError {
    /// The physical address that it speaks of.
    #[must_use]
    pub fn at(&self) -> PhysAddr {
        match self {
            Self::Retired { at }
            | Self::Unbacked { at }
            | Self::Vanished { at }
            | Self::Misaligned { at } => *at,
        }
    }
}

/// Which end of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyEnd {
    /// Where the bytes are.
    Source,
    /// Where they are to go.
    Target,
}

/// Why a copy from memory to memory ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{end:?} of a copy, after {done} bytes: {error}")]
pub struct CopyError<E> {
    /// Which end it was.
    pub end: CopyEnd,
    /// How far from the beginning of the copy the byte is that could not be reached.
    pub done: u64,
    /// What the memory or the bus said.
    pub error: E,
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
