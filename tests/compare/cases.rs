//! The cases of tests/lab/cases/cases.c, function for function, on the modelled device.

use crate::bed::{Bed, Queue, SIZE, all, connect, queue, queue_pair, region};
use hw_model::addr::RegionAddr;
use hw_model::hca::{
    Access, AddressVector, CompletionChannel, CqSpec, Hca, Key, Notify, Operation, PORT, QKey, QpChange,
    QpState, QueuePair, Remote, SendRequest, Sge, Transport, WindowBind, WindowKind, WindowSpec,
};
use hw_model::sync::Arc;

/// Case and answer, in the order of the program.
pub type Answers = Vec<(String, String)>;

fn outcome<T, E>(result: Result<T, E>) -> &'static str {
    if result.is_ok() { "ok" } else { "refused" }
}

pub fn keys(hca: &Arc<Hca>, say: &mut Answers) {
    for (word, deny) in [("write", Access::REMOTE_WRITE), ("read", Access::REMOTE_READ)] {
        for which in [
            "good",
            "another key",
            "a key of nothing",
            "past the end",
            "before the start",
            "another local key",
            "past the local end",
            "no permission",
            "a deregistered key",
            "a key of another domain",
            "no byte by another key",
            "a remote address that wraps",
        ] {
            let bed = Bed::new(hca);
            let mut local = Sge { key: bed.local, address: RegionAddr(0), length: 100 };
            let mut remote = Remote { key: bed.remote, address: RegionAddr(SIZE) };
            match which {
                "another key" => remote.key.0 ^= 1,
                "a key of nothing" => remote.key = Key(0x00ab_cd00),
                "past the end" => remote.address.0 += SIZE - 99,
                "before the start" => remote.address.0 -= 1,
                "another local key" => local.key.0 ^= 1,
                "past the local end" => local.address.0 += SIZE - 99,
                "no permission" => {
                    remote.key = region(hca, bed.pd, SIZE, all().difference(deny)).expect("a region");
                }
                "a deregistered key" => {
                    remote.key = region(hca, bed.pd, SIZE, all()).expect("a region");
                    hca.destroy_key(remote.key).expect("there");
                }
                "a key of another domain" => {
                    let other = hca.alloc_pd().expect("a domain");
                    remote.key = region(hca, other, SIZE, all()).expect("a region");
                }
                "no byte by another key" => {
                    remote.key.0 ^= 1;
                    local.length = 0;
                }
                "a remote address that wraps" => remote.address.0 = u64::MAX - 10,
                _ => {}
            }
            let sges = [local];
            let sges = if local.length == 0 { &sges[..0] } else { &sges };
            let request = match word {
                "write" => SendRequest::write(1, sges, remote),
                _ => SendRequest::read(1, sges, remote),
            };
            say.push((format!("{word}, {which}"), bed.a.run(&request).to_owned()));
        }
    }
}

/// A window of queue b's owner.
struct Window {
    bed: Bed,
    kind: WindowKind,
    key: Key,
}

const AT: u64 = SIZE + 100;
const LENGTH: u64 = 4096;

fn usual() -> Access {
    Access::REMOTE_WRITE | Access::REMOTE_READ
}

impl Window {
    fn new(hca: &Arc<Hca>, kind: WindowKind) -> Self {
        let bed = Bed::new(hca);
        let key = hca.alloc_window(WindowSpec { pd: bed.pd, kind }).expect("a window");
        Self { bed, kind, key }
    }

    fn bound(hca: &Arc<Hca>, kind: WindowKind) -> Self {
        let mut window = Self::new(hca, kind);
        window.bind_usual();
        window
    }

    fn bind(&mut self, region: Key, address: u64, length: u64, access: Access) -> &'static str {
        // The next key byte, as ibv_bind_mw and ibv_inc_rkey choose it.
        let key = Key(self.key.0 & !0xff | (self.key.0 + 1) & 0xff);
        let bind = WindowBind { key, region, address: RegionAddr(address), length, access };
        let status = self.bed.b.run(&SendRequest::new(1, Operation::Bind(bind), &[]));
        if status == "success" {
            self.key = key;
        }
        status
    }

    fn bind_usual(&mut self) -> &'static str {
        self.bind(self.bed.remote, AT, LENGTH, usual())
    }

    fn used(&self, queue: &Queue, address: u64, length: u32, key: Key) -> &'static str {
        let sges = [Sge { key: self.bed.local, address: RegionAddr(0), length }];
        queue.run(&SendRequest::write(1, &sges, Remote { key, address: RegionAddr(address) }))
    }
}

