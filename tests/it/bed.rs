//! What most tests stand on: a near region over memory of interest, and a far region over owned memory.

use crate::checks::View;
use anypage::machine::{End, Machine, MachineConfig};
use hw_model::hca::{Completion, OperationCode, Remote, SendRequest, Sge, Status};
use hw_model::sync::Arc;
use mr::{Device, RegisterOptions};
use odp::space::process::{Options, OwnedMemory, ProcessSpace};
use odp::space::{AddressSpace, Rung, UserRange};
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

/// Whether this process hears of pages that it drops; if not, says that `test` is skipped.
pub fn hears_of_drops(test: &str) -> bool {
    let space = space();
    let heard = space.capabilities().rung != Rung::Poll;
    if !heard {
        println!("SKIPPED {test}: userfaultfd {}", space.capabilities().userfaultfd);
    }
    heard
}

/// Whether this process can tell a page of zeroes from others; if not, says that `test` is skipped.
pub fn knows_zero_pages(test: &str) -> bool {
    let space = space();
    let known = space.capabilities().pagemap_scan.is_yes();
    if !known {
        println!("SKIPPED {test}: PAGEMAP_SCAN {}", space.capabilities().pagemap_scan);
    }
    known
}

impl Bed {
    /// A near region over `memory`, and a far one over as much owned memory.
    pub fn new(
        space: &Arc<ProcessSpace>,
        memory: &UserRange,
        options: RegisterOptions,
        config: &MachineConfig,
    ) -> Self {
        Self::with_mirror(space, memory, options, config, memory.range().len())
    }

    /// The same with a far region of `mirror` bytes.
    pub fn with_mirror(
        space: &Arc<ProcessSpace>,
        memory: &UserRange,
        options: RegisterOptions,
        config: &MachineConfig,
        mirror: u64,
    ) -> Self {
        let machine = Machine::new(space.memory(), None, config).expect("a machine");
        Self::on(machine, space, memory, options, mirror)
    }

    /// The same on a machine that is there.
    pub fn on(
        machine: Machine,
        space: &Arc<ProcessSpace>,
        memory: &UserRange,
        options: RegisterOptions,
        mirror: u64,
    ) -> Self {
        let mirror = Arc::new(OwnedMemory::new(space, mirror).expect("memory"));
        let near = End::new(&machine.near, memory, options).expect("the near region");
        let far =
            End::new(&machine.far, &mirror.user_range(), RegisterOptions::pinned()).expect("the far region");
        near.connect(&far).expect("fresh queue pairs connect");
        Self { space: Arc::clone(space), machine, near, far, mirror }
    }

    /// The near region, its IO page table and `memory`, which it was made of, as they are now.
    pub fn view(&self, memory: &UserRange) -> View {
        View::of(&self.machine.near, &*self.near.region, memory)
    }

    /// New queue pairs in place of ones that failed.
    pub fn reconnect(&mut self) {
        for (end, device) in [(&mut self.near, &self.machine.near), (&mut self.far, &self.machine.far)] {
            end.cq = Arc::clone(device).create_cq(1024).expect("a completion queue");
            end.qp = Arc::clone(&end.pd).create_qp(Arc::clone(&end.cq), 256).expect("a queue pair");
        }
        self.near.connect(&self.far).expect("fresh queue pairs connect");
    }

    /// The far end's request to write at `offset` of its own and of the near region, posted and not waited for.
    pub fn post_write(&self, id: u64, offset: u64, length: u32) {
        let address = self.far.region.address().offset(offset);
        let local = [Sge { key: self.far.region.key(), address, length }];
        let remote =
            Remote { key: self.near.region.key(), address: self.near.region.address().offset(offset) };
        self.far.qp.post_send(&SendRequest::write(id, &local, remote)).expect("the queue has room");
    }

    /// Waits for `count` completions of the far end.
    pub fn far_ends(&self, count: usize) -> Vec<Completion> {
        take(&self.far, count)
    }

    /// The far end writes `length` bytes at `offset` of its region to the same place of the near one.
    pub fn write(&self, offset: u64, length: u32) -> Status {
        let remote =
            Remote { key: self.near.region.key(), address: self.near.region.address().offset(offset) };
        self.far_does(OperationCode::Write, offset, length, remote)
    }

    /// The far end writes `length` bytes from `from` of its region to `offset` of the near one.
    pub fn write_to(&self, offset: u64, from: u64, length: u32) -> Status {
        let remote =
            Remote { key: self.near.region.key(), address: self.near.region.address().offset(offset) };
        self.far_does(OperationCode::Write, from, length, remote)
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
    take(end, 1)[0]
}

/// Waits for `count` completions.
pub fn take(end: &End, count: usize) -> Vec<Completion> {
    let mut completions = Vec::new();
    while completions.len() < count {
        let left = count - completions.len();
        if end.cq.poll(&mut completions, left).expect("no overrun") == 0 {
            assert!(end.cq.wait(PATIENCE), "a posted request never ended");
        }
    }
    completions
}
