//! Requests that send nothing: fast registration, binding and local invalidation (IBTA volume 1, 10.6.4.4, 10.6.5, 10.6.7,
//! 10.8.3.3).
//!
//! They are carried out in their turn and once: going back to send again passes over what was done.

use super::Requester;
use crate::hca::points;
use crate::hca::qp::queue::Shared;
use crate::hca::qp::work::{Context, Next};
use crate::hca::request::{Operation, Status};

impl Requester {
    /// Carries out the request at the cursor.
    pub(super) fn next_local(&mut self, shared: &Shared, context: &mut Context<'_>) -> Next {
        let job = &mut self.jobs[self.cursor_job];
        let operation = job.wqe.operation;
        if matches!(operation, Operation::Invalidate { .. }) && self.cursor_job > 0 {
            return Next::Nothing;
        }
        if context.device.points.meet(points::MEMORY_MANAGEMENT).fails() {
            job.failed = Some(Status::MemoryManagementError);
            return Next::Again;
        }
        let keys = &context.device.keys;
        let result = match operation {
            Operation::Register { key, access } => keys.register_fast(shared.pd, key, access),
            Operation::Invalidate { key } => keys.invalidate(shared.caller(), key),
            Operation::Bind(bind) => keys.bind(shared.caller(), &bind),
            _ => unreachable!("these are sent, or not taken"),
        };
        if let Err(error) = result {
            tracing::debug!(qpn = shared.qpn.0, %error, "memory management refused");
            job.failed = Some(Status::MemoryManagementError);
            return Next::Again;
        }
        job.done = true;
        self.cursor_job += 1;
        self.cursor_packet = 0;
        if self.cursor_job == 1 {
            self.end_oldest(Status::Success, shared, context);
        }
        Next::Again
    }
}
