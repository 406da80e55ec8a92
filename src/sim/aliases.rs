//! Keys that work requests make and end: memory windows, and keys for fast registration, over a part of a region.
//!
//! Each end of a reliable connection has one at a time, which its peer uses. It goes by a local invalidation, or by a send of
//! the peer that invalidates it, and with the connection.

use super::Broken;
use super::memory::Piece;
use super::traffic::Chosen;
use super::verbs::Verb;
use super::world::{Request, World};
use hw_model::addr::RegionAddr;
use hw_model::hca::{
    Access as Rights, FastKeySpec, FastMap, FastMemory, IndirectEntry, IndirectList, IndirectTarget, Key, Pd,
    Transport, WindowBind, WindowKind,
};
use hw_model::sync::Arc;
use mr::device::Window;
use mr::device::model::ModelDevice;
use mr::{ProtectionDomain, Region};

/// Bytes that one covers at most.
const LONGEST: u64 = 9000;

/// A key of an end of a connection.
pub struct Alias {
    connection: usize,
    end: usize,
    object: Object,
    state: State,
}

/// What the key is of.
enum Object {
    Window { _kept: Arc<dyn Window> },
    Fast(FastKey),
}

/// A key for fast registration, which goes with this.
struct FastKey {
    key: Key,
    device: Arc<ModelDevice>,
}

impl FastKey {
    fn new(device: &Arc<ModelDevice>, pd: Pd) -> Option<Self> {
        let key = device.hca().create_fast_key(FastKeySpec { pd, max_entries: 1 }).ok()?;
        Some(Self { key, device: Arc::clone(device) })
    }
}

impl Drop for FastKey {
    fn drop(&mut self) {
        let known = self.device.hca().destroy_fast_key(self.key);
        debug_assert!(known.is_ok(), "made by this, and destroyed once");
    }
}

/// What a key leads to.
#[derive(Clone, Copy, Debug)]
struct Bound {
    key: Key,
    region: Key,
    /// The first byte, as the peer names it.
    address: RegionAddr,
    /// The same, as the region names it.
    at: RegionAddr,
    piece: Piece,
    access: Rights,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// It leads nowhere. The last key that it had.
    Free(Key),
    /// The request that makes it lead somewhere is under way.
    Coming(u64, Bound),
    There(Bound),
    /// The request that ends it is under way.
    Going(u64, Bound),
    /// Its region has gone or changed: it is not used any more.
    Lost(Option<Key>),
}

impl State {
    /// The key that the peer might use with success.
    fn live(&self) -> Option<Key> {
        match self {
            Self::Coming(_, bound) | Self::There(bound) | Self::Going(_, bound) => Some(bound.key),
            Self::Lost(key) => *key,
            Self::Free(_) => None,
        }
    }
}

/// The next name of a key: the lowest byte is software's.
fn renamed(key: Key) -> Key {
    Key(key.0 & !0xff | u32::from((key.0 as u8).wrapping_add(1)))
}

impl World {
    /// Posts a request that makes a key lead to a part of a region, or that ends it.
    pub(super) fn post_management(&mut self, connection: usize, end: usize) -> Result<(), Broken> {
        let near = self.ends(connection, end)[0];
        let mine = |alias: &Alias| alias.connection == connection && alias.end == end;
        let Some(index) = self.aliases.iter().position(mine) else {
            self.make_alias(connection, end, near);
            return Ok(());
        };
        let id = self.next_id;
        let (verb, keys) = match self.aliases[index].state {
            State::Free(last) => {
                let needs = Rights::WINDOW_BIND | Rights::LOCAL_WRITE;
                let Some(region) = self.some_region(near, needs) else { return Ok(()) };
                let Some(bound) = self.some_bound(index, region, renamed(last)) else { return Ok(()) };
                self.aliases[index].state = State::Coming(id, bound);
                (self.making(index, &bound), vec![bound.region])
            }
            State::There(bound) => {
                self.aliases[index].state = State::Going(id, bound);
                self.disturbances += 1;
                self.excuse_key(bound.key);
                (Verb::Invalidate(bound.key), vec![bound.region])
            }
            State::Coming(..) | State::Going(..) | State::Lost(_) => return Ok(()),
        };
        self.counts.one(verb.name());
        // The oracle has nothing to follow but whether it may fail.
        self.memory.begin_transfer(id, &[], &[], false);
        let request = Request { keys, manages: true, ..self.request(connection, end) };
        let nowhere = hw_model::hca::Remote { key: Key(0), address: RegionAddr(0) };
        self.send(end, verb, &[], nowhere, request)
    }

    fn make_alias(&mut self, connection: usize, end: usize, device: usize) {
        let dev = &self.devices[device];
        let window = self.choices.chance(500);
        let object = if window {
            let pd: Arc<dyn ProtectionDomain> = Arc::clone(&dev.pd) as _;
            pd.alloc_window(WindowKind::TwoB)
                .ok()
                .map(|window| (window.key(), Object::Window { _kept: window }))
        } else {
            FastKey::new(&dev.device, dev.pd.handle()).map(|fast| (fast.key, Object::Fast(fast)))
        };
        if let Some((key, object)) = object {
            self.aliases.push(Alias { connection, end, object, state: State::Free(key) });
        }
    }

