//! The two tables of an open device: what the header's inline functions call.
//!
//! A slot holds a function of exactly its type, or is empty; `sz` covers the whole struct, and `abi_compat` says that there
//! is an extended one around the old.

use super::{completion, dm, domain, memory, post, query, queue, window, xrc};
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
        ops: IbvContextOps {
            alloc_mw: Some(window::alloc_mw),
            bind_mw: Some(window::bind_mw),
            dealloc_mw: Some(window::dealloc_mw),
            poll_cq: Some(completion::poll_cq),
            req_notify_cq: Some(completion::req_notify_cq),
            post_srq_recv: Some(post::post_srq_recv),
            post_send: Some(post::post_send),
            post_recv: Some(post::post_recv),
            ..classic.ops
        },
        cmd_fd: inner.command_fd(),
        async_fd: inner.event_fd()?,
        num_comp_vectors: COMPLETION_VECTORS,
        abi_compat: without_provenance_mut(usize::MAX),
        ..classic
    };
    Ok(VerbsContext {
        query_port: Some(query::query_port),
        query_device_ex: Some(query::query_device_ex),
        advise_mr: Some(memory::advise_mr),
        alloc_null_mr: Some(dm::alloc_null_mr),
        reg_dm_mr: Some(dm::reg_dm_mr),
        alloc_dm: Some(dm::alloc_dm),
        free_dm: Some(dm::free_dm),
        alloc_td: Some(domain::alloc_td),
        dealloc_td: Some(domain::dealloc_td),
        alloc_parent_domain: Some(domain::alloc_parent_domain),
        modify_cq: Some(completion::modify_cq),
        create_cq_ex: Some(completion::create_cq_ex),
        create_qp_ex: Some(queue::create_qp_ex),
        get_srq_num: Some(queue::get_srq_num),
        create_srq_ex: Some(queue::create_srq_ex),
        open_xrcd: Some(xrc::open_xrcd),
        close_xrcd: Some(xrc::close_xrcd),
        open_qp: Some(xrc::open_qp),
        sz: size_of::<VerbsContext>(),
        context,
        ..extended
    })
}
