//! Devices that regions are registered with, behind one set of traits.
//!
//! [`model`] is the modelled HCA in this process. What an application holds are `Arc`s of these traits: a region, a queue
//! pair or a completion queue keeps its protection domain and its device alive, and dropping the last `Arc` gives it back.

pub mod model;
mod objects;
#[cfg(all(feature = "verbs", not(any(loom, shuttle))))]
pub mod verbs;

pub use objects::{
    AddressHandle, AsyncEventStream, CompletionChannel, DeviceMemory, KeyHandle, ObjectError, Window,
};

use crate::dma::LinkError;
use crate::region::{CounterValues, MapRegionError, MapRun, Mode, RegionReport, Snapshot};
use hw_model::addr::RegionAddr;
use hw_model::hca::{
    Access, AddressVector, AllocDeviceMemoryError, Completion, CreateAhError, CreateChannelError,
    CreateCqError, CreateKeyError, CreateNullKeyError, CreateQpError, CreateSrqError, DestroyKeyError,
    DeviceAttributes, Gid, Key, Moderation, ModifyQpError, Notify, Overrun, PdError, PortAttributes,
    PostError, QKey, QpAddress, QpAttributes, QpChange, RecvRequest, RegisterDeviceMemoryError,
    ReregKeyError, ResizeCqError, SendRequest, Sge, SrqLimitError, Srqn, TableError, Transport, WindowKind,
};
use hw_model::sync::Arc;
use hw_model::wire::PKey;
use odp::fault::{FaultFailure, Want};
use odp::space::{PinKind, Rung, UserRange};
use std::any::Any;
use std::convert::Infallible;
use std::time::Duration;

/// An RDMA device.
pub trait Device: Send + Sync {
    /// What it is and what it can do.
    fn attributes(&self) -> Attributes;

    /// A new protection domain.
    ///
    /// # Errors
    /// [`PdError`] if the device has no more.
    fn alloc_pd(self: Arc<Self>) -> Result<Arc<dyn ProtectionDomain>, PdError>;

    /// A new completion queue of `entries` entries.
    ///
    /// # Errors
    /// See [`CreateCqError`].
    fn create_cq(self: Arc<Self>, entries: u32) -> Result<Arc<dyn CompletionQueue>, CreateCqError>;

    /// A new completion queue with events.
    ///
    /// # Errors
    /// See [`CreateCqError`]; [`ObjectError::Foreign`] for a channel of another device.
    fn create_cq_with(
        self: Arc<Self>,
        _options: CqOptions,
    ) -> Result<Arc<dyn CompletionQueue>, ObjectError<CreateCqError>> {
        ObjectError::unsupported("completion events")
    }

    /// A new completion channel.
    ///
    /// # Errors
    /// See [`CreateChannelError`].
    fn create_channel(
        self: Arc<Self>,
    ) -> Result<Arc<dyn CompletionChannel>, ObjectError<CreateChannelError>> {
        ObjectError::unsupported("completion channels")
    }

    /// `length` bytes of the device's memory, aligned to 2^`align_shift` bytes.
    ///
    /// # Errors
    /// See [`AllocDeviceMemoryError`].
    fn alloc_device_memory(
        self: Arc<Self>,
        _length: u64,
        _align_shift: u32,
    ) -> Result<Arc<dyn DeviceMemory>, ObjectError<AllocDeviceMemoryError>> {
        ObjectError::unsupported("device memory")
    }

    /// Its asynchronous events, if it has any.
    fn async_events(&self) -> Option<&dyn AsyncEventStream> {
        None
    }

    /// All that it says of itself, if it does.
    fn query(&self) -> Option<DeviceAttributes> {
        None
    }

    /// What it says of a port.
    ///
    /// # Errors
    /// [`TableError::Port`].
    fn query_port(&self, _port: u8) -> Result<PortAttributes, ObjectError<TableError>> {
        ObjectError::unsupported("port attributes")
    }

    /// An address of a port.
    ///
    /// # Errors
    /// See [`TableError`].
    fn query_gid(&self, _port: u8, _index: u32) -> Result<Gid, ObjectError<TableError>> {
        ObjectError::unsupported("table of addresses")
    }

    /// A partition key of a port.
    ///
    /// # Errors
    /// See [`TableError`].
    fn query_pkey(&self, _port: u8, _index: u16) -> Result<PKey, ObjectError<TableError>> {
        ObjectError::unsupported("table of partition keys")
    }
}

