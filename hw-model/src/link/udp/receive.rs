//! Reading the sockets; and the receive thread, which does when nobody else does, and sleeps until something arrives or
//! until something that waits may be sent.

use super::Shared;
use super::counts::add;
use super::group::Group;
use super::sys::{RECEIVE_BYTES, ReceiveBuffers, Received};
use crate::hca::Time;
use crate::link::turns::{TURN, Watch};
use crate::sync::atomic::Ordering;
use crate::wire::{
    Checked, Content, Flow, GlobalRoute, Identification, Malformed, Packet, check_icrc, gid_of, parse,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::Socket;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Receives a call.
const MESSAGES: usize = 8;

/// How long it is looked for more after something has come, before going to sleep: what comes in a stream comes within that,
/// and being woken costs its sender more than the looks cost us.
const LOOKS: Duration = Duration::from_micros(30);

/// What one look finds is dealt with in less.
const AWAY: Duration = Duration::from_millis(1);
/// How long nothing is looked for where there are more threads than processors: a thread that has looked for long waits for a whole
/// slice of another when something does come, and one that has slept does not.
const CROWDED: Duration = Duration::from_millis(200);

/// Receives that are smaller are copied out of their buffers, which their packets would keep.
const KEPT: usize = RECEIVE_BYTES / 4;

/// What reading needs.
pub(super) struct Reader {
    buffers: ReceiveBuffers,
    arrived: Vec<Packet>,
    groups: Vec<Group>,
}

impl Reader {
    pub(super) fn new() -> Self {
        Self { buffers: ReceiveBuffers::new(MESSAGES), arrived: Vec::new(), groups: Vec::new() }
    }

    /// Takes what is there and hands it over. How many receives of one socket, at most.
    pub(super) fn turn(&mut self, shared: &Shared) -> usize {
        let Self { buffers, arrived, groups } = self;
        if shared.regroup.swap(false, Ordering::AcqRel) {
            groups.clone_from(&*shared.groups.lock());
        }
        let mut most = receive((&shared.socket, shared.address), shared, buffers, arrived);
        for group in groups {
            most = most.max(receive((&group.socket, group.address), shared, buffers, arrived));
        }
        if !arrived.is_empty() {
            let ingress = shared.ingress.lock().clone();
            if let Some(ingress) = ingress {
                ingress.deliver_all(arrived);
            }
            arrived.clear();
        }
        most
    }
}

pub(super) fn run(shared: &Shared) {
    let mut watch = Watch::new(&shared.turns);
    let mut crowded = Instant::now();
    while !shared.stop.load(Ordering::Acquire) {
        let theirs = watch.are_theirs(Instant::now());
        if !theirs {
            read(shared, &mut watch, &mut crowded);
        }
        shared.flush();
        // Whoever polls by now reads from now on.
        if theirs || !watch.may_be_theirs(Instant::now()) {
            sleep(shared, theirs);
        }
    }
}

/// Reads as long as something comes, and somewhat longer, but not before `crowded`.
fn read(shared: &Shared, watch: &mut Watch<'_>, crowded: &mut Instant) {
    let mut last = Instant::now();
    let mut until = last;
    while !shared.stop.load(Ordering::Acquire) {
        let some = shared.reader.lock().turn(shared) > 0;
        shared.flush();
        let now = Instant::now();
        watch.has_read(some, now);
        if now - last > AWAY {
            *crowded = now + CROWDED;
        }
        if some && now >= *crowded {
            until = now + LOOKS;
        }
        last = now;
        // Not to be yielded meanwhile: where others have more to do than there are processors, it would be long before this
        // thread runs again.
        if !some && now >= until || watch.may_be_theirs(now) {
            return;
        }
        std::hint::spin_loop();
    }
}

/// Takes what has come to a socket, as far as one call goes. How many messages that was.
fn receive(
    (socket, destination): (&Socket, IpAddr),
    shared: &Shared,
    buffers: &mut ReceiveBuffers,
    arrived: &mut Vec<Packet>,
) -> usize {
    let received = match buffers.receive(socket.as_fd()) {
        Ok(received) => received,
        Err(error) => {
            // Errors of earlier sends come back here too; the transport asks again for what was lost.
            if !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) {
                tracing::debug!(%error, "receive");
            }
            0
        }
    };
    if received > 0 {
        add(&shared.counters.receive_calls, 1);
        for index in 0..received {
            match buffers.get(index) {
                Some(message) => take(&message, destination, shared, arrived),
                None => shared.counters.malformed.add(Malformed::Network),
            }
        }
    }
    received
}

