//! Which system calls go to the supervisor, as a classic BPF program (seccomp(2), `struct seccomp_data`).

use libc::sock_filter;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;
/// AUDIT_ARCH_X86_64 (include/uapi/linux/audit.h). What calls by another convention passes.
const X86_64: u32 = 0xc000_003e;

/// Advice that takes pages away or makes them inaccessible (include/uapi/asm-generic/mman-common.h).
pub(super) const DROPPING_ADVICE: [u32; 7] = [
    libc::MADV_DONTNEED as u32,
    libc::MADV_FREE as u32,
    libc::MADV_REMOVE as u32,
    libc::MADV_HWPOISON as u32,
    MADV_DONTNEED_LOCKED,
    MADV_GUARD_INSTALL,
    MADV_GUARD_REMOVE,
];
const MADV_DONTNEED_LOCKED: u32 = 24;
const MADV_GUARD_INSTALL: u32 = 102;
const MADV_GUARD_REMOVE: u32 = 103;

/// Modes of fallocate(2) that take pages away or move them in the file.
const DROPPING_MODES: u32 = (libc::FALLOC_FL_PUNCH_HOLE
    | libc::FALLOC_FL_COLLAPSE_RANGE
    | libc::FALLOC_FL_ZERO_RANGE
    | libc::FALLOC_FL_INSERT_RANGE) as u32;

/// When a call goes to the supervisor.
enum When {
    Always,
    /// The low half of this argument has one of these bits.
    Bits(u32, u32),
    /// The low half of this argument is one of these.
    OneOf(u32, &'static [u32]),
}

/// The calls, the commonest of programs that allocate first: each takes two instructions of every call behind it.
const CALLS: [(libc::c_long, When); 14] = [
    (libc::SYS_mmap, When::Bits(3, libc::MAP_FIXED as u32)),
    (libc::SYS_munmap, When::Always),
    (libc::SYS_madvise, When::OneOf(2, &DROPPING_ADVICE)),
    (libc::SYS_mprotect, When::Always),
    (libc::SYS_brk, When::Always),
    (libc::SYS_mremap, When::Always),
    (libc::SYS_ftruncate, When::Always),
    (libc::SYS_truncate, When::Always),
    (libc::SYS_fallocate, When::Bits(1, DROPPING_MODES)),
    (libc::SYS_shmdt, When::Always),
    (libc::SYS_shmat, When::Bits(2, libc::SHM_REMAP as u32)),
    (libc::SYS_pkey_mprotect, When::Always),
    (libc::SYS_remap_file_pages, When::Always),
    (libc::SYS_process_madvise, When::Always),
];

fn load(offset: u32) -> sock_filter {
    sock_filter { code: (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, jt: 0, jf: 0, k: offset }
}

fn jump(test: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: (libc::BPF_JMP | test | libc::BPF_K) as u16, jt, jf, k }
}

fn give(action: u32) -> sock_filter {
    sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: action }
}

