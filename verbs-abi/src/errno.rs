//! How a function answers: what rdma-core's answers, with errno set on failure, and never a panic.
//!
//! Three conventions: most functions return the error number itself, those that make something return NULL, and a few
//! return -1.

use std::ffi::c_int;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// An error number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Errno(pub(crate) c_int);

impl Errno {
    pub(crate) const AGAIN: Self = Self(libc::EAGAIN);
    pub(crate) const BADF: Self = Self(libc::EBADF);
    pub(crate) const BUSY: Self = Self(libc::EBUSY);
    pub(crate) const FAULT: Self = Self(libc::EFAULT);
    pub(crate) const INVAL: Self = Self(libc::EINVAL);
    pub(crate) const IO: Self = Self(libc::EIO);
    pub(crate) const NODATA: Self = Self(libc::ENODATA);
    pub(crate) const NODEV: Self = Self(libc::ENODEV);
    pub(crate) const NOENT: Self = Self(libc::ENOENT);
    pub(crate) const NOMEM: Self = Self(libc::ENOMEM);
    pub(crate) const NOSYS: Self = Self(libc::ENOSYS);
    pub(crate) const NOTSUPP: Self = Self(libc::EOPNOTSUPP);
    pub(crate) const PERM: Self = Self(libc::EPERM);
}

impl From<std::io::Error> for Errno {
    fn from(error: std::io::Error) -> Self {
        Self(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

fn run<T>(body: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    // What a panic leaves half done belongs to one object; the panic hook has printed where.
    let outcome = catch_unwind(AssertUnwindSafe(body)).unwrap_or(Err(Errno::FAULT));
    outcome.inspect_err(|error| set(*error))
}

fn set(error: Errno) {
    errno::set_errno(errno::Errno(error.0));
}

/// The error number, or 0.
pub(crate) fn code(body: impl FnOnce() -> Result<(), Errno>) -> c_int {
    run(body).map_or_else(|error| error.0, |()| 0)
}

/// A pointer, or NULL and errno.
pub(crate) fn pointer<T>(body: impl FnOnce() -> Result<*mut T, Errno>) -> *mut T {
    run(body).unwrap_or(std::ptr::null_mut())
}

/// A number that is not negative, or -1 and errno.
pub(crate) fn minus_one<T: From<i8>>(body: impl FnOnce() -> Result<T, Errno>) -> T {
    run(body).unwrap_or_else(|_| T::from(-1))
}

/// A value, or `otherwise`.
pub(crate) fn value<T>(otherwise: T, body: impl FnOnce() -> Result<T, Errno>) -> T {
    run(body).unwrap_or(otherwise)
}
