//! What an HCA is built with.

use super::attributes::PKeyTable;
use super::cache::{CacheShape, TranslationCacheConfig};
use super::fault::FaultScheme;
use super::time::AckTimeout;
use crate::wire::RnrTimer;

/// Bytes of payload in a full packet: a power of two from 256 (RoCE) to 65536 (in-process).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PathMtu(u32);

impl PathMtu {
    /// The smallest.
    pub const MIN: Self = Self(256);
    /// The largest.
    pub const MAX: Self = Self(64 << 10);

    /// `bytes` a packet, or `None` if that is no power of two from 256 to 65536.
    #[must_use]
    pub const fn new(bytes: u32) -> Option<Self> {
        if bytes.is_power_of_two() && bytes >= Self::MIN.0 && bytes <= Self::MAX.0 {
            Some(Self(bytes))
        } else {
            None
        }
    }
    /// Bytes.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        self.0
    }
    /// This, or the largest that a link with `max_payload` bytes a packet carries.
    #[must_use]
    pub(super) fn within(self, max_payload: usize) -> Self {
        let mut mtu = self;
        while mtu.0 as usize > max_payload && mtu > Self::MIN {
            mtu.0 /= 2;
        }
        mtu
    }
    /// Packets that a message of `length` bytes takes. One at least: a message without data is a packet too.
    #[must_use]
    pub const fn packets(self, length: u32) -> u32 {
        if length == 0 { 1 } else { length.div_ceil(self.0) }
    }
}

/// How many of each object there may be, and how large.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Protection domains.
    pub pds: u32,
    /// Memory keys: of regions, of fast registration, and of memory windows, together.
    pub keys: u32,
    /// Entries of a fast registration.
    pub fast_entries: u32,
    /// Address handles.
    pub ahs: u32,
    /// Bytes of device memory, in whole 64.
    pub device_memory: u64,
    /// Completion queues.
    pub cqs: u32,
    /// Entries of one completion queue.
    pub cq_entries: u32,
    /// Queue pairs.
    pub qps: u32,
    /// Requests outstanding on one send queue.
    pub send_requests: u32,
    /// Scatter-gather entries of one request.
    pub sges: u32,
    /// Bytes of one message.
    pub message_bytes: u32,
    /// RDMA reads and atomics outstanding on one queue pair, as requester and as responder each; 255 at most.
    pub reads: u32,
    /// Requests outstanding on one receive queue, shared or not.
    pub recv_requests: u32,
    /// Shared receive queues.
    pub srqs: u32,
    /// Bytes that a request can carry inline.
    pub inline_bytes: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            pds: 1 << 16,
            keys: 1 << 18,
            fast_entries: 1 << 16,
            ahs: 1 << 16,
            device_memory: 1 << 20,
            cqs: 1 << 16,
            cq_entries: 1 << 20,
            qps: 1 << 16,
            send_requests: 1 << 14,
            sges: 32,
            message_bytes: 1 << 30,
            reads: 16,
            recv_requests: 1 << 14,
            srqs: 1 << 16,
            inline_bytes: 1024,
        }
    }
}

/// What a responder does with a request that needs a page that is not there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum FaultPolicy {
    /// As real devices do: it tells its peer to come again (RNR NAK) and drops what comes meanwhile. What an unreliable
    /// service brings is lost.
    #[default]
    NotReady,
    /// As rdma_rxe does: it keeps the request and what comes behind it, and goes on when the page is there.
    Wait,
}

