//! membarrier(2): one barrier on every running thread of this process.
//!
//! Unsafe island. Invariant: the only system call made here is membarrier with flags 0, which reads and writes no memory
//! of ours.
#![allow(unsafe_code)]

#[cfg(all(target_os = "linux", not(any(loom, shuttle, miri))))]
fn membarrier(command: libc::c_int) -> bool {
    // SAFETY: membarrier takes two integers and touches no user memory.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
}

/// Announces that this process will use [`process_wide`]. False where the kernel has no such barrier; then both sides
/// must fence.
pub(super) fn register() -> bool {
    #[cfg(all(target_os = "linux", not(any(loom, shuttle, miri))))]
    {
        membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED)
    }
    #[cfg(not(all(target_os = "linux", not(any(loom, shuttle, miri)))))]
    {
        false
    }
}

/// A full barrier on every thread of this process. [`register`] must have said yes.
pub(super) fn process_wide() {
    #[cfg(all(target_os = "linux", not(any(loom, shuttle, miri))))]
    assert!(membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED), "membarrier refused after it was registered");
}
