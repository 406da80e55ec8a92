//! The two tables of an open device: what the header's inline functions call.
//!
//! A slot holds a function of exactly its type, or is empty; `sz` covers the whole struct, and `abi_compat` says that there
//! is an extended one around the old.

use super::{memory, query};
use crate::abi::*;
use crate::errno::Errno;
use crate::handle::zeros;
use crate::objects::Context;
use hw_model::sync::Arc;
use std::ptr::without_provenance_mut;

/// Completion vectors that programs may name; they are all one here.
const COMPLETION_VECTORS: i32 = 1;

/// The tables of a new context.
pub(super) fn context(device: *mut IbvDevice, inner: &Arc<Context>) -> Result<VerbsContext, Errno> {
    let (classic, extended): (IbvContext, VerbsContext) = (zeros(), zeros());
    let context = IbvContext {
        device,
        ops: IbvContextOps { ..classic.ops },
        cmd_fd: inner.command_fd(),
        async_fd: inner.event_fd(),
        num_comp_vectors: COMPLETION_VECTORS,
        abi_compat: without_provenance_mut(usize::MAX),
        ..classic
    };
    Ok(VerbsContext {
        query_port: Some(query::query_port),
        query_device_ex: Some(query::query_device_ex),
        advise_mr: Some(memory::advise_mr),
        sz: size_of::<VerbsContext>(),
        context,
        ..extended
    })
}