fn invalidate(queue: &Queue, key: Key) -> &'static str {
    queue.run(&SendRequest::invalidate(1, key))
}

pub fn windows(hca: &Arc<Hca>, say: &mut Answers) {
    for (kind, number) in [(WindowKind::One, 1), (WindowKind::TwoB, 2)] {
        let mut case = |text: &str, answer: &str| {
            say.push((format!("window type {number}, {text}"), answer.to_owned()));
        };
        let new = || Window::new(hca, kind);
        let bound = || Window::bound(hca, kind);
        let w = new();
        case("used before it is bound", w.used(&w.bed.a, AT, 8, w.key));
        let mut w = new();
        case("bound", w.bind_usual());
        case("used", w.used(&w.bed.a, AT, LENGTH as u32, w.key));
        case("one byte past its end", w.used(&w.bed.a, AT + 1, LENGTH as u32, w.key));
        let w = bound();
        case("one byte before its start", w.used(&w.bed.a, AT - 1, 8, w.key));
        let mut w = new();
        let old = w.key;
        w.bind_usual();
        case("used by the key of before it was bound", w.used(&w.bed.a, AT, 8, old));
        let mut w = new();
        w.bind(w.bed.remote, AT, LENGTH, Access::REMOTE_READ);
        case("written without the right", w.used(&w.bed.a, AT, 8, w.key));
        let w = bound();
        let (c, d) = (queue(hca, w.bed.pd), queue(hca, w.bed.pd));
        connect(&c, &d);
        case("used through another queue pair of its domain", w.used(&c, AT, 8, w.key));
        let mut w = bound();
        case("bound while it is bound", w.bind_usual());
        let mut w = bound();
        case("bound to nothing", w.bind(w.bed.remote, AT, 0, usual()));
        let mut w = new();
        let mr = region(hca, w.bed.pd, SIZE, all().difference(Access::WINDOW_BIND)).expect("a region");
        case("over a region without the right to bind", w.bind(mr, AT, 8, usual()));
        let mut w = new();
        let mr = region(hca, w.bed.pd, SIZE, Access::WINDOW_BIND).expect("a region");
        case("for writing over a region that its owner may not write", w.bind(mr, AT, 8, usual()));
        let mut w = new();
        case("past the end of its region", w.bind(w.bed.remote, AT, SIZE - 100 + 1, usual()));
        let mut w = new();
        case("before the start of its region", w.bind(w.bed.remote, SIZE - 1, 8, usual()));
        let mut w = new();
        let mr = region(hca, hca.alloc_pd().expect("a domain"), SIZE, all()).expect("a region");
        case("over a region of another domain", w.bind(mr, AT, 8, usual()));
        let mut w = new();
        let pd = hca.alloc_pd().expect("a domain");
        w.key = hca.alloc_window(WindowSpec { pd, kind }).expect("a window");
        case("of another domain than its queue pair", w.bind_usual());
        let mut w = new();
        case("zero based", w.bind(w.bed.remote, AT, 64, usual() | Access::ZERO_BASED));
        let w = bound();
        case("invalidated", invalidate(&w.bed.b, w.key));
        if kind == WindowKind::TwoB {
            case("used after that", w.used(&w.bed.a, AT, 8, w.key));
        }
        let w = bound();
        let (e, f) = (queue(hca, w.bed.pd), queue(hca, w.bed.pd));
        connect(&e, &f);
        case("invalidated through another queue pair", invalidate(&f, w.key));
        if kind == WindowKind::One {
            let w = new();
            case("invalidated while it is free", invalidate(&w.bed.b, w.key));
        }
        let w = bound();
        case("its region deregistered under it", outcome(hca.destroy_key(w.bed.remote)));
        let w = bound();
        assert_eq!(w.kind, kind);
        case("deallocated while it is bound", outcome(hca.dealloc_window(w.key)));
    }
    let mut w = Window::bound(hca, WindowKind::TwoB);
    invalidate(&w.bed.b, w.key);
    say.push(("window type 2, bound again after an invalidation".to_owned(), w.bind_usual().to_owned()));
    let mut w = Window::new(hca, WindowKind::TwoB);
    w.bind(w.bed.remote, AT, 64, usual() | Access::ZERO_BASED);
    let used = w.used(&w.bed.a, 0, 64, w.key);
    say.push(("window type 2, zero based, used at address 0".to_owned(), used.to_owned()));
}

