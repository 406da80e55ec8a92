//! RDMA: requests are posted, end once, and mean what they say.

use super::Broken;
use super::memory::Piece;
use super::unreliable::MOST_FOLLOWED;
use super::verbs::Verb;
use super::world::{Connection, Request, Retired, Slot, World};
use hw_model::addr::RegionAddr;
use hw_model::hca::{Access as Rights, Completion, Key, Remote, SendRequest, Sge, Status, Transport};
use hw_model::sync::Arc;
use mr::Region;
use odp::space::Access;
use std::hash::Hash;

/// Requests outstanding on one connection.
const MOST_OUTSTANDING: usize = 5;

/// A piece of a region: as a request names it, and what it is.
pub(super) struct Chosen {
    pub(super) key: Key,
    pub(super) address: RegionAddr,
    pub(super) piece: Piece,
    /// What the key allows.
    pub(super) access: Rights,
    /// The key of the region that the key leads to, if it is not that itself.
    pub(super) through: Option<Key>,
}

impl Chosen {
    /// Every key that it needs.
    pub(super) fn keys(&self) -> impl Iterator<Item = Key> + use<> {
        [self.key].into_iter().chain(self.through)
    }

    pub(super) fn sge(&self) -> Sge {
        Sge { key: self.key, address: self.address, length: self.piece.len as u32 }
    }
}

/// Which way the bytes of a request go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Way {
    /// From the poster to its peer.
    Write,
    /// From the peer to the poster.
    Read,
}

/// What is wrong with a request that must fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    RandomKey,
    DeadKey,
    OneTooMany,
}

impl World {
    /// A connection that works, and which end of it posts.
    fn some_end(&mut self) -> Option<(usize, usize)> {
        let working: Vec<usize> = (0..self.connections.len())
            .filter(|index| {
                let outstanding =
                    self.requests.values().filter(|request| request.connection == *index).count();
                !self.connections[*index].broken && outstanding < MOST_OUTSTANDING
            })
            .collect();
        let index = self.choices.index(working.len())?;
        Some((working[index], self.choices.below(2) as usize))
    }

    pub(super) fn some_region(&mut self, device: usize, needs: Rights) -> Option<usize> {
        let fit = |slot: &Slot| slot.place.device == device && slot.region.access().contains(needs);
        let all: Vec<usize> = (0..self.regions.len()).filter(|index| fit(&self.regions[*index])).collect();
        self.choices.index(all.len()).map(|index| all[index])
    }

    /// `len` bytes of a region, or fewer if it is shorter.
    pub(super) fn some_part(&mut self, region: usize, len: u64) -> Chosen {
        let place = self.regions[region].place;
        let len = len.min(place.len);
        let offset = self.choices.between(0, place.len - len);
        let slot = &self.regions[region];
        Chosen {
            key: slot.region.key(),
            address: slot.region.address().offset(offset),
            piece: Piece { process: place.process, at: place.at.offset(offset), len: len as usize },
            access: slot.region.access(),
            through: None,
        }
    }

    pub(super) fn some_length(&mut self) -> u64 {
        match self.choices.below(4) {
            0 => self.choices.between(1, 64),
            1 => self.choices.between(1, 5000),
            2 => self.choices.between(1, 3) * 4096,
            _ => self.choices.between(4000, 12000),
        }
    }

