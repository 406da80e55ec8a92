//! Reregistration: another domain, other rights or other memory for a key that stays (IBTA volume 1, 11.2.8.7).

use super::table::KeyTable;
use super::{Access, CreateKeyError, KeySpec, UnknownKey};
use crate::addr::RegionAddr;
use crate::hca::page_list::PageList;
use crate::hca::pd::{Pd, PdError};
use crate::sync::Arc;
use crate::wire::Key;

/// What of a key changes. What is `None` stays.
#[derive(Clone, Debug, Default)]
pub struct KeyChange {
    /// Who may use it (`IBV_REREG_MR_CHANGE_PD`).
    pub pd: Option<Pd>,
    /// For what (`IBV_REREG_MR_CHANGE_ACCESS`).
    pub access: Option<Access>,
    /// What it covers (`IBV_REREG_MR_CHANGE_TRANSLATION`).
    pub memory: Option<KeyMemory>,
}

/// The memory of a key, as in its [`KeySpec`].
#[derive(Clone, Debug)]
pub struct KeyMemory {
    /// The address of the first byte, as requests name it.
    pub address: RegionAddr,
    /// Bytes.
    pub length: u64,
    /// Where in its page the first byte lies.
    pub first_page_offset: u64,
    /// One entry a page.
    pub pages: Arc<PageList>,
}

impl KeyChange {
    /// What `before` becomes.
    fn applied(self, before: &KeySpec) -> KeySpec {
        let mut spec = before.clone();
        spec.pd = self.pd.unwrap_or(spec.pd);
        spec.access = self.access.unwrap_or(spec.access);
        if let Some(KeyMemory { address, length, first_page_offset, pages }) = self.memory {
            spec = KeySpec { address, length, first_page_offset, pages, ..spec };
        }
        spec
    }
}

/// Why a key was not changed. It is what it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReregKeyError {
    /// Not the key of a region.
    #[error(transparent)]
    Unknown(#[from] UnknownKey),
    /// No such protection domain.
    #[error(transparent)]
    Pd(#[from] PdError),
    /// What it would become is not possible.
    #[error(transparent)]
    Spec(#[from] CreateKeyError),
    /// Memory windows are bound to it (11.2.8.7).
    #[error("{windows} memory windows are bound to {key:?}; they must be unbound or invalidated before")]
    WindowsBound {
        /// The key.
        key: Key,
        /// How many windows.
        windows: usize,
    },
}

impl KeyTable {
    /// Changes the region of `key`, and gives what it was.
    pub(in crate::hca) fn change(&self, key: Key, change: KeyChange) -> Result<KeySpec, ReregKeyError> {
        self.replace(key, |before| {
            let after = change.applied(before);
            after.check()?;
            Ok(after)
        })
    }
}
