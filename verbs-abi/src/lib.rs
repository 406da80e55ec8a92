//! The drop-in libibverbs.so.1: what an unmodified RDMA program links to, over the modelled HCA.
//!
//! ```text
//!   program --> exported function --+
//!           --> ibv_context.ops   --+--> exports/ --> objects/ --> mr, hw-model
//!           --> verbs_context     --+    (checks)     (safe)
//! ```
//!
//! * `abi`: the structs that programs hold, as the C header lays them out.
//! * `exports`: the functions. Each checks what it is given, lets no panic out, and answers as rdma-core does: an error
//!   number, or NULL or -1 with errno.
//! * `objects`: what is behind the structs, in safe Rust, over the traits of `mr`.
//! * `process`: what a process has once: its address space, its devices, what the environment asked for.
//!
//! Nothing here is called by other crates of the house. The package is a library so that `cargo run` builds its archive,
//! and `anypage run` links that archive with `libibverbs.map` into `libibverbs.so.1`, because a Rust cdylib cannot carry a
//! version script.

pub mod abi;
mod errno;
mod exports;
mod handle;
mod objects;
mod process;
mod report;
mod settings;