    /// Posts a write or read between two regions.
    pub(super) fn post(&mut self) -> Result<(), Broken> {
        let Some((connection, end)) = self.some_end() else { return Ok(()) };
        if !self.is_reliable(connection) {
            return self.post_unreliable(connection, end);
        }
        if self.choices.chance(170) {
            return self.post_management(connection, end);
        }
        let way = if self.choices.chance(500) { Way::Write } else { Way::Read };
        let [near, far] = self.ends(connection, end);
        let (local_needs, remote_needs) = needs(way);
        let wanted = self.some_length();
        let alias = match self.choices.chance(300) {
            true => self.some_alias_part(connection, 1 - end, remote_needs, wanted),
            false => None,
        };
        let Some(remote) = alias.or_else(|| self.some_chosen(far, remote_needs, wanted)) else {
            return Ok(());
        };
        let mut left = remote.piece.len as u64;
        let Some(first) = self.some_chosen(near, local_needs, left) else { return Ok(()) };
        let mut local = vec![first];
        left -= local[0].piece.len as u64;
        // Where one region is too short, a second entry; what is still missing is not asked for.
        if left > 0
            && let Some(second) = self.some_region(near, local_needs)
        {
            local.push(self.some_part(second, left));
        }
        let len: usize = local.iter().map(|chosen| chosen.piece.len).sum();
        let mut remote = Chosen { piece: Piece { len, ..remote.piece }, ..remote };
        let mut verb = self.some_verb(way, &mut local, &mut remote);
        if verb.receive() == Some(true) && remote.through.is_some() {
            // A receive needs a local key, which a window is not.
            verb = Verb::Write;
        }
        let locals: Vec<Piece> = local.iter().map(|chosen| chosen.piece).collect();
        let (source, target) = match way {
            Way::Write => (locals, vec![remote.piece]),
            Way::Read => (vec![remote.piece], locals),
        };
        if !self.memory.can_follow(&source, &target) {
            self.counts.one("requests not posted because they could not be followed");
            return Ok(());
        }
        let id = self.next_id;
        let changes = matches!(verb, Verb::FetchAdd | Verb::CompareSwap(_));
        let source_needs = if changes { Access::Write } else { Access::Read };
        let allowed = source.iter().all(|piece| self.memory.allows_device(*piece, source_needs))
            && target.iter().all(|piece| self.memory.allows_device(*piece, Access::Write));
        let taken = local.iter().chain([&remote]).all(|chosen| self.is_taken(chosen));
        // Each that fails takes its connection with it: few are enough.
        if !allowed && !self.choices.chance(100) || !taken && !self.choices.chance(500) {
            return Ok(());
        }
        self.counts.add("requests on what is hugetlb no more", u64::from(!taken));
        let reach = [near, far].iter().all(|device| self.devices[*device].reaches_peers);
        self.memory.begin_transfer(id, &source, &target, !(allowed && taken && reach));
        let mut keys: Vec<Key> = local.iter().chain([&remote]).flat_map(Chosen::keys).collect();
        if verb == Verb::Send
            && self.choices.chance(900)
            && let Some((key, region)) = self.some_key_to_invalidate(connection, 1 - end, id)
        {
            verb = Verb::SendInvalidate(key);
            keys.push(region);
        }
        self.counts.one(verb.name());
        let manages = matches!(verb, Verb::SendInvalidate(_));
        let is_read = way == Way::Read;
        let request = Request { keys, target, manages, is_read, ..self.request(connection, end) };
        let remote = Remote { key: remote.key, address: remote.address };
        self.send(end, verb, &local, remote, request)
    }

    /// What there is to say of every request.
    pub(super) fn request(&self, connection: usize, end: usize) -> Request {
        let devices = self.ends(connection, end);
        Request {
            connection,
            is_read: false,
            followed: true,
            keys: Vec::new(),
            devices,
            target: Vec::new(),
            injected: devices.iter().map(|device| self.devices[*device].injected()).sum(),
            overtaken: self.network.counts.overtaken,
            hastened: self.hastened,
            disturbances: self.disturbances(),
            manages: false,
            header: None,
            landed: false,
        }
    }

