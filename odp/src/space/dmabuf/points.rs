//! The fault points of DMABUFs. Watching, walking and faulting an attachment meet those of every address space besides.

use hw_model::fault_plan::Point;

/// An importer attaches.
pub const ATTACH: Point = Point::fallible("odp.dmabuf.attach");
/// Pages are pinned for an importer.
pub const PIN: Point = Point::fallible("odp.dmabuf.pin");
/// The exporter is told that pages are about to be used.
pub const MAP: Point = Point::fallible("odp.dmabuf.map");
/// A move begins.
pub const MOVE: Point = Point::fallible("odp.dmabuf.move");
/// A page's bytes are copied to its new place.
pub const COPY: Point = Point::fallible("odp.dmabuf.copy");
/// The buffer is marked as withdrawn; importers are about to be told. No lock is held.
pub const WITHDRAW: Point = Point::schedule("odp.dmabuf.withdraw");

/// All of them.
pub const ALL: [Point; 6] = [ATTACH, PIN, MAP, MOVE, COPY, WITHDRAW];
