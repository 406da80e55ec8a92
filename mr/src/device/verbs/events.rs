//! Completion channels and asynchronous events of a real device.
//!
//! Objects are destroyed only when all their events have been acknowledged (ibv_get_cq_event(3), ibv_get_async_event(3)).
//! Events here name them by number, so that each is acknowledged as it is taken, and nothing that is dropped waits.
//!
//! Unsafe island. Invariant: a channel was given by libibverbs and is destroyed once, on drop, after the queues that have it:
//! they hold it. An object that an event points at is there until the event is acknowledged, and is looked at before that only.
#![allow(unsafe_code)]

use super::context::{VerbsDevice, last_errno};
use super::error::VerbsError;
use hw_model::hca::{AsyncEvent, CompletionEvent, Cqn};
use hw_model::sync::Arc;
use hw_model::wire::{Qpn, Srqn};
use rdma_sys::{
    ibv_ack_async_event, ibv_ack_cq_events, ibv_async_event, ibv_comp_channel, ibv_create_comp_channel,
    ibv_destroy_comp_channel, ibv_event_type as Type, ibv_get_async_event, ibv_get_cq_event,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::mem::zeroed;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::time::Duration;

/// Where completion queues say that they have something (ibv_create_comp_channel(3)).
pub struct VerbsChannel {
    channel: NonNull<ibv_comp_channel>,
    device: Arc<VerbsDevice>,
}

// SAFETY: objects of libibverbs may be used by any thread.
unsafe impl Send for VerbsChannel {}
// SAFETY: the same.
unsafe impl Sync for VerbsChannel {}

impl VerbsChannel {
    pub(super) fn new(device: &Arc<VerbsDevice>) -> Result<Arc<Self>, VerbsError> {
        // SAFETY: an open context.
        let channel = NonNull::new(unsafe { ibv_create_comp_channel(device.context()) });
        let channel = channel.ok_or_else(|| device.refused("ibv_create_comp_channel", last_errno()))?;
        Ok(Arc::new(Self { channel, device: Arc::clone(device) }))
    }

    pub(super) fn as_ptr(&self) -> *mut ibv_comp_channel {
        self.channel.as_ptr()
    }

    pub(super) fn device(&self) -> &Arc<VerbsDevice> {
        &self.device
    }

    /// The descriptor to poll: readable while there is an event.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        // SAFETY: a live channel.
        let fd = unsafe { (*self.channel.as_ptr()).fd };
        // SAFETY: the channel has it open as long as it lives.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }

    /// The oldest event; `None` after `timeout`. Between two threads that take from one channel, either may sleep on until
    /// there is another.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn next_within(&self, timeout: Duration) -> Result<Option<CompletionEvent>, VerbsError> {
        if !readable(self.descriptor(), timeout) {
            return Ok(None);
        }
        let (mut cq, mut cookie) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: a live channel, and room for what it says.
        if unsafe { ibv_get_cq_event(self.as_ptr(), &raw mut cq, &raw mut cookie) } != 0 {
            return Err(self.device.refused("ibv_get_cq_event", last_errno()));
        }
        // SAFETY: the queue of an event that is not acknowledged is there.
        let number = Cqn(unsafe { (*cq).handle });
        // SAFETY: the same, for the last time.
        unsafe { ibv_ack_cq_events(cq, 1) };
        Ok(Some(CompletionEvent { cq: number, cookie: cookie.addr() as u64 }))
    }
}

impl Drop for VerbsChannel {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once; queues held it.
        unsafe { ibv_destroy_comp_channel(self.channel.as_ptr()) };
    }
}

fn readable(descriptor: BorrowedFd<'_>, timeout: Duration) -> bool {
    let timeout = Timespec::try_from(timeout).ok();
    poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], timeout.as_ref()).is_ok_and(|ready| ready > 0)
}

impl VerbsDevice {
    /// The oldest of what happened to its objects without a request that could tell of it; `None` after `timeout`, and for
    /// what the model has no word for.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn next_async_event(&self, timeout: Duration) -> Result<Option<AsyncEvent>, VerbsError> {
        // SAFETY: an open context.
        let fd = unsafe { (*self.context()).async_fd };
        // SAFETY: the context has it open as long as the device lives.
        let descriptor = unsafe { BorrowedFd::borrow_raw(fd) };
        if !readable(descriptor, timeout) {
            return Ok(None);
        }
        // SAFETY: all zeroes is a value of this C struct.
        let mut event: ibv_async_event = unsafe { zeroed() };
        // SAFETY: an open context, and room for what it says.
        if unsafe { ibv_get_async_event(self.context(), &raw mut event) } != 0 {
            return Err(self.refused("ibv_get_async_event", last_errno()));
        }
        // SAFETY: taken just now.
        let what = unsafe { named(&event) };
        // SAFETY: taken just now, and not looked at any more.
        unsafe { ibv_ack_async_event(&raw mut event) };
        Ok(what)
    }
}

/// What an event says, by numbers.
///
/// # Safety
/// It was taken and not acknowledged, so that its object is there.
unsafe fn named(event: &ibv_async_event) -> Option<AsyncEvent> {
    let object = &event.element;
    // Each of these is called for events of such objects only.
    let cq = || {
        // SAFETY: what the event says of a completion queue.
        let cq = unsafe { object.cq };
        // SAFETY: it is there by the caller's word.
        Cqn(unsafe { (*cq).handle })
    };
    let qp = || {
        // SAFETY: what the event says of a queue pair.
        let qp = unsafe { object.qp };
        // SAFETY: it is there by the caller's word.
        Qpn(unsafe { (*qp).qp_num })
    };
    let srq = || {
        // SAFETY: what the event says of a shared receive queue.
        let srq = unsafe { object.srq };
        // SAFETY: it is there by the caller's word.
        Srqn(unsafe { (*srq).handle })
    };
    // SAFETY: a number whatever the event.
    let port = || unsafe { object.port_num } as u8;
    Some(match event.event_type {
        Type::IBV_EVENT_CQ_ERR => AsyncEvent::CqError(cq()),
        Type::IBV_EVENT_QP_FATAL => AsyncEvent::QpFatal(qp()),
        Type::IBV_EVENT_QP_REQ_ERR => AsyncEvent::QpRequestError(qp()),
        Type::IBV_EVENT_QP_ACCESS_ERR => AsyncEvent::QpAccessError(qp()),
        Type::IBV_EVENT_COMM_EST => AsyncEvent::CommunicationEstablished(qp()),
        Type::IBV_EVENT_SQ_DRAINED => AsyncEvent::SendQueueDrained(qp()),
        Type::IBV_EVENT_QP_LAST_WQE_REACHED => AsyncEvent::LastWqeReached(qp()),
        Type::IBV_EVENT_SRQ_LIMIT_REACHED => AsyncEvent::SrqLimitReached(srq()),
        Type::IBV_EVENT_SRQ_ERR => AsyncEvent::SrqError(srq()),
        Type::IBV_EVENT_PORT_ACTIVE => AsyncEvent::PortActive(port()),
        Type::IBV_EVENT_PORT_ERR => AsyncEvent::PortError(port()),
        Type::IBV_EVENT_GID_CHANGE => AsyncEvent::GidChange(port()),
        Type::IBV_EVENT_PKEY_CHANGE => AsyncEvent::PKeyChange(port()),
        Type::IBV_EVENT_DEVICE_FATAL => AsyncEvent::DeviceFatal,
        _ => return None,
    })
}
