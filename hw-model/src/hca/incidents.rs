//! What happens to a device beside what programs ask of it (IBTA volume 1, 11.6.3.4): its port goes down and comes back, its
//! tables change, it fails. Each is an asynchronous event.
//!
//! While the port is down packets are lost either way: requests of reliable services are asked again until their retries are
//! used up. A device that has failed works no more: what was posted is flushed, and no queue pair is made or changed.
//!
//! A fault plan can have any of it happen with a packet that leaves ([`points::OCCASIONS`]).

use super::attributes::{PKeyTable, PORT, PortState, TableError};
use super::device::{Device, Hca};
use super::events::AsyncEvent;
use super::points;
use crate::fault_plan::Point;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::wire::{Gid, PKey};

/// How a device is at the moment.
pub(super) struct Condition {
    down: AtomicBool,
    failed: AtomicBool,
    tables: Mutex<Tables>,
}

struct Tables {
    pkeys: PKeyTable,
    /// Addresses beside those of the link.
    gids: Vec<Gid>,
}

/// Most addresses beside those of the link.
const MOST_GIDS: usize = 7;

impl Condition {
    pub(super) fn new(pkeys: PKeyTable) -> Self {
        let tables = Mutex::new(Tables { pkeys, gids: Vec::new() });
        Self { down: AtomicBool::new(false), failed: AtomicBool::new(false), tables }
    }

    pub(super) fn is_down(&self) -> bool {
        self.down.load(Ordering::Relaxed)
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }

    pub(super) fn pkeys(&self) -> PKeyTable {
        self.tables.lock().pkeys
    }

    pub(super) fn gids(&self) -> Vec<Gid> {
        self.tables.lock().gids.clone()
    }
}

impl Device {
    /// Whether a packet that leaves now gets as far as the link.
    pub(super) fn lets_out(&self) -> bool {
        if !self.points.are_off() {
            self.meet_occasions();
        }
        !self.condition.is_down()
    }

    #[cold]
    fn meet_occasions(&self) {
        let happens = |point: Point| self.points.meet(point).fails();
        let down = self.condition.is_down();
        if happens(if down { points::PORT_UP } else { points::PORT_DOWN }) {
            self.set_port_state(if down { PortState::Active } else { PortState::Down });
        }
        if happens(points::GID_CHANGE) {
            // The link-local address that RoCE devices have beside that of their network (A17.4): it comes or goes.
            let own = Gid(0xfe80 << 112 | u128::from(self.gid.0 as u64));
            let mut tables = self.condition.tables.lock();
            if tables.gids.pop().is_none() {
                tables.gids.push(own);
            }
            drop(tables);
            self.events.post(AsyncEvent::GidChange(PORT));
        }
        if happens(points::PKEY_CHANGE) {
            // A full member of its partition becomes a limited one, or the other way.
            let PKey(first) = self.condition.pkeys().keys()[0];
            self.set_pkey(0, PKey(first ^ 0x8000));
        }
        if happens(points::FATAL) {
            self.fail();
        }
    }

    fn set_port_state(&self, state: PortState) {
        let down = state == PortState::Down;
        if self.condition.down.swap(down, Ordering::SeqCst) != down {
            self.events.post(if down { AsyncEvent::PortError(PORT) } else { AsyncEvent::PortActive(PORT) });
        }
    }

    fn set_pkey(&self, index: u16, pkey: PKey) -> bool {
        let set = self.condition.tables.lock().pkeys.set(index, pkey);
        if set {
            self.events.post(AsyncEvent::PKeyChange(PORT));
            self.tell_engines(|mail| mail.pkeys_changed = true);
        }
        set
    }

    fn fail(&self) {
        if !self.condition.failed.swap(true, Ordering::SeqCst) {
            self.events.post(AsyncEvent::DeviceFatal);
            self.tell_engines(|mail| mail.failed = true);
        }
    }

    fn tell_engines(&self, what: impl Fn(&mut super::mailbox::Mail)) {
        for mailbox in self.mailboxes.iter() {
            mailbox.leave(&what);
            mailbox.wake();
        }
    }
}

impl Hca {
    /// Takes the port down, or brings it up.
    pub fn set_port_state(&self, state: PortState) {
        self.device.set_port_state(state);
    }

    /// Changes the partition key of this index. Queue pairs that use it send with it from their next packet on.
    ///
    /// # Errors
    /// [`TableError::Index`].
    pub fn set_pkey(&self, index: u16, pkey: PKey) -> Result<(), TableError> {
        let entries = self.config().pkeys.keys().len() as u32;
        let set = self.device.set_pkey(index, pkey);
        if set { Ok(()) } else { Err(TableError::Index { index: u32::from(index), entries }) }
    }

    /// Sets the addresses of the port beside those of its link, which come first and stay. Packets leave from the link's.
    ///
    /// # Errors
    /// [`TableError::Index`] of the first that has no room.
    pub fn set_more_gids(&self, gids: &[Gid]) -> Result<(), TableError> {
        if gids.len() > MOST_GIDS {
            let entries = MOST_GIDS as u32;
            return Err(TableError::Index { index: entries, entries });
        }
        self.device.condition.tables.lock().gids = gids.to_vec();
        self.device.events.post(AsyncEvent::GidChange(PORT));
        Ok(())
    }

    /// The device fails, for good.
    pub fn fail(&self) {
        self.device.fail();
        self.progress();
    }

    /// Whether it has.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.device.condition.has_failed()
    }
}
