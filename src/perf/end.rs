//! One end of the measurement: memory, its region, and queue pairs.

use super::Operation;
use super::run::Plan;
use crate::machine::BuildError;
use hw_model::addr::RegionAddr;
use hw_model::hca::{
    Access, Completion, CompletionQueue, Key, QpAddress, QpSpec, QueuePair, RecvRequest, Remote, Sge, Status,
};
use hw_model::sync::Arc;
use mr::device::model::{ModelDevice, ModelPd, ModelRegion};
use mr::{Region, RegisterOptions};
use odp::space::process::{OwnedMemory, ProcessSpace};
use std::any::Any;

/// Requests that one poll takes.
const BATCH: usize = 64;

/// Memory with queue pairs.
pub(super) struct End {
    pub(super) qps: Vec<Arc<QueuePair>>,
    pub(super) cq: Arc<CompletionQueue>,
    pub(super) region: Arc<dyn Region>,
    recv_cq: Arc<CompletionQueue>,
    received: Vec<Completion>,
    /// Places for messages in the region.
    places: u64,
    stride: u64,
    size: u32,
    /// Kept for as long as the queue pairs are in it.
    _pd: Arc<dyn Any + Send + Sync>,
}

/// What the other end must know: what two processes would tell each other before they begin.
#[derive(Clone, Debug)]
pub(super) struct Served {
    pub(super) key: Key,
    pub(super) address: RegionAddr,
    pub(super) qps: Vec<QpAddress>,
}

impl End {
    pub(super) fn new(
        device: &Arc<ModelDevice>,
        space: &Arc<ProcessSpace>,
        plan: &Plan,
    ) -> Result<Self, BuildError> {
        let memory = Arc::new(OwnedMemory::new(space, plan.memory)?);
        let options = if plan.odp { RegisterOptions::on_demand() } else { RegisterOptions::pinned() };
        let options = options.with_access(options.access | Access::REMOTE_ATOMIC);
        let pd: Arc<ModelPd> = ModelPd::alloc(device)?;
        let region: Arc<ModelRegion> = pd.register_model(&memory.user_range(), options)?;
        let requests = plan.depth * plan.qps;
        let cq = device.hca().create_cq(requests)?;
        let recv_cq = device.hca().create_cq(requests * 2)?;
        let spec = QpSpec {
            recv_cq: Arc::clone(&recv_cq),
            max_send_requests: plan.depth,
            max_recv_requests: plan.depth * 2,
            ..QpSpec::new(pd.handle(), &cq)
        };
        let qps = (0..plan.qps).map(|_| device.hca().create_qp(&spec)).collect::<Result<_, _>>()?;
        // A cache line at least, so that no two messages share one.
        let stride = plan.size.next_multiple_of(64);
        Ok(Self {
            qps,
            cq,
            region,
            recv_cq,
            received: Vec::with_capacity(BATCH),
            places: (plan.memory / stride).max(1),
            stride,
            size: plan.size as u32,
            _pd: pd,
        })
    }

    pub(super) fn served(&self) -> Served {
        Served {
            key: self.region.key(),
            address: self.region.address(),
            qps: self.qps.iter().map(|qp| qp.address()).collect(),
        }
    }

    /// Connects each queue pair to one of the peer's.
    pub(super) fn connect(&self, peer: &Served) -> Result<(), BuildError> {
        for (qp, address) in self.qps.iter().zip(&peer.qps) {
            qp.connect(*address)?;
        }
        Ok(())
    }

    /// The place of message `number` in this end's region.
    pub(super) fn local(&self, number: u64) -> Sge {
        let address = self.region.address().offset(number % self.places * self.stride);
        Sge { key: self.region.key(), address, length: self.size }
    }

    /// The place of message `number` in the peer's region, which is as large.
    pub(super) fn remote(&self, peer: &Served, number: u64) -> Remote {
        Remote { key: peer.key, address: peer.address.offset(number % self.places * self.stride) }
    }

    /// Messages that a pass over the memory takes.
    pub(super) fn places(&self) -> u64 {
        self.places
    }

    /// Before sends begin: receives for all that can be under way, twice.
    pub(super) fn prepare(&self, plan: &Plan) -> Result<(), BuildError> {
        if plan.operation != Operation::Send {
            return Ok(());
        }
        for number in 0..u64::from(plan.depth) * 2 {
            for (index, qp) in self.qps.iter().enumerate() {
                qp.post_recv(&RecvRequest::new(index as u64, &[self.local(number)]))?;
            }
        }
        Ok(())
    }

    /// Posts a receive for each one that ended. The first that failed, if one did.
    pub(super) fn serve(&mut self, number: &mut u64) -> Result<(), Status> {
        while !self.recv_cq.is_empty() {
            self.received.clear();
            let polled = self.recv_cq.poll(&mut self.received, BATCH);
            polled.map_err(|_| Status::FlushError)?;
            for completion in &self.received {
                if completion.status != Status::Success {
                    return Err(completion.status);
                }
                *number += 1;
                let sge = [self.local(*number)];
                let request = RecvRequest::new(completion.id.0, &sge);
                self.qps[completion.id.0 as usize].post_recv(&request).map_err(|_| Status::FlushError)?;
            }
        }
        Ok(())
    }
}
