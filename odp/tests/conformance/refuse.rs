//! A process that is refused what the stronger rungs are made of, as in many containers.
//!
//! Unsafe island. Invariant: nothing is changed but which system calls this process may make from now on.
#![allow(unsafe_code)]

/// From now on this process is refused userfaultfd, by its call and by its device, and any further filter.
pub fn userfaultfd_and_seccomp() -> std::io::Result<()> {
    /// _IO(0xAA, 0), `USERFAULTFD_IOC_NEW`.
    const NEW: u32 = 0xaa00;
    calls(&[libc::SYS_userfaultfd, libc::SYS_seccomp], Some(NEW))
}

/// From now on this thread, and those that it makes, are refused these system calls, and this request of ioctl.
pub fn calls(numbers: &[libc::c_long], request: Option<u32>) -> std::io::Result<()> {
    const X86_64: u32 = 0xc000_003e;
    let load = |offset| step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset);
    let is = |value, yes, no| step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, yes, no, value);
    let give = |action| step(libc::BPF_RET | libc::BPF_K, 0, 0, action);
    let refusing = numbers.len() as u8 + if request.is_some() { 3 } else { 0 };
    let mut program = vec![load(4), is(X86_64, 0, 1 + refusing), load(0)];
    // Each jumps over what is left of them, and over the permission.
    program.extend(numbers.iter().zip(1..).map(|(number, nth)| is(*number as u32, refusing - nth + 1, 0)));
    if let Some(request) = request {
        program.extend([is(libc::SYS_ioctl as u32, 0, 2), load(24), is(request, 1, 0)]);
    }
    program.push(give(libc::SECCOMP_RET_ALLOW));
    program.push(give(libc::SECCOMP_RET_ERRNO | libc::EPERM as u32));
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