/// Queue b completes to a queue with a channel.
struct Notified {
    bed: Bed,
    channel: Arc<CompletionChannel>,
}

impl Notified {
    fn new(hca: &Arc<Hca>) -> Self {
        let mut bed = Bed::new(hca);
        let channel = hca.create_channel().expect("a channel");
        let spec = CqSpec { entries: 16, channel: Some(Arc::clone(&channel)), cookie: 0 };
        let cq = hca.create_cq_with(&spec).expect("a queue");
        let qp = queue_pair(hca, bed.pd, &cq);
        bed.b = Queue { qp, cq };
        bed.a = queue(hca, bed.pd);
        connect(&bed.a, &bed.b);
        Self { bed, channel }
    }

    /// Posts a write and waits for its completion, which stays where it is.
    fn writes(&self, good: bool) {
        let before = self.bed.b.cq.len();
        let sges = [Sge { key: self.bed.local, address: RegionAddr(0), length: 8 }];
        let key = if good { self.bed.remote } else { Key(self.bed.remote.0 ^ 1) };
        let remote = Remote { key, address: RegionAddr(SIZE) };
        self.bed.b.qp.post_send(&SendRequest::write(1, &sges, remote)).expect("posted");
        while self.bed.b.cq.len() == before {
            self.bed.hca.progress();
            std::thread::yield_now();
        }
    }

    fn events(&self) -> String {
        let events = std::iter::from_fn(|| self.channel.try_next()).count();
        self.bed.b.cq.acknowledge_events(events as u32);
        events.to_string()
    }
}

pub fn completion_queues(hca: &Arc<Hca>, say: &mut Answers) {
    let mut case = |text: &str, answer: String| say.push((text.to_owned(), answer));
    let max = hca.attributes().limits.cq_entries;
    case("completion queue, no entry", outcome(hca.create_cq(0)).to_owned());
    case("completion queue, one entry more than the limit", outcome(hca.create_cq(max + 1)).to_owned());
    let n = Notified::new(hca);
    n.writes(true);
    case("events, not armed", n.events());
    n.bed.b.cq.arm(Notify::Any);
    case("events, armed after the completion", n.events());
    n.writes(true);
    n.writes(true);
    case("events, armed once and two completions", n.events());
    let n = Notified::new(hca);
    n.bed.b.cq.arm(Notify::Solicited);
    n.writes(true);
    case("events, armed for solicited ones and one that is not", n.events());
    n.writes(false);
    case("events, armed for solicited ones and a failure", n.events());
    for (text, order) in [
        ("events, armed for any and then for solicited ones", [Notify::Any, Notify::Solicited]),
        ("events, armed for solicited ones and then for any", [Notify::Solicited, Notify::Any]),
    ] {
        let n = Notified::new(hca);
        order.into_iter().for_each(|notify| _ = n.bed.b.cq.arm(notify));
        n.writes(true);
        case(text, n.events());
    }
    let n = Notified::new(hca);
    (0..3).for_each(|_| n.writes(true));
    case("resized to less than it holds", outcome(n.bed.b.cq.resize(2)).to_owned());
    case("resized to no entry", outcome(n.bed.b.cq.resize(0)).to_owned());
    case("resized to more", outcome(n.bed.b.cq.resize(64)).to_owned());
    let mut kept = Vec::new();
    let count = n.bed.b.cq.poll(&mut kept, 8).expect("no overrun");
    case("completions kept over that", count.to_string());
}

