//! A process that is refused what the stronger rungs are made of, as in many containers.
//!
//! Unsafe island. Invariant: nothing is changed but which system calls this process may make from now on.
#![allow(unsafe_code)]

/// From now on this process is refused userfaultfd, by its call and by its device, and any further filter.
pub fn userfaultfd_and_seccomp() -> std::io::Result<()> {
    const X86_64: u32 = 0xc000_003e;
    /// _IO(0xAA, 0), `USERFAULTFD_IOC_NEW`.
    const NEW: u32 = 0xaa00;
    let load = |offset| step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset);
    let is = |value, yes, no| step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, yes, no, value);
    let give = |action| step(libc::BPF_RET | libc::BPF_K, 0, 0, action);
    let program = [
        load(4),
        is(X86_64, 0, 6),
        load(0),
        is(libc::SYS_userfaultfd as u32, 5, 0),
        is(libc::SYS_seccomp as u32, 4, 0),
        is(libc::SYS_ioctl as u32, 0, 2),
        load(24),
        is(NEW, 1, 0),
        give(libc::SECCOMP_RET_ALLOW),
        give(libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // SAFETY: this option takes integers, and touches no memory.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the kernel copies the program, which outlives the call.
    if unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

fn step(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}
