//! An in-process fabric: every port reaches every port, itself too, without loss and in order between any two.

use super::{Ingress, Link, LoanTerms};
use crate::sync::{Arc, RwLock};
use crate::wire::{Gid, Packet};
use hashbrown::HashMap;

/// Largest payload of a packet on this fabric: far beyond RoCE, because a copy is all it costs.
const MAX_PAYLOAD: usize = 64 << 10;

/// The ports of one in-process network.
#[derive(Default)]
pub struct Fabric {
    ports: RwLock<Ports>,
}

#[derive(Default)]
struct Ports {
    attached: HashMap<Gid, Arc<dyn Ingress>>,
    created: u128,
    /// Which ports have joined a multicast group.
    groups: HashMap<Gid, Vec<Gid>>,
}

impl Fabric {
    /// A network without ports.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// A new port. Addresses count up from `fe80::1`.
    #[must_use]
    pub fn port(self: &Arc<Self>) -> FabricPort {
        let mut ports = self.ports.write();
        ports.created += 1;
        FabricPort { fabric: Arc::clone(self), address: Gid((0xfe80 << 112) + ports.created) }
    }

    /// Ports that an HCA is attached to.
    #[must_use]
    pub fn attached(&self) -> usize {
        self.ports.read().attached.len()
    }
}

impl std::fmt::Debug for Fabric {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fabric").field("attached", &self.attached()).finish()
    }
}

/// One port of a [`Fabric`].
#[derive(Debug)]
pub struct FabricPort {
    fabric: Arc<Fabric>,
    address: Gid,
}

impl Link for FabricPort {
    fn address(&self) -> Gid {
        self.address
    }
    fn max_payload(&self) -> usize {
        MAX_PAYLOAD
    }
    fn attach(&self, ingress: Arc<dyn Ingress>) {
        self.fabric.ports.write().attached.insert(self.address, ingress);
    }
    fn detach(&self) {
        let gone = self.fabric.ports.write().attached.remove(&self.address);
        // What it had queued is dropped here, outside the lock.
        drop(gone);
    }
    fn send(&self, packet: Packet) {
        let ports = self.fabric.ports.read();
        if let Some(ingress) = ports.attached.get(&packet.destination) {
            ingress.deliver(packet);
        } else if let Some(members) = ports.groups.get(&packet.destination) {
            for ingress in members.iter().filter_map(|member| ports.attached.get(member)) {
                ingress.deliver(packet.clone());
            }
        }
    }
    fn join(&self, group: Gid) -> std::io::Result<()> {
        let mut ports = self.fabric.ports.write();
        let members = ports.groups.entry(group).or_default();
        if !members.contains(&self.address) {
            members.push(self.address);
        }
        Ok(())
    }
    fn part(&self, group: Gid) {
        let mut ports = self.fabric.ports.write();
        if let Some(members) = ports.groups.get_mut(&group) {
            members.retain(|member| *member != self.address);
        }
    }
    fn neighbour(&self, destination: Gid) -> Option<Arc<dyn Ingress>> {
        self.fabric.ports.read().attached.get(&destination).cloned()
    }
    fn takes_loans(&self, destination: Gid, terms: &LoanTerms<'_>) -> bool {
        let ports = self.fabric.ports.read();
        ports.attached.get(&destination).is_some_and(|ingress| ingress.takes_loans(terms))
    }
}
