//! A BAR of a device, mapped into this process: its registers.
//!
//! Unsafe island. Invariant: the mapping is made and unmapped here and lives as long as the [`Bar`]; no Rust reference to
//! it is ever made, every access is volatile, of one register, aligned, and inside.
#![allow(unsafe_code)]

use rustix::fd::AsFd;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use std::ptr::NonNull;

/// The registers of one BAR.
///
/// Accesses are volatile: as many as are written, in the order written. On x86 a store to memory that comes before a
/// register write is seen by the device before it.
#[derive(Debug)]
pub struct Bar {
    base: NonNull<u8>,
    len: u64,
}

// SAFETY: the mapping belongs to the process, and volatile accesses of registers need no exclusion in Rust's eyes; what
// they mean to the device is the driver's concern.
unsafe impl Send for Bar {}
// SAFETY: as above.
unsafe impl Sync for Bar {}

macro_rules! register {
    ($read:ident, $write:ident, $type:ty) => {
        /// Reads the register at `offset`.
        ///
        /// # Panics
        /// If it is not inside or not aligned.
        #[must_use]
        pub fn $read(&self, offset: u64) -> $type {
            let at = self.register::<$type>(offset);
            // SAFETY: `register` gives an aligned address inside the mapping, which lives as long as this.
            unsafe { at.read_volatile() }
        }

        /// Writes the register at `offset`.
        ///
        /// # Panics
        /// If it is not inside or not aligned.
        pub fn $write(&self, offset: u64, value: $type) {
            let at = self.register::<$type>(offset);
            // SAFETY: as for reading; the mapping is writable.
            unsafe { at.write_volatile(value) }
        }
    };
}

impl Bar {
    /// Maps `len` bytes of `device` at `offset` of its file.
    pub(super) fn map(device: impl AsFd, offset: u64, len: u64) -> Result<Self, Errno> {
        let bytes = usize::try_from(len).map_err(|_| Errno::NOMEM)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel finds room replaces nothing.
        let base = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, device, offset)
        }?;
        Ok(Self { base: NonNull::new(base.cast()).ok_or(Errno::FAULT)?, len })
    }

    /// Bytes of the BAR.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a BAR that is not there has no Bar")]
    pub fn len(&self) -> u64 {
        self.len
    }

    fn register<T>(&self, offset: u64) -> *mut T {
        let size = size_of::<T>() as u64;
        let inside = offset.checked_add(size).is_some_and(|end| end <= self.len);
        assert!(
            inside && offset.is_multiple_of(size),
            "no register of {size} bytes at {offset:#x} of a BAR of {:#x}",
            self.len
        );
        // SAFETY: the offset is inside the mapping.
        unsafe { self.base.add(offset as usize) }.cast().as_ptr()
    }

    register!(read32, write32, u32);
    register!(read64, write64, u64);
}

impl Drop for Bar {
    fn drop(&mut self) {
        // SAFETY: mapped by this with this length; nothing refers to it any more.
        let left = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len as usize) };
        debug_assert!(left.is_ok(), "{left:?}");
    }
}
