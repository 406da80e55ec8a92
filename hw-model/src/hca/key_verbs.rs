//! The verbs on keys: making, changing, destroying.

use super::device::Hca;
use super::key::{
    CreateKeyError, DestroyKeyError, FastKeySpec, FastMap, ImplicitKeySpec, IndirectKeySpec, KeyChange,
    KeySpec, KeyTable, KeyViolation, MapKeyError, ReregKeyError, Target, UnknownKey, WindowSpec,
};
use super::pd::Pd;
use super::points;
use crate::wire::Key;

impl Hca {
    /// A new random key for what `spec` describes. From this moment peers who know it reach the memory.
    ///
    /// # Errors
    /// See [`CreateKeyError`].
    pub fn create_key(&self, spec: KeySpec) -> Result<Key, CreateKeyError> {
        self.new_key(spec.pd, |keys| keys.create(spec))
    }

    /// A new random key for the memory of other keys, or for pieces of the bus, with gaps between them.
    ///
    /// # Errors
    /// See [`CreateKeyError`].
    pub fn create_indirect_key(&self, spec: IndirectKeySpec) -> Result<Key, CreateKeyError> {
        self.new_key(spec.pd, |keys| keys.create(spec))
    }

    /// A new random key for the regions in the slots of a table, which come and go.
    ///
    /// # Errors
    /// See [`CreateKeyError`].
    pub fn create_implicit_key(&self, spec: ImplicitKeySpec) -> Result<Key, CreateKeyError> {
        self.new_key(spec.pd, |keys| keys.create(spec))
    }

    /// Takes an implicit key back, as [`Hca::destroy_key`] does. The keys in its slots stay.
    ///
    /// # Errors
    /// [`UnknownKey`].
    pub fn destroy_implicit_key(&self, key: Key) -> Result<(), UnknownKey> {
        let wanted = |target: &Target| matches!(target, Target::Implicit(_));
        let target = self.device.keys.destroy(key, false, wanted).map_err(|_| UnknownKey { key })?;
        self.pds.release(target.pd());
        Ok(())
    }

    /// A new random key that reaches nothing until a work request registers memory for it
    /// ([`Operation::Register`](super::Operation::Register)).
    ///
    /// # Errors
    /// [`CreateKeyError::Pd`], [`CreateKeyError::TooMany`], [`CreateKeyError::TooManyEntries`].
    pub fn create_fast_key(&self, spec: FastKeySpec) -> Result<Key, CreateKeyError> {
        let (entries, max) = (spec.max_entries, self.device.config.limits.fast_entries);
        if entries > max {
            return Err(CreateKeyError::TooManyEntries { entries, max });
        }
        self.new_key(spec.pd, |keys| keys.create_fast(spec))
    }

    pub(super) fn new_key(
        &self,
        pd: Pd,
        create: impl FnOnce(&KeyTable) -> Result<Key, CreateKeyError>,
    ) -> Result<Key, CreateKeyError> {
        if self.device.points.meet(points::CREATE_KEY).fails() {
            return Err(CreateKeyError::TooMany { max: self.device.config.limits.keys });
        }
        self.pds.hold(pd)?;
        create(&self.device.keys).inspect_err(|_| self.pds.release(pd))
    }

    /// Says what memory the next registration gives to `key`, a key for fast registration in any of its 256 names. What
    /// is registered at the moment stays.
    ///
    /// # Errors
    /// See [`MapKeyError`].
    pub fn map_fast_key(&self, key: Key, map: FastMap) -> Result<(), MapKeyError> {
        self.device.keys.map_fast(key, map)
    }

    /// Whether `key` is one of this device, of whatever sort.
    #[must_use]
    pub fn has_key(&self, key: Key) -> bool {
        !matches!(self.device.keys.with(key, |_| ()), Err(KeyViolation::Unknown))
    }

    /// Takes a key for fast registration back, registered or not, by any of its 256 names. As with
    /// [`Hca::destroy_key`], drain the epoch before the memory goes.
    ///
    /// # Errors
    /// See [`DestroyKeyError`].
    pub fn destroy_fast_key(&self, key: Key) -> Result<(), DestroyKeyError> {
        let pd = self.device.keys.destroy_fast(key)?;
        self.pds.release(pd);
        Ok(())
    }

