//! Copying to and from memory that may vanish in the middle of the copy.
//!
//! Unsafe island. Invariant: user memory is only touched by the instructions between `anypage_odp_begin` and
//! `anypage_odp_end`, by integer address, never through a Rust reference; [`super::recover`] turns a fault of any of
//! them into a short count. The other side of each copy is a slice that the caller lends, or user memory too.
//!
//! These functions reach whatever is mapped at an address, as a write to /proc/self/mem does. That no Rust object lies
//! there is the promise of whoever exposes a raw range to devices (an `unsafe fn` further up), not of this file.
//!
//! What readers that poll memory rely on: messages of 1, 2, 4 and 8 bytes are one move; the last up to 8 bytes of a
//! longer one are one move after all others. In long copies the moves are of 16 bytes and in ascending order. They measure
//! faster than `rep movsb` for what is not in the cache, whatever the alignment, and as fast for what is; moves that bypass
//! the cache are faster still, and leave the receiver to fetch it all from memory.
#![allow(unsafe_code)]

use super::recover;
use hw_model::addr::{PAGE_SIZE, VirtAddr};
use hw_model::bus::{AtomicOp, CopyEnd};
use rustix::io::Errno;
use std::fmt;

#[cfg(target_arch = "x86_64")]
std::arch::global_asm!(
    r"
    .text
    .p2align 4
    .globl anypage_odp_begin, anypage_odp_copy, anypage_odp_fetch_add, anypage_odp_compare_swap, anypage_odp_end
    .globl anypage_odp_copy_end, anypage_odp_copy_landing, anypage_odp_atomic_landing
    .hidden anypage_odp_begin, anypage_odp_copy, anypage_odp_fetch_add, anypage_odp_compare_swap, anypage_odp_end
    .hidden anypage_odp_copy_end, anypage_odp_copy_landing, anypage_odp_atomic_landing

anypage_odp_begin:
    # (rdi: to, rsi: from, rdx: bytes) -> rax: bytes not copied (all of the block that faulted), rdx: address of the fault, 0 if none
    .type anypage_odp_copy, @function
anypage_odp_copy:
    .cfi_startproc
    lea     r8, [rdi + rdx]
    # r9: the last move, the largest of 8, 4, 2, 1 that fits
    mov     r9d, 8
    cmp     rdx, 8
    jae     20f
    mov     r9d, 4
    cmp     rdx, 4
    jae     20f
    mov     r9d, 2
    cmp     rdx, 2
    jae     20f
    mov     r9, rdx
20: # rcx: what comes before the last move
    mov     rcx, rdx
    sub     rcx, r9
    jz      50f
    cmp     rcx, 256
    jb      30f
    # to a multiple of 16 byte by byte, then 64 bytes a turn
24: test    dil, 15
    jz      26f
    mov     al, [rsi]
    mov     [rdi], al
    inc     rsi
    inc     rdi
    dec     rcx
    jmp     24b
    .p2align 4
26: movdqu  xmm0, [rsi]
    movdqu  xmm1, [rsi + 16]
    movdqu  xmm2, [rsi + 32]
    movdqu  xmm3, [rsi + 48]
    movdqa  [rdi], xmm0
    movdqa  [rdi + 16], xmm1
    movdqa  [rdi + 32], xmm2
    movdqa  [rdi + 48], xmm3
    add     rsi, 64
    add     rdi, 64
    sub     rcx, 64
    cmp     rcx, 64
    jae     26b
    test    rcx, rcx
    jz      50f
30: cmp     rcx, 8
    jb      40f
31: mov     rax, [rsi]
    mov     [rdi], rax
    add     rsi, 8
    add     rdi, 8
    sub     rcx, 8
    cmp     rcx, 8
    jae     31b
    test    rcx, rcx
    jz      50f
40: mov     al, [rsi]
    mov     [rdi], al
    inc     rsi
    inc     rdi
    dec     rcx
    jnz     40b
50: cmp     r9d, 8
    je      58f
    cmp     r9d, 4
    je      54f
    cmp     r9d, 2
    je      52f
    test    r9d, r9d
    jz      60f
    mov     al, [rsi]
    mov     [rdi], al
    jmp     60f
52: mov     ax, [rsi]
    mov     [rdi], ax
    jmp     60f
54: mov     eax, [rsi]
    mov     [rdi], eax
    jmp     60f
58: mov     rax, [rsi]
    mov     [rdi], rax
60: xor     eax, eax
    xor     edx, edx
    ret
anypage_odp_copy_landing:
    # rdi stands where the block of the faulting move begins; the handler has put the address of the fault into rdx
    mov     rax, r8
    sub     rax, rdi
    ret
    .cfi_endproc
    .size anypage_odp_copy, . - anypage_odp_copy
anypage_odp_copy_end:

    # (rdi: word, rsi: addend) -> rax: value before, rdx: 1 if it faulted
    .p2align 4
    .type anypage_odp_fetch_add, @function
anypage_odp_fetch_add:
    .cfi_startproc
    mov     rax, rsi
    lock xadd [rdi], rax
    xor     edx, edx
    ret
    .cfi_endproc
    .size anypage_odp_fetch_add, . - anypage_odp_fetch_add

    # (rdi: word, rsi: compare, rdx: swap) -> rax: value before, rdx: 1 if it faulted
    .p2align 4
    .type anypage_odp_compare_swap, @function
anypage_odp_compare_swap:
    .cfi_startproc
    mov     rax, rsi
    lock cmpxchg [rdi], rdx
    xor     edx, edx
    ret
anypage_odp_atomic_landing:
    mov     edx, 1
    ret
    .cfi_endproc
    .size anypage_odp_compare_swap, . - anypage_odp_compare_swap
anypage_odp_end:
"
);

