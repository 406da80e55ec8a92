//! What goes wrong with a real device, with whom and why.

use super::capabilities::Capability;
use hw_model::addr::{RegionAddr, VirtRange};
use hw_model::hca::Key;
use rustix::io::Errno;

/// Why a real device did not do something.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VerbsError {
    /// There is no device of that name.
    #[error("there is no RDMA device {name}; there are: {}", if found.is_empty() { "none".to_owned() } else { found.join(", ") })]
    NoDevice {
        /// The name asked for.
        name: String,
        /// The names that there are.
        found: Vec<String>,
    },
    /// The device cannot do that, and never could.
    #[error("{device} has no {capability}")]
    Lacks {
        /// The device.
        device: String,
        /// What it lacks.
        capability: Capability,
    },
    /// libibverbs, the driver or the kernel refused a call.
    #[error("{device} refused {call}: {reason}")]
    Refused {
        /// The device.
        device: String,
        /// The function.
        call: &'static str,
        /// What it said.
        reason: Errno,
    },
    /// The memory is not this process's own, so its addresses mean something else to the device.
    #[error("{range} is not memory of this process; a real device reaches no other")]
    NotOfThisProcess {
        /// The memory.
        range: VirtRange,
    },
    /// A region holds at least one byte.
    #[error("a region of 0 bytes; the smallest is 1")]
    Empty,
    /// Longer than a region of the device may be.
    #[error("{len} bytes are more than a region of {device} may hold (max_mr_size {limit})")]
    TooLong {
        /// The device.
        device: String,
        /// Bytes asked for.
        len: u64,
        /// Its limit.
        limit: u64,
    },
    /// As many regions as the device has are registered by this process alone.
    #[error(
        "all {max} regions of {device} (max_mr) are in use by this process; deregister some, or merge neighbours"
    )]
    TooManyRegions {
        /// The device.
        device: String,
        /// Its limit.
        max: u64,
    },
    /// Pinning would pass the limit on locked memory.
    #[error(
        "RLIMIT_MEMLOCK is {limit} bytes, {pinned} are pinned already and {needed} more are needed: raise it to at least \
         {} (ulimit -l, LimitMEMLOCK=, prlimit), give CAP_IPC_LOCK, or register on demand", pinned + needed
    )]
    MemoryLock {
        /// Bytes that this registration pins, in whole pages.
        needed: u64,
        /// Bytes that the process has pinned already.
        pinned: u64,
        /// The limit.
        limit: u64,
    },
    /// Entries of huge pages were asked for, of memory that has none, or of a part of one.
    #[error(
        "{range} is not whole huge pages: its pages are of {page} bytes, and a region with IBV_ACCESS_HUGETLB begins and \
         ends with one; align it to 2 MiB in memory of MAP_HUGETLB (vm.nr_hugepages), or register without"
    )]
    HugePages {
        /// The memory.
        range: VirtRange,
        /// Bytes of its pages.
        page: u64,
    },
    /// An implicit region of a real device is not over a part, and has the addresses that there are.
    #[error(
        "an implicit region is over all of {all} at its own addresses, not over {range}: register that on demand"
    )]
    NotEverything {
        /// The memory.
        range: VirtRange,
        /// The address space.
        all: VirtRange,
    },
    /// A part of the memory has no pages that the kernel would give to a driver: it is a device's, or a DMABUF's.
    #[error(
        "{part} is mapped from a device or a DMABUF, whose pages {device} cannot be given by address (VM_PFNMAP or VM_IO): \
         register the buffer by its descriptor (VerbsPd::register_dmabuf), or map the memory file that it was made of"
    )]
    WithoutPages {
        /// The device.
        device: String,
        /// The mapping.
        part: VirtRange,
    },
    /// A DMABUF's first byte is called by an address that has another place in its page.
    #[error(
        "a region over a DMABUF from byte {offset:#x} on cannot begin at {address}: the last 12 bits must be the same"
    )]
    DmabufAddress {
        /// The byte of the buffer.
        offset: u64,
        /// What it was to be called.
        address: RegionAddr,
    },
    /// Memory windows are bound to it.
    #[error(
        "{windows} memory windows are bound to {key:?}; they must be unbound, invalidated or ended before"
    )]
    WindowsBound {
        /// The region's key.
        key: Key,
        /// How many windows.
        windows: usize,
    },
    /// The driver gives a region two keys; only one is kept here.
    #[error("{device} gave a local key {local:#x} and another remote key {remote:#x}")]
    TwoKeys {
        /// The device.
        device: String,
        /// For requests of this side.
        local: u32,
        /// For the peer's.
        remote: u32,
    },
    /// The object is another device's.
    #[error("the object belongs to another device than {device}")]
    Foreign {
        /// The device asked.
        device: String,
    },
    /// The region was deregistered.
    #[error("the region of {key:?} was deregistered")]
    Deregistered {
        /// The key that it had.
        key: Key,
    },
    /// The window was ended, with its region or by itself.
    #[error("the memory window of {device} was ended")]
    WindowEnded {
        /// The device.
        device: String,
    },
    /// The window is bound to nothing.
    #[error("the memory window of {key:?} is bound to nothing, so there is nothing to end")]
    WindowFree {
        /// Its key.
        key: Key,
    },
    /// A context that was handed over gives no protection domain to ask it by.
    #[error("the context from {context} gave no protection domain, not even for a moment")]
    NoDomain {
        /// Whose it is.
        context: &'static str,
    },
    /// The request cannot be posted on this backend.
    #[error("{device} is not given {what} by this backend")]
    NotPosted {
        /// The device.
        device: String,
        /// What was asked for.
        what: &'static str,
    },
}
