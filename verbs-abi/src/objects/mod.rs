//! What is behind the structs that programs hold, in safe Rust over `mr` and the HCA of `hw-model`.

mod completion;
mod context;
mod event;
mod extended;
mod failure;
mod import;
mod memory;
mod queue;
mod request;
mod small;

pub(crate) use completion::{Channel, Cq};
pub(crate) use context::{Context, file_name};
pub(crate) use event::Faces;
pub(crate) use extended::{FileName, SharedDomains, Xrcd};
pub(crate) use import::Handles;
pub(crate) use memory::{Mr, Pd, Td, advise, rights};
pub(crate) use queue::{Qp, QpWanted, Srq, mtu_number, state_number, vector};
pub(crate) use request::{request, sge};
pub(crate) use small::{Ah, Dm, Mw};
