//! A link whose packets meet the fault points of a plan: [`SEND`] and [`RECEIVE`]. A packet that fails there is lost.

use super::{Ingress, Link};
use crate::fault_plan::{Direction, Point, Points, Subject};
use crate::sync::Arc;
use crate::wire::{Gid, Header, Packet, Payload, Qpn};

/// A packet leaves: it fails by being lost. A delay holds up the engine that sends.
pub const SEND: Point = Point::fallible("link.send");
/// A packet arrives: it fails by being lost. A delay holds up what comes after it.
pub const RECEIVE: Point = Point::fallible("link.receive");

/// All of them.
pub const POINTS: [Point; 2] = [SEND, RECEIVE];

/// A wrapper of another link.
pub struct PlannedLink<L> {
    inner: L,
    points: Points,
}

/// The receiving side.
struct PlannedIngress {
    inner: Arc<dyn Ingress>,
    points: Points,
}

impl<L: Link> PlannedLink<L> {
    /// Wraps `inner`, whose packets meet `points`.
    pub fn new(inner: L, points: Points) -> Self {
        Self { inner, points }
    }
}

fn lost(points: &Points, point: Point, packet: &Packet, direction: Direction) -> bool {
    let subject = || Subject {
        qpn: Some(packet.destination_qp),
        opcode: Some(opcode(&packet.header)),
        direction: Some(direction),
        ..Subject::default()
    };
    points.meet_about(point, subject).fails()
}

impl<L: Link> Link for PlannedLink<L> {
    fn address(&self) -> Gid {
        self.inner.address()
    }
    fn addresses(&self) -> Vec<Gid> {
        self.inner.addresses()
    }
    fn max_payload(&self) -> usize {
        self.inner.max_payload()
    }
    fn attach(&self, ingress: Arc<dyn Ingress>) {
        self.inner.attach(Arc::new(PlannedIngress { inner: ingress, points: self.points.clone() }));
    }
    fn detach(&self) {
        self.inner.detach();
    }
    fn room(&self, destination: Gid, len: usize) -> Option<Payload> {
        self.inner.room(destination, len)
    }
    fn send(&self, packet: Packet) {
        if !lost(&self.points, SEND, &packet, Direction::Send) {
            self.inner.send(packet);
        }
    }
    fn join(&self, group: Gid) -> std::io::Result<()> {
        self.inner.join(group)
    }
    fn part(&self, group: Gid) {
        self.inner.part(group);
    }
    fn flush(&self) {
        self.inner.flush();
    }
    fn poll(&self) {
        self.inner.poll();
    }
    fn rest(&self) {
        self.inner.rest();
    }
    fn named_counts(&self) -> Vec<(&'static str, u64)> {
        self.inner.named_counts()
    }
    fn congested(&self, peer: Gid, qp: Qpn) {
        self.inner.congested(peer, qp);
    }
}

impl Ingress for PlannedIngress {
    fn deliver(&self, packet: Packet) {
        if !lost(&self.points, RECEIVE, &packet, Direction::Receive) {
            self.inner.deliver(packet);
        }
    }
    fn deliver_all(&self, packets: &mut Vec<Packet>) {
        packets.retain(|packet| !lost(&self.points, RECEIVE, packet, Direction::Receive));
        self.inner.deliver_all(packets);
    }
    fn takes_lots(&self) -> bool {
        self.inner.takes_lots()
    }
}

impl<L> std::fmt::Debug for PlannedLink<L> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PlannedLink").field("points", &self.points).finish_non_exhaustive()
    }
}

/// Every opcode's word: the operation of IBTA volume 1, table 38, without its service.
pub const OPCODES: [&str; 25] = [
    "send_first",
    "send_middle",
    "send_last",
    "send_last_immediate",
    "send_last_invalidate",
    "send_only",
    "send_only_immediate",
    "send_only_invalidate",
    "write_first",
    "write_middle",
    "write_last",
    "write_last_immediate",
    "write_only",
    "write_only_immediate",
    "read_request",
    "read_response_first",
    "read_response_middle",
    "read_response_last",
    "read_response_only",
    "acknowledge",
    "atomic_acknowledge",
    "atomic_compare_swap",
    "atomic_fetch_add",
    "flush",
    "atomic_write",
];

