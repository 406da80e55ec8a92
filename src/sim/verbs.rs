//! Which operation carries a transfer, and the receives that some of them need.
//!
//! The oracle follows bytes from a source to a target. A write, a send into a receive that names the target and an atomic
//! write move them one way; a read, and an atomic that changes nothing, the other. A flush moves none.

use super::Broken;
use super::traffic::{Chosen, Way};
use super::world::{Request, World};
use hw_model::hca::{
    Access, Completion, Immediate, Key, Operation, RecvRequest, Remote, Sge, Status, WindowBind,
};
use hw_model::wire::{Feth, Placement, Selectivity};

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
    SendInvalidate(Key),
    /// Of nothing: it changes no byte.
    FetchAdd,
    /// For what it is compared with: it changes no byte.
    CompareSwap(u64),
    /// Of so many bytes.
    Flush(u32),
    Bind(WindowBind),
    Register(Key, Access),
    Invalidate(Key),
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
            Self::CompareSwap(word) => Operation::CompareSwap { remote, compare: word, swap: word },
            Self::Flush(length) => {
                let how = Feth { placement: Placement::GLOBAL, selectivity: Selectivity::Range };
                Operation::Flush { remote, length, how }
            }
            Self::SendInvalidate(key) => Operation::SendInvalidate(key),
            Self::Bind(bind) => Operation::Bind(bind),
            Self::Register(key, access) => Operation::Register { key, access },
            Self::Invalidate(key) => Operation::Invalidate { key },
        }
    }

    /// Whether the peer must have a receive for it, and whether its bytes go there.
    pub(super) fn receive(self) -> Option<bool> {
        match self {
            Self::Send | Self::SendImmediate | Self::SendInvalidate(_) => Some(true),
            Self::WriteImmediate => Some(false),
            _ => None,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Write => "verbs: write",
            Self::WriteImmediate => "verbs: write with immediate data",
            Self::Send => "verbs: send",
            Self::SendImmediate => "verbs: send with immediate data",
            Self::AtomicWrite => "verbs: atomic write",
            Self::Read => "verbs: read",
            Self::FetchAdd => "verbs: fetch and add",
            Self::CompareSwap(_) => "verbs: compare and swap",
            Self::Flush(_) => "verbs: flush",
            Self::SendInvalidate(_) => "verbs: send with invalidate",
            Self::Bind(_) => "verbs: bind",
            Self::Register(..) => "verbs: fast registration",
            Self::Invalidate(_) => "verbs: local invalidate",
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
    pub(super) fn some_verb(&mut self, way: Way, local: &mut Vec<Chosen>, remote: &mut Chosen) -> Verb {
        let verb = match way {
            Way::Write => {
                let some =
                    [Verb::Write, Verb::WriteImmediate, Verb::Send, Verb::SendImmediate, Verb::AtomicWrite];
                self.choices.of(&some)
            }
            Way::Read => {
                // Nothing, of which there is much, or what nobody has written.
                let word = self.choices.of(&[0, self.stamp]);
                let flush = Verb::Flush(remote.piece.len as u32);
                let some =
                    [Verb::Read, Verb::Read, Verb::Read, Verb::FetchAdd, Verb::CompareSwap(word), flush];
                self.choices.of(&some)
            }
        };
        match verb {
            Verb::FetchAdd | Verb::CompareSwap(_) if !remote.access.contains(Access::REMOTE_ATOMIC) => {
                Verb::Read
            }
            Verb::Flush(_) if !remote.access.contains(Access::FLUSH_GLOBAL) => Verb::Read,
            Verb::Flush(_) => {
                local.clear();
                verb
            }
            Verb::AtomicWrite if !narrow(local, remote) => Verb::Write,
            Verb::FetchAdd | Verb::CompareSwap(_) if !narrow(local, remote) => Verb::Read,
            verb => verb,
        }
    }

    /// Posts the receive that request `id` of an end of a connection needs, if it needs one.
    pub(super) fn post_receive(
        &mut self,
        (connection, end): (usize, usize),
        (verb, id): (Verb, u64),
        list: &[Sge],
    ) -> Result<(), Broken> {
        let Some(takes_bytes) = verb.receive() else { return Ok(()) };
        let request = RecvRequest::new(id | RECEIVE, if takes_bytes { list } else { &[] });
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
                // The route header of a datagram goes to memory of its own.
                let may = |request: &Request| request.header.is_some() || self.may_fail(id, request);
                // Or a read that came late was done again, and what it read was gone: its peer's receive ends with it.
                self.is_doomed(connection) || self.requests.get(&id).is_none_or(may)
            }
            _ => false,
        };
        if !may {
            let immediate = completion.immediate();
            let detail = format!("the receive for {id} ended with {status:?}, {immediate:?}, for no reason");
            return Err(Broken { rule: "status", detail });
        }
        self.connections[connection].broken |= status != Status::Success;
        self.landed(id, connection, completion);
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
