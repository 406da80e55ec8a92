//! Multicast groups: a socket each, as a socket that has a unicast address hears nothing else.

use super::{Shared, prepare};
use crate::sync::Arc;
use crate::sync::atomic::Ordering;
use crate::wire::{Gid, ROCE_PORT, ip_of};
use socket2::{Domain, Protocol, Socket, Type};
use std::io;
use std::net::{IpAddr, SocketAddr};

/// A group that the port has joined.
#[derive(Clone)]
pub(super) struct Group {
    pub(super) gid: Gid,
    pub(super) address: IpAddr,
    pub(super) socket: Arc<Socket>,
}

impl Shared {
    /// Joins a group. Of IPv4, as RoCEv2 networks mostly are.
    pub(super) fn join(&self, gid: Gid) -> io::Result<()> {
        let (IpAddr::V4(group), IpAddr::V4(own)) = (ip_of(gid), self.address) else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
        // Every process of the host that is in the group has one.
        socket.set_reuse_address(true)?;
        prepare(&socket, self.address, self.outbox.offloads())?;
        socket.bind(&SocketAddr::new(group.into(), ROCE_PORT).into())?;
        socket.join_multicast_v4(&group, &own)?;
        self.groups.lock().push(Group { gid, address: group.into(), socket: Arc::new(socket) });
        self.groups_changed();
        Ok(())
    }

    /// Leaves a group.
    pub(super) fn part(&self, gid: Gid) {
        self.groups.lock().retain(|group| group.gid != gid);
        self.groups_changed();
    }

    /// The receive thread looks at its groups anew.
    fn groups_changed(&self) {
        self.regroup.store(true, Ordering::Release);
        self.ring();
    }
}