/// What a completion queue with events is made with.
#[derive(Clone)]
pub struct CqOptions {
    /// Entries.
    pub entries: u32,
    /// Where its events go.
    pub channel: Option<Arc<dyn CompletionChannel>>,
    /// What the application calls it; its events carry that.
    pub cookie: u64,
}

/// What a device is and what it can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Its name: `model`, or that of the RDMA device.
    pub name: String,
    /// Whether an IOMMU translates for it.
    pub iommu: bool,
    /// Most bytes of one region.
    pub max_region: u64,
    /// Whether regions can be on demand.
    pub on_demand: bool,
}

/// What may be used together.
pub trait ProtectionDomain: Any + Send + Sync {
    /// Registers `memory` as one region with one key.
    ///
    /// # Errors
    /// See [`RegisterError`]. Nothing is left behind then.
    fn register(
        self: Arc<Self>,
        memory: &UserRange,
        options: RegisterOptions,
    ) -> Result<Arc<dyn Region>, RegisterError>;

    /// Advice about pieces of regions of this domain (ibv_advise_mr(3)): [`Want::Fault`] prefetches for reading or for
    /// writing, [`Want::Snapshot`] maps what is present and faults nothing in. All pieces are checked before anything is
    /// done. With [`Flush::Yes`] it is done when this returns; else later, as far as it goes, and nothing is told of what
    /// cannot be had.
    ///
    /// # Errors
    /// See [`AdviseError`].
    fn advise(&self, want: Want, flush: Flush, pieces: &[Sge]) -> Result<(), AdviseError>;

    /// Whether its regions can be sealed, so that one may be without what keeps its memory; see [`Seal`].
    fn seals(&self) -> bool {
        false
    }

    /// A new reliable-connected queue pair that completes to `cq`, a queue of the same device.
    ///
    /// # Errors
    /// See [`QpError`].
    fn create_qp(
        self: Arc<Self>,
        cq: Arc<dyn CompletionQueue>,
        send_requests: u32,
    ) -> Result<Arc<dyn QueuePair>, QpError>;

    /// A new queue pair of any service, with all that can be said of one.
    ///
    /// # Errors
    /// See [`QpError`]; [`QpError::Unsupported`] from a device that has only those of [`ProtectionDomain::create_qp`].
    fn create_qp_with(self: Arc<Self>, options: QpOptions) -> Result<Arc<dyn QueuePair>, QpError> {
        Err(QpError::Unsupported { transport: options.transport })
    }

    /// A new shared receive queue for queue pairs of this domain: so many receives, of so many entries each.
    ///
    /// # Errors
    /// See [`CreateSrqError`]; [`CreateSrqError::TooMany`] of none from a device that has none.
    fn create_srq(
        self: Arc<Self>,
        _requests: u32,
        _sges: u32,
    ) -> Result<Arc<dyn SharedReceiveQueue>, CreateSrqError> {
        Err(CreateSrqError::TooMany { max: 0 })
    }

    /// A new memory window.
    ///
    /// # Errors
    /// See [`CreateKeyError`].
    fn alloc_window(
        self: Arc<Self>,
        _kind: WindowKind,
    ) -> Result<Arc<dyn Window>, ObjectError<CreateKeyError>> {
        ObjectError::unsupported("memory windows")
    }

    /// A new address handle.
    ///
    /// # Errors
    /// See [`CreateAhError`].
    fn create_ah(
        self: Arc<Self>,
        _vector: AddressVector,
    ) -> Result<Arc<dyn AddressHandle>, ObjectError<CreateAhError>> {
        ObjectError::unsupported("address handles")
    }

    /// Registers `length` bytes of device memory from `offset`; their addresses count from 0.
    ///
    /// # Errors
    /// See [`RegisterDeviceMemoryError`].
    fn register_device_memory(
        self: Arc<Self>,
        _memory: Arc<dyn DeviceMemory>,
        _access: Access,
        _offset: u64,
        _length: u64,
    ) -> Result<Arc<dyn KeyHandle>, ObjectError<RegisterDeviceMemoryError>> {
        ObjectError::unsupported("device memory")
    }

    /// A new null key: a local key whose memory reads as zeroes and forgets what is written to it.
    ///
    /// # Errors
    /// See [`CreateNullKeyError`].
    fn alloc_null(self: Arc<Self>) -> Result<Arc<dyn KeyHandle>, ObjectError<CreateNullKeyError>> {
        ObjectError::unsupported("null keys")
    }
}

