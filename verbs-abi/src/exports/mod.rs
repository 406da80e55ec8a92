//! The functions of the C interface. Each checks its arguments, and answers as rdma-core does.

mod absent;
mod device;
mod memory;
mod names;
mod private;
mod query;
mod start;
mod tables;
