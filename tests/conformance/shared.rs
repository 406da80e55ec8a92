//! Shared receive queues (IBTA volume 1, 10.2.9 and 11.2.3): one queue of receives for several queue pairs.

use crate::cases::Case;
use crate::exchange::told;
use crate::objects::{PATIENCE, Shared, Wants};
use crate::rig::{End, Queue, Rig};
use crate::talk::Tries;
use crate::world::{Error, Side, World};
use hw_model::addr::PAGE_SIZE;
use hw_model::hca::{AsyncEvent, RecvRequest, SendRequest};
use mr::Mode;
use std::time::Duration;

const PAGE: u32 = PAGE_SIZE as u32;

/// Receives that the queue is made for.
const ROOM: u32 = 8;

/// Two connections whose answering ends take receives from one queue.
struct Party {
    remote: Side,
    local: Side,
    shared: Shared,
    responders: [Queue; 2],
    requesters: [Queue; 2],
}

impl Party {
    fn new(rig: &Rig, mode: Mode, tries: Tries) -> Result<Self, Error> {
        let (remote, local) = World::sides(rig, mode)?;
        let shared = remote.pd.shared(ROOM)?;
        let responder =
            || rig.queue_with(End::Responder, &remote.pd, Wants { shared: Some(&shared), ..Wants::NOTHING });
        let responders = [responder()?, responder()?];
        let requesters = [rig.queue(End::Requester, &local.pd)?, rig.queue(End::Requester, &local.pd)?];
        for (one, other) in responders.iter().zip(&requesters) {
            rig.connect(End::Responder, one, other, tries)?;
            rig.connect(End::Requester, other, one, tries)?;
        }
        Ok(Self { remote, local, shared, responders, requesters })
    }

    /// Posts receive `id`, of a page of its own.
    fn receive(&self, id: u64) -> Result<(), Error> {
        let into = self.remote.pieces(&[(id as i64 * PAGE_SIZE as i64, PAGE)]);
        self.shared.post(&RecvRequest::new(id, &into))
    }

    fn post(&self, by: usize, id: u64, len: u32) -> Result<(), Error> {
        let from = self.local.pieces(&[(0, len)]);
        self.requesters[by].post(&SendRequest::send(id, &from))
    }

    /// A message through connection `by`: which receive it found, or how it ended.
    fn sends(&self, by: usize, len: u32) -> Result<String, Error> {
        self.post(by, 1, len)?;
        let sent = self.requesters[by].completion()?.status;
        if sent != hw_model::hca::Status::Success {
            return Ok(format!("{sent:?}"));
        }
        let received = self.responders[by].completion()?;
        let at = received.id.0 as i64 * PAGE_SIZE as i64;
        let moved = self.remote.read(at, received.bytes.into())? == self.local.original(0, len.into());
        Ok(format!("{:?} {}{}", received.status, received.id.0, if moved { "" } else { " with other bytes" }))
    }

    /// Whether the event of the limit came.
    fn told_of_limit(&self, rig: &Rig, patience: Duration) -> Result<&'static str, Error> {
        let number = self.shared.number();
        let is = |event: &AsyncEvent| *event == AsyncEvent::SrqLimitReached(number);
        Ok(if rig.hears(End::Responder, is, patience)? { "told" } else { "not told" })
    }
}

fn party(rig: &Rig, mode: Mode) -> Result<Party, Error> {
    Party::new(rig, mode, Tries::default())
}

fn in_order(rig: &Rig, mode: Mode) -> Result<String, Error> {
    let party = party(rig, mode)?;
    (0..4).try_for_each(|id| party.receive(id))?;
    let said: Result<Vec<_>, _> = [0, 1, 1, 0].into_iter().map(|by| party.sends(by, 100)).collect();
    Ok(said?.join(", "))
}

fn several_packets(rig: &Rig, mode: Mode) -> Result<String, Error> {
    let party = party(rig, mode)?;
    let into = party.remote.pieces(&[(0, PAGE), (2 * PAGE_SIZE as i64, 2 * PAGE)]);
    party.shared.post(&RecvRequest::new(0, &into))?;
    let from = party.local.pieces(&[(0, 2 * PAGE + 7)]);
    party.requesters[0].post(&SendRequest::send(1, &from))?;
    let sent = party.requesters[0].completion()?.status;
    let told = told(&party.responders[0].completion()?).replace(" of another name", "");
    let second = 2 * PAGE_SIZE as i64;
    let moved = party.remote.read(0, PAGE_SIZE)? == party.local.original(0, PAGE_SIZE)
        && party.remote.read(second, PAGE_SIZE + 7)? == party.local.original(PAGE_SIZE as i64, PAGE_SIZE + 7);
    Ok(format!("{sent:?}; {told}, {}", if moved { "bytes as sent" } else { "other bytes" }))
}

/// Two receives, three messages: the third waits for a receive that comes late.
fn one_late(rig: &Rig, mode: Mode) -> Result<String, Error> {
    let party = party(rig, mode)?;
    (0..2).try_for_each(|id| party.receive(id))?;
    let mut said = vec![party.sends(0, 100)?, party.sends(1, 100)?];
    party.post(0, 5, 100)?;
    // Long enough to be refused a few times; nothing rests on it.
    std::thread::sleep(Duration::from_millis(30));
    party.receive(2)?;
    said.push(format!("{:?}", party.requesters[0].completion()?.status));
    said.push(told(&party.responders[0].completion()?).replace(" of another name", ""));
    Ok(said.join(", "))
}

