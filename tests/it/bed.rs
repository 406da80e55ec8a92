//! What most tests stand on: a near region over memory of interest, and a far region over owned memory.

use anypage::machine::{End, Machine, MachineConfig};
use hw_model::hca::{Completion, OperationCode, Remote, SendRequest, Sge, Status};
use hw_model::sync::Arc;
use mr::RegisterOptions;
use odp::space::process::{Options, OwnedMemory, ProcessSpace};
use odp::space::{AddressSpace, UserRange};
use std::time::Duration;

/// A request that takes longer than this never ends.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connected pair of regions.
pub struct Bed {
    pub space: Arc<ProcessSpace>,
    pub machine: Machine,
    pub near: End,
    pub far: End,
    pub mirror: Arc<OwnedMemory>,
}

pub fn space() -> Arc<ProcessSpace> {
    ProcessSpace::open(Options::default()).expect("this process can use its own memory")
}

impl Bed {
    /// A near region over `memory`, and a far one over as much owned memory.
    pub fn new(
        space: &Arc<ProcessSpace>,
        memory: &UserRange,
        options: RegisterOptions,
        config: &MachineConfig,
    ) -> Self {
        let machine = Machine::new(space.memory(), None, config).expect("a machine");
        let mirror = Arc::new(OwnedMemory::new(space, memory.range().len()).expect("memory"));
        let near = End::new(&machine.near, memory, options).expect("the near region");
        let far =
            End::new(&machine.far, &mirror.user_range(), RegisterOptions::pinned()).expect("the far region");
        near.connect(&far).expect("fresh queue pairs connect");
        Self { space: Arc::clone(space), machine, near, far, mirror }
    }

    /// The far end writes `length` bytes at `offset` of its region to the same place of the near one.
    pub fn write(&self, offset: u64, length: u32) -> Status {
        let remote =
            Remote { key: self.near.region.key(), address: self.near.region.address().offset(offset) };
        self.far_does(OperationCode::Write, offset, length, remote)
    }

    /// The far end reads.
    pub fn read(&self, offset: u64, length: u32) -> Status {
        let remote =
            Remote { key: self.near.region.key(), address: self.near.region.address().offset(offset) };
        self.far_does(OperationCode::Read, offset, length, remote)
    }

    /// The far end does something to any key and address, from or to `offset` of its own region.
    pub fn far_does(&self, what: OperationCode, offset: u64, length: u32, remote: Remote) -> Status {
        let local =
            [Sge { key: self.far.region.key(), address: self.far.region.address().offset(offset), length }];
        post(&self.far, what, &local, remote).status
    }

    /// The near end does something with its own region, from or to the same place of the far one.
    pub fn near_does(&self, what: OperationCode, offset: u64, length: u32) -> Status {
        let local =
            [Sge { key: self.near.region.key(), address: self.near.region.address().offset(offset), length }];
        let remote = Remote { key: self.far.region.key(), address: self.far.region.address().offset(offset) };
        post(&self.near, what, &local, remote).status
    }

    /// What the far end has at `offset`.
    pub fn far_bytes(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.mirror.read_at(offset, &mut bytes).expect("our own memory");
        bytes
    }
}

/// Posts one request and waits for its end.
pub fn post(end: &End, what: OperationCode, local: &[Sge], remote: Remote) -> Completion {
    let request = match what {
        OperationCode::Write => SendRequest::write(7, local, remote),
        OperationCode::Read => SendRequest::read(7, local, remote),
        other => panic!("{other:?} is not posted by these tests"),
    };
    end.qp.post_send(&request).expect("the queue has room");
    let mut completions = Vec::new();
    while end.cq.poll(&mut completions, 1).expect("no overrun") == 0 {
        assert!(end.cq.wait(PATIENCE), "a posted request never ended");
    }
    completions[0]
}