    /// Posts a request that must fail and may not change a byte.
    pub(super) fn post_badly(&mut self) -> Result<(), Broken> {
        let Some((connection, end)) = self.some_end() else { return Ok(()) };
        let mut way = if self.choices.chance(500) { Way::Write } else { Way::Read };
        match self.connections[connection].service {
            Transport::UnreliableDatagram => return Ok(()),
            Transport::UnreliableConnection => way = Way::Write,
            _ => {}
        }
        let fault = self.choices.of(&[Fault::RandomKey, Fault::DeadKey, Fault::OneTooMany]);
        let [near, far] = self.ends(connection, end);
        let (local_needs, remote_needs) = needs(way);
        let Some(local) = self.some_region(near, local_needs) else { return Ok(()) };
        // What is beyond the end of one that changes may be in it then.
        let region = self.some_region(far, remote_needs);
        let region = region.filter(|region| !self.is_changing(self.regions[*region].region.key()));
        let Some(region) = region else { return Ok(()) };
        let wanted = self.some_length();
        let local = self.some_part(local, wanted);
        let len = local.piece.len as u64;
        let slot = &self.regions[region];
        let (place, start) = (slot.place, slot.region.address());
        let remote = match fault {
            Fault::RandomKey => {
                let key = Key(self.choices.below(u32::MAX));
                if self.is_live_key(key) {
                    return Ok(());
                }
                Remote { key, address: start }
            }
            Fault::DeadKey => {
                let dead: Vec<(Key, u64)> = self
                    .dead_keys
                    .iter()
                    .filter(|(device, key, _)| *device == far && !self.is_live_key(*key))
                    .map(|(_, key, address)| (*key, *address))
                    .collect();
                let Some(nth) = self.choices.index(dead.len()) else { return Ok(()) };
                Remote { key: dead[nth].0, address: RegionAddr(dead[nth].1) }
            }
            // One byte past the end: not one earlier byte may land.
            Fault::OneTooMany if len <= place.len => {
                Remote { key: self.regions[region].region.key(), address: start.offset(place.len - len + 1) }
            }
            Fault::OneTooMany => return Ok(()),
        };
        self.counts.one("requests posted that must fail");
        let is_read = way == Way::Read;
        let keys = vec![local.key, remote.key];
        let request = Request { is_read, followed: false, keys, ..self.request(connection, end) };
        let verb = if way == Way::Write { Verb::Write } else { Verb::Read };
        self.send(end, verb, &[local], remote, request)
    }

    pub(super) fn ends(&self, connection: usize, end: usize) -> [usize; 2] {
        let devices = self.connections[connection].devices;
        [devices[end], devices[1 - end]]
    }

    pub(super) fn send(
        &mut self,
        end: usize,
        verb: Verb,
        local: &[Chosen],
        remote: Remote,
        request: Request,
    ) -> Result<(), Broken> {
        let id = self.next_id;
        self.next_id += 1;
        let sges: Vec<Sge> = local.iter().map(Chosen::sge).collect();
        let length = sges.iter().map(|sge| sge.length).sum();
        let list = Self::receive_list(&request, remote, length);
        self.post_receive((request.connection, end), (verb, id), &list)?;
        let operation = verb.operation(remote, id);
        let fence = self.choices.chance(100) && self.is_reliable(request.connection);
        let destination = self.destination(request.connection, end);
        let send = SendRequest { fence, destination, ..SendRequest::new(id, operation, &sges) };
        self.note(|| {
            let pieces: Vec<Piece> = local.iter().map(|chosen| chosen.piece).collect();
            format!("post {id}: {verb:?} {pieces:?} {remote:?}, target {:?}", request.target)
        });
        let connection = &self.connections[request.connection];
        if let Err(error) = connection.qps[end].post_send(&send) {
            // The peer has refused an earlier request, and its queue pair is gone: nothing was posted.
            self.memory.end_transfer(id, false);
            self.not_managed(id);
            self.counts.one("posts that were refused");
            self.note(|| format!("refused: {error}"));
            return Ok(());
        }
        self.counts.one("requests posted");
        self.devices[request.devices[0]].asleep = None;
        self.requests.insert(id, request);
        Ok(())
    }

    /// Takes what has completed on a device.
    pub(super) fn collect_completions(&mut self, device: usize) -> Result<(), Broken> {
        let mut completions = Vec::new();
        let polled = self.devices[device].cq.poll(&mut completions, 64);
        polled.map_err(|overrun| Broken { rule: "completion queue", detail: overrun.to_string() })?;
        completions.into_iter().try_for_each(|completion| self.complete(completion))
    }