fn too_few(rig: &Rig, mode: Mode) -> Result<String, Error> {
    let party = Party::new(rig, mode, Tries { rnr_retries: 0, ..Tries::default() })?;
    party.receive(0)?;
    Ok(format!("{}, {}", party.sends(0, 100)?, party.sends(1, 100)?))
}

/// One message is too long for the receive that it takes: the other connection goes on with the next.
fn one_too_long(rig: &Rig, mode: Mode) -> Result<String, Error> {
    let party = party(rig, mode)?;
    (0..2).try_for_each(|id| party.receive(id))?;
    let first = party.sends(0, PAGE + 1)?;
    let received = party.responders[0].completion()?;
    Ok(format!("{first} and {:?} {}, {}", received.status, received.id.0, party.sends(1, 100)?))
}

/// The limit is reached by the third of four receives.
fn limited(rig: &Rig, mode: Mode) -> Result<String, Error> {
    let party = party(rig, mode)?;
    (0..4).try_for_each(|id| party.receive(id))?;
    party.shared.set_limit(2)?;
    let mut said = vec![format!("limit {}", party.shared.limit()?)];
    party.sends(0, 100)?;
    party.sends(1, 100)?;
    // Two are left, which is not fewer than two.
    said.push(party.told_of_limit(rig, Duration::ZERO)?.to_owned());
    party.sends(0, 100)?;
    said.push(party.told_of_limit(rig, PATIENCE)?.to_owned());
    said.push(format!("limit {}", party.shared.limit()?));
    party.sends(0, 100)?;
    said.push(party.told_of_limit(rig, Duration::ZERO)?.to_owned());
    Ok(said.join(", "))
}

fn limited_again(rig: &Rig, mode: Mode) -> Result<String, Error> {
    let party = party(rig, mode)?;
    let mut said = Vec::new();
    for round in 0..2 {
        (0..2).try_for_each(|id| party.receive(id + 2 * round))?;
        party.shared.set_limit(2)?;
        party.sends(0, 100)?;
        said.push(party.told_of_limit(rig, PATIENCE)?);
        party.sends(1, 100)?;
    }
    Ok(said.join(", "))
}

/// Fewer than the limit are there when it is armed.
fn limited_late(rig: &Rig, mode: Mode) -> Result<String, Error> {
    let party = party(rig, mode)?;
    party.receive(0)?;
    party.shared.set_limit(4)?;
    Ok(party.told_of_limit(rig, Duration::from_secs(1))?.to_owned())
}

fn limit_of_too_many(rig: &Rig, mode: Mode) -> Result<String, Error> {
    let party = party(rig, mode)?;
    Ok(if party.shared.set_limit(10_000).is_err() { "refused" } else { "taken" }.to_owned())
}

fn too_many(rig: &Rig, mode: Mode) -> Result<String, Error> {
    let party = party(rig, mode)?;
    // Devices round the size of a queue up.
    let taken = (0..100).take_while(|id| party.shared.post(&RecvRequest::new(*id, &[])).is_ok()).count();
    Ok(if taken < ROOM as usize {
        "too few"
    } else if taken < 100 {
        "refused"
    } else {
        "all taken"
    }
    .to_owned())
}

fn of_its_own(rig: &Rig, mode: Mode) -> Result<String, Error> {
    let party = party(rig, mode)?;
    let posted = party.responders[0].post_recv(&RecvRequest::new(7, &[]));
    Ok(if posted.is_err() { "refused" } else { "taken" }.to_owned())
}

/// A queue pair that fails takes no receive with it that it had not begun.
fn one_fails(rig: &Rig, mode: Mode) -> Result<String, Error> {
    let party = party(rig, mode)?;
    (0..2).try_for_each(|id| party.receive(id))?;
    party.responders[0].fail()?;
    let number = party.responders[0].number();
    let is = |event: &AsyncEvent| *event == AsyncEvent::LastWqeReached(number);
    let told = if rig.hears(End::Responder, is, PATIENCE)? { "told" } else { "not told" };
    Ok(format!("{told}, {}, {}", party.sends(1, 100)?, party.sends(1, 100)?))
}

type Row = (&'static str, &'static str, fn(&Rig, Mode) -> Result<String, Error>);

const ROWS: [Row; 12] = [
    ("messages of two connections", "Success 0, Success 1, Success 2, Success 3", in_order),
    ("several packets into two pieces", "Success; Receive of 8199 bytes, bytes as sent", several_packets),
    ("a receive that is posted late", "Success 0, Success 1, Success, Receive of 100 bytes", one_late),
    ("too few receives", "Success 0, RnrRetryExceeded", too_few),
    ("one that is too long", "RemoteInvalidRequestError and LocalLengthError 0, Success 1", one_too_long),
    ("a limit", "limit 2, not told, told, limit 0, not told", limited),
    ("a limit again and again", "told, told", limited_again),
    ("a limit that is reached when it is set", "told", limited_late),
    ("a limit of more than the queue holds", "refused", limit_of_too_many),
    ("more receives than the queue holds", "refused", too_many),
    ("a receive of a queue pair's own", "refused", of_its_own),
    ("a queue pair that fails", "told, Success 0, Success 1", one_fails),
];

pub fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    for (mode, kept) in [(Mode::Pinned, "pinned"), (Mode::OnDemand, "on demand")] {
        for (name, expected, act) in ROWS {
            cases.push(Case {
                name: format!("shared receives, {kept}, {name}"),
                mode,
                changes_memory: false,
                expected,
                run: Box::new(move |rig| act(rig, mode)),
            });
        }
    }
    cases
}
