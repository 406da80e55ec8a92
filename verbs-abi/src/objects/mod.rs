//! What is behind the structs that programs hold, in safe Rust over `mr` and the HCA of `hw-model`.

mod completion;
mod context;
mod event;
mod failure;
mod memory;
mod queue;
mod request;
mod small;

pub(crate) use completion::{Channel, Cq};
pub(crate) use context::Context;
pub(crate) use event::Faces;
pub(crate) use memory::{Mr, Pd, advise, rights};
pub(crate) use queue::{Qp, QpWanted, Srq, mtu_number, state_number, vector};
pub(crate) use request::{request, sge};
pub(crate) use small::{Ah, Dm, Mw};