fn opcode(header: &Header) -> &'static str {
    OPCODES[match header {
        Header::SendFirst => 0,
        Header::SendMiddle => 1,
        Header::SendLast => 2,
        Header::SendLastImmediate(_) => 3,
        Header::SendLastInvalidate(_) => 4,
        Header::SendOnly => 5,
        Header::SendOnlyImmediate(_) => 6,
        Header::SendOnlyInvalidate(_) => 7,
        Header::WriteFirst(_) => 8,
        Header::WriteMiddle => 9,
        Header::WriteLast => 10,
        Header::WriteLastImmediate(_) => 11,
        Header::WriteOnly(_) => 12,
        Header::WriteOnlyImmediate(..) => 13,
        Header::ReadRequest(_) => 14,
        Header::ReadResponseFirst(_) => 15,
        Header::ReadResponseMiddle => 16,
        Header::ReadResponseLast(_) => 17,
        Header::ReadResponseOnly(_) => 18,
        Header::Acknowledge(_) => 19,
        Header::AtomicAcknowledge(..) => 20,
        Header::CompareSwap(_) => 21,
        Header::FetchAdd(_) => 22,
        Header::Flush(..) => 23,
        Header::AtomicWrite(_) => 24,
    }]
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::fault_plan::{Action, FaultPlan, Only, Rule};
    use crate::link::Fabric;
    use crate::sync::Mutex;
    use crate::wire::{Psn, Reth};

    #[derive(Default)]
    struct Arrived(Mutex<Vec<u32>>);

    impl Ingress for Arrived {
        fn deliver(&self, packet: Packet) {
            self.0.lock().push(packet.psn.get());
        }
    }

    /// The packets that arrive of ten sends to queue pair 5 and ten writes to 6, where `rule` is in force.
    fn arrive(rule: Rule) -> (Vec<u32>, Vec<(String, u64)>) {
        let fabric = Fabric::new();
        let plan = FaultPlan::new(1, vec![rule]);
        let link = PlannedLink::new(fabric.port(), Points::with(&plan));
        let arrived = Arc::new(Arrived::default());
        link.attach(Arc::clone(&arrived) as _);
        let reth = Reth { address: crate::addr::RegionAddr(0), key: crate::wire::Key(1), length: 0 };
        for psn in 0..20 {
            let (qp, header) = if psn < 10 { (5, Header::SendOnly) } else { (6, Header::WriteOnly(reth)) };
            link.send(Packet::reliable(link.address(), (link.address(), Qpn(qp)), Psn::new(psn), header));
        }
        (std::mem::take(&mut arrived.0.lock()), plan.fired())
    }

    /// A link that hands over what it is sent when it is polled, all at once, as those do that read many packets at a time.
    #[derive(Default)]
    struct Gathering {
        packets: Mutex<Vec<Packet>>,
        ingress: Mutex<Option<Arc<dyn Ingress>>>,
    }

    impl Link for Gathering {
        fn address(&self) -> Gid {
            Gid(1)
        }
        fn max_payload(&self) -> usize {
            4096
        }
        fn attach(&self, ingress: Arc<dyn Ingress>) {
            *self.ingress.lock() = Some(ingress);
        }
        fn detach(&self) {}
        fn send(&self, packet: Packet) {
            self.packets.lock().push(packet);
        }
        fn poll(&self) {
            let ingress = self.ingress.lock().clone().expect("attached");
            ingress.deliver_all(&mut self.packets.lock());
        }
    }

    /// What takes packets together only: one at a time, each would wake an engine.
    #[derive(Default)]
    struct Together(Mutex<Vec<Vec<u32>>>);

    impl Ingress for Together {
        fn deliver(&self, packet: Packet) {
            self.0.lock().push(vec![packet.psn.get()]);
        }
        fn deliver_all(&self, packets: &mut Vec<Packet>) {
            self.0.lock().push(packets.drain(..).map(|packet| packet.psn.get()).collect());
        }
    }

    #[test]
    fn packets_that_arrive_together_are_handed_on_together_but_for_the_lost() {
        let rule = Rule { skip: 1, times: Some(2), ..Rule::always("link.receive", Action::Fail) };
        let plan = FaultPlan::new(1, vec![rule]);
        let link = PlannedLink::new(Gathering::default(), Points::with(&plan));
        let arrived = Arc::new(Together::default());
        link.attach(Arc::clone(&arrived) as _);
        for psn in 0..5 {
            let to = (link.address(), Qpn(5));
            link.send(Packet::reliable(link.address(), to, Psn::new(psn), Header::SendOnly));
        }
        link.poll();
        assert_eq!(*arrived.0.lock(), [[0, 3, 4]], "one by one, each packet would cost a wake");
        assert_eq!(plan.fired(), [("link.receive".to_owned(), 2)]);
    }

    #[test]
    fn the_packets_that_a_rule_means_are_lost_and_no_others() {
        let rule = |point: &str, only| Rule { only, ..Rule::always(point, Action::Fail) };
        let sends = Only { opcode: Some("send".into()), ..Only::default() };
        let (arrived, fired) = arrive(rule("link.send", sends));
        assert_eq!((arrived, fired), ((10..20).collect(), vec![("link.send".to_owned(), 10)]));
        let one = Only { qpn: Some(Qpn(6)), direction: Some(Direction::Receive), ..Only::default() };
        let (arrived, _) = arrive(Rule { skip: 3, times: Some(2), ..rule("link.*", one) });
        assert_eq!(arrived, (0..20).filter(|psn| ![13, 14].contains(psn)).collect::<Vec<_>>());
    }
}
