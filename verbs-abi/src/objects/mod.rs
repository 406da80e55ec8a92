//! What is behind the structs that programs hold, in safe Rust over the traits of `mr`.

mod context;
mod failure;
mod memory;

pub(crate) use context::Context;
pub(crate) use memory::{Mr, Pd, advise};
