//! Multicast groups: datagrams to many (IBTA volume 1, 10.5; A17.4 for how RoCEv2 addresses them).
//!
//! A datagram to a group goes to the group's address and to queue pair [`Qpn::MULTICAST`]. Each port that has joined takes one,
//! and gives every queue pair that is attached there a copy, the sender's own too.

use super::device::Hca;
use super::qp::{QueuePair, Transport};
use crate::link::Link;
use crate::sync::Mutex;
use crate::wire::{Gid, Qpn};
use hashbrown::HashMap;
use std::io;

/// Who is attached to which group, on one device.
///
/// Lock order: `changing`, then a link's own, then `members`: a link that delivers looks members up.
#[derive(Default)]
pub(super) struct Groups {
    /// Held by whoever attaches or detaches, so that a link joins a group before it can leave it.
    changing: Mutex<()>,
    members: Mutex<HashMap<Gid, Vec<Qpn>>>,
}

/// Groups that a device has queue pairs in.
pub const MOST_GROUPS: u32 = 1024;
/// Queue pairs of a device in one group.
pub const MOST_MEMBERS: u32 = 256;

/// Why a queue pair was not attached to a group, or detached from one. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum MulticastError {
    /// Groups have datagrams only.
    #[error("a queue pair of {transport:?} receives no datagrams")]
    Transport {
        /// Its service.
        transport: Transport,
    },
    /// It is no group's address.
    #[error("{group:?} is no multicast address")]
    NoGroup {
        /// What was named.
        group: Gid,
    },
    /// It is another device's.
    #[error("the queue pair belongs to another device")]
    OtherDevice,
    /// It is not attached.
    #[error("{qpn:?} is not attached to {group:?}")]
    NotAttached {
        /// The queue pair.
        qpn: Qpn,
        /// The group.
        group: Gid,
    },
    /// The device holds no more.
    #[error("a device has queue pairs in {MOST_GROUPS} groups, {MOST_MEMBERS} in each")]
    TooMany,
    /// The link cannot join the group.
    #[error("the link cannot join {group:?}: {source}")]
    Link {
        /// The group.
        group: Gid,
        /// What the system said.
        source: io::Error,
    },
}

impl Groups {
    pub(super) fn members(&self, group: Gid) -> Vec<Qpn> {
        self.members.lock().get(&group).cloned().unwrap_or_default()
    }

    fn attach(&self, group: Gid, qpn: Qpn, link: &dyn Link) -> Result<(), MulticastError> {
        let _changing = self.changing.lock();
        let known = self.members(group);
        // A second time is as good as once (rxe_attach_mcast).
        if known.contains(&qpn) {
            return Ok(());
        }
        let full = known.is_empty() && self.members.lock().len() >= MOST_GROUPS as usize;
        if full || known.len() >= MOST_MEMBERS as usize {
            return Err(MulticastError::TooMany);
        }
        if known.is_empty() {
            link.join(group).map_err(|source| MulticastError::Link { group, source })?;
        }
        self.members.lock().entry(group).or_default().push(qpn);
        Ok(())
    }

    fn detach(&self, group: Gid, qpn: Qpn, link: &dyn Link) -> Result<(), MulticastError> {
        let _changing = self.changing.lock();
        if !self.members(group).contains(&qpn) {
            return Err(MulticastError::NotAttached { qpn, group });
        }
        self.remove(group, qpn, link);
        Ok(())
    }

    /// A queue pair goes, and leaves its groups.
    pub(super) fn forget(&self, qpn: Qpn, link: &dyn Link) {
        let _changing = self.changing.lock();
        let groups: Vec<Gid> = self.members.lock().keys().copied().collect();
        groups.into_iter().for_each(|group| self.remove(group, qpn, link));
    }

    fn remove(&self, group: Gid, qpn: Qpn, link: &dyn Link) {
        let mut all = self.members.lock();
        let Some(members) = all.get_mut(&group) else { return };
        members.retain(|member| *member != qpn);
        let last = members.is_empty();
        if last {
            all.remove(&group);
        }
        drop(all);
        if last {
            link.part(group);
        }
    }
}

impl Hca {
    /// Attaches a queue pair of datagrams to a group (`ibv_attach_mcast`).
    ///
    /// # Errors
    /// See [`MulticastError`].
    pub fn attach_multicast(&self, qp: &QueuePair, group: Gid) -> Result<(), MulticastError> {
        self.check_group(qp, group)?;
        self.device.groups.attach(group, qp.qpn(), &*self.device.link)
    }

    /// Detaches it again (`ibv_detach_mcast`).
    ///
    /// # Errors
    /// See [`MulticastError`].
    pub fn detach_multicast(&self, qp: &QueuePair, group: Gid) -> Result<(), MulticastError> {
        self.check_group(qp, group)?;
        self.device.groups.detach(group, qp.qpn(), &*self.device.link)
    }

    fn check_group(&self, qp: &QueuePair, group: Gid) -> Result<(), MulticastError> {
        if !std::ptr::eq(self, &raw const **qp.hca()) {
            return Err(MulticastError::OtherDevice);
        }
        let transport = qp.spec().transport;
        if transport != Transport::UnreliableDatagram {
            return Err(MulticastError::Transport { transport });
        }
        if group.is_multicast() { Ok(()) } else { Err(MulticastError::NoGroup { group }) }
    }
}
