//! Protection domains: what may be used together (IBTA volume 1, 10.2.3).

use crate::sync::Mutex;
use hashbrown::HashMap;

/// A protection domain of one HCA. A key and a queue pair work together only if they are in the same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pd(pub(super) u32);

/// The protection domains of one HCA, with the number of objects in each.
pub(super) struct PdTable {
    domains: Mutex<Domains>,
    max: u32,
}

#[derive(Default)]
struct Domains {
    uses: HashMap<Pd, u64>,
    last: u32,
}

/// Why a protection domain was not given or not taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PdError {
    /// There are as many as the device has.
    #[error("all {max} protection domains are in use")]
    TooMany {
        /// The device's limit.
        max: u32,
    },
    /// No such protection domain on this device.
    #[error("{pd:?} is not a protection domain of this device")]
    Unknown {
        /// What was named.
        pd: Pd,
    },
    /// Keys or queue pairs are still in it.
    #[error("{pd:?} still has {uses} keys and queue pairs")]
    InUse {
        /// What was named.
        pd: Pd,
        /// Objects in it.
        uses: u64,
    },
}

impl PdTable {
    pub(super) fn new(max: u32) -> Self {
        Self { domains: Mutex::new(Domains::default()), max }
    }

    pub(super) fn alloc(&self) -> Result<Pd, PdError> {
        let mut domains = self.domains.lock();
        if domains.uses.len() >= self.max as usize {
            return Err(PdError::TooMany { max: self.max });
        }
        loop {
            domains.last = domains.last.wrapping_add(1);
            let pd = Pd(domains.last);
            if domains.uses.try_insert(pd, 0).is_ok() {
                return Ok(pd);
            }
        }
    }

    pub(super) fn dealloc(&self, pd: Pd) -> Result<(), PdError> {
        let mut domains = self.domains.lock();
        match domains.uses.get(&pd) {
            None => Err(PdError::Unknown { pd }),
            Some(&uses) if uses > 0 => Err(PdError::InUse { pd, uses }),
            Some(_) => {
                domains.uses.remove(&pd);
                Ok(())
            }
        }
    }

    /// Counts one more object in `pd`.
    pub(super) fn hold(&self, pd: Pd) -> Result<(), PdError> {
        let mut domains = self.domains.lock();
        *domains.uses.get_mut(&pd).ok_or(PdError::Unknown { pd })? += 1;
        Ok(())
    }

    /// Counts one object less in `pd`.
    pub(super) fn release(&self, pd: Pd) {
        let mut domains = self.domains.lock();
        let uses = domains.uses.get_mut(&pd).expect("a domain in use is not deallocated");
        *uses -= 1;
    }

    pub(super) fn live(&self) -> u64 {
        self.domains.lock().uses.len() as u64
    }
}
