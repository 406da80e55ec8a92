//! Memory windows: keys that a work request binds to a part of a region, with rights of their own (IBTA volume 1, 10.6.7).
//!
//! ```text
//!                 +--[ BIND of another part, type 1 ]--+
//!                 |                                    v
//!   alloc --> Free --[ BIND: key byte, part, rights ]--> Valid
//!               ^                                         |
//!               +--[ INVALIDATE, type 2B; BIND of no byte, type 1; the queue pair goes, type 2B ]--+
//! ```
//!
//! A window of type 1 serves every queue pair of its protection domain; one of type 2B serves the queue pair that bound it
//! and no other (10.6.7.2.2). Windows have no local key: nothing local is reached by one. A region cannot go, and cannot
//! be reregistered, while a window is bound to it (11.2.8.5, 11.2.8.7); software that must take the memory away in any case
//! ends the windows with it ([`Hca::revoke_key`](crate::hca::Hca::revoke_key)).
//!
//! What a window leads to is found in two steps, the window and its region, so that a region's pages are those of its
//! windows without a copy.

use super::management::ManagementError;
use super::table::{Held, KeyTable};
use super::{Access, Caller, CreateKeyError, KeyViolation, Target, UnknownKey, within};
use crate::addr::RegionAddr;
use crate::hca::pd::Pd;
use crate::hca::request::WindowBind;
use crate::wire::{Key, Qpn};
use hashbrown::{HashMap, HashSet};

/// The two kinds of memory windows (10.6.7.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WindowKind {
    /// Serves its protection domain. Bound again and again; ended by binding it to no byte.
    One,
    /// Type 2B: serves the queue pair that bound it. Bound when free; ended by an invalidation, local or remote.
    TwoB,
}

/// What a memory window is made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowSpec {
    /// The protection domain of the regions and queue pairs that it works with.
    pub pd: Pd,
    /// Its kind.
    pub kind: WindowKind,
}

/// A window that is bound.
#[derive(Clone, Copy, Debug)]
pub(in crate::hca) struct BoundWindow {
    pub(super) pd: Pd,
    /// The only queue pair that it serves.
    qp: Option<Qpn>,
    access: Access,
    /// The first byte, as peers name it.
    base: RegionAddr,
    length: u64,
    pub(in crate::hca) region: Key,
    /// The first byte, as the region names it.
    at: RegionAddr,
}

impl BoundWindow {
    /// Checks that `caller` may do `need` to `length` bytes at `address`, and gives the offset of the first in the window.
    pub(in crate::hca) fn authorize(
        &self,
        caller: Caller,
        need: Access,
        address: RegionAddr,
        length: u64,
    ) -> Result<u64, KeyViolation> {
        if self.qp.is_some_and(|qp| qp != caller.qpn) {
            return Err(KeyViolation::OtherQp);
        }
        // What local access needs is no remote right: a window gives none of it.
        if need.difference(Access::LOCAL_WRITE).is_empty() {
            return Err(KeyViolation::NotAllowed);
        }
        within((self.pd, self.access), (self.base, self.length), (caller.pd, need), (address, length))
    }

    /// The address in the region of the byte at `offset` of the window.
    pub(in crate::hca) fn in_region(&self, offset: u64) -> RegionAddr {
        self.at.offset(offset)
    }

    pub(in crate::hca) fn base(&self) -> RegionAddr {
        self.base
    }
}

/// A window, in its slot of the table.
pub(super) struct Window {
    spec: WindowSpec,
    /// Bound: what it covers.
    pub(super) valid: Option<Target>,
}

/// What there was and what there is after a change.
type Change = (Option<BoundWindow>, Option<BoundWindow>);

impl Window {
    pub(super) fn pd(&self) -> Pd {
        self.spec.pd
    }

    pub(super) fn bound(&self) -> Option<BoundWindow> {
        match self.valid {
            Some(Target::Window(bound)) => Some(bound),
            _ => None,
        }
    }

    /// The checks of a bind that concern the window alone, then the bind.
    fn bind(&mut self, name: &mut Key, caller: Caller, bind: &WindowBind) -> Result<Change, ManagementError> {
        let WindowBind { key, region, address, length, access } = *bind;
        if self.spec.pd != caller.pd {
            return Err(ManagementError::OtherPd { key });
        }
        let before = self.bound();
        let qp = match self.spec.kind {
            // 10.6.7.2.3, the third check of 10.6.7.2.4.
            WindowKind::One if access.contains(Access::ZERO_BASED) => {
                return Err(ManagementError::ZeroBasedTypeOne { key });
            }
            WindowKind::One => None,
            // A window of type 2 goes by invalidation, not by a bind (10.6.7.2.6).
            WindowKind::TwoB if before.is_some() => return Err(ManagementError::NotFree { key }),
            WindowKind::TwoB if length == 0 => return Err(ManagementError::EmptyTypeTwo { key }),
            WindowKind::TwoB => Some(caller.qpn),
        };
        let base = if access.contains(Access::ZERO_BASED) { RegionAddr(0) } else { address };
        let after = BoundWindow { pd: caller.pd, qp, access, base, length, region, at: address };
        let after = (length > 0).then_some(after);
        self.valid = after.map(Target::Window);
        *name = key;
        Ok((before, after))
    }

