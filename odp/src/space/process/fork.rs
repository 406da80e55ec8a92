//! What a forked child must not inherit.
//!
//! Unsafe island. Invariant: the handler that runs in a forked child touches only this file's atomics and calls close(2).
//!
//! A child has the parent's userfaultfd but not the monitor thread that reads it. It must not keep the descriptor: the
//! parent's close would then not release callers that wait for an event to be read. So a child closes it, and a process
//! space that was opened before the fork is of no use in it ([`Birth::is_here`]). Children made by a bare clone(2) do
//! not run handlers; they get rid of the descriptor when they exec.
#![allow(unsafe_code)]

use hw_model::sync::OnceLock;
use hw_model::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Process spaces that can be open at a time and still be closed in a child.
const MAX_TRACKED: usize = 64;
const FREE: i32 = -1;

static FORKS: AtomicU64 = AtomicU64::new(0);
static OPEN: [AtomicI32; MAX_TRACKED] = [const { AtomicI32::new(FREE) }; MAX_TRACKED];

/// The process that something was made in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Birth(u64);

impl Birth {
    /// This process.
    pub(super) fn now() -> Self {
        static INSTALLED: OnceLock<()> = OnceLock::new();
        INSTALLED.get_or_init(|| {
            // SAFETY: the handler meets the conditions of the invariant above. Should there be no memory to note it, a
            // child keeps what it inherits.
            let _ = unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
        });
        Self(FORKS.load(Ordering::Relaxed))
    }

    /// Whether this is the process still, not a child forked since.
    pub(super) fn is_here(self) -> bool {
        self.0 == FORKS.load(Ordering::Relaxed)
    }
}

unsafe extern "C" fn in_child() {
    FORKS.fetch_add(1, Ordering::Relaxed);
    for slot in &OPEN {
        let fd = slot.swap(FREE, Ordering::Relaxed);
        if fd != FREE {
            // SAFETY: the descriptor was open in the parent under this number, so it is in the child, and whoever owns
            // it there finds out by Birth::is_here and leaves it alone.
            unsafe { libc::close(fd) };
        }
    }
}

/// Notes `fd` as one that a forked child closes at once; `None` if too many are noted.
fn track(fd: BorrowedFd<'_>) -> Option<&'static AtomicI32> {
    let number = fd.as_raw_fd();
    OPEN.iter().find(|slot| slot.compare_exchange(FREE, number, Ordering::Relaxed, Ordering::Relaxed).is_ok())
}

/// Has a forked child close `fd` at once, which this process keeps for good.
pub(super) fn close_in_children(fd: BorrowedFd<'static>) {
    let _ = Birth::now();
    track(fd);
}

/// A descriptor that a forked child closes at once.
#[derive(Debug)]
pub(super) struct NotInChildren {
    fd: Option<OwnedFd>,
    slot: Option<&'static AtomicI32>,
    birth: Birth,
}

impl NotInChildren {
    pub(super) fn new(fd: OwnedFd) -> Self {
        let birth = Birth::now();
        Self { slot: track(fd.as_fd()), fd: Some(fd), birth }
    }

    pub(super) fn fd(&self) -> &OwnedFd {
        self.fd.as_ref().expect("taken only by drop")
    }
}

impl Drop for NotInChildren {
    fn drop(&mut self) {
        if !self.birth.is_here() {
            // Closed by the handler; the number may be somebody else's by now.
            std::mem::forget(self.fd.take());
            return;
        }
        if let Some(slot) = self.slot {
            slot.store(FREE, Ordering::Relaxed);
        }
    }
}
