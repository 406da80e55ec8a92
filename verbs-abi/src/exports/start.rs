//! What happens when the library is loaded, and when the program ends.
//!
//! Unsafe island. Invariant: the entries of `.init_array` and `.fini_array` are functions that take nothing; the dynamic
//! linker calls the first once before the program's `main`, and the second once after it.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::panic::catch_unwind;

// SAFETY: an entry of .init_array is a pointer to a function; this one ignores the arguments that it is called with.
#[used]
#[unsafe(link_section = ".init_array")]
static LOADED: extern "C" fn() = loaded;

// SAFETY: an entry of .fini_array is a pointer to a function without arguments.
#[used]
#[unsafe(link_section = ".fini_array")]
static LEAVING: extern "C" fn() = leaving;

extern "C" fn leaving() {
    let _ = catch_unwind(crate::process::leaving);
}

extern "C" fn loaded() {
    // A panic prints itself; the program goes on without what was to be set up.
    let _ = catch_unwind(|| crate::process::loaded(is_part_of_the_program()));
}

/// Where we and the dynamic linker stand in its list of loaded objects.
#[derive(Default)]
struct Places {
    seen: usize,
    ours: Option<usize>,
    linker: Option<usize>,
}

/// Whether the library came with the program, rather than with a later dlopen(3): then it stands before the dynamic linker
/// itself, which is the last of what libc needs. Where that is not so, no is the safe answer.
fn is_part_of_the_program() -> bool {
    let mut places = Places::default();
    // SAFETY: the callback takes what it is given for what dl_iterate_phdr(3) says that it is.
    unsafe { libc::dl_iterate_phdr(Some(look), (&raw mut places).cast()) };
    places.ours.zip(places.linker).is_some_and(|(ours, linker)| ours < linker)
}

unsafe extern "C" fn look(info: *mut libc::dl_phdr_info, _size: usize, places: *mut c_void) -> c_int {
    // SAFETY: dl_iterate_phdr gives a struct of its own for the time of the call.
    let info = unsafe { &*info };
    // SAFETY: it hands on what `is_part_of_the_program` gave it.
    let places = unsafe { &mut *places.cast::<Places>() };
    // SAFETY: the headers of a loaded object stay where they are while it is loaded.
    let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
    let here = loaded as extern "C" fn() as usize as u64;
    let holds_us = headers.iter().any(|header| {
        let start = info.dlpi_addr.wrapping_add(header.p_vaddr);
        header.p_type == libc::PT_LOAD && (start..start.wrapping_add(header.p_memsz)).contains(&here)
    });
    // SAFETY: getauxval takes any number.
    if info.dlpi_addr == unsafe { libc::getauxval(libc::AT_BASE) } {
        places.linker = Some(places.seen);
    }
    if holds_us {
        places.ours = Some(places.seen);
    }
    places.seen += 1;
    0
}
