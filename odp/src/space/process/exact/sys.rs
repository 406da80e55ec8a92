//! The system calls of the exact rung.
//!
//! Unsafe island. Invariant: besides asking the kernel, only [`perform`] changes anything, and what it does a thread of
//! this process has asked for, with the arguments that it gave, and waits for.
#![allow(unsafe_code)]

use super::call::{Ask, Call};
use libc::{c_int, c_long};
use rustix::fd::{AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use rustix::io::Errno;

/// A call that waits for its answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Notification {
    id: u64,
    /// The thread that made it.
    pub(super) thread: c_int,
    pub(super) call: Call,
}

/// What its caller gets.
#[derive(Clone, Copy, Debug)]
pub(super) enum Answer {
    /// The call goes on as if nobody had looked.
    Pass,
    /// The call was made; this came of it.
    Made(Result<i64, Errno>),
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

fn check(result: c_long) -> Result<c_long, Errno> {
    if result >= 0 { Ok(result) } else { Err(last_error()) }
}

/// Where supervised calls come from. Never closed by the process that has it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Listener(c_int);

impl Listener {
    /// Keeps `listener` open for good.
    pub(super) fn keep(listener: OwnedFd) -> Self {
        Self(listener.into_raw_fd())
    }

    pub(super) fn fd(self) -> BorrowedFd<'static> {
        // SAFETY: it is open, and never closed.
        unsafe { BorrowedFd::borrow_raw(self.0) }
    }
}

/// Filters this thread, and what it makes from now on, by `program`. Does not allocate: nobody listens yet.
pub(super) fn install(program: &[libc::sock_filter]) -> Result<Listener, Errno> {
    // SAFETY: this option takes integers, and touches no memory.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())?;
    let mut filter = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(|_| Errno::TOOBIG)?,
        filter: program.as_ptr().cast_mut(),
    };
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    // SAFETY: the program outlives the call, which copies it and writes nothing.
    let fd =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw mut filter) };
    Ok(Listener(check(fd)? as c_int))
}

/// Lets the kernel hand the processor from caller to supervisor and back (Linux 6.6). Where it cannot, calls take longer.
pub(super) fn wake_at_once(listener: Listener) {
    const SYNC_WAKE_UP: libc::c_ulong = 1;
    // SAFETY: the argument of this request is an integer.
    let _ = unsafe { libc::ioctl(listener.0, libc::SECCOMP_IOCTL_NOTIF_SET_FLAGS, SYNC_WAKE_UP) };
}

/// Waits for a call.
///
/// # Errors
/// `NOENT` if its caller was killed before it was taken, `INTR`.
pub(super) fn receive(listener: Listener) -> Result<Notification, Errno> {
    // SAFETY: all zeroes is a notification, and the kernel asks for one that is.
    let mut taken: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    // SAFETY: writes one notification, of the size that the request says.
    check(unsafe { libc::ioctl(listener.0, libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut taken) }.into())?;
    let call = Call { number: taken.data.nr.into(), arguments: taken.data.args };
    Ok(Notification { id: taken.id, thread: taken.pid as c_int, call })
}

/// Answers a call. A caller that was killed meanwhile is not told, and need not be.
pub(super) fn answer(listener: Listener, notification: &Notification, answer: Answer) {
    let (val, error, flags) = match answer {
        Answer::Pass => (0, 0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32),
        Answer::Made(Ok(value)) => (value, 0, 0),
        Answer::Made(Err(error)) => (0, -error.raw_os_error(), 0),
    };
    let mut response = libc::seccomp_notif_resp { id: notification.id, val, error, flags };
    // SAFETY: reads one response, of the size that the request says.
    let _ = unsafe { libc::ioctl(listener.0, libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut response) };
}

/// Makes a call for the thread that waits for it.
pub(super) fn perform(call: &Call) -> Result<i64, Errno> {
    let [a, b, c, d, e, f] = call.arguments;
    // SAFETY: a thread of this process, or one that shares its memory, has made this call; whether it may is decided
    // there, and it does here what it would have done there.
    check(unsafe { libc::syscall(call.number, a, b, c, d, e, f) })
}