    fn complete(&mut self, completion: Completion) -> Result<(), Broken> {
        let (id, status) = (completion.id.0, completion.status);
        (id, status as u8, self.now.0).hash(&mut self.digest);
        if self.received(&completion)? {
            return Ok(());
        }
        self.note(|| format!("request {id}: {status:?}"));
        let Some(request) = self.requests.remove(&id) else {
            let detail = format!("request {id} ended ({status:?}), which was not posted or had ended before");
            return Err(Broken { rule: "every request ends once", detail });
        };
        self.counts.one(status_name(status));
        if !self.may_end_so(id, &request, status) {
            let detail = format!(
                "request {id} of connection {} (keys {:?}, target {:?}) ended with {status:?}, and nothing happened that \
                 it could fail for",
                request.connection, request.keys, request.target
            );
            return Err(Broken { rule: "status", detail });
        }
        if status == Status::Success {
            if self.is_reliable(request.connection) {
                self.memory.end_transfer(id, true);
            } else {
                self.sent(id, &request);
            }
            if request.manages {
                self.managed(id);
            }
            if request.is_read {
                self.connections[request.connection].haunted_from.get_or_insert(request.disturbances);
            }
            if self.choices.chance(600) {
                // Its region may have gone meanwhile, and the process after it.
                for piece in &request.target {
                    if !self.processes[piece.process].has_ended() {
                        self.read(*piece)?;
                    }
                }
            }
            return Ok(());
        }
        let connection = &mut self.connections[request.connection];
        connection.broken = true;
        if request.followed {
            connection.ended_badly.push(id);
        }
        Ok(())
    }

    /// Whether something is going on that a request of this connection may fail for.
    pub(super) fn is_doomed(&self, connection: usize) -> bool {
        let other = &self.connections[connection];
        let haunted = other.haunted_from.is_some_and(|from| self.disturbances() > from);
        haunted
            || other.broken
            || other.closing
            || self
                .requests
                .iter()
                .any(|(id, request)| request.connection == connection && self.may_fail(*id, request))
    }

    /// What a late packet could find gone.
    fn disturbances(&self) -> u64 {
        self.disturbances + self.devices.iter().map(|dev| dev.injected()).sum::<u64>()
    }

    pub(super) fn may_fail(&self, id: u64, request: &Request) -> bool {
        let injected = request.devices.iter().map(|device| self.devices[*device].injected()).sum::<u64>();
        !request.followed || self.memory.is_excused(id) || injected > request.injected
    }

    /// Whether packets have overtaken each other as often as a queue pair tries again: a gap in the answers is taken for a
    /// loss, and asked for anew (IBTA volume 1, 9.7.5.1.2).
    fn was_disordered(&self, request: &Request) -> bool {
        self.network.counts.overtaken - request.overtaken > self.tries(request)
    }

    fn tries(&self, request: &Request) -> u64 {
        self.devices[request.devices[0]].device.hca().config().retry_count.into()
    }

    /// Whether the timer of `request` can have run out as often as a queue pair tries again, while its peer, or the
    /// network, had something to do but was not given its turn.
    fn was_too_slow(&self, request: &Request) -> bool {
        self.hastened - request.hastened > self.tries(request)
    }

    fn may_end_so(&self, id: u64, request: &Request, status: Status) -> bool {
        match status {
            // Nobody tells an unreliable service that a request was refused.
            Status::Success => request.followed || !self.is_reliable(request.connection),
            Status::MemoryManagementError => request.manages && self.may_fail(id, request),
            Status::LocalProtectionError | Status::RemoteAccessError | Status::RemoteOperationError => {
                self.may_fail(id, request) || self.connections[request.connection].closing
            }
            Status::FlushError => self.may_fail(id, request) || self.is_doomed(request.connection),
            Status::RetryExceeded => {
                self.lossy
                    || self.was_disordered(request)
                    || self.was_too_slow(request)
                    || self.may_fail(id, request)
                    || self.is_doomed(request.connection)
            }
            Status::LocalQpOperationError
            | Status::BadResponseError
            | Status::RemoteInvalidRequestError
            | Status::RnrRetryExceeded
            | Status::LocalLengthError
            | Status::LocalAccessError
            | Status::RemoteAbortedError => false,
        }
    }

