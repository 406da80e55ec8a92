//! The system calls and ioctls that rustix does not wrap, with safe faces.
//!
//! Unsafe island. Invariant: every call made here either writes only into a buffer that the caller lent, or changes
//! nothing a Rust reference can see: populating pages, registering ranges with userfaultfd (asynchronous write-protect
//! mode takes no access away), asking what is mapped. Nothing here maps, unmaps or discards memory.
#![allow(unsafe_code)]

use rustix::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use rustix::io::Errno;

/// Only user-mode faults: what an unprivileged process may ask for whatever vm.unprivileged_userfaultfd says.
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00;
const UFFDIO_UNREGISTER: libc::Ioctl = 0x8010_aa01;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
/// On /dev/userfaultfd: gives a new userfaultfd.
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xaa00;
const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610;
const PROCMAP_QUERY: libc::Ioctl = 0xc068_6611;

bitflags::bitflags! {
    /// Features of userfaultfd (include/uapi/linux/userfaultfd.h) that the events rung needs.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct UserfaultFeatures: u64 {
        const EVENT_REMAP = 1 << 2;
        const EVENT_REMOVE = 1 << 3;
        const EVENT_UNMAP = 1 << 6;
        const WP_UNPOPULATED = 1 << 13;
        const WP_ASYNC = 1 << 15;
    }

    /// What PAGEMAP_SCAN says of a page (include/uapi/linux/fs.h, PAGE_IS_*).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct PageIs: u64 {
        /// Under a userfaultfd in asynchronous write-protect mode.
        const WATCHED = 1;
        const FILE = 1 << 2;
        const PRESENT = 1 << 3;
        const SWAPPED = 1 << 4;
        const ZERO = 1 << 5;
        const HUGE = 1 << 6;
    }

    /// What PROCMAP_QUERY says of a mapping (include/uapi/linux/fs.h, PROCMAP_QUERY_VMA_*).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct MapFlags: u64 {
        const READ = 1;
        const WRITE = 1 << 1;
        const SHARED = 1 << 3;
    }
}

/// The result of a C call as rustix would have it.
fn check(result: libc::c_int) -> Result<libc::c_int, Errno> {
    if result >= 0 { Ok(result) } else { Err(last_error()) }
}

fn last_error() -> Errno {
    // SAFETY: __errno_location has no conditions and gives this thread's errno.
    let location = unsafe { libc::__errno_location() };
    // SAFETY: the location is valid for reads by this thread.
    Errno::from_raw_os_error(unsafe { location.read() })
}

fn ioctl<T>(fd: impl AsFd, request: libc::Ioctl, argument: &mut T) -> Result<libc::c_int, Errno> {
    // SAFETY: each request used in this file reads and writes one structure of type `T` at `argument`, and besides that
    // only buffers named in it, which its caller borrows for the call.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, std::ptr::from_mut(argument)) })
}

/// A userfaultfd for user-mode faults, from the system call.
pub(super) fn userfaultfd() -> Result<OwnedFd, Errno> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
    // SAFETY: userfaultfd(2) takes an integer and touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let fd = check(fd as libc::c_int)?;
    // SAFETY: the call just made gave this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A userfaultfd from an open /dev/userfaultfd.
pub(super) fn userfaultfd_from(device: impl AsFd) -> Result<OwnedFd, Errno> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
    // SAFETY: the argument of this request is an integer.
    let fd = check(unsafe { libc::ioctl(device.as_fd().as_raw_fd(), USERFAULTFD_IOC_NEW, flags) })?;
    // SAFETY: the call just made gave this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// Agrees on features. A userfaultfd that refused is of no further use.
pub(super) fn userfault_api(fd: impl AsFd, features: UserfaultFeatures) -> Result<(), Errno> {
    let mut argument = UffdioApi { api: UFFD_API, features: features.bits(), ioctls: 0 };
    ioctl(fd, UFFDIO_API, &mut argument).map(drop)
}