/// Whether a thread is one of this process, or of another that shares its memory.
pub(super) fn is_ours(thread: c_int) -> bool {
    const KCMP_VM: c_int = 1;
    // SAFETY: takes no argument and touches no memory.
    let process = unsafe { libc::getpid() };
    // SAFETY: signal 0 is sent to nobody: it asks whether the thread is there.
    if unsafe { libc::syscall(libc::SYS_tgkill, process, thread, 0) } == 0 {
        return true;
    }
    // SAFETY: kcmp takes integers and touches no memory. Where it is refused, the thread counts as a stranger's.
    unsafe { libc::syscall(libc::SYS_kcmp, process, thread, KCMP_VM, 0, 0) == 0 }
}

/// The kernel, about this process.
pub(super) struct Kernel;

impl Ask for Kernel {
    fn heap_end(&self) -> u64 {
        // SAFETY: an address that the heap cannot end at asks where it does.
        (unsafe { libc::syscall(libc::SYS_brk, 0) }) as u64
    }

    fn inode(&self, fd: u64) -> Option<u64> {
        // SAFETY: all zeroes is a stat structure.
        let mut found: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: writes one such structure; a number that is no open descriptor is an error.
        let result = unsafe { libc::fstat(fd as c_int, &raw mut found) };
        (result == 0).then_some(found.st_ino)
    }

    fn inode_of_path(&self, path: u64) -> Option<u64> {
        // SAFETY: all zeroes is a stat structure.
        let mut found: libc::stat = unsafe { std::mem::zeroed() };
        let path = std::ptr::with_exposed_provenance::<libc::c_char>(path as usize);
        // SAFETY: writes one such structure. The kernel reads the path from our memory, where its caller has it, and a
        // pointer to nothing is an error.
        let result = unsafe { libc::syscall(libc::SYS_stat, path, &raw mut found) };
        (result == 0).then_some(found.st_ino)
    }
}

/// Threads of this process.
pub(super) fn threads() -> Result<usize, Errno> {
    let tasks = std::fs::read_dir("/proc/self/task");
    Ok(tasks.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?.count())
}

/// Forks a process that has one thread: the child's number, or `None` in the child.
///
/// # Errors
/// `BUSY` if there are more threads, and what fork(2) says.
pub(super) fn fork_alone() -> Result<Option<c_int>, Errno> {
    if threads()? != 1 {
        return Err(Errno::BUSY);
    }
    // SAFETY: with one thread, a child has all there is.
    let child = check(unsafe { libc::fork() }.into())? as c_int;
    Ok((child > 0).then_some(child))
}

/// Waits for the end of a child, and whether it ended well.
pub(super) fn ended_well(child: c_int) -> bool {
    let mut status = 0;
    loop {
        // SAFETY: writes one integer.
        let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
        if waited == child {
            return status == 0;
        }
        if last_error() != Errno::INTR {
            return false;
        }
    }
}

/// Leaves everything of the process that was forked: its session, its directory, its descriptors but `keep`.
pub(super) fn leave_all_but(keep: BorrowedFd<'_>) {
    let kept = keep.as_raw_fd() as u32;
    // SAFETY: takes no argument.
    let _ = unsafe { libc::setsid() };
    // SAFETY: reads a string that ends with a zero.
    let _ = unsafe { libc::chdir(c"/".as_ptr()) };
    // SAFETY: as above; the name is for people.
    let _ = unsafe { libc::prctl(libc::PR_SET_NAME, c"anypage-guard".as_ptr()) };
    for (first, last) in [(0, kept.wrapping_sub(1)), (kept + 1, u32::MAX)] {
        if kept > 0 || first > 0 {
            // SAFETY: nothing in this process, which is a copy made for one purpose, uses them.
            let _ = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    }
}

/// Ends this process at once.
pub(super) fn exit(status: c_int) -> ! {
    // SAFETY: never returns, and runs no handler of the process that this one was forked from.
    unsafe { libc::_exit(status) }
}
