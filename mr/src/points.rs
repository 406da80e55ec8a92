//! The fault points of regions. Those of the DMA layer are in [`crate::dma::points`].

use hw_model::fault_plan::Point;

/// Making the page list of a region.
pub const PAGE_LIST: Point = Point::fallible("mr.page_list");
/// A page-fault event is about to be worked on. No lock is held.
pub const FAULT: Point = Point::schedule("mr.fault");
/// A page-fault event is worked on: it fails as if there were no such memory, and the HCA hears so.
pub const PAGE_FAULT: Point = Point::fallible("mr.page_fault");
/// The pages of a fault are there, and the HCA is about to hear so: it fails as if there were none. Rules can ask for their
/// kind, which is not known before.
pub const PAGES_IN: Point = Point::fallible("mr.pages_in");
/// Pages were looked at and are about to be published. No lock is held.
pub const PUBLISH: Point = Point::schedule("mr.publish");
/// A region's key is gone; its pages are about to be hidden. The lock that publishing takes is not held.
pub const DEREGISTER: Point = Point::schedule("mr.deregister");
/// A cache made a region and is about to keep it. No lock is held.
pub const CACHE_PUT: Point = Point::schedule("mr.cache.put");

/// All of them.
pub const ALL: [Point; 7] = [PAGE_LIST, FAULT, PAGE_FAULT, PAGES_IN, PUBLISH, DEREGISTER, CACHE_PUT];
