//! What a device says of itself: device, port, tables (IBTA volume 1, 11.2.1.2 Query HCA, 11.2.1.3 and 14.2.5.6 ports).
//!
//! Everything here is computed from the configuration and from what the engines can do: nothing is claimed twice, so
//! nothing can be claimed wrongly in one place. The flags have the bits of `include/uapi/rdma/ib_user_verbs.h`
//! (`ib_uverbs_device_cap_flags`, `ib_uverbs_odp_general_cap_bits`, `ib_uverbs_odp_transport_cap_bits`).

use super::config::{Limits, PathMtu};
use super::device::Hca;
use super::qp::Transport;
use super::request::{Operation, Remote};
use crate::addr::{PAGE_SIZE, RegionAddr};
use crate::wire::{Feth, Gid, Key, PKey, Placement, Selectivity};

bitflags::bitflags! {
    /// What a device can do (11.2.1.2).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Capabilities: u64 {
        /// Packets of another partition are counted.
        const BAD_PKEY_COUNTER = 1 << 1;
        /// Datagrams with another queue key are counted.
        const BAD_QKEY_COUNTER = 1 << 2;
        /// A transition may name the state that it is meant to leave.
        const CURRENT_STATE_CHECK = 1 << 7;
        /// Changes of the port are events.
        const PORT_ACTIVE_EVENT = 1 << 10;
        /// Its system image has a number.
        const SYSTEM_IMAGE_GUID = 1 << 11;
        /// Responders send RNR NAKs.
        const RNR_NAK = 1 << 12;
        /// Memory windows of type 1.
        const WINDOWS_TYPE_1 = 1 << 17;
        /// Extended reliable connections (annex A14).
        const EXTENDED_CONNECTIONS = 1 << 20;
        /// Fast registration, local invalidation, send with invalidation (10.7, base memory management extensions).
        const MEMORY_MANAGEMENT = 1 << 21;
        /// Memory windows of type 2B.
        const WINDOWS_TYPE_2B = 1 << 24;
        /// On-demand paging.
        const ON_DEMAND = 1 << 31;
        /// Flush to global visibility (annex A19).
        const FLUSH_GLOBAL = 1 << 38;
        /// Flush to persistence (annex A19).
        const FLUSH_PERSISTENT = 1 << 39;
        /// Atomic writes of 8 bytes (annex A19).
        const ATOMIC_WRITE = 1 << 40;
    }
}

bitflags::bitflags! {
    /// Operations of one transport service whose memory may be on demand.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct OnDemandOperations: u32 {
        /// The data of sends.
        const SEND = 1;
        /// The place of received messages.
        const RECEIVE = 1 << 1;
        /// Both sides of RDMA writes.
        const WRITE = 1 << 2;
        /// Both sides of RDMA reads.
        const READ = 1 << 3;
        /// Both sides of atomics.
        const ATOMIC = 1 << 4;
        /// The place of messages received from a shared queue.
        const SHARED_RECEIVE = 1 << 5;
        /// Flush.
        const FLUSH = 1 << 6;
        /// Atomic writes.
        const ATOMIC_WRITE = 1 << 7;
    }
}

/// What can be on demand (`ibv_odp_caps`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OnDemandCapabilities {
    /// Regions of a range.
    pub explicit: bool,
    /// One region of a whole address space.
    pub implicit: bool,
    /// By RC queue pairs.
    pub rc: OnDemandOperations,
    /// By UC queue pairs.
    pub uc: OnDemandOperations,
    /// By UD queue pairs.
    pub ud: OnDemandOperations,
    /// By XRC queue pairs.
    pub xrc: OnDemandOperations,
}

impl OnDemandCapabilities {
    /// Those of one transport service.
    #[must_use]
    pub fn of(&self, transport: Transport) -> OnDemandOperations {
        match transport {
            Transport::ReliableConnection => self.rc,
            Transport::UnreliableConnection => self.uc,
            Transport::UnreliableDatagram => self.ud,
            Transport::ExtendedInitiator | Transport::ExtendedTarget => self.xrc,
        }
    }
}

/// With what atomics are atomic (9.4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AtomicScope {
    /// There are none.
    None,
    /// Among the atomics of this device.
    Device,
    /// With processors and other devices too.
    Global,
}

/// How completion events can be spared (`ibv_cq_moderation_caps`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModerationCapabilities {
    /// Most completions that one event may stand for.
    pub max_count: u16,
    /// Longest time in microseconds that an event may wait for more.
    pub max_period_us: u16,
}