/// What an HCA is built with. Start from the default and change what matters.
#[derive(Clone, Copy, Debug)]
pub struct HcaConfig {
    /// Engines. Queue pair `n` belongs to engine `n` modulo this. Each takes a slot of the memory's DMA epoch.
    pub engines: u32,
    /// Bytes that one [`step`](super::Hca::step_engine) moves before it returns.
    pub max_burst: u32,
    /// Payload of a full packet. What the link can carry caps it.
    pub path_mtu: PathMtu,
    /// Bytes that a requester sends ahead of the acknowledgements, on one queue pair.
    pub window_bytes: u32,
    /// What a responder asks for when it is not ready.
    pub rnr_timer: RnrTimer,
    /// How long a requester waits for an acknowledgement.
    pub ack_timeout: AckTimeout,
    /// How often a requester asks again after a timeout or a sequence error, without any progress between. Real devices
    /// have three bits for it, 7 at most; over a link that loses much, more is sensible.
    pub retry_count: u8,
    /// How often a requester asks again after a receiver-not-ready NAK, 0 to 6; 7 is for ever.
    pub rnr_retry: u8,
    /// Page-fault events that can wait for software.
    pub fault_queue_depth: u32,
    /// What a responder does with a request that needs a page that is not there.
    pub fault_policy: FaultPolicy,
    /// What keys and first sequence numbers are drawn from. Two devices with one seed give the same keys.
    pub seed: u64,
    /// Destroyed keys that are not given out again, the latest so many.
    pub key_quarantine: u32,
    /// Whether posting and polling threads run the engines too. Off in a simulation, where only steps make progress.
    pub callers_drive: bool,
    /// One step translates a packet's addresses and a later one moves its bytes, so that a simulation can put an
    /// invalidation between the two.
    pub micro_steps: bool,
    /// What a page-fault event speaks of.
    pub fault_scheme: FaultScheme,
    /// The translation caches of each engine; none if they are off.
    pub translation_cache: Option<TranslationCacheConfig>,
    /// How many of each object there may be.
    pub limits: Limits,
    /// The partition keys of its port.
    pub pkeys: PKeyTable,
}

impl Default for HcaConfig {
    fn default() -> Self {
        Self {
            engines: 1,
            max_burst: 64 << 10,
            path_mtu: PathMtu::MAX,
            window_bytes: 256 << 10,
            rnr_timer: RnrTimer::SHORTEST,
            ack_timeout: const { AckTimeout::from_code(14).expect("five bits") },
            retry_count: 7,
            rnr_retry: 7,
            fault_queue_depth: 1024,
            fault_policy: FaultPolicy::NotReady,
            seed: 0,
            key_quarantine: 1 << 16,
            callers_drive: true,
            micro_steps: false,
            fault_scheme: FaultScheme::ByRequest,
            translation_cache: None,
            limits: Limits::default(),
            pkeys: PKeyTable::default(),
        }
    }
}

impl HcaConfig {
    /// For one thread that steps everything from one seed: nothing moves but in a step, and a step is small.
    #[must_use]
    pub fn simulated(seed: u64) -> Self {
        Self { seed, callers_drive: false, micro_steps: true, ..Self::default() }
    }

    /// The most bytes that one packet brings to memory: a datagram comes with its global route header.
    pub(super) const fn payload_bytes(&self) -> usize {
        self.path_mtu.bytes() as usize + super::qp::GRH_BYTES as usize
    }

    /// [`Limits::reads`] as a queue pair's attribute, which has 8 bits.
    #[must_use]
    pub(super) fn most_reads(&self) -> u8 {
        u8::try_from(self.limits.reads).unwrap_or(u8::MAX)
    }
}

/// Why an HCA could not be built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NewHcaError {
    /// A translation cache that cannot be.
    #[error(
        "no translation cache has the shape {shape:?}: sets are a power of two, ways at least 1, both at most 2^24"
    )]
    CacheShape {
        /// Asked for.
        shape: CacheShape,
    },
    /// All the places in the memory's DMA epoch are taken.
    #[error("no room for {engines} engines in the DMA epoch: {taken} of {max} places are taken")]
    NoEpochSlot {
        /// Engines asked for.
        engines: u32,
        /// Places taken.
        taken: u32,
        /// Places there are.
        max: u32,
    },
    /// A device without engines does nothing.
    #[error("an HCA needs at least one engine")]
    NoEngines,
    /// The link carries less than the smallest path MTU.
    #[error("the link carries {max_payload} bytes a packet, {} are needed", PathMtu::MIN.bytes())]
    LinkTooSmall {
        /// What the link carries.
        max_payload: usize,
    },
}
