//! What the command line, the tests, the benches and the examples share.

pub mod bench;
pub mod demo;
pub mod info;
pub mod machine;
pub mod mixed;
pub mod peer;
pub mod perf;
pub mod range;
pub mod route;
pub mod run;
#[cfg(test)]
mod schema;
pub mod sim;
