//! Unreliable connections and datagrams: nobody says what has landed.
//!
//! A request succeeds when its packets are sent. They may arrive later, twice, or never, so its bytes are followed until the
//! connection is made anew. A packet that comes twice takes a second receive: each end posts one for each life of a
//! connection, and what that receive says has landed.

use super::Broken;
use super::memory::Piece;
use super::traffic::{Chosen, Way, needs};
use super::verbs::Verb;
use super::world::{Request, World};
use hw_model::hca::{
    Access as Rights, AddressVector, Completion, Destination, QKey, Remote, Sge, Status, Transport,
};
use odp::space::Access;

/// The queue key of all datagrams.
pub const QKEY: QKey = QKey(0x0b5e);
/// Bytes of the global route header, before a datagram in its receive.
const ROUTE: u64 = 40;
/// Set in the name of the transfer of a route header; the rest is that of its request.
const HEADER: u64 = 1 << 62;
/// Requests followed beyond their end, after which a connection is made anew.
pub const MOST_FOLLOWED: usize = 5;

impl World {
    pub(super) fn post_unreliable(&mut self, connection: usize, end: usize) -> Result<(), Broken> {
        let service = self.connections[connection].service;
        let received = self.connections[connection].received[1 - end];
        let verb = match service {
            Transport::UnreliableDatagram => self.choices.of(&[Verb::Send, Verb::SendImmediate]),
            _ => self.choices.of(&[
                Verb::Write,
                Verb::Write,
                Verb::WriteImmediate,
                Verb::Send,
                Verb::SendImmediate,
            ]),
        };
        let worn = self.connections[connection].ended_badly.len() >= MOST_FOLLOWED;
        if worn || received && verb.receive().is_some() {
            return Ok(());
        }
        let [near, far] = self.ends(connection, end);
        let (local_needs, remote_needs) = needs(Way::Write);
        let mut wanted = self.some_length();
        let is_datagram = service == Transport::UnreliableDatagram;
        if is_datagram {
            wanted = wanted.min(u64::from(self.mtu));
        }
        let Some(remote) = self.some_chosen(far, remote_needs, wanted) else { return Ok(()) };
        let len = remote.piece.len as u64;
        let Some(local) = self.some_chosen(near, local_needs, len) else { return Ok(()) };
        let len = local.piece.len;
        let remote = Chosen { piece: Piece { len, ..remote.piece }, ..remote };
        let header = if is_datagram {
            let part = self.some_chosen(far, remote_needs, ROUTE);
            let Some(part) = part.filter(|part| part.piece.len as u64 == ROUTE) else { return Ok(()) };
            Some(part)
        } else {
            None
        };
        let source = [local.piece];
        let target: Vec<Piece> = header.iter().chain([&remote]).map(|chosen| chosen.piece).collect();
        if !self.memory.can_follow(&source, &target) {
            self.counts.one("requests not posted because they could not be followed");
            return Ok(());
        }
        let allowed = self.memory.allows_device(local.piece, Access::Read)
            && target.iter().all(|piece| self.memory.allows_device(*piece, Access::Write));
        let taken = header.iter().chain([&local, &remote]).all(|chosen| self.is_taken(chosen));
        if !allowed && !self.choices.chance(100) || !taken && !self.choices.chance(500) {
            return Ok(());
        }
        let id = self.next_id;
        let reach = [near, far].iter().all(|device| self.devices[*device].reaches_peers);
        self.memory.begin_transfer(id, &source, &target[target.len() - 1..], !(allowed && taken && reach));
        if let Some(header) = &header {
            self.memory.begin_anything(id | HEADER, &[header.piece]);
            self.connections[connection].ended_badly.push(id | HEADER);
        }
        self.counts.one(match (service, verb.receive()) {
            (Transport::UnreliableDatagram, _) => "verbs: datagram",
            (_, Some(true)) => "verbs: unreliable send",
            (_, _) => "verbs: unreliable write",
        });
        self.connections[connection].received[1 - end] |= verb.receive().is_some();
        let keys = [&local, &remote].into_iter().chain(&header).flat_map(Chosen::keys).collect();
        let request = Request {
            keys,
            header: header.map(|header| header.sge()),
            target: vec![remote.piece],
            ..self.request(connection, end)
        };
        let remote = Remote { key: remote.key, address: remote.address };
        self.send(end, verb, &[local], remote, request)
    }

    /// Where requests of an end of a connection go.
    pub(super) fn destination(&self, connection: usize, end: usize) -> Destination {
        let of = &self.connections[connection];
        if of.service != Transport::UnreliableDatagram {
            return Destination::Connected;
        }
        let peer = of.qps[1 - end].endpoint();
        Destination::Datagram { to: AddressVector::to(peer.gid), qpn: peer.qpn, qkey: QKEY }
    }

    /// A request of an unreliable service was sent.
    pub(super) fn sent(&mut self, id: u64, request: &Request) {
        if !request.followed {
            return;
        }
        if request.landed {
            self.memory.end_transfer(id, true);
        } else {
            self.connections[request.connection].ended_badly.push(id);
        }
    }

    /// The receive for `id` has ended with success. Of a send that says that all has landed, and that nothing lands again.
    pub(super) fn landed(&mut self, id: u64, connection: usize, completion: &Completion) {
        if self.is_reliable(connection) || completion.status != Status::Success {
            return;
        }
        if completion.operation != hw_model::hca::OperationCode::Receive {
            return;
        }
        let followed = &mut self.connections[connection].ended_badly;
        let sent = followed.contains(&id);
        followed.retain(|other| *other != id && *other != id | HEADER);
        self.memory.end_transfer(id | HEADER, false);
        self.counts.one("receives of unreliable services");
        if sent {
            self.memory.end_transfer(id, true);
        } else if let Some(request) = self.requests.get_mut(&id) {
            request.landed = true;
        }
    }

    /// The list of a receive for `request`, whose bytes go to `remote`.
    pub(super) fn receive_list(request: &Request, remote: Remote, length: u32) -> Vec<Sge> {
        let bytes = Sge { key: remote.key, address: remote.address, length };
        request.header.into_iter().chain([bytes]).collect()
    }

    /// Some bytes of a region of `device` that allows `needs`, explicit or implicit.
    pub(super) fn some_chosen(&mut self, device: usize, needs: Rights, len: u64) -> Option<Chosen> {
        if self.choices.chance(350)
            && let Some(chosen) = self.some_implicit_part(device, len)
        {
            return Some(chosen);
        }
        let region = self.some_region(device, needs)?;
        Some(self.some_part(region, len))
    }
}