/// Whether advice has been followed when the call returns (`IBV_ADVISE_MR_FLAG_FLUSH`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Flush {
    /// It has.
    Yes,
    /// It will be, best effort.
    No,
}

/// How a region is registered.
#[derive(Clone, Copy, Debug)]
pub struct RegisterOptions {
    /// Who may do what.
    pub access: Access,
    /// How its pages are kept.
    pub mode: Mode,
    /// The address of its first byte as peers name it. `None` is its virtual address.
    pub address: Option<RegionAddr>,
    /// What pinned means, of a region that is. A real device pins as its driver does, and looks at this no further.
    pub pin: PinKind,
    /// What it begins with, if it is on demand. A real device begins as its driver does, and looks at this no further.
    pub snapshot: Snapshot,
    /// The memory is hugetlb, and every change of it is one of whole huge pages (`IBV_ACCESS_HUGETLB`, `ib_umem_odp_get` in
    /// drivers/infiniband/core/umem_odp.c): one entry, one IOMMU leaf and one fault each 2 MiB. Other memory is refused, now and
    /// when it takes the place of what is there now. Without this, pinned regions have entries of 2 MiB wherever 512 pages
    /// lie together, and regions on demand where the processor has them in one huge page.
    pub hugetlb: bool,
}

impl RegisterOptions {
    /// On demand, everything but atomics allowed, at its virtual address.
    #[must_use]
    pub fn on_demand() -> Self {
        let access = Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ;
        let (mode, pin, snapshot) = (Mode::OnDemand, PinKind::Populated, Snapshot::Resident);
        Self { access, mode, address: None, pin, snapshot, hugetlb: false }
    }
    /// The same with another beginning.
    #[must_use]
    pub fn with_snapshot(self, snapshot: Snapshot) -> Self {
        Self { snapshot, ..self }
    }
    /// The same, pinned.
    #[must_use]
    pub fn pinned() -> Self {
        Self { mode: Mode::Pinned, ..Self::on_demand() }
    }
    /// The same with more done for pages that are pinned.
    #[must_use]
    pub fn with_pin(self, pin: PinKind) -> Self {
        Self { pin, ..self }
    }
    /// How pages are kept, if both can be had together.
    pub(crate) fn kept(&self) -> Result<(Mode, PinKind), RegisterError> {
        match (self.mode, self.pin) {
            (Mode::Pinned, _) | (_, PinKind::Populated) => Ok((self.mode, self.pin)),
            (_, kind) => Err(RegisterError::NotPinned { kind }),
        }
    }
    /// The same over everything that is or will be mapped in the range; see [`Mode::Implicit`].
    #[must_use]
    pub fn implicit() -> Self {
        Self { mode: Mode::Implicit, ..Self::on_demand() }
    }
    /// The same for hugetlb memory, kept in huge pages.
    #[must_use]
    pub fn with_hugetlb(self) -> Self {
        Self { hugetlb: true, ..self }
    }
    /// The same with other rights.
    #[must_use]
    pub fn with_access(self, access: Access) -> Self {
        Self { access, ..self }
    }
}

