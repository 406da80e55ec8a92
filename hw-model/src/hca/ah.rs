//! Address handles: a way to a port, made once and named with each datagram (IBTA volume 1, 10.2.2 and 11.2.2).

use super::device::Hca;
use super::pd::{Pd, PdError};
use super::points;
use super::request::AddressVector;
use crate::sync::Arc;
use crate::sync::atomic::Ordering;

/// An address handle. Dropping it destroys it; requests that were posted by it have taken what they need.
pub struct AddressHandle {
    hca: Arc<Hca>,
    pd: Pd,
    vector: AddressVector,
}

/// Why an address handle was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CreateAhError {
    /// No such protection domain.
    #[error(transparent)]
    Pd(#[from] PdError),
    /// There are as many as the device has.
    #[error("all {max} address handles are in use")]
    TooMany {
        /// The device's limit.
        max: u32,
    },
    /// The sending port has no such address.
    #[error("the port has no address of index {index}, it has {entries}")]
    SourceGid {
        /// Asked for.
        index: u8,
        /// Addresses there are.
        entries: u32,
    },
    /// More than four bits (7.6.5).
    #[error("service level {level} has more than four bits")]
    ServiceLevel {
        /// Asked for.
        level: u8,
    },
    /// More than 20 bits (8.3.3).
    #[error("flow label {label:#x} has more than 20 bits")]
    FlowLabel {
        /// Asked for.
        label: u32,
    },
}

impl AddressHandle {
    /// Where it leads.
    #[must_use]
    pub fn vector(&self) -> AddressVector {
        self.vector
    }
    /// Its protection domain. Only queue pairs of the same may use it (10.2.2.1).
    #[must_use]
    pub fn pd(&self) -> Pd {
        self.pd
    }
    /// The device it belongs to.
    #[must_use]
    pub fn hca(&self) -> &Arc<Hca> {
        &self.hca
    }
}

impl Hca {
    /// A new address handle (11.2.2.1).
    ///
    /// # Errors
    /// See [`CreateAhError`].
    pub fn create_ah(
        self: &Arc<Self>,
        pd: Pd,
        vector: AddressVector,
    ) -> Result<Arc<AddressHandle>, CreateAhError> {
        let (entries, index) = (self.gids().len() as u32, vector.source_gid_index);
        if u32::from(index) >= entries {
            return Err(CreateAhError::SourceGid { index, entries });
        }
        if vector.service_level >= 1 << 4 {
            return Err(CreateAhError::ServiceLevel { level: vector.service_level });
        }
        let label = vector.route.flow_label;
        if label >= 1 << 20 {
            return Err(CreateAhError::FlowLabel { label });
        }
        self.pds.hold(pd)?;
        let max = self.config().limits.ahs;
        let refused = self.device.points.meet(points::CREATE_AH).fails();
        if self.ahs.fetch_add(1, Ordering::Relaxed) >= max || refused {
            self.forget_ah(pd);
            return Err(CreateAhError::TooMany { max });
        }
        Ok(Arc::new(AddressHandle { hca: Arc::clone(self), pd, vector }))
    }

    fn forget_ah(&self, pd: Pd) {
        self.ahs.fetch_sub(1, Ordering::Relaxed);
        self.pds.release(pd);
    }
}

impl Drop for AddressHandle {
    fn drop(&mut self) {
        self.hca.forget_ah(self.pd);
    }
}

impl std::fmt::Debug for AddressHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AddressHandle").field("vector", &self.vector).finish_non_exhaustive()
    }
}