/// What a device says of itself (11.2.1.2; `ibv_query_device_ex`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceAttributes {
    /// The version of this program, as its firmware's.
    pub firmware: &'static str,
    /// The node's number: the lower half of the first address of its port.
    pub node_guid: u64,
    /// The number of the system that it is a part of.
    pub system_image_guid: u64,
    /// Vendor and part: 0, as there is no vendor.
    pub vendor: (u32, u32),
    /// Version of the hardware.
    pub hardware: u32,
    /// Ports.
    pub ports: u8,
    /// Most bytes of one region.
    pub max_region: u64,
    /// Sizes of pages that a page list can have, one bit each.
    pub page_sizes: u64,
    /// What it can do.
    pub capabilities: Capabilities,
    /// How many objects of each kind, and how large.
    pub limits: Limits,
    /// Most entries of a fast registration.
    pub max_fast_entries: u32,
    /// RDMA reads and atomics outstanding over all queue pairs, as responder.
    pub max_reads_total: u64,
    /// With what atomics are atomic.
    pub atomics: AtomicScope,
    /// The same of atomic operations beyond this device's memory (`pci_atomic_caps`): sizes, one bit a power of two.
    pub atomic_sizes: u16,
    /// What can be on demand.
    pub on_demand: OnDemandCapabilities,
    /// How completion events can be spared.
    pub moderation: ModerationCapabilities,
    /// Code of the longest time until it acknowledges a packet (9.7.6.1.3).
    pub ack_delay: u8,
    /// Partition keys in the table of a port.
    pub max_pkeys: u16,
}

/// The state of a port (14.2.5.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PortState {
    /// No link.
    Down,
    /// Packets go.
    Active,
}

/// What a device says of a port (`ibv_query_port`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortAttributes {
    /// Its state.
    pub state: PortState,
    /// The largest packets that it could carry.
    pub max_mtu: PathMtu,
    /// The largest that its link carries.
    pub active_mtu: PathMtu,
    /// Most bytes of one message.
    pub max_message: u32,
    /// Entries of its table of addresses.
    pub gids: u32,
    /// Entries of its table of partition keys.
    pub pkeys: u16,
    /// Packets dropped as of another partition.
    pub bad_pkeys: u64,
    /// Datagrams dropped as of another queue key.
    pub bad_qkeys: u64,
    /// Width of the link in lanes.
    pub width: u8,
    /// Megabits a second of one lane: what it is said to be, as the link is memory.
    pub lane_mbps: u32,
}

/// A port number that is not 1, or an index past the end of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// No such port.
    #[error("there is no port {port}: a device has port 1 and no other")]
    Port {
        /// Asked for.
        port: u8,
    },
    /// No such entry.
    #[error("there is no entry {index}: the table has {entries}")]
    Index {
        /// Asked for.
        index: u32,
        /// Entries there are.
        entries: u32,
    },
}

/// Partition keys of a port (10.9.1.1). Entries of 0 are not valid and match nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PKeyTable {
    keys: [PKey; Self::ENTRIES],
    used: u16,
}

impl PKeyTable {
    /// Most entries.
    pub const ENTRIES: usize = 16;

    /// The table of `keys`, or `None` if there are none or more than [`PKeyTable::ENTRIES`].
    #[must_use]
    pub const fn new(keys: &[PKey]) -> Option<Self> {
        if keys.is_empty() || keys.len() > Self::ENTRIES {
            return None;
        }
        let mut table = Self { keys: [PKey(0); Self::ENTRIES], used: keys.len() as u16 };
        let mut index = 0;
        while index < keys.len() {
            table.keys[index] = keys[index];
            index += 1;
        }
        Some(table)
    }

    /// Its entries.
    #[must_use]
    pub fn keys(&self) -> &[PKey] {
        &self.keys[..usize::from(self.used)]
    }

    /// Changes the entry of `index`; false if there is none.
    pub(super) fn set(&mut self, index: u16, key: PKey) -> bool {
        let there = index < self.used;
        if there {
            self.keys[usize::from(index)] = key;
        }
        there
    }

    /// The entry of `index`.
    #[must_use]
    pub fn get(&self, index: u16) -> Option<PKey> {
        self.keys().get(usize::from(index)).copied()
    }
}

impl Default for PKeyTable {
    fn default() -> Self {
        const { Self::new(&[PKey::DEFAULT]).expect("one entry") }
    }
}

/// The number of the only port.
pub const PORT: u8 = 1;

fn check_port(port: u8) -> Result<(), TableError> {
    if port == PORT { Ok(()) } else { Err(TableError::Port { port }) }
}

/// What each service can do, and so what of it can be on demand: the engines know no other memory.
fn operations() -> OnDemandCapabilities {
    let one = of_service;
    OnDemandCapabilities {
        explicit: true,
        implicit: true,
        rc: one(Transport::ReliableConnection) | OnDemandOperations::SHARED_RECEIVE,
        uc: one(Transport::UnreliableConnection),
        ud: one(Transport::UnreliableDatagram) | OnDemandOperations::SHARED_RECEIVE,
        // What they receive goes to shared queues, and to no other.
        xrc: one(Transport::ExtendedInitiator) | OnDemandOperations::SHARED_RECEIVE,
    }
}