    /// A part of `region` for a key; `None` if the device takes it not.
    fn some_bound(&mut self, index: usize, region: usize, key: Key) -> Option<Bound> {
        let len = self.choices.between(1, LONGEST);
        let part = self.some_part(region, len);
        let all = Rights::REMOTE_WRITE | Rights::REMOTE_READ | Rights::REMOTE_ATOMIC | Rights::FLUSH_GLOBAL;
        let access = part.access & self.choices.of(&[all, all, Rights::REMOTE_READ]);
        let zero_based = self.choices.chance(200);
        let address = if zero_based { RegionAddr(0) } else { part.address };
        let access = if zero_based { access | Rights::ZERO_BASED } else { access };
        let bound = Bound { key, region: part.key, address, at: part.address, piece: part.piece, access };
        let Object::Fast(fast) = &self.aliases[index].object else { return Some(bound) };
        let target = IndirectTarget::Key { key: part.key, address: part.address };
        let entry = IndirectEntry { target, length: part.piece.len as u64 };
        let memory = FastMemory::Gaps(IndirectList::new(vec![entry]).ok()?);
        fast.device.hca().map_fast_key(fast.key, FastMap { address, memory }).ok()?;
        Some(bound)
    }

    fn making(&self, index: usize, bound: &Bound) -> Verb {
        let Bound { key, region, at, piece, access, .. } = *bound;
        match &self.aliases[index].object {
            Object::Window { .. } => {
                Verb::Bind(WindowBind { key, region, address: at, length: piece.len as u64, access })
            }
            Object::Fast(_) => Verb::Register(key, (access - Rights::ZERO_BASED) | Rights::LOCAL_WRITE),
        }
    }

    /// Request `id`, which makes or ends a key, has succeeded.
    pub(super) fn managed(&mut self, id: u64) {
        let Some(alias) = self.aliases.iter_mut().find(|alias| match alias.state {
            State::Coming(by, _) | State::Going(by, _) => by == id,
            _ => false,
        }) else {
            return;
        };
        match alias.state {
            State::Coming(_, bound) => alias.state = State::There(bound),
            State::Going(_, bound) => {
                alias.state = State::Free(bound.key);
                let devices = self.connections[alias.connection].devices;
                self.dead_keys.push((devices[alias.end], bound.key, bound.address.0));
            }
            _ => {}
        }
    }

    /// Up to `len` bytes behind the key that the peer of an end has, if it allows `needs`.
    pub(super) fn some_alias_part(
        &mut self,
        connection: usize,
        far_end: usize,
        needs: Rights,
        len: u64,
    ) -> Option<Chosen> {
        let bound = self.aliases.iter().find_map(|alias| match alias.state {
            State::There(bound) if alias.connection == connection && alias.end == far_end => Some(bound),
            _ => None,
        });
        let bound = bound.filter(|bound| bound.access.contains(needs))?;
        let whole = bound.piece.len as u64;
        let len = len.min(whole);
        let offset = self.choices.between(0, whole - len);
        let piece = Piece { at: bound.piece.at.offset(offset), len: len as usize, ..bound.piece };
        let address = bound.address.offset(offset);
        Some(Chosen { key: bound.key, address, piece, access: bound.access, through: Some(bound.region) })
    }

    /// The key that a send of request `id` can invalidate at its peer, and its region's; nobody else uses it from now on.
    pub(super) fn some_key_to_invalidate(
        &mut self,
        connection: usize,
        far_end: usize,
        id: u64,
    ) -> Option<(Key, Key)> {
        let alias = self.aliases.iter_mut().find(|alias| {
            alias.connection == connection && alias.end == far_end && matches!(alias.state, State::There(_))
        })?;
        let State::There(bound) = alias.state else { return None };
        alias.state = State::Going(id, bound);
        self.disturbances += 1;
        self.excuse_key(bound.key);
        Some((bound.key, bound.region))
    }

    /// Request `id` was not posted after all.
    pub(super) fn not_managed(&mut self, id: u64) {
        for alias in &mut self.aliases {
            match alias.state {
                State::Coming(by, bound) | State::Going(by, bound) if by == id => {
                    alias.state = State::Lost(Some(bound.key));
                }
                _ => {}
            }
        }
    }

    /// `region` goes, or becomes another: what leads to it is not used any more.
    pub(super) fn lose_aliases_of(&mut self, region: Key) {
        for alias in &mut self.aliases {
            match alias.state {
                State::Coming(_, bound) | State::There(bound) | State::Going(_, bound)
                    if bound.region == region =>
                {
                    alias.state = State::Lost(Some(bound.key));
                }
                _ => {}
            }
        }
    }

    /// The queue pairs of a connection have gone.
    pub(super) fn drop_aliases(&mut self, connection: usize) {
        self.aliases.retain(|alias| alias.connection != connection);
    }

    /// Whether `key` leads anywhere.
    pub(super) fn is_live_key(&self, key: Key) -> bool {
        self.regions.iter().any(|slot| slot.region.key() == key)
            || self.wholes.iter().any(|whole| whole.region.key() == key)
            || self.is_live_alias(key)
    }

    /// Whether some request could use `key` with success.
    fn is_live_alias(&self, key: Key) -> bool {
        self.aliases.iter().any(|alias| alias.state.live() == Some(key))
    }

    /// Keys that `device` has for them.
    pub(super) fn aliases_of(&self, device: usize) -> u64 {
        let of = |alias: &&Alias| self.connections[alias.connection].devices[alias.end] == device;
        self.aliases.iter().filter(of).count() as u64
    }

    /// Whether an end of this connection can have them.
    pub(super) fn is_reliable(&self, connection: usize) -> bool {
        self.connections[connection].service == Transport::ReliableConnection
    }
}
