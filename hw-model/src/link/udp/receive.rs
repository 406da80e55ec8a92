//! The receive thread: sleeps until something arrives, or until something that waits may be sent.

use super::Shared;
use super::counts::add;
use super::group::Group;
use super::sys::{ReceiveBuffers, Received};
use crate::hca::Time;
use crate::sync::atomic::Ordering;
use crate::wire::{
    Checked, Content, Flow, GlobalRoute, Identification, Malformed, Packet, check_icrc, gid_of, parse,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::Socket;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;

/// Receives a call.
const MESSAGES: usize = 8;

pub(super) fn run(shared: &Shared) {
    let mut buffers = ReceiveBuffers::new(MESSAGES);
    let mut arrived = Vec::new();
    let mut groups = Vec::new();
    while !shared.stop.load(Ordering::Acquire) {
        if shared.regroup.swap(false, Ordering::AcqRel) {
            groups.clone_from(&*shared.groups.lock());
        }
        let mut most = receive((&shared.socket, shared.address), shared, &mut buffers, &mut arrived);
        for group in &groups {
            most = most.max(receive((&group.socket, group.address), shared, &mut buffers, &mut arrived));
        }
        if !arrived.is_empty() {
            let ingress = shared.ingress.lock().clone();
            if let Some(ingress) = ingress {
                ingress.deliver_all(&mut arrived);
            }
            arrived.clear();
        }
        shared.flush();
        if most < MESSAGES {
            sleep(shared, &groups);
        }
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
        match packet(&flow, route, index as u16, content, shared) {
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
    content.into_packet(&shared.pool)
}

/// Until something arrives, the bell rings, or what waits may go.
fn sleep(shared: &Shared, groups: &[Group]) {
    let (due, blocked) = shared.outbox.waits();
    let events = if blocked { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
    let own = [PollFd::new(&shared.bell, PollFlags::IN), PollFd::new(&shared.socket, events)];
    let others = groups.iter().map(|group| PollFd::new(&*group.socket, PollFlags::IN));
    let mut sources: Vec<PollFd<'_>> = own.into_iter().chain(others).collect();
    let timeout = due.map(|Time(due)| due.saturating_sub(shared.now().0)).map(|nanoseconds| Timespec {
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
