//! The simulated world: a handful of seeds, and proof that it would see what it is there to see.

mod command;
mod oracle;
mod worlds;
