//! The price of a real pin.
//!
//! Unsafe island. Invariant: the range is mapped while it is pinned, and no request uses it.
#![allow(unsafe_code)]

use hw_model::addr::VirtRange;
use io_uring::IoUring;
use std::ffi::c_void;

/// Real pins: io_uring registered buffers.
pub struct RealPin(IoUring);

impl RealPin {
    /// `None` where io_uring is refused.
    #[must_use]
    pub fn new() -> Option<Self> {
        IoUring::new(2).ok().map(Self)
    }

    /// Pins and unpins the range; `false` if the kernel refuses (RLIMIT_MEMLOCK, mostly).
    #[must_use]
    pub fn pin(&self, range: VirtRange) -> bool {
        self.pinned(range) && self.unpinned()
    }

    /// Pins the range, until it is unpinned.
    pub(super) fn pinned(&self, range: VirtRange) -> bool {
        let buffer = libc::iovec { iov_base: range.start().0 as *mut c_void, iov_len: range.len() as usize };
        // SAFETY: the range stays mapped while it is pinned, and no request uses the buffer.
        unsafe { self.0.submitter().register_buffers(&[buffer]) }.is_ok()
    }

    pub(super) fn unpinned(&self) -> bool {
        self.0.submitter().unregister_buffers().is_ok()
    }
}