pub fn tables_and_lives(hca: &Arc<Hca>, say: &mut Answers) {
    let mut case = |text: &str, answer: &str| say.push((text.to_owned(), answer.to_owned()));
    case("partition key 0", outcome(hca.query_pkey(PORT, 0)));
    case("partition key past the table", outcome(hca.query_pkey(PORT, 5000)));
    case("address past the table", outcome(hca.query_gid(PORT, 5000)));
    case("port 0", outcome(hca.port_attributes(0)));
    case("port 2", outcome(hca.port_attributes(2)));
    let bed = Bed::new(hca);
    let to = AddressVector::to(hca.gid());
    case("address handle", outcome(hca.create_ah(bed.pd, to)));
    let from = AddressVector { source_gid_index: 200, ..to };
    case("address handle from an address that there is not", outcome(hca.create_ah(bed.pd, from)));
    let pd = hca.alloc_pd().expect("a domain");
    let mr = region(hca, pd, 0, all()).expect("a region");
    case("domain given back with a region in it", outcome(hca.dealloc_pd(pd)));
    hca.destroy_key(mr).expect("there");
    case("domain given back when it is empty", outcome(hca.dealloc_pd(pd)));
    let pd = hca.alloc_pd().expect("a domain");
    let used = queue(hca, pd);
    case("domain given back with a queue pair in it", outcome(hca.dealloc_pd(pd)));
    let window = hca.alloc_window(WindowSpec { pd, kind: WindowKind::One }).expect("a window");
    drop(used);
    case("domain given back with a window in it", outcome(hca.dealloc_pd(pd)));
    hca.dealloc_window(window).expect("there");
    for (text, access) in [
        ("region, remote writing without local writing", Access::REMOTE_WRITE),
        ("region, remote atomics without local writing", Access::REMOTE_ATOMIC),
        ("region, remote reading alone", Access::REMOTE_READ),
        ("region, binding alone", Access::WINDOW_BIND),
    ] {
        case(text, outcome(region(hca, bed.pd, 0, access)));
    }
}

/// The change to `state` with all that it needs, as `to` of cases.c.
fn change(qp: &QueuePair, hca: &Hca, state: QpState) -> QpChange {
    let service = Transport::ReliableConnection;
    match state {
        QpState::Init => QpChange::init(service, Access::REMOTE_WRITE | Access::REMOTE_READ, QKey::default()),
        QpState::ReadyToReceive => QpChange::ready_to_receive(service, qp.address(), hca.config()),
        QpState::ReadyToSend => QpChange::ready_to_send(service, qp.address().psn, hca.config()),
        other => QpChange::to(other),
    }
}

pub fn states(hca: &Arc<Hca>, say: &mut Answers) {
    use QpState::{Error, Init, ReadyToReceive, ReadyToSend, Reset};
    let bed = Bed::new(hca);
    let all = [
        (Reset, "reset"),
        (Init, "init"),
        (ReadyToReceive, "ready to receive"),
        (ReadyToSend, "ready to send"),
        (Error, "error"),
    ];
    let in_state = |state: QpState| {
        let qp = queue_pair(hca, bed.pd, &bed.a.cq);
        let way: &[QpState] = match state {
            Init => &[Init],
            ReadyToReceive => &[Init, ReadyToReceive],
            ReadyToSend => &[Init, ReadyToReceive, ReadyToSend],
            Error => &[Init, Error],
            _ => &[],
        };
        way.iter().for_each(|next| qp.modify(&change(&qp, hca, *next)).expect("a legal way"));
        qp
    };
    for (from, from_name) in all {
        for (next, next_name) in all {
            let qp = in_state(from);
            let changed = qp.modify(&change(&qp, hca, next));
            say.push((format!("from {from_name} to {next_name}"), outcome(changed).to_owned()));
        }
        let qp = in_state(from);
        let sges = [Sge { key: bed.local, address: RegionAddr(0), length: 8 }];
        let remote = Remote { key: bed.remote, address: RegionAddr(SIZE) };
        let posted = qp.post_send(&SendRequest::write(1, &sges, remote));
        say.push((format!("request posted in {from_name}"), outcome(posted).to_owned()));
    }
}