/// What the copy routine leaves in rax and rdx.
#[cfg(target_arch = "x86_64")]
#[repr(C)]
struct Copied {
    left: usize,
    fault: usize,
}

/// What an atomic routine leaves in rax and rdx.
#[cfg(target_arch = "x86_64")]
#[repr(C)]
struct Atomic {
    before: u64,
    faulted: u64,
}

#[cfg(target_arch = "x86_64")]
unsafe extern "C" {
    fn anypage_odp_begin();
    fn anypage_odp_copy_end();
    fn anypage_odp_end();
    fn anypage_odp_copy_landing();
    fn anypage_odp_atomic_landing();
    fn anypage_odp_copy(to: usize, from: usize, bytes: usize) -> Copied;
    fn anypage_odp_fetch_add(word: usize, addend: u64) -> Atomic;
    fn anypage_odp_compare_swap(word: usize, compare: u64, swap: u64) -> Atomic;
}

/// Where to go on after a fault of the instruction at `at`, if it is one of the routines'. Called from a signal handler.
#[cfg(target_arch = "x86_64")]
pub(super) fn landing(at: usize) -> Option<usize> {
    let begin = anypage_odp_begin as *const () as usize;
    let copy_end = anypage_odp_copy_end as *const () as usize;
    let end = anypage_odp_end as *const () as usize;
    if at < begin || at >= end {
        None
    } else if at < copy_end {
        Some(anypage_odp_copy_landing as *const () as usize)
    } else {
        Some(anypage_odp_atomic_landing as *const () as usize)
    }
}

/// How bytes are moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyMethod {
    /// A short routine whose faults a signal handler turns into an error.
    Recover,
    /// process_vm_readv(2) and process_vm_writev(2): a system call a copy, and no atomics.
    SystemCall,
}

impl fmt::Display for CopyMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Recover => "routine with fault recovery",
            Self::SystemCall => "process_vm_readv and process_vm_writev, no atomics",
        })
    }
}

/// The memory stopped being reachable `copied` bytes from the beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Short {
    pub(super) copied: u64,
}

/// A copy that ended early: what is left from the beginning of the block that was under way, and the address that could
/// not be reached, if that is known.
struct Fault {
    left: usize,
    at: Option<usize>,
}

impl Fault {
    /// How far into `bytes` bytes from `start` the fault is, if it is there.
    fn inside(&self, start: usize, bytes: usize) -> Option<u64> {
        let at = self.at?.checked_sub(start)?;
        (at < bytes).then_some(at as u64)
    }

    /// The same for the only side that can fault.
    fn short(&self, start: usize, bytes: usize) -> Short {
        Short { copied: self.inside(start, bytes).unwrap_or((bytes - self.left) as u64) }
    }
}

/// The one way in this crate to touch memory that may vanish.
#[derive(Clone, Copy, Debug)]
pub(super) struct Copier {
    method: CopyMethod,
}

impl Copier {
    /// Readies `method` for this process.
    pub(super) fn new(method: CopyMethod) -> Result<Self, Errno> {
        match method {
            CopyMethod::Recover => recover::install()?,
            CopyMethod::SystemCall => {
                let (word, mut out) = ([0x5a_u8; 8], [0; 8]);
                system_copy(word.as_ptr().expose_provenance(), &mut Side::Read(&mut out))?;
            }
        }
        Ok(Self { method })
    }

    pub(super) fn method(self) -> CopyMethod {
        self.method
    }

    /// Copies out of user memory.
    pub(super) fn read(self, from: VirtAddr, out: &mut [u8]) -> Result<(), Short> {
        let bytes = out.len();
        match self.method {
            CopyMethod::Recover => {
                let to = out.as_mut_ptr().expose_provenance();
                copy(to, from.0 as usize, bytes).map_err(|fault| fault.short(from.0 as usize, bytes))
            }
            CopyMethod::SystemCall => short(bytes, system_copy(from.0 as usize, &mut Side::Read(out))),
        }
    }

    /// Copies into user memory.
    pub(super) fn write(self, to: VirtAddr, data: &[u8]) -> Result<(), Short> {
        let bytes = data.len();
        match self.method {
            CopyMethod::Recover => copy(to.0 as usize, data.as_ptr().expose_provenance(), bytes)
                .map_err(|fault| fault.short(to.0 as usize, bytes)),
            CopyMethod::SystemCall => short(bytes, system_copy(to.0 as usize, &mut Side::Write(data))),
        }
    }

