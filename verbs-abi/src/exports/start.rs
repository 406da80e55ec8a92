//! What happens when the library is loaded, and when the program ends.
//!
//! Unsafe island. Invariant: the entries of `.init_array` and `.fini_array` are functions that take nothing; the dynamic
//! linker calls the first once before the program's `main`, and the second once after it.
#![allow(unsafe_code)]

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
    let _ = catch_unwind(crate::process::loaded);
}
