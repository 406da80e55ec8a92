//! Why a host refuses to map in an IOMMU that is no model.

use crate::addr::PhysAddr;

/// What stands against a mapping besides the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostRefusal {
    /// The frame is no longer what the address space reports: the page went away, or was another's all the time.
    #[error("nothing is at {phys} any more: look at the pages again")]
    Gone {
        /// The frame.
        phys: PhysAddr,
    },
    /// The process may not pin so much.
    #[error(
        "{needed:#x} bytes more than the {locked:#x} locked pass the limit of locked memory, {limit:#x}: raise \
         RLIMIT_MEMLOCK (ulimit -l)"
    )]
    LockedMemory {
        /// Bytes of this mapping.
        needed: u64,
        /// Bytes that the process has locked or pinned.
        locked: u64,
        /// Bytes allowed to the process.
        limit: u64,
    },
    /// No more mappings at a time.
    #[error(
        "all of {most} mappings are made: raise dma_entry_limit of vfio_iommu_type1, or link larger leaves"
    )]
    TooManyMappings {
        /// How many there can be.
        most: u32,
    },
    /// Part of the range must not be mapped for the devices of the space.
    #[error("the range is kept for something else, interrupts for instance")]
    Reserved,
    /// The memory cannot be pinned for long: it is not writable, or is a shared mapping of a file that tracks dirty pages.
    #[error("the memory at {phys} cannot be pinned for writing")]
    Unpinnable {
        /// The frame.
        phys: PhysAddr,
    },
    /// Anything else.
    #[error("the kernel refused with error {errno}")]
    Other {
        /// The number, as in errno.
        errno: i32,
    },
}
