//! The fault points of the HCA.

use crate::fault_plan::Point;

/// Making a protection domain.
pub const ALLOC_PD: Point = Point::fallible("hca.alloc_pd");
/// Making a completion queue.
pub const CREATE_CQ: Point = Point::fallible("hca.create_cq");
/// Making a completion channel.
pub const CREATE_CHANNEL: Point = Point::fallible("hca.create_channel");
/// Resizing a completion queue.
pub const RESIZE_CQ: Point = Point::fallible("hca.resize_cq");
/// Giving device memory.
pub const ALLOC_DEVICE_MEMORY: Point = Point::fallible("hca.alloc_device_memory");
/// Making an address handle.
pub const CREATE_AH: Point = Point::fallible("hca.create_ah");
/// Making a queue pair: its number.
pub const CREATE_QP: Point = Point::fallible("hca.create_qp");
/// Changing a queue pair.
pub const MODIFY_QP: Point = Point::fallible("hca.modify_qp");
/// Making a shared receive queue: its number.
pub const CREATE_SRQ: Point = Point::fallible("hca.create_srq");
/// Making a key, of any sort.
pub const CREATE_KEY: Point = Point::fallible("hca.create_key");
/// Changing a key: it stays as it was.
pub const REREG_KEY: Point = Point::fallible("hca.rereg_key");
/// Posting a page-fault event: the queue is full, and the engine comes again later.
pub const FAULT_EVENT: Point = Point::fallible("hca.fault_event");
/// Carrying out a register or invalidate request: it fails as one that is not allowed.
pub const MEMORY_MANAGEMENT: Point = Point::fallible("hca.memory_management");

/// An engine's thread has found nothing to do and has not said yet that it goes to sleep.
pub const ENGINE_SLEEP: Point = Point::schedule("hca.engine_sleep");

/// A packet leaves while the port is up: it goes down.
pub const PORT_DOWN: Point = Point::occasion("hca.port_down");
/// A packet is lost because the port is down: it comes up.
pub const PORT_UP: Point = Point::occasion("hca.port_up");
/// A packet leaves: the port gets an address beside its link's, or loses it.
pub const GID_CHANGE: Point = Point::occasion("hca.gid_change");
/// A packet leaves: the first partition key becomes that of a limited member, or of a full one.
pub const PKEY_CHANGE: Point = Point::occasion("hca.pkey_change");
/// A packet leaves: the device fails.
pub const FATAL: Point = Point::occasion("hca.fatal");

/// What may happen to a device with each packet that leaves.
pub const OCCASIONS: [Point; 5] = [PORT_DOWN, PORT_UP, GID_CHANGE, PKEY_CHANGE, FATAL];

/// All others.
pub const ALL: [Point; 14] = [
    ALLOC_PD,
    CREATE_CQ,
    CREATE_CHANNEL,
    RESIZE_CQ,
    ALLOC_DEVICE_MEMORY,
    CREATE_AH,
    CREATE_QP,
    MODIFY_QP,
    CREATE_SRQ,
    CREATE_KEY,
    REREG_KEY,
    FAULT_EVENT,
    MEMORY_MANAGEMENT,
    ENGINE_SLEEP,
];