/// The program.
pub(super) fn program() -> Vec<sock_filter> {
    let (allow, notify) = (give(libc::SECCOMP_RET_ALLOW), give(libc::SECCOMP_RET_USER_NOTIF));
    let mut program = vec![load(ARCHITECTURE), jump(libc::BPF_JEQ, X86_64, 1, 0), allow, load(NUMBER)];
    for (number, when) in &CALLS {
        let body = match when {
            When::Always => vec![notify],
            When::Bits(argument, bits) => {
                vec![load(ARGUMENTS + 8 * argument), jump(libc::BPF_JSET, *bits, 0, 1), notify, allow]
            }
            When::OneOf(argument, values) => {
                let mut body = vec![load(ARGUMENTS + 8 * argument)];
                for (n, value) in values.iter().enumerate() {
                    body.push(jump(libc::BPF_JEQ, *value, (values.len() - n) as u8, 0));
                }
                body.extend([allow, notify]);
                body
            }
        };
        program.push(jump(libc::BPF_JEQ, *number as u32, 0, body.len() as u8));
        program.extend(body);
    }
    program.push(allow);
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel would make of a call (net/core/filter.c, the four instructions that are used).
    fn run(number: libc::c_long, arguments: [u64; 6], architecture: u32) -> u32 {
        let mut data = [0_u8; 64];
        data[..4].copy_from_slice(&(number as u32).to_ne_bytes());
        data[4..8].copy_from_slice(&architecture.to_ne_bytes());
        for (n, argument) in arguments.iter().enumerate() {
            data[16 + 8 * n..24 + 8 * n].copy_from_slice(&argument.to_ne_bytes());
        }
        let program = program();
        let (mut at, mut accumulator) = (0, 0_u32);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            let code = u32::from(code);
            at += 1;
            if code == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS {
                let word = &data[k as usize..k as usize + 4];
                accumulator = u32::from_ne_bytes(word.try_into().expect("four bytes"));
            } else if code == libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K {
                at += usize::from(if accumulator == k { jt } else { jf });
            } else if code == libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K {
                at += usize::from(if accumulator & k != 0 { jt } else { jf });
            } else {
                assert_eq!(code, libc::BPF_RET | libc::BPF_K, "an instruction that is not used");
                return k;
            }
        }
    }

    fn is_supervised(number: libc::c_long, arguments: [u64; 6]) -> bool {
        match run(number, arguments, X86_64) {
            libc::SECCOMP_RET_USER_NOTIF => true,
            libc::SECCOMP_RET_ALLOW => false,
            other => panic!("the program answers {other:#x}"),
        }
    }

    #[test]
    fn what_changes_mappings_is_supervised_and_nothing_else() {
        let none = [0; 6];
        for number in 0..500 {
            let expected = [
                libc::SYS_munmap,
                libc::SYS_mprotect,
                libc::SYS_brk,
                libc::SYS_mremap,
                libc::SYS_ftruncate,
                libc::SYS_truncate,
                libc::SYS_shmdt,
                libc::SYS_pkey_mprotect,
                libc::SYS_remap_file_pages,
                libc::SYS_process_madvise,
            ]
            .contains(&number);
            assert_eq!(is_supervised(number, none), expected, "call {number}");
        }
    }

    #[test]
    fn arguments_decide_where_a_call_may_be_harmless() {
        let with = |n: usize, value: u64| {
            let mut arguments = [u64::MAX << 32; 6];
            arguments[n] = value;
            arguments
        };
        assert!(is_supervised(libc::SYS_mmap, with(3, (libc::MAP_FIXED | libc::MAP_SHARED) as u64)));
        assert!(!is_supervised(libc::SYS_mmap, with(3, libc::MAP_PRIVATE as u64)));
        assert!(
            !is_supervised(libc::SYS_mmap, with(3, libc::MAP_FIXED_NOREPLACE as u64)),
            "replaces nothing"
        );
        for advice in 0..200 {
            let drops = DROPPING_ADVICE.contains(&advice);
            assert_eq!(
                is_supervised(libc::SYS_madvise, with(2, u64::from(advice))),
                drops,
                "advice {advice}"
            );
        }
        assert!(is_supervised(libc::SYS_fallocate, with(1, 3)));
        assert!(
            !is_supervised(libc::SYS_fallocate, with(1, 1)),
            "FALLOC_FL_KEEP_SIZE alone takes nothing away"
        );
        assert!(is_supervised(libc::SYS_shmat, with(2, libc::SHM_REMAP as u64)));
        assert!(!is_supervised(libc::SYS_shmat, with(2, 0)));
    }

    #[test]
    fn other_calling_conventions_pass() {
        const I386: u32 = 0x4000_0003;
        assert_eq!(run(libc::SYS_munmap, [0; 6], I386), libc::SECCOMP_RET_ALLOW);
    }
}