/// Why a region was not registered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// The range could not be mapped for the device.
    #[error(transparent)]
    Map(#[from] MapRegionError),
    /// The device gave no key.
    #[error(transparent)]
    Key(#[from] CreateKeyError),
    /// Peers name the memory of an implicit region by its virtual address.
    #[error("an implicit region begins at its virtual address, {address}, for peers too")]
    ImplicitAddress {
        /// Where it begins.
        address: RegionAddr,
    },
    /// Pages are kept in memory for regions that are pinned.
    #[error("pages that come and go cannot be {kind}: register the region pinned")]
    NotPinned {
        /// What was asked for.
        kind: PinKind,
    },
    /// An implicit region holds what comes, in any pages.
    #[error("an implicit region cannot be kept in huge pages")]
    ImplicitHugetlb,
    /// An implicit region has nothing to be registered in steps.
    #[error("an implicit region is registered at once, not in steps")]
    ImplicitInSteps,
}

/// Why a queue pair was not created.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QpError {
    /// The device refused.
    #[error(transparent)]
    Create(#[from] CreateQpError),
    /// The completion queue is another device's.
    #[error("the completion queue belongs to another device")]
    ForeignCq,
    /// The shared receive queue is another device's.
    #[error("the shared receive queue belongs to another device")]
    ForeignSrq,
    /// The device has no such queue pairs.
    #[error("the device has no queue pairs of {transport:?}")]
    Unsupported {
        /// Asked for.
        transport: Transport,
    },
}

/// What a queue pair is made with (ibv_create_qp(3)).
#[derive(Clone)]
pub struct QpOptions {
    /// Its service.
    pub transport: Transport,
    /// Where its send requests complete.
    pub send_cq: Arc<dyn CompletionQueue>,
    /// Where its receives complete.
    pub recv_cq: Arc<dyn CompletionQueue>,
    /// Where its receives come from, if not from a queue of its own.
    pub srq: Option<Arc<dyn SharedReceiveQueue>>,
    /// What its peer may do, until it is told otherwise.
    pub access: Access,
    /// Send requests that can be outstanding.
    pub send_requests: u32,
    /// Scatter-gather entries that a send request can have.
    pub send_sges: u32,
    /// Bytes that a send request can carry inline.
    pub inline: u32,
    /// Receives that can be outstanding. Not looked at with a shared queue.
    pub recv_requests: u32,
    /// Scatter-gather entries that a receive can have. Not looked at with a shared queue.
    pub recv_sges: u32,
    /// Every send request leaves a completion, whatever it says.
    pub signal_all: bool,
}

impl QpOptions {
    /// Of `transport`, completing to `cq`: 256 requests of 4 entries either way, and a peer that may do everything.
    #[must_use]
    pub fn new(transport: Transport, cq: &Arc<dyn CompletionQueue>) -> Self {
        Self {
            transport,
            send_cq: Arc::clone(cq),
            recv_cq: Arc::clone(cq),
            srq: None,
            access: Access::all() - Access::LOCAL_WRITE - Access::WINDOW_BIND - Access::ZERO_BASED,
            send_requests: 256,
            send_sges: 4,
            inline: 256,
            recv_requests: 256,
            recv_sges: 4,
            signal_all: false,
        }
    }
}

/// A registered region.
pub trait Region: Send + Sync {
    /// Its key, local and remote.
    fn key(&self) -> Key;
    /// The address of its first byte as peers name it.
    fn address(&self) -> RegionAddr;
    /// Who may do what.
    fn access(&self) -> Access;
    /// Its length in bytes.
    fn len(&self) -> u64;
    /// Whether it holds no byte: never.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Brings pages of `[offset, offset + len)` in ahead of use, and waits for them. Of a pinned region, those that were taken
    /// away under it. [`ProtectionDomain::advise`] is the verb with its rules.
    ///
    /// # Errors
    /// See [`AdviseError`].
    fn advise(&self, offset: u64, len: u64, want: Want) -> Result<(), AdviseError>;
    /// The same without waiting, as far as it goes: what cannot be had is not told, and if too much is asked for at a time,
    /// some of it is forgotten.
    ///
    /// # Errors
    /// See [`AdviseError`]; never [`AdviseError::Pages`].
    fn advise_later(&self, offset: u64, len: u64, want: Want) -> Result<(), AdviseError>;
    /// Copies what the device wrote to pages of `[offset, offset + len)` that bounce to where the program reads it
    /// (`dma_sync_single_for_cpu`). Only a pinned region of a device of the policy `legacy` has such pages; for others this
    /// does nothing. The peer must have been told to stop: a copy and a remote write at one time may give either.
    ///
    /// # Errors
    /// See [`SyncError`].
    fn sync_for_cpu(&self, offset: u64, len: u64) -> Result<(), SyncError>;
    /// The other way: what the program wrote to where the device reads it (`dma_sync_single_for_device`).
    ///
    /// # Errors
    /// See [`SyncError`].
    fn sync_for_device(&self, offset: u64, len: u64) -> Result<(), SyncError>;
    /// What it looks like at the moment.
    fn report(&self) -> RegionReport;
    /// Its page list in runs of like entries, on devices that let us see it.
    fn page_map(&self) -> Option<Vec<MapRun>>;
    /// The raw words of its page list, on devices that let us see it.
    fn raw_entries(&self) -> Option<Vec<u64>>;
    /// What its address space promises about changes of its memory.
    fn rung(&self) -> Rung;
    /// Changes its rights, its domain or its memory; the key stays. When this returns, nothing is under way that began as it
    /// was before.
    ///
    /// # Errors
    /// See [`ReregError`]. The region is as it was then.
    fn rereg(&self, _change: Rereg) -> Result<(), ReregError> {
        Err(ReregError::Unsupported)
    }
    /// Ends it now rather than when the last `Arc` goes. When this returns, its key reaches nothing and the device does
    /// not touch its memory any more. Always succeeds; a second call does nothing.
    fn deregister(&self);
    /// A way to end what it takes in, for who must do so where nothing may be freed or waited for. `None` where the device
    /// cannot do that.
    fn sealer(&self) -> Option<Arc<dyn Seal>> {
        None
    }
    /// The same, refused while memory windows are bound to it (IBTA volume 1, 11.2.8.5), which [`Region::deregister`] ends.
    ///
    /// # Errors
    /// [`DestroyKeyError::WindowsBound`].
    fn try_deregister(&self) -> Result<(), ObjectError<DestroyKeyError>> {
        self.deregister();
        Ok(())
    }
    /// Its counters.
    fn counters(&self) -> CounterValues {
        self.report().counters
    }
}

/// Seals a region, holding no more of it than that takes.
pub trait Seal: Send + Sync {
    /// From now on no page becomes present in the region: a fault of the device is refused. Pages that are present stay so
    /// until they are invalidated. Never waits, allocates or frees, so it may be called in a notifier callback.
    fn seal(&self);

    /// The same without waiting even for a lock: `false` if it is taken, and nothing is sealed then.
    #[must_use]
    fn try_seal(&self) -> bool;
}

/// What of a region changes (ibv_rereg_mr(3)). What is `None` stays.
#[derive(Clone, Default)]
pub struct Rereg {
    /// Who may do what.
    pub access: Option<Access>,
    /// Another domain of the same device.
    pub pd: Option<Arc<dyn ProtectionDomain>>,
    /// Other memory, and the address of its first byte as peers name it. `None` is its virtual address.
    pub memory: Option<(UserRange, Option<RegionAddr>)>,
}

/// Why a region was not changed. It is as it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReregError {
    /// It was deregistered.
    #[error("the region was deregistered")]
    Deregistered,
    /// The domain is another device's.
    #[error("the protection domain belongs to another device")]
    ForeignPd,
    /// It is being changed already, by another thread.
    #[error("the region is being reregistered by another call")]
    UnderWay,
    /// The device, or the region's kind, has no such verb: implicit regions cover what there is.
    #[error("a region of this kind is not reregistered on this device")]
    Unsupported,
    /// The memory could not be mapped for the device.
    #[error(transparent)]
    Map(#[from] MapRegionError),
    /// The device did not change the key.
    #[error(transparent)]
    Key(#[from] ReregKeyError),
}

/// Why advice was refused (ibv_advise_mr(3)).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdviseError {
    /// Outside the region.
    #[error("{len} bytes at offset {offset} pass the region's {region} bytes")]
    OutOfRange {
        /// Offset asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Bytes of the region.
        region: u64,
    },
    /// There is no piece.
    #[error("advice about nothing: at least one piece is needed")]
    Nothing,
    /// No key of this device.
    #[error("{key:?} is not a key of this device")]
    UnknownKey {
        /// What was named.
        key: Key,
    },
    /// A key, but not that of a region: one for fast registration, an indirect one, a window.
    #[error("{key:?} is not the key of a region")]
    NotARegion {
        /// What was named.
        key: Key,
    },
    /// A region of another protection domain.
    #[error("the region of {key:?} is in another protection domain")]
    OtherPd {
        /// What was named.
        key: Key,
    },
    /// A region whose pages are all there.
    #[error("the region of {key:?} is not on demand")]
    NotOnDemand {
        /// What was named.
        key: Key,
    },
    /// Prefetch for writing of a region that nothing may write.
    #[error("the region allows no writing")]
    NotWritable,
    /// The region was deregistered.
    #[error("the region was deregistered")]
    Deregistered,
    /// A real device, or its driver, said no.
    #[error("{device} refused ibv_advise_mr: {}", std::io::Error::from_raw_os_error(*errno))]
    Refused {
        /// The device.
        device: String,
        /// What it said.
        errno: i32,
    },
    /// An implicit region cannot have a part there.
    #[error("the pages have no place in the region")]
    Part(#[from] RegisterError),
    /// The pages cannot be had.
    #[error("the pages cannot be had")]
    Pages(#[from] FaultFailure<crate::region::PublishError>),
}

/// Why bounced pages were not copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SyncError {
    /// Outside the region.
    #[error("{len} bytes at offset {offset} pass the region's {region} bytes")]
    OutOfRange {
        /// Offset asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Bytes of the region.
        region: u64,
    },
    /// The region was deregistered, and what bounced was copied back then.
    #[error("the region was deregistered")]
    Deregistered,
    /// The copy failed; a part may have been made.
    #[error(transparent)]
    Copy(#[from] LinkError),
}

/// A completion queue.
pub trait CompletionQueue: Any + Send + Sync {
    /// Moves up to `max` completions into `out`; gives how many.
    ///
    /// # Errors
    /// [`Overrun`] once, when completions were lost.
    fn poll(&self, out: &mut Vec<Completion>, max: usize) -> Result<usize, Overrun>;
    /// Sleeps until a completion is there or `timeout` is over; whether one is there.
    fn wait(&self, timeout: Duration) -> bool;
    /// Arms the queue: the next completion that `notify` speaks of is an event of its channel. Whether there may be something
    /// to poll at this moment, which will be no event: poll once more before sleeping.
    fn arm(&self, _notify: Notify) -> bool {
        true
    }
    /// Counts events of this queue as dealt with.
    fn acknowledge_events(&self, _events: u32) {}
    /// Events of this queue that were taken from its channel and not acknowledged.
    fn unacknowledged_events(&self) -> u32 {
        0
    }
    /// Changes how many completions it can hold, and keeps those that it holds.
    ///
    /// # Errors
    /// See [`ResizeCqError`].
    fn resize(&self, _entries: u32) -> Result<(), ObjectError<ResizeCqError>> {
        ObjectError::unsupported("resizing of completion queues")
    }
    /// Has fewer events for more completions.
    ///
    /// # Errors
    /// [`ObjectError::Unsupported`] and no other.
    fn moderate(&self, _moderation: Moderation) -> Result<(), ObjectError<Infallible>> {
        ObjectError::unsupported("moderation of completion events")
    }
}

/// A shared receive queue: one queue of receives for many queue pairs.
pub trait SharedReceiveQueue: Any + Send + Sync {
    /// Posts a receive.
    ///
    /// # Errors
    /// See [`PostError`].
    fn post(&self, request: &RecvRequest<'_>) -> Result<(), PostError>;
    /// Asks for an asynchronous event when fewer than `limit` receives are posted, once.
    ///
    /// # Errors
    /// See [`SrqLimitError`].
    fn set_limit(&self, limit: u32) -> Result<(), SrqLimitError>;
    /// The limit that is armed; 0 if none is.
    fn limit(&self) -> u32;
    /// Receives posted that have not ended.
    fn outstanding(&self) -> u32;
    /// Its number, by which asynchronous events name it.
    fn number(&self) -> Srqn;
}

/// A queue pair.
pub trait QueuePair: Send + Sync {
    /// How a peer addresses it.
    fn endpoint(&self) -> QpAddress;
    /// Connects it, from reset to ready to send.
    ///
    /// # Errors
    /// [`ModifyQpError`] if it is not in the reset state.
    fn connect(&self, peer: QpAddress) -> Result<(), ModifyQpError>;
    /// Posts a send request.
    ///
    /// # Errors
    /// See [`PostError`].
    fn post_send(&self, request: &SendRequest<'_>) -> Result<(), PostError>;
    /// Posts send requests in order.
    ///
    /// # Errors
    /// The number that were posted before one was refused, and why it was.
    fn post_send_list(&self, requests: &[SendRequest<'_>]) -> Result<(), (usize, PostError)> {
        requests.iter().enumerate().try_for_each(|(at, one)| self.post_send(one).map_err(|error| (at, error)))
    }
    /// Posts a receive.
    ///
    /// # Errors
    /// See [`PostError`]; [`PostError::NoReceiveQueue`] if it receives from a shared queue, or not at all.
    fn post_recv(&self, _request: &RecvRequest<'_>) -> Result<(), PostError> {
        Err(PostError::NoReceiveQueue { qpn: self.endpoint().qpn })
    }
    /// Changes its state, and what goes with it (ibv_modify_qp(3)).
    ///
    /// # Errors
    /// See [`ModifyQpError`]; [`ModifyQpError::Refused`] from a device whose queue pairs can only be connected.
    fn modify(&self, _change: &QpChange) -> Result<(), ModifyQpError> {
        Err(ModifyQpError::Refused)
    }
    /// What it is set to (ibv_query_qp(3)).
    ///
    /// # Errors
    /// As [`QueuePair::modify`].
    fn query(&self) -> Result<QpAttributes, ModifyQpError> {
        Err(ModifyQpError::Refused)
    }
    /// From reset to ready to send, for datagrams that name `qkey`.
    ///
    /// # Errors
    /// As [`QueuePair::modify`].
    fn open(&self, _qkey: QKey) -> Result<(), ModifyQpError> {
        Err(ModifyQpError::Refused)
    }
}
