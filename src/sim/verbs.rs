//! Which operation carries a transfer, and the receives that some of them need.
//!
//! The oracle follows bytes from a source to a target. A write, a send into a receive that names the target and an atomic
//! write move them one way; a read, and a fetch-and-add of nothing, the other.

use super::Broken;
use super::traffic::{Chosen, Way};
use super::world::{Slot, World};
use hw_model::addr::RegionAddr;
use hw_model::hca::{Access, Completion, Immediate, Key, Operation, RecvRequest, Remote, Sge, Status};
use mr::Region;

/// Bytes that an atomic moves.
const WORD: u64 = 8;
/// Set in the name of a receive; the rest is that of the request it is for.
const RECEIVE: u64 = 1 << 63;

/// The operation of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Verb {
    Write,
    WriteImmediate,
    Send,
    SendImmediate,
    AtomicWrite,
    Read,
    /// Of nothing: it changes no byte.
    FetchAdd,
}

impl Verb {
    pub(super) fn operation(self, remote: Remote, id: u64) -> Operation {
        let immediate = Immediate(id as u32);
        match self {
            Self::Write => Operation::Write(remote),
            Self::WriteImmediate => Operation::WriteImmediate(remote, immediate),
            Self::Send => Operation::Send,
            Self::SendImmediate => Operation::SendImmediate(immediate),
            Self::AtomicWrite => Operation::AtomicWrite(remote),
            Self::Read => Operation::Read(remote),
            Self::FetchAdd => Operation::FetchAdd { remote, add: 0 },
        }
    }

    /// Whether the peer must have a receive for it, and whether its bytes go there.
    fn receive(self) -> Option<bool> {
        match self {
            Self::Send | Self::SendImmediate => Some(true),
            Self::WriteImmediate => Some(false),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Write => "verbs: write",
            Self::WriteImmediate => "verbs: write with immediate data",
            Self::Send => "verbs: send",
            Self::SendImmediate => "verbs: send with immediate data",
            Self::AtomicWrite => "verbs: atomic write",
            Self::Read => "verbs: read",
            Self::FetchAdd => "verbs: fetch and add",
        }
    }
}

/// Makes both ends the first aligned word that lies in them. False if there is none.
fn narrow(local: &mut [Chosen], remote: &mut Chosen) -> bool {
    let [local] = local else { return false };
    let skip = remote.address.0.next_multiple_of(WORD) - remote.address.0;
    let aligned = remote.piece.at.offset(skip).0.is_multiple_of(WORD);
    if !aligned || remote.piece.len as u64 - skip.min(remote.piece.len as u64) < WORD || local.piece.len < 8 {
        return false;
    }
    remote.address = remote.address.offset(skip);
    remote.piece.at = remote.piece.at.offset(skip);
    remote.piece.len = WORD as usize;
    local.piece.len = WORD as usize;
    true
}

impl World {
    /// How bytes go between `local` and `remote`; atomics make them a word.
    pub(super) fn some_verb(&mut self, way: Way, local: &mut [Chosen], remote: &mut Chosen) -> Verb {
        let verb = match way {
            Way::Write => {
                let some =
                    [Verb::Write, Verb::WriteImmediate, Verb::Send, Verb::SendImmediate, Verb::AtomicWrite];
                self.choices.of(&some)
            }
            Way::Read => self.choices.of(&[Verb::Read, Verb::Read, Verb::FetchAdd]),
        };
        let atomic = |slot: &Slot| {
            slot.region.key() == remote.key && slot.region.access().contains(Access::REMOTE_ATOMIC)
        };
        let verb = match verb {
            Verb::FetchAdd if !self.regions.iter().any(atomic) => Verb::Read,
            Verb::AtomicWrite if !narrow(local, remote) => Verb::Write,
            Verb::FetchAdd if !narrow(local, remote) => Verb::Read,
            verb => verb,
        };
        self.counts.one(verb.name());
        verb
    }

    /// Posts the receive that request `id` of an end of a connection needs, if it needs one.
    pub(super) fn post_receive(
        &mut self,
        (connection, end): (usize, usize),
        (verb, id): (Verb, u64),
        (key, address, length): (Key, RegionAddr, u32),
    ) -> Result<(), Broken> {
        let Some(takes_bytes) = verb.receive() else { return Ok(()) };
        let list = [Sge { key, address, length }];
        let request = RecvRequest::new(id | RECEIVE, if takes_bytes { &list } else { &[] });
        match self.connections[connection].qps[1 - end].post_recv(&request) {
            Ok(()) => {
                self.receives.insert(id, connection);
                Ok(())
            }
            Err(error) => {
                Err(Broken { rule: "a receive can be posted", detail: format!("for {id}: {error}") })
            }
        }
    }

    /// Takes the completion of a receive; `false` if it is none.
    pub(super) fn received(&mut self, completion: &Completion) -> Result<bool, Broken> {
        if completion.id.0 & RECEIVE == 0 {
            return Ok(false);
        }
        let (id, status) = (completion.id.0 & !RECEIVE, completion.status);
        self.note(|| format!("receive for {id}: {status:?}"));
        let Some(connection) = self.receives.remove(&id) else {
            let detail = format!("the receive for {id} ended ({status:?}), and had ended before");
            return Err(Broken { rule: "every receive ends once", detail });
        };
        let may = match status {
            Status::Success => {
                self.counts.one("receives: success");
                completion.immediate().is_none_or(|immediate| immediate.0 == id as u32)
            }
            Status::FlushError => self.is_doomed(connection),
            Status::LocalProtectionError | Status::LocalAccessError => {
                self.requests.get(&id).is_none_or(|request| self.may_fail(id, request))
            }
            _ => false,
        };
        if !may {
            let immediate = completion.immediate();
            let detail = format!("the receive for {id} ended with {status:?}, {immediate:?}, for no reason");
            return Err(Broken { rule: "status", detail });
        }
        self.connections[connection].broken |= status != Status::Success;
        Ok(true)
    }

    /// Receives of a connection that has gone must have gone with it.
    pub(super) fn no_receive_is_left(&self, connection: usize) -> Result<(), Broken> {
        let left: Vec<&u64> =
            self.receives.iter().filter(|(_, of)| **of == connection).map(|(id, _)| id).collect();
        if left.is_empty() {
            return Ok(());
        }
        let detail = format!("the receives for {left:?} did not end with their queue pairs");
        Err(Broken { rule: "every receive ends once", detail })
    }
}
