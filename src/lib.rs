//! What the command line, the tests, the benches and the examples share.

pub mod machine;
pub mod mixed;
