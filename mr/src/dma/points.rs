//! The fault points of the DMA layer.

use hw_model::fault_plan::Point;

/// Reserving IOVA.
pub const RESERVE: Point = Point::fallible("dma.reserve");
/// Making IO page tables ahead of links.
pub const PREPARE: Point = Point::fallible("dma.prepare");
/// Linking a run of pages.
pub const LINK: Point = Point::fallible("dma.link");
/// The flush after a batch of links.
pub const SYNC: Point = Point::fallible("dma.sync");
/// Filling a bounce buffer.
pub const BOUNCE: Point = Point::fallible("dma.bounce");

/// All of them.
pub const ALL: [Point; 5] = [RESERVE, PREPARE, LINK, SYNC, BOUNCE];
