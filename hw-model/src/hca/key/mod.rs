//! Memory keys: what a key covers, who may use it for what, and the page list behind it.
//!
//! One key serves as local and as remote key. Keys are random, because a key is all that a remote peer must know
//! (invariant 15), and a destroyed one stays out of use for a while, so that a peer that kept it reaches nothing.

mod change;
mod fast;
mod implicit;
mod indirect;
mod management;
mod table;
mod window;

pub use change::{KeyChange, KeyMemory, ReregKeyError};
pub use fast::{FastKeySpec, FastMap, FastMemory, MapKeyError};
pub use implicit::{ImplicitKeySpec, ImplicitTable, SLOT_BYTES, SLOT_SHIFT};
pub use indirect::{
    IndirectEntry, IndirectKeySpec, IndirectList, IndirectListError, IndirectTarget, MIN_INDIRECT_ENTRY,
};
pub(super) use table::KeyTable;
pub(super) use window::BoundWindow;
pub use window::{WindowKind, WindowSpec};

use super::page_list::PageList;
use super::pd::{Pd, PdError};
use crate::addr::{DmaAddr, RegionAddr};
use crate::sync::Arc;
use crate::wire::{Key, Qpn};

bitflags::bitflags! {
    /// What a key, or a queue pair's remote side, allows (IBTA volume 1, 10.6.3.1). Local reading always is.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Access: u32 {
        /// The owner's queue pairs may write.
        const LOCAL_WRITE = 1;
        /// Peers may write.
        const REMOTE_WRITE = 1 << 1;
        /// Peers may read.
        const REMOTE_READ = 1 << 2;
        /// Peers may do atomics.
        const REMOTE_ATOMIC = 1 << 3;
        /// Memory windows may be bound to it (10.6.7).
        const WINDOW_BIND = 1 << 4;
        /// Its addresses count from 0 (10.6.2.1). Of a window: a region is zero-based by its address.
        const ZERO_BASED = 1 << 5;
        /// Peers may flush it to where everybody sees it (A19.4.1).
        const FLUSH_GLOBAL = 1 << 8;
        /// Peers may flush it to where it survives a loss of power (A19.4.1).
        const FLUSH_PERSISTENT = 1 << 9;
    }
}

impl Access {
    /// All that a peer can be allowed to do.
    pub(super) const REMOTE: Self = Self::REMOTE_WRITE
        .union(Self::REMOTE_READ)
        .union(Self::REMOTE_ATOMIC)
        .union(Self::FLUSH_GLOBAL)
        .union(Self::FLUSH_PERSISTENT);
}

/// What a new key covers.
#[derive(Clone, Debug)]
pub struct KeySpec {
    /// Who may use it.
    pub pd: Pd,
    /// For what.
    pub access: Access,
    /// The address of the first byte, as requests name it. 0 for a zero-based region.
    pub address: RegionAddr,
    /// Bytes.
    pub length: u64,
    /// Where in its page the first byte lies. Independent of `address`.
    pub first_page_offset: u64,
    /// One entry a page of the list's page size; the first byte is in entry 0.
    pub pages: Arc<PageList>,
}

/// Why a key was not created.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CreateKeyError {
    /// No such protection domain.
    #[error(transparent)]
    Pd(#[from] PdError),
    /// There are as many as the device has.
    #[error("all {max} keys are in use")]
    TooMany {
        /// The device's limit.
        max: u32,
    },
    /// The region would pass the top of the address space.
    #[error("{length} bytes at {address} pass the top of the address space")]
    PastTop {
        /// First address.
        address: RegionAddr,
        /// Bytes.
        length: u64,
    },
    /// The offset is not inside a page.
    #[error("offset {offset} is not inside the first page of the list")]
    OffsetBeyondPage {
        /// The offset.
        offset: u64,
    },
    /// The page list does not cover the region.
    #[error("the page list has {entries} entries, {needed} are needed")]
    ListTooShort {
        /// Entries there are.
        entries: u64,
        /// Entries needed.
        needed: u64,
    },
    /// A fast registration of more entries than the device takes.
    #[error("a fast registration has at most {max} entries, {entries} were asked for")]
    TooManyEntries {
        /// Asked for.
        entries: u32,
        /// The device's limit.
        max: u32,
    },
    /// Remote writing or atomics without local writing (10.6.3.1).
    #[error("{access:?} needs LOCAL_WRITE as well")]
    NeedsLocalWrite {
        /// What was asked for.
        access: Access,
    },
}

