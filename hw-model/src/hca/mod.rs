//! An RDMA host channel adapter: keys, protection domains, completion queues, queue pairs, page faults.
//!
//! ```text
//!   post_send --> send queue --> requester --+                            +--> responder
//!                                            |   translate, copy          |    translate, copy
//!   completion queue <-- completions         +--> packet --> link --> ----+
//!                                            ^                            |
//!                                            +--- ACK, NAK, read data <---+
//! ```
//!
//! **Software's side** is [`Hca`] and the objects made by it. They hold their device by `Arc` and go when dropped.
//! **The engines' side** is sans-IO: [`Hca::step_engine`] is told the time and does a bounded amount of work. Threads
//! ([`Hca::spawn_engines`]), posting and polling callers, or a simulation step the same engines.
//!
//! **Memory** is reached through the page list of a key, entry by entry at the time of the DMA, inside the DMA epoch of
//! that memory. An entry that is not there (or not writable) makes a page-fault event ([`Hca::faults`]) that software
//! answers ([`Hca::resume`]): the requester waits, the responder tells its peer to come again (RNR NAK), other queue pairs
//! go on.
//!
//! Lock order: engine, send queue, receive queue, completion queue. Nothing is held, allocated or freed inside a burst
//! (see `engine`).

mod ah;
mod ahead;
mod attributes;
mod cache;
mod config;
mod cq;
mod device;
mod device_memory;
mod driver;
mod engine;
mod events;
mod fault;
mod incidents;
mod key;
mod key_verbs;
mod loan;
mod mailbox;
mod multicast;
mod outbox;
mod page_list;
mod pd;
pub mod points;
mod qp;
mod request;
mod stats;
mod time;
mod translate;
mod xrcd;

pub use ah::{AddressHandle, CreateAhError};
pub use attributes::{
    AtomicScope, Capabilities, DeviceAttributes, ModerationCapabilities, OnDemandCapabilities,
    OnDemandOperations, PKeyTable, PORT, PortAttributes, PortState, TableError,
};
pub use cache::{CacheShape, Replacement, TranslationCacheConfig};
pub use config::{FaultPolicy, HcaConfig, Limits, NewHcaError, PathMtu};
pub use cq::{CompletionQueue, CqSpec, Cqn, CreateCqError, Moderation, Notify, Overrun, ResizeCqError};
pub use device::Hca;
pub use device_memory::{
    AllocDeviceMemoryError, CreateNullKeyError, DeviceMemory, DeviceRegion, OutsideDeviceMemory,
    RegisterDeviceMemoryError,
};
pub use driver::EngineThreads;
pub use engine::Step;
pub use events::{AsyncEvent, AsyncEvents, CompletionChannel, CompletionEvent, CreateChannelError};
pub use fault::{FaultAccess, FaultKind, FaultOutcome, FaultQueue, FaultScheme, FaultToken, PageFault};
pub use key::{
    Access, CreateKeyError, DestroyKeyError, FastKeySpec, FastMap, FastMemory, ImplicitKeySpec,
    ImplicitTable, IndirectEntry, IndirectKeySpec, IndirectList, IndirectListError, IndirectTarget,
    KeyChange, KeyMemory, KeySpec, KeyViolation, MIN_INDIRECT_ENTRY, MapKeyError, ReregKeyError, SLOT_BYTES,
    SLOT_SHIFT, UnknownKey, WindowKind, WindowSpec,
};
pub(crate) use loan::Loan;
pub use multicast::{MOST_GROUPS, MOST_MEMBERS, MulticastError};
pub use page_list::{Backing, Entry, Flags, HUGE_PAGES, OutOfMemory, PageList, Path, Slot};
pub use pd::{Pd, PdError};
pub use qp::{
    Attribute, CreateQpError, CreateSrqError, Demands, ModifyQpError, QpAddress, QpAttributes, QpChange,
    QpSpec, QpState, QueuePair, SharedReceiveQueue, SrqLimitError, SrqSpec, Transport, demands,
};
pub use request::{
    AddressVector, Attached, Completion, DatagramSource, Destination, Operation, OperationCode, PostError,
    RecvRequest, Remote, RequestId, SendRequest, Sge, Status, WindowBind,
};
pub use stats::{HcaStats, LiveObjects};
pub use time::{AckTimeout, Time};
pub use xrcd::{ExtendedDomain, OpenDomainError, OpenQpError};

pub use crate::wire::{
    Feth, Gid, GlobalRoute, Immediate, Key, PKey, Placement, Psn, QKey, Qpn, RnrTimer, Selectivity, Srqn,
};
