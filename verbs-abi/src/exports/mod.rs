//! The functions of the C interface. Each checks its arguments, and answers as rdma-core does.

mod absent;
mod ah;
mod build;
mod completion;
mod device;
mod dm;
mod domain;
mod event;
mod import;
mod memory;
mod names;
mod post;
mod private;
mod query;
mod queue;
mod start;
mod tables;
mod window;
mod xrc;
