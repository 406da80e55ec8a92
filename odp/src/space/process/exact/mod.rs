//! The exact rung: every call of this process that changes what is mapped is bracketed, as a kernel notifier brackets it.
//!
//! A seccomp filter hands those calls to a thread of ours, the supervisor, and the caller waits. The supervisor tells the
//! owners of the pages, waits for DMA to end, makes the call itself (it is a thread of the same process, so the call does
//! there what it would have done), retires the frames, and gives the caller the result. Between, no engine can reach the
//! pages and no fault can bring them back. (seccomp_unotify(2).)
//!
//! What goes through: munmap, mremap, mmap with MAP_FIXED, madvise that drops pages, mprotect, pkey_mprotect, brk, shmdt,
//! shmat with SHM_REMAP, remap_file_pages, process_madvise, ftruncate, truncate, and fallocate that takes pages away. What
//! does not, and is met as on the other rungs (a copy finds its memory gone, and the page is invalidated): io_uring, what
//! other processes do to a shared file, open(2) with O_TRUNC, and 32-bit system calls.
//!
//! # What it asks of its user
//!
//! * [`Exact::install`] is called while the process has one thread: in `main`, or before it. Threads that exist already
//!   could not be filtered, and a range that they unmap would not be seen.
//! * The filter cannot be taken off, and no set-user-ID program gains privileges below it (PR_SET_NO_NEW_PRIVS).
//! * Each such call costs some microseconds more, whatever it is about.
//!
//! # Children
//!
//! They inherit the filter. What a child does to memory of its own goes on as if there were none; a child that still
//! shares ours (vfork(2), posix_spawn(3)) is treated as this process. When this process execs, or ends and leaves children
//! behind, the supervisor is gone; a process of its own ([`guardian`]) then lets all their calls pass.
//!
//! # The supervisor must not wait for itself
//!
//! A call that it brackets may come from inside malloc. So, as the monitor, it does not allocate or free, takes no lock
//! that is held while doing so, and calls only notifier callbacks, which promise the same.

mod call;
mod filter;
mod guardian;
mod supervisor;
mod sys;

pub(super) use call::{Affected, Kind};
pub(super) use supervisor::{Attached, Bracket};

use hw_model::sync::OnceLock;
use rustix::io::Errno;
use std::fmt;
use supervisor::Supervisor;

/// The filter and supervisor of this process. Given to [`Options`](super::Options), it puts a process space on the exact
/// rung.
#[derive(Clone, Copy)]
pub struct Exact(&'static Supervisor);

/// Why the exact rung cannot be had. The process is as it was, but for [`InstallError::Filter`]: it has no-new-privileges
/// set then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InstallError {
    /// A thread that exists already cannot be filtered.
    #[error(
        "{threads} threads run already; install the exact rung first thing in main, before any other thread"
    )]
    Threads {
        /// How many there are.
        threads: usize,
    },
    /// It is installed already, by this process or by the one that it was forked from.
    #[error("the exact rung is installed already; a process has it once")]
    Installed,
    /// /proc, a pipe, a fork or a thread could not be had.
    #[error("{what}: {reason}")]
    System {
        /// What was wanted.
        what: &'static str,
        /// What the kernel said.
        reason: Errno,
    },
    /// The kernel or a container refuses the filter. It needs Linux 5.19, and no other supervisor of this process.
    #[error(
        "the kernel refused the seccomp filter: {reason}; it takes Linux 5.19, and no other supervisor above"
    )]
    Filter {
        /// What the kernel said: EBUSY if there is another supervisor, EINVAL if the kernel is older.
        reason: Errno,
    },
}

impl Exact {
    /// Installs the filter and starts the supervisor.
    ///
    /// # Errors
    /// See [`InstallError`].
    pub fn install() -> Result<Self, InstallError> {
        static INSTALLED: OnceLock<Result<Exact, InstallError>> = OnceLock::new();
        let mut first = false;
        let outcome = INSTALLED.get_or_init(|| {
            first = true;
            Supervisor::start().map(Exact)
        });
        if first { *outcome } else { outcome.and(Err(InstallError::Installed)) }
    }

    pub(super) fn attach(self, bracket: hw_model::sync::Arc<dyn Bracket>) -> Option<Attached> {
        self.0.attach(bracket)
    }

    /// Calls of this process that went through the supervisor so far.
    #[must_use]
    pub fn calls(self) -> u64 {
        self.0.calls()
    }
}

impl PartialEq for Exact {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self.0, other.0)
    }
}

impl Eq for Exact {}

impl fmt::Debug for Exact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exact").field("calls", &self.calls()).finish()
    }
}