fn of_service(service: Transport) -> OnDemandOperations {
    let remote = Remote { key: Key(0), address: RegionAddr(0) };
    let flush = Operation::Flush {
        remote,
        length: 0,
        how: Feth { placement: Placement::GLOBAL, selectivity: Selectivity::Range },
    };
    let all = [
        (Operation::Send, OnDemandOperations::SEND),
        (Operation::Write(remote), OnDemandOperations::WRITE),
        (Operation::Read(remote), OnDemandOperations::READ),
        (Operation::FetchAdd { remote, add: 0 }, OnDemandOperations::ATOMIC),
        (Operation::AtomicWrite(remote), OnDemandOperations::ATOMIC_WRITE),
        (flush, OnDemandOperations::FLUSH),
    ];
    let has = all.into_iter().filter(|(operation, _)| service.has(operation)).map(|(_, flag)| flag);
    let receive = if service.receives() { OnDemandOperations::RECEIVE } else { OnDemandOperations::empty() };
    has.fold(receive, OnDemandOperations::union)
}

impl Hca {
    /// What it says of itself (11.2.1.2).
    #[must_use]
    pub fn attributes(&self) -> DeviceAttributes {
        let config = self.config();
        let guid = self.gid().0 as u64;
        let on_demand = operations();
        let mut capabilities = Capabilities::PORT_ACTIVE_EVENT
            | Capabilities::SYSTEM_IMAGE_GUID
            | Capabilities::RNR_NAK
            | Capabilities::WINDOWS_TYPE_1
            | Capabilities::WINDOWS_TYPE_2B
            | Capabilities::MEMORY_MANAGEMENT
            | Capabilities::CURRENT_STATE_CHECK
            | Capabilities::ON_DEMAND;
        let atomic = on_demand.rc.contains(OnDemandOperations::ATOMIC);
        capabilities.set(Capabilities::ATOMIC_WRITE, on_demand.rc.contains(OnDemandOperations::ATOMIC_WRITE));
        capabilities.set(Capabilities::FLUSH_GLOBAL, on_demand.rc.contains(OnDemandOperations::FLUSH));
        let extended = on_demand.xrc.contains(OnDemandOperations::SEND);
        capabilities.set(Capabilities::EXTENDED_CONNECTIONS, extended);
        DeviceAttributes {
            firmware: env!("CARGO_PKG_VERSION"),
            node_guid: guid,
            system_image_guid: guid,
            vendor: (0, 0),
            hardware: 0,
            ports: 1,
            max_region: u64::MAX,
            page_sizes: !(PAGE_SIZE - 1),
            capabilities,
            limits: config.limits,
            max_fast_entries: config.limits.fast_entries,
            max_reads_total: u64::from(config.limits.reads) * u64::from(config.limits.qps),
            atomics: if atomic { AtomicScope::Global } else { AtomicScope::None },
            atomic_sizes: if atomic { 1 << 3 } else { 0 },
            on_demand,
            moderation: ModerationCapabilities { max_count: u16::MAX, max_period_us: u16::MAX },
            ack_delay: 15,
            max_pkeys: config.pkeys.keys().len() as u16,
        }
    }

    /// What it says of `port` (14.2.5.6).
    ///
    /// # Errors
    /// [`TableError::Port`].
    pub fn port_attributes(&self, port: u8) -> Result<PortAttributes, TableError> {
        check_port(port)?;
        let config = self.config();
        Ok(PortAttributes {
            state: if self.device.condition.is_down() { PortState::Down } else { PortState::Active },
            max_mtu: PathMtu::MAX,
            active_mtu: config.path_mtu,
            max_message: config.limits.message_bytes,
            gids: self.gids().len() as u32,
            pkeys: config.pkeys.keys().len() as u16,
            bad_pkeys: 0,
            bad_qkeys: 0,
            width: 4,
            lane_mbps: 25_000,
        })
    }

    /// The addresses of its port. The first is [`Hca::gid`].
    #[must_use]
    pub fn gids(&self) -> Vec<Gid> {
        let mut gids = self.device.link.addresses();
        gids.extend(self.device.condition.gids());
        gids
    }

    /// The address of `port` with this index (`ibv_query_gid`).
    ///
    /// # Errors
    /// See [`TableError`].
    pub fn query_gid(&self, port: u8, index: u32) -> Result<Gid, TableError> {
        check_port(port)?;
        let gids = self.gids();
        let entries = gids.len() as u32;
        gids.get(index as usize).copied().ok_or(TableError::Index { index, entries })
    }

    /// The partition key of `port` with this index (`ibv_query_pkey`).
    ///
    /// # Errors
    /// See [`TableError`].
    pub fn query_pkey(&self, port: u8, index: u16) -> Result<PKey, TableError> {
        check_port(port)?;
        let pkeys = &self.device.condition.pkeys();
        let entries = pkeys.keys().len() as u32;
        pkeys.get(index).ok_or(TableError::Index { index: u32::from(index), entries })
    }
}
