//! A device whose peer is whoever sends it bytes: what the hostile tests and the fuzz target feed.

use crate::world::{Host, Region, config, connect, pattern};
use hw_model::addr::{PAGE_SIZE, RegionAddr};
use hw_model::hca::{
    Access, Completion, Gid, Key, Psn, QpAddress, Qpn, QueuePair, SendRequest, Status, Step, Time,
};
use hw_model::link::{Ingress, Link};
use hw_model::sync::{Arc, Mutex};
use hw_model::wire::{
    Flow, GlobalRoute, Header, Identification, Packet, PayloadPool, ROCE_PORT, check_icrc, gid_of, parse,
};

/// What is registered for the peer, and what is not.
pub const OPEN: u64 = 4 * PAGE_SIZE;
/// Pages of the host.
const PAGES: u64 = 16;

/// A cable of which we hold the other end.
struct Cable {
    address: Gid,
    ingress: Mutex<Option<Arc<dyn Ingress>>>,
    answers: Mutex<Vec<Packet>>,
}

impl Link for Cable {
    fn address(&self) -> Gid {
        self.address
    }
    fn max_payload(&self) -> usize {
        4096
    }
    fn attach(&self, ingress: Arc<dyn Ingress>) {
        *self.ingress.lock() = Some(ingress);
    }
    fn detach(&self) {
        *self.ingress.lock() = None;
    }
    fn send(&self, packet: Packet) {
        if packet.destination == self.address {
            self.deliver(packet);
        } else {
            self.answers.lock().push(packet);
        }
    }
}

impl Cable {
    fn deliver(&self, packet: Packet) {
        if let Some(ingress) = &*self.ingress.lock() {
            ingress.deliver(packet);
        }
    }
}

/// The device with its memory: a region that the peer may use, one that it may not, and pages that are in none.
pub struct Victim {
    cable: Arc<Cable>,
    pub host: Host,
    pub qp: Arc<QueuePair>,
    /// What the peer may write, read and do atomics on.
    pub open: Region,
    /// What only the device's own side may use.
    pub closed: Region,
    /// The next sequence number that the device expects, as far as it said.
    pub next: Psn,
    pool: Arc<PayloadPool>,
    now: Time,
}

pub fn attacker() -> Gid {
    gid_of([10, 0, 0, 66].into())
}

impl Victim {
    pub fn new() -> Self {
        let address = gid_of([10, 0, 0, 2].into());
        let cable = Arc::new(Cable { address, ingress: Mutex::default(), answers: Mutex::default() });
        let host = Host::new(Box::new(Arc::clone(&cable)), config(), PAGES);
        let open = host.region(OPEN);
        let closed = host.region_at(0x1000_0000, 0, OPEN, Access::LOCAL_WRITE, host.pd);
        host.memory.store(0, &pattern(7, PAGES * PAGE_SIZE));
        let qp = host.qp();
        let next = Psn::new(1000);
        qp.connect(QpAddress { gid: attacker(), qpn: Qpn(0x66), psn: next }).expect("connects");
        let pool = PayloadPool::new(4096, 16);
        Self { cable, host, qp, open, closed, next, pool, now: Time(0) }
    }

    /// The flow in which the attacker's packets come.
    pub fn flow(&self) -> Flow {
        Flow::between(attacker(), self.cable.address, ROCE_PORT).expect("one family")
    }

    /// Takes the contents of a datagram as a link does, and lets the device do all it wants. Whether it was a packet.
    pub fn take(&mut self, content: &[u8]) -> bool {
        let flow = self.flow();
        let packet = check_icrc(&flow, Identification::Known(0), content)
            .and_then(|_| parse(&flow, GlobalRoute::DEFAULT, content))
            .and_then(|content| content.into_packet(&self.pool));
        let Ok(Some(packet)) = packet else { return false };
        self.cable.deliver(packet);
        self.settle();
        true
    }

    /// As [`Victim::take`], with the ICRC made right first: nobody is kept out by a checksum.
    pub fn take_transport(&mut self, transport: &[u8]) -> bool {
        let mut content = transport.to_vec();
        if content.len() >= 12 {
            content.extend(self.flow().icrc(0, &[transport]).to_le_bytes());
        }
        self.take(&content)
    }

