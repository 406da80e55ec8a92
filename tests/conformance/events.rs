//! Events of completion queues (IBTA volume 1, 11.4.2.2 and 11.4.2.3), and queues that are too small.

use crate::cases::Case;
use crate::objects::{Channel, PATIENCE, Wants};
use crate::rig::{End, Queue, Rig};
use crate::talk::Tries;
use crate::world::{Error, What, World};
use hw_model::addr::RegionAddr;
use hw_model::hca::{
    AsyncEvent, Completion, Key, Moderation, Notify, Operation, RecvRequest, Remote, SendRequest,
};
use hw_model::wire::Immediate;
use mr::Mode;

/// What the queue that is asked about is called, and the one that tells when all has been heard.
const ASKED: u64 = 0x1234_5678_9abc;
const LAST: u64 = 2;

/// A connection, one end of which completes to a queue with a channel.
struct Heard {
    world: World,
    end: End,
    channel: Channel,
    /// Completes to another queue of that channel: its events come after all that came before.
    last: Queue,
    /// The other end of that.
    _peer: Queue,
}

impl Heard {
    fn new(rig: &Rig, end: End) -> Result<Self, Error> {
        Self::with(rig, end, 64)
    }

    fn with(rig: &Rig, end: End, entries: u32) -> Result<Self, Error> {
        let channel = rig.channel(end)?;
        let (remote, local) = World::sides(rig, Mode::Pinned)?;
        let heard = Wants { entries, channel: Some((&channel, ASKED)), shared: None };
        let wants = |of| if of == end { heard } else { Wants::NOTHING };
        let responder = rig.queue_with(End::Responder, &remote.pd, wants(End::Responder))?;
        let requester = rig.queue_with(End::Requester, &local.pd, wants(End::Requester))?;
        let (own, other, others) = match end {
            End::Responder => (&remote.pd, &local.pd, End::Requester),
            End::Requester => (&local.pd, &remote.pd, End::Responder),
        };
        let last = Wants { channel: Some((&channel, LAST)), ..Wants::NOTHING };
        let (last, peer) = (rig.queue_with(end, own, last)?, rig.queue(others, other)?);
        rig.connect(end, &last, &peer, Tries::default())?;
        rig.connect(others, &peer, &last, Tries::default())?;
        let world = World::connected(rig, (remote, responder), (local, requester), Tries::default())?;
        Ok(Self { world, end, channel, last, _peer: peer })
    }

    fn queue(&self) -> &Queue {
        if self.end == End::Responder { &self.world.responder } else { &self.world.requester }
    }

    fn arm(&self, notify: Notify) -> Result<(), Error> {
        self.queue().arm(notify)
    }

    /// A write of the requester's, which ends with success, or is refused.
    fn writes(&self, good: bool) -> Result<Completion, Error> {
        let mut transfer = self.world.transfer(What::Write, 0, 64);
        if !good {
            transfer.remote_key = Key(transfer.remote_key.0 ^ 0x0055_5500);
        }
        self.world.post(1, transfer)?;
        self.world.requester.completion()
    }

    /// A message of the requester's, both ends of which complete.
    fn sends(&self, operation: Operation, solicited: bool) -> Result<Completion, Error> {
        self.world.responder.post_recv(&RecvRequest::new(7, &self.world.remote.pieces(&[(0, 64)])))?;
        let from = self.world.local.pieces(&[(0, 64)]);
        self.world.requester.post(&SendRequest { solicited, ..SendRequest::new(1, operation, &from) })?;
        self.world.requester.completion()?;
        self.world.responder.completion()
    }

