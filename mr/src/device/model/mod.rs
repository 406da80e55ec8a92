//! The modelled HCA as a device: the default, in this process, without privileges.

mod advise;
mod faults;
mod handles;
mod implicit;
mod objects;
mod prefetch;
mod region;
mod rereg;
mod stepping;
mod target;

pub use faults::FaultJob;
pub use handles::{
    ModelAh, ModelChannel, ModelDeviceMemory, ModelDeviceRegion, ModelNullRegion, ModelWindow,
};
pub use implicit::{ImplicitRegion, ImplicitTeardown};
pub use objects::{ModelCq, ModelPd, ModelQp, ModelSrq};
pub use prefetch::{FaultPolicy, PrefetchJob, PrefetchStats};
pub use region::ModelRegion;
pub use rereg::Reregistration;
pub use stepping::{Advice, Registration};

use super::{
    AsyncEventStream, Attributes, CompletionChannel, CompletionQueue, CqOptions, Device, DeviceMemory,
    ObjectError, ProtectionDomain,
};
use crate::dma::{DmaConfig, DmaDevice};
use faults::FaultService;
use hashbrown::HashMap;
use hw_model::addr::Iova;
use hw_model::bus::DmaPort;
use hw_model::hca::{
    AllocDeviceMemoryError, CqSpec, CreateChannelError, CreateCqError, CreateKeyError, DestroyKeyError,
    DeviceAttributes, EngineThreads, Gid, Hca, HcaConfig, ImplicitKeySpec, Key, KeyChange, KeySpec,
    NewHcaError, PdError, PortAttributes, ReregKeyError, TableError,
};
use hw_model::link::Link;
use hw_model::sync::{Arc, Mutex, RwLock};
use hw_model::wire::PKey;
use prefetch::{PrefetchService, Prefetcher};
use std::any::Any;
use target::{Backed, FaultTarget};

/// What a modelled device is built with.
#[derive(Clone, Debug, Default)]
pub struct ModelConfig {
    /// The HCA.
    pub hca: HcaConfig,
    /// Its DMA side. Its fault points are those of the whole device.
    pub dma: DmaConfig,
    /// How its page faults are answered.
    pub faults: FaultPolicy,
}

/// A device of its own kind: the HCA of `hw-model`, its page faults answered by `mr`.
pub struct ModelDevice {
    name: String,
    hca: Arc<Hca>,
    dma: Arc<DmaDevice>,
    /// Where the fault handler finds the regions. Invalidations never take this lock.
    targets: RwLock<HashMap<Key, FaultTarget>>,
    prefetcher: Arc<Prefetcher>,
    threads: Mutex<Option<Threads>>,
}

/// In the order in which they are stopped.
struct Threads {
    _prefetches: PrefetchService,
    _faults: FaultService,
    _engines: EngineThreads,
}

