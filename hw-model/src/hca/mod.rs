//! An RDMA host channel adapter.

mod page_list;

pub use page_list::{Backing, Entry, Flags, PageList, Path};
