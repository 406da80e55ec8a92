//! The thread that makes the calls, and who brackets them.

use super::InstallError;
use super::call::{Affected, Kind};
use super::filter;
use super::guardian::Guardian;
use super::sys::{self, Answer, Kernel, Listener};
use crate::space::process::fork::{NotInChildren, close_in_children};
use crate::space::process::monitor::AbortOnPanic;
use hw_model::sync::atomic::{AtomicU64, Ordering};
use hw_model::sync::{Arc, OnceLock, RwLock, thread};
use rustix::event::EventfdFlags;
use rustix::fd::OwnedFd;
use rustix::io::Errno;

/// Name of the thread, as `top -H` and gdb show it.
const NAME: &str = "anypage-exact";
/// Process spaces that can be on the exact rung at a time.
const MAX_SPACES: usize = 8;

/// Who is told before pages go and after.
pub(in crate::space::process) trait Bracket: Send + Sync {
    /// Sees to it that no device reaches what is `affected`, makes the `call`, and lets devices in again. Neither allocates
    /// nor frees, nor waits for anyone who might.
    fn around(&self, kind: Kind, affected: Affected, call: &mut dyn FnMut());
}

pub(super) struct Supervisor {
    /// Rung once there is a listener, or will be none.
    ready: OwnedFd,
    listener: OnceLock<Listener>,
    /// Held for reading while a call is made: who attaches waits for calls that it would have missed half of.
    brackets: RwLock<[Option<Arc<dyn Bracket>>; MAX_SPACES]>,
    calls: AtomicU64,
    /// Not for use: the guardian waits for it to be closed, by the end of this process or an exec.
    guardian: OnceLock<NotInChildren>,
}

/// A bracket in force.
pub(in crate::space::process) struct Attached {
    supervisor: &'static Supervisor,
    index: usize,
}

impl Supervisor {
    /// Forks the guardian, starts the thread, installs the filter: in this order, since all of it is for this thread and
    /// what it makes afterwards.
    pub(super) fn start() -> Result<&'static Self, InstallError> {
        let system = |what| move |reason| InstallError::System { what, reason };
        let threads = sys::threads().map_err(system("/proc/self/task"))?;
        if threads != 1 {
            return Err(InstallError::Threads { threads });
        }
        let guardian = Guardian::fork()?;
        let ready = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).map_err(system("an eventfd"))?;
        let supervisor: &'static Self = Box::leak(Box::new(Self {
            ready,
            listener: OnceLock::new(),
            brackets: RwLock::new([const { None }; MAX_SPACES]),
            calls: AtomicU64::new(0),
            guardian: OnceLock::new(),
        }));
        let started = thread::Builder::new().name(NAME.into()).spawn(move || {
            // A signal handler of the application on this thread could free memory.
            super::super::sys::block_signals();
            let guard = AbortOnPanic;
            supervisor.run();
            drop(guard);
        });
        let started = started.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::AGAIN));
        drop(started.map_err(system("the supervisor's thread"))?);
        let program = filter::program();
        let installed = sys::install(&program);
        // Not a word to the allocator before somebody listens.
        if let Ok(listener) = installed {
            let first = supervisor.listener.set(listener);
            debug_assert!(first.is_ok(), "installed once");
        }
        let rung = rustix::io::write(&supervisor.ready, &1_u64.to_ne_bytes());
        debug_assert_eq!(rung, Ok(8));
        let listener = installed.map_err(|reason| InstallError::Filter { reason })?;
        close_in_children(listener.fd());
        let connection = guardian.hand_over(listener).map_err(system("a message to the guardian"))?;
        let first = supervisor.guardian.set(connection);
        debug_assert!(first.is_ok(), "installed once");
        Ok(supervisor)
    }

    pub(super) fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// From now on `bracket` is around every call. `None` if there is no room.
    pub(super) fn attach(&'static self, bracket: Arc<dyn Bracket>) -> Option<Attached> {
        let mut brackets = self.brackets.write();
        let index = brackets.iter().position(Option::is_none)?;
        brackets[index] = Some(bracket);
        Some(Attached { supervisor: self, index })
    }

    fn run(&self) {
        let mut ready = [0; 8];
        while rustix::io::read(&self.ready, &mut ready) == Err(Errno::INTR) {}
        let Some(&listener) = self.listener.get() else { return };
        sys::wake_at_once(listener);
        loop {
            // Its caller may be gone before it is taken.
            let Ok(call) = sys::receive(listener) else { continue };
            if !sys::is_ours(call.thread) {
                sys::answer(listener, &call, Answer::Pass);
                continue;
            }
            let made = self.make(&call.call);
            self.calls.fetch_add(1, Ordering::Relaxed);
            sys::answer(listener, &call, Answer::Made(made));
        }
    }

    fn make(&self, call: &super::call::Call) -> Result<i64, Errno> {
        let (kind, affected) = call.effect(&Kernel);
        let mut made = Err(Errno::INTR);
        let brackets = self.brackets.read();
        around(&brackets[..], kind, affected, &mut || made = sys::perform(call));
        made
    }
}

/// Makes `call` inside all of `brackets`.
fn around(brackets: &[Option<Arc<dyn Bracket>>], kind: Kind, affected: Affected, call: &mut dyn FnMut()) {
    match brackets {
        _ if affected == Affected::Nothing => call(),
        [] => call(),
        [None, inner @ ..] => around(inner, kind, affected, call),
        [Some(outer), inner @ ..] => {
            outer.around(kind, affected, &mut || around(inner, kind, affected, call));
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let bracket = self.supervisor.brackets.write()[self.index].take();
        drop(bracket);
    }
}