/// The packets in what one receive took.
fn take(message: &Received<'_>, destination: IpAddr, shared: &Shared, arrived: &mut Vec<Packet>) {
    let route =
        GlobalRoute { flow_label: 0, traffic_class: message.traffic_class, hop_limit: message.hop_limit };
    let flow = Flow { source: message.source.ip(), destination, source_port: message.source.port() };
    if message.truncated {
        shared.counters.malformed.add(Malformed::TooLong);
        return;
    }
    if message.bytes.is_empty() {
        shared.counters.malformed.add(Malformed::Truncated);
    }
    for (index, content) in message.bytes.chunks(message.segment.max(1)).enumerate() {
        match packet(&flow, route, index as u16, content, message, shared) {
            Ok(packet) => arrived.extend(packet),
            Err(reason) => {
                shared.counters.malformed.add(reason);
                tracing::debug!(%reason, from = %message.source, bytes = content.len(), "dropped");
            }
        }
    }
}

/// The packet in a datagram; `None` if it was a congestion notification.
fn packet(
    flow: &Flow,
    route: GlobalRoute,
    index: u16,
    content: &[u8],
    message: &Received<'_>,
    shared: &Shared,
) -> Result<Option<Packet>, Malformed> {
    let checked = check_icrc(flow, Identification::Likely(index), content)?;
    let content = parse(flow, route, content)?;
    if let Content::Packet { data, .. } = &content
        && data.len() > shared.max_payload as usize
    {
        return Err(Malformed::TooLong);
    }
    add(&shared.counters.received, 1);
    if checked != Checked::Whole {
        add(&shared.counters.checked_in_part, 1);
    }
    if let Content::Congestion(_) = content {
        add(&shared.counters.notifications_received, 1);
        shared.outbox.notified(gid_of(flow.source), shared.now());
    }
    if message.bytes.len() >= KEPT {
        return Ok(content.into_part(message.whole));
    }
    content.into_packet(&shared.pool)
}

/// Until something arrives (which is of no interest while it is others' turn to read), the bell rings, or what waits may go.
fn sleep(shared: &Shared, theirs: bool) {
    let (due, blocked) = shared.outbox.waits();
    let mut events = if theirs { PollFlags::empty() } else { PollFlags::IN };
    events.set(PollFlags::OUT, blocked);
    let groups = if theirs { Vec::new() } else { shared.groups.lock().clone() };
    let own = [PollFd::new(&shared.bell, PollFlags::IN), PollFd::new(&shared.socket, events)];
    let others = groups.iter().map(|group| PollFd::new(&*group.socket, PollFlags::IN));
    let mut sources: Vec<PollFd<'_>> = own.into_iter().chain(others).collect();
    let due = due.map(|Time(due)| due.saturating_sub(shared.now().0));
    let turn = theirs.then_some(TURN.as_nanos() as u64);
    let timeout = due.into_iter().chain(turn).min().map(|nanoseconds| Timespec {
        tv_sec: (nanoseconds / 1_000_000_000) as i64,
        tv_nsec: (nanoseconds % 1_000_000_000) as i64,
    });
    // Interrupted is as good as woken.
    let _ = poll(&mut sources, timeout.as_ref());
    let rung = sources[0].revents().contains(PollFlags::IN);
    if rung {
        let _ = rustix::io::read(&shared.bell, &mut [0; 8]);
    }
}