    /// Until the device has nothing to do; time jumps over its deadlines a few times.
    pub fn settle(&mut self) {
        let mut jumps = 0;
        for _ in 0..100_000 {
            match self.host.hca.step_engine(0, self.now) {
                Step::Worked | Step::Blocked => {}
                Step::Idle { wake_at: Some(at) } if jumps < 8 => {
                    jumps += 1;
                    self.now = at.max(self.now);
                }
                Step::Idle { .. } => {
                    for answer in self.cable.answers.lock().drain(..) {
                        if let Header::Acknowledge(_) = answer.header {
                            self.next = answer.psn.next();
                        }
                    }
                    return;
                }
            }
        }
        panic!("the device never comes to rest");
    }

    /// Hands a packet to the device as it is, whoever sent it.
    pub fn deliver(&mut self, packet: Packet) {
        self.cable.deliver(packet);
        self.settle();
    }

    /// The bytes that the peer may change.
    pub fn open_bytes(&self) -> Vec<u8> {
        self.host.bytes(&self.open, 0, OPEN)
    }

    /// Panics if a byte outside of the open region is not what it was.
    pub fn check_rest(&self) {
        let mut found = vec![0; (PAGES * PAGE_SIZE - OPEN) as usize];
        self.host.memory.load(OPEN, &mut found);
        let expected = &pattern(7, PAGES * PAGE_SIZE)[OPEN as usize..];
        let wrong = found.iter().zip(expected).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "a byte landed outside of the region that the peer may use");
    }

    /// Two other queue pairs of the device do their work.
    pub fn check_others_go_on(&mut self) {
        let (qa, qb) = (self.host.qp(), self.host.qp());
        connect(&qa, &qb);
        // What there is left to complete is not ours.
        let _ = self.host.take();
        let (from, to) = (self.closed.sge(0, 5000), self.open.remote(64));
        qa.post_send(&SendRequest::write(77, &[from], to)).expect("posted");
        self.settle();
        let done: Vec<Completion> = self.host.take();
        assert!(done.len() == 1 && done[0].status == Status::Success, "{done:?}");
        let source = self.host.bytes(&self.closed, 0, 5000);
        assert!(self.host.bytes(&self.open, 64, 5000) == source, "other bytes");
    }

    /// Reads packets out of arbitrary bytes, so that most of them mean something, and has the device take them.
    pub fn feed(&mut self, mut bytes: &[u8]) {
        while let Some((head, rest)) = bytes.split_first_chunk::<9>() {
            let [opcode, flags, psn, key, low, high, length, extra, fill] = *head;
            bytes = rest;
            let psn = self.next.offset((i32::from(psn.cast_signed()) / 16).cast_unsigned());
            let key = match key % 8 {
                0..5 => self.open.key,
                5 => self.closed.key,
                6 => Key(self.open.key.0 ^ 1),
                _ => Key(u32::from(key)),
            };
            let address = match high {
                0xff => RegionAddr(u64::MAX - u64::from(low)),
                _ => {
                    RegionAddr(self.open.base.wrapping_add(u64::from(u16::from_le_bytes([low, high]))) - 256)
                }
            };
            let length = match length {
                0xff => u32::MAX,
                length => u32::from(length) * 64,
            };
            let mut transport = vec![opcode, flags & 0xf0, 0xff, 0xff, 0];
            transport.extend(&self.qp.address().qpn.0.to_be_bytes()[1..]);
            transport.push(0x80);
            transport.extend(&psn.get().to_be_bytes()[1..]);
            // First, middle and last packets of sends, and the latter two of writes, have no header that says where.
            if !matches!(opcode & 0x1f, 0..=4 | 7 | 8) || flags & 1 == 1 {
                transport.extend(address.0.to_be_bytes());
                transport.extend(key.0.to_be_bytes());
                transport.extend(length.to_be_bytes());
            }
            // A full packet of the path MTU often.
            let data = if extra >= 0x80 { 4096 } else { usize::from(extra) * 16 };
            transport.extend(std::iter::repeat_n(fill, data));
            self.take_transport(&transport);
        }
    }
}
