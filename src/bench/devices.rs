//! What registers: the model or a real device.

use super::{BenchError, How, setup};
use crate::machine::{Machine, MachineConfig};
use hw_model::addr::PAGE_SIZE;
use hw_model::sync::Arc;
use mr::{Device, ProtectionDomain, Region, RegisterOptions};
use odp::space::process::ProcessSpace;
use odp::space::{AddressSpace, UserRange};

/// Keys of the model's HCA: what is measured is no limit of its own.
const KEYS: u32 = 1 << 22;

/// Why a device did not register something, in its own words.
pub(super) type Refused = Box<dyn std::error::Error + Send + Sync>;

/// A device with a protection domain.
pub(super) struct Registrar {
    name: String,
    end: End,
}

enum End {
    Model {
        machine: Box<Machine>,
        pd: Arc<dyn ProtectionDomain>,
    },
    #[cfg(feature = "verbs")]
    Verbs(Arc<mr::device::verbs::VerbsPd>),
}

impl Registrar {
    pub(super) fn open(name: &str, space: &Arc<ProcessSpace>) -> Result<Self, BenchError> {
        let end = if name == "model" {
            let mut config = MachineConfig::default();
            config.hca.limits.keys = KEYS;
            let machine =
                Machine::new(space.memory(), None, &config).map_err(setup("no machine could be built"))?;
            let pd = Arc::clone(&machine.near).alloc_pd().map_err(setup("there is no protection domain"))?;
            End::Model { machine: Box::new(machine), pd }
        } else {
            real(name).map_err(|source| BenchError::Device { device: name.to_owned(), source })?
        };
        Ok(Self { name: name.to_owned(), end })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Whether it registers so.
    pub(super) fn has(&self, how: How) -> bool {
        how != How::Empty || matches!(self.end, End::Model { .. })
    }

    pub(super) fn register(
        &self,
        memory: &UserRange,
        options: RegisterOptions,
    ) -> Result<Arc<dyn Region>, Refused> {
        match &self.end {
            End::Model { pd, .. } => Ok(Arc::clone(pd).register(memory, options)?),
            #[cfg(feature = "verbs")]
            End::Verbs(pd) => Ok(pd.register(memory, options)?),
        }
    }

    /// Invalidation commands to the IOTLB so far, and bytes of the IOMMU's tables now, where they can be seen.
    pub(super) fn iommu(&self) -> Option<(u64, u64)> {
        match &self.end {
            End::Model { machine, .. } => {
                let stats = machine.near.dma().domain()?.stats();
                Some((stats.iotlb.flushes, stats.tables * PAGE_SIZE))
            }
            #[cfg(feature = "verbs")]
            End::Verbs(_) => None,
        }
    }
}

#[cfg(feature = "verbs")]
fn real(name: &str) -> Result<End, Refused> {
    Ok(End::Verbs(mr::device::verbs::VerbsDevice::open(name)?.alloc_pd()?))
}

#[cfg(not(feature = "verbs"))]
fn real(_: &str) -> Result<End, Refused> {
    Err("this build has only the model".into())
}
