//! The PCI tree, and what it answers when one device wants to reach another's BAR.
//!
//! The rule is the kernel's (drivers/pci/p2pdma.c, `calc_map_type_and_dist`): devices below a common bridge with no
//! redirecting ACS port on the way between them talk by bus address; otherwise the way is through the host bridge, where
//! that is known to forward such traffic; otherwise there is none.

/// A port that devices or other ports hang from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortId(pub(super) u32);

/// A device that masters the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceId(pub u32);

impl std::fmt::Display for DeviceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "device {}", self.0)
    }
}

/// Whether a host bridge forwards traffic between devices (`pci_p2pdma_whitelist`, and `cpu_supports_p2pdma` for those
/// that forward everything).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Forwarding {
    /// Not known to: traffic through it is lost.
    None,
    /// Between devices below this same bridge only (`REQ_SAME_HOST_BRIDGE`).
    SameBridge,
    /// Also from and to other bridges that do.
    Any,
}

impl Forwarding {
    /// Weakest first.
    pub const ALL: [Self; 3] = [Self::None, Self::SameBridge, Self::Any];
}

/// Access Control Services of a port: whether requests from below that are meant for a peer are sent up instead
/// (P2P request redirect, P2P completion redirect or P2P egress control; PCI Express Base Specification 6.12).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Acs {
    /// Peers are reached directly.
    Off,
    /// All goes up to the root.
    Redirect,
}

/// How a device reaches a peer's BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PeerRoute {
    /// By the BAR's bus address, below the host bridge and past any IOMMU. Never linked in an IOVA range.
    BusAddress,
    /// By the BAR's physical address through the host bridge; behind an IOMMU, mapped there as MMIO.
    HostBridge,
    /// Not at all.
    NotSupported,
}

/// Why a port or device cannot be put there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopologyError {
    /// No such port.
    #[error("no port {port:?} on this bus")]
    NoPort {
        /// The port named.
        port: PortId,
    },
    /// The port takes no children of that kind: a root port hangs from a host bridge, a switch and a device from a root
    /// port or a switch's downstream port, a downstream port from a switch.
    #[error("{child:?} cannot hang from {parent:?} {port:?}")]
    Misplaced {
        /// The port named.
        port: PortId,
        /// What that is.
        parent: NodeKind,
        /// What was to hang from it.
        child: NodeKind,
    },
    /// A link has one end: a root port or downstream port takes one switch or one device.
    #[error("{port:?} has its one switch or device already")]
    Occupied {
        /// The port named.
        port: PortId,
    },
}

/// What stands at a place of the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NodeKind {
    /// Where PCI meets memory.
    HostBridge(Forwarding),
    /// A port of the root complex.
    RootPort,
    /// A switch's upstream port.
    Switch,
    /// A switch's downstream port.
    DownstreamPort,
    /// A device.
    Device,
}

impl NodeKind {
    fn takes(self, child: Self) -> bool {
        match self {
            Self::HostBridge(_) => child == Self::RootPort,
            Self::RootPort | Self::DownstreamPort => matches!(child, Self::Switch | Self::Device),
            Self::Switch => child == Self::DownstreamPort,
            Self::Device => false,
        }
    }
    fn has_one_child(self) -> bool {
        matches!(self, Self::RootPort | Self::DownstreamPort)
    }
}

#[derive(Debug)]
struct Node {
    kind: NodeKind,
    parent: Option<PortId>,
    acs: Acs,
}

/// The tree. Places are never taken away.
#[derive(Debug, Default)]
pub(super) struct Topology {
    nodes: Vec<Node>,
}

impl Topology {
    fn push(&mut self, kind: NodeKind, parent: Option<PortId>, acs: Acs) -> PortId {
        self.nodes.push(Node { kind, parent, acs });
        PortId(u32::try_from(self.nodes.len() - 1).expect("fewer than 2^32 places"))
    }

    pub(super) fn host_bridge(&mut self, forwarding: Forwarding) -> PortId {
        self.push(NodeKind::HostBridge(forwarding), None, Acs::Off)
    }

    pub(super) fn add(&mut self, kind: NodeKind, parent: PortId, acs: Acs) -> Result<PortId, TopologyError> {
        let node = self.nodes.get(parent.0 as usize).ok_or(TopologyError::NoPort { port: parent })?;
        if !node.kind.takes(kind) {
            return Err(TopologyError::Misplaced { port: parent, parent: node.kind, child: kind });
        }
        if node.kind.has_one_child() && self.nodes.iter().any(|other| other.parent == Some(parent)) {
            return Err(TopologyError::Occupied { port: parent });
        }
        Ok(self.push(kind, Some(parent), acs))
    }

    fn node(&self, place: PortId) -> &Node {
        &self.nodes[place.0 as usize]
    }

    /// The bridge above (`pci_upstream_bridge`): none above a root port, for a host bridge is no PCI bridge.
    fn upstream(&self, place: PortId) -> Option<PortId> {
        let above = self.node(place).parent?;
        (!matches!(self.node(above).kind, NodeKind::HostBridge(_))).then_some(above)
    }

    fn redirects(&self, place: PortId) -> bool {
        self.node(place).acs == Acs::Redirect
    }

    fn bridge_of(&self, place: PortId) -> (PortId, Forwarding) {
        let mut at = place;
        loop {
            let node = self.node(at);
            if let NodeKind::HostBridge(forwarding) = node.kind {
                return (at, forwarding);
            }
            at = node.parent.expect("every place hangs from a host bridge in the end");
        }
    }

    /// Whether a request that goes up from `client` comes down again to `provider`.
    pub(super) fn host_bridges_forward(&self, provider: PortId, client: PortId) -> bool {
        let ((at, one), (to, other)) = (self.bridge_of(provider), self.bridge_of(client));
        if at == to { one != Forwarding::None } else { one == Forwarding::Any && other == Forwarding::Any }
    }

    /// How `client` reaches a BAR of `provider`. As the kernel counts, redirecting ports up to and including the first
    /// common bridge matter, on either side.
    pub(super) fn route(&self, provider: PortId, client: PortId) -> PeerRoute {
        let mut redirected = false;
        let mut above_provider = Some(provider);
        while let Some(a) = above_provider {
            redirected |= self.redirects(a);
            let mut below_client = false;
            let mut above_client = Some(client);
            while let Some(b) = above_client {
                if a == b {
                    return if redirected || below_client {
                        self.through_host(provider, client)
                    } else {
                        PeerRoute::BusAddress
                    };
                }
                below_client |= self.redirects(b);
                above_client = self.upstream(b);
            }
            above_provider = self.upstream(a);
        }
        self.through_host(provider, client)
    }

    fn through_host(&self, provider: PortId, client: PortId) -> PeerRoute {
        if self.host_bridges_forward(provider, client) {
            PeerRoute::HostBridge
        } else {
            PeerRoute::NotSupported
        }
    }
}

#[cfg(test)]
mod tests;