/// No such key: it was destroyed, or never given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key:?} is not a key of this device")]
pub struct UnknownKey {
    /// What was named.
    pub key: Key,
}

/// Why a key was not destroyed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DestroyKeyError {
    /// No such key.
    #[error(transparent)]
    Unknown(#[from] UnknownKey),
    /// Memory windows are bound to it (11.2.8.5).
    #[error("{windows} memory windows are bound to {key:?}; they must be unbound or invalidated before")]
    WindowsBound {
        /// The key.
        key: Key,
        /// How many windows.
        windows: usize,
    },
}

/// Whose request it is that uses a key.
#[derive(Clone, Copy, Debug)]
pub(super) struct Caller {
    /// The queue pair's protection domain.
    pub(super) pd: Pd,
    /// The queue pair.
    pub(super) qpn: Qpn,
}

/// Why a key does not allow an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyViolation {
    /// No such key.
    #[error("unknown key")]
    Unknown,
    /// The key is in another protection domain.
    #[error("key of another protection domain")]
    OtherPd,
    /// The key does not have the right.
    #[error("access not allowed")]
    NotAllowed,
    /// Some byte is outside the region.
    #[error("out of bounds")]
    OutOfBounds,
    /// The key is for fast registration, and nothing is registered.
    #[error("nothing is registered for the key")]
    Free,
    /// The key is a window that another queue pair has bound.
    #[error("window of another queue pair")]
    OtherQp,
    /// An entry of an indirect key names an indirect key.
    #[error("an indirect key over an indirect key")]
    Nested,
}

/// What the address range of a key leads to.
#[derive(Debug)]
pub(super) enum Target {
    Pages(KeySpec),
    Indirect(Box<IndirectKeySpec>),
    Implicit(Box<ImplicitKeySpec>),
    Window(BoundWindow),
    Null(NullKeySpec),
}

impl From<KeySpec> for Target {
    fn from(spec: KeySpec) -> Self {
        Self::Pages(spec)
    }
}

impl From<NullKeySpec> for Target {
    fn from(spec: NullKeySpec) -> Self {
        Self::Null(spec)
    }
}

impl From<IndirectKeySpec> for Target {
    fn from(spec: IndirectKeySpec) -> Self {
        Self::Indirect(Box::new(spec))
    }
}

impl From<ImplicitKeySpec> for Target {
    fn from(spec: ImplicitKeySpec) -> Self {
        Self::Implicit(Box::new(spec))
    }
}

impl Target {
    pub(super) fn pd(&self) -> Pd {
        match self {
            Self::Pages(spec) => spec.pd,
            Self::Indirect(spec) => spec.pd,
            Self::Implicit(spec) => spec.pd,
            Self::Window(bound) => bound.pd,
            Self::Null(spec) => spec.pd,
        }
    }

    fn set_access(&mut self, access: Access) {
        match self {
            Self::Pages(spec) => spec.access = access,
            Self::Indirect(spec) => spec.access = access,
            Self::Implicit(spec) => spec.access = access,
            Self::Window(_) | Self::Null(_) => unreachable!("neither is registered"),
        }
    }

    fn check(&self) -> Result<(), CreateKeyError> {
        match self {
            Self::Pages(spec) => spec.check(),
            Self::Indirect(spec) => spec.check(),
            Self::Implicit(spec) => spec.check(),
            Self::Window(_) | Self::Null(_) => Ok(()),
        }
    }

