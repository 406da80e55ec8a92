//! The C side: every struct of infiniband/verbs.h that programs hold, as the header of rdma-core 44 lays it out.
//!
//! Names of fields are those of the header, so that this can be read beside it. Numbers that a program may write are plain
//! integers, never Rust enums: whatever it writes is a value. `tests/layout.rs` compares sizes and offsets with the real
//! header, if there is one.
#![expect(missing_docs, reason = "the names, and what they mean, are those of infiniband/verbs.h")]

mod completion;
mod context;
mod device;
mod memory;
pub mod number;
mod queue;
mod request;

pub use completion::*;
pub use context::*;
pub use device::*;
pub use memory::*;
pub use queue::*;
pub use request::*;

/// What a struct looks like in memory.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Its C name, as in `struct ibv_qp`.
    pub name: &'static str,
    /// Its size in bytes.
    pub size: usize,
    /// Name and offset of each field that is compared.
    pub fields: &'static [(&'static str, usize)],
}

/// A struct whose bytes may all be 0. Only `c_structs` says so.
pub trait Zero: Copy {}

/// Declares structs as C lays them out, and a table of their layouts.
macro_rules! c_structs {
    ($($(#[$attribute:meta])* $c:literal = $name:ident { $($field:ident: $ty:ty,)* })*) => {
        $(
            $(#[$attribute])*
            #[repr(C)]
            #[derive(Clone, Copy)]
            pub struct $name {
                $(pub $field: $ty,)*
            }
            impl super::Zero for $name {}
        )*
        pub(super) const LAYOUTS: &[super::Layout] = &[$(super::Layout {
            name: $c,
            size: size_of::<$name>(),
            fields: &[$((stringify!($field), std::mem::offset_of!($name, $field)),)*],
        },)*];
    };
}
use c_structs;

/// Every struct.
#[must_use]
pub fn layouts() -> Vec<Layout> {
    let parts = [
        completion::LAYOUTS,
        context::LAYOUTS,
        device::LAYOUTS,
        memory::LAYOUTS,
        queue::LAYOUTS,
        request::LAYOUTS,
    ];
    parts.concat()
}