    /// Events of the queue up to now. As many as are expected are waited for; what is more is found as well.
    fn events(&self, expected: usize) -> Result<String, Error> {
        let mut count = 0;
        while count < expected && self.channel.next(PATIENCE)? == Some(ASKED) {
            count += 1;
        }
        self.last.arm(Notify::Any)?;
        let nowhere = Remote { key: Key(0), address: RegionAddr(0) };
        self.last.post(&SendRequest::write(3, &[], nowhere))?;
        self.last.completion()?;
        loop {
            match self.channel.next(PATIENCE)? {
                Some(ASKED) => count += 1,
                Some(LAST) => break,
                Some(other) => return Err(format!("an event of {other}").into()),
                None => return Err("the last event never came".into()),
            }
        }
        self.last.acknowledge(1);
        self.queue().acknowledge(count as u32);
        Ok(if count == 1 { "1 event".to_owned() } else { format!("{count} events") })
    }
}

fn unarmed(rig: &Rig) -> Result<String, Error> {
    let heard = Heard::new(rig, End::Requester)?;
    heard.writes(true)?;
    heard.events(0)
}

fn armed_afterwards(rig: &Rig) -> Result<String, Error> {
    let heard = Heard::new(rig, End::Requester)?;
    heard.writes(true)?;
    heard.arm(Notify::Any)?;
    heard.events(0)
}

fn armed_once(rig: &Rig) -> Result<String, Error> {
    let heard = Heard::new(rig, End::Requester)?;
    heard.arm(Notify::Any)?;
    heard.writes(true)?;
    heard.writes(true)?;
    heard.events(1)
}

fn armed_again(rig: &Rig) -> Result<String, Error> {
    let heard = Heard::new(rig, End::Requester)?;
    for _ in 0..2 {
        heard.arm(Notify::Any)?;
        heard.writes(true)?;
    }
    heard.events(2)
}

fn armed_twice(rig: &Rig, order: [Notify; 2]) -> Result<String, Error> {
    let heard = Heard::new(rig, End::Requester)?;
    order.into_iter().try_for_each(|notify| heard.arm(notify))?;
    heard.writes(true)?;
    heard.events(1)
}

fn failed(rig: &Rig, notify: Notify) -> Result<String, Error> {
    let heard = Heard::new(rig, End::Requester)?;
    heard.arm(notify)?;
    let status = heard.writes(false)?.status;
    Ok(format!("{status:?}, {}", heard.events(1)?))
}

fn flushed(rig: &Rig) -> Result<String, Error> {
    let heard = Heard::new(rig, End::Responder)?;
    heard.world.responder.post_recv(&RecvRequest::new(7, &[]))?;
    heard.arm(Notify::Any)?;
    heard.world.responder.fail()?;
    let status = heard.world.responder.completion()?.status;
    Ok(format!("{status:?}, {}", heard.events(1)?))
}

fn received(
    rig: &Rig,
    notify: Notify,
    operation: Operation,
    solicited: bool,
    expected: usize,
) -> Result<String, Error> {
    let heard = Heard::new(rig, End::Responder)?;
    heard.arm(notify)?;
    let status = heard.sends(operation, solicited)?.status;
    Ok(format!("{status:?}, {}", heard.events(expected)?))
}

fn written(rig: &Rig) -> Result<String, Error> {
    let heard = Heard::new(rig, End::Responder)?;
    heard.arm(Notify::Solicited)?;
    let key = heard.world.remote.region.key();
    let to = Remote { key, address: heard.world.remote.region.address() };
    let status = heard.sends(Operation::WriteImmediate(to, Immediate(1)), true)?.status;
    Ok(format!("{status:?}, {}", heard.events(1)?))
}

/// An event that was not wanted any more is not undone, and none comes for what was not armed.
fn polled_first(rig: &Rig) -> Result<String, Error> {
    let heard = Heard::new(rig, End::Requester)?;
    heard.arm(Notify::Any)?;
    heard.writes(true)?;
    let first = heard.events(1)?;
    heard.writes(true)?;
    Ok(format!("{first}, and then {}", heard.events(0)?))
}

fn moderated(rig: &Rig) -> Result<String, Error> {
    let heard = Heard::new(rig, End::Requester)?;
    // Two completions, or 65 ms at the latest: the second comes before that, or after it, and is the one event either way.
    heard.queue().moderate(Moderation { count: 2, period: u16::MAX })?;
    heard.arm(Notify::Any)?;
    heard.writes(true)?;
    heard.writes(true)?;
    heard.events(1)
}

