//! What happens when the library is loaded.
//!
//! Unsafe island. Invariant: the one entry of `.init_array` is a function that takes nothing, and the dynamic linker calls
//! it once, before the program's `main`.
#![allow(unsafe_code)]

use std::panic::catch_unwind;

// SAFETY: an entry of .init_array is a pointer to a function; this one ignores the arguments that it is called with.
#[used]
#[unsafe(link_section = ".init_array")]
static LOADED: extern "C" fn() = loaded;

extern "C" fn loaded() {
    // A panic prints itself; the program goes on without what was to be set up.
    let _ = catch_unwind(crate::process::loaded);
}