/// Why a modelled device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NewModelError {
    /// The HCA refused.
    #[error(transparent)]
    Hca(#[from] NewHcaError),
    /// The operating system gave no thread.
    #[error("no thread for the device")]
    Thread(#[from] std::io::Error),
}

impl ModelDevice {
    /// A device that makes progress only in steps: [`Hca::step_engine`] and [`ModelDevice::next_fault`].
    ///
    /// # Errors
    /// See [`NewModelError`].
    pub fn stepped(
        name: &str,
        port: DmaPort,
        link: impl Link + 'static,
        config: ModelConfig,
    ) -> Result<Arc<Self>, NewModelError> {
        let points = config.dma.points.clone();
        let hca = Hca::with_points(config.hca, port.clone(), Box::new(link), points)?;
        Ok(Arc::new(Self {
            name: name.to_owned(),
            hca,
            dma: DmaDevice::new(port, config.dma),
            targets: RwLock::new(HashMap::new()),
            prefetcher: Arc::new(Prefetcher::new(config.faults)),
            threads: Mutex::new(None),
        }))
    }

    /// A device with engine threads, and a thread that answers its page faults.
    ///
    /// # Errors
    /// See [`NewModelError`].
    pub fn threaded(
        name: &str,
        port: DmaPort,
        link: impl Link + 'static,
        config: ModelConfig,
    ) -> Result<Arc<Self>, NewModelError> {
        let device = Self::stepped(name, port, link, config)?;
        let engines = device.hca.spawn_engines()?;
        let faults = FaultService::spawn(&device)?;
        let prefetches = PrefetchService::spawn(&device)?;
        *device.threads.lock() =
            Some(Threads { _prefetches: prefetches, _faults: faults, _engines: engines });
        Ok(device)
    }

    /// The HCA.
    #[must_use]
    pub fn hca(&self) -> &Arc<Hca> {
        &self.hca
    }
    /// The DMA side.
    #[must_use]
    pub fn dma(&self) -> &Arc<DmaDevice> {
        &self.dma
    }
    /// First IOVA of the region behind `key`; `None` where nothing translates or there is no such region.
    #[must_use]
    pub fn region_iova(&self, key: Key) -> Option<Iova> {
        let targets = self.targets.read();
        match &targets.get(&key)?.memory {
            Backed::Explicit(core, _) => Some(core.mapping.as_ref()?.iova()),
            Backed::Implicit(_) => None,
        }
    }
    /// The oldest unanswered page-fault event, as work to be stepped. For drivers of stepped devices; a threaded device
    /// answers its own.
    #[must_use]
    pub fn next_fault(self: &Arc<Self>) -> Option<FaultJob> {
        self.hca.faults().next().map(|event| FaultJob::new(self, event))
    }

    /// The oldest prefetch that waits to be carried out, as work to be stepped. For drivers of stepped devices.
    #[must_use]
    pub fn next_prefetch(self: &Arc<Self>) -> Option<PrefetchJob> {
        PrefetchJob::next(self)
    }
    /// How page faults are answered.
    #[must_use]
    pub fn fault_policy(&self) -> FaultPolicy {
        self.prefetcher.policy()
    }
    /// How page faults are answered from now on.
    pub fn set_fault_policy(&self, policy: FaultPolicy) {
        self.prefetcher.set_policy(policy);
    }
    /// What became of prefetches so far.
    #[must_use]
    pub fn prefetch_stats(&self) -> PrefetchStats {
        self.prefetcher.stats()
    }

    fn prefetcher(&self) -> &Arc<Prefetcher> {
        &self.prefetcher
    }

    /// Makes a key, and lets the fault handler find its region.
    fn publish_key(&self, spec: KeySpec, target: FaultTarget) -> Result<Key, CreateKeyError> {
        // Held over both, so that no event about the key can find its region missing.
        let mut targets = self.targets.write();
        let key = self.hca.create_key(spec)?;
        targets.insert(key, target);
        Ok(key)
    }

    /// Takes a key back. Bursts that begin later do not find it.
    fn withdraw_key(
        &self,
        key: Key,
        take: impl FnOnce(&Hca) -> Result<(), DestroyKeyError>,
    ) -> Result<(), DestroyKeyError> {
        // Held over both: a key that is given out again at once keeps its own region.
        let mut targets = self.targets.write();
        take(&self.hca)?;
        let target = targets.remove(&key);
        drop(targets);
        drop(target);
        Ok(())
    }

    /// Changes the key of a region, and what the fault handler finds under it.
    fn change_key(&self, key: Key, change: KeyChange, target: FaultTarget) -> Result<(), ReregKeyError> {
        // Held over both, so that an event about the key finds what the key is.
        let mut targets = self.targets.write();
        self.hca.rereg_key(key, change)?;
        let before = targets.insert(key, target);
        drop(targets);
        drop(before);
        Ok(())
    }

    /// As [`ModelDevice::publish_key`].
    fn publish_implicit_key(
        &self,
        spec: ImplicitKeySpec,
        target: FaultTarget,
    ) -> Result<Key, CreateKeyError> {
        let mut targets = self.targets.write();
        let key = self.hca.create_implicit_key(spec)?;
        targets.insert(key, target);
        Ok(key)
    }

    /// As [`ModelDevice::withdraw_key`].
    fn withdraw_implicit_key(&self, key: Key) {
        let mut targets = self.targets.write();
        let known = self.hca.destroy_implicit_key(key);
        let target = targets.remove(&key);
        drop(targets);
        debug_assert!(known.is_ok(), "a region's key is destroyed once, by the region");
        drop(target);
    }

    /// Takes parts of implicit regions away that have become empty, as far as that goes without waiting. Whether something
    /// is left to be done. For drivers of stepped devices; a threaded device does it by itself.
    pub fn reclaim(&self) -> bool {
        let children = |target: &FaultTarget| match &target.memory {
            Backed::Implicit(children) => Some(Arc::clone(children)),
            Backed::Explicit(..) => None,
        };
        let implicit: Vec<_> = self.targets.read().values().filter_map(children).collect();
        implicit.iter().fold(false, |left, children| children.reclaim() | left)
    }

    fn fault_target(&self, key: Key) -> Option<FaultTarget> {
        self.targets.read().get(&key).cloned()
    }
}

impl Device for ModelDevice {
    fn attributes(&self) -> Attributes {
        Attributes {
            name: self.name.clone(),
            iommu: self.dma.domain().is_some(),
            max_region: self.dma.max_region(),
            on_demand: true,
        }
    }
    fn alloc_pd(self: Arc<Self>) -> Result<Arc<dyn ProtectionDomain>, PdError> {
        Ok(ModelPd::new(self)?)
    }
    fn create_cq(self: Arc<Self>, entries: u32) -> Result<Arc<dyn CompletionQueue>, CreateCqError> {
        let spec = CqSpec { entries, channel: None, cookie: 0 };
        Ok(ModelCq::new(self, &spec)?)
    }
    fn create_cq_with(
        self: Arc<Self>,
        options: CqOptions,
    ) -> Result<Arc<dyn CompletionQueue>, ObjectError<CreateCqError>> {
        let CqOptions { entries, channel, cookie } = options;
        let channel = match channel {
            None => None,
            Some(channel) => {
                let channel: Arc<dyn Any + Send + Sync> = channel;
                let channel = channel.downcast::<ModelChannel>();
                let channel = channel.map_err(|_| ObjectError::Foreign { object: "completion channel" })?;
                Some(Arc::clone(&channel.channel))
            }
        };
        Ok(ModelCq::new(self, &CqSpec { entries, channel, cookie })?)
    }
    fn create_channel(
        self: Arc<Self>,
    ) -> Result<Arc<dyn CompletionChannel>, ObjectError<CreateChannelError>> {
        let channel = self.hca.create_channel()?;
        Ok(Arc::new(ModelChannel { channel, _device: self }))
    }
    fn alloc_device_memory(
        self: Arc<Self>,
        length: u64,
        align_shift: u32,
    ) -> Result<Arc<dyn DeviceMemory>, ObjectError<AllocDeviceMemoryError>> {
        let memory = self.hca.alloc_device_memory(length, align_shift)?;
        Ok(Arc::new(ModelDeviceMemory { memory, device: self }))
    }
    fn async_events(&self) -> Option<&dyn AsyncEventStream> {
        Some(self.hca.events())
    }
    fn query(&self) -> Option<DeviceAttributes> {
        let said = self.hca.attributes();
        Some(DeviceAttributes { max_region: self.dma.max_region(), ..said })
    }
    fn query_port(&self, port: u8) -> Result<PortAttributes, ObjectError<TableError>> {
        Ok(self.hca.port_attributes(port)?)
    }
    fn query_gid(&self, port: u8, index: u32) -> Result<Gid, ObjectError<TableError>> {
        Ok(self.hca.query_gid(port, index)?)
    }
    fn query_pkey(&self, port: u8, index: u16) -> Result<PKey, ObjectError<TableError>> {
        Ok(self.hca.query_pkey(port, index)?)
    }
}

impl std::fmt::Debug for ModelDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelDevice")
            .field("name", &self.name)
            .field("hca", &self.hca)
            .finish_non_exhaustive()
    }
}