    /// Ends the binding, if there is one.
    pub(super) fn invalidate(
        &mut self,
        caller: Caller,
        key: Key,
    ) -> Result<Option<BoundWindow>, ManagementError> {
        if self.spec.kind == WindowKind::One {
            return Err(ManagementError::TypeOne { key });
        }
        if self.spec.pd != caller.pd {
            return Err(ManagementError::OtherPd { key });
        }
        let before = self.bound();
        if before.is_some_and(|bound| bound.qp != Some(caller.qpn)) {
            return Err(ManagementError::OtherQp { key });
        }
        self.valid = None;
        Ok(before)
    }
}

/// Which windows, by the upper bits of their keys, are bound over which region and by which queue pair.
#[derive(Default)]
pub(super) struct Bindings {
    over: HashMap<Key, HashSet<u32>>,
    of: HashMap<Qpn, HashSet<u32>>,
}

impl Bindings {
    pub(super) fn over(&self, region: Key) -> usize {
        self.over.get(&region).map_or(0, HashSet::len)
    }

    pub(super) fn changed(&mut self, index: u32, (before, after): Change) {
        if let Some(BoundWindow { region, qp, .. }) = before {
            take_out(&mut self.over, region, index);
            qp.inspect(|qp| take_out(&mut self.of, *qp, index));
        }
        if let Some(BoundWindow { region, qp, .. }) = after {
            self.over.entry(region).or_default().insert(index);
            qp.inspect(|qp| _ = self.of.entry(*qp).or_default().insert(index));
        }
    }
}

fn take_out<K: std::hash::Hash + Eq>(sets: &mut HashMap<K, HashSet<u32>>, key: K, index: u32) {
    if let Some(set) = sets.get_mut(&key) {
        set.remove(&index);
        if set.is_empty() {
            sets.remove(&key);
        }
    }
}

impl KeyTable {
    /// A new random key for a window. It reaches nothing until it is bound.
    pub(in crate::hca) fn create_window(&self, spec: WindowSpec) -> Result<Key, CreateKeyError> {
        self.insert(Held::Window(Box::new(Window { spec, valid: None })))
    }

    /// Takes a window back, bound or not (11.2.8.11), by any of its names. Gives its protection domain.
    pub(in crate::hca) fn destroy_window(&self, key: Key) -> Result<Pd, UnknownKey> {
        let mut writer = self.writer.lock();
        let end = |_: &mut Key, held: &mut Held| match held {
            Held::Window(window) => Some((window.pd(), window.bound())),
            _ => None,
        };
        let (pd, bound) = self.with_index(&writer, key, end).ok_or(UnknownKey { key })?;
        writer.bindings.changed(super::table::index(key), (bound, None));
        self.remove_index(&mut writer, key);
        Ok(pd)
    }

    /// Binds the window that `bind` names.
    pub(in crate::hca) fn bind(&self, caller: Caller, bind: &WindowBind) -> Result<(), ManagementError> {
        let key = bind.key;
        let mut writer = self.writer.lock();
        if bind.length > 0 {
            self.check_region(caller, bind)?;
        }
        let change = |name: &mut Key, held: &mut Held| match held {
            Held::Window(window) => Some(window.bind(name, caller, bind)),
            _ => None,
        };
        let changed = self.with_index(&writer, key, change).ok_or(ManagementError::Unknown { key })??;
        writer.bindings.changed(super::table::index(key), changed);
        Ok(())
    }

    /// The checks of a bind that concern the region (10.6.7.2.4). Its own lock is held for the look only: nothing changes
    /// a region while the table's is held.
    fn check_region(&self, caller: Caller, bind: &WindowBind) -> Result<(), ManagementError> {
        let WindowBind { region, address, length, access, .. } = *bind;
        let allowed = Access::REMOTE | Access::ZERO_BASED;
        if !allowed.contains(access) {
            return Err(ManagementError::NotOfWindows { access });
        }
        let look = |target: &Target| match target {
            Target::Pages(spec) => {
                Ok((spec.access, spec.authorize(caller.pd, Access::empty(), address, length)))
            }
            _ => Err(ManagementError::NotBindable { region }),
        };
        let looked = self.with(region, look).map_err(|_| ManagementError::Unknown { key: region })?;
        let (rights, bounds) = looked?;
        bounds.map_err(|why| ManagementError::Region { region, why })?;
        if !rights.contains(Access::WINDOW_BIND) {
            return Err(ManagementError::NotBindable { region });
        }
        if access.intersects(Access::REMOTE_WRITE | Access::REMOTE_ATOMIC)
            && !rights.contains(Access::LOCAL_WRITE)
        {
            return Err(ManagementError::Spec(CreateKeyError::NeedsLocalWrite { access }));
        }
        Ok(())
    }

    /// Ends every window that is bound over `region`.
    pub(super) fn unbind_over(&self, writer: &mut super::table::Writer, region: Key) {
        let indices: Vec<u32> = writer.bindings.over.get(&region).into_iter().flatten().copied().collect();
        self.unbind(writer, indices);
    }

    /// Ends every window that queue pair `qpn`, which goes, has bound.
    pub(in crate::hca) fn unbind_of(&self, qpn: Qpn) {
        let mut writer = self.writer.lock();
        let indices: Vec<u32> = writer.bindings.of.get(&qpn).into_iter().flatten().copied().collect();
        self.unbind(&mut writer, indices);
    }

    fn unbind(&self, writer: &mut super::table::Writer, indices: Vec<u32>) {
        let end = |_: &mut Key, held: &mut Held| match held {
            Held::Window(window) => {
                let bound = window.bound();
                window.valid = None;
                bound
            }
            _ => None,
        };
        for index in indices {
            let bound = self.with_index(writer, super::table::of_index(index), end);
            writer.bindings.changed(index, (bound, None));
        }
    }
}