    /// Copies from user memory to user memory. Says which end stopped it.
    pub(super) fn copy(self, from: VirtAddr, to: VirtAddr, bytes: usize) -> Result<(), (CopyEnd, Short)> {
        let (from, to) = (from.0 as usize, to.0 as usize);
        match self.method {
            CopyMethod::Recover => copy(to, from, bytes).map_err(|fault| match fault.inside(from, bytes) {
                Some(copied) => (CopyEnd::Source, Short { copied }),
                None => (CopyEnd::Target, fault.short(to, bytes)),
            }),
            CopyMethod::SystemCall => self.copy_through_buffer(from, to, bytes),
        }
    }

    fn copy_through_buffer(self, from: usize, to: usize, bytes: usize) -> Result<(), (CopyEnd, Short)> {
        let mut buffer = [0; PAGE_SIZE as usize];
        for done in (0..bytes).step_by(buffer.len()) {
            let part = &mut buffer[..(bytes - done).min(PAGE_SIZE as usize)];
            let at = |end| move |Short { copied }| (end, Short { copied: done as u64 + copied });
            self.read(VirtAddr((from + done) as u64), part).map_err(at(CopyEnd::Source))?;
            self.write(VirtAddr((to + done) as u64), part).map_err(at(CopyEnd::Target))?;
        }
        Ok(())
    }

    /// Performs `op` on the aligned word at `at`; the value before. `None` if it cannot be reached for writing, or if
    /// this way of copying has no atomics.
    pub(super) fn atomic(self, at: VirtAddr, op: AtomicOp) -> Option<u64> {
        debug_assert!(at.is_aligned(8));
        match self.method {
            CopyMethod::Recover => atomic(at.0 as usize, op),
            CopyMethod::SystemCall => None,
        }
    }
}

fn short(bytes: usize, copied: Result<usize, Errno>) -> Result<(), Short> {
    let copied = copied.unwrap_or(0);
    if copied == bytes { Ok(()) } else { Err(Short { copied: copied as u64 }) }
}

#[cfg(target_arch = "x86_64")]
fn copy(to: usize, from: usize, bytes: usize) -> Result<(), Fault> {
    // SAFETY: each side is a slice of `bytes` bytes that the callers in this file borrow for the call, or user memory, which
    // the routine may be handed at any address because faults in it are recovered (recover::install has succeeded before a
    // Copier with this method exists).
    let Copied { left, fault } = unsafe { anypage_odp_copy(to, from, bytes) };
    if left == 0 { Ok(()) } else { Err(Fault { left, at: (fault != 0).then_some(fault) }) }
}

/// The value before, or `None` if the word could not be reached.
#[cfg(target_arch = "x86_64")]
fn atomic(word: usize, op: AtomicOp) -> Option<u64> {
    let done = match op {
        // SAFETY: the routine takes any address; a fault in it is recovered. What is there is user memory, touched by a
        // locked instruction.
        AtomicOp::FetchAdd(addend) => unsafe { anypage_odp_fetch_add(word, addend) },
        // SAFETY: as above.
        AtomicOp::CompareSwap { compare, swap } => unsafe { anypage_odp_compare_swap(word, compare, swap) },
    };
    (done.faulted == 0).then_some(done.before)
}

/// No Copier with this method can be had.
#[cfg(not(target_arch = "x86_64"))]
fn atomic(_word: usize, _op: AtomicOp) -> Option<u64> {
    None
}

/// No Copier with this method can be had.
#[cfg(not(target_arch = "x86_64"))]
fn copy(_to: usize, _from: usize, bytes: usize) -> Result<(), Fault> {
    Err(Fault { left: bytes, at: None })
}

enum Side<'a> {
    Read(&'a mut [u8]),
    Write(&'a [u8]),
}

/// Bytes copied between this process's memory at `user` and a slice.
fn system_copy(user: usize, side: &mut Side<'_>) -> Result<usize, Errno> {
    let (pointer, len) = match side {
        Side::Read(out) => (out.as_mut_ptr(), out.len()),
        Side::Write(data) => (data.as_ptr().cast_mut(), data.len()),
    };
    let local = libc::iovec { iov_base: pointer.cast(), iov_len: len };
    let remote = libc::iovec { iov_base: std::ptr::with_exposed_provenance_mut(user), iov_len: len };
    // SAFETY: getpid has no conditions.
    let me = unsafe { libc::getpid() };
    let copied = match side {
        // SAFETY: the local side is a slice lent for the call; the kernel answers with an error or a short count where
        // the remote side cannot be reached.
        Side::Read(_) => unsafe { libc::process_vm_readv(me, &raw const local, 1, &raw const remote, 1, 0) },
        // SAFETY: as above; the local side is only read.
        Side::Write(_) => unsafe {
            libc::process_vm_writev(me, &raw const local, 1, &raw const remote, 1, 0)
        },
    };
    usize::try_from(copied).map_err(|_| {
        Errno::from_raw_os_error(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EFAULT))
    })
}
