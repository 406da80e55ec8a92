//! Keeping pages in memory: locks (mlock2(2)), and pins that the kernel holds for io_uring.
//!
//! Locks do not nest in the kernel, so the space counts them: a page is unlocked when the last lock on it ends. A program
//! that locks the same pages itself loses its lock then.
//!
//! A real pin is a buffer registered with an io_uring of its own (io_uring_register_buffers(3)): the kernel pins its pages for
//! long, charges them to RLIMIT_MEMLOCK of the user, and refuses what it would refuse a real region. It costs a descriptor.
//!
//! Unsafe island. Invariant: the calls here change no byte and no mapping. A buffer of these rings is never named by a request,
//! so the pin is all that it is; it keeps pages, not mappings, and may outlive those.
#![allow(unsafe_code)]

use super::coverage::Coverage;
use super::fork::Birth;
use super::mappings::{Mapping, Mappings, Source};
use crate::space::{PagePin, PinError, PinKind};
use hw_model::addr::{VirtAddr, VirtRange};
use hw_model::sync::{Arc, Mutex};
use io_uring::IoUring;
use rustix::io::Errno;
use rustix::mm::MlockFlags;
use rustix::process::Resource;
use rustix::thread::CapabilitySet;
use std::ffi::c_void;

/// The kernel registers no longer buffer (io_uring/rsrc.c, `io_buffer_validate`).
const LONGEST: u64 = 1 << 30;

/// The locks of one space.
pub(super) struct Locks {
    counts: Mutex<Coverage>,
    mappings: Arc<Mappings>,
    birth: Birth,
}

impl Locks {
    pub(super) fn new(mappings: Arc<Mappings>, birth: Birth) -> Arc<Self> {
        Arc::new(Self { counts: Mutex::new(Coverage::default()), mappings, birth })
    }

    /// Keeps `range` (whole pages).
    pub(super) fn pin(self: &Arc<Self>, range: VirtRange, kind: PinKind) -> Result<PagePin, PinError> {
        Ok(match kind {
            PinKind::Populated => PagePin::populated(),
            PinKind::Mlock => PagePin::new(kind, self.lock(range)?),
            PinKind::RealPin => PagePin::new(kind, RealPin::new(&self.mappings, range, self.birth)?),
        })
    }

    fn lock(self: &Arc<Self>, range: VirtRange) -> Result<Locked, PinError> {
        let mut counts = self.counts.lock();
        counts.add(range, |_| ());
        // All of it, also what is counted already: that may have been unmapped and mapped anew since.
        // SAFETY: locking changes no byte and takes no page away. Pages are locked as they come, so none is touched.
        match unsafe { rustix::mm::mlock_with(pointer(range), range.len() as usize, MlockFlags::ONFAULT) } {
            Ok(()) => Ok(Locked { locks: Arc::clone(self), range }),
            Err(errno) => {
                counts.remove(range, |part| self.unlock(part));
                let limited = || over_limit(PinKind::Mlock, range, status("VmLck:"));
                Err(limited().unwrap_or_else(|| refused(PinKind::Mlock, range, errno)))
            }
        }
    }

    fn unlock(&self, part: VirtRange) {
        if munlock(part).is_ok() {
            return;
        }
        // The kernel stops at the first hole: what is beyond it would stay locked.
        let mut at = part.start();
        while let Ok(Some(mapping)) = self.mappings.at_or_above(at)
            && let Some(piece) = mapping.range.intersection(part).filter(|piece| !piece.is_empty())
        {
            let _ = munlock(piece);
            at = piece.end();
        }
    }
}

/// A lock on pages.
struct Locked {
    locks: Arc<Locks>,
    range: VirtRange,
}

impl Drop for Locked {
    fn drop(&mut self) {
        // A child of fork(2) inherits no locks.
        if self.locks.birth.is_here() {
            self.locks.counts.lock().remove(self.range, |part| self.locks.unlock(part));
        }
    }
}

/// Pages that an io_uring pins.
struct RealPin {
    ring: IoUring,
    birth: Birth,
}

impl RealPin {
    fn new(mappings: &Mappings, range: VirtRange, birth: Birth) -> Result<Self, PinError> {
        let kind = PinKind::RealPin;
        let ring = IoUring::new(1).map_err(|error| match errno(&error) {
            errno @ (Errno::PERM | Errno::ACCESS | Errno::NOSYS) => {
                PinError::NoIoUring { reason: errno.to_string() }
            }
            errno => refused(kind, range, errno),
        })?;
        let buffers: Vec<libc::iovec> = (0..range.len().div_ceil(LONGEST))
            .map(|piece| {
                let start = range.start().offset(piece * LONGEST);
                let len = LONGEST.min(range.len() - piece * LONGEST);
                libc::iovec { iov_base: pointer_at(start), iov_len: len as usize }
            })
            .collect();
        // SAFETY: no request of this ring is ever made, so nothing reads or writes the buffers.
        match unsafe { ring.submitter().register_buffers(&buffers) } {
            Ok(()) => Ok(Self { ring, birth }),
            Err(error) => {
                let errno = errno(&error);
                let why = match errno {
                    Errno::NOMEM => over_limit(kind, range, status("VmPin:")),
                    _ => unpinnable(mappings, range),
                };
                Err(why.unwrap_or_else(|| refused(kind, range, errno)))
            }
        }
    }
}

impl Drop for RealPin {
    fn drop(&mut self) {
        // At once, not when the kernel gets to closing the ring; and a child of fork(2) must not end what its parent has.
        if self.birth.is_here() {
            let _ = self.ring.submitter().unregister_buffers();
        }
    }
}

fn pointer_at(at: VirtAddr) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(at.0 as usize)
}

fn pointer(range: VirtRange) -> *mut c_void {
    pointer_at(range.start())
}

fn munlock(range: VirtRange) -> Result<(), Errno> {
    // SAFETY: unlocking changes no byte and takes no page away.
    unsafe { rustix::mm::munlock(pointer(range), range.len() as usize) }
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

fn refused(kind: PinKind, range: VirtRange, errno: Errno) -> PinError {
    PinError::Refused { kind, range, reason: errno.to_string() }
}

/// Whether it was the limit that was in the way.
fn over_limit(kind: PinKind, range: VirtRange, held: u64) -> Option<PinError> {
    let limit = rustix::process::getrlimit(Resource::Memlock).current?;
    let exempt =
        rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
    let needed = range.len();
    // Others of the same user count for long-term pins, too, and their number is not told.
    let over = kind == PinKind::RealPin || needed.saturating_add(held) > limit;
    (over && !exempt).then_some(PinError::MemlockLimit { kind, needed, held, limit })
}

/// What in the range cannot be pinned for long.
fn unpinnable(mappings: &Mappings, range: VirtRange) -> Option<PinError> {
    let mut found = Vec::new();
    mappings.collect(range, &mut found).ok()?;
    let tracked = |mapping: &Mapping| mapping.shared && mapping.source == Source::File;
    let at = |mapping: &Mapping| mapping.range.start().max(range.start());
    found.iter().find_map(|mapping| match (mapping.writable, tracked(mapping)) {
        (false, _) => Some(PinError::NotWritable { at: at(mapping) }),
        (true, true) => Some(PinError::DirtyTracking { at: at(mapping) }),
        (true, false) => None,
    })
}

/// A line of /proc/self/status that is in KiB, in bytes; 0 if it is not to be had.
fn status(name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib =
        text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