    /// Takes an indirect key back, as [`Hca::destroy_key`] does. The keys that it named stay.
    ///
    /// # Errors
    /// [`DestroyKeyError::Unknown`].
    pub fn destroy_indirect_key(&self, key: Key) -> Result<(), DestroyKeyError> {
        let target = self.device.keys.destroy(key, false, |target| matches!(target, Target::Indirect(_)))?;
        self.pds.release(target.pd());
        Ok(())
    }

    /// Takes a null key back.
    ///
    /// # Errors
    /// [`DestroyKeyError::Unknown`].
    pub fn destroy_null_key(&self, key: Key) -> Result<(), DestroyKeyError> {
        let target = self.device.keys.destroy(key, false, |target| matches!(target, Target::Null(_)))?;
        self.pds.release(target.pd());
        Ok(())
    }

    /// Takes a key back. Bursts that begin after this returns do not find it; drain the epoch for those under way
    /// ([`DmaEpoch::drain`](crate::bus::DmaEpoch::drain)). Gives back what the key covered. Never blocks on an engine.
    ///
    /// # Errors
    /// See [`DestroyKeyError`].
    pub fn destroy_key(&self, key: Key) -> Result<KeySpec, DestroyKeyError> {
        self.destroy_pages(key, false)
    }

    /// The same, and it ends the memory windows that are bound over the key: for memory that must go in any case.
    ///
    /// # Errors
    /// [`UnknownKey`].
    pub fn revoke_key(&self, key: Key) -> Result<KeySpec, UnknownKey> {
        self.destroy_pages(key, true).map_err(|_| UnknownKey { key })
    }

    fn destroy_pages(&self, key: Key, revoke: bool) -> Result<KeySpec, DestroyKeyError> {
        let target = self.device.keys.destroy(key, revoke, |target| matches!(target, Target::Pages(_)))?;
        self.pds.release(target.pd());
        match target {
            Target::Pages(spec) => Ok(spec),
            _ => unreachable!("only pages were asked for"),
        }
    }

    /// A new memory window (IBTA volume 1, 11.2.8.9). Its random key reaches nothing until a work request binds it
    /// ([`Operation::Bind`](super::Operation::Bind)).
    ///
    /// # Errors
    /// [`CreateKeyError::Pd`], [`CreateKeyError::TooMany`].
    pub fn alloc_window(&self, spec: WindowSpec) -> Result<Key, CreateKeyError> {
        self.new_key(spec.pd, |keys| keys.create_window(spec))
    }

    /// Takes a memory window back, bound or not, by any of its 256 names (11.2.8.11). As with [`Hca::destroy_key`], drain
    /// the epoch for bursts under way.
    ///
    /// # Errors
    /// [`UnknownKey`].
    pub fn dealloc_window(&self, key: Key) -> Result<(), UnknownKey> {
        let pd = self.device.keys.destroy_window(key)?;
        self.pds.release(pd);
        Ok(())
    }

    /// Has the engines forget the translations that they remember: every translation after this is a miss.
    pub fn flush_translation_cache(&self) {
        self.device.keys.flush();
    }

    /// Changes what `key`, the key of a region, covers, in place: the key stays the same (IBTA volume 1, 11.2.8.7, which
    /// leaves that open). A burst sees the key as it was or as it is, never a mixture; drain the epoch
    /// ([`DmaEpoch::drain`](crate::bus::DmaEpoch::drain)) before memory that it covered goes. Gives what it covered before.
    /// Never blocks on an engine.
    ///
    /// # Errors
    /// See [`ReregKeyError`]. The key is what it was then, which is more than the specification promises.
    pub fn rereg_key(&self, key: Key, change: KeyChange) -> Result<KeySpec, ReregKeyError> {
        if self.device.points.meet(points::REREG_KEY).fails() {
            return Err(ReregKeyError::Unknown(UnknownKey { key }));
        }
        if let Some(pd) = change.pd {
            self.pds.hold(pd)?;
        }
        let moved = change.pd;
        let changed = self.device.keys.change(key, change);
        // One of the two domains has an object less now: the old one, or the new one if nothing came of it.
        if let Some(new) = moved {
            self.pds.release(changed.as_ref().map_or(new, |before| before.pd));
        }
        changed
    }
}
