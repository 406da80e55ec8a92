//! The fault points of address spaces.

use hw_model::fault_plan::Point;

/// Beginning to watch a range.
pub const WATCH: Point = Point::fallible("odp.watch");
/// Walking a range for what is present.
pub const SNAPSHOT: Point = Point::fallible("odp.snapshot");
/// Faulting a range in.
pub const FAULT: Point = Point::fallible("odp.fault");

/// Locking or pinning a range.
pub const PIN: Point = Point::fallible("odp.pin");

/// All of them.
pub const ALL: [Point; 4] = [WATCH, SNAPSHOT, FAULT, PIN];
