//! Memory keys: what a key covers, who may use it for what, and the page list behind it.
//!
//! One key serves as local and as remote key. Keys are random, because a key is all that a remote peer must know
//! (invariant 15), and a destroyed one stays out of use for a while, so that a peer that kept it reaches nothing.

mod table;

pub(super) use table::KeyTable;

use super::page_list::PageList;
use super::pd::{Pd, PdError};
use crate::addr::{PAGE_SIZE, RegionAddr, pages_for};
use crate::sync::Arc;
use crate::wire::Key;

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
    }
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
    /// One entry a page; the first byte is in entry 0.
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
    #[error("offset {offset} is not inside a page of {PAGE_SIZE} bytes")]
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
}

impl KeySpec {
    fn check(&self) -> Result<(), CreateKeyError> {
        let Self { address, length, first_page_offset: offset, access, .. } = *self;
        if offset >= PAGE_SIZE {
            return Err(CreateKeyError::OffsetBeyondPage { offset });
        }
        let bytes = offset.checked_add(length).ok_or(CreateKeyError::PastTop { address, length })?;
        if length > 0 {
            address.checked_add(length - 1).ok_or(CreateKeyError::PastTop { address, length })?;
        }
        // An exact count even where rounding up to a page would overflow.
        let needed = if length == 0 { 0 } else { pages_for(bytes) };
        if self.pages.len() < needed {
            return Err(CreateKeyError::ListTooShort { entries: self.pages.len(), needed });
        }
        if access.intersects(Access::REMOTE_WRITE | Access::REMOTE_ATOMIC)
            && !access.contains(Access::LOCAL_WRITE)
        {
            return Err(CreateKeyError::NeedsLocalWrite { access });
        }
        Ok(())
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
        if self.pd != pd {
            return Err(KeyViolation::OtherPd);
        }
        if !self.access.contains(need) {
            return Err(KeyViolation::NotAllowed);
        }
        // Differences, never sums: nothing here can pass the top.
        let into = address.0.checked_sub(self.address.0).ok_or(KeyViolation::OutOfBounds)?;
        if into > self.length || length > self.length - into {
            return Err(KeyViolation::OutOfBounds);
        }
        Ok(self.first_page_offset + into)
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
