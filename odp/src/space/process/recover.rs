//! The handler of SIGSEGV and SIGBUS that makes the copy routine's faults into errors, and nobody else's.
//!
//! Unsafe island. Invariant: the handler touches only its own statics and the interrupted context, makes only
//! async-signal-safe calls, and leaves every fault outside the copy routine to whoever handled it before us.
//!
//! Installed once a process and never removed: a library that later installs its own handler and chains to ours must
//! find ours in place. A program that replaces the handler without chaining takes the recovery away (as Rust's own does
//! when somebody sends the process a SIGSEGV); a copy from memory that vanished then ends as any stray access does.
#![allow(unsafe_code)]

use hw_model::sync::OnceLock;
use hw_model::sync::atomic::{AtomicBool, Ordering};
use rustix::io::Errno;

/// Installs the handlers, the first time. Later calls give the first call's answer.
pub(super) fn install() -> Result<(), Errno> {
    static OUTCOME: OnceLock<Result<(), Errno>> = OnceLock::new();
    *OUTCOME.get_or_init(install_both)
}

#[cfg(not(target_arch = "x86_64"))]
fn install_both() -> Result<(), Errno> {
    Err(Errno::NOSYS)
}

#[cfg(target_arch = "x86_64")]
fn install_both() -> Result<(), Errno> {
    SEGV.install()?;
    BUS.install()
}

/// What handled a signal before us.
struct Previous {
    signal: libc::c_int,
    action: std::cell::UnsafeCell<libc::sigaction>,
    /// The action had SA_RESETHAND and has been called once.
    spent: AtomicBool,
}

// SAFETY: `action` is written by `install` before the handler that reads it is in place, and never after.
unsafe impl Sync for Previous {}

static SEGV: Previous = Previous::of(libc::SIGSEGV);
static BUS: Previous = Previous::of(libc::SIGBUS);

fn checked(result: libc::c_int) -> Result<(), Errno> {
    if result == 0 {
        return Ok(());
    }
    Err(Errno::from_raw_os_error(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)))
}

impl Previous {
    const fn of(signal: libc::c_int) -> Self {
        // SAFETY: all zeroes is a sigaction: SIG_DFL, no flags, empty mask.
        let action = unsafe { std::mem::zeroed() };
        Self { signal, action: std::cell::UnsafeCell::new(action), spent: AtomicBool::new(false) }
    }

    #[cfg(target_arch = "x86_64")]
    fn install(&'static self) -> Result<(), Errno> {
        // SAFETY: asks for the present action; called once, by `install`, before anyone reads `action`.
        checked(unsafe { libc::sigaction(self.signal, std::ptr::null(), self.action.get()) })?;
        // SAFETY: written just above, and by nobody else.
        let previous = unsafe { self.action.get().read() };
        let mut ours = previous;
        ours.sa_sigaction = on_fault as *const () as usize;
        // The mask and the flags that change how the chained handler runs are the previous handler's own.
        ours.sa_flags = libc::SA_SIGINFO
            | libc::SA_ONSTACK
            | (previous.sa_flags & (libc::SA_NODEFER | libc::SA_RESTART | libc::SA_NOCLDSTOP));
        // SAFETY: `on_fault` has the signature that SA_SIGINFO asks for and meets the conditions of a handler.
        checked(unsafe { libc::sigaction(self.signal, &raw const ours, std::ptr::null_mut()) })
    }

    /// Does what would have happened had we never been there. Runs in the signal handler.
    fn chain(&self, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
        // SAFETY: written before the handler was installed and never since.
        let previous = unsafe { self.action.get().read() };
        // SAFETY: the kernel hands a valid siginfo to the handler, which hands it on.
        let from_kernel = unsafe { (*info).si_code } > 0;
        let spent = previous.sa_flags & libc::SA_RESETHAND != 0 && self.spent.swap(true, Ordering::Relaxed);
        match previous.sa_sigaction {
            // A fault of the processor cannot be ignored: the kernel kills then too (force_sig_info_to_task).
            libc::SIG_IGN if !from_kernel => {}
            libc::SIG_DFL | libc::SIG_IGN => self.default_action(from_kernel),
            _ if spent => self.default_action(from_kernel),
            handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
                // SAFETY: whoever installed it with SA_SIGINFO gave a function of this type.
                let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                    unsafe { std::mem::transmute(handler) };
                handler(self.signal, info, context);
            }
            handler => {
                // SAFETY: whoever installed it without SA_SIGINFO gave a function of this type.
                let handler: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(handler) };
                handler(self.signal);
            }
        }
    }

    /// Puts the default action back. A faulting instruction faults again when we return; a signal that was sent is sent
    /// again, and delivered when the handler's mask is lifted.
    fn default_action(&self, from_kernel: bool) {
        // SAFETY: all zeroes is SIG_DFL with no flags and an empty mask.
        let default: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: async-signal-safe; the structure lives through the call.
        unsafe { libc::sigaction(self.signal, &raw const default, std::ptr::null_mut()) };
        if !from_kernel {
            // SAFETY: async-signal-safe.
            unsafe { libc::raise(self.signal) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
extern "C" fn on_fault(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel hands a valid siginfo to an SA_SIGINFO handler.
    let from_kernel = unsafe { (*info).si_code } > 0;
    let machine = context.cast::<libc::ucontext_t>();
    // SAFETY: and a valid context, ours until we return; the register array is long enough for REG_RIP.
    let at = unsafe { &raw mut (*machine).uc_mcontext.gregs[libc::REG_RIP as usize] };
    // SAFETY: points into that context.
    let instruction = unsafe { at.read() } as usize;
    if from_kernel && let Some(landing) = super::copy::landing(instruction) {
        // SAFETY: valid, as above, and ours until we return.
        let info = unsafe { &*info };
        // SAFETY: the kernel fills si_addr in for SIGSEGV and SIGBUS of its own.
        let address = unsafe { info.si_addr() }.expose_provenance();
        // SAFETY: as for REG_RIP; the routines use rdx for nothing that outlives a fault, and their landing pads expect it there.
        let rdx = unsafe { &raw mut (*machine).uc_mcontext.gregs[libc::REG_RDX as usize] };
        // SAFETY: points into that context.
        unsafe { rdx.write(address as i64) };
        // SAFETY: points into that context; the landing pad returns from the routine as its end does.
        unsafe { at.write(landing as i64) };
        return;
    }
    // SAFETY: __errno_location has no conditions and gives this thread's errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: valid for this thread.
    let before = unsafe { errno.read() };
    let previous = if signal == libc::SIGBUS { &BUS } else { &SEGV };
    previous.chain(info, context);
    // SAFETY: valid for this thread.
    unsafe { errno.write(before) };
}