#[repr(C)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// Registers a range in write-protect mode.
pub(super) fn userfault_register(fd: impl AsFd, start: u64, len: u64) -> Result<(), Errno> {
    let mut argument = UffdioRegister { start, len, mode: UFFDIO_REGISTER_MODE_WP, ioctls: 0 };
    ioctl(fd, UFFDIO_REGISTER, &mut argument).map(drop)
}

/// Undoes [`userfault_register`].
pub(super) fn userfault_unregister(fd: impl AsFd, start: u64, len: u64) -> Result<(), Errno> {
    let mut argument = [start, len];
    ioctl(fd, UFFDIO_UNREGISTER, &mut argument).map(drop)
}

/// A run of pages alike, as PAGEMAP_SCAN reports it (struct page_region).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) categories: u64,
}

#[repr(C)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Reports the present pages of `[start, end)`: how many elements of `out` were filled, and where the walk ended, short
/// of `end` if `out` was too small.
pub(super) fn pagemap_scan(
    pagemap: impl AsFd,
    start: u64,
    end: u64,
    out: &mut [Region],
) -> Result<(usize, u64), Errno> {
    let mut argument = ScanArgument {
        size: size_of::<ScanArgument>() as u64,
        flags: 0,
        start,
        end,
        walk_end: 0,
        vec: out.as_mut_ptr().addr() as u64,
        vec_len: out.len() as u64,
        max_pages: 0,
        category_inverted: 0,
        category_mask: PageIs::PRESENT.bits(),
        category_anyof_mask: 0,
        return_mask: PageIs::all().bits(),
    };
    // The kernel writes through the address: make it known to the compiler that the buffer has left our hands.
    let _ = out.as_mut_ptr().expose_provenance();
    let filled = ioctl(pagemap, PAGEMAP_SCAN, &mut argument)?;
    Ok((filled as usize, argument.walk_end))
}

/// One mapping, as PROCMAP_QUERY reports it (struct procmap_query), without names.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct MapQuery {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) flags: u64,
    pub(super) page_size: u64,
    pub(super) offset: u64,
    pub(super) inode: u64,
    pub(super) dev_major: u32,
    pub(super) dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

/// The mapping that holds `at`, or the next one above it.
pub(super) fn procmap_query(maps: impl AsFd, at: u64) -> Result<Option<MapQuery>, Errno> {
    const COVERING_OR_NEXT: u64 = 0x10;
    let mut argument = MapQuery {
        size: size_of::<MapQuery>() as u64,
        query_flags: COVERING_OR_NEXT,
        query_addr: at,
        ..MapQuery::default()
    };
    match ioctl(maps, PROCMAP_QUERY, &mut argument) {
        Ok(_) => Ok(Some(argument)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// MADV_POPULATE_READ or MADV_POPULATE_WRITE: an error where a touch would raise a signal.
pub(super) fn populate(start: u64, len: u64, write: bool) -> Result<(), Errno> {
    let advice = if write { libc::MADV_POPULATE_WRITE } else { libc::MADV_POPULATE_READ };
    let at = std::ptr::with_exposed_provenance_mut(start as usize);
    // SAFETY: this advice faults pages in and changes no byte of them.
    check(unsafe { libc::madvise(at, len as usize, advice) }).map(drop)
}

/// Whether membarrier(2) offers the barrier that draining uses.
pub(super) fn has_membarrier() -> Result<bool, Errno> {
    // SAFETY: membarrier takes integers and touches no memory.
    let commands = unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_QUERY, 0, 0) };
    let commands = check(commands as libc::c_int)?;
    Ok(commands & libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED != 0)
}

/// Keeps all signals from this thread, for as long as it lives.
pub(super) fn block_signals() {
    // SAFETY: all zeroes is a signal set, which is filled next.
    let mut all: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: writes into the set.
    unsafe { libc::sigfillset(&raw mut all) };
    // SAFETY: reads the set; the old mask is not wanted.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut()) };
}
