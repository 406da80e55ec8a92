//! What both programs here stand on: libibverbs, and memory that a device may change.

pub mod memory;
pub mod verbs;