    /// As [`KeySpec::authorize`].
    pub(super) fn authorize(
        &self,
        caller: Caller,
        need: Access,
        address: RegionAddr,
        length: u64,
    ) -> Result<u64, KeyViolation> {
        match self {
            Self::Pages(spec) => spec.authorize(caller.pd, need, address, length),
            Self::Indirect(spec) => spec.authorize(caller.pd, need, address, length),
            Self::Implicit(spec) => spec.authorize(caller.pd, need, address, length),
            Self::Window(bound) => bound.authorize(caller, need, address, length),
            Self::Null(spec) => spec.authorize(caller, need).map(|()| 0),
        }
    }
}

/// A local key whose memory is none: one page of the device, again and again.
#[derive(Clone, Copy, Debug)]
pub(super) struct NullKeySpec {
    pub(super) pd: Pd,
    pub(super) page: DmaAddr,
}

impl NullKeySpec {
    pub(super) fn authorize(&self, caller: Caller, need: Access) -> Result<(), KeyViolation> {
        if caller.pd != self.pd {
            return Err(KeyViolation::OtherPd);
        }
        // Nothing remote is allowed by it.
        if Access::LOCAL_WRITE.contains(need) { Ok(()) } else { Err(KeyViolation::NotAllowed) }
    }
}

fn check_span(address: RegionAddr, length: u64) -> Result<(), CreateKeyError> {
    if length > 0 {
        address.checked_add(length - 1).ok_or(CreateKeyError::PastTop { address, length })?;
    }
    Ok(())
}

fn check_access(access: Access) -> Result<(), CreateKeyError> {
    let writes = access.intersects(Access::REMOTE_WRITE | Access::REMOTE_ATOMIC);
    if writes && !access.contains(Access::LOCAL_WRITE) {
        return Err(CreateKeyError::NeedsLocalWrite { access });
    }
    Ok(())
}

/// Checks that `pd` may do `need` to `length` bytes at `address` of what belongs to `owner`, allows `access`, and begins
/// at `base`. Gives the offset of the first byte.
fn within(
    (owner, access): (Pd, Access),
    (base, bytes): (RegionAddr, u64),
    (pd, need): (Pd, Access),
    (address, length): (RegionAddr, u64),
) -> Result<u64, KeyViolation> {
    if owner != pd {
        return Err(KeyViolation::OtherPd);
    }
    if !access.contains(need) {
        return Err(KeyViolation::NotAllowed);
    }
    // Differences, never sums: nothing here can pass the top.
    let into = address.0.checked_sub(base.0).ok_or(KeyViolation::OutOfBounds)?;
    if into > bytes || length > bytes - into {
        return Err(KeyViolation::OutOfBounds);
    }
    Ok(into)
}

impl KeySpec {
    fn check(&self) -> Result<(), CreateKeyError> {
        let Self { address, length, first_page_offset: offset, access, .. } = *self;
        if offset >= self.pages.entry_bytes() {
            return Err(CreateKeyError::OffsetBeyondPage { offset });
        }
        let page = self.pages.page_bytes();
        let bytes = offset.checked_add(length).ok_or(CreateKeyError::PastTop { address, length })?;
        check_span(address, length)?;
        // An exact count even where rounding up to a page would overflow.
        let needed = if length == 0 { 0 } else { bytes.div_ceil(page) };
        if self.pages.len() < needed {
            return Err(CreateKeyError::ListTooShort { entries: self.pages.len(), needed });
        }
        check_access(access)
    }

    /// Checks that `pd` may do `need` to the `length` bytes at `address`, and gives the offset of the first byte in the
    /// pages of the list.
    pub(super) fn authorize(
        &self,
        pd: Pd,
        need: Access,
        address: RegionAddr,
        length: u64,
    ) -> Result<u64, KeyViolation> {
        let into =
            within((self.pd, self.access), (self.address, self.length), (pd, need), (address, length))?;
        Ok(self.first_page_offset + into)
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