    /// Takes a connection down that has failed, or now and then one that has not, and makes a new one.
    pub(super) fn reconnect_some(&mut self) -> Result<(), Broken> {
        let used_up = |connection: &Connection| {
            connection.broken
                || connection.ended_badly.len() >= MOST_FOLLOWED
                || connection.received == [true; 2]
        };
        let broken: Vec<usize> =
            (0..self.connections.len()).filter(|index| used_up(&self.connections[*index])).collect();
        let index = match self.choices.index(broken.len()) {
            Some(nth) => broken[nth],
            None if self.choices.chance(8) => self.choices.below(self.connections.len() as u32) as usize,
            None => return Ok(()),
        };
        self.reconnect(index)
    }

    pub(super) fn reconnect(&mut self, index: usize) -> Result<(), Broken> {
        self.note(|| format!("connection {index} is made anew"));
        self.counts.one("connections made anew");
        self.connections[index].closing = true;
        let [first, second] = self.connections[index].devices;
        let fresh = self.connect(first, second, self.connections[index].service)?;
        // Dropped with all they had: it ends with a flush error now.
        let Connection { qps, ended_badly, .. } = std::mem::replace(&mut self.connections[index], fresh);
        drop(qps);
        self.drop_aliases(index);
        self.connections[index].closing = true;
        self.connections[index].ended_badly = ended_badly;
        for device in [first, second] {
            self.collect_completions(device)?;
        }
        let left: Vec<u64> = self
            .requests
            .iter()
            .filter(|(_, request)| request.connection == index)
            .map(|(id, _)| *id)
            .collect();
        if !left.is_empty() {
            let detail = format!("requests {left:?} did not end with their queue pairs");
            return Err(Broken { rule: "every request ends once", detail });
        }
        self.no_receive_is_left(index)?;
        let connection = &mut self.connections[index];
        (connection.closing, connection.broken) = (false, false);
        let transfers = std::mem::take(&mut connection.ended_badly);
        let hosts = [first, second].map(|device| self.devices[device].host);
        let drains = hosts.map(|host| (host, self.epoch(host).drain()));
        self.retired.push(Retired { transfers, drains: drains.into() });
        Ok(())
    }

    /// What failed long enough ago does not land any more.
    pub(super) fn finish_retired(&mut self) {
        let mut index = 0;
        while index < self.retired.len() {
            let hosts = &self.hosts;
            let over = |(host, drain): &mut (usize, hw_model::bus::Drain)| {
                drain.poll(hw_model::bus::HostMemory::epoch(&*hosts[*host].sim))
            };
            if self.retired[index].drains.iter_mut().all(over) {
                for id in self.retired.swap_remove(index).transfers {
                    self.memory.end_transfer(id, false);
                }
            } else {
                index += 1;
            }
        }
    }

    pub(super) fn epoch(&self, host: usize) -> &Arc<hw_model::bus::DmaEpoch> {
        hw_model::bus::HostMemory::epoch(&*self.hosts[host].sim)
    }
}

pub(super) fn needs(way: Way) -> (Rights, Rights) {
    match way {
        Way::Write => (Rights::empty(), Rights::REMOTE_WRITE),
        Way::Read => (Rights::LOCAL_WRITE, Rights::REMOTE_READ),
    }
}

fn status_name(status: Status) -> &'static str {
    match status {
        Status::Success => "requests: success",
        Status::LocalProtectionError => "requests: local protection error",
        Status::LocalQpOperationError => "requests: local QP operation error",
        Status::FlushError => "requests: flushed",
        Status::BadResponseError => "requests: bad response",
        Status::RemoteInvalidRequestError => "requests: remote invalid request",
        Status::RemoteAccessError => "requests: remote access error",
        Status::RemoteOperationError => "requests: remote operation error",
        Status::RetryExceeded => "requests: retries exceeded",
        Status::RnrRetryExceeded => "requests: RNR retries exceeded",
        Status::MemoryManagementError => "requests: memory management error",
        Status::LocalLengthError => "requests: local length error",
        Status::LocalAccessError => "requests: local access error",
        Status::RemoteAbortedError => "requests: remote aborted",
    }
}
