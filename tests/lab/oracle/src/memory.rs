//! Memory that a device may read and write at any time: reached by copies only, never by a Rust reference.
//!
//! Invariant of this file: a [`Memory`] owns its range of addresses from its mapping until it is dropped, even where the
//! pages are taken away. Nothing else is ever mapped there, so a copy may fault but never touches anybody else's bytes.
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::ptr;

/// The size of a page here.
pub const PAGE: usize = 4096;

/// An anonymous private mapping.
pub struct Memory {
    base: *mut u8,
    len: usize,
}

impl Memory {
    /// Maps `pages` pages, none of them present, without huge ones: what is dropped is then exactly what was asked.
    pub fn new(pages: usize) -> io::Result<Self> {
        let len = pages * PAGE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a mapping at an address of the kernel's choice replaces nothing.
        let base =
            unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = Self { base: base.cast(), len };
        memory.advise(0..len, libc::MADV_NOHUGEPAGE)?;
        Ok(memory)
    }

    /// Maps `pages` pages of a file in memory: what is dropped from the page table comes back as it was.
    pub fn shared(pages: usize) -> io::Result<Self> {
        let len = pages * PAGE;
        // SAFETY: the name is a string, and the result is checked.
        let fd = unsafe { libc::memfd_create(c"rxe-end".as_ptr(), libc::MFD_CLOEXEC) };
        succeeded(fd.min(0))?;
        // SAFETY: an open file of ours.
        let sized = succeeded(unsafe { libc::ftruncate(fd, len as i64) });
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a mapping at an address of the kernel's choice replaces nothing.
        let base = unsafe { libc::mmap(ptr::null_mut(), len, protection, libc::MAP_SHARED, fd, 0) };
        let mapped = if base == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) };
        // SAFETY: the mapping keeps the file; the number is not used again.
        unsafe { libc::close(fd) };
        sized.and(mapped)?;
        Ok(Self { base: base.cast(), len })
    }

    /// The address of the first byte.
    pub fn address(&self) -> u64 {
        self.base.expose_provenance() as u64
    }

    /// Bytes mapped.
    pub fn bytes(&self) -> usize {
        self.len
    }

    /// Copies bytes in.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let to = self.at(offset..offset + bytes.len());
        for (index, byte) in bytes.iter().enumerate() {
            // SAFETY: `at` checked the range; a volatile access may race with the device.
            unsafe { to.add(index).write_volatile(*byte) }
        }
    }

    /// Copies bytes out.
    pub fn read(&self, range: Range<usize>) -> Vec<u8> {
        let from = self.at(range.clone());
        // SAFETY: as in `write`.
        (0..range.len()).map(|index| unsafe { from.add(index).read_volatile() }).collect()
    }

    /// Gives pages back to the kernel: the next touch finds zeros.
    pub fn drop_pages(&self, range: Range<usize>) -> io::Result<()> {
        self.advise(range, libc::MADV_DONTNEED)
    }

    /// Makes pages read-only, or writable again.
    pub fn protect(&self, range: Range<usize>, writable: bool) -> io::Result<()> {
        let protection = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        // SAFETY: the range is ours; only copies rely on its being writable, and they may fault.
        succeeded(unsafe { libc::mprotect(self.at(range.clone()).cast(), range.len(), protection) })
    }

    /// Takes the pages away and leaves the addresses reserved: a device finds no memory there. A copy from or to the range
    /// would now end the process.
    pub fn make_inaccessible(&self, range: Range<usize>) -> io::Result<()> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let at = self.at(range.clone()).cast();
        // SAFETY: the range is ours, and stays so: an inaccessible mapping takes its place.
        let base = unsafe { libc::mmap(at, range.len(), libc::PROT_NONE, flags, -1, 0) };
        if base == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn advise(&self, range: Range<usize>, advice: i32) -> io::Result<()> {
        // SAFETY: the range is ours, and whoever reads it is prepared for zeros.
        succeeded(unsafe { libc::madvise(self.at(range.clone()).cast(), range.len(), advice) })
    }

    fn at(&self, range: Range<usize>) -> *mut u8 {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} is outside {} bytes", self.len);
        self.base.wrapping_add(range.start)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and regions over it hold it alive.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

fn succeeded(code: i32) -> io::Result<()> {
    if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
