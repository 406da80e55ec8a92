//! Words for numbers, and rates (ibv_event_type_str(3), ibv_rate_to_mbps(3)).
//!
//! Unsafe island. Invariant: what is returned is a string of this library, which is never freed.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int};

fn word(words: &'static [&'static CStr], number: c_int, otherwise: &'static CStr) -> *const c_char {
    usize::try_from(number).ok().and_then(|at| words.get(at)).unwrap_or(&otherwise).as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn ibv_wc_status_str(status: c_int) -> *const c_char {
    const WORDS: [&CStr; 24] = [
        c"success",
        c"local length error",
        c"local queue pair operation error",
        c"local EE context operation error",
        c"local protection error",
        c"flushed before it was done",
        c"memory window bind error",
        c"bad response error",
        c"local access error",
        c"remote invalid request error",
        c"remote access error",
        c"remote operation error",
        c"transport retries exceeded",
        c"receiver-not-ready retries exceeded",
        c"local RDD violation error",
        c"remote invalid RD request",
        c"remote aborted error",
        c"invalid EE context number",
        c"invalid EE context state",
        c"fatal error",
        c"response timeout error",
        c"general error",
        c"tag matching error",
        c"tag matching rendezvous incomplete",
    ];
    word(&WORDS, status, c"unknown")
}

#[unsafe(no_mangle)]
extern "C" fn ibv_event_type_str(event: c_int) -> *const c_char {
    const WORDS: [&CStr; 20] = [
        c"completion queue error",
        c"queue pair fatal error",
        c"queue pair request error",
        c"queue pair access error",
        c"communication established",
        c"send queue drained",
        c"path migrated",
        c"path migration error",
        c"device fatal error",
        c"port active",
        c"port error",
        c"LID change",
        c"partition key change",
        c"SM change",
        c"SRQ error",
        c"SRQ limit reached",
        c"last WQE reached",
        c"client reregistration",
        c"GID table change",
        c"work queue fatal error",
    ];
    word(&WORDS, event, c"unknown")
}

#[unsafe(no_mangle)]
extern "C" fn ibv_node_type_str(node: c_int) -> *const c_char {
    const WORDS: [&CStr; 8] = [
        c"unknown",
        c"InfiniBand channel adapter",
        c"InfiniBand switch",
        c"InfiniBand router",
        c"iWARP NIC",
        c"usNIC",
        c"usNIC UDP",
        c"unspecified",
    ];
    word(&WORDS, node, c"unknown")
}

#[unsafe(no_mangle)]
extern "C" fn ibv_port_state_str(state: c_int) -> *const c_char {
    const WORDS: [&CStr; 6] = [c"no state change", c"DOWN", c"INIT", c"ARMED", c"ACTIVE", c"ACTIVE_DEFER"];
    word(&WORDS, state, c"unknown")
}

/// The code of `enum ibv_rate`, in multiples of 2.5 Gb/s (0 where it is none), and in Mb/s.
const RATES: [(c_int, c_int, c_int); 23] = [
    (2, 1, 2_500),
    (5, 2, 5_000),
    (3, 4, 10_000),
    (6, 8, 20_000),
    (4, 12, 30_000),
    (7, 16, 40_000),
    (8, 24, 60_000),
    (9, 32, 80_000),
    (10, 48, 120_000),
    (11, 0, 14_062),
    (12, 0, 56_250),
    (13, 0, 112_500),
    (14, 0, 168_750),
    (15, 0, 25_781),
    (16, 0, 103_125),
    (17, 0, 206_250),
    (18, 0, 309_375),
    (19, 0, 28_125),
    (20, 20, 50_000),
    (21, 160, 400_000),
    (22, 240, 600_000),
    (23, 320, 800_000),
    (24, 480, 1_200_000),
];

#[unsafe(no_mangle)]
extern "C" fn ibv_rate_to_mult(rate: c_int) -> c_int {
    RATES.iter().find(|(code, multiple, _)| *code == rate && *multiple != 0).map_or(-1, |found| found.1)
}

#[unsafe(no_mangle)]
extern "C" fn mult_to_ibv_rate(multiple: c_int) -> c_int {
    RATES.iter().find(|(_, known, _)| *known == multiple && multiple != 0).map_or(0, |found| found.0)
}

#[unsafe(no_mangle)]
extern "C" fn ibv_rate_to_mbps(rate: c_int) -> c_int {
    RATES.iter().find(|(code, ..)| *code == rate).map_or(-1, |found| found.2)
}

#[unsafe(no_mangle)]
extern "C" fn mbps_to_ibv_rate(mbps: c_int) -> c_int {
    RATES.iter().find(|(_, _, known)| *known == mbps).map_or(0, |found| found.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(pointer: *const c_char) -> &'static str {
        // SAFETY: a string of this file.
        unsafe { CStr::from_ptr(pointer) }.to_str().expect("ASCII")
    }

    #[test]
    fn every_number_has_a_word_and_others_are_unknown() {
        assert_eq!(text(ibv_wc_status_str(10)), "remote access error");
        assert_eq!(text(ibv_event_type_str(16)), "last WQE reached");
        for number in [-1, 24, c_int::MAX] {
            assert_eq!(text(ibv_wc_status_str(number)), "unknown");
            assert_eq!(text(ibv_event_type_str(number)), "unknown");
            assert_eq!(text(ibv_port_state_str(number)), "unknown");
            assert_eq!(text(ibv_node_type_str(number)), "unknown");
        }
    }

    #[test]
    fn rates_come_back_as_they_went() {
        for (code, multiple, mbps) in RATES {
            assert_eq!((ibv_rate_to_mbps(code), mbps_to_ibv_rate(mbps)), (mbps, code));
            if multiple != 0 {
                assert_eq!((ibv_rate_to_mult(code), mult_to_ibv_rate(multiple)), (multiple, code));
            }
        }
        assert_eq!((ibv_rate_to_mbps(99), mbps_to_ibv_rate(1)), (-1, 0));
        assert_eq!((ibv_rate_to_mult(11), mult_to_ibv_rate(0)), (-1, 0));
    }
}
