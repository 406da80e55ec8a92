//! Completion queues and channels.

use super::{Context, Faces};
use crate::abi::IbvWc;
use crate::errno::Errno;
use crate::handle::zeros;
use hw_model::hca::{
    Attached, Completion, CompletionChannel, CompletionQueue, CqSpec, OperationCode, Status,
};
use hw_model::sync::atomic::{AtomicU64, Ordering};
use hw_model::sync::{Arc, Mutex, thread};
use std::collections::HashMap;
use std::ffi::{c_int, c_uint};
use std::time::Duration;

/// A completion channel.
pub(crate) struct Channel {
    pub(crate) channel: Arc<CompletionChannel>,
    /// The faces of its queues, by the cookies that their events carry.
    faces: Mutex<HashMap<u64, usize>>,
    cookies: AtomicU64,
}

impl Channel {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Arc<Self>, Errno> {
        let channel = context.device.hca().create_channel()?;
        Ok(Arc::new(Self { channel, faces: Mutex::default(), cookies: AtomicU64::new(1) }))
    }

    /// The face of the queue that the next event is of. Waits for one, unless the program made the descriptor non-blocking.
    pub(crate) fn next(&self) -> Result<usize, Errno> {
        loop {
            let event = self.channel.next()?;
            // A queue that is gone takes its events with it, but this one may have been taken out before.
            if let Some(face) = self.faces.lock().get(&event.cookie) {
                return Ok(*face);
            }
        }
    }

    /// Whether no queue uses it.
    pub(crate) fn is_idle(&self) -> bool {
        self.faces.lock().is_empty()
    }
}

/// A completion queue.
pub(crate) struct Cq {
    pub(crate) queue: Arc<CompletionQueue>,
    channel: Option<(Arc<Channel>, u64)>,
    polled: Mutex<Polled>,
    context: Arc<Context>,
}

/// Completions on their way to the program.
#[derive(Default)]
struct Polled {
    batch: Vec<Completion>,
    /// For `start_poll` and `next_poll`: the one that is being read.
    current: Option<IbvWc>,
}

impl Cq {
    pub(crate) fn new(
        context: &Arc<Context>,
        entries: u32,
        channel: Option<&Arc<Channel>>,
    ) -> Result<Arc<Self>, Errno> {
        let channel =
            channel.map(|channel| (Arc::clone(channel), channel.cookies.fetch_add(1, Ordering::Relaxed)));
        let events = channel.as_ref().map(|(channel, _)| Arc::clone(&channel.channel));
        let cookie = channel.as_ref().map_or(0, |(_, cookie)| *cookie);
        let spec = CqSpec { entries, channel: events, cookie };
        let queue = context.device.hca().create_cq_with(&spec)?;
        Ok(Arc::new(Self { queue, channel, polled: Mutex::default(), context: Arc::clone(context) }))
    }

    /// Where asynchronous events find its face.
    pub(crate) fn faces(&self) -> &Faces {
        self.context.event_faces()
    }

    /// Its events are of this face from now on.
    pub(crate) fn appear(&self, face: usize) {
        if let Some((channel, cookie)) = &self.channel {
            channel.faces.lock().insert(*cookie, face);
        }
    }

    /// Waits until every event that the program has fetched is acknowledged, as ibv_destroy_cq(3) says; then there are none.
    pub(crate) fn disappear(&self) {
        if let Some((channel, cookie)) = &self.channel {
            while self.queue.unacknowledged_events() > 0 {
                thread::sleep(Duration::from_millis(1));
            }
            channel.faces.lock().remove(cookie);
        }
    }

    /// Hands up to `most` completions to `take`, and says how many.
    pub(crate) fn poll(&self, most: usize, mut take: impl FnMut(usize, IbvWc)) -> Result<usize, Errno> {
        let mut polled = self.polled.lock();
        polled.batch.clear();
        let count = self.queue.poll(&mut polled.batch, most).map_err(|_| Errno::IO)?;
        for (at, completion) in polled.batch.iter().enumerate() {
            take(at, work_completion(completion));
        }
        Ok(count)
    }

    /// The next completion becomes the one that is read; `None` if there is none.
    pub(crate) fn advance(&self) -> Result<Option<IbvWc>, Errno> {
        let mut polled = self.polled.lock();
        polled.batch.clear();
        self.queue.poll(&mut polled.batch, 1).map_err(|_| Errno::IO)?;
        polled.current = polled.batch.first().map(work_completion);
        Ok(polled.current)
    }

    /// The completion that is read.
    pub(crate) fn current(&self) -> IbvWc {
        self.polled.lock().current.unwrap_or_else(zeros)
    }
}

/// A completion as `ibv_poll_cq` gives it.
fn work_completion(completion: &Completion) -> IbvWc {
    let (imm_data, attached) = match completion.attached {
        Attached::Nothing => (0, 0),
        Attached::Immediate(immediate) => (immediate.0.to_be(), IBV_WC_WITH_IMM),
        Attached::Invalidated(key) => (key.0, IBV_WC_WITH_INV),
    };
    let datagram = completion.datagram;
    IbvWc {
        wr_id: completion.id.0,
        status: status(completion.status),
        opcode: opcode(completion.operation),
        vendor_err: 0,
        byte_len: completion.bytes,
        imm_data,
        qp_num: completion.qpn.0,
        src_qp: datagram.map_or(0, |source| source.qpn.0),
        wc_flags: attached | if datagram.is_some() { IBV_WC_GRH } else { 0 },
        pkey_index: datagram.map_or(0, |source| source.pkey_index),
        ..zeros()
    }
}

/// `enum ibv_wc_status`.
fn status(status: Status) -> c_int {
    match status {
        Status::Success => 0,
        Status::LocalLengthError => 1,
        Status::LocalQpOperationError => 2,
        Status::LocalProtectionError => 4,
        Status::FlushError => 5,
        Status::MemoryManagementError => 6,
        Status::BadResponseError => 7,
        Status::LocalAccessError => 8,
        Status::RemoteInvalidRequestError => 9,
        Status::RemoteAccessError => 10,
        Status::RemoteOperationError => 11,
        Status::RetryExceeded => 12,
        Status::RnrRetryExceeded => 13,
        Status::RemoteAbortedError => 16,
    }
}

/// `enum ibv_wc_opcode`.
fn opcode(operation: OperationCode) -> c_int {
    match operation {
        OperationCode::Send => 0,
        OperationCode::Write => 1,
        OperationCode::Read => 2,
        OperationCode::CompareSwap => 3,
        OperationCode::FetchAdd => 4,
        OperationCode::Bind => 5,
        OperationCode::Invalidate => 6,
        OperationCode::Flush => 8,
        OperationCode::AtomicWrite => 9,
        OperationCode::Receive => 128,
        OperationCode::ReceiveWrite => 129,
        // A C program cannot ask for a fast registration, and what it has not asked for does not complete.
        _ => 21,
    }
}

const IBV_WC_GRH: c_uint = 1;
const IBV_WC_WITH_IMM: c_uint = 1 << 1;
const IBV_WC_WITH_INV: c_uint = 1 << 3;
