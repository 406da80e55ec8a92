//! What a device can do, as it said when it was opened.

use std::fmt;

bitflags::bitflags! {
    /// Operations that a transport carries out over regions on demand (`enum ibv_odp_transport_cap_bits`).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Operations: u32 {
        /// Send, from such a region.
        const SEND = 1;
        /// Receive, into one.
        const RECEIVE = 1 << 1;
        /// RDMA write.
        const WRITE = 1 << 2;
        /// RDMA read.
        const READ = 1 << 3;
        /// Atomics.
        const ATOMIC = 1 << 4;
        /// Receive from a shared queue.
        const SHARED_RECEIVE = 1 << 5;
    }
}

/// Something that a device may lack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Capability {
    /// Regions on demand (ODP).
    OnDemand,
    /// A region over the whole address space.
    Implicit,
    /// Regions over DMABUFs (ibv_reg_dmabuf_mr(3)).
    Dmabuf,
    /// ibv_rereg_mr(3), of access rights at least.
    Rereg,
    /// ibv_advise_mr(3).
    Advise,
    /// Memory windows of type 1.
    WindowType1,
    /// Memory windows of type 2.
    WindowType2,
}

impl Capability {
    /// Every one.
    pub const ALL: [Self; 7] = [
        Self::OnDemand,
        Self::Implicit,
        Self::Dmabuf,
        Self::Rereg,
        Self::Advise,
        Self::WindowType1,
        Self::WindowType2,
    ];
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OnDemand => "regions on demand (ODP)",
            Self::Implicit => "implicit ODP",
            Self::Dmabuf => "regions over DMABUFs",
            Self::Rereg => "re-registration",
            Self::Advise => "advice (ibv_advise_mr)",
            Self::WindowType1 => "memory windows of type 1",
            Self::WindowType2 => "memory windows of type 2",
        })
    }
}

/// What a device can do and how much of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// What it has of [`Capability::ALL`], in that order.
    pub(super) has: [bool; Capability::ALL.len()],
    /// On demand over reliable connections.
    pub on_demand_rc: Operations,
    /// On demand over unreliable connections.
    pub on_demand_uc: Operations,
    /// On demand over datagrams.
    pub on_demand_ud: Operations,
    /// Most regions.
    pub max_regions: u64,
    /// Most bytes of one.
    pub max_region: u64,
    /// Most queue pairs.
    pub max_qps: u32,
    /// Most requests of a queue.
    pub max_requests: u32,
    /// Most entries of a completion queue.
    pub max_cq_entries: u32,
}

impl Capabilities {
    /// Whether it has `capability`.
    #[must_use]
    pub fn has(&self, capability: Capability) -> bool {
        self.has[capability as usize]
    }
}
