//! Fast registration: keys that are made once and then given memory, rights and a new key byte by work requests.
//!
//! ```text
//!   create --> Free --[ map: what memory ]--> Free --[ REGISTER: key byte, rights ]--> Valid
//!               ^                                                                        |
//!               +-------------------------------[ INVALIDATE ]---------------------------+
//! ```
//!
//! IBTA volume 1, 10.6.4.4 and 11.4.1 (Fast Register Physical MR, Local Invalidate); the kernel's `IB_WR_REG_MR` and
//! `ib_map_mr_sg` (include/rdma/ib_verbs.h); the checks are those of drivers/infiniband/sw/rxe/rxe_mr.c
//! `rxe_reg_fast_mr`. The upper 24 bits of such a key, its index, stay; the lowest byte is software's, and a peer that
//! kept the key of an earlier registration reaches nothing.

use super::indirect::{IndirectKeySpec, IndirectList};
use super::management::ManagementError;
use super::table::KeyTable;
use super::{Access, CreateKeyError, KeySpec, Target, UnknownKey};
use crate::addr::RegionAddr;
use crate::hca::page_list::PageList;
use crate::hca::pd::Pd;
use crate::sync::Arc;
use crate::wire::Key;

/// What a key for fast registration is made with (`ib_alloc_mr`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FastKeySpec {
    /// Whose queue pairs may register and use it.
    pub pd: Pd,
    /// Page-list or indirect entries that it can be given.
    pub max_entries: u32,
}

/// The memory that the next registration gives to a key (`ib_map_mr_sg`).
#[derive(Clone, Debug)]
pub struct FastMap {
    /// The address of the first byte, as requests name it.
    pub address: RegionAddr,
    /// Where the bytes are.
    pub memory: FastMemory,
}

/// The two kinds of lists that a fast registration takes.
#[derive(Clone, Debug)]
pub enum FastMemory {
    /// Pages of one size without gaps (`IB_MR_TYPE_MEM_REG`).
    Pages {
        /// One entry a page.
        pages: Arc<PageList>,
        /// Where in its page the first byte lies.
        first_page_offset: u64,
        /// Bytes.
        length: u64,
    },
    /// Pieces of any size and place (`IB_MR_TYPE_SG_GAPS`).
    Gaps(IndirectList),
}

/// Why a key was not given memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapKeyError {
    /// Not a key for fast registration.
    #[error(transparent)]
    Unknown(#[from] UnknownKey),
    /// More entries than the key was made for.
    #[error("a list of {entries} entries for a key of at most {max}")]
    TooManyEntries {
        /// Of the list.
        entries: u64,
        /// Of the key.
        max: u32,
    },
    /// The list does not cover the memory, or the memory passes the top.
    #[error(transparent)]
    Spec(#[from] CreateKeyError),
}

/// A key for fast registration, in its slot of the table.
pub(super) struct FastKey {
    spec: FastKeySpec,
    /// What the next registration takes.
    mapped: Option<Target>,
    /// Registered: what it covers.
    pub(super) valid: Option<Target>,
}

impl FastKey {
    pub(super) fn new(spec: FastKeySpec) -> Self {
        Self { spec, mapped: None, valid: None }
    }

    pub(super) fn pd(&self) -> Pd {
        self.spec.pd
    }
}

fn target(pd: Pd, map: FastMap) -> Target {
    let (access, address) = (Access::empty(), map.address);
    match map.memory {
        FastMemory::Pages { pages, first_page_offset, length } => {
            Target::Pages(KeySpec { pd, access, address, length, first_page_offset, pages })
        }
        FastMemory::Gaps(list) => Target::Indirect(Box::new(IndirectKeySpec { pd, access, address, list })),
    }
}

impl KeyTable {
    /// Gives `key` the memory of its next registration. What is registered at the moment stays.
    pub(in crate::hca) fn map_fast(&self, key: Key, map: FastMap) -> Result<(), MapKeyError> {
        let unknown = UnknownKey { key };
        let FastKeySpec { pd, max_entries: max } = self.with_fast(key, |_, fast| fast.spec).ok_or(unknown)?;
        let entries = match &map.memory {
            FastMemory::Pages { pages, .. } => pages.len(),
            FastMemory::Gaps(list) => list.entries().len() as u64,
        };
        if entries > u64::from(max) {
            return Err(MapKeyError::TooManyEntries { entries, max });
        }
        let target = target(pd, map);
        target.check()?;
        // What was mapped before is freed after the locks of the table are.
        drop(self.with_fast(key, |_, fast| fast.mapped.replace(target)).ok_or(unknown)?);
        Ok(())
    }

    /// Makes the mapped memory reachable by `key`, which may differ in its lowest byte from what it was, with `access`.
    pub(in crate::hca) fn register_fast(
        &self,
        pd: Pd,
        key: Key,
        access: Access,
    ) -> Result<(), ManagementError> {
        let register = |name: &mut Key, fast: &mut FastKey| {
            if fast.spec.pd != pd {
                return Err(ManagementError::OtherPd { key });
            }
            if fast.valid.is_some() {
                return Err(ManagementError::NotFree { key });
            }
            let target = fast.mapped.as_mut().ok_or(ManagementError::NotMapped { key })?;
            target.set_access(access);
            target.check()?;
            fast.valid = fast.mapped.take();
            *name = key;
            Ok(())
        };
        self.with_fast(key, register).unwrap_or(Err(ManagementError::Unknown { key }))
    }
}
