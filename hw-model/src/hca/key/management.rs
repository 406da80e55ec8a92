//! Invalidation, of whatever a work request made valid, and why such requests fail.

use super::fast::FastKey;
use super::table::{Held, KeyTable};
use super::{Access, Caller, CreateKeyError, KeyViolation, Target};
use crate::wire::Key;

/// Why a register, bind or invalidate request failed. The queue pair is in error then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(in crate::hca) enum ManagementError {
    #[error("{key:?} is not a key that work requests change")]
    Unknown { key: Key },
    #[error("{key:?} is in another protection domain")]
    OtherPd { key: Key },
    #[error("{key:?} is bound by another queue pair")]
    OtherQp { key: Key },
    #[error("{key:?} is valid already")]
    NotFree { key: Key },
    #[error("{key:?} was given no memory")]
    NotMapped { key: Key },
    #[error("{key:?} is not valid, {current:?} is")]
    OtherKeyByte { key: Key, current: Key },
    #[error("{windows} windows are bound over {key:?}")]
    WindowsBound { key: Key, windows: usize },
    #[error("{key:?} is a window of type 1, which is not invalidated but bound to nothing")]
    TypeOne { key: Key },
    #[error("{key:?} is a window of type 1, which cannot be zero based")]
    ZeroBasedTypeOne { key: Key },
    #[error("{key:?} is a window of type 2, which is not bound to nothing but invalidated")]
    EmptyTypeTwo { key: Key },
    #[error("{region:?} allows no window")]
    NotBindable { region: Key },
    #[error("a window cannot have {access:?}")]
    NotOfWindows { access: Access },
    #[error("region {region:?}: {why}")]
    Region { region: Key, why: KeyViolation },
    #[error(transparent)]
    Spec(#[from] CreateKeyError),
}

impl KeyTable {
    /// Ends what `key` was made valid for by a work request, a fast registration or a binding: look-ups that begin after
    /// this returns find nothing. A key that is not valid stays so, which is no mistake
    /// (drivers/infiniband/sw/rxe/rxe_mr.c `rxe_invalidate_mr`, rxe_mw.c `rxe_invalidate_mw`).
    ///
    /// Both of the local and of the remote invalidation (10.6.5).
    pub(in crate::hca) fn invalidate(&self, caller: Caller, key: Key) -> Result<(), ManagementError> {
        let mut writer = self.writer.lock();
        let windows = writer.bindings.over(key);
        let end = |name: &mut Key, held: &mut Held| match held {
            Held::Fast(fast) => {
                Some(invalidate_fast(fast, (*name, windows), caller, key).map(|gone| (gone, None)))
            }
            Held::Window(window) if *name == key => {
                Some(window.invalidate(caller, key).map(|bound| (None, bound)))
            }
            Held::Window(_) => Some(Err(ManagementError::OtherKeyByte { key, current: *name })),
            Held::Region(_) => None,
        };
        let ended = self.with_index(&writer, key, end).ok_or(ManagementError::Unknown { key })?;
        let (covered, bound) = ended?;
        writer.bindings.changed(super::table::index(key), (bound, None));
        // What it covered is freed after the locks of the table are.
        drop(writer);
        drop(covered);
        Ok(())
    }
}

fn invalidate_fast(
    fast: &mut FastKey,
    (name, windows): (Key, usize),
    caller: Caller,
    key: Key,
) -> Result<Option<Target>, ManagementError> {
    if fast.pd() != caller.pd {
        return Err(ManagementError::OtherPd { key });
    }
    if name != key {
        return Err(ManagementError::OtherKeyByte { key, current: name });
    }
    if windows > 0 {
        return Err(ManagementError::WindowsBound { key, windows });
    }
    Ok(fast.valid.take())
}