/// More completions than the queue holds.
fn overrun(rig: &Rig) -> Result<String, Error> {
    let heard = Heard::with(rig, End::Requester, 2)?;
    let transfer = heard.world.transfer(What::Write, 0, 8);
    let mut posted = 0;
    // Devices round the size of a queue up.
    while posted < 16 && heard.world.post(posted, transfer).is_ok() {
        posted += 1;
    }
    let heard = rig.hears(End::Requester, |event| matches!(event, AsyncEvent::CqError(_)), PATIENCE)?;
    Ok(if heard { "the queue's error is told" } else { "nothing is told" }.to_owned())
}

/// A queue that holds completions grows, and keeps them.
fn resized(rig: &Rig) -> Result<String, Error> {
    let heard = Heard::with(rig, End::Requester, 4)?;
    for id in 0..3 {
        heard.world.post(id, heard.world.transfer(What::Write, 0, 8))?;
    }
    heard.world.requester.resize(32)?;
    for id in 3..12 {
        heard.world.post(id, heard.world.transfer(What::Write, 0, 8))?;
    }
    let mut ids = Vec::new();
    for _ in 0..12 {
        ids.push(heard.world.requester.completion()?.id.0);
    }
    Ok(format!("{ids:?}"))
}

type Row = (&'static str, &'static str, fn(&Rig) -> Result<String, Error>);

const SENT: &str = "Success, 1 event";

const ROWS: [Row; 20] = [
    ("not armed", "0 events", unarmed),
    ("armed after the completion", "0 events", armed_afterwards),
    ("armed once and two completions", "1 event", armed_once),
    ("armed again for the second of two completions", "2 events", armed_again),
    ("armed once, and another completion after the event", "1 event, and then 0 events", polled_first),
    ("armed for any and then for solicited ones", "1 event", |r| {
        armed_twice(r, [Notify::Any, Notify::Solicited])
    }),
    ("armed for solicited ones and then for any", "1 event", |r| {
        armed_twice(r, [Notify::Solicited, Notify::Any])
    }),
    ("armed for any and a failure", "RemoteAccessError, 1 event", |r| failed(r, Notify::Any)),
    ("armed for solicited ones and a failure", "RemoteAccessError, 1 event", |r| {
        failed(r, Notify::Solicited)
    }),
    ("armed for any and a flush", "FlushError, 1 event", flushed),
    ("armed for any and a message", SENT, |r| received(r, Notify::Any, Operation::Send, false, 1)),
    ("armed for any and a solicited message", SENT, |r| received(r, Notify::Any, Operation::Send, true, 1)),
    ("armed for solicited ones and a message", "Success, 0 events", |r| {
        received(r, Notify::Solicited, Operation::Send, false, 0)
    }),
    ("armed for solicited ones and a solicited message", SENT, |r| {
        received(r, Notify::Solicited, Operation::Send, true, 1)
    }),
    ("armed for solicited ones and a solicited message with data", SENT, |r| {
        received(r, Notify::Solicited, Operation::SendImmediate(Immediate(1)), true, 1)
    }),
    ("armed for solicited ones and a solicited write with data", SENT, written),
    ("not armed and a solicited message", "Success, 0 events", |r| {
        let heard = Heard::new(r, End::Responder)?;
        let status = heard.sends(Operation::Send, true)?.status;
        Ok(format!("{status:?}, {}", heard.events(0)?))
    }),
    ("two completions for an event", "1 event", moderated),
    ("more completions than the queue holds", "the queue's error is told", overrun),
    ("a queue that grows", "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]", resized),
];

pub fn all() -> Vec<Case> {
    let case = |(name, expected, act): Row| Case {
        name: format!("events, {name}"),
        mode: Mode::Pinned,
        changes_memory: false,
        expected,
        run: Box::new(act),
    };
    ROWS.into_iter().map(case).collect()
}
