//! Messages, datagrams and atomics through the traits of devices, over this process's own memory and with threads.

use crate::bed::{Bed, space, take};
use crate::remapped::Remapped;
use anypage::machine::{Machine, MachineConfig};
use hw_model::addr::PAGE_SIZE;
use hw_model::hca::{
    AddressVector, Completion, Destination, OperationCode, QKey, QpChange, QpState, RecvRequest, Remote,
    SendRequest, Sge, Status, Transport,
};
use hw_model::sync::Arc;
use mr::device::{QpOptions, SharedReceiveQueue};
use mr::{CompletionQueue, Device, ProtectionDomain, RegisterOptions};
use odp::space::AddressSpace;
use odp::space::process::{OwnedMemory, ProcessSpace};
use std::time::Duration;

/// A request that takes longer than this never ends.
const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn what_the_program_and_its_peer_add_to_one_word_adds_up() {
    const THREADS: u64 = 2;
    const LOCAL: u64 = 20_000;
    const REMOTE: u64 = 400;
    let memory = Remapped::new(1);
    let space = space();
    let near = memory.user_range(Arc::clone(&space) as _);
    let options = RegisterOptions::on_demand();
    let options = options.with_access(options.access | hw_model::hca::Access::REMOTE_ATOMIC);
    let bed = Bed::new(&space, &near, options, &MachineConfig::default());
    let word = Remote { key: bed.near.region.key(), address: bed.near.region.address().offset(64) };
    let local = [Sge { key: bed.far.region.key(), address: bed.far.region.address(), length: 8 }];
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| (0..LOCAL).for_each(|_| memory.add(64, 1)));
        }
        for id in 0..REMOTE {
            bed.far.qp.post_send(&SendRequest::fetch_add(id, &local, word, 1)).expect("room");
            assert_eq!(take(&bed.far, 1)[0].status, Status::Success);
        }
    });
    bed.far.qp.post_send(&SendRequest::fetch_add(0, &local, word, 0)).expect("room");
    assert_eq!(take(&bed.far, 1)[0].status, Status::Success);
    let sum = u64::from_le_bytes(bed.far_bytes(0, 8).try_into().expect("eight"));
    assert_eq!(sum, THREADS * LOCAL + REMOTE, "an addition was lost");
}

/// One end: a domain, a queue and a page of memory.
struct Host {
    pd: Arc<dyn ProtectionDomain>,
    cq: Arc<dyn CompletionQueue>,
    memory: Arc<OwnedMemory>,
    region: Arc<dyn mr::Region>,
}

impl Host {
    fn new(space: &Arc<ProcessSpace>, device: &Arc<impl Device + 'static>) -> Self {
        let pd = Arc::clone(device).alloc_pd().expect("a domain");
        let cq = Arc::clone(device).create_cq(64).expect("a queue");
        let memory = Arc::new(OwnedMemory::new(space, PAGE_SIZE).expect("memory"));
        let options = RegisterOptions::on_demand();
        let region = Arc::clone(&pd).register(&memory.user_range(), options).expect("a region");
        Self { pd, cq, memory, region }
    }

    fn sge(&self, at: u64, length: u32) -> Sge {
        Sge { key: self.region.key(), address: self.region.address().offset(at), length }
    }

    fn next(&self) -> Completion {
        let mut ended = Vec::new();
        while self.cq.poll(&mut ended, 1).expect("no overrun") == 0 {
            assert!(self.cq.wait(PATIENCE), "a posted request never ended");
        }
        ended[0]
    }
}

fn hosts() -> (Machine, Host, Host) {
    let space = space();
    let machine = Machine::new(space.memory(), None, &MachineConfig::default()).expect("a machine");
    let (near, far) = (Host::new(&space, &machine.near), Host::new(&space, &machine.far));
    (machine, near, far)
}

#[test]
fn messages_go_from_one_device_to_receives_that_queue_pairs_of_the_other_share() {
    let (_machine, near, far) = hosts();
    let srq: Arc<dyn SharedReceiveQueue> = Arc::clone(&far.pd).create_srq(8, 1).expect("a shared queue");
    let rc = Transport::ReliableConnection;
    let sender = Arc::clone(&near.pd).create_qp_with(QpOptions::new(rc, &near.cq)).expect("a queue pair");
    let options = QpOptions { srq: Some(Arc::clone(&srq)), ..QpOptions::new(rc, &far.cq) };
    let receiver = Arc::clone(&far.pd).create_qp_with(options).expect("a queue pair");
    sender.connect(receiver.endpoint()).expect("fresh");
    receiver.connect(sender.endpoint()).expect("fresh");
    near.memory.write_at(0, b"a message").expect("our own memory");
    srq.post(&RecvRequest::new(5, &[far.sge(100, 50)])).expect("room");
    let sges = [near.sge(0, 9)];
    sender.post_send(&SendRequest::send_immediate(1, &sges, 3)).expect("room");
    assert_eq!(near.next().status, Status::Success);
    let received = far.next();
    assert_eq!((received.id.0, received.operation, received.bytes), (5, OperationCode::Receive, 9));
    let mut bytes = [0; 9];
    far.memory.read_at(100, &mut bytes).expect("our own memory");
    assert_eq!(&bytes, b"a message");
    assert_eq!(sender.query().expect("alive").state, QpState::ReadyToSend);
    sender.modify(&QpChange::to(QpState::Error)).expect("always possible");
    sender.post_recv(&RecvRequest::new(9, &[])).expect("taken, and flushed");
    assert_eq!(near.next().status, Status::FlushError);
}

#[test]
fn a_datagram_goes_to_whom_it_names() {
    const QKEY: QKey = QKey(0x77);
    let (machine, near, far) = hosts();
    let open = |host: &Host| {
        let options = QpOptions::new(Transport::UnreliableDatagram, &host.cq);
        let qp = Arc::clone(&host.pd).create_qp_with(options).expect("a queue pair");
        qp.open(QKEY).expect("fresh");
        qp
    };
    let (sender, receiver) = (open(&near), open(&far));
    receiver.post_recv(&RecvRequest::new(2, &[far.sge(0, 100)])).expect("room");
    // The page of the receive may not be there yet, and then the datagram is lost: that is what datagrams are.
    far.memory.write_at(0, &[1; 100]).expect("our own memory");
    far.region.advise(0, PAGE_SIZE, odp::fault::Want::Fault(odp::space::Access::Write)).expect("it is there");
    let to = AddressVector::to(machine.far.hca().gid());
    let destination = Destination::Datagram { to, qpn: receiver.endpoint().qpn, qkey: QKEY };
    let request = SendRequest::send(1, &[]).with_inline(b"datagram").with_destination(destination);
    sender.post_send(&request).expect("room");
    assert_eq!(near.next().status, Status::Success);
    let received = far.next();
    assert_eq!((received.bytes, received.datagram.map(|from| from.qpn)), (48, Some(sender.endpoint().qpn)));
    let mut bytes = [0; 8];
    far.memory.read_at(40, &mut bytes).expect("our own memory");
    assert_eq!(&bytes, b"datagram");
}
